"""Whether the machine has the memory of a plan: an error if the process would be killed, a warning if it may."""

import warnings

from aspec.errors import BudgetError
from aspec.io.host_memory import available_bytes, growth_bytes, limit_left, total_bytes
from aspec.io.memory import give_back
from aspec.plan import Plan
from aspec.planning.resolve import Resolved
from aspec.units import format_bytes


def check_memory(plan: Plan, resolved: Resolved) -> None:
    """Compare a plan, and the budget that the user gave, with the memory of this machine.

    Raises BudgetError if a given budget exceeds the limit of a control group, as of a container: the system then kills
    the process without a message. More than the free memory is a warning, as the system may find room; so is a default
    budget, which left some room when it was chosen.
    """
    asked, kind = resolved.options.device_memory, resolved.kind
    most = total_bytes() if kind is None else kind.free_bytes()
    if asked is not None and asked > most:
        where = "this process may use" if kind is None else f"{kind.name()} has free"
        _warn(f"--device-memory {format_bytes(asked)} is more than {where}, which is {format_bytes(most)}.")
    held = sum(plan.host_arithmetic.values()) if kind is not None else plan.held_bytes
    growth, left, free = growth_bytes(), limit_left(), available_bytes()
    if held + growth > (free if left is None else min(free, left)):
        give_back()  # memory that the search and its measurements have freed
        growth, left, free = growth_bytes(), limit_left(), available_bytes()
    needs = (
        f"the plan holds {format_bytes(held)} of host memory and the process itself takes {format_bytes(growth)} more"
    )
    is_given = asked is not None or resolved.options.process_memory is not None
    if left is not None and held + growth > left and (is_given or kind is not None):
        raise BudgetError(
            f"{needs}, but the memory limit of this process's control group leaves {format_bytes(left)}: the system "
            f"would kill the process. {_remedy(left - growth, on_device=kind is not None)}, or raise the limit."
        )
    if held + growth > free:
        _warn(f"{needs}, but {format_bytes(free)} are free. {_remedy(free - growth, on_device=kind is not None)}.")


def _remedy(room: int, *, on_device: bool) -> str:
    option = "--host-memory" if on_device else "--device-memory"
    return f"Give {option} at most {room >> 20}MiB" if room >= 1 << 20 else "Free some memory"


def _warn(text: str) -> None:
    warnings.warn(text, RuntimeWarning, stacklevel=3)

"""What a failure of a run is called: errors of devices and of models' code, in words that name a remedy."""

import traceback

import torch

from aspec.engine.allocate import out_of_memory
from aspec.errors import AspecError, DeviceError, UnsupportedModelError, first_error, reason_of
from aspec.plan import Plan
from aspec.units import format_bytes


def translate_error(error: Exception, plan: Plan) -> Exception:
    """A DeviceError for an error of the device, a UserError for one of a model's code; any other error unchanged."""
    first = first_error(error)
    translated: Exception | None = None
    if isinstance(first, torch.OutOfMemoryError):
        translated = DeviceError(out_of_memory(plan))
    elif isinstance(first, torch.AcceleratorError):
        said = str(first).partition("\n")[0]
        translated = DeviceError(
            f"the device failed while it ran: {said}. Nothing more can be run on it in this process."
        )
    elif not isinstance(first, AspecError) and _from_model(first):
        translated = UnsupportedModelError(
            f"the code of the model failed while it ran: {reason_of(first)}. Its config.json may contradict itself; if "
            f"transformers runs this model, please report it."
        )
    if translated is None:
        return error
    translated.__cause__ = error
    return translated


def _from_model(error: BaseException) -> bool:
    """Whether an error comes from below the code of a model of transformers."""
    frames = traceback.walk_tb(error.__traceback__)
    return any(str(frame.f_globals.get("__name__")).startswith("transformers.models.") for frame, _ in frames)


def over_budget(plan: Plan, peak_bytes: int) -> str:
    """The message for a peak above the plan's budget."""
    return (
        f"the device held {format_bytes(peak_bytes)} at its peak, more than the budget of "
        f"{format_bytes(plan.budget_bytes or 0)}; the plan counted {plan.describe()}. Please report this."
    )

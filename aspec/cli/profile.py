"""What ``aspec profile`` does: print this machine's figures, cached or measured now, and the costs of a pair."""

import asyncio
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from aspec.cli.flags.planning import ProfileFlags
from aspec.cli.front.opening import fetching
from aspec.cli.interrupts import run
from aspec.errors import UserError
from aspec.io.host_info import compiler, multiplies_bf16
from aspec.models.model import Model
from aspec.observe.console import Console
from aspec.planning.resolve import Resolved, resolve
from aspec.profiling.cost_tables import ModelCost
from aspec.profiling.hardware import Hardware, Processor
from aspec.profiling.model_shape import ModelShape, shape_of
from aspec.profiling.profile_cache import AcceptanceStats, known_acceptance, machine_profile
from aspec.profiling.roofline import prices, weight_seconds
from aspec.profiling.threads import choose_threads, thread_counts
from aspec.tasks.task import WorkItem
from aspec.threads import Threads
from aspec.units import format_bytes, format_rate

TOKENS = (1, 16, 64, 256)  # sizes of the work items whose costs are shown
CONTEXT = 256  # keys before these tokens


@dataclass(frozen=True, slots=True)
class PairOnMachine:
    """A machine, and a pair of models on it."""

    hardware: Hardware
    dtype: str
    target: ModelShape
    draft: ModelShape | None
    known: AcceptanceStats
    threads: Threads  # that work on this pair takes


def profile_to_console(flags: ProfileFlags, console: Console) -> None:
    """Get the figures, print them, and write them to --output. Raises AspecError."""
    with fetching(console) as fetches:
        resolved = resolve(flags.options(), fetches, weights=False)
    pair = run(lambda: asyncio.to_thread(_pair_on_machine, resolved, flags))
    if flags.output is not None:
        _write(flags.output, pair.hardware)
        console.note(f"{flags.output}: the figures of this machine, to plan for it on another machine")
    if flags.as_json:
        print(json.dumps(as_object(pair)))
        return
    for line in table(pair):
        print(line)


def _pair_on_machine(resolved: Resolved, flags: ProfileFlags) -> PairOnMachine:
    target, draft = resolved.target, resolved.draft
    big = Model(target, dtype=resolved.dtype, adapter=resolved.adapter)
    small = None if draft is None else Model(draft, dtype=resolved.dtype, adapter=resolved.draft_adapter)
    how: dict[str, Any] = {"kind": resolved.kind, "link_rate": resolved.options.link_rate, "refresh": flags.refresh}
    counts = thread_counts(flags.threads, on_device=resolved.kind is not None)
    machines = {number: machine_profile(target, big.dtype, number, **how) for number in counts}
    known = AcceptanceStats() if draft is None else known_acceptance(target, draft)
    shape, draft_shape = shape_of(big), None if small is None else shape_of(small)
    threads = choose_threads(machines, shape, draft_shape, exact=resolved.exact)
    return PairOnMachine(machines[threads.decode], shape.dtype, shape, draft_shape, known, threads)


def _write(path: Path, hardware: Hardware) -> None:
    try:
        path.write_text(json.dumps(hardware.as_object(), indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path}: the machine profile cannot be written: {error.strerror}.") from error


# -- the output --------------------------------------------------------------------------------------------


def table(pair: PairOnMachine) -> Iterator[str]:
    """The figures as lines of text."""
    hardware, cpu, dtype = pair.hardware, pair.hardware.processor, pair.dtype
    yield f"{hardware.name}, {pair.threads}, {dtype}"
    yield from _kernels(pair)
    links = {"host to device": hardware.h2d_bytes_per_s, "device to host": hardware.d2h_bytes_per_s}
    yield from _rows(
        ("disk, direct reads", format_rate(hardware.disk_bytes_per_s)),
        *((label, format_rate(rate)) for label, rate in links.items() if rate is not None),
        ("memory copy", format_rate(cpu.copy_rate)),
        ("memory read, matrix x vector", format_rate(cpu.memory_bytes_per_s)),
        ("matrix products slower beside reads", f"{100 * (hardware.read_contention - 1):.0f} %"),
        *(
            (
                f"1 GB of weights, {rows} rows",
                _both(*_gigabyte_s(cpu, dtype, rows)),
            )
            for rows in TOKENS
        ),
        ("a layer at least", _both(cpu.layer_s, cpu.exact_layer_s or cpu.layer_s)),
        ("a draw of 100 000 entries", _both(1e5 * (cpu.greedy_s or 0.0), 1e5 * (cpu.sampled_s or 0.0), "with noise")),
    )
    yield ""
    layers = len(pair.target.layers)
    yield f"the target: {layers} layers, {format_bytes(pair.target.nbytes)}"
    plain, exact = (_layer_s(pair, exact=exact) for exact in (False, True))
    yield from _rows(
        *((f"a layer, {count} tokens", _both(plain[count], exact[count])) for count in TOKENS),
        ("all layers from disk", f"{pair.target.nbytes / pair.hardware.disk_bytes_per_s:.2f} s"),
    )
    if pair.draft is not None:
        source = (
            f"from {pair.known.proposals:.0f} rounds" if pair.known.proposals else "a guess; aspec bench measures it"
        )
        yield "the draft"
        yield from _rows(
            ("one step", f"{1e3 * _draft_s(pair):.2f} ms"),
            ("acceptance", f"{pair.known.acceptance:.2f}, {source}"),
        )


def _kernels(pair: PairOnMachine) -> Iterator[str]:
    """What computes products on the processor, or how they would get faster."""
    if pair.hardware.h2d_bytes_per_s is not None or pair.dtype != "bfloat16":
        return
    if found := compiler():
        yield f"kernels compiled for this processor by llvmlite {found}, where they are faster"
    elif multiplies_bf16():
        yield "pip install 'aspec[fast]' compiles kernels for this processor, and uses those that are faster"
    else:
        yield "no instructions for bf16: pip install 'aspec[fast]' compiles kernels that multiply several times as fast"


def as_object(pair: PairOnMachine) -> dict[str, Any]:
    """The JSON object, in seconds and bytes. ``hardware`` is the content of a machine file."""
    made: dict[str, Any] = {"hardware": pair.hardware.as_object(), "dtype": pair.dtype}
    made["threads"] = asdict(pair.threads)
    made["target"] = {
        "layers": len(pair.target.layers),
        "bytes": pair.target.nbytes,
        "layer_s": _layer_s(pair, exact=False),
        "exact_layer_s": _layer_s(pair, exact=True),
    }
    if pair.draft is not None:
        made["draft"] = {"step_s": _draft_s(pair), "bytes": pair.draft.nbytes}
        made["acceptance"] = {"value": pair.known.acceptance, "spread": pair.known.spread}
        made["acceptance"]["proposals"] = pair.known.proposals
    return made


def _layer_s(pair: PairOnMachine, *, exact: bool) -> dict[int, float]:
    """Seconds of an average layer for each size in TOKENS, by the tokens of an item."""
    made = {}
    for count in TOKENS:
        item = WorkItem(0, (0,), (CONTEXT,), (count,))
        cost_table = prices(pair.target, pair.draft, pair.hardware, exact=exact).cost_table
        assert cost_table is not None
        made[count] = cost_table.target.layer_seconds(item) / len(pair.target.layers)
    return made


def _draft_s(pair: PairOnMachine) -> float:
    """Seconds of a draft step for one row."""
    cost_table = prices(pair.target, pair.draft, pair.hardware).cost_table
    assert cost_table is not None
    draft: ModelCost | None = cost_table.draft
    assert draft is not None
    item = WorkItem(-1, (0,), (CONTEXT,), (1,))
    return draft.embed_seconds(item) + draft.layer_seconds(item) + draft.head_seconds(1, 1)


def _gigabyte_s(cpu: Processor, dtype: str, rows: int) -> tuple[float, float]:
    """Seconds for 1 GB of weights with ``rows`` rows, without and with exact passes."""
    return 1e9 * weight_seconds(cpu, dtype, rows), 1e9 * weight_seconds(cpu, dtype, rows, exact=True)


def _both(plain_s: float, other_s: float, other: str = "exact") -> str:
    return f"{1e3 * plain_s:.2f} ms, {other} {1e3 * other_s:.2f}"


def _rows(*rows: tuple[str, str]) -> Iterator[str]:
    for label, value in rows:
        yield f"  {label:38} {value}"

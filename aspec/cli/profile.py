"""What ``aspec profile`` does: this machine's figures from the cache or measured now, and what a pair costs on it."""

import asyncio
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aspec.api import run
from aspec.cli.command_flags import ProfileFlags
from aspec.errors import UserError
from aspec.models.model import Model
from aspec.observe.console import Console
from aspec.planning.resolve import Resolved, resolve
from aspec.profiling.cost_tables import ModelCost
from aspec.profiling.hardware import Hardware, Processor
from aspec.profiling.model_shape import ModelShape, shape_of
from aspec.profiling.profile_cache import AcceptanceStats, known_acceptance, machine_profile
from aspec.profiling.roofline import prices, weight_seconds
from aspec.tasks.task import WorkItem
from aspec.units import format_bytes, format_rate

TOKENS = (1, 16, 64, 256)  # of the items whose prices are shown
CONTEXT = 256  # keys before them


@dataclass(frozen=True, slots=True)
class Found:
    """A machine, and a pair as it finds it."""

    hardware: Hardware
    dtype: str
    target: ModelShape
    draft: ModelShape | None
    known: AcceptanceStats


def profile_to_console(flags: ProfileFlags, console: Console) -> None:
    """Measure or recall, print, and write the file that was asked for. Raises AspecError."""
    resolved = resolve(flags.options())
    found = run(lambda: asyncio.to_thread(_find, resolved, flags))
    if flags.output is not None:
        _write(flags.output, found.hardware)
        console.note(f"{flags.output}: this machine, for plans made elsewhere")
    if flags.as_json:
        print(json.dumps(as_object(found)))
        return
    for line in table(found):
        print(line)


def _find(resolved: Resolved, flags: ProfileFlags) -> Found:
    target, draft = resolved.target, resolved.draft
    big = Model(target, dtype=resolved.dtype)
    small = None if draft is None else Model(draft, dtype=resolved.dtype)
    how: dict[str, Any] = {"kind": resolved.kind, "link_rate": resolved.options.link_rate, "refresh": flags.refresh}
    hardware = machine_profile(target, big.dtype, flags.threads, **how)
    known = AcceptanceStats() if draft is None else known_acceptance(target, draft)
    shape = shape_of(big)
    return Found(hardware, shape.dtype, shape, None if small is None else shape_of(small), known)


def _write(path: Path, hardware: Hardware) -> None:
    try:
        path.write_text(json.dumps(hardware.as_object(), indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path}: the machine profile cannot be written: {error.strerror}.") from error


# -- what is said --------------------------------------------------------------------------------------------


def table(found: Found) -> Iterator[str]:
    """For people."""
    hardware, cpu, dtype = found.hardware, found.hardware.processor, found.dtype
    yield f"{hardware.name}, {hardware.threads} compute threads, {dtype}"
    links = {"host to device": hardware.h2d_bytes_per_s, "device to host": hardware.d2h_bytes_per_s}
    yield from _rows(
        ("disk, direct reads", format_rate(hardware.disk_bytes_per_s)),
        *((label, format_rate(rate)) for label, rate in links.items() if rate is not None),
        ("memory copy", format_rate(cpu.copy_rate)),
        ("memory read, matrix x vector", format_rate(cpu.memory_bytes_per_s)),
        ("products slower beside reads", f"{100 * (hardware.read_contention - 1):.0f} %"),
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
    layers = len(found.target.layers)
    yield f"the target: {layers} layers, {format_bytes(found.target.nbytes)}"
    plain, exact = (_layer_s(found, exact=exact) for exact in (False, True))
    yield from _rows(
        *((f"a layer, {count} tokens", _both(plain[count], exact[count])) for count in TOKENS),
        ("all layers from disk", f"{found.target.nbytes / found.hardware.disk_bytes_per_s:.2f} s"),
    )
    if found.draft is not None:
        said = f"from {found.known.proposals:.0f} rounds" if found.known.proposals else "a guess, aspec bench learns it"
        yield "the draft"
        yield from _rows(
            ("one step", f"{1e3 * _draft_s(found):.2f} ms"),
            ("acceptance", f"{found.known.acceptance:.2f}, {said}"),
        )


def as_object(found: Found) -> dict[str, Any]:
    """The JSON object; seconds, bytes. ``hardware`` is what a machine file holds."""
    made: dict[str, Any] = {"hardware": found.hardware.as_object(), "dtype": found.dtype}
    made["target"] = {
        "layers": len(found.target.layers),
        "bytes": found.target.nbytes,
        "layer_s": _layer_s(found, exact=False),
        "exact_layer_s": _layer_s(found, exact=True),
    }
    if found.draft is not None:
        made["draft"] = {"step_s": _draft_s(found), "bytes": found.draft.nbytes}
        made["acceptance"] = {"value": found.known.acceptance, "spread": found.known.spread}
        made["acceptance"]["proposals"] = found.known.proposals
    return made


def _layer_s(found: Found, *, exact: bool) -> dict[int, float]:
    """Seconds of an average layer by the tokens of an item."""
    made = {}
    for count in TOKENS:
        item = WorkItem(0, (0,), (CONTEXT,), (count,))
        cost_table = prices(found.target, found.draft, found.hardware, exact=exact).cost_table
        assert cost_table is not None
        made[count] = cost_table.target.layer_seconds(item) / len(found.target.layers)
    return made


def _draft_s(found: Found) -> float:
    """Seconds of a draft step for one row."""
    cost_table = prices(found.target, found.draft, found.hardware).cost_table
    assert cost_table is not None
    draft: ModelCost | None = cost_table.draft
    assert draft is not None
    item = WorkItem(-1, (0,), (CONTEXT,), (1,))
    return draft.embed_seconds(item) + draft.layer_seconds(item) + draft.head_seconds(1, 1)


def _gigabyte_s(cpu: Processor, dtype: str, rows: int) -> tuple[float, float]:
    """Of a step that is not exact, and of one that is."""
    return 1e9 * weight_seconds(cpu, dtype, rows), 1e9 * weight_seconds(cpu, dtype, rows, exact=True)


def _both(plain_s: float, other_s: float, other: str = "exact") -> str:
    return f"{1e3 * plain_s:.2f} ms, {other} {1e3 * other_s:.2f}"


def _rows(*rows: tuple[str, str]) -> Iterator[str]:
    for label, value in rows:
        yield f"  {label:38} {value}"

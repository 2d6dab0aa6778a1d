"""What gpu_check.py makes of the steps' records: thresholds with verdicts, failures, and a table for people."""

import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from aspec.units import format_bytes, format_rate
from tools import gpu_runs, gpu_steps
from tools.contest import Record

Records = Mapping[str, Record]
"""What every step found, by its name."""

WIDTH = 120
NUM_EQUAL = len(gpu_steps.FAMILIES) * len(gpu_steps.SHAPES)


@dataclass(frozen=True, slots=True)
class Threshold:
    """A figure that must not be below ``least`` or above ``most``."""

    name: str
    find: Callable[[Records], float | None]
    steps: tuple[str, ...]
    least: float | None = None
    most: float | None = None
    anywhere: bool = False  # judged in a dry run too

    def judge(self, records: Records, dry: bool) -> Record:
        """The figure and the verdict; what was not found has not been proved."""
        found = self.find(records)
        verdict = "not judged"
        if self.anywhere or not dry:
            low, high = self.least is not None, self.most is not None
            bad = found is None or (low and found < self.least) or (high and found > self.most)
            verdict = "failed" if bad else "passed"
        return {"name": self.name, "least": self.least, "most": self.most, "found": found, "verdict": verdict}


def at(*path: str) -> Callable[[Records], Any]:
    """Reads a figure at a place in the records; None where there is none."""

    def find(records: Records) -> Any:
        found: Any = records
        for key in path:
            found = found.get(key) if isinstance(found, dict) else None
        return found

    return find


def ratio(run: str, kind: str) -> Callable[[Records], float | None]:
    """Decode tokens/s of a run of aspec's over those of the fastest alternative of a kind."""

    def find(records: Records) -> float | None:
        own = at("stream", "runs", run, "decode_tokens_per_s")(records)
        fastest = at("peers", "most_tokens_per_s", kind)(records)
        return own / fastest if own and fastest else None

    return find


def thresholds() -> Iterator[Threshold]:
    """All of them."""
    contract = partial(Threshold, steps=("contract",))
    yield contract("tests passed", at("contract", "passed"), least=1, anywhere=True)
    yield contract("tests failed", at("contract", "failed"), most=0, anywhere=True)
    yield contract("tests skipped for want of a device", at("contract", "skipped_without_device"), most=0)
    equality = partial(Threshold, steps=("equality",), anywhere=True)
    yield equality("runs held against transformers", at("equality", "compared"), least=NUM_EQUAL)
    yield equality("of them with other tokens", at("equality", "different"), most=0)
    for run, shape in gpu_runs.SHAPES.items():
        stream = partial(Threshold, steps=("stream",))
        found = partial(at, "stream", "runs", run)
        yield stream(f"{run}: stream / pinned link", found("link_share"), least=0.95)
        yield stream(f"{run}: share of the ceiling", found("ceiling_share"), least=0.90)
        if shape.speculation != "off":
            yield stream(f"{run}: drafts under the stream", found("draft_hidden"), least=0.90)
        yield stream(f"{run}: allocator's peak / budget", found("peak_share"), most=1.0)
    beside = partial(Threshold, steps=("stream", "peers"))
    yield beside("one prompt: aspec / accelerate", ratio("tree", gpu_runs.ONE), least=20)
    yield beside("one prompt: aspec / assistant", ratio("tree", gpu_runs.ASSISTANT), least=4)
    yield beside("batch: aspec / accelerate's best", ratio("batch", gpu_runs.BATCH), least=5)


def judge(records: Records, dry: bool) -> list[Record]:
    """Every threshold of the steps that were asked for."""
    return [one.judge(records, dry) for one in thresholds() if records.keys() >= set(one.steps)]


def failures(records: Records) -> dict[str, str]:
    """Steps, and runs inside them, that did not end well; a batch that was too large is none."""
    found = {name: record["failure"] for name, record in records.items() if "failure" in record}
    for name, record in records.items():
        runs = record.get("runs", {}).items()
        found |= {f"{name}, {run}": one["failure"] for run, one in runs if "failure" in one and not one.get("tried")}
    return found


# -- for people ----------------------------------------------------------------------------------------------


def lines(records: Records, verdicts: Sequence[Record]) -> Iterator[str]:
    """All of it: what every step found, then the thresholds."""
    for name, record in records.items():
        bad = len(failures({name: record}))
        ended = "failed" if "failure" in record else f"{bad} runs failed" if bad else "done"
        yield f"{name}: {ended} in {record['seconds']:.1f} s"
        known = {key: value for key, value in record.items() if key not in ("runs", "seconds", "contender")}
        yield from described("", known)
        nested = {key: value for key, value in known.items() if isinstance(value, dict)}
        for run, found in (nested | record.get("runs", {})).items():
            yield from described(run, found)
    yield ""
    for one in verdicts:
        bound = f"at least {one['least']:g}" if one["least"] is not None else f"at most {one['most']:g}"
        found = "-" if one["found"] is None else f"{one['found']:.4g}"
        yield f"{one['name']:40} {found:>8}   {bound:14} {one['verdict']}"


def described(name: str, found: Record) -> Iterator[str]:
    """The figures of a run, or how it failed; texts and lists are in the JSON."""
    figures = {key: value for key, value in found.items() if isinstance(value, int | float)}
    words = [f"{key} {figure(key, value)}" for key, value in figures.items()]
    if "failure" in found:
        words.append(f"FAILED: {found['failure'].splitlines()[-1].strip()}")
    if words:
        text = f"{name}: {', '.join(words)}" if name else ", ".join(words)
        yield from textwrap.wrap(text, WIDTH, initial_indent="  ", subsequent_indent="      ")


def figure(key: str, value: float) -> str:
    """A number by the unit that its name ends with."""
    if key.endswith("bytes_per_s"):
        return format_rate(value)
    if "bytes" in key:
        return format_bytes(value)
    if isinstance(value, bool):
        return "yes" if value else "no"
    return str(value) if isinstance(value, int) else f"{value:.4g}"

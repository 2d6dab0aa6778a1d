"""The race detector: replays the spans of a run and checks every access to every buffer.

Two accesses to a buffer conflict when one of them writes. In a correct run conflicting accesses never overlap in time,
and a read finds the content that it expects: the write of that content ended before the read began, and no other write
lies between them. The tests run it on every trace, real and simulated.
"""

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

from aspec.tasks.task import Span


@dataclass(frozen=True, slots=True)
class _Use:
    span: Span
    content: str
    writes: bool


def find_races(spans: Iterable[Span], tolerance_s: float = 0.0) -> list[str]:
    """One sentence for every conflict of a run; empty when there is none.

    ``tolerance_s``: seconds by which the clocks of two devices may disagree.
    """
    uses: dict[str, list[_Use]] = defaultdict(list)
    for span in spans:
        for access in span.task.reads:
            uses[access.buffer].append(_Use(span, access.content, writes=False))
        for access in span.task.writes:
            uses[access.buffer].append(_Use(span, access.content, writes=True))
    return [race for buffer, own in uses.items() for race in _check(buffer, own, tolerance_s)]


def _check(buffer: str, uses: list[_Use], tolerance_s: float) -> list[str]:
    """Check one buffer's accesses in program order; their times must agree with that order."""
    races = []
    content = ""
    last_write: Span | None = None
    reads_stop_s, last_read = float("-inf"), last_write
    for use in sorted(uses, key=lambda use: (use.span.task.id, use.writes)):
        span = use.span
        if last_write is not None and last_write is not span and span.start_s < last_write.stop_s - tolerance_s:
            races.append(_describe(buffer, last_write, span, "overlaps the write before it"))
        if not use.writes:
            if use.content != content:
                races.append(f"{buffer}: {span.task.label} expects {use.content!r}, the buffer holds {content!r}")
            if span.stop_s > reads_stop_s:
                reads_stop_s, last_read = span.stop_s, span
            continue
        if last_read is not None and last_read is not span and span.start_s < reads_stop_s - tolerance_s:
            races.append(_describe(buffer, last_read, span, "writes while a task still reads"))
        content, last_write = use.content, span
        reads_stop_s, last_read = float("-inf"), None
    return races


def _describe(buffer: str, first: Span, second: Span, what: str) -> str:
    return (
        f"{buffer}: {second.task.label} (task {second.task.id}, from {second.start_s:.9f} s) {what}: "
        f"{first.task.label} (task {first.task.id}, until {first.stop_s:.9f} s)"
    )

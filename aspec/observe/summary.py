"""The summary of a run in words and figures, as ``aspec trace --summary`` prints it."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from aspec.observe.timeline import (
    DECODE,
    LaneUse,
    Stall,
    Timeline,
    bottleneck,
    critical_path,
    decode_stretch,
    draft_wait_s,
    hidden_share,
    stalls,
    uses_of,
)
from aspec.units import format_rate

MOST_STALLS = 3  # listed, the longest ones


@dataclass(frozen=True, slots=True)
class Summary:
    """Figures of a run: lanes, overlap and stalls of its decoding, the critical path of the whole run."""

    seconds: float
    decode_s: float
    rounds: int
    tokens: int
    tokens_per_s: float | None  # while decoding
    tokens_per_pass: float | None
    ceiling_tokens_per_s: float | None  # the speed if the lane that binds the weights had no gap
    lanes: tuple[LaneUse, ...]
    hidden: float | None  # share of target and draft compute that ran while weights streamed
    states_s: tuple[float, float]  # of recurrent layers, in the whole run: nodes, commits
    draft_wait_s: float  # seconds that the target waited for running drafts, in the whole run
    bottleneck: str
    critical_path: dict[str, float]  # seconds by lane
    stalls: tuple[Stall, ...]

    def as_dict(self) -> dict[str, Any]:
        """The figures for ``--json``."""
        return {
            "seconds": self.seconds,
            "decode_s": self.decode_s,
            "rounds": self.rounds,
            "tokens": self.tokens,
            "tokens_per_s": self.tokens_per_s,
            "tokens_per_pass": self.tokens_per_pass,
            "ceiling_tokens_per_s": self.ceiling_tokens_per_s,
            "lanes": {use.lane: {"share": use.share, "bytes_per_s": use.busy_bytes_per_s} for use in self.lanes},
            "hidden": self.hidden,
            "states_s": dict(zip(("nodes", "commits"), self.states_s, strict=True)),
            "draft_wait_s": self.draft_wait_s,
            "bottleneck": self.bottleneck,
            "critical_path_s": self.critical_path,
            "stalls": [{"lane": s.lane, "seconds": s.seconds, "cause": s.cause} for s in self.stalls],
        }

    def lines(self) -> Iterator[str]:
        """The summary as lines of text."""
        yield f"{self.seconds:.2f} s, decoding {self.decode_s:.2f} s of it: {self.rounds} passes, {self.tokens} tokens"
        if self.tokens_per_s is not None and self.tokens_per_pass is not None:
            line = f"{self.tokens_per_s:.2f} tokens/s, {self.tokens_per_pass:.2f} tokens per pass"
            if self.ceiling_tokens_per_s:
                share = 100 * self.tokens_per_s / self.ceiling_tokens_per_s
                line += f", {share:.0f} % of the ceiling of {self.ceiling_tokens_per_s:.2f}"
            yield line
        yield self.bottleneck
        yield ""
        yield "lane     busy     while busy"
        for use in self.lanes:
            rate = format_rate(use.busy_bytes_per_s) if use.busy_bytes_per_s else ""
            yield f"{use.lane:8} {100 * use.share:4.0f} %   {rate}".rstrip()
        if self.hidden is not None:
            yield f"overlap: {100 * self.hidden:.0f} % of target and draft compute ran while weights streamed"
        if any(self.states_s):
            nodes_ms, commits_ms = (1e3 * seconds for seconds in self.states_s)
            yield f"recurrent states: {nodes_ms:.1f} ms for nodes, inside layers, and {commits_ms:.2f} ms for commits"
        if self.draft_wait_s > 0:
            share = 100 * self.draft_wait_s / self.seconds
            yield f"the target waited {self.draft_wait_s * 1e3:.1f} ms for running drafts, {share:.2f} % of the run"
        total = sum(self.critical_path.values())
        if total > 0:
            path = sorted(self.critical_path.items(), key=lambda pair: -pair[1])
            shares = ", ".join(f"{lane} {100 * s / total:.1f} %" for lane, s in path if s / total >= 5e-4)
            yield f"critical path: {shares}"
        for stall in self.stalls:
            yield f"stall: {stall.lane} idle for {stall.seconds * 1e3:.1f} ms at {stall.start_s:.3f} s: {stall.cause}"


def _relative_to(zero_s: float, stall: Stall) -> Stall:
    """The same stall, in seconds since the start of the run."""
    return replace(stall, start_s=stall.start_s - zero_s, stop_s=stall.stop_s - zero_s)


def _ceiling(uses: list[LaneUse], decoded: int, per_pass: float | None, bytes_per_pass: int) -> float | None:
    """Tokens per second of the slower of two: the link at its rate while busy, and decoding weights without a gap."""
    rate = next((use.busy_bytes_per_s for use in uses if use.busy_bytes_per_s), None)
    found = [per_pass * rate / bytes_per_pass] if per_pass and rate and bytes_per_pass else []
    found += [decoded / use.busy_s for use in uses if use.lane == DECODE and use.busy_s > 0 and per_pass]
    return min(found, default=None)


def summarise(timeline: Timeline) -> Summary:
    """Compute the summary of a run."""
    start, stop = decode_stretch(timeline)
    uses = uses_of(timeline, start, stop)
    passes = len(timeline.rounds) - 1
    decoded = sum(r.tokens for r in timeline.rounds[1:])
    per_pass = decoded / passes if passes > 0 else None
    return Summary(
        seconds=timeline.stop_s - timeline.start_s,
        decode_s=stop - start,
        rounds=len(timeline.rounds),
        tokens=sum(r.tokens for r in timeline.rounds),
        tokens_per_s=decoded / (stop - start) if passes > 0 and stop > start else None,
        tokens_per_pass=per_pass,
        ceiling_tokens_per_s=_ceiling(uses, decoded, per_pass, int(timeline.facts.get("bytes_per_pass", 0))),
        lanes=tuple(uses),
        hidden=hidden_share(timeline.work(start, stop)),
        states_s=timeline.states_s,
        draft_wait_s=draft_wait_s(timeline),
        bottleneck=bottleneck(uses),
        critical_path=critical_path(timeline),
        stalls=tuple(_relative_to(timeline.start_s, stall) for stall in stalls(timeline, start, stop)[:MOST_STALLS]),
    )

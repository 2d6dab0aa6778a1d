"""The README's pictures: the dashboard of a simulated run as SVG, and the lanes of a trace as SVG or PNG.

    python tools/picture.py dashboard tools/pictures/dashboard.svg
    python tools/picture.py lanes run.json.gz tools/pictures/lanes.png --from 2.0 --seconds 2.5

The dashboard is drawn by the code that draws it live, from a snapshot in virtual time: the same bytes every time.
A PNG needs `pip install resvg-py`.
"""

import argparse
import io
from collections.abc import Iterator
from html import escape
from pathlib import Path

from rich.console import Console

from aspec.generation.text.tokenizer import Tokenizer
from aspec.observe.chrome_trace import TRACKS_PER_LANE, assign_tracks
from aspec.observe.frame import Frame
from aspec.observe.monitor import Monitor
from aspec.observe.snapshot import Snapshot
from aspec.observe.summary import summarise
from aspec.observe.timeline import Slice, Timeline
from aspec.observe.trace_reading import read_trace
from aspec.options import DEMO
from aspec.plan import Plan, PlannedPart, PlanRequest, Tier
from aspec.planning.sim_backend import SimCosts
from aspec.planning.simulation import simulate
from aspec.tasks.task import Span

SHOWN_S = 42.0  # the moment of the simulated run that is drawn
COLUMNS, LINES = 120, 28
WIDTH, LEFT, TRACK, GAP, TOP = 1200, 90, 26, 8, 20
COLOURS = {
    "disk": "#6c8ebf",
    "h2d": "#5fb3b3",
    "d2h": "#5fd7af",
    "target": "#82b074",
    "draft": "#b48ead",
    "cpu": "#bdb76b",
}
INK, PAPER, QUIET, RULE = "#d8d8d8", "#292929", "#9a9a9a", "#4a4a4a"


def simulated_snapshot() -> Snapshot:
    """A model of 26 GB on a device of 8 GB behind a link, fed by a fast disk, in the middle of decoding."""
    part = 160_000_000
    parts = tuple(PlannedPart(i, i // 4, part, part, Tier.DEVICE if i // 4 % 8 == 5 else Tier.DISK) for i in range(160))
    held = {"resident layers": 20 * part, "12 slots": 12 * part, "draft weights": 1 << 30, "KV cache": 512 << 20}
    request = PlanRequest(
        budget_bytes=8 << 30, capacity=4096, prefill_tokens=512, max_draft_tokens=16, fixed_draft_tokens=12
    )
    plan = Plan(parts, 40, 12, part, request, num_staging=3, draft_resource="draft", arithmetic=held)
    profile = SimCosts(
        disk_bytes_per_s=14e9, copy_bytes_per_s=25e9, layer_s=3e-3, layer_token_s=2e-4, draft_s=9e-3, acceptance=0.85
    )
    monitor = Monitor()
    monitor.opened(plan, 256, 300, ("a 26 GB model with a draft", "prompt of 300 tokens", "greedy"))
    tokenizer = Tokenizer.load(DEMO / "target")
    text = iter(tokenizer.encode(Path(__file__).read_text(encoding="utf-8")))
    seen: list[Snapshot] = []

    def finished(span: Span) -> None:
        monitor(span)
        for outcome in span.outcomes:
            monitor.heard(tokenizer.decode([next(text) for _ in range(outcome.num_new)]))
        if span.stop_s >= SHOWN_S and not seen:
            seen.append(monitor.snapshot(span.stop_s))

    simulate(plan, profile, [(300, 256)], [finished], [monitor.issued])
    return seen[0]


def dashboard_svg() -> str:
    """The frame of the simulated run."""
    console = Console(record=True, width=COLUMNS, height=LINES, file=io.StringIO(), force_terminal=True)
    console.print(Frame(simulated_snapshot()), end="")
    return console.export_svg(title="aspec generate", unique_id="aspec")


def lanes_svg(timeline: Timeline, start_s: float, seconds: float) -> str:
    """A stretch of a trace: rounds on top, a row per track, a line of words under it."""
    tracks = assign_tracks(timeline)
    rows = {track: row for row, track in enumerate(sorted(set(tracks.values())), start=1)}
    scale = (WIDTH - LEFT - 20) / seconds
    shown = [s for s in timeline.slices if s.stop_s > start_s and s.start_s < start_s + seconds]
    height = TOP + (len(rows) + 1) * (TRACK + GAP) + 62
    body = [f'<rect width="{WIDTH}" height="{height}" fill="{PAPER}" rx="8"/>']
    body += _labels(timeline, rows)
    for r in timeline.rounds:
        if r.stop_s > start_s and r.start_s < start_s + seconds:
            at, end = max(r.start_s, start_s), min(r.stop_s, start_s + seconds)
            words = f"round {r.number}: {r.proposed} proposed, {r.accepted} accepted, {r.tokens} tokens"
            x, wide = LEFT + (at - start_s) * scale, (end - at) * scale
            body.append(_box(x, TOP, wide, "#555555"))
            body.append(_words(x + 6, TOP + 17, words if wide > 8 * len(words) else f"round {r.number}", INK))
    body += [_slice(s, TOP + rows[tracks[s.id]] * (TRACK + GAP), start_s, seconds, scale) for s in shown]
    body += _axis(start_s - timeline.start_s, seconds, scale, height)
    summary = summarise(timeline)
    words = [summary.bottleneck]
    words += [f"{100 * summary.hidden:.0f} % of target and draft compute under the stream"] if summary.hidden else []
    words += [f"{summary.tokens_per_s:.2f} tokens/s"] if summary.tokens_per_s else []
    body.append(_words(LEFT, height - 12, " · ".join(words), INK))
    head = f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" font-family="DejaVu Sans Mono"'
    return head + ' font-size="12">\n' + "\n".join(body) + "\n</svg>\n"


def _labels(timeline: Timeline, rows: dict[int, int]) -> Iterator[str]:
    yield _words(10, TOP + 17, "rounds", QUIET)
    named: set[str] = set()
    for track, row in rows.items():
        lane = timeline.lanes[track // TRACKS_PER_LANE - 1]
        if lane not in named:
            yield _words(10, TOP + row * (TRACK + GAP) + 17, lane, COLOURS[lane])
        named.add(lane)


def _slice(s: Slice, y: float, start_s: float, seconds: float, scale: float) -> str:
    at, end = max(s.start_s, start_s), min(s.stop_s, start_s + seconds)
    x, wide = LEFT + (at - start_s) * scale, max(0.6, (end - at) * scale)
    text = _words(x + 3, y + 17, s.name.removeprefix("read "), PAPER) if wide > 8 * len(s.name) else ""
    return _box(x, y, wide, COLOURS[s.lane]) + text


def _axis(start_s: float, seconds: float, scale: float, height: float) -> Iterator[str]:
    step = next(step for step in (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0) if seconds / step <= 12)
    for i in range(int(seconds / step) + 1):
        x = LEFT + i * step * scale
        yield f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{height - 50}" stroke="{RULE}" stroke-width="0.5"/>'
        yield _words(x + 2, height - 38, f"{start_s + i * step:.2f} s", QUIET)


def _box(x: float, y: float, wide: float, colour: str) -> str:
    return f'<rect x="{x:.1f}" y="{y}" width="{max(0.4, wide - 0.6):.1f}" height="{TRACK}" fill="{colour}"/>'


def _words(x: float, y: float, text: str, colour: str) -> str:
    return f'<text x="{x:.1f}" y="{y}" fill="{colour}">{escape(text)}</text>'


def write(path: Path, svg: str) -> None:
    """SVG, or PNG where the name says so."""
    if path.suffix != ".png":
        path.write_text(svg, encoding="utf-8")
        return
    import resvg_py

    path.write_bytes(bytes(resvg_py.svg_to_bytes(svg_string=svg)))


def main() -> None:
    """Draw one picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    kinds = parser.add_subparsers(dest="kind", required=True)
    dashboard = kinds.add_parser("dashboard", help="the dashboard of a simulated run")
    lanes = kinds.add_parser("lanes", help="the lanes of a trace")
    lanes.add_argument("trace", type=Path)
    lanes.add_argument("--from", dest="start", type=float, default=0.0, help="seconds (default: %(default)s)")
    lanes.add_argument("--seconds", type=float, default=2.0, help="how many to show (default: %(default)s)")
    for kind in (dashboard, lanes):
        kind.add_argument("output", type=Path)
    options = parser.parse_args()
    if options.kind == "dashboard":
        write(options.output, dashboard_svg())
    else:
        timeline = next(iter(read_trace(options.trace).values()))
        write(options.output, lanes_svg(timeline, timeline.start_s + options.start, options.seconds))


if __name__ == "__main__":
    main()

"""One frame of the live dashboard, drawn from a snapshot.

Rules. A frame reads only a snapshot and a size: no clock, no state between frames, no markup. It yields segments with
ready-made styles, because rich's tables and panels hold the interpreter for tens of milliseconds, and the loop waits.
Glyphs carry the meaning and colours repeat it. May NOT go in: measuring (it is in ``timeline.py``).
"""

import io
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import ceil

from rich.console import Console, ConsoleOptions, RenderResult
from rich.segment import Segment
from rich.style import Style

from aspec.observe import timeline
from aspec.observe.snapshot import MEASURING, LaneView, SlotState, Snapshot
from aspec.observe.terminal.text import tail, visible, wrap
from aspec.options import MEASURE
from aspec.units import format_bytes, format_part, format_rate

CELL_S = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5)  # possible seconds per cell of a strip; each divides a second
STRIP_S = 4.0  # a strip shows at least so many seconds
LABEL = 11  # cells of the left column
FIGURES = 19  # cells of the right column: `` 100 %  18.91 GB/s `` and a margin
NARROW = 56  # below this width the right column shows only the share
MOST_ROWS = 2  # most rows for the slots, and for the layers
LEAST_BUSY = 1e-4  # of a cell: a smaller share is a rounding error of the clock

PLAIN, BOLD, DIM = Style(), Style(bold=True), Style(color="bright_black")
TITLE = Style(color="color(110)", bold=True)
ALARM, WARNING = Style(color="bright_red", bold=True), Style(color="color(179)", bold=True)
_COLORS: Mapping[str, int] = {
    timeline.DISK: 67,
    timeline.H2D: 73,
    timeline.D2H: 79,
    timeline.DECODE: 110,
    timeline.TARGET: 108,
    timeline.DRAFT: 139,
    timeline.CPU: 144,
}
LANE_STYLES = {lane: Style(color=f"color({color})") for lane, color in _COLORS.items()}
SLOT_STYLES = {
    SlotState.LOADING: LANE_STYLES[timeline.DISK],
    SlotState.READY: PLAIN,
    SlotState.IN_USE: LANE_STYLES[timeline.TARGET],
    SlotState.FREE: DIM,
}


@dataclass(frozen=True, slots=True)
class Glyphs:
    """The characters of a frame, each one cell wide."""

    levels: str  # from 1/8 to 8/8
    stall: str  # an idle link
    rest: str  # any other idle lane
    streams: str  # a layer that streams: none of it is on the device
    slots: str  # in the order of SLOT_STYLES
    bar: str  # done, remaining
    tick: str
    dot: str
    more: str


UNICODE = Glyphs("▁▂▃▄▅▆▇█", "×", "·", "░", "↓○●·", "━─", "╵", "·", "…")
ASCII = Glyphs("__--==##", "x", ".", ".", "vo@.", "=-", "'", "-", "~")


@dataclass(frozen=True, slots=True)
class Window:
    """The time that the strips show; cell ``i`` covers ``cell_s`` seconds from ``(first + i) * cell_s`` on."""

    cell_s: float
    first: int
    num_cells: int
    start_s: float  # at or after the run's first work
    stop_s: float

    @classmethod
    def of(cls, lanes: Sequence[LaneView], now_s: float, num_cells: int) -> "Window":
        """The last seconds; cells begin at multiples of their length, so that they do not flicker."""
        cell_s = next((cell for cell in CELL_S if num_cells * cell >= STRIP_S), CELL_S[-1])
        first = ceil(now_s / cell_s - 1e-6) - num_cells
        starts = (start for lane in lanes for start in (*(w[0] for w in lane.work), *lane.running))
        return cls(cell_s, first, num_cells, max(first * cell_s, min(starts, default=now_s)), now_s)

    def measure(self, view: LaneView) -> tuple[timeline.LaneUse, list[timeline.Interval]]:
        """A lane's figures and busy intervals. A task in flight counts as busy until now; its bytes count as 0."""
        work = [*view.work, *((start, self.stop_s, 0) for start in view.running)]
        merged = timeline.merge(timeline.clip(view.until(self.stop_s), self.start_s, self.stop_s))
        return timeline.lane_use(view.name, work, self.start_s, self.stop_s), merged

    def cell_cover(self, merged: Iterable[timeline.Interval]) -> list[float]:
        """The covered share of each cell, for disjoint intervals."""
        cells = [0.0] * self.num_cells
        for start, stop in merged:
            begin, end = max(0.0, start / self.cell_s - self.first), stop / self.cell_s - self.first
            for cell in range(int(begin), min(self.num_cells, ceil(end))):
                until = end if end < cell + 1 else cell + 1  # not min and max: this is the innermost loop
                cells[cell] += until - (begin if begin > cell else cell)
        return cells

    def shares(self, merged: Iterable[timeline.Interval]) -> list[float | None]:
        """The busy share of each cell's part of the run; None where a cell has no such part yet."""
        seen = self.cell_cover([(self.start_s, self.stop_s)])
        shares = [b / s if s > 1e-6 else None for b, s in zip(self.cell_cover(merged), seen, strict=True)]
        if seen[-1] < 1 - 1e-6 and (shares[-1] or 0.0) <= LEAST_BUSY:
            shares[-1] = None  # it may still become busy: show no alarm that would disappear again
        return shares


class Frame:
    """Draws a snapshot: stage, lanes, bottleneck, slots, layers, accepted lengths, and the text generated so far.

    It fits any console of 40 columns or more: never wider, never higher, no wrapped line. If the height is too small,
    the least important sections are left out first.
    """

    def __init__(self, snapshot: Snapshot) -> None:
        self._snapshot = snapshot

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """The frame's segments, each line ended by a newline."""
        layout = Layout(self._snapshot, max(1, options.max_width), ASCII if options.ascii_only else UNICODE)
        for line in layout.lines(max(1, options.max_height)):
            if Segment.get_line_length(line) <= layout.width:
                yield from line
            else:
                yield from Segment.adjust_line_length(line, layout.width - 1, pad=False)
                yield Segment(layout.glyphs.more, DIM)
            yield Segment.line()


def frame_text(snapshot: Snapshot, width: int, height: int, color: bool = False) -> str:
    """A frame as text; with escape sequences if ``color`` is set."""
    terminal = Console(file=io.StringIO(), width=width, height=height, force_terminal=color, no_color=not color)
    with terminal.capture() as capture:
        terminal.print(Frame(snapshot), end="")
    return capture.get()


@dataclass(frozen=True, slots=True)
class Layout:
    """Lays out the sections of a frame: snapshot, width in cells, characters."""

    snapshot: Snapshot
    width: int
    glyphs: Glyphs

    @property
    def room(self) -> int:
        """Cells to the right of the labels."""
        return max(1, self.width - LABEL - 1)

    def lines(self, height: int) -> list[list[Segment]]:
        """The sections that fit, from top to bottom; the text takes the remaining lines."""
        s = self.snapshot
        num_cells = max(5, self.width - LABEL - (FIGURES if self.width >= NARROW else 7))
        window = Window.of(s.lanes, s.now_s, num_cells)
        lanes = [window.measure(view) for view in s.lanes]
        strips, bound = [self.strip(use, window.shares(merged)) for use, merged in lanes], self.bound(lanes)
        # (rank, lines): the highest rank is left out first, rank 0 never
        sections: list[tuple[int, list[list[Segment]]]] = [
            (2, [self.headline()]),
            (8, [self.about()] if s.about else []),
            (9, [[]]),
            (0, strips),
            (3, [self.axis(window)] if lanes else []),
            (0, bound if lanes else []),
            (9, [[]] if s.slots or s.residency else []),
            (4, self.slots() if s.slots else []),
            (5, self.layers() if s.residency else []),
            (6, [self.row("experts", [(self.joined(s.experts.facts, self.room), PLAIN)])] if s.experts else []),
            (6, [self.memory()] if s.held else []),
            (9, [[]] if any(s.accepted) else []),
            (7, self.accepted() if any(s.accepted) else []),
            (1, [[Segment(" " + self.glyphs.bar[1] * (self.width - 2), DIM)]]),
        ]
        least = max(1, min(3, height // 6))  # fewest lines of text
        for rank in range(9, 0, -1):
            if sum(len(part) for _, part in sections) + least <= height:
                break
            sections = [section for section in sections if section[0] != rank]
        lines = [line for _, part in sections for line in part]
        if len(lines) >= height:  # not all lanes fit: keep those nearest to the files
            lines = [*strips[: max(0, height - 2)], *bound[:1]][:height]
        return lines + self.texts(height - len(lines))

    @property
    def encoding(self) -> str:
        """The characters that the terminal has."""
        return "ascii" if self.glyphs is ASCII else "utf-8"

    def texts(self, height: int) -> list[list[Segment]]:
        """The end of the text; of several rows each has lines of its own."""
        texts, width = self.snapshot.texts, max(1, self.width - 2)
        if len(texts) <= 1:
            return [[Segment(f" {line}")] for line in tail("".join(texts), width, height, self.encoding)]
        shown = texts if len(texts) <= height else texts[: max(0, height - 1)]
        each, size = max(1, height // len(texts)), len(str(len(texts) - 1)) + 2
        lines = []
        for index, text in enumerate(shown):
            own = tail(
                text if each > 1 else text.replace("\n", " "), max(1, width - size - 1), each, self.encoding
            ) or [""]
            labels = [f" {f'[{index}]':<{size}} ", *[" " * (size + 2)] * (len(own) - 1)]
            lines += [[Segment(label, DIM), Segment(line)] for label, line in zip(labels, own, strict=True)]
        if len(shown) < len(texts) and height:
            lines.append([Segment(f" {self.glyphs.more} {len(texts) - len(shown)} more rows", DIM)])
        return lines

    def row(self, label: str, parts: Iterable[tuple[str, Style]]) -> list[Segment]:
        """A line with its label on the left."""
        segments = (Segment(text, style) for text, style in parts)
        return [Segment(f" {label[: LABEL - 1]:<{LABEL - 1}}", DIM), *Segment.simplify(segments)]

    def joined(self, facts: Sequence[str], room: int) -> str:
        """The first facts that fit in ``room`` cells, in one line."""
        separator = f" {self.glyphs.dot} "
        while len(facts) > 1 and len(separator.join(facts)) > room:
            facts = facts[:-1]
        return separator.join(facts)

    def headline(self) -> list[Segment]:
        """The stage and its progress: a bar while loading, tokens while decoding."""
        s = self.snapshot
        head = [Segment(" aspec  ", TITLE), Segment(f"{s.stage}  ", BOLD)]
        room = self.width - sum(len(segment.text) for segment in head) - 1
        elapsed = _duration(s.stage_s)
        if s.stage == "decode":
            of, per_pass = (f"of {s.total} ", "tokens per pass") if self.width >= 80 and s.total else ("", "per pass")
            facts = [f"{s.tokens} {of}tokens"]
            facts += [f"{s.tokens_per_s:.2f} tokens/s"] if s.tokens_per_s is not None else []
            facts += [f"{s.tokens_per_pass:.2f} {per_pass}"] if s.tokens_per_pass is not None else []
            return [*head, Segment(self.joined([*facts, f"{s.rounds} rounds", elapsed], room), PLAIN)]
        if s.total <= 0:
            words = f"{MEASURING}, {elapsed}" if s.stage == MEASURE else elapsed
            return [*head, Segment(words[:room], DIM)]
        if s.counts_tokens:
            facts, rate = [f"{s.done} of {s.total} prompt tokens"], f"{s.done / max(1e-9, s.stage_s):.1f} tokens/s"
        else:
            facts, rate = [format_part(s.done, s.total)], format_rate(s.done / max(1e-9, s.stage_s))
        if s.done > 0 and s.stage_s > 0:
            facts.append(rate)
            facts.append(f"ETA {_duration(s.stage_s * max(0, s.total - s.done) / s.done)}")
        figures = self.joined(facts, room - 6)
        cells = min(64, max(0, room - len(figures) - 2))
        full = min(cells, int(cells * s.done / s.total))
        bar = [Segment(self.glyphs.bar[0] * full, TITLE), Segment(self.glyphs.bar[1] * (cells - full), DIM)]
        return [*head, *bar, Segment(f"  {figures}", PLAIN)]

    def about(self) -> list[Segment]:
        """What runs: models, sampling, prompts."""
        facts = [visible(fact, self.encoding) for fact in self.snapshot.about]
        return [Segment(f" {self.joined(facts, self.width - 2)}", DIM)]

    def memory(self) -> list[Segment]:
        """Bytes held of the budget, bytes of the process, then the parts of the plan."""
        s = self.snapshot
        process = f"process {format_bytes(s.process_bytes)}" if s.process_bytes else ""
        held, _, parts = s.held.partition(": ")
        facts = f" {self.glyphs.dot} ".join(filter(None, (held, process)))
        return self.row("memory", [(facts, PLAIN), (f"  {parts}", DIM)])

    def strip(self, use: timeline.LaneUse, shares: Iterable[float | None]) -> list[Segment]:
        """A lane's last seconds, its busy share and the rate while it was busy."""
        style = LANE_STYLES.get(use.lane, PLAIN)
        must_run = use.lane in timeline.LINKS and min(self.snapshot.residency, default=0) < 1  # else no weights stream
        idle, idle_style = (self.glyphs.stall, ALARM) if must_run else (self.glyphs.rest, DIM)
        levels = idle + self.glyphs.levels
        cells = "".join(
            " " if share is None else levels[max(1, min(8, round(share * 8)))] if share > LEAST_BUSY else idle
            for share in shares
        )
        line = [Segment(f" {use.lane[: LABEL - 2]:<{LABEL - 1}}", style)]
        runs = re.findall(f"[{idle}]+|[^{idle}]+", cells)
        line += [Segment(run, idle_style if run[0] == idle else style) for run in runs]
        line.append(Segment(f" {100 * use.share:3.0f} %"))
        if self.width >= NARROW and (use.busy_bytes_per_s or must_run):
            line.append(Segment(f"  {format_rate(use.busy_bytes_per_s or 0.0):>10}", DIM))
        return line

    def axis(self, window: Window) -> list[Segment]:
        """The time axis below the strips: seconds before now."""
        second = round(1 / window.cell_s)  # cells
        step = next(step for step in (1, 2, 5) if step * second >= 9)
        axis = [" "] * window.num_cells
        axis[-4:] = f"now{self.glyphs.tick}"
        for ago in range(step, ceil(window.num_cells / second), step):
            mark = f"{self.glyphs.tick}-{ago} s"
            at = window.num_cells - 1 - ago * second
            if at + len(mark) < window.num_cells - 4:
                axis[at : at + len(mark)] = mark
        return self.row("", [("".join(axis), DIM)])

    def bound(self, lanes: Sequence[tuple[timeline.LaneUse, list[timeline.Interval]]]) -> list[list[Segment]]:
        """The bottleneck in words, and the share of compute that ran while weights streamed."""
        known = [use for use, _ in lanes if use.lane in timeline.LANES]
        most, hidden = timeline.busiest(known), timeline.hidden_share({use.lane: merged for use, merged in lanes})
        words = timeline.bottleneck(known)
        words += f" {self.glyphs.dot} compute beside the stream: {100 * hidden:.0f} %" if hidden is not None else ""
        style = BOLD if most is None or most.share >= timeline.UNBOUND_BELOW else WARNING
        return [self.row("" if i else "overlap", [(line, style)]) for i, line in enumerate(wrap(words, self.room))]

    def slots(self) -> list[list[Segment]]:
        """The state and layer of each slot, and the number of slots in each state."""
        slots, room = self.snapshot.slots, self.room
        glyph = dict(zip(SLOT_STYLES, self.glyphs.slots, strict=True))
        size = len(str(max(layer for _, layer in slots))) + 2
        size = size if len(slots) <= room // size * MOST_ROWS else 1  # too many slots: leave their layers out
        cells = [
            (f"{glyph[state]}{layer if size > 1 and layer >= 0 else '':<{size - 1}}", SLOT_STYLES[state])
            for state, layer in slots[: MOST_ROWS * room]
        ]
        legend = "  ".join(f"{glyph[s]} {sum(other is s for other, _ in slots)} {s}" for s in SLOT_STYLES)
        named = f"{legend}  (number: layer)"
        legend = named if size > 1 and len(named) <= room else legend
        return self.legended("slots", cells, size, legend)

    def layers(self) -> list[list[Segment]]:
        """The resident share of each layer; if there are too many layers for two rows, a cell shows several."""
        residency, room = self.snapshot.residency, self.room
        each = ceil(len(residency) / (MOST_ROWS * room))
        means = [sum(group) / len(group) for i in range(0, len(residency), each) if (group := residency[i : i + each])]
        eighths = [0 if mean <= 0 else 8 if mean >= 1 else max(1, min(7, round(8 * mean))) for mean in means]
        levels = self.glyphs.streams + self.glyphs.levels
        cells = [(levels[level], LANE_STYLES[timeline.TARGET] if level else DIM) for level in eighths]
        whole, none = sum(share >= 1 for share in residency), sum(share <= 0 for share in residency)
        words = f"{whole} of {len(residency)} layers resident"
        words += f", {len(residency) - whole - none} in part" if whole + none < len(residency) else ""
        words += f", {none} stream" if none else ""
        words += f" (a cell is {each} layers)" if each > 1 else ""
        return self.legended("layers", cells, 1, words)

    def legended(self, label: str, cells: list[tuple[str, Style]], size: int, legend: str) -> list[list[Segment]]:
        """Rows of cells and their legend: after the last cell if it fits, otherwise in a row below."""
        fit = self.room // size
        lines = [self.row("" if i else label, cells[i : i + fit]) for i in range(0, len(cells), fit)]
        if (len(cells) - 1) % fit * size + size + 2 + len(legend) <= self.room:
            lines[-1].append(Segment(f"  {legend}", DIM))
        else:
            lines.append(self.row("", [(legend, DIM)]))
        return lines

    def accepted(self) -> list[list[Segment]]:
        """The accepted lengths: a column for each length, its count below, and the mean."""
        lengths = list(self.snapshot.accepted)
        mean = sum(i * count for i, count in enumerate(lengths)) / sum(lengths)
        for each in range(1, len(lengths) + 1):  # if there are too many lengths, a column shows several
            starts = range(0, len(lengths), each)
            counts = [sum(lengths[start : start + each]) for start in starts]
            names = [_span(start, min(start + each, len(lengths)) - 1) for start in starts]
            size = max(3, *(len(str(cell)) for cell in (*names, *counts))) + 1
            if len(names) * size <= self.room + 1:
                break
        levels = " " + self.glyphs.levels
        bars = (levels[max(count > 0, round(8 * count / max(counts)))] * (size - 1) for count in counts)
        levelled = ("accepted", bars, LANE_STYLES[timeline.DRAFT])
        rows = (levelled, (f"mean {mean:.2f}", names, PLAIN), ("times", counts, DIM))
        return [
            self.row(label, [(" ".join(f"{c!s:>{size - 1}}" for c in cells), style)]) for label, cells, style in rows
        ]


def _span(first: int, last: int) -> str:
    return str(first) if first == last else f"{first}-{last}"


def _duration(seconds: float) -> str:
    return f"{seconds:.{0 if seconds >= 10 else 1}f} s" if seconds < 100 else f"{seconds / 60:.0f} min"

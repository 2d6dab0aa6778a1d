"""Frames of the dashboard: golden text from runs in virtual time, and that every frame fits every console.

The golden files in ``tests/golden`` are written anew by ``python -m tests.test_frame``; read the difference before
you commit it.
"""

import io
import re
from dataclasses import replace
from pathlib import Path

import pytest
from rich.cells import cell_len
from rich.console import Console

from aspec.observe.frame import CELL_S, FIGURES, LABEL, STRIP_S, UNICODE, Frame, Window, frame_text
from aspec.observe.monitor import Monitor
from aspec.observe.snapshot import ExpertView, LaneView, SlotState, Snapshot
from aspec.observe.terminal.text import tail
from aspec.observe.timeline import DISK, DRAFT, H2D, LANES, TARGET, merge
from aspec.planning.sim_backend import SimCosts
from aspec.planning.simulation import simulate
from tests.simulate import make_plan

GOLDEN = Path(__file__).parent / "golden"
STREAMING = SimCosts(disk_bytes_per_s=1.8e9, copy_bytes_per_s=20e9, layer_s=10e-3, draft_s=25e-3)
STALLING = replace(STREAMING, layer_s=50e-3)  # the target is slower than the disk: full slots stop the stream
CODE = 'import os\n\n\ndef main(argv):\n    """Print the arguments, one per line."""\n    for arg in argv:\n'
HOSTILE = (
    "\x1b[2J\x1b[31mred\x1b[0m [bold]no markup[/bold] [/] tab\tstop\r\nbell \x07 back \x08\x08 null \0 del \x7f\n"
    "漢字かな交じり文が幅を超えて折り返される場合でも、行は崩れない。"
    * 3
    + "\n\u202eright to left\u202c zero\u200bwidth\n"
    "👩\u200d👩\u200d👧 family ❤\ufe0f heart e\u0301 "
    + "\u0301" * 300
    + "\n"
    + "x" * 5000
    + "\ud800 surrogate\n\n\tend"
)


def watched(at_s, profile=STREAMING, text=CODE, num_slots=8):
    """What the monitor of a run of 22 layers, 7 of them resident, says at a moment."""
    monitor, seen = Monitor(), []
    plan = make_plan(22, 2, num_slots, range(14), 40_000_000, num_rows=2, arithmetic={"slots": num_slots * 40_000_000})
    monitor.opened(plan, 128)
    monitor.snapshot(0.0)
    monitor.heard(text)

    def look(event_s):
        if event_s >= at_s and not seen:
            seen.append(monitor.snapshot(at_s))

    def finished(span):
        look(span.stop_s)
        monitor(span)

    def issued(task, event_s):
        look(event_s)
        monitor.issued(task, event_s)

    simulate(plan, profile, ((20, 64), (30, 64)), [finished], [issued])
    return seen[0]


def goldens():
    """Name and text of every golden file."""
    for name, snapshot in (("streaming", watched(6.2)), ("stalling", watched(9.37, STALLING))):
        for width, height in ((60, 20), (200, 40)):
            yield f"frame_{name}_{width}.txt", plain(snapshot, width, height)


def plain(snapshot, width, height):
    return "\n".join(line.rstrip() for line in frame_text(snapshot, width, height).splitlines()) + "\n"


def strip(snapshot, lane, width=100):
    """The cells of one lane's strip."""
    row = next(line for line in frame_text(snapshot, width, 30).splitlines() if line.startswith(f" {lane} "))
    return row[LABEL : width - FIGURES]


def many(num_layers, num_slots):
    states = [(state, -1 if state is SlotState.FREE else 100 + i) for i, state in enumerate(SlotState)]
    return Snapshot(
        now_s=1000.0,
        stage="decode",
        lanes=tuple(LaneView(name, ((990.0, 999.9, 10**12),), (999.9,)) for name in (*LANES, "unheard-of lane")),
        slots=tuple(states[i % 4] for i in range(num_slots)),
        residency=tuple(i % 9 / 8 for i in range(num_layers)),
        accepted=tuple(range(0, 34000, 2000)),
        tokens=123456,
        tokens_per_s=1234.5,
        tokens_per_pass=16.99,
        held="weights 12.3 GiB + slots 4.56 GiB + draft 2.34 GiB + KV 1.23 GiB + working memory 456 MiB = 20.9 GiB",
        about=(
            "a model with a draft\x1b[2J",
            "12 prompts of 3456 tokens in all",
            "temperature 0.7, top-p 0.9, seed 12",
        ),
        process_bytes=23 << 30,
        texts=(HOSTILE,),
    )


SNAPSHOTS = {
    "empty": Snapshot(0.0, "index"),
    "starting": Snapshot(0.01, "prefill", lanes=(LaneView(DISK, (), (0.0,)),)),
    "loading": Snapshot(7.0, "load", 3 << 30, 140 << 30, 2.5, lanes=(LaneView(DISK, ((4.5, 6.9, 3 << 30),), (6.9,)),)),
    "small": Snapshot(7.0, "load", 300, 512, 2.5),
    "streaming": watched(3.0),
    "126 layers": many(126, 30),
    "1000 layers": many(1000, 1000),
    "hostile": replace(watched(3.0), texts=(HOSTILE,)),
    "hostile rows": replace(watched(3.0), texts=(HOSTILE, "", HOSTILE[::-1], "\n\n", "x" * 300, HOSTILE) * 3),
    "one line": Snapshot(0.0, "decode", texts=("words and words " * 1000,)),
    "prefill": Snapshot(7.0, "prefill", 300, 7231, 2.5),
}


@pytest.mark.parametrize(("name", "text"), list(goldens()), ids=lambda v: v if v.endswith(".txt") else "")
def test_frames_are_as_they_were(name, text):
    expected = (GOLDEN / name).read_text(encoding="utf-8")
    assert text == expected, "if the new look is meant: python -m tests.test_frame"


@pytest.mark.parametrize("name", SNAPSHOTS)
def test_every_frame_fits(name):
    for width in (*range(40, 70), 79, 80, 81, 100, 139, 140, 199, 220):
        for height in (6, 7, 11, 15, 16, 20, 30, 60):
            lines = frame_text(SNAPSHOTS[name], width, height).split("\n")
            assert lines.pop() == ""
            assert len(lines) <= height
            assert max(map(cell_len, lines)) <= width, (width, height)
            assert not [c for line in lines for c in line if c < " " or "\x7f" <= c < "\xa0"]


@pytest.mark.parametrize("size", [(40, 5), (60, 7), (140, 60)])
def test_lanes_bottleneck_and_text_stay_however_small(size):
    shown = frame_text(watched(6.2, text="the newest words"), *size)
    lines = shown.splitlines()
    assert re.search(r"disk-bound: \d+ % of 1\.\d\d", shown)
    assert lines[-1] == " the newest words"
    assert [line for line in lines if line.startswith(" disk ")]
    assert any(line.startswith(" draft ") for line in lines) == (size[1] > 5)


def test_what_matters_least_goes_first():
    snapshot, before = watched(6.2, text=""), None
    for height in range(60, 5, -1):
        labels = re.findall(r"^ (\w+)", frame_text(snapshot, 100, height), re.MULTILINE)
        shown = [name for name in ("accepted", "memory", "layers", "slots", "overlap") if name in labels]
        assert shown == ["accepted", "memory", "layers", "slots", "overlap"][-len(shown) :]
        assert before is None or len(shown) <= before
        before = len(shown)
    assert before == 1


def test_a_stalled_disk_stands_out_where_it_stalls_and_nowhere_else():
    snapshot = watched(9.37, STALLING)
    cells = strip(snapshot, DISK)
    window = Window.of(snapshot.lanes, snapshot.now_s, len(cells))
    busy = merge(next(lane for lane in snapshot.lanes if lane.name == DISK).until(snapshot.now_s))
    assert 0 < cells.count(UNICODE.stall) < len(cells) / 2
    for i, cell in enumerate(cells):
        start, stop = ((window.first + i + edge) * window.cell_s for edge in (0, 1))
        worked = sum(max(0.0, min(b, stop) - max(a, start)) for a, b in busy)
        assert (cell == UNICODE.stall) == (worked < 1e-6), (i, cell)
        if cell in UNICODE.levels and stop <= snapshot.now_s:
            assert abs((UNICODE.levels.index(cell) + 1) / 8 - worked / window.cell_s) <= 1 / 8
    assert UNICODE.stall not in strip(watched(6.2), DISK)
    assert UNICODE.stall not in strip(snapshot, TARGET) + strip(snapshot, DRAFT)
    assert UNICODE.rest in strip(snapshot, DRAFT)


def test_links_may_rest_where_nothing_streams():
    lanes = (LaneView(H2D, ((1.0, 1.5, 10),)), LaneView(TARGET, ((1.0, 5.0, 0),)))
    assert UNICODE.stall in strip(Snapshot(6.0, "decode", lanes=lanes, residency=(1.0, 0.5)), H2D)
    assert UNICODE.stall not in strip(Snapshot(6.0, "decode", lanes=lanes, residency=(1.0, 1.0)), H2D)


def test_before_the_run_there_is_nothing_and_not_rest():
    lanes = (LaneView(DISK, ((8.0, 9.0, 10),)), LaneView(TARGET, ((9.5, 10.0, 0),)))
    disk, target = (strip(Snapshot(10.0, "decode", lanes=lanes), lane) for lane in (DISK, TARGET))
    assert re.fullmatch(" +█{10}×{10}", disk)
    assert re.fullmatch(" +·{15}█{5}", target)
    assert len(disk) == len(target)


def test_finished_cells_do_not_change_while_the_strip_scrolls():
    """Work of every length: between two frames a strip only moves to the left."""
    work = tuple((i * 0.37, i * 0.37 + 0.01 * (i % 29), 1) for i in range(60))
    before = None
    for frame in range(80, 160):
        now = frame / 8
        cells = strip(Snapshot(now, "decode", lanes=(LaneView(DISK, work),)), DISK)
        last = Window.of((), now, len(cells)).first + len(cells) - 1  # the cell that may still change
        shown = {last - len(cells) + 1 + i: cell for i, cell in enumerate(cells[:-1])}
        if before:
            assert all(shown[i] == cell for i, cell in before.items() if i in shown)
        before = shown


def test_what_is_in_flight_is_busy_until_now():
    lanes = (LaneView(DISK, ((0.0, 1.0, 10**9),), (1.0,)), LaneView(TARGET, ((0.0, 1.0, 0),)))
    shown = frame_text(Snapshot(9.0, "decode", lanes=lanes), 100, 30)
    assert set(strip(Snapshot(9.0, "decode", lanes=lanes), DISK)) == {"█"}
    assert "100 %   0.00 GB/s" in shown  # nothing has arrived for longer than the window
    assert "disk-bound: 100 % busy" in shown


@pytest.mark.parametrize("num_cells", range(5, 200))
def test_a_strip_shows_at_least_four_seconds_where_it_can(num_cells):
    window = Window.of((), 100.0, num_cells)
    assert window.cell_s in CELL_S
    assert num_cells * window.cell_s >= min(STRIP_S, num_cells * 0.5)
    assert window.cell_s == CELL_S[0] or num_cells * CELL_S[CELL_S.index(window.cell_s) - 1] < STRIP_S


def test_colours_repeat_what_the_glyphs_say():
    snapshot = watched(9.37, STALLING)
    bare, coloured = frame_text(snapshot, 100, 30), frame_text(snapshot, 100, 30, color=True)
    assert "\x1b" not in bare
    assert "\x1b" in coloured
    assert re.sub(r"\x1b\[[0-9;]*m", "", coloured) == bare
    assert re.search(r"\x1b\[1;91m×+", coloured)
    console = Console(file=io.StringIO(), width=100, height=30, force_terminal=True, no_color=True)
    console.print(Frame(snapshot), end="")
    codes = set(re.findall(r"\x1b\[([0-9;]*)m", console.file.getvalue()))
    assert codes <= {"0", "1", "2"}  # bold and dim are not colours
    assert re.sub(r"\x1b\[[0-9;]*m", "", console.file.getvalue()) == bare


@pytest.mark.parametrize("name", SNAPSHOTS)
def test_a_terminal_without_unicode_gets_ascii(name):
    raw = io.BytesIO()
    console = Console(file=io.TextIOWrapper(raw, "ascii"), width=100, height=30, force_terminal=False)
    console.print(Frame(SNAPSHOTS[name]), end="")
    console.file.flush()
    lines = raw.getvalue().decode("ascii").splitlines()
    assert len(lines) <= 30
    assert max(map(len, lines)) <= 100
    if name == "streaming":
        assert re.search(r"disk +#{5}", "\n".join(lines))


def test_stages_say_how_far_they_are():
    loading = frame_text(SNAPSHOTS["loading"], 100, 30).splitlines()[0]
    assert "load" in loading
    assert "3.00 of 140 GiB · 1.29 GB/s · ETA 2 min" in loading
    assert loading.count("━") / (loading.count("━") + loading.count("─")) == pytest.approx(3 / 140, abs=0.03)
    assert "300 of 512 B" in frame_text(SNAPSHOTS["small"], 60, 20)
    decoding = frame_text(watched(6.2), 140, 30).splitlines()[0]
    assert re.search(r"\d+ of 128 tokens · [\d.]+ tokens/s · [\d.]+ tokens per pass", decoding)


def test_a_prefill_counts_prompt_tokens():
    shown = frame_text(SNAPSHOTS["prefill"], 100, 30).splitlines()[0]
    assert "300 of 7231 prompt tokens · 120.0 tokens/s · ETA 58 s" in shown
    assert "300 of 7231 prompt tokens" in frame_text(SNAPSHOTS["prefill"], 60, 20)


@pytest.mark.parametrize("width", [60, 80, 100, 120])
def test_the_memory_that_is_held_comes_before_its_parts(width):
    held = "194 of 200 MiB: resident layers 120 MiB + embeddings, norms and head 41.01 MiB + KV cache 7.47 MiB"
    shown = frame_text(replace(watched(6.2), held=held, process_bytes=609 << 20), width, 30)
    line = next(line for line in shown.splitlines() if line.startswith(" memory"))
    assert line.startswith(" memory    194 of 200 MiB · process 609 MiB  resident")


def test_every_prompt_has_lines_of_its_own():
    texts = ("one\ntwo\nthree", "", "vier\nfünf", "a long line of words " * 20)
    shown = frame_text(Snapshot(0.0, "decode", texts=texts), 60, 11).splitlines()[-7:]
    assert shown[:2] == [" [0] two", "     three"]
    assert shown[2].rstrip() == " [1]"
    assert shown[3:5] == [" [2] vier", "     fünf"]
    assert [line[:5] for line in shown[5:]] == [" [3] ", "     "]
    lines = frame_text(Snapshot(0.0, "decode", texts=texts * 3), 60, 10).splitlines()
    assert " [0]  one two three" in lines, "a single line has no breaks"
    assert re.search(r"… \d+ more rows", lines[-1])


def test_the_frame_names_what_runs_as_far_as_it_fits():
    about = ("SmolLM2-135M with draft", "prompt of 1871 tokens", "temperature 0.7, top-p 0.9, seed 3")
    snapshot = Snapshot(0.0, "decode", about=about)
    assert frame_text(snapshot, 120, 20).splitlines()[1] == " " + " · ".join(about)
    assert frame_text(snapshot, 60, 20).splitlines()[1] == " " + " · ".join(about[:2])


def test_layers_and_slots_are_counted_in_words():
    shown = frame_text(replace(watched(6.2), residency=(1.0, 0.5, 0.0, 0.0)), 100, 30)
    assert "█▄░░  1 of 4 layers resident, 1 in part, 2 stream" in shown
    assert "(a cell is 6 layers)" in frame_text(SNAPSHOTS["1000 layers"], 100, 40)
    slots = ((SlotState.LOADING, 7), (SlotState.READY, 8), (SlotState.IN_USE, 9), (SlotState.FREE, -1))
    shown = frame_text(Snapshot(0.0, "decode", slots=slots), 100, 30)
    assert "↓7 ○8 ●9 ·" in shown
    assert "↓ 1 loading  ○ 1 ready  ● 1 in use  · 1 free" in shown


def test_accepted_lengths_keep_their_counts_where_columns_are_short():
    shown = frame_text(many(1, 1), 60, 60)
    counts = [int(n) for n in re.search(r"times +([\d ]+)", shown)[1].split()]
    assert sum(counts) == sum(range(0, 34000, 2000))
    assert re.search(r"mean 11\.00 +0-2 +3-5 .* 15-16\n", shown), (
        "neighbours share a column, the last ones no more than others"
    )


def test_text_is_shown_and_never_obeyed():
    assert tail("\x1b[31mred[/bold]", 40, 3) == ["␛[31mred[/bold]"]
    assert tail("a\tb\r\nc\n", 40, 3) == ["a   b", "c"]
    assert tail("one\ntwo\nthree", 40, 2) == ["two", "three"]
    assert tail("漢字漢字", 5, 3) == ["漢字", "漢字"]
    assert tail("some words that wrap", 12, 3) == ["some words", "that wrap"]
    assert tail("héllo 漢", 40, 3, "ascii") == ["h?llo ?"]
    assert tail("\u0301" * 100, 10, 3)
    assert tail("anything", 10, 0) == tail("", 10, 3)[1:] == []


def test_a_long_line_does_not_jump_while_it_grows():
    before = []
    for length in range(100, 1000):
        lines = tail("".join(chr(97 + i % 26) for i in range(length)), 20, 4)
        if before and lines[0] != before[0]:
            assert lines[:-1] == before[1:]  # a new line at the bottom, the others one up
        before = lines


if __name__ == "__main__":
    GOLDEN.mkdir(exist_ok=True)
    for file_name, content in goldens():
        (GOLDEN / file_name).write_text(content, encoding="utf-8")
        print(content)


def test_experts_have_a_line_of_their_own_where_there_is_room():
    experts = ExpertView(unions=10, chosen=45, missing=9, guessed=3, read_bytes=9 << 20, tokens=9)
    lines = frame_text(replace(watched(6.2), experts=experts), 120, 40).splitlines()
    (line,) = [line for line in lines if line.startswith(" experts")]
    assert line.split("experts")[1].strip() == (
        "80% in memory · 4.5 of a layer and pass · 1.00 MiB a token · 9 read · 3 ahead of their routes"
    )
    narrow = frame_text(replace(watched(6.2), experts=experts), 60, 40)
    assert "80% in memory · 4.5 of a layer and pass\n" in re.sub(" +\n", "\n", narrow)

"""What watching costs: the recorder per span, the dashboard's thread and the loop's lag beside a streaming run.

    python tools/bench_observing.py BIG --draft aspec/demo/draft --device-memory 512MiB --rounds 3

Rounds with the dashboard on (drawn on a pseudo-terminal of 140 x 40) and off alternate in one run. The thread's CPU
seconds are its own clock's; lag is how late a 5 ms timer of the loop's thread fires.
"""

import argparse
import asyncio
import json
import os
import pty
import statistics
import threading
import time
from collections.abc import Callable
from pathlib import Path

import rich.console

from aspec.engine.engine import Engine
from aspec.generation.params import SamplingParams
from aspec.observe.console import Console
from aspec.observe.dashboard import watch
from aspec.observe.monitor import Monitor
from aspec.observe.recorder import Recorder
from aspec.options import EngineOptions
from aspec.plan import Plan
from aspec.planning.sim_backend import SimCosts
from aspec.planning.simulation import simulate
from aspec.tasks.executor import Observer
from aspec.tasks.task import Span
from aspec.units import parse_bytes, parse_rate

PROMPT = "class Reader:\n    def __init__(self, path):\n        self.path = path\n"
TIMER_S = 5e-3
COLUMNS, LINES = 140, 40


def cost_per_span(observer: Observer, spans: list[Span]) -> float:
    """Seconds of one call, the best of five stretches."""
    stretches = []
    for _ in range(5):
        begin = time.perf_counter()
        for span in spans:
            observer(span)
        stretches.append((time.perf_counter() - begin) / len(spans))
    return min(stretches)


def spans_of(plan: Plan) -> list[Span]:
    """The spans of a simulated run of the same plan."""
    spans: list[Span] = []
    simulate(plan, SimCosts(), [(20, 200)], [spans.append])
    return spans


async def lag(until: asyncio.Event) -> list[float]:
    """How late the loop's timers fire, seconds."""
    found = []
    while not until.is_set():
        begin = time.perf_counter()
        await asyncio.sleep(TIMER_S)
        found.append(max(0.0, time.perf_counter() - begin - TIMER_S))
    return found


class Watched:
    """A console on a pseudo-terminal that is read and thrown away; knows the CPU seconds of the drawing thread."""

    def __init__(self) -> None:
        self.master, slave = pty.openpty()
        self.file = os.fdopen(slave, "w")
        self.console = Console()
        self.console.stderr = rich.console.Console(file=self.file, force_terminal=True, width=COLUMNS, height=LINES)
        self.reader = threading.Thread(target=self.drain, daemon=True)
        self.reader.start()

    def drain(self) -> None:
        """Read what is drawn, as a terminal does."""
        try:
            while os.read(self.master, 1 << 16):
                pass
        except OSError:
            return

    def close(self) -> None:
        """The terminal goes."""
        self.file.close()
        self.reader.join(5)
        os.close(self.master)


def thread_clock(name: str) -> Callable[[], float] | None:
    """The CPU clock of a thread by name; None while there is none."""
    for thread in threading.enumerate():
        if thread.name == name and thread.ident is not None:
            clock = time.pthread_getcpuclockid(thread.ident)
            return lambda: time.clock_gettime(clock)
    return None


async def one_round(engine: Engine, monitor: Monitor, tokens: int, dashboard: bool) -> dict[str, float]:
    """One generation, watched or not."""
    watched, done = Watched(), asyncio.Event()
    watched.console.quiet = not dashboard
    params = SamplingParams(max_new_tokens=tokens, ignore_eos=True)
    with watch(monitor, watched.console):
        clock = thread_clock("aspec-dashboard")
        begin, begin_cpu = time.perf_counter(), clock() if clock else 0.0
        measuring = asyncio.create_task(lag(done))
        async for piece in engine.stream(PROMPT, params):
            monitor.heard(piece.text)
            last = piece
        seconds, cpu = time.perf_counter() - begin, (clock() if clock else 0.0) - begin_cpu
        done.set()
        late = sorted(await measuring)
    watched.close()
    assert last.stats is not None
    return {
        "tokens_per_s": last.stats.tokens_per_s or 0.0,
        "stream_gb_per_s": (last.stats.stream_bytes_per_s or 0.0) / 1e9,
        "thread_share": cpu / seconds,
        "lag_p50_ms": 1e3 * late[len(late) // 2],
        "lag_p99_ms": 1e3 * late[int(len(late) * 0.99)],
    }


async def measure(options: argparse.Namespace) -> dict[str, object]:
    """Rounds with and without, then the recorder alone."""
    monitor, recorder = Monitor(), Recorder()
    engine_options = EngineOptions(
        target=options.target,
        draft=options.draft,
        device_memory=parse_bytes(options.device_memory),
        link_rate=parse_rate(options.link_rate) if options.link_rate else None,
        max_batch=1,
        max_context=512,
    )
    rounds: dict[str, list[dict[str, float]]] = {"with": [], "without": []}
    async with Engine(engine_options, [monitor, recorder], [monitor.issued]) as engine:
        monitor.opened(engine.plan, options.tokens)
        for index in range(options.rounds):
            for name in ("with", "without"):
                found = await one_round(engine, monitor, options.tokens, name == "with")
                rounds[name].append(found)
                print(f"round {index} {name:8}", "  ".join(f"{k} {v:.4g}" for k, v in found.items()), flush=True)
        spans = await asyncio.to_thread(spans_of, engine.plan)
        timeline = recorder.timeline()
        per_span = cost_per_span(Recorder(), spans)
    spans_per_s = len(timeline.slices) / (timeline.stop_s - timeline.start_s)
    medians = {
        name: {key: statistics.median(found[key] for found in many) for key in many[0]} for name, many in rounds.items()
    }
    return {
        **medians,
        "recorder_us_per_span": per_span * 1e6,
        "monitor_us_per_span": cost_per_span(Monitor(), spans) * 1e6,
        "spans_per_s": spans_per_s,
        "recorder_share_of_the_run": per_span * spans_per_s,
    }


def main() -> None:
    """Measure and print one JSON line last."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", type=Path)
    parser.add_argument("--draft", type=Path)
    parser.add_argument("--device-memory", default="512MiB")
    parser.add_argument("--link-rate", help="throttle, such as 1.0GB/s")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=24)
    print(json.dumps(asyncio.run(measure(parser.parse_args()))))


if __name__ == "__main__":
    main()

"""How much of the raw disk rate the weight stream holds: raw probes and generations in turn, in one run.

    python tools/bench_stream.py MODEL --draft aspec/demo/draft --device-memory 512MiB --rounds 5

Each round probes the checkpoint's own files with direct reads, generates, and probes again. The ratio is the
stream's rate while decoding over the mean of the two probes around it: disks drift, so only neighbours compare.
"""

import argparse
import asyncio
import json
import statistics
from pathlib import Path

from aspec.engine.engine import open_engine
from aspec.generation.params import SamplingParams
from aspec.io.memory import peak_rss_bytes
from aspec.tasks.op import Op
from aspec.tasks.task import Span
from aspec.units import parse_bytes, parse_rate

PROMPT = "class Reader:\n    def __init__(self, path):\n        self.path = path\n"


async def measure(options: argparse.Namespace) -> dict[str, float]:
    """Rounds of probe, generation, probe."""
    spans: list[Span] = []
    ratios, gaps, rates = [], [], []
    async with open_engine(
        observers=[spans.append],
        target=options.target,
        draft=options.draft,
        device_memory=parse_bytes(options.device_memory),
        link_rate=parse_rate(options.link_rate) if options.link_rate else None,
        max_batch=1,
        max_context=256,
        threads=options.threads,
        speculation=options.speculation,
    ) as engine:
        before = await engine.probe_link_rate(1.0)
        for index in range(options.rounds):
            spans.clear()
            async for piece in engine.stream(PROMPT, SamplingParams(max_new_tokens=options.tokens, ignore_eos=True)):
                last = piece
            after = await engine.probe_link_rate(1.0)
            if last.stats is None or not last.stats.stream_bytes_per_s or not before or not after:
                raise SystemExit("nothing streams: give a smaller --device-memory")
            ratios.append(last.stats.stream_bytes_per_s / ((before + after) / 2))
            rates.append(last.stats.stream_bytes_per_s)
            gaps.append(longest_gap(spans))
            print(
                f"round {index}: raw {before / 1e9:.2f} and {after / 1e9:.2f} GB/s, stream {rates[-1] / 1e9:.2f} GB/s, "
                f"ratio {ratios[-1]:.3f}, longest idle gap of the disk {gaps[-1] * 1e3:.1f} ms"
            )
            before = after
        slot_s = engine.plan.slot_bytes / statistics.median(rates)
    return {
        "ratio_median": statistics.median(ratios),
        "ratio_min": min(ratios),
        "ratio_max": max(ratios),
        "longest_gap_s": max(gaps),
        "slot_read_s": slot_s,
        "peak_rss_bytes": peak_rss_bytes(),
    }


def longest_gap(spans: list[Span]) -> float:
    """The longest time between the first and the last ACCEPT in which no read was in flight, seconds."""
    accepts = [span.stop_s for span in spans if span.task.op is Op.ACCEPT]
    reads = sorted((s.start_s, s.stop_s) for s in spans if s.task.op is Op.READ and accepts[0] < s.stop_s < accepts[-1])
    gap, busy_until = 0.0, reads[0][1]
    for start, stop in reads:
        gap, busy_until = max(gap, start - busy_until), max(busy_until, stop)
    return gap


def main() -> None:
    """Measure and print one JSON line last."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", type=Path)
    parser.add_argument("--draft", type=Path)
    parser.add_argument("--device-memory", default="512MiB")
    parser.add_argument("--link-rate", help="throttle, such as 1.0GB/s")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--speculation", choices=("auto", "chain", "tree", "off"), default="auto")
    print(json.dumps(asyncio.run(measure(parser.parse_args()))))


if __name__ == "__main__":
    main()

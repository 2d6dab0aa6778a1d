"""Predicted against measured seconds: a real engine's tasks, each beside what the machine's profile says it costs.

    python tools/bench_prices.py ./model --draft ./small --device-memory 512MiB --rows 1 4 16 --chains 0 4
    python tools/bench_prices.py ./model --draft ./small --rows 4 --chains --trees 32 --attention device cpu

Every line is one kind of task: an operation on items of one size. Measured are the median and the least; the error is
that of the prediction against either. The last lines hold whole runs against their simulation.
"""

import argparse
import asyncio
import json
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from statistics import median

import torch

from aspec.engine.engine import Engine
from aspec.generation.params import SamplingParams
from aspec.models.model import Model
from aspec.options import EngineOptions
from aspec.plan import Plan
from aspec.planning.sim_backend import SimCosts
from aspec.planning.simulation import simulate
from aspec.profiling.model_shape import ModelShape, shape_of
from aspec.profiling.profile_cache import machine_profile
from aspec.profiling.roofline import prices
from aspec.tasks.op import Cost, Op
from aspec.tasks.task import Span
from aspec.units import parse_bytes

UNPRICED = tuple(op for op in Op if op.loads or op.cost is Cost.NOTHING)


@dataclass(frozen=True)
class Scene:
    """What an engine is asked to do."""

    exact: bool
    rows: int
    proposed: int  # of a row in a pass
    tree: bool  # whether they are one
    apart: bool  # whether attention has a lane of its own
    prompt: int  # tokens


@dataclass(frozen=True)
class PiecewiseLinear:
    """One kind of task of one scene."""

    scene: Scene
    op: str
    tokens: int
    count: int
    predicted_s: float
    median_s: float
    least_s: float

    def text(self) -> str:
        """For people."""
        scene = self.scene
        kind = f"{'tree' if scene.tree else 'chain'} {scene.proposed}{' apart' if scene.apart else ''}"
        name = f"{'exact' if scene.exact else 'plain'} {scene.rows:2} rows {kind} prompt {scene.prompt:3}"
        errors = [100 * (self.predicted_s / measured - 1) for measured in (self.median_s, self.least_s)]
        return (
            f"{name}  {self.op:13} {self.tokens:4} tokens x{self.count:<4} predicted {1e3 * self.predicted_s:8.3f} ms, "
            f"median {1e3 * self.median_s:8.3f} ({errors[0]:+4.0f} %), least {1e3 * self.least_s:8.3f} "
            f"({errors[1]:+4.0f} %)"
        )


async def run_scene(options: argparse.Namespace, scene: Scene) -> tuple[Plan, list[Span]]:
    """Serve random prompts; every task of it."""
    spans: list[Span] = []
    engine_options = EngineOptions(
        target=options.target,
        draft=options.draft if scene.proposed else None,
        device_memory=options.device_memory,
        speculation="off" if not scene.proposed else "tree" if scene.tree else "chain",
        num_draft_tokens=scene.proposed or None,
        attention="cpu" if scene.apart else "device",
        exact=scene.exact,
        max_batch=scene.rows,
        max_context=scene.prompt + options.tokens + 32,
        threads=options.threads,
        reuse_prefix=False,
    )
    generator = torch.Generator().manual_seed(0)
    async with Engine(engine_options, [spans.append]) as engine:

        async def serve(index: int) -> None:
            prompt = torch.randint(options.vocab, (scene.prompt,), generator=generator).tolist()
            params = SamplingParams(max_new_tokens=options.tokens, temperature=0.0, ignore_eos=True, seed=index)
            async for _ in engine.stream(prompt, params):
                pass

        await asyncio.gather(*(serve(index) for index in range(scene.rows)))
        return engine.plan, spans


def against_simulation(
    options: argparse.Namespace, scene: Scene, profile: SimCosts, plan: Plan, spans: list[Span]
) -> PiecewiseLinear:
    """A pass of the run beside one of its simulation, at the run's own acceptance and rate of reading."""
    accepted, refused = (sum(f(o) for s in spans for o in s.outcomes) for f in (lambda o: o.num_accepted, _refused))
    acceptance = accepted / (accepted + refused) if accepted + refused else profile.acceptance
    simulated: list[Span] = []
    reads = [s for s in spans if s.task.op is Op.READ]
    rate = sum(s.task.nbytes for s in reads) / busy(reads) if reads else profile.disk_bytes_per_s
    profile = replace(profile, acceptance=acceptance, disk_bytes_per_s=rate)
    simulate(plan, profile, [(scene.prompt, options.tokens)] * scene.rows, [simulated.append])
    real_s, simulated_s = pass_seconds(spans), pass_seconds(simulated)
    return PiecewiseLinear(scene, "pass", 0, passes(spans), simulated_s, real_s, real_s)


def _refused(outcome: object) -> int:
    return int(outcome.num_accepted < outcome.num_proposed)  # type: ignore[attr-defined]


def compare(scene: Scene, profile: SimCosts, spans: list[Span]) -> list[PiecewiseLinear]:
    """The lines of one scene, by operation and tokens; where weights stream, as beside reads that never rest."""
    cost_table = profile.cost_table
    assert cost_table is not None
    factor = cost_table.read_contention if any(span.task.op is Op.READ for span in spans) else 1.0
    groups: dict[tuple[str, int], list[tuple[float, float]]] = defaultdict(list)
    for span in spans:
        if span.task.op not in UNPRICED:
            key = (str(span.task.op), span.task.num_tokens)
            groups[key].append((factor * cost_table.seconds(span.task), span.stop_s - span.start_s))
    return [
        PiecewiseLinear(
            scene,
            op,
            tokens,
            len(pairs),
            median(p for p, _ in pairs),
            median(m for _, m in pairs),
            min(m for _, m in pairs),
        )
        for (op, tokens), pairs in sorted(groups.items())
    ]


def busy(spans: list[Span]) -> float:
    """Seconds in which at least one of them ran."""
    total, end = 0.0, 0.0
    for span in sorted(spans, key=lambda span: span.start_s):
        total += max(0.0, span.stop_s - max(span.start_s, end))
        end = max(end, span.stop_s)
    return total


def passes(spans: list[Span]) -> int:
    """Decoding passes."""
    return len({span.task.number for span in spans if span.task.op is Op.ACCEPT}) - 1


def pass_seconds(spans: list[Span]) -> float:
    """Seconds of a decoding pass, the prompts' own left out."""
    ends = sorted(max(s.stop_s for s in spans if s.outcomes and s.task.number == number) for number in numbers(spans))
    return (ends[-1] - ends[0]) / (len(ends) - 1)


def numbers(spans: list[Span]) -> set[int]:
    """Of the passes."""
    return {span.task.number for span in spans if span.outcomes}


def shapes(options: argparse.Namespace) -> tuple[ModelShape, ModelShape | None, torch.dtype]:
    target = Model(options.target)
    return shape_of(target), shape_of(Model(options.draft)) if options.draft else None, target.dtype


def scenes(options: argparse.Namespace) -> Iterator[Scene]:
    """All that was asked for."""
    proposals = [(chain, False) for chain in options.chains] + [(nodes, True) for nodes in options.trees]
    for exact, rows, (proposed, tree), place, prompt in product(
        options.exact, options.rows, proposals if options.draft else [(0, False)], options.attention, options.prompts
    ):
        yield Scene(bool(exact), rows, proposed, tree, place == "cpu", prompt)


def main() -> None:
    """Run all scenes and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", type=Path)
    parser.add_argument("--draft", type=Path)
    parser.add_argument("--device-memory", type=parse_bytes, default=512 << 20)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--chains", type=int, nargs="*", default=[0, 2, 4])
    parser.add_argument("--trees", type=int, nargs="*", default=[], help="nodes of a row's tree")
    parser.add_argument("--attention", choices=["device", "cpu"], nargs="+", default=["device"])
    parser.add_argument("--prompts", type=int, nargs="+", default=[64, 300], help="tokens")
    parser.add_argument("--tokens", type=int, default=6, help="new ones of every row")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--exact", type=int, nargs="+", default=[0, 1], help="1: exact steps")
    parser.add_argument("--refresh", action="store_true", help="measure the machine again before every scene")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    target, draft, dtype = shapes(options)
    options.vocab = target.vocab
    lines: list[PiecewiseLinear] = []
    for scene in scenes(options):
        hardware = machine_profile(options.target, dtype, options.threads, refresh=options.refresh)
        profile = prices(target, draft, hardware, exact=scene.exact, tree=scene.tree, cpu_attention=scene.apart)
        plan, spans = asyncio.run(run_scene(options, scene))
        found = [*compare(scene, profile, spans)]
        found.append(against_simulation(options, scene, profile, plan, spans))
        print(*(line.text() for line in found), sep="\n", flush=True)
        lines += found
    if options.json:
        options.json.write_text(json.dumps([asdict(line) for line in lines], indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

"""Tokens per pass of chains and trees on the demo pair's held-out prompts, with and without shared noise.

    python tools/bench_speculation.py --tokens 64 --temperatures 0 0.6 1 --json speculation.json

Every figure is the mean over the prompts of tokens per pass (the prefill's own token excluded). Weights are resident:
only counts are measured here.
"""

import argparse
import asyncio
import json
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

from aspec.engine.engine import open_engine
from aspec.generation.params import SamplingParams
from aspec.options import DEMO


@dataclass(frozen=True)
class Shape:
    """A row of the table."""

    name: str
    options: dict[str, Any]


def shapes(budget: int, chains: list[int]) -> list[Shape]:
    """Chains and one tree, each with the noise of the target's draws and without."""
    tree = {"speculation": "tree", "num_draft_tokens": budget}
    return [
        Shape("chain 5, no shared noise", {"speculation": "chain", "num_draft_tokens": 5, "shared_noise": False}),
        *(Shape(f"chain {n}", {"speculation": "chain", "num_draft_tokens": n}) for n in chains),
        Shape(f"tree {budget}, no shared noise", {**tree, "shared_noise": False}),
        Shape(f"tree {budget}", tree),
    ]


async def tokens_per_pass(shape: Shape, prompts: list[str], temperature: float, tokens: int) -> float:
    """The mean over the prompts, one at a time."""
    found = []
    async with open_engine(
        device_memory=1 << 30, dtype="float32", max_batch=1, max_context=400, **shape.options
    ) as engine:
        for index, prompt in enumerate(prompts):
            params = SamplingParams(max_new_tokens=tokens, temperature=temperature, seed=index, ignore_eos=True)
            async for piece in engine.stream(prompt, params):
                last = piece
            assert last.stats is not None
            found.append(last.stats.tokens_per_pass or 0.0)
    return mean(found)


async def measure(options: argparse.Namespace) -> dict[str, dict[str, float]]:
    """The table, row by row."""
    prompts = json.loads((DEMO / "heldout.json").read_text(encoding="utf-8"))[: options.prompts]
    table: dict[str, dict[str, float]] = {}
    for shape in shapes(options.budget, options.chains):
        row = {f"{t:g}": await tokens_per_pass(shape, prompts, t, options.tokens) for t in options.temperatures}
        table[shape.name] = row
        print(f"{shape.name:26}", "  ".join(f"T={t}: {value:.2f}" for t, value in row.items()), flush=True)
    return table


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--prompts", type=int, default=20, help="of the 20 held-out ones")
    parser.add_argument("--budget", type=int, default=64, help="nodes of the tree")
    parser.add_argument("--chains", type=int, nargs="+", default=[5, 8, 16, 32])
    parser.add_argument("--temperatures", type=float, nargs="+", default=[0.0, 0.6, 1.0])
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    table = asyncio.run(measure(options))
    if options.json:
        options.json.write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

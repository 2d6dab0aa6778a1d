"""Streamed quantised checkpoints of some size: decoding beside compute, memory within the plan, nothing per pass."""

import asyncio
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from aspec.engine.engine import open_engine
from aspec.generation.params import SamplingParams
from aspec.models.model import Model
from aspec.tasks.op import Op
from tests import tiny
from tests.quantised import allocations
from tests.quantised_models import build

ROOT = Path(__file__).resolve().parent.parent
MIB = 1 << 20
SIZES = dict(hidden_size=512, intermediate_size=1408, num_hidden_layers=8, num_attention_heads=8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("streamed")
    source = tiny.build(root / "source", "llama", dtype=torch.bfloat16, shards=1, sizes=SIZES)
    return build(root, source, "fp8 e8m0")[0]


@pytest.mark.slow
def test_a_layer_is_decoded_beside_the_products_of_the_one_before(folder):
    spans = []

    async def main():
        options = dict(target=folder, speculation="off", threads=1, resident_memory=0, max_context=64)
        async with open_engine(observers=[spans.append], **options) as engine:
            async for _ in engine.stream(list(range(3, 40)), SamplingParams(max_new_tokens=8, ignore_eos=True)):
                pass

    asyncio.run(main())
    decoding = [span for span in spans if span.task.op is Op.DECODE]
    ahead = {
        (layer.task.number, layer.task.layer)
        for layer in spans
        if layer.task.op is Op.LAYER
        for own in decoding
        if own.task.layer == layer.task.layer + 1 and own.start_s < layer.stop_s and layer.start_s < own.stop_s
    }
    assert ahead, "how much of it is hidden, test_decode.py asserts in virtual time"


@pytest.mark.slow
def test_the_peak_of_a_streamed_run_stays_near_the_budget(folder):
    """Budget plus 500 MiB, as for plain weights, on a machine that has been measured."""
    command = [sys.executable, "-m", "aspec", "generate", "--target", folder, "--speculation", "off"]
    command += ["--prompt", "abc", "-n", "8", "--ignore-eos", "--device-memory", "24MiB", "--threads", "1", "--json"]
    for _ in range(2):  # the first run also measures the machine, whatever the model, which takes 260 MiB more
        done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT)
    stats = json.loads(done.stdout)["stats"]
    assert stats["streamed_bytes"] > 8 * 8 * MIB
    assert stats["peak_rss_bytes"] < (24 + 500) * MIB


MEASURED = """
import asyncio, json, sys
from pathlib import Path
from aspec.engine.engine import open_engine
from aspec.generation.params import SamplingParams
from aspec.io.memory import peak_rss_bytes

async def held(target, **options):
    common = dict(speculation="off", threads=1, max_context=64, max_batch=1, exact=False)
    async with open_engine(target=Path(target), **common | options) as engine:
        async for _ in engine.stream(list(range(3, 40)), SamplingParams(max_new_tokens=4, ignore_eos=True)):
            pass
        return engine.plan.held_bytes

async def main(small, large):
    before = await held(small), peak_rss_bytes()
    after = [(await held(large, device_memory=nbytes), peak_rss_bytes()) for nbytes in (160 << 20, 1 << 30)]
    print(json.dumps([before, *after]))

asyncio.run(main(*sys.argv[1:]))
"""


@pytest.mark.slow
def test_the_peak_is_what_the_process_takes_and_the_sum_of_the_plan(folder, tmp_path):
    """A process runs a small model first. Then a large one streams, and at last is resident: 192 MiB, decoded twice."""
    sizes = dict(SIZES, hidden_size=2048, intermediate_size=5632, num_attention_heads=16, num_hidden_layers=4)
    source = tiny.build(tmp_path / "source", "llama", dtype=torch.bfloat16, shards=1, sizes=sizes)
    large = build(tmp_path, source, "fp8 e8m0")[0]
    command = [sys.executable, "-c", MEASURED, str(folder), str(large)]
    for _ in range(2):  # the first run also proves products, which takes memory of its own
        done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT)
    (small, base), (streamed, first), (resident, second) = json.loads(done.stdout)
    assert streamed <= 160 * MIB < resident, "the first run streams, the second one does not"
    assert first < base - small + streamed + 24 * MIB
    assert second < base - small + resident + 24 * MIB
    assert second > base + resident - 64 * MIB, "the sum is not a loose bound"


def test_decoding_a_part_again_allocates_nothing(tmp_path):
    """Single numbers only. The control is the copy of a weight."""
    source = tiny.build(tmp_path / "source", "llama", shards=1)
    model = Model(build(tmp_path, source, "gptq 4 bits act-order")[0])
    parts = [part for part in model.parts(1 << 30) if part.layer == 1]
    for part in parts:
        assert part.conversions
        buffer, scratch = tiny.read_part(part), torch.empty(part.scratch_at + part.scratch_bytes, dtype=torch.uint8)
        model.bind(part, buffer, scratch)
        assert max(allocations(lambda own=(part, buffer, scratch): model.bind(*own)), default=0) <= 64
        assert max(allocations(lambda own=scratch: own.clone())) > 64

"""Memory at full size: a checkpoint several times its budget, in a process of its own."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MIB = 1 << 20


@pytest.mark.slow
def test_the_peak_stays_near_the_budget(tmp_path):
    """Budget plus 500 MiB holds the interpreter, torch and transformers, loading included."""
    demo = ROOT / "aspec" / "demo"
    expand = [sys.executable, ROOT / "tools" / "expand.py", demo / "target", tmp_path / "big", "--size", "800MB"]
    subprocess.run(expand, check=True, capture_output=True)
    command = [sys.executable, "-m", "aspec", "generate", "--target", tmp_path / "big", "--draft", demo / "draft"]
    command += ["--prompt", "import os\n", "-n", "48", "--ignore-eos", "--device-memory", "256MiB", "--json"]
    done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT)
    stats = json.loads(done.stdout)["stats"]
    assert stats["streamed_bytes"] > (stats["passes"] + 1) * 400 * MIB, "most of the model streams in every pass"
    assert stats["peak_rss_bytes"] < (256 + 500) * MIB


SHAPES = """
import torch
from aspec.engine.engine import open_engine
import asyncio, psutil

async def main():
    async with open_engine(device="cpu", threads=1):
        rss, weights = psutil.Process().memory_info, [torch.ones(n, 192, dtype=torch.bfloat16) for n in (192, 384)]
        with torch.inference_mode():
            before = rss().rss
            for rows in range(1, 250):
                for weight in weights:
                    torch.nn.functional.linear(torch.ones(rows, 192, dtype=torch.bfloat16), weight)
        print(rss().rss - before)

asyncio.run(main())
"""


def test_products_of_ever_new_shapes_take_bounded_memory():
    """A CPU library compiles a product for every new shape and keeps it; a batch with a draft has hundreds of them."""
    done = subprocess.run([sys.executable, "-c", SHAPES], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 100 * MIB

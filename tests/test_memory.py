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

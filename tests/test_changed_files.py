"""Weights that change under a run end it with one error, before a token is computed from them."""

import os
import shutil

import pytest
import torch

from aspec.engine.engine import open_engine
from aspec.errors import ReadError
from aspec.generation.params import SamplingParams
from tests import tiny
from tests.test_lora import config_of, write

PROMPT = list(range(20, 40))
PARAMS = SamplingParams(max_new_tokens=24, ignore_eos=True)


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """A target, a draft and an adapter."""
    root = tmp_path_factory.mktemp("changed")
    target = tiny.build(root / "target", "llama", varied=True)
    tiny.noisy_copy(target, root / "draft", 0.05)
    write(root / "adapter", target, config_of())
    return root


@pytest.fixture
def folders(stored, tmp_path):
    """Copies that a test may change, with old times: a change is one, however fast the test is."""
    shutil.copytree(stored, tmp_path / "models")
    for file in (tmp_path / "models").rglob("*.safetensors"):
        os.utime(file, ns=(0, 10**18))
    return tmp_path / "models"


def spoil(folder):
    """Write other weights into every shard, in place, and of the same size."""
    for file in folder.glob("*.safetensors"):
        data = file.read_bytes()
        length = 8 + int.from_bytes(data[:8], "little")
        with file.open("r+b") as shard:
            shard.seek(length)
            shard.write(torch.full(((len(data) - length) // 4,), 0.25).numpy().tobytes())


def opened(folders, **options):
    names = {name: folders / name for name in ("target", "draft", "adapter")}
    return open_engine(**names, max_context=96, device_memory=24 << 20, threads=1, **options)


@pytest.mark.parametrize("which", ["target", "draft", "adapter"])
async def test_a_change_between_header_and_load_refuses_the_opening(folders, which):
    def progress(stage, done, total):
        if stage == "plan":
            spoil(folders / which)

    with pytest.raises(ReadError, match=rf"{which}/.*was written to since aspec read its header"):
        async with opened(folders, progress=progress):
            raise AssertionError("it opened")


@pytest.mark.parametrize("which", ["target", "adapter"])
async def test_a_change_under_a_stream_ends_it_and_no_token_is_another(folders, which):
    async with opened(folders, resident_memory=0) as engine:
        wanted = [token async for piece in engine.stream(PROMPT, PARAMS) for token in piece.token_ids]
    found = []

    async def under_change():
        async with opened(folders, resident_memory=0) as engine:
            async for piece in engine.stream(PROMPT, PARAMS):
                if not found:
                    spoil(folders / which)
                found.extend(piece.token_ids)

    with pytest.raises(ReadError, match="since aspec read its header"):
        await under_change()
    assert found
    assert len(found) < len(wanted)
    assert found == wanted[: len(found)]

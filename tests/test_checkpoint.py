"""The index of shards and the layout of parts: real files, and every way to damage them."""

import json
import struct

import pytest
import torch
from safetensors.torch import load_file, save_file

from aspec.errors import CheckpointError
from aspec.io.checkpoint import Checkpoint
from aspec.io.memory import PAGE
from aspec.model import Model
from tests import tiny


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return tiny.build(tmp_path_factory.mktemp("ckpt") / "llama", "llama")


@pytest.fixture
def copy(llama, tmp_path):
    for file in llama.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


def rewrite(path, change):
    """Change a shard's header, keeping the data."""
    raw = path.read_bytes()
    length = struct.unpack("<Q", raw[:8])[0]
    header = json.loads(raw[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + length :])


def test_every_tensor_is_where_the_index_says(llama):
    checkpoint = Checkpoint.open(llama)
    stored = {}
    for shard in llama.glob("*.safetensors"):
        stored |= load_file(shard)
    assert set(checkpoint.tensors) == set(stored)
    for name, ref in checkpoint.tensors.items():
        with open(ref.file, "rb") as file:
            file.seek(ref.offset)
            raw = bytearray(file.read(ref.nbytes))
        assert torch.equal(torch.frombuffer(raw, dtype=ref.dtype).view(ref.shape), stored[name])


def test_a_single_file_is_enough(tmp_path):
    save_file({"a": torch.arange(4.0), "b": torch.zeros(2, 3, dtype=torch.bfloat16)}, tmp_path / "model.safetensors")
    checkpoint = Checkpoint.open(tmp_path)
    assert {n: (r.dtype, r.shape) for n, r in checkpoint.tensors.items()} == {
        "a": (torch.float32, (4,)),
        "b": (torch.bfloat16, (2, 3)),
    }
    assert checkpoint.nbytes == 28


def first_shard(folder):
    return sorted(folder.glob("*.safetensors"))[0]


def first_tensor(header):
    return next(name for name in header if name != "__metadata__")


DAMAGE = {
    "truncated": (lambda d: first_shard(d).write_bytes(first_shard(d).read_bytes()[:-10]), "truncated"),
    "cut in the header": (lambda d: first_shard(d).write_bytes(first_shard(d).read_bytes()[:40]), "not a complete"),
    "empty": (lambda d: first_shard(d).write_bytes(b""), "not a complete"),
    "header length lies": (
        lambda d: first_shard(d).write_bytes(struct.pack("<Q", 1 << 50) + b"{}" * 90),
        "not a complete",
    ),
    "header is not json": (lambda d: first_shard(d).write_bytes(struct.pack("<Q", 16) + b"x" * 90), "not JSON"),
    "offsets lie": (
        lambda d: rewrite(first_shard(d), lambda h: h[first_tensor(h)]["data_offsets"].__setitem__(1, 3)),
        "lies about tensor",
    ),
    "negative offset": (
        lambda d: rewrite(first_shard(d), lambda h: h[first_tensor(h)].update(data_offsets=[-8, 0])),
        "lies about tensor",
    ),
    "overlap": (
        lambda d: rewrite(
            first_shard(d), lambda h: h.update(zz={"dtype": "F32", "shape": [1], "data_offsets": [0, 4]})
        ),
        "overlaps",
    ),
    "unknown dtype": (
        lambda d: rewrite(first_shard(d), lambda h: h[first_tensor(h)].update(dtype="F3")),
        "not understood",
    ),
    "shape is not numbers": (
        lambda d: rewrite(first_shard(d), lambda h: h[first_tensor(h)].update(shape=["x"])),
        "not understood",
    ),
    "missing shard": (lambda d: first_shard(d).unlink(), "are missing"),
    "index is not json": (lambda d: (d / "model.safetensors.index.json").write_text("{"), "no index of shards"),
    "index has no map": (lambda d: (d / "model.safetensors.index.json").write_text("{}"), "no index of shards"),
    "stored twice": (
        lambda d: (d / "extra.safetensors").write_bytes(first_shard(d).read_bytes()) and add_to_index(d),
        "stored twice",
    ),
}


def add_to_index(folder):
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["more"] = "extra.safetensors"
    path.write_text(json.dumps(index))


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_refused_in_one_paragraph(copy, kind):
    damage, expected = DAMAGE[kind]
    damage(copy)
    with pytest.raises(CheckpointError, match=expected) as caught:
        Checkpoint.open(copy)
    assert "\n" not in str(caught.value)
    assert str(copy) in str(caught.value)


def test_folders_without_a_model_are_refused(tmp_path):
    with pytest.raises(CheckpointError, match="not a folder"):
        Checkpoint.open(tmp_path / "none")
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"no shards.*pytorch_model.bin"):
        Checkpoint.open(tmp_path)


def test_weights_of_another_model_are_refused(copy):
    tiny.edit_config(copy, intermediate_size=100)
    with pytest.raises(CheckpointError, match="do not belong together"):
        Model(copy).plan(1 << 20)
    tiny.edit_config(copy, intermediate_size=96, num_hidden_layers=5, layer_types=None)
    with pytest.raises(CheckpointError, match="not stored"):
        Model(copy).plan(1 << 20)


@pytest.mark.parametrize("family", ["llama", "mixtral", "qwen3_moe", "gpt_oss", "llama_tied"])
@pytest.mark.parametrize("most", [1, 30_000, 1 << 30])
def test_parts_cover_every_parameter_once_and_no_segments_collide(tmp_path, family, most):
    model = Model(tiny.build(tmp_path, family))
    parts = model.plan(most)
    targets = [b.target for p in parts for b in (*p.bindings, *(t for c in p.conversions for t in c.targets))]
    assert sorted(targets) == sorted(set(targets)) == sorted(model._frame.state_dict())
    for part in parts:
        ends = 0
        for segment in sorted(part.segments, key=lambda s: s.at):
            assert segment.at >= ends
            ends = segment.at + segment.nbytes
        assert ends <= part.size
        assert part.size % PAGE == 0
    assert {p.layer for p in parts} == {-1, *range(model.num_layers)}


def test_plain_tensors_are_read_in_place(llama):
    for part in Model(llama).plan(1 << 30):
        for segment in part.segments:
            assert segment.at % PAGE == segment.offset % PAGE

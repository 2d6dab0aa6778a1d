"""Damaged checkpoints are refused in one paragraph; parts cover what is stored, where the disk can put it."""

import itertools
import json
import shutil
import struct

import pytest
import torch
import transformers
from safetensors.torch import save_file

from aspec.errors import CheckpointError
from aspec.io.checkpoint import INDEX, SINGLE, Checkpoint, read_header
from aspec.models.kv_cache import KVCache
from aspec.models.model import Model
from aspec.models.weights.layout import plan_parts
from aspec.models.weights.parts import PAGE, REST
from aspec.models.weights.tensor_map import map_tensors
from tests import tiny
from tests.compat import of_kinds

TENSORS = {
    "a": torch.arange(6, dtype=torch.float32).reshape(2, 3),
    "b": torch.zeros(4, dtype=torch.bfloat16),
    "c": torch.ones(3, dtype=torch.int64),
}


@pytest.fixture(scope="module", autouse=True)
def _quiet():
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Builds a family's checkpoint once."""
    root, built = tmp_path_factory.mktemp("tiny"), {}

    def get(family, **kwargs):
        key = (family, *kwargs.items())
        if key not in built:
            built[key] = tiny.build(root / str(len(built)), family, **kwargs)
        return built[key]

    return get


@pytest.fixture
def sharded(tmp_path):
    """Two shards and an index."""
    save_file({"a": TENSORS["a"]}, tmp_path / "one.safetensors")
    save_file({"b": TENSORS["b"], "c": TENSORS["c"]}, tmp_path / "two.safetensors")
    weight_map = {"a": "one.safetensors", "b": "two.safetensors", "c": "two.safetensors"}
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    return tmp_path


def read(ref):
    with open(ref.file, "rb") as file:
        file.seek(ref.offset)
        return torch.frombuffer(bytearray(file.read(ref.nbytes)), dtype=ref.dtype).reshape(ref.shape)


def test_the_index_finds_every_tensor(sharded):
    checkpoint = Checkpoint.open(sharded)
    assert checkpoint.nbytes == 24 + 8 + 24
    assert {file.rpartition("/")[2] for file in checkpoint.files} == {"one.safetensors", "two.safetensors"}
    for name, tensor in TENSORS.items():
        assert torch.equal(read(checkpoint.tensors[name]), tensor)


def test_a_single_shard_needs_no_index(tmp_path):
    save_file(TENSORS, tmp_path / SINGLE)
    assert set(Checkpoint.open(tmp_path).tensors) == set(TENSORS)


def write(path, header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def entry(dtype="F32", shape=(2,), offsets=(0, 8)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "truncated or no safetensors"),
        (b"\x10\0\0", "truncated or no safetensors"),
        (struct.pack("<Q", 1 << 60) + b"{}", "truncated or no safetensors"),
        (struct.pack("<Q", 50) + b"{}", "truncated or no safetensors"),
        (struct.pack("<Q", 0) + b"{}", "truncated or no safetensors"),
        ((b"{]",), "expected a header in JSON"),
        ((b"\xff\xfe",), "expected a header in JSON"),
        ((b"[" * 100_000,), "expected a header in JSON"),
        ((b"[1]",), "expected a JSON object"),
        (({"a": 5}, b""), "tensor a: expected a header entry"),
        (({"a": {}}, b""), "tensor a: expected a dtype"),
        (({"a": entry("F7")}, b"\0" * 8), "tensor a: expected a dtype among .* found F7"),
        (({"a": entry(shape=("2",))}, b"\0" * 8), "tensor a: expected a shape"),
        (({"a": entry(shape=(-2,))}, b"\0" * 8), "tensor a: expected a shape"),
        (({"a": entry(offsets=(0,))}, b"\0" * 8), "tensor a: expected two data offsets"),
        (({"a": entry(offsets=(-8, 0))}, b"\0" * 8), "tensor a: expected two data offsets"),
        (({"a": entry(offsets=(0, True))}, b"\0" * 8), "tensor a: expected two data offsets"),
        (({"a": entry(offsets=(0, 6))}, b"\0" * 8), "tensor a: expected 8 bytes for F32"),
        (({"a": entry(offsets=(8, 0))}, b"\0" * 8), "tensor a: expected 8 bytes for F32"),
        (({"a": entry(), "b": entry(offsets=(4, 12))}, b"\0" * 12), "tensor b overlaps"),
        (({"a": entry(), "b": entry(offsets=(12, 20))}, b"\0" * 20), "4 bytes before tensor b belong to no tensor"),
        (({"a": entry()}, b"\0" * 4), "is truncated"),
        (({"a": entry()}, b"\0" * 9), "bytes that belong to no tensor"),
        ((b'{"a": {"dtype": "F32"}, "a": {"dtype": "F32"}}',), "tensor a is stored twice"),
    ],
)
def test_damaged_shards_are_refused(tmp_path, content, message):
    path = tmp_path / SINGLE
    path.write_bytes(content) if isinstance(content, bytes) else write(path, *content)
    with pytest.raises(CheckpointError, match=message) as error:
        Checkpoint.open(tmp_path)
    assert "\n" not in str(error.value)
    assert str(path) in str(error.value)


def test_a_cut_anywhere_is_noticed(sharded):
    """A shard that ends too early is refused wherever it was cut."""
    path = sharded / "two.safetensors"
    whole = path.read_bytes()
    for length in range(0, len(whole), 7):
        path.write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match=r"two\.safetensors"):
            Checkpoint.open(sharded)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: shutil.rmtree(f), "is not a folder"),
        (lambda f: [p.unlink() for p in f.iterdir()], "found no weights at all"),
        (lambda f: (f / INDEX).unlink(), f"Fetch the missing {INDEX}"),
        (lambda f: (f / "two.safetensors").unlink(), "1 missing: two.safetensors"),
        (lambda f: (f / INDEX).write_text("{"), "not an index of shards"),
        (lambda f: (f / INDEX).write_text("[]"), "not an index of shards"),
        (lambda f: (f / INDEX).write_text('{"weight_map": {}}'), "names 0 shards"),
        (lambda f: (f / INDEX).write_text('{"weight_map": {"a": "../one.safetensors"}}'), "1 missing"),
        (lambda f: (f / INDEX).write_text('{"weight_map": {"z": "one.safetensors"}}'), "expected tensor z in one"),
        (lambda f: save_file({"a": TENSORS["a"], **TENSORS}, f / "two.safetensors"), "tensor a is stored a second"),
        (lambda f: ((f / "two.safetensors").unlink(), (f / "two.safetensors").mkdir()), "1 missing"),
    ],
)
def test_damaged_folders_are_refused(sharded, damage, message):
    damage(sharded)
    with pytest.raises(CheckpointError, match=message) as error:
        Checkpoint.open(sharded)
    assert "\n" not in str(error.value)


def test_empty_tensors_take_no_bytes(tmp_path):
    write(
        tmp_path / SINGLE,
        {"a": entry(), "b": entry(shape=(0, 3), offsets=(8, 8)), "__metadata__": {"x": "y"}},
        bytes(8),
    )
    assert [ref.nbytes for ref in read_header(tmp_path / SINGLE)] == [8, 0]


def check_part(part):
    """The rules of a buffer that the disk relies on."""
    end = 0
    for segment in sorted(part.segments, key=lambda segment: segment.at):
        assert segment.at >= end, "segments overlap"
        end = segment.at + segment.nbytes
    assert part.size % PAGE == 0
    assert end <= part.size < end + PAGE
    assert part.nbytes == sum(segment.nbytes for segment in part.segments)
    used = sorted((t.at, t.nbytes) for t in {t.at: t for c in part.conversions for t in c.targets}.values())
    assert all(a + n <= b for (a, n), (b, _) in itertools.pairwise(used)), "scratch overlaps"
    assert max((a + n for a, n in used), default=0) <= part.scratch_bytes


@pytest.mark.parametrize(
    ("family", "dtype"),
    [*((family, torch.float32) for family in tiny.FAMILIES), *of_kinds(tiny.FAMILIES, torch.bfloat16)],
    ids=str,
)
def test_parts_hold_every_tensor_once(folder, family, dtype):
    model = Model(folder(family), dtype=dtype)
    for max_part_bytes in (1, 30_000, 1 << 30):
        parts = model.parts(max_part_bytes)
        assert [part.index for part in parts] == list(range(len(parts)))
        assert [part.layer for part in parts] == sorted(part.layer for part in parts)
        assert {part.layer for part in parts} == {REST, *range(model.num_layers)}
        bound = [target.target for part in parts for target in part.targets()]
        assert len(bound) == len(set(bound))
        scratch, largest, totals = {}, {}, []
        for part in parts:
            check_part(part)
            assert part.scratch_at == scratch.get(part.layer, 0)
            scratch[part.layer] = part.scratch_at + part.scratch_bytes
            sizes = [target.nbytes for target in part.targets()]
            if part.layer != REST:
                largest[part.layer] = max(largest.get(part.layer, 0), *sizes)
                totals.append((part.layer, sum(sizes)))
        assert all(total <= max(max_part_bytes, largest[layer]) for layer, total in totals)


def test_plain_tensors_agree_with_their_page_and_are_read_in_one_piece(folder):
    model = Model(folder("llama", shards=1))
    for part in model.parts(40_000):
        assert all((segment.at - segment.offset) % PAGE == 0 for segment in part.segments)
        assert part.layer == REST or len(part.segments) == 1
        assert not part.conversions
    whole = [part for part in model.parts(1 << 40) if part.layer != REST]
    assert len(whole) == model.num_layers


def test_parts_of_a_layer_are_about_equally_large(folder):
    model = Model(folder("llama"))
    layer = sum(ref.nbytes for name, ref in model.checkpoint.tensors.items() if ".layers.0." in name)
    for bound in range(30_000, layer, 10_000):
        sizes = [part.nbytes for part in model.parts(bound) if part.layer == 0]
        assert max(sizes) <= min(bound, layer / len(sizes) + 96 * 64 * 4)


def test_experts_go_straight_into_their_places(folder):
    """[96, 64] fp32 is a multiple of a page, so the bases make all of one shard's experts agree with their page."""
    model = Model(folder("mixtral", shards=1))
    part = next(part for part in model.parts(1 << 30) if part.layer == 0)
    experts = [s for s in part.segments if s.nbytes % (96 * 64 * 4) == 0]  # neighbours are one segment
    assert sum(segment.nbytes for segment in experts) == 3 * 4 * 96 * 64 * 4
    assert all((segment.at - segment.offset) % PAGE == 0 for segment in experts)
    assert {binding.target.rpartition(".")[2] for binding in part.bindings} >= {"gate_up_proj", "down_proj"}
    assert not part.conversions


def test_misaligned_tensors_are_converted(folder, tmp_path):
    """A header of odd length, which old writers made, puts every tensor at an odd byte."""
    source = folder("llama", shards=1)
    data = (source / SINGLE).read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = data[8 : 8 + length].rstrip()
    header += b" " * (1 + len(header) % 2)  # 8 + an odd number
    (tmp_path / "config.json").write_text((source / "config.json").read_text())
    (tmp_path / SINGLE).write_bytes(struct.pack("<Q", len(header)) + header + data[8 + length :])
    plain, odd = tiny.Streamed(Model(source)), tiny.Streamed(Model(tmp_path))
    assert all(part.conversions and not part.bindings for part in odd.parts)
    ids = torch.tensor([[5, 6, 7, 8, 9]])
    logits = []
    for streamed in (plain, odd):
        cache = KVCache(streamed.model.kv_shapes(), 1, 8, torch.float32)
        logits += streamed.run((ids, cache.step([0], [0], [5])))
    torch.testing.assert_close(*logits, rtol=0, atol=2e-6)


def test_planning_is_repeatable(folder):
    model = Model(folder("deepseek_v3"))
    tensors = map_tensors(model._layers_model, model.folder, model.checkpoint.tensors)
    once, twice = (plan_parts(tensors, "model.layers", 30_000) for _ in range(2))
    assert [(p.segments, p.bindings, p.nbytes) for p in once] == [(p.segments, p.bindings, p.nbytes) for p in twice]

"""The reader of GGUF headers: what it finds in files of every form, and that it believes no lie."""

import io
import json
import random
import struct
import time
import tracemalloc

import pytest
import torch

from aspec.errors import CheckpointError
from aspec.io import gguf
from aspec.io.fetching.files import SIZES
from aspec.io.gguf import MAX_HEADER_BYTES, TYPES, read_gguf
from tests.gguf_files import (
    BOOL,
    F32,
    LIST,
    PAIRS,
    TEXT,
    U32,
    U64,
    file_bytes,
    floats,
    info,
    pair,
    small_tensors,
    write,
)

ONE = [("general.architecture", TEXT, "llama")]


def one_tensor(name="a", sizes=(32, 2), kind=0, data=None):
    return [(name, sizes, kind, floats(*sizes) if data is None else data)]


@pytest.mark.parametrize("version", [2, 3])
@pytest.mark.parametrize("alignment", [8, 32, 256])
def test_a_file_is_found_as_it_was_written(tmp_path, version, alignment):
    pairs = [*PAIRS, ("general.alignment", U32, alignment)]
    tensors = small_tensors()
    path = write(tmp_path / "model.gguf", pairs, tensors, version=version, alignment=alignment)
    found, raw = read_gguf(path), path.read_bytes()
    assert list(found.tensors) == [name for name, *_ in tensors]
    for name, sizes, kind, data in tensors:
        tensor = found.tensors[name]
        assert (tensor.kind, tensor.shape) == (TYPES[kind].name, sizes[::-1])
        assert tensor.ref.offset % alignment == 0
        assert raw[tensor.ref.offset : tensor.ref.offset + tensor.ref.nbytes] == data
        assert torch.Size(tensor.ref.shape).numel() * tensor.ref.dtype.itemsize == tensor.ref.nbytes
    assert found.tensors["blk.0.attn_q.weight"].ref.shape == (32, 18), "bytes of rows"
    assert found.metadata["llama.block_count"] == 1
    assert found.metadata["tokenizer.ggml.tokens"][:2] == ["<s>", "</s>"]
    assert list(found.files) == [str(path)]


def test_every_type_of_value_is_read(tmp_path):
    numbers = [(kind, code, 100 if code != "b" else -100) for kind, code in enumerate("BbHhIif") if code != "?"]
    numbers += [(10, "Q", 1 << 63), (11, "q", -(1 << 62)), (12, "d", 0.1)]
    pairs = [*ONE, *((f"one.{kind}", kind, value) for kind, _, value in numbers)]
    pairs += [(f"list.{kind}", LIST, (kind, [value, 7])) for kind, _, value in numbers]
    pairs += [
        ("yes", BOOL, True),
        ("truths", LIST, (BOOL, [True, False])),
        ("none", LIST, (TEXT, [])),
        ("é", TEXT, "ü\0"),
    ]
    found = read_gguf(write(tmp_path / "m.gguf", pairs, [])).metadata
    for kind, _, value in numbers:
        assert found[f"one.{kind}"] == value
        assert list(found[f"list.{kind}"]) == [value, 7]
    assert found["yes"] is True
    assert (found["truths"], found["none"], found["é"]) == ([True, False], [], "ü\0")


def test_the_types_are_ggmls():
    names = pytest.importorskip("gguf", reason="gguf-py is not installed")
    sizes = {kind.name: size for kind, size in names.GGML_QUANT_SIZES.items()}
    assert {kind.name: (kind.size, kind.nbytes) for kind in TYPES.values()} == sizes
    assert {number: kind.name for number, kind in TYPES.items()} == {int(k): k.name for k in names.GGMLQuantizationType}


# -- lies ----------------------------------------------------------------------------------------------------------

LIES = {
    "no GGUF": (dict(magic=b"GGML"), "expected a GGUF file"),
    "version 1": (dict(version=1), "found version 1"),
    "big-endian": (dict(version=3 << 24), "big-endian file of version 3"),
    "more tensors": (dict(counts=(1 << 60, 1)), "at most .* tensors, for which the file has room"),
    "some more tensors": (dict(counts=(3, 1)), "bytes|sizes|dimensions|type|truncated|damaged"),
    "more values": (dict(counts=(1, 1 << 60)), "at most .* values, for which the file has room"),
    "overlap": (dict(tensors=one_tensor() + one_tensor("b"), places=[0, 32]), "it overlaps another one"),
    "gap": (dict(tensors=one_tensor() + one_tensor("b"), places=[0, 4096]), "belong to no tensor"),
    "far away": (dict(places=[1 << 62]), "at byte 0 of the data"),
    "duplicate": (dict(tensors=one_tensor() + one_tensor()), "tensor a once"),
    "key twice": (dict(pairs=ONE + ONE), "every key once"),
    "no alignment": (dict(pairs=[*ONE, ("general.alignment", U32, 48)]), "power of two"),
    "a text as alignment": (dict(pairs=[*ONE, ("general.alignment", TEXT, "32")]), "power of two"),
    "unknown type": (dict(tensors=one_tensor(kind=999)), "type that ggml has, found number 999"),
    "removed type": (dict(tensors=one_tensor(kind=31)), "Q4_0_4_4, which ggml has no more"),
    "part of a block": (dict(tensors=one_tensor(sizes=(33, 2), kind=2, data=b"")), "whole Q4_0 blocks, of 32 each"),
    "empty": (dict(tensors=one_tensor(sizes=(32, 0), data=b"")), "sizes of 1 or more"),
    "huge": (dict(tensors=one_tensor(sizes=(1 << 60, 1 << 60), data=b"")), "at most .* bytes"),
    "larger than the file": (dict(tensors=one_tensor(sizes=(1 << 20, 4), data=b"")), "is truncated: tensor a ends"),
    "dimensions": (dict(tensors=one_tensor(sizes=(1,) * 5, data=b"")), "1 to 4 dimensions, found 5"),
    "no dimensions": (dict(tensors=one_tensor(sizes=(), data=b"")), "1 to 4 dimensions, found 0"),
    "no text": (dict(pairs=[*ONE, ("x", TEXT, b"\xff")]), "text in UTF-8"),
    "no truth": (
        dict(pairs=[*ONE, ("x", 0, 2)], edit=(pair("x", 0, 2), pair("x", BOOL, 1)[:-1] + b"\2")),
        "truth value",
    ),
    "type of value": (
        dict(pairs=[*ONE, ("x", 0, 2)], edit=(pair("x", 0, 2), b"\1" + bytes(7) + b"x\15\0\0\0\2")),
        "0 to 12",
    ),
    "list of lists": (dict(pairs=[*ONE, ("x", LIST, (LIST, []))]), "a list of type 9"),
    "long text": (dict(edit=(b"\5\0\0\0\0\0\0\0llama", b"\xff" * 7 + b"\0llama")), "at most 16777216 bytes"),
    "text past the end": (dict(edit=(b"\5\0\0\0\0\0\0\0llama", b"\0\0\x80\0\0\0\0\0llama")), "is truncated"),
    "long list": (
        dict(
            pairs=[*ONE, ("x", LIST, (F32, [1.0]))], edit=(struct.pack("<IQ", F32, 1), struct.pack("<IQ", F32, 1 << 61))
        ),
        "at most .* numbers in x",
    ),
    "long list of texts": (
        dict(
            pairs=[*ONE, ("x", LIST, (TEXT, []))], edit=(struct.pack("<IQ", TEXT, 0), struct.pack("<IQ", TEXT, 1 << 40))
        ),
        "at most .* texts in x",
    ),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_lie_is_refused_in_one_paragraph_and_costs_nothing(tmp_path, lie):
    changes, expected = LIES[lie]
    changes = {"pairs": ONE, "tensors": one_tensor(), **changes}
    old, new = changes.pop("edit", (b"", b""))
    raw = file_bytes(**changes)
    path = tmp_path / "model.gguf"
    path.write_bytes(raw.replace(old, new, 1) if old else raw)
    tracemalloc.start()
    with pytest.raises(CheckpointError, match=expected) as caught:
        read_gguf(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 << 20
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("size", [0, 3, 8, 20, 30, 200, 2000])
def test_a_cut_file_is_refused(tmp_path, size):
    raw = file_bytes(PAIRS, small_tensors())
    (tmp_path / "model.gguf").write_bytes(raw[:size])
    with pytest.raises(CheckpointError, match=r"truncated|expected a GGUF file|has room"):
        read_gguf(tmp_path / "model.gguf")


def test_a_header_alone_is_enough_where_the_size_of_the_file_is_known(tmp_path):
    path = write(tmp_path / "model.gguf", PAIRS, small_tensors())
    whole = read_gguf(path)
    size, begin = path.stat().st_size, min(tensor.ref.offset for tensor in whole.tensors.values())
    path.write_bytes(path.read_bytes()[:begin])
    with pytest.raises(CheckpointError, match="is truncated"):
        read_gguf(path)
    (tmp_path / SIZES).write_text(json.dumps({"model.gguf": size}))
    assert read_gguf(path).tensors == whole.tensors


def test_offsets_beyond_4_gib_are_found(tmp_path):
    sizes = (1 << 16, 1 << 15)
    raw = file_bytes(ONE, [("a", sizes, 0, b""), ("b", (32,), 0, floats(32))], places=[0, 1 << 33])
    path = tmp_path / "model.gguf"
    path.write_bytes(raw)
    with path.open("r+b") as file:
        file.truncate((1 << 33) + 4096)  # a hole
    assert read_gguf(path).tensors["b"].ref.offset > 1 << 33


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"model\.gguf cannot be read: No such file"):
        read_gguf(tmp_path / "model.gguf")


# -- split sets ----------------------------------------------------------------------------------------------------


def split(
    folder, places=((0, 2), (1, 2)), names=("m-00001-of-00002.gguf", "m-00002-of-00002.gguf"), total=2, again=False
):
    for (number, count), name, tensor in zip(places, names, "ab", strict=True):
        own = [*ONE, ("split.no", 2, number), ("split.count", 2, count), ("split.tensors.count", 5, total)]
        write(folder / name, own if number == 0 else own[1:], one_tensor("a" if again else tensor))
    return folder / names[0]


@pytest.mark.parametrize("given", [1, 2])
def test_any_file_stands_for_its_set(tmp_path, given):
    split(tmp_path)
    found = read_gguf(tmp_path / f"m-0000{given}-of-00002.gguf")
    assert found.path.name == "m-00001-of-00002.gguf"
    assert {name: tensor.ref.file[-19:] for name, tensor in found.tensors.items()} == {
        "a": "00001-of-00002.gguf",
        "b": "00002-of-00002.gguf",
    }
    assert len(found.files) == 2
    assert found.metadata["general.architecture"] == "llama"


def test_half_a_set_is_refused(tmp_path):
    split(tmp_path)
    (tmp_path / "m-00001-of-00002.gguf").unlink()
    with pytest.raises(CheckpointError, match=r"1 missing: m-00001-of-00002\.gguf\. Fetch the missing files"):
        read_gguf(tmp_path / "m-00002-of-00002.gguf")


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (dict(places=((0, 2), (0, 2))), "expected file 2 of 2, found a header that says split.no 0"),
        (dict(places=((0, 3), (1, 3))), "split.count 3"),
        (dict(total=3), "expected 3 tensors in 2 files, found 2"),
        (dict(again=True), "tensor a is stored a second time"),
        (dict(names=("whole.gguf", "rest.gguf")), "expected a whole model"),
        (dict(names=("m-00001-of-00000.gguf", "x.gguf")), "expected a number from 1 to 0"),
    ],
)
def test_a_set_that_contradicts_itself_is_refused(tmp_path, changes, expected):
    with pytest.raises(CheckpointError, match=expected):
        read_gguf(split(tmp_path, **changes))


# -- fuzz ----------------------------------------------------------------------------------------------------------


class Watched(io.BytesIO):
    """A file that knows how far it was read."""

    farthest = 0

    def read(self, size=-1):
        assert size is not None
        assert 0 <= size <= MAX_HEADER_BYTES
        data = super().read(size)
        self.farthest = max(self.farthest, self.tell())
        return data


def mutated(raw, chance):
    """``raw`` with a few bytes, lengths or pieces changed."""
    raw = bytearray(raw)
    for _ in range(chance.randint(1, 4)):
        at = chance.randrange(len(raw))
        how = chance.randrange(6)
        if how == 0:
            raw[at] = chance.randrange(256)
        elif how == 1:
            raw[at] ^= 1 << chance.randrange(8)
        elif how == 2:
            number = chance.choice(
                [0, 1, (1 << 31) - 1, 1 << 31, (1 << 63) - 1, 1 << 63, (1 << 64) - 1, chance.getrandbits(40)]
            )
            raw[at : at + 8] = struct.pack("<Q", number)
        elif how == 3:
            del raw[at : at + chance.randrange(1, 40)]
        elif how == 4:
            raw[at:at] = raw[at : at + chance.randrange(1, 40)]
        else:
            del raw[at:]
        if not raw:
            return b""
    return bytes(raw)


def test_mutated_headers_are_refused_or_read_within_the_file(tmp_path):
    """2,000 of them in one process: no crash, no hang, nothing beyond the file, no memory for what is not there."""
    chance = random.Random(5)
    whole = file_bytes(PAIRS, small_tensors())
    begin = whole.index(b"blk.0.ffn_down.weight") + 60
    path, refused = tmp_path / "model.gguf", []
    tracemalloc.start()
    started = time.process_time()
    for _ in range(2000):
        raw = mutated(whole[:begin], chance) + whole[begin:] if chance.random() < 0.8 else mutated(whole, chance)
        file = Watched(raw)
        try:
            header = gguf._Reader(path, file, len(raw)).header()
        except CheckpointError as error:
            refused.append(str(error))
        else:
            for tensor in header.tensors:
                assert 0 <= tensor.ref.offset <= tensor.ref.offset + tensor.ref.nbytes <= len(raw)
        assert file.farthest <= len(raw)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 16 << 20
    assert 1000 < len(refused) < 2000
    assert not [text for text in refused if "\n" in text or len(text) > 2000]
    assert time.process_time() - started < 60


def test_an_info_of_a_tensor_is_what_the_format_says():
    assert info("a", (2, 3), 0, 64) == b"\1" + bytes(7) + b"a" + struct.pack("<IQQIQ", 2, 2, 3, 0, 64)
    assert U64 == 10

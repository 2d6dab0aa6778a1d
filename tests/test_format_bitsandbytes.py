"""bitsandbytes' weights equal the library's in every bit: recorded ones always, and live ones where it is installed."""

import json
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from aspec.errors import CheckpointError, UnsupportedModelError, UserError
from aspec.models.formats import bitsandbytes
from tests.quantised import DTYPES, assert_allocates_nothing, assert_same_bits, decode, store

GOLDEN = load_file(Path(__file__).parent / "golden" / "formats.safetensors")
VALUES = GOLDEN["nf4.weight.quant_map"]


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def recorded(name):
    return {key: own for key, own in GOLDEN.items() if key.startswith(name + ".") and "expected" not in key}


def read(tensors, folder, **settings):
    settings = {"quant_method": "bitsandbytes", "load_in_4bit": True, **settings}
    return bitsandbytes.read(settings, "config.json").weights(store(folder, tensors))


def state(**values):
    return torch.frombuffer(bytearray(json.dumps(values).encode()), dtype=torch.uint8)


def made(shape, block, nested=0, dtype="float32", storage=torch.uint8):
    """A weight with any contents, and what it is by definition."""
    numel = torch.Size(shape).numel()
    count = -(-numel // block)
    codes = torch.randint(0, 256, (-(-numel // 2),), dtype=torch.uint8)
    values = {"quant_type": "nf4", "blocksize": block, "dtype": dtype, "shape": shape}
    tensors = {"a.weight": codes.view(storage).view(-1, 1), "a.weight.quant_map": VALUES}
    if nested:
        values |= {"nested_blocksize": nested, "nested_dtype": "float32", "nested_offset": 0.25}
        bytes_ = torch.randint(0, 256, (count,), dtype=torch.uint8)
        outer, table = torch.rand(-(-count // nested)), torch.rand(256)
        tensors |= {"a.weight.nested_absmax": outer, "a.weight.nested_quant_map": table, "a.weight.absmax": bytes_}
        scales = table[bytes_.long()] * outer.repeat_interleave(nested)[:count] + 0.25
    else:
        scales = tensors["a.weight.absmax"] = torch.rand(count)
    tensors["a.weight.quant_state.bitsandbytes__nf4"] = state(**values)
    pairs = torch.stack([VALUES[(codes >> 4).long()], VALUES[(codes & 15).long()]], -1).flatten()[:numel]
    expected = (pairs * scales.repeat_interleave(block)[:numel]).to(getattr(torch, dtype)).view(*shape)
    return tensors, expected


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["nf4", "fp4", "nf4_double", "fp4_double", "int8"])
def test_weights_equal_recorded_ones(tmp_path, name, dtype):
    tensors, expected = recorded(name), GOLDEN[f"{name}.expected"]
    (weight,) = read(tensors, tmp_path)
    assert weight.name == f"{name}.weight"
    assert weight.dtype == expected.dtype
    assert {ref.name for ref in weight.refs} == set(tensors), "no tensor of the weight is left over"
    assert_same_bits(decode(weight, tensors, dtype), expected.to(dtype))


@pytest.mark.parametrize("double", [False, True], ids=["", "double"])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_weights_equal_live_ones(tmp_path, kind, double):
    """bitsandbytes 0.50's AVX-512 kernel is wrong where blocks cross rows, so the rows here hold whole blocks."""
    functional = pytest.importorskip("bitsandbytes").functional
    for block in (32, 64, 256, 1024):
        for dtype in DTYPES:
            own = torch.randn(5, 2 * block).to(dtype)
            codes, found = functional.quantize_4bit(own, blocksize=block, quant_type=kind, compress_statistics=double)
            parts = {f"a.weight.{key}": part for key, part in found.as_dict(packed=True).items()}
            tensors = {"a.weight": codes, **parts}
            (weight,) = read(tensors, tmp_path)
            assert_same_bits(decode(weight, tensors, dtype), functional.dequantize_4bit(codes, found))


@pytest.mark.parametrize("nested", [0, 64, 256])
@pytest.mark.parametrize("shape", [(7, 9), (257, 33), (3, 5, 64), (1, 1), (20, 128)], ids=str)
def test_any_shape_blocks_and_tiles(tmp_path, monkeypatch, shape, nested):
    """Blocks that cross rows, half a byte at the end, tiles within and beyond a block of scales."""
    for tile in (bitsandbytes.TILE, 1 << 12):
        monkeypatch.setattr(bitsandbytes, "TILE", tile)
        for block in (32, 64, 4096):
            for dtype in ("bfloat16", "float32"):
                tensors, expected = made(list(shape), block, nested, dtype)
                (weight,) = read(tensors, tmp_path)
                for wanted in DTYPES:
                    assert_same_bits(decode(weight, tensors, wanted), expected.to(wanted))


@pytest.mark.parametrize("storage", [torch.bfloat16, torch.float32, torch.int8], ids=str)
def test_any_storage_of_codes(tmp_path, storage):
    tensors, expected = made([16, 64], 64, storage=storage)
    (weight,) = read(tensors, tmp_path, bnb_4bit_quant_storage=str(storage).removeprefix("torch."))
    assert_same_bits(decode(weight, tensors, torch.float32), expected)


def test_weights_that_are_left_out_are_stored_plainly(tmp_path):
    tensors = recorded("nf4") | recorded("int8") | {"lm_head.weight": torch.rand(8, 8).half(), "norm.weight": VALUES}
    found = read(tensors, tmp_path, llm_int8_skip_modules=["lm_head"], llm_int8_threshold=6.0)
    assert {weight.name for weight in found} == {"nf4.weight", "int8.weight"}


def test_decoding_allocates_nothing(tmp_path):
    cases = [made([256, 256], 64, nested) for nested in (0, 256)]
    cases.append(({"a.weight": torch.ones(64, 512, dtype=torch.int8), "a.SCB": torch.rand(64)}, None))
    for tensors, _ in cases:
        (weight,) = read(tensors, tmp_path)
        for dtype in (torch.bfloat16, torch.float32):
            assert_allocates_nothing(weight, tensors, dtype)


STATES = [
    ({"blocksize": 48}, CheckpointError, "a blocksize that bitsandbytes has, found blocksize = 48"),
    ({"blocksize": True}, CheckpointError, "blocksize = True"),
    ({"dtype": "float64"}, CheckpointError, "dtype = float64"),
    ({"quant_type": "fp4"}, CheckpointError, "quant_type = fp4"),
    ({"shape": None}, CheckpointError, "shape = None"),
    ({"shape": [4, 4.0]}, CheckpointError, "shape = "),
    ({"shape": [1 << 39] * 3}, CheckpointError, "shape = "),
    ({"shape": [4, 5]}, CheckpointError, r"\[1\] \(for \[4, 5\] in blocks of 64\), found \[4\]"),
    ({"nested_offset": 1.0}, CheckpointError, "nested_blocksize = None"),
    ({"of_tomorrow": 1}, UnsupportedModelError, "of_tomorrow"),
]


@pytest.mark.parametrize(("change", "kind", "words"), STATES, ids=str)
def test_faults_of_a_state_are_named(tmp_path, change, kind, words):
    tensors, _ = made([8, 32], 64)
    values = json.loads(tensors["a.weight.quant_state.bitsandbytes__nf4"].numpy().tobytes())
    tensors["a.weight.quant_state.bitsandbytes__nf4"] = state(**values | change)
    with pytest.raises(kind, match=words) as error:
        read(tensors, tmp_path)
    assert "\n" not in str(error.value)


FAULTS = {
    "no JSON": ({"a.weight.quant_state.bitsandbytes__nf4": VALUES.view(torch.uint8)}, "expected JSON"),
    "a list": ({"a.weight.quant_state.bitsandbytes__nf4": torch.tensor([91, 93], dtype=torch.uint8)}, "JSON object"),
    "another state": ({"a.weight.quant_state.bitsandbytes__fp4": VALUES.view(torch.uint8)}, "one state of a.weight"),
    "no scales": ({"a.weight.absmax": None}, "expected a.weight.absmax beside it"),
    "truncated scales": ({"a.weight.absmax": torch.rand(3)}, r"\[4\] .*found \[3\]"),
    "scales of bytes": ({"a.weight.absmax": torch.ones(4, dtype=torch.uint8)}, "expected float32, found uint8"),
    "too few values": ({"a.weight.quant_map": torch.rand(15)}, r"\[16\]"),
    "truncated codes": ({"a.weight": torch.ones(127, 1, dtype=torch.uint8)}, r"128 bytes for the \[8, 32\] codes"),
    "no codes": ({"a.weight": None}, "expected a.weight beside it"),
    "no state": ({"a.weight.quant_state.bitsandbytes__nf4": None}, "quant_state.bitsandbytes__nf4 beside it"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_named(tmp_path, fault):
    change, words = FAULTS[fault]
    tensors = made([8, 32], 64)[0] | change
    with pytest.raises(CheckpointError, match=words) as error:
        read({name: own for name, own in tensors.items() if own is not None}, tmp_path)
    assert "\n" not in str(error.value)


INT8 = [
    ({"a.SCB": None}, "expected a.SCB beside it"),
    ({"a.SCB": torch.rand(7)}, r"\[8\] .*found \[7\]"),
    ({"a.SCB": torch.rand(8).half()}, "expected float32, found float16"),
    ({"a.weight": None}, "expected a.weight beside it"),
    ({"a.weight_format": torch.tensor(2, dtype=torch.uint8)}, r"expected 0 \(rows.*found 2"),
    ({"a.weight": torch.ones(8, dtype=torch.int8)}, "an int8 matrix"),
]


@pytest.mark.parametrize(("change", "words"), INT8, ids=[words for _, words in INT8])
def test_faults_of_int8_are_named(tmp_path, change, words):
    tensors = {"a.weight": torch.ones(8, 16, dtype=torch.int8), "a.SCB": torch.rand(8)} | change
    with pytest.raises(CheckpointError, match=words):
        read({name: own for name, own in tensors.items() if own is not None}, tmp_path, load_in_4bit=False)


def test_a_file_of_headers_is_not_enough(tmp_path):
    """A 4-bit weight's shape is not in the header."""
    tensors, _ = made([8, 32], 64)
    refs = store(tmp_path, tensors)
    path = tmp_path / "model.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[: 8 + struct.unpack("<Q", data[:8])[0]])
    with pytest.raises(UserError, match="fetch the whole model"):
        bitsandbytes.read({"load_in_4bit": True}, "config.json").weights(refs)


def test_settings_of_four_and_eight_bits_contradict(tmp_path):
    with pytest.raises(UnsupportedModelError, match="false beside load_in_4bit as load_in_8bit"):
        read(recorded("nf4"), tmp_path, load_in_8bit=True)

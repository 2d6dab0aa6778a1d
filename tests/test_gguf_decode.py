"""The decoders of GGUF's types: gguf-py's bits, at any layout of the weight, in any dtype, without an allocation."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from aspec.models.formats.gguf import decode
from aspec.models.formats.gguf.decode import KERNELS, PLAIN, SIZES, Piece, decoder

quants = pytest.importorskip("gguf.quants", reason="gguf-py is not installed")
from gguf import GGMLQuantizationType as Type  # noqa: E402 - after the check that it is there

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of numpy, for infinite scales

HALVES = {  # bytes of a block where fp16 numbers stand
    **dict.fromkeys(("Q4_0", "Q5_0", "Q8_0", "IQ4_NL", "IQ4_XS"), (0,)),
    **dict.fromkeys(("Q4_1", "Q5_1", "Q4_K", "Q5_K"), (0, 2)),
    "Q2_K": (80, 82),
    "Q3_K": (108,),
    "Q6_K": (208,),
    "MXFP4": (),
}
EXTREMES = np.array([0.0, -0.0, 6e-8, -6e-8, 6.1e-5, 65504.0, -65504.0, 1.0, np.inf, -np.inf], dtype=np.float16)


def blocks(kind, count, seed=0):
    """Random blocks: every byte pattern of codes, and scales from subnormal to infinite."""
    rng = np.random.default_rng(seed)
    raw = rng.integers(0, 256, (count, SIZES[kind][1]), dtype=np.uint8)
    for number, at in enumerate(HALVES[kind]):
        scales = rng.standard_normal(count).astype(np.float16)
        some = min(count, len(EXTREMES) ** 2)
        scales[:some] = np.resize(np.roll(EXTREMES, number), some)
        raw[:, at : at + 2] = scales.view(np.uint8).reshape(-1, 2)
    if kind == "MXFP4":
        raw[:256, 0] = np.arange(min(count, 256))
    return raw


def whole(weight):
    return weight


def decoded(pieces, stored, shape, dtype=torch.float32):
    function, nbytes = decoder(pieces)
    out = torch.full(shape, 7.0, dtype=dtype)
    function([torch.from_numpy(raw) for raw in stored], out, torch.full((nbytes,), 255, dtype=torch.uint8))
    return out


def same_bits(one, other):
    word = {4: torch.int32, 2: torch.int16}[one.dtype.itemsize]
    return bool(((one.view(word) == other.view(word)) | (one.isnan() & other.isnan())).all())


@pytest.mark.parametrize("kind", KERNELS)
def test_bits_are_those_of_the_formats_own_library(kind):
    """In fp32; in bf16 and fp16 after one rounding of the fp32 value."""
    size, _ = SIZES[kind]
    raw = blocks(kind, 1200).reshape(300, -1)
    expected = torch.from_numpy(quants.dequantize(raw, Type[kind]))
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        found = decoded([Piece(kind, (300, 4 * size), whole)], [raw], (300, 4 * size), dtype)
        assert same_bits(found, expected.to(dtype)), dtype


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_K"])
@pytest.mark.parametrize("limits", [(1, 1), (1 << 12, 1 << 12), (1 << 12, 1 << 14), (1 << 30, 1 << 30)])
def test_tiles_do_not_show(monkeypatch, kind, limits):
    monkeypatch.setattr(decode, "TILE", limits[0])
    monkeypatch.setattr(decode, "CHUNK", limits[1])
    decode._workspace_bytes.cache_clear()
    size, _ = SIZES[kind]
    raw, shape = blocks(kind, 5 * 7 * 3), (5, 7, 3 * size)
    stored = raw.reshape(5, 7, -1)
    found = decoded([Piece(kind, shape, whole)], [stored], shape)
    decode._workspace_bytes.cache_clear()
    assert same_bits(found, torch.from_numpy(quants.dequantize(stored, Type[kind])))


@pytest.mark.parametrize("kind", ["Q5_1", "Q6_K", "F16", "BF16", "F32"])
def test_elements_go_where_the_weight_wants_them(kind):
    """Two pieces, one of them transposed into every other column, with an offset."""
    rows, width = 6, 256
    if kind in PLAIN:
        stored = [torch.randn(rows, width).to(PLAIN[kind]) for _ in range(2)]
        values = [one.float() for one in stored]
    else:
        stored = [blocks(kind, rows * width // SIZES[kind][0], seed).reshape(rows, -1) for seed in range(2)]
        values = [torch.from_numpy(quants.dequantize(raw, Type[kind])) for raw in stored]
        stored = [torch.from_numpy(raw) for raw in stored]
    pieces = [
        Piece(kind, (rows, width), lambda out: out[:, 0::2].t()),
        Piece(kind, (rows, width), lambda out: out[:, 1::2].t(), offset=-1.0),
    ]
    function, nbytes = decoder(pieces)
    for dtype in (torch.float32, torch.bfloat16):
        out = torch.empty(width, 2 * rows, dtype=dtype)
        function(stored, out, torch.empty(nbytes, dtype=torch.uint8))
        assert same_bits(out[:, 0::2].t().contiguous(), values[0].to(dtype))
        assert same_bits(out[:, 1::2].t().contiguous(), (values[1] - 1).to(dtype))


class Allocations(TorchDispatchMode):
    """Counts the bytes of new storages among the results of operations."""

    def __init__(self, *known):
        super().__init__()
        self.nbytes, self._known = 0, {tensor.untyped_storage().data_ptr() for tensor in known}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        found = function(*args, **(kwargs or {}))
        if isinstance(found, torch.Tensor) and found.untyped_storage().data_ptr() not in self._known:
            self.nbytes += found.untyped_storage().nbytes()
        return found


def test_the_counter_counts():
    known = torch.zeros(1000)
    with Allocations(known) as counted:
        known.add_(1)
        known[3:].view(torch.int32)
    assert counted.nbytes == 0
    with Allocations(known) as counted:
        known.add(1)
    assert counted.nbytes == 4000


@pytest.mark.parametrize("kind", [*KERNELS, "F16"])
def test_decoding_allocates_nothing(kind):
    """Neither by an operation, nor inside one: torch's own temporaries would show in the process' peak of memory."""
    shape = (512, 4096)
    size, nbytes = SIZES[kind]
    stored = torch.randint(0, 64, (shape[0], shape[1] // size * nbytes), dtype=torch.uint8)
    stored = stored.view(torch.float16) if kind == "F16" else stored
    function, nbytes = decoder([Piece(kind, shape, whole, offset=1.0)])
    out, workspace = torch.empty(shape, dtype=torch.bfloat16), torch.empty(nbytes, dtype=torch.uint8)
    function([stored], out, workspace)  # tables are made once
    with Allocations(stored, out, workspace) as counted:
        function([stored], out, workspace)
    assert counted.nbytes < 8192, "tables of 16 values"
    with torch.profiler.profile(profile_memory=True) as profile:
        function([stored], out, workspace)
    events = [event for event in profile.events() if event.cpu_memory_usage > 4096]
    assert not [(event.name, event.cpu_memory_usage) for event in events]


def test_the_profiler_sees_what_an_operation_allocates():
    out, values = torch.empty(1 << 16, dtype=torch.bfloat16), torch.empty(1 << 16)
    with torch.profiler.profile(profile_memory=True) as profile:
        torch.mul(values, values, out=out)  # casts, by way of a temporary
    assert [event for event in profile.events() if event.cpu_memory_usage > 4096]


@pytest.mark.parametrize("kind", KERNELS)
def test_a_workspace_is_small_and_does_not_grow_with_the_weight(kind):
    size, _ = SIZES[kind]
    wide, long = (decoder([Piece(kind, shape, whole)])[1] for shape in ((64, 16384), (1 << 20, 16384)))
    assert wide <= long <= 4 << 20
    assert decoder([Piece(kind, (4, size), whole)])[1] <= 16384


def test_two_threads_decode_at_the_same_time():
    """Each with its own workspace: the decoders keep nothing between calls."""
    shape, kinds = (256, 4096), ["Q4_0", "Q6_K", "IQ4_XS", "MXFP4"] * 4
    stored = {kind: torch.from_numpy(blocks(kind, 256 * 4096 // SIZES[kind][0]).reshape(256, -1)) for kind in kinds}

    def run(kind):
        function, nbytes = decoder([Piece(kind, shape, whole)])
        out = torch.empty(shape, dtype=torch.bfloat16)
        function([stored[kind]], out, torch.empty(nbytes, dtype=torch.uint8))
        return out

    alone = {kind: run(kind) for kind in stored}
    with ThreadPoolExecutor(2) as pool:
        for kind, out in zip(kinds, pool.map(run, kinds), strict=True):
            assert same_bits(out, alone[kind])

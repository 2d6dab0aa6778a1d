"""``aspec prepare --bits``: the best range of each group, a published form, and what stays."""

import pytest
import torch
from typer.testing import CliRunner

from aspec.cli.main import app
from aspec.errors import UserError
from aspec.io.checkpoint import Checkpoint
from aspec.models.model import Model
from aspec.preparing.logits import LogitReader
from aspec.preparing.prepare import design, prepare
from aspec.preparing.rounding import Rounding
from tests import tiny

ROW = [5, 9, 33, 7, 120, 64, 3, 3, 201, 17]
KINDS = [Rounding(bits, free, dtype) for bits, dtype in ((4, torch.bfloat16), (8, torch.float16)) for free in (0, 1)]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Builds a family's checkpoint once."""
    root, built = tmp_path_factory.mktemp("sources"), {}

    def get(family):
        if family not in built:
            built[family] = tiny.build(root / family, family, dtype=torch.bfloat16, shards=1)
        return built[family]

    return get


def decoded(kind, codes, scales, offsets):
    return (codes - kind.half) * scales + offsets


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: f"{kind.bits}-{kind.has_offsets}")
def test_no_step_to_another_code_or_range_is_better(kind):
    weights = torch.randn(16, 4, 32, generator=torch.Generator().manual_seed(3))
    weights[0, 0] = 0.0
    weights[1, 1] = 1e-30
    weights[2, 2, 5] = 6.0
    codes, scales, offsets = kind(weights)
    assert torch.equal(codes, codes.round().clamp(0, 2 * kind.half - 1))
    for stored in (scales, offsets):
        assert torch.equal(stored.to(kind.dtype).float(), stored), "as it will be stored"
    errors = (decoded(kind, codes, scales, offsets) - weights).abs()
    for step in (-1, 1):
        beside = (codes + step).clamp(0, 2 * kind.half - 1)
        assert (errors <= (decoded(kind, beside, scales, offsets) - weights).abs() + 1e-7).all()
    plain = (weights.abs().amax(-1, keepdim=True) / (kind.half - 1)).to(kind.dtype).float().clamp_min(1e-7)
    rounded = (weights / plain).round().clamp(-kind.half, kind.half - 1) * plain
    wanted = (rounded - weights).square().sum()
    assert errors.square().sum() < wanted * (0.9 if kind.bits == 4 else 1.001)


@pytest.mark.parametrize(("bits", "published", "worst"), [(4, False, 0.3), (4, True, 0.3), (8, True, 0.02)])
@pytest.mark.parametrize("family", ["qwen3", "mixtral"])
def test_the_quantised_checkpoint_is_close_to_the_source(source, tmp_path, family, bits, published, worst):
    made = design(source(family), bits, published=published)
    prepare(made, tmp_path / "out")
    stored = Checkpoint.open(tmp_path / "out").tensors
    for name in ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"):
        assert stored[name].dtype is torch.bfloat16
    model = Model(tmp_path / "out")
    assert model.packed.keys() == {0, 1, 2, 3}
    assert sum(len(own) for own in model.packed.values()) == made.quantiser.num_weights
    assert not model.unexpected
    (expected,), (found,) = LogitReader(source(family)).once([ROW]), LogitReader(tmp_path / "out").once([ROW])
    assert (found - expected).float().norm() < worst * expected.float().norm()


@pytest.mark.parametrize("family", ["granitemoe", "gpt_oss", "llama4_text"])
def test_fused_experts_are_quantised_one_by_one(tmp_path, family):
    sizes = {"intermediate_size": 64}  # products with AVX-512 take outputs in multiples of 64
    folder = tiny.build(tmp_path / family, family, dtype=torch.bfloat16, shards=1, sizes=sizes)
    made = design(folder, 4)
    prepare(made, tmp_path / "out")
    stored, out = Checkpoint.open(tmp_path / "out").tensors, tmp_path / "out"
    fused = {name: ref for name, ref in Checkpoint.open(folder).tensors.items() if len(ref.shape) == 3}
    assert fused
    model = Model(out)
    packed = {weight.name: weight for own in model.packed.values() for weight in own}
    for name, ref in fused.items():
        assert name not in stored
        assert packed[name].shape == ref.shape
        assert 4 * packed[name].nbytes < 1.3 * ref.nbytes
        one = packed[name].cut(1)
        assert one.nbytes == packed[name].nbytes // ref.shape[0]
    assert made.quantiser.num_weights == len(packed)
    (expected,), (found,) = LogitReader(folder).once([ROW]), LogitReader(out).once([ROW])
    assert 0 < (found - expected).float().norm() < 0.35 * expected.float().norm()
    prepare(design(out), tmp_path / "again")
    (again,) = LogitReader(tmp_path / "again").once([ROW])
    assert torch.equal(again, found)


@pytest.mark.parametrize("bits", [4, 8])
def test_transformers_reads_it_too(source, tmp_path, bits):
    pytest.importorskip("compressed_tensors")
    prepare(design(source("qwen3"), bits, published=True), tmp_path / "out")
    ids = torch.tensor([ROW])
    (found,) = LogitReader(tmp_path / "out").once([ROW])
    expected = tiny.reference(tmp_path / "out", torch.bfloat16)(ids).logits[0]
    assert (found - expected).abs().max() <= 0.05


def test_what_cannot_be_quantised_is_refused(source, tmp_path):
    prepare(design(source("qwen3"), 8), tmp_path / "out")
    with pytest.raises(UserError, match=r"is quantised already \(compressed-tensors, int-quantized, int8"):
        design(tmp_path / "out", 4)
    with pytest.raises(UserError, match="no weights to quantise"):
        design(source("gpt2"), 4)
    for flags in (["--bits", "3"], ["--group-size", "32"], ["--published"], ["--bits", "4", "--group-size", "48"]):
        run = CliRunner().invoke(app, ["prepare", "--target", str(source("qwen3")), "-o", str(tmp_path / "x"), *flags])
        assert run.exit_code == 2


@pytest.mark.parametrize("published", [False, True])
def test_a_quantised_checkpoint_is_laid_out_anew_as_it_is(source, tmp_path, published):
    prepare(design(source("qwen3"), 4, 64, published=published), tmp_path / "quantised")
    prepare(design(tmp_path / "quantised"), tmp_path / "again")
    (expected,), (found,) = (LogitReader(tmp_path / name).once([ROW]) for name in ("quantised", "again"))
    assert torch.equal(found, expected)

"""A whole file of every type of GGUF: the tokens are transformers' on the weights that gguf-py makes of it."""

import zlib

import numpy as np
import pytest
import torch

from aspec.models.formats.gguf.decode import KERNELS
from tests import tiny
from tests.gguf_files import builds_tokenizers
from tests.quantised_pairs import Quantised

gguf = pytest.importorskip("gguf", reason="gguf-py is not installed")
from gguf import GGMLQuantizationType as Type  # noqa: E402 - after the check that it is there

from tests.gguf_models import tiny_model, write_model  # noqa: E402
from tests.test_gguf_decode import HALVES, SIZES  # noqa: E402
from tests.test_gguf_models import built  # noqa: E402

pytestmark = builds_tokenizers
WIDE = dict(hidden_size=256, intermediate_size=256, head_dim=64)  # whole blocks of 256
MIDDLES = {"Q4_1": -7.5, "Q5_1": -15.5, "Q2_K": 1.5, "Q4_K": 7.5, "Q5_K": 15.5}
"""The second number of a block in parts of the first one, such that weights are zero on average."""

CASES = [("llama", kind) for kind in ("F32", "F16", "BF16", *KERNELS)]
CASES += [("mixtral", "Q4_K"), ("qwen3moe", "Q6_K"), ("gpt-oss", "MXFP4"), ("gpt-oss", "Q8_0"), ("gemma3", "Q5_K")]
QUICK = [("llama", "Q4_K")]


def quantise(values, kind):
    """Blocks of a type: by gguf-py where it can, or any codes with scales that make weights of a usual size."""
    try:
        return gguf.quants.quantize(values, kind)
    except NotImplementedError:
        return any_blocks(kind.name, values)


def any_blocks(kind, values):
    rng = np.random.default_rng(zlib.crc32(values.tobytes()))
    length, nbytes = SIZES[kind]
    raw = rng.integers(0, 256, (*values.shape[:-1], values.shape[-1] // length, nbytes), dtype=np.uint8)
    blocks = raw.reshape(-1, nbytes)
    scales = rng.uniform(0.5, 1.5, len(blocks))
    if kind == "MXFP4":
        blocks[:, 0] = rng.integers(119, 122, len(blocks))
    for size in (1.0, values.std()):  # the second time in parts of what the first one gave
        for at, part in zip(HALVES[kind], (1.0, MIDDLES.get(kind, 1.0)), strict=False):
            blocks[:, at : at + 2] = (size * part * scales).astype(np.float16).view(np.uint8).reshape(-1, 2)
        scales = scales / gguf.quants.dequantize(blocks, Type[kind]).std()
    return raw.reshape(*values.shape[:-1], -1)


def decoded(values, kind):
    """What gguf-py makes of the blocks, for a plain file."""
    return np.ascontiguousarray(gguf.quants.dequantize(quantise(values, kind), kind), dtype=np.float32)


@pytest.mark.parametrize(
    ("name", "kind"), [pytest.param(*case, marks=() if case in QUICK else pytest.mark.slow) for case in CASES]
)
def test_greedy_equals_transformers_on_the_decoded_weights(tmp_path, name, kind):
    """Embeddings and heads are of the type, too. Without and with drafts, at three budgets."""
    sizes = {**WIDE, "moe_intermediate_size": 256} if name == "qwen3moe" else WIDE
    model = tiny.randomise(tiny_model(name, **sizes), varied=True)
    packed = write_model(tmp_path / f"model-{kind}.gguf", name, model, Type[kind], quantise)
    plain = built(write_model(tmp_path / "plain.gguf", name, model, Type[kind], decoded))
    plain.generation_config.pad_token_id = 0
    noisy = built(tmp_path / "plain.gguf")
    with torch.no_grad():
        for parameter in noisy.parameters():
            if parameter.dim() > 1:
                parameter.add_(torch.randn_like(parameter) * 0.05 * parameter.std())
    draft = write_model(tmp_path / "draft.gguf", name, noisy, Type.Q8_0)
    pair = Quantised(f"{name} {kind}", packed, draft, plain)
    pair.device_memory = 48 << 20
    pair.check_runs()

"""Whole quantised checkpoints of libraries: every parameter, and the tokens, of the model that transformers reads.

bitsandbytes' are quantised and saved by transformers, FP8's by transformers' own operation, compressed-tensors' by its
library; the experts of gpt-oss come from the published layout. What is not here, transformers does not read on a CPU:
GPTQ and AWQ (another package), FBGEMM, ModelOpt, and fused experts in FP8, whose scales transformers leaves out; in
test_quantised.py their weights are those of their definition.
"""

import functools
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from packaging.version import Version
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, CompressedTensorsConfig
from transformers.integrations.finegrained_fp8 import Fp8Quantize

from aspec.models.model import Model
from tests import tiny
from tests.quantised import assert_same_bits
from tests.quantised_models import ENDS, build
from tests.quantised_pairs import Quantised

pytestmark = pytest.mark.filterwarnings("ignore:You passed `quantization_config`:UserWarning")  # to dequantise
ACCELERATE = ("accelerate",)
WIDE = dict(intermediate_size=128)
SIZES = {  # rows of whole blocks of 64, as bitsandbytes' fastest kernel is wrong where a block crosses rows
    "llama": WIDE,
    "gpt_oss": WIDE,
    "mixtral": WIDE,
    "qwen3_moe": dict(moe_intermediate_size=64),
    "deepseek_v3": dict(intermediate_size=128, moe_intermediate_size=64, kv_lora_rank=64, q_lora_rank=64),
}


@dataclass(frozen=True)
class Written:
    """A way to write a quantised checkpoint from a plain one."""

    family: str
    write: Callable[[Path, Path], None]
    needs: tuple[str, ...] = ()  # packages


def bitsandbytes(family, dtype=torch.bfloat16, **settings):
    """Quantised and saved by transformers."""

    def write(source, folder):
        own = BitsAndBytesConfig(**settings)
        model = AutoModelForCausalLM.from_pretrained(source, quantization_config=own, device_map="cpu", dtype=dtype)
        model.save_pretrained(folder)

    return Written(family, write, (*ACCELERATE, "bitsandbytes"))


def fp8(family, block, scale_fmt="float", ends=ENDS):
    """Every weight through the operation with which transformers saves them."""

    def write(source, folder):
        settings = SimpleNamespace(weight_block_size=block, scale_fmt=scale_fmt)
        quantise, stored = Fp8Quantize(SimpleNamespace(quantization_config=settings)), {}
        for name, tensor in [pair for path in source.glob("*.safetensors") for pair in load_file(path).items()]:
            packs = name.removesuffix(".weight").endswith(ends)
            stored |= quantise.convert({name: tensor}) if packs else {name: tensor}
        folder.mkdir()
        (folder / "config.json").write_text((source / "config.json").read_text())
        save_file(
            {name: own.contiguous() for name, own in stored.items()}, folder / "model.safetensors", {"format": "pt"}
        )
        tiny.edit_config(folder, quantization_config={"quant_method": "fp8", **vars(settings)})

    return Written(family, write, ACCELERATE)


def of_this(family, method, *needs):
    """A checkpoint of tests.quantised_models."""

    def write(source, folder):
        build(folder.parent, source, method)[0].rename(folder)

    return Written(family, write, needs)


FOUR = dict(load_in_4bit=True, bnb_4bit_compute_dtype=torch.bfloat16)
NF4, FP4 = dict(FOUR, bnb_4bit_quant_type="nf4"), dict(FOUR, bnb_4bit_quant_type="fp4")
DOUBLE = dict(bnb_4bit_use_double_quant=True)
COMPRESSED = (
    *("ct int4", "ct int4 zeros", "ct int8", "ct int8 naive", "ct fp8", "ct fp8 tensor", "ct fp8 blocks"),
    *("ct mxfp8", "ct mxfp4", "ct nvfp4", "ct every module"),
)
ROWS = {
    "nf4": bitsandbytes("llama", **NF4),
    "nf4 double": bitsandbytes("llama", **NF4, **DOUBLE),
    "nf4 of fp32": bitsandbytes("llama", torch.float32, **NF4),
    "nf4 stored as bfloat16": bitsandbytes("llama", **NF4, bnb_4bit_quant_storage=torch.bfloat16),
    "nf4 left out": bitsandbytes("llama", **NF4, llm_int8_skip_modules=["lm_head", "up_proj"]),
    "fp4": bitsandbytes("llama", **FP4),
    "fp4 double": bitsandbytes("llama", **FP4, **DOUBLE),
    "int8": bitsandbytes("llama", load_in_8bit=True),
    "int8 of float16": bitsandbytes("llama", torch.float16, load_in_8bit=True),
    "nf4 double, gpt_oss": bitsandbytes("gpt_oss", **NF4, **DOUBLE),
    "nf4 double, mixtral": bitsandbytes("mixtral", **NF4, **DOUBLE),
    "int8, qwen3_moe": bitsandbytes("qwen3_moe", load_in_8bit=True),
    "nf4, deepseek_v3": bitsandbytes("deepseek_v3", **NF4),
    "fp8": fp8("llama", [32, 32]),
    "fp8 powers of two": fp8("llama", [32, 64], "ue8m0"),
    "fp8 tensor": fp8("llama", None),
    "fp8, mixtral": fp8("mixtral", [32, 32]),
    "fp8, qwen3_moe": fp8("qwen3_moe", [32, 32]),
    "fp8, deepseek_v3": fp8("deepseek_v3", [8, 32]),
    "mxfp4, gpt_oss": of_this("gpt_oss", "mxfp4", *ACCELERATE),
    **{method: of_this("llama", method, "compressed_tensors") for method in COMPRESSED},
    "ct int4, qwen3_moe": of_this("qwen3_moe", "ct int4", "compressed_tensors"),
    "ct int4, mixtral": of_this("mixtral", "ct int4", "compressed_tensors"),
    "ct int4, deepseek_v3": of_this("deepseek_v3", "ct int4", "compressed_tensors"),
}
"""Experts of compressed-tensors in other layouts are not here: transformers rounds FP8 ones once less than the library
does, and fails at int8 ones."""

QUICK = ("nf4 double", "fp8", "ct int4", "ct nvfp4")
RUN = (*QUICK, "int8", "nf4 double, gpt_oss", "int8, qwen3_moe", "fp8, deepseek_v3", "ct int4, mixtral")
"""One of a method and of a layout of experts; of all others every parameter is compared, and none other runs."""


def dequantised(folder, dtype):
    """transformers' model of a quantised checkpoint, with plain weights."""
    method = json.loads((folder / "config.json").read_text())["quantization_config"]["quant_method"]
    more = {"experts_implementation": "eager", "dtype": dtype}
    if method == "compressed-tensors":
        more["quantization_config"] = CompressedTensorsConfig(dequantize=True)
    if method == "bitsandbytes":
        more["device_map"] = "cpu"
    model = AutoModelForCausalLM.from_pretrained(folder, **more)
    model = model.dequantize(dtype=dtype) if method == "bitsandbytes" else model
    for parameter in model.parameters():
        parameter.data = parameter.data.to(torch.promote_types(parameter.dtype, dtype)).clone()
    return model.eval()


def reads_as_the_library():
    """5.17 multiplies compressed-tensors' scales in the model's dtype, and makes FP8 experts in another one."""
    if Version(transformers.__version__) < Version("5.24"):
        pytest.skip("transformers before 5.24 makes other weights than the library")


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Writes a row's plain and quantised checkpoints once."""

    def write(name):
        row = ROWS[name]
        if "compressed_tensors" in row.needs or name == "fp8, mixtral":
            reads_as_the_library()
        for package in row.needs:
            pytest.importorskip(package)
        folder = tmp_path_factory.mktemp(row.family)
        source = tiny.build(folder / "source", row.family, seed=1, varied=True, shards=1, sizes=SIZES[row.family])
        row.write(source, folder / "quantised")
        tiny.save_tokenizer(folder / "quantised")
        return source, folder / "quantised"

    return functools.cache(write)


@pytest.mark.parametrize("name", [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in ROWS])
def test_every_parameter_is_the_one_that_transformers_reads(written, name):
    source, folder = written(name)
    names = dict(tiny.reference(source).named_parameters())
    for dtype in (torch.bfloat16, torch.float32):
        wanted, model = dict(dequantised(folder, dtype).named_parameters()), Model(folder, dtype=dtype)
        found = tiny.bound(model)
        assert model.methods
        for parameter in names:
            assert_same_bits(found[parameter], wanted[parameter].detach().to(found[parameter].dtype))


@pytest.mark.slow
@pytest.mark.parametrize("name", RUN)
def test_greedy_equals_transformers_own_loader(written, name):
    source, folder = written(name)
    draft = tiny.noisy_copy(source, source.parent / "draft", 0.035)
    Quantised(name, folder, draft, dequantised(folder, torch.float32)).check_runs()

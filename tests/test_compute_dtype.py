"""A model computes in the requested dtype, in the configuration's, in that of most stored weights; and it is said."""

import json
import warnings

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from aspec.engine.engine import open_engine
from aspec.models.model import Model
from tests import tiny


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """Checkpoints of each dtype, with no dtype in config.json."""
    root = tmp_path_factory.mktemp("dtypes")
    transformers.logging.disable_progress_bar()
    for name in ("float32", "float16", "bfloat16"):
        nameless(tiny.build(root / name, "llama", dtype=getattr(torch, name), shards=1))
    return root


def nameless(folder):
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config.pop("dtype", None)
    config.pop("torch_dtype", None)
    path.write_text(json.dumps(config))
    return folder


def named(folder, into, **keys):
    (into / "model.safetensors").symlink_to(folder / "model.safetensors")
    (into / "config.json").write_text((folder / "config.json").read_text())
    return tiny.edit_config(into, **keys)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_without_a_name_the_stored_dtype_decides(stored, dtype):
    model = Model(stored / dtype)
    assert (model.dtype, model.dtypes, model.remarks) == (getattr(torch, dtype), dtype, ())
    assert not any(part.conversions for part in model.parts(1 << 30)), "nothing is converted"


@pytest.mark.parametrize("in_fp32", [("norm",), ("norm", "lm_head")])
def test_the_dtype_of_most_bytes_decides(stored, tmp_path, in_fp32):
    tensors = load_file(stored / "bfloat16" / "model.safetensors")
    for name in tensors:
        if any(part in name for part in in_fp32):
            tensors[name] = tensors[name].float()
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((stored / "bfloat16" / "config.json").read_text())
    model = Model(tmp_path)
    assert (model.dtype, model.dtypes) == (torch.bfloat16, "bfloat16 (stored in bfloat16 and float32)")


@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
def test_a_name_in_the_configuration_or_from_the_user_comes_first(stored, tmp_path, key):
    folder = named(stored / "bfloat16", tmp_path, **{key: "float32"})
    assert Model(folder).dtype == torch.float32
    assert Model(folder).dtypes == "float32 (stored in bfloat16)"
    assert Model(folder, dtype=torch.bfloat16).dtype == torch.bfloat16


@pytest.mark.parametrize("value", ["float8_e4m3fn", "int8", None])
def test_a_name_that_nothing_is_computed_in_is_no_name(stored, tmp_path, value):
    assert Model(named(stored / "bfloat16", tmp_path, dtype=value)).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("stored_in", "requested"), [("float16", "auto"), ("float32", "float16"), ("bfloat16", "fp16")]
)
async def test_float16_on_a_cpu_is_said_to_be_computed_in_bfloat16(stored, stored_in, requested):
    tiny.save_tokenizer(stored / stored_in)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        async with open_engine(target=stored / stored_in, dtype=requested, device_memory=24 << 20, threads=1) as engine:
            assert engine.dtype == torch.bfloat16
    (told,) = [str(warning.message) for warning in caught if "float16" in str(warning.message)]
    assert told.startswith(str(stored / stored_in))
    assert "float16 is computed as bfloat16" in told
    assert "--dtype float32" in told


def test_other_dtypes_are_computed_as_they_are_named(stored):
    for dtype in (torch.float32, torch.bfloat16):
        model = Model(stored / "float16", dtype=dtype)
        assert (model.dtype, model.remarks) == (dtype, ())

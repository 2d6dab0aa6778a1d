"""Plans of quantised checkpoints from their configurations alone: the tensors that would be stored, and their bytes."""

import asyncio
import json
import shutil
import threading
from dataclasses import replace
from math import ceil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import aspec  # before torch
from aspec.errors import CheckpointError
from aspec.models.formats.packed import Kind, PackedWeight, PlainWeight
from aspec.models.formats.registry import format_of, read_format, stored_weights
from aspec.models.formats.settings import is_of_activations
from aspec.models.model import Model
from aspec.plan import PlannedPart
from aspec.planning.coarsening import coarse
from aspec.profiling import profile_cache
from aspec.profiling.cost_tables import SimCosts
from aspec.profiling.decode_profiler import measure_decoding
from aspec.profiling.hardware import Hardware, Processor
from aspec.profiling.model_shape import LayerShape, ModelShape
from aspec.profiling.roofline import DECODE_COPIES, model_cost
from tests import tiny
from tests.quantised_models import build
from tests.simulate import plan_of
from tests.test_explain import MACHINE, as_object, plan

PUBLISHED = Path(__file__).parent / "published"
GOLDEN = Path(__file__).parent / "golden"


def folder_of(path, name):
    path.mkdir(exist_ok=True)
    shutil.copy(PUBLISHED / f"{name}.json", path / "config.json")
    return path


# -- what published shapes and formats add up to -------------------------------------------------------------------


def bf16(*shape):
    return 2 * torch.Size(shape).numel()


def fp8(rows, columns):
    return rows * columns + 4 * ceil(rows / 128) * ceil(columns / 128)


def int4(rows, columns):
    return rows * columns // 2 + 2 * rows * columns // 32


def gptq(rows, columns):
    return rows * columns // 2 + rows * columns // 128 * (2 + 1 / 2) + 4 * columns


def mxfp4(experts, rows, columns):
    return experts * rows * columns * (1 / 2 + 1 / 32)


def deepseek_attention(matrix, heads):
    matrices = matrix(1536, 7168) + matrix(heads * 192, 1536) + matrix(576, 7168) + matrix(heads * 256, 512)
    return matrices + matrix(7168, heads * 128) + bf16(7168 + 7168 + 1536 + 512)


def gpt_oss():
    experts = mxfp4(128, 5760, 2880) + mxfp4(128, 2880, 2880) + bf16(128, 5760 + 2880)
    attention = bf16(4096 + 512 + 512, 2880 + 1) + bf16(2880, 4096 + 1) + bf16(64)
    return 36 * (experts + attention + bf16(128, 2880 + 1) + bf16(2 * 2880)), 2 * bf16(201088, 2880) + bf16(2880)


def deepseek_v3():
    dense, routed = 3 * fp8(18432, 7168), (256 + 1) * 3 * fp8(2048, 7168) + bf16(256, 7168) + 4 * 256
    return 61 * deepseek_attention(fp8, 128) + 3 * dense + 58 * routed, 2 * bf16(129280, 7168) + bf16(7168)


def kimi_k2():
    dense, routed = 3 * bf16(18432, 7168), 384 * 3 * int4(2048, 7168) + 3 * bf16(2048, 7168) + bf16(384, 7168) + 4 * 384
    return 61 * deepseek_attention(bf16, 64) + dense + 60 * routed, 2 * bf16(163840, 7168) + bf16(7168)


def llama_405b():
    attention = 2 * gptq(16384, 16384) + 2 * gptq(1024, 16384)
    ffn = 2 * gptq(53248, 16384) + gptq(16384, 53248)
    return 126 * (attention + ffn + bf16(2 * 16384)), 2 * bf16(128256, 16384) + bf16(16384)


PUBLISHED_BYTES = {
    "gpt_oss_120b": (gpt_oss(), 65.2e9),
    "deepseek_v3": (deepseek_v3(), 688.6e9 - fp8(7168, 2 * 7168) - 11.7e9 - 2 * bf16(129280, 7168)),  # without MTP
    "kimi_k2_thinking": (kimi_k2(), 594e9),
    "llama_405b_gptq": (llama_405b(), None),
}
METHODS = {
    "gpt_oss_120b": "MXFP4",
    "deepseek_v3": "FP8",
    "kimi_k2_thinking": "compressed-tensors, pack-quantized, int4, groups of 32",
    "llama_405b_gptq": "GPTQ, 4 bits, groups of 128",
}


@pytest.mark.parametrize("name", PUBLISHED_BYTES)
def test_the_arithmetic_of_these_tests_agrees_with_the_published_total(name):
    (layers, rest), total = PUBLISHED_BYTES[name]
    if total is not None:
        assert layers + rest == pytest.approx(total, rel=0.01)


@pytest.mark.parametrize("name", ["gpt_oss_120b", "llama_405b_gptq"])
def test_bytes_of_layers_are_those_that_published_shapes_add_up_to(tmp_path, name):
    model = Model(folder_of(tmp_path / name, name), outlined=True)
    layers, rest = PUBLISHED_BYTES[name][0]
    parts = model.parts(32 << 20)
    assert sum(part.nbytes for part in parts if part.layer >= 0) == pytest.approx(layers, rel=1e-4)
    assert sum(part.nbytes for part in parts if part.layer < 0) == pytest.approx(rest, rel=1e-4)
    assert model.unexpected == ()


@pytest.mark.slow
@pytest.mark.parametrize("name", PUBLISHED_BYTES)
def test_a_plan_from_a_configuration_reads_the_published_bytes(tmp_path, name):
    machine = tmp_path / "machine.json"
    machine.write_text(json.dumps(MACHINE | {"device_memory": "141GiB", "host_memory": "2TiB"}))
    target = folder_of(tmp_path / name, name)
    found = as_object(plan("--target", target, "--experts", "whole", "--profile", machine, "--json"))
    (layers, rest), _ = PUBLISHED_BYTES[name]
    best = found["plans"][0]
    assert sum(best["bytes_by_tier"].values()) == pytest.approx(layers, rel=0.01)
    assert best["streamed_bytes"] == layers - best["bytes_by_tier"]["device"] or best["bytes_by_tier"]["device"]
    assert found["target_bytes"] == pytest.approx(layers + rest, rel=0.01)


# -- the outline of a weight is what the method's own writer stores ------------------------------------------------


def as_stored(tensors):
    return {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}


def outline_of(settings, shape, dtype=torch.bfloat16, kind=Kind.LINEAR, name="m.weight"):
    return read_format({"quantization_config": settings}, "config.json").outline(PlainWeight(name, shape, dtype, kind))


def golden(file, case):
    """The recorded tensors of a case, as those of a module m."""
    with safe_open(GOLDEN / file, "pt") as opened:
        names = [name for name in opened.keys() if name.startswith(f"{case}.") and not name.endswith("expected")]  # noqa: SIM118
        return {"m" + name.removeprefix(case): opened.get_tensor(name) for name in names}


@pytest.mark.parametrize("case", ["gptq.2.1.32", "gptq.2.2.-1", "awq.-1", "awq.32"])
def test_outlines_of_packed_words_are_what_gptqmodel_has_stored(case):
    method, *bits, size = (case if case.startswith("gptq") else case.replace("awq.", "awq.4.0.")).split(".")
    settings = {"quant_method": method, "bits": int(bits[0]), "group_size": int(size)}
    stored = as_stored(golden("gptq.safetensors", case))
    stored["m.scales"] = (stored["m.scales"][0], torch.float16)  # recorded in bfloat16, too
    assert as_stored(outline_of(settings, (32, 64))) == stored


@pytest.mark.parametrize("case", ["fp4", "fp4_double", "nf4", "nf4_double"])
def test_outlines_of_bitsandbytes_are_what_it_has_stored(case):
    stored = golden("formats.safetensors", case)
    if not stored:
        pytest.skip(f"no recorded case {case}")
    state = next(name for name in stored if "quant_state" in name)
    values = json.loads(bytes(stored[state].tolist()))
    kind, _, double = case.partition("_")
    settings = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": kind}
    made = outline_of(settings | {"bnb_4bit_use_double_quant": bool(double)}, tuple(values["shape"]))
    assert made.keys() == stored.keys()
    assert json.loads(bytes(made[state].tolist())).keys() == values.keys()
    if values["blocksize"] == 64 and values.get("nested_blocksize", 256) == 256:
        del made[state], stored[state]  # its digits are others
        assert as_stored(made) == as_stored(stored)


def test_outlines_of_fp8_are_the_modules_of_transformers():
    layers = pytest.importorskip("transformers.integrations.finegrained_fp8")
    for block in ((16, 16), None):
        module = layers.FP8Linear(40, 24, block_size=block)
        settings = {"quant_method": "fp8", "weight_block_size": None if block is None else list(block)}
        stored = {f"m.{name}": own for name, own in module.state_dict().items() if not is_of_activations(f"m.{name}")}
        assert as_stored(outline_of(settings, (24, 40))) == as_stored(stored)


def test_outlines_of_mxfp4_are_what_transformers_makes_experts_of():
    convert = pytest.importorskip("transformers.integrations.mxfp4").convert_moe_packed_tensors
    made = outline_of({"quant_method": "mxfp4"}, (3, 64, 96), kind=Kind.EXPERTS, name="m.down_proj")
    assert list(made) == ["m.down_proj_blocks", "m.down_proj_scales"]
    blocks, scales = (torch.zeros(tensor.shape, dtype=tensor.dtype) for tensor in made.values())
    assert convert(blocks, scales).shape == (3, 64, 96)


# -- whole models: a checkpoint of the outlined tensors has the same parts as the outline --------------------------

INT4 = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 16, "symmetric": False}
COMPRESSED = {"quant_method": "compressed-tensors", "format": "pack-quantized", "ignore": ["lm_head"]}
SETTINGS = {
    "gptq": {"quant_method": "gptq", "bits": 4, "group_size": 16},
    "awq": {"quant_method": "awq", "bits": 4, "group_size": 16},
    "fp8": {"quant_method": "fp8", "weight_block_size": [16, 16]},
    "compressed": COMPRESSED | {"config_groups": {"group_0": {"targets": ["Linear"], "weights": INT4}}},
    "nf4": {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "int8": {"quant_method": "bitsandbytes", "load_in_8bit": True},
    "nvfp4": {"quant_method": "modelopt", "quant_algo": "NVFP4", "exclude_modules": ["lm_head"]},
}
WIDE = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 16, "moe_intermediate_size": 32}


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    root = tmp_path_factory.mktemp("plain")
    return {kind: tiny.build(root / kind, kind, sizes=WIDE) for kind in ("llama", "mixtral", "qwen3_moe")}


def quantised(plain, path, settings):
    """The configuration of a model, with settings and without weights."""
    path.mkdir()
    config = json.loads((plain / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"quantization_config": settings}))
    return path


@pytest.mark.parametrize("method", SETTINGS)
@pytest.mark.parametrize("family", ["llama", "mixtral", "qwen3_moe"])
def test_a_checkpoint_of_the_outlined_tensors_has_the_same_weights(plain, tmp_path, family, method):
    outlined = Model(quantised(plain[family], tmp_path / "a", SETTINGS[method]), outlined=True)
    folder = quantised(plain[family], tmp_path / "b", SETTINGS[method])
    tensors = {}
    for name, ref in outlined.checkpoint.tensors.items():
        own = torch.zeros(ref.shape, dtype=ref.dtype)
        tensors[name] = own if ref.data is None else torch.tensor(list(ref.data), dtype=ref.dtype).view(ref.shape)
    save_file(tensors, folder / "model.safetensors")
    stored = Model(folder)
    packed = stored_weights(
        stored.checkpoint.tensors, format_of(folder, json.loads((folder / "config.json").read_text()))
    )
    assert {name: (own.shape, own.dtype) for name, own in stored.checkpoint.tensors.items()} == {
        name: (own.shape, own.dtype) for name, own in outlined.checkpoint.tensors.items()
    }
    assert sum(own.nbytes for own in packed.values()) == outlined.checkpoint.nbytes, "every tensor belongs to a weight"
    assert stored.unexpected == outlined.unexpected == ()
    names = {name for name, own in packed.items() if isinstance(own, PackedWeight)}
    experts = {"llama": 0, "mixtral": 1, "qwen3_moe": 1}[family]
    assert any(name.endswith("self_attn.q_proj.weight") for name in names)
    assert any(".experts.0." in name for name in names) == bool(experts)
    assert not any("gate.weight" in name or "embed" in name or "norm" in name or "lm_head" in name for name in names)


# -- what the plan says of them --------------------------------------------------------------------------------------

EIGHT_LAYERS = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_attention_heads": 32,
    "num_hidden_layers": 8,
    "vocab_size": 1000,
    "torch_dtype": "bfloat16",
    "quantization_config": {"quant_method": "gptq", "bits": 4, "group_size": 128},
}


@pytest.fixture(scope="module")
def medium(tmp_path_factory):
    """A folder with a model of eight layers, and a function that writes a machine with so much memory."""
    root = tmp_path_factory.mktemp("medium")
    (root / "config.json").write_text(json.dumps(EIGHT_LAYERS))

    def machine(memory, **cpu):
        path = root / "machine.json"
        processor = {"flop_per_s": {"bfloat16": 1e12}, "memory_bytes_per_s": 4e10, **cpu}
        path.write_text(json.dumps({"disk_bytes_per_s": 2e9, "cpu": processor}))
        return ("--target", root, "--profile", path, "--device-memory", memory)

    return machine


def test_a_plan_tells_the_method_its_decoding_and_the_plain_model_beside_it(medium):
    result = plan(*medium("1500MiB"))
    assert result.exit_code == 0, result.output
    assert "GPTQ, 4 bits, groups of 128, computed in bfloat16, from its configuration alone" in result.stdout
    assert "decoding: " in result.stdout
    assert "in bfloat16: 3.03 GiB, " in result.stdout
    found = as_object(plan(*medium("1500MiB"), "--json"))
    plain = found["unpacked"]
    assert found["methods"] == ["GPTQ, 4 bits, groups of 128"]
    assert plain["target_bytes"] == pytest.approx(
        2 * (8 * (4 * 4096**2 + 3 * 4096 * 11008) + 2 * 1000 * 4096), rel=0.01
    )
    assert plain["streamed_bytes"] > found["plans"][0]["streamed_bytes"]
    assert plain["forecast"]["job_s"] > found["plans"][0]["forecast"]["job_s"]


def test_where_decoding_binds_the_lane_is_named_and_the_pass_takes_its_seconds(medium):
    method = "GPTQ, 4 bits, groups of 128"
    found = as_object(plan(*medium("1500MiB", decode_weight_s={method: 2e-8}), "--json"))
    streamed = found["plans"][0]["streamed_bytes"] / (0.5 + 2.5 / 128)  # about so many weights
    assert found["decode_s"] == pytest.approx(2e-8 * streamed, rel=0.05)
    assert found["pass_s"] == pytest.approx(found["decode_s"], rel=0.1)
    assert "decod" in found["plans"][0]["forecast"]["bottleneck"]


def test_merged_parts_decode_as_much():
    parts = tuple(PlannedPart(n, n // 4, 1000, 1000, scratch_bytes=300, decoded_bytes=200) for n in range(2000))
    whole = plan_of(parts, 500, 8, 1000)
    merged, _ = coarse(whole, SimCosts())
    assert len(merged.parts) < 500
    assert sum(part.decoded_bytes for part in merged.parts) == 2000 * 200


# -- where settings stand ------------------------------------------------------------------------------------------


def test_settings_of_the_text_model_and_of_modelopt_s_own_file_are_read(tmp_path):
    settings = SETTINGS["gptq"]
    assert read_format({"text_config": {"quantization_config": settings}}, "config.json") is not None
    (tmp_path / "hf_quant_config.json").write_text(
        json.dumps({"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "NVFP4", "exclude_modules": []}})
    )
    found = format_of(tmp_path, {})
    assert found is not None
    assert "m.weight_scale_2" in found.outline(PlainWeight("m.weight", (32, 32), torch.bfloat16, Kind.LINEAR))
    assert type(format_of(tmp_path, {"quantization_config": settings})) is not type(found), "config.json goes first"
    (tmp_path / "hf_quant_config.json").write_text('{"quantization": {"quant_algo": null}}')
    assert format_of(tmp_path, {}) is None


def test_a_damaged_file_of_modelopt_is_refused(tmp_path):
    (tmp_path / "hf_quant_config.json").write_text("[]")
    with pytest.raises(CheckpointError, match="expected a JSON object with quantization"):
        format_of(tmp_path, {})


# -- prices of decoding --------------------------------------------------------------------------------------------


def test_decoding_is_measured_once_by_method_and_remembered(plain, tmp_path, monkeypatch):
    model = Model(quantised(plain["llama"], tmp_path / "a", SETTINGS["gptq"]), outlined=True)
    found = profile_cache.decoding_profile(model, cache=tmp_path / "cache")
    assert list(found) == ["GPTQ, 4 bits, groups of 16"]
    assert 0 < min(found.values()) < 1e-3
    monkeypatch.setattr(profile_cache, "measure_decoding", lambda *_: 7.0)
    assert profile_cache.decoding_profile(model, cache=tmp_path / "cache") == found
    assert set(profile_cache.decoding_profile(model, refresh=True, cache=tmp_path / "cache").values()) == {7.0}


def test_a_kept_price_that_a_whole_run_contradicts_is_measured_anew(plain, tmp_path, monkeypatch):
    model = Model(quantised(plain["llama"], tmp_path / "a", SETTINGS["gptq"]), outlined=True)
    monkeypatch.setattr(profile_cache, "measure_decoding", lambda *_: 2e-9)
    for times, stays in ((1.4, True), (0.7, True), (1.6, False), (0.6, False)):
        profile_cache.decoding_profile(model, cache=tmp_path)
        made = dict.fromkeys((0, 1), (4 * 10**9 * model.dtype.itemsize, 8.0 * times))
        profile_cache.doubt_decoding(model, 1, {0: (4000 * model.dtype.itemsize, 8.0 * times * 1e-6)}, cache=tmp_path)
        assert list(tmp_path.glob("decode-*.json")), "a short run says little"
        profile_cache.doubt_decoding(model, 2, made, cache=tmp_path)
        assert list(tmp_path.glob("decode-*.json")), "another number of threads has another price"
        profile_cache.doubt_decoding(model, 1, made, cache=tmp_path)
        assert bool(list(tmp_path.glob("decode-*.json"))) == stays


def test_a_run_of_an_engine_corrects_a_price(plain, tmp_path, monkeypatch):
    monkeypatch.setattr(profile_cache, "LEAST_DOUBT_S", 0.0)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = build(tmp_path, plain["llama"], "gptq 4 bits")[0]

    async def run():
        options = dict(speculation="off", threads=1, resident_memory=0, max_context=64)
        async with aspec.open_engine(target=folder, **options) as engine:
            async for _ in engine.stream([3, 4, 5], aspec.SamplingParams(max_new_tokens=2)):
                pass

    for price, stays in ((1.0, False), (1e-7, True)):
        monkeypatch.setattr(profile_cache, "measure_decoding", lambda *_, price=price: price)
        monkeypatch.setattr(profile_cache, "MOST_DOUBT", 1e5)  # of a shared machine
        profile_cache.decoding_profile(Model(folder), 1)
        asyncio.run(run())
        assert bool(list(tmp_path.glob("cache/aspec/decode-*.json"))) == stays


def test_decoding_is_measured_with_as_many_threads_at_work_as_a_run_has():
    """Each waits in its decoder until all are there."""
    together = threading.Barrier(3)
    weight = PackedWeight("w", (4, 4), torch.bfloat16, (), "method", lambda *_: together.wait(60), 0)
    assert 0 < measure_decoding(weight, torch.bfloat16, threads=3) < 60
    assert not together.broken


def test_the_price_of_decoding_is_measured_or_some_copies_by_the_method():
    layer = LayerShape(2_000_000, 2_000_000, packed=(("FP8", 1_000_000), ("GPTQ, 4 bits, one group", 1_000_000)))
    shape = ModelShape((layer, replace(layer, packed=())), 64, 100, 4, 4, 16, 16, 12_800)
    processor = Processor(memory_bytes_per_s=2e10, copy_bytes_per_s=1e10, decode_weight_s={"FP8": 4e-9})
    packed, plain = (own.decode_byte_s for own in model_cost(shape, Hardware(cpu=processor)).layers)
    assert packed == pytest.approx((4e-9 / 2 + DECODE_COPIES["GPTQ"] / 1e10) / 2)
    assert plain == pytest.approx(1e-10)

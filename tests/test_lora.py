"""LoRA adapters in peft's format: tokens as of the merged model, whatever streams; anything else is refused by name."""

import asyncio
import json
import math
import re

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn

from aspec.backends import registry
from aspec.backends.registry import Kind
from aspec.engine.engine import open_engine
from aspec.errors import CheckpointError, UnsupportedModelError, UserError
from aspec.generation.params import SamplingParams
from aspec.models.model import Model
from aspec.options import EngineOptions
from aspec.planning.footprint import read_models, request_for
from aspec.planning.resolve import resolve
from aspec.preparing.identity import fingerprint
from aspec.tasks.op import Op
from aspec.tasks.races import find_races
from tests import tiny
from tests.fake_device import EagerDevice

NEW = 10
PROMPTS = [torch.randint(3, 256, (n,), generator=torch.Generator().manual_seed(5)).tolist() for n in (20, 11)]
DENSE = ("q_proj", "v_proj", "down_proj")


@pytest.fixture(scope="module", autouse=True)
def _quiet():
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """Builds a family's checkpoint once."""
    root, built = tmp_path_factory.mktemp("lora"), {}

    def get(family, **kwargs):
        key = (family, *kwargs.items())
        if key not in built:
            built[key] = tiny.build(root / f"base{len(built)}", family, varied=True, **kwargs)
        return built[key]

    return get


def config_of(**changes):
    return {"peft_type": "LORA", "r": 4, "lora_alpha": 32, "target_modules": list(DENSE), "bias": "none"} | changes


def modules_of(model, names):
    return [
        name for name, module in model.named_modules() if name.rpartition(".")[2] in names and hasattr(module, "weight")
    ]


def write(folder, source, config, *, ranks=(), dtype=torch.float32, rename=lambda name: name):
    """An adapter with random matrices for the modules that ``config`` names by their last part."""
    model, tensors = tiny.reference(source), {}
    generator = torch.Generator().manual_seed(1)
    for name in modules_of(model, config["target_modules"]):
        module = model.get_submodule(name)
        rank = dict(ranks).get(name.rpartition(".")[2], config["r"])
        rows, columns = module.weight.shape
        if isinstance(module, nn.Embedding):
            shapes = {"lora_embedding_A": (rank, rows), "lora_embedding_B": (columns, rank)}
        else:
            flipped = type(module).__name__ == "Conv1D"
            outs, ins = (columns, rows) if flipped else (rows, columns)
            shapes = {"lora_A.weight": (rank, ins), "lora_B.weight": (outs, rank)}
        for end, shape in shapes.items():
            tensors[f"base_model.model.{name}.{end}"] = torch.randn(shape, generator=generator) * 0.12
    for name in modules_of(model, config.get("modules_to_save") or ()):
        weight = model.get_submodule(name).weight
        tensors[f"base_model.model.{name}.weight"] = weight + 0.05 * torch.randn(weight.shape, generator=generator)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(
        {rename(name): tensor.to(dtype).contiguous() for name, tensor in tensors.items()},
        folder / "adapter_model.safetensors",
    )
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def merged(source, tensors, scale):
    """transformers' model with whole tensors replaced and W + scale * B @ A, each by the plainest code."""
    model = tiny.reference(source)
    with torch.no_grad():
        for name, tensor in tensors.items():
            path, _, last = name.removeprefix("base_model.model.").rpartition(".")
            if "lora_" not in name:
                setattr(model.get_submodule(path), last, nn.Parameter(tensor.clone()))
        for name, a in tensors.items():
            if "_A" in name:
                path = re.split(r"\.lora_", name.removeprefix("base_model.model."))[0]
                module = model.get_submodule(path)
                change = tensors[name.replace("_A", "_B")].double() @ a.double() * scale(path)
                change = change if change.shape == module.weight.shape and type(module) is nn.Linear else change.T
                module.weight = nn.Parameter((module.weight.double() + change).float())  # a tied one is not tied now
    return model


def generated(model):
    options = dict(max_new_tokens=NEW, do_sample=False, eos_token_id=None)
    return [model.generate(torch.tensor([prompt]), **options)[0, len(prompt) :].tolist() for prompt in PROMPTS]


async def tokens(target, spans=None, **options):
    async def one(engine, prompt):
        params = SamplingParams(max_new_tokens=NEW, ignore_eos=True)
        return [token async for piece in engine.stream(prompt, params) for token in piece.token_ids]

    common = dict(target=target, max_context=96, device_memory=24 << 20, threads=1)
    async with open_engine(observers=[] if spans is None else [spans.append], **common | options) as engine:
        return await asyncio.gather(*(one(engine, prompt) for prompt in PROMPTS))


def stored(folder):
    return load_file(folder / "adapter_model.safetensors")


PLAIN = [
    ("llama", {}, {}),
    ("llama", {"use_rslora": True, "target_modules": ["q_proj", "o_proj", "up_proj"]}, {}),
    ("qwen3", {"rank_pattern": {"v_proj": 2}, "alpha_pattern": {r"layers\.2\..*q_proj": 5}}, {"v_proj": 2}),
    ("gpt2", {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}, {}),
    ("phi3", {"target_modules": ["qkv_proj", "gate_up_proj"]}, {}),
    ("mixtral", {"target_modules": ["k_proj", "o_proj"]}, {}),
    ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "norm", "input_layernorm"]}, {}),
    ("llama", {"target_modules": ["embed_tokens", "lm_head", "q_proj"]}, {}),
    ("llama_tied", {"target_modules": ["embed_tokens", "q_proj"], "lora_alpha": 4}, {}),
    ("llama_tied", {"target_modules": ["lm_head"], "lora_alpha": 4}, {}),
    ("llama_tied", {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]}, {}),
    ("llama_tied", {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]}, {}),
]


def scale_of(config):
    def scale(path):
        rank = config.get("rank_pattern", {}).get(path.rpartition(".")[2], config["r"])
        pattern = config.get("alpha_pattern", {})
        alpha = next((a for key, a in pattern.items() if re.search(key + "$", path)), config["lora_alpha"])
        return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)

    return scale


@pytest.mark.parametrize(
    ("family", "changes", "ranks"),
    [pytest.param(*one, marks=pytest.mark.slow if i % 2 else ()) for i, one in enumerate(PLAIN)],
    ids=lambda value: json.dumps(value)[:60],
)
async def test_tokens_equal_the_merged_model(base, tmp_path, family, changes, ranks):
    config = config_of(**changes)
    adapter = write(tmp_path / "adapter", base(family), config, ranks=ranks)
    wanted = generated(merged(base(family), stored(adapter), scale_of(config)))
    assert wanted != generated(tiny.reference(base(family))), "the adapter must change the text"
    assert await tokens(base(family), adapter=adapter, resident_memory=0) == wanted
    assert await tokens(base(family), adapter=adapter) == wanted


@pytest.mark.parametrize("speculation", ["chain", "tree"])
async def test_the_tokens_are_the_same_with_a_draft(base, tmp_path, speculation):
    adapter = write(tmp_path, base("llama"), config_of())
    alone = await tokens(base("llama"), adapter=adapter, dtype="bfloat16")
    options = dict(adapter=adapter, draft=base("llama"), speculation=speculation, dtype="bfloat16")
    assert await tokens(base("llama"), **options, resident_memory=40_000) == alone


PEFT = {
    "plain": ("llama", dict(target_modules=list(DENSE))),
    "rslora": ("qwen3", dict(target_modules="all-linear", use_rslora=True)),
    "regex": ("llama", dict(target_modules=r".*layers\.[12]\.mlp\.(up|down)_proj")),
    "layers": ("mistral", dict(target_modules=["o_proj"], layers_to_transform=[0, 3])),
    "tied": ("llama_tied", dict(target_modules=["q_proj"], modules_to_save=["lm_head"])),
    "whole layers": ("llama", dict(target_modules=["q_proj", "up_proj"], modules_to_save=["mlp", "norm"])),
    "embed": ("llama", dict(target_modules=["embed_tokens", "lm_head"])),
}


@pytest.mark.parametrize("case", PEFT)
async def test_an_adapter_that_peft_wrote_gives_the_tokens_of_its_merge(base, tmp_path, case):
    peft = pytest.importorskip("peft", reason="peft is not installed: only adapters of these tests are tried")
    family, changes = PEFT[case]
    trained = peft.get_peft_model(tiny.reference(base(family)), peft.LoraConfig(r=4, lora_alpha=32, **changes))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in trained.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    trained.save_pretrained(tmp_path)
    wanted = generated(trained.merge_and_unload())
    assert await tokens(base(family), adapter=tmp_path, resident_memory=0) == wanted


# -- the maths ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kept", [torch.bfloat16, torch.float32, torch.float16])
def test_bf16_weights_are_merged_in_fp32_and_rounded_once(base, tmp_path, kept):
    folder = base("llama", dtype=kept)
    adapter = write(tmp_path, folder, config_of(), dtype=torch.bfloat16)
    tensors, weights = stored(adapter), tiny.reference(folder).state_dict()
    changed = 0
    for name, tensor in tiny.bound(Model(folder, dtype=torch.bfloat16, adapter=adapter)).items():
        a, b = (tensors.get(f"base_model.model.{name.removesuffix('weight')}lora_{x}.weight") for x in "AB")
        change = 0.0 if a is None else b.double() @ a.double() * 8.0
        off = (tensor != (weights[name].double() + change).bfloat16()).sum()
        assert off <= tensor.numel() // 2000, name  # the fp32 sum itself is rounded; twice rounded, a tenth is off
        changed += a is not None
    assert changed == 12


async def test_both_rules_hold_where_the_files_leave_nothing_aligned(base, tmp_path):
    folder = base("llama")
    odd = {}
    for shard in sorted(folder.glob("*.safetensors")):
        odd |= load_file(shard)
    copy = tmp_path / "odd"
    copy.mkdir()
    for file in folder.glob("*.json"):
        if "index" not in file.name:
            (copy / file.name).write_bytes(file.read_bytes())
    header = {}
    data = b""
    for name, tensor in odd.items():
        header[name] = {
            "dtype": "F32",
            "shape": list(tensor.shape),
            "data_offsets": [len(data), len(data) + tensor.nbytes],
        }
        data += tensor.numpy().tobytes()
    text = json.dumps(header).encode()
    text += b" " * (3 - len(text) % 4)  # the data begins at an odd byte
    (copy / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + data)
    adapter = write(tmp_path / "adapter", folder, config_of())
    assert await tokens(copy, adapter=adapter, resident_memory=0) == await tokens(folder, adapter=adapter)


# -- where an adapter is -----------------------------------------------------------------------------------


async def test_an_adapter_beside_whole_weights_is_merged(base, tmp_path):
    for file in base("llama").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    adapter = write(tmp_path / "alone", base("llama"), config_of())
    wanted = await tokens(base("llama"), adapter=adapter)
    assert await tokens(tmp_path) != wanted
    write(tmp_path, base("llama"), config_of(base_model_name_or_path="nobody/nothing"))
    assert await tokens(tmp_path) == wanted


@pytest.mark.parametrize("relative", [False, True])
def test_a_folder_with_an_adapter_alone_finds_its_base(base, tmp_path, relative):
    (tmp_path / "base").symlink_to(base("llama"))
    name = "../base" if relative else str(tmp_path / "base")
    adapter = write(tmp_path / "adapter", base("llama"), config_of(base_model_name_or_path=name))
    resolved = resolve(EngineOptions(target=adapter, draft=base("llama")))
    assert resolved.target.resolve() == base("llama").resolve()
    assert (resolved.adapter, resolved.draft_adapter) == (adapter, None)
    assert resolved.tokenizer == resolved.target
    tiny.save_tokenizer(adapter)
    assert resolved.tokenizer == adapter


def test_what_cannot_be_resolved_is_refused(base, tmp_path):
    llama = base("llama")
    alone = write(tmp_path / "alone", llama, config_of(base_model_name_or_path="/no/such/base"))
    unnamed = write(tmp_path / "unnamed", llama, config_of())
    circle = write(tmp_path / "circle", llama, config_of(base_model_name_or_path="."))
    for options, said in (
        (dict(target=alone), "the base of target .* was not found"),
        (dict(target=unnamed), "names no base model"),
        (dict(target=circle), "holds an adapter, too"),
        (dict(target=alone, adapter=unnamed), "a second one"),
        (dict(target=llama, adapter=llama), "no adapter_config.json"),
        (dict(adapter=unnamed), "--adapter was given without --target"),
    ):
        with pytest.raises(UserError, match=said):
            resolve(EngineOptions(**options))


# -- what is refused ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"peft_type": "IA3"}, "type 'IA3'"),
        ({"peft_type": "PREFIX_TUNING"}, "PREFIX_TUNING"),
        ({"peft_type": "VERA"}, "VERA"),
        ({"peft_type": None}, "type None"),
        ({"use_dora": True}, "use_dora"),
        ({"bias": "all"}, "trained biases"),
        ({"lora_bias": True}, "lora_bias"),
        ({"alora_invocation_tokens": [1, 2]}, "alora_invocation_tokens"),
        ({"trainable_token_indices": [5]}, "trainable_token_indices"),
        ({"target_parameters": ["mlp.experts.gate_up_proj"]}, "target_parameters"),
        ({"layer_replication": [[0, 2], [1, 4]]}, "layer_replication"),
        ({"init_lora_weights": "pissa_niter_4"}, "pissa_niter_4"),
        ({"a_key_of_tomorrow": {"on": True}}, "a_key_of_tomorrow"),
        ({"revision": "abc123"}, "abc123"),
    ],
    ids=str,
)
def test_what_is_not_plain_lora_is_refused_by_name(base, tmp_path, changes, said):
    adapter = write(tmp_path, base("llama"), config_of())
    (adapter / "adapter_config.json").write_text(json.dumps(config_of(**changes)))
    with pytest.raises(UnsupportedModelError, match=said) as refusal:
        Model(base("llama"), adapter=adapter)
    assert "merge_and_unload" in str(refusal.value)


def test_keys_that_do_not_change_the_text_are_taken(base, tmp_path):
    neutral = {"lora_dropout": 0.1, "task_type": "CAUSAL_LM", "peft_version": "0.21.2", "inference_mode": True}
    empty = {"use_dora": False, "loftq_config": {}, "eva_config": None, "layer_replication": None, "arrow_config": None}
    adapter = write(tmp_path, base("llama"), config_of(**neutral, **empty, init_lora_weights="gaussian", revision=None))
    assert Model(base("llama"), adapter=adapter)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"r": 0}, "expected r to be a rank"),
        ({"r": "8"}, "expected r to be a rank"),
        ({"r": 8}, r"expected a plain float type of shape \[8, 96\]"),
        ({"lora_alpha": None}, "expected lora_alpha to be a number"),
        ({"lora_alpha": float("nan")}, "expected lora_alpha to be a number"),
        ({"target_modules": {"q": 1}}, "expected target_modules to be a list"),
        ({"target_modules": ["q_proj"]}, "does not name"),
        ({"layers_to_transform": [0]}, "does not name"),
        ({"layers_to_transform": "0"}, "expected layers_to_transform"),
        ({"rank_pattern": [1]}, "expected rank_pattern"),
        ({"alpha_pattern": {"(": 1}}, "regular expressions"),
        ({"alpha_pattern": {"(a+)+b": 1}}, "no repeated group"),
        ({"modules_to_save": ["lm_head"]}, "the module 'lm_head'"),
        ({"base_model_name_or_path": 5}, "expected base_model_name_or_path"),
    ],
    ids=str,
)
def test_a_configuration_that_contradicts_itself_or_the_file_is_refused(base, tmp_path, changes, said):
    adapter = write(tmp_path, base("llama"), config_of())
    (adapter / "adapter_config.json").write_text(json.dumps(config_of(**changes)))
    with pytest.raises(CheckpointError, match=said):
        Model(base("llama"), adapter=adapter)


def test_a_file_that_fits_not_the_model_is_refused(base, tmp_path):
    llama = base("llama")
    other = write(tmp_path / "other", base("phi3"), config_of(target_modules=["qkv_proj"]))
    half = write(
        tmp_path / "half", llama, config_of(), rename=lambda name: name.replace("0.mlp.down_proj.lora_A", "9.x")
    )
    dora = write(
        tmp_path / "dora",
        llama,
        config_of(),
        rename=lambda name: name.replace("lora_B.weight", "lora_magnitude_vector"),
    )
    whole = write(tmp_path / "whole", base("llama_tied"), config_of(target_modules=["q_proj"]))
    save_file({"base_model.model.lm_head.weight": torch.zeros(260, 64)}, whole / "adapter_model.safetensors")
    for adapter, said in (
        (other, r"fit no module of this llama model: model\.layers\.\*\.self_attn\.qkv_proj"),
        (half, "fit no module"),
        (dora, "lora_magnitude_vector"),
        (whole, "another vocabulary"),
    ):
        with pytest.raises(CheckpointError, match=said):
            Model(llama, adapter=adapter)
    (whole / "adapter_model.safetensors").rename(whole / "adapter_model.bin")
    with pytest.raises(CheckpointError, match=r"found adapter_model\.bin"):
        Model(llama, adapter=whole)


def test_modules_that_no_update_can_change_are_refused(base, tmp_path):
    folder = base("llama")
    tensors = {
        "base_model.model.model.norm.lora_A.weight": torch.zeros(4, 64),
        "base_model.model.model.norm.lora_B.weight": torch.zeros(64, 4),
    }
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps(config_of(target_modules=["norm"])))
    with pytest.raises(UnsupportedModelError, match=r"model.norm, a LlamaRMSNorm"):
        Model(folder, adapter=tmp_path)


# -- plans -------------------------------------------------------------------------------------------------


def test_plans_count_an_adapter(base, tmp_path):
    folder = base("llama", dtype=torch.bfloat16)
    adapter = write(tmp_path, folder, config_of(), dtype=torch.bfloat16)
    plain, changed = (read_models(resolve(EngineOptions(target=folder, adapter=a))) for a in (None, adapter))
    more = sum(part.nbytes for part in changed.parts) - sum(part.nbytes for part in plain.parts)
    assert more >= sum(tensor.nbytes for tensor in stored(adapter).values())
    assert changed.footprint(request_for(changed)).fixed["adapter merge"] > 0
    assert plain.footprint(request_for(plain)).fixed["adapter merge"] == 0
    assert all(part.decoded_bytes > 0 for part in changed.parts if part.layer >= 0)
    assert not any(part.decoded_bytes for part in plain.parts if part.layer >= 0)


# -- behind a link, and beside other features --------------------------------------------------------------


@pytest.mark.parametrize("host_memory", [1 << 20, 64 << 20], ids=["from the disk", "from host memory"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
async def test_the_tokens_are_the_same_across_a_link(base, tmp_path, monkeypatch, host_memory, dtype):
    kind = Kind(
        torch.device("cpu"), lambda: True, lambda: 1 << 34, lambda: EagerDevice(copy_pace_s=1e-5), lambda: "a card"
    )
    monkeypatch.setitem(registry.KINDS, "cuda", kind)
    folder = base("llama")
    adapter = write(tmp_path, folder, config_of(target_modules=[*DENSE, "lm_head", "embed_tokens"]))
    options = dict(adapter=adapter, dtype=dtype, exact=True)
    spans = []
    found = await tokens(folder, device="cuda", host_memory=host_memory, resident_memory=0, spans=spans, **options)
    assert found == await tokens(folder, **options)
    assert any(span.task.op is Op.COPY for span in spans)
    assert not find_races(spans)


def test_a_job_with_another_adapter_is_another_job(base, tmp_path):
    folder = base("llama")
    first = write(tmp_path / "first", folder, config_of())
    second = write(tmp_path / "second", folder, config_of(lora_alpha=8))
    assert fingerprint(first) != fingerprint(second)


def test_a_draft_may_have_an_adapter_of_its_own(base, tmp_path):
    draft = write(tmp_path, base("llama"), config_of(base_model_name_or_path=str(base("llama"))))
    resolved = resolve(EngineOptions(target=base("llama"), draft=draft))
    assert (resolved.adapter, resolved.draft, resolved.draft_adapter) == (None, base("llama"), draft)
    models = read_models(resolved)
    assert any(part.updates for part in models.draft_parts)
    assert not any(part.updates for part in models.parts)


HOSTILE = [
    {"peft_type": {"a": [1]}},
    {"bias": ["all"]},
    {"init_lora_weights": {"a": 1}},
    {"target_modules": [1, 2]},
    {"target_modules": 5},
    {"exclude_modules": [None]},
    {"rank_pattern": {"q_proj": True}},
    {"rank_pattern": {"q_proj": 10**30}},
    {"alpha_pattern": {"q_proj": "8"}},
    {"alpha_pattern": {".*" * 50: 8}},
    {"alpha_pattern": {"(?P<a": 8}},
    {"layers_to_transform": [True, None]},
    {"layers_pattern": {"a": 1}},
    {"lora_alpha": 10**400},
    {"r": -1},
    {"r": True},
    {"x\x1b[31m" * 10_000: 1},
]


@pytest.mark.parametrize("changes", HOSTILE, ids=lambda value: str(value)[:40])
def test_any_configuration_is_taken_or_refused_in_a_paragraph(base, tmp_path, changes):
    adapter = write(tmp_path, base("llama"), config_of())
    (adapter / "adapter_config.json").write_text(json.dumps(config_of(**changes)))
    with pytest.raises(UserError) as error:
        Model(base("llama"), adapter=adapter)
    text = str(error.value)
    assert len(text) < 800
    assert "\n" not in text
    assert "\x1b" not in text


@pytest.mark.parametrize("name", ["a" * 5000, "b\0c", "\ud800", "", "~nobody/x", "org/" + "x" * 300])
def test_a_base_of_any_name_is_refused_in_a_paragraph(tmp_path, name, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "adapter_config.json").write_text(json.dumps(config_of(base_model_name_or_path=name)))
    with pytest.raises(UserError) as error:
        resolve(EngineOptions(target=tmp_path))
    assert "\n" not in str(error.value)

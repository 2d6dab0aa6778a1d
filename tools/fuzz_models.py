"""Fuzzed model folders: damaged headers, indexes, configurations, tokenizers, templates, and what each must equal."""

import json
import os
import shutil
import struct
from collections.abc import Callable, Mapping
from contextlib import suppress
from itertools import product
from pathlib import Path
from random import Random
from types import MappingProxyType
from typing import Any

import torch
import transformers
from fuzz_compare import as_own_reader, expect
from mutations import damage, damaged_bytes, damaged_json
from safetensors import safe_open
from safetensors.torch import save_file
from tokenizers import Tokenizer as RustTokenizer
from tokenizers import decoders, models, pre_tokenizers

import aspec
from aspec.generation.defaults import sampling_params
from aspec.generation.text.time_limit import TimeLimit
from aspec.generation.text.tokenizer import Tokenizer
from aspec.io.checkpoint import Checkpoint
from aspec.models.configuration.generation_defaults import generation_defaults
from aspec.models.model import Model
from aspec.options import EngineOptions
from aspec.planning.footprint import read_models, request_for
from aspec.planning.placement import make_plan
from aspec.planning.resolve import resolve

SMALL = {
    **{"vocab_size": 256, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2},
    **{
        "num_key_value_heads": 1,
        "max_position_embeddings": 64,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
}
FAMILIES: Mapping[str, Callable[[], transformers.PreTrainedConfig]] = MappingProxyType(
    {
        "llama": lambda: transformers.LlamaConfig(**SMALL, rope_parameters={"rope_type": "yarn", "factor": 2.0}),
        "gemma3": lambda: transformers.Gemma3TextConfig(**SMALL, head_dim=8, sliding_window=8),
        "qwen2_moe": lambda: transformers.Qwen2MoeConfig(**SMALL, num_experts=2, moe_intermediate_size=8),
        "gpt2": lambda: transformers.GPT2Config(vocab_size=256, n_embd=16, n_layer=2, n_head=2, n_positions=64),
    }
)
TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{% if m.content is string %}{{ m.content | trim }}{% else %}"
    "{% for part in m.content %}{{ part.text }}{% endfor %}{% endif %}</s>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}{{ raise_exception('x') if messages | length > 9 else '' }}"
)
MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi, ünï 日本"}]
TEXTS = ("", "Hello, world!", "ünï 日本 👋\n\t x", "a" * 100)
TEMPLATE_S = 2.0  # of processor time for one template


def make_models(root: Path) -> None:
    """Model folders of some families, with tokenizers; one of them in shards."""
    torch.manual_seed(0)
    for family, config in FAMILIES.items():
        model = transformers.AutoModelForCausalLM.from_config(config()).eval()
        model.save_pretrained(root / family)
        save_tokenizer(root / family)
    sharded = transformers.AutoModelForCausalLM.from_pretrained(root / "llama")
    sharded.save_pretrained(root / "sharded", max_shard_size=sum(p.nbytes for p in sharded.parameters()) // 3)
    save_tokenizer(root / "sharded")
    (root / "adapter").mkdir()
    plain = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "v_proj"], "bias": "none"}
    more = {"rank_pattern": {"v_proj": 2}, "use_rslora": True, "layers_to_transform": None, "modules_to_save": None}
    (root / "adapter" / "adapter_config.json").write_text(json.dumps({**plain, **more}))
    pairs = {}
    for layer in range(2):
        for module, width in (("q_proj", 16), ("v_proj", 8)):
            name = f"base_model.model.model.layers.{layer}.self_attn.{module}"
            pairs |= {f"{name}.lora_A.weight": torch.ones(2, 16), f"{name}.lora_B.weight": torch.ones(width, 2)}
    save_file(pairs, root / "adapter" / "adapter_model.safetensors")


def save_tokenizer(folder: Path) -> None:
    """A tokenizer of 256 byte tokens, with a chat template."""
    alphabet = {char: index for index, char in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    rust = RustTokenizer(models.BPE(vocab=alphabet, merges=[]))
    rust.pre_tokenizer, rust.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=rust, clean_up_tokenization_spaces=False)
    fast.chat_template = TEMPLATE
    fast.save_pretrained(folder)


def linked(source: Path, folder: Path, name: str) -> Path:
    """A model folder whose files are links into the source, as in the hub's cache, and one file to damage."""
    for path in source.iterdir():
        if path.name != name:
            (folder / path.name).symlink_to(path)
    shutil.copy(source / name, folder / name)
    return folder / name


def in_model(name: str, *, is_json: bool = True, family: str | None = None) -> Callable[[Random, Path, Path], None]:
    """A case with one damaged file in a model folder; ``family``: None for any."""

    def case(dice: Random, sources: Path, folder: Path) -> None:
        source = sources / (family or dice.choice(list(FAMILIES)))
        damage(dice, linked(source, folder, name), is_json=is_json)

    return case


# -- checkpoints ---------------------------------------------------------------------------------------------------


def checkpoint_case(dice: Random, sources: Path, folder: Path) -> None:
    """Three times in four the header is damaged as JSON, and the data keeps its place."""
    path = linked(sources / "llama", folder, "model.safetensors")
    if dice.random() < 0.25:
        damage(dice, path, is_json=False)
        return
    data = path.read_bytes()
    end = 8 + struct.unpack("<Q", data[:8])[0]
    damaged = dice.choice((damaged_json, lambda dice, _: damaged_bytes(dice, data[8:end])))
    header = damaged(dice, json.loads(data[8:end])) if dice.random() < 0.8 else shuffled(dice, json.loads(data[8:end]))
    length = len(header) if dice.random() < 0.9 else dice.choice((0, 1, len(header) - 1, 1 << 40, (1 << 64) - 1))
    path.write_bytes(struct.pack("<Q", length) + header + data[end : dice.choice((None, None, None, -1, -100))])


def shuffled(dice: Random, header: dict[str, Any]) -> bytes:
    """A header that most readers take: other metadata, another order, spaces; sometimes a name or a type is another."""
    names = dice.sample(list(header), len(header))
    other = {name: header[name] for name in names} | {"__metadata__": dice.choice(({}, {"a": "b"}, {"a": 1}, None, []))}
    if dice.random() < 0.5:
        other[dice.choice(("x", "\x1b[2J", "__metadata__"))] = other.pop(dice.choice(names))
    return json.dumps(other, indent=dice.choice((None, 1, 40))).encode() + b" " * dice.randrange(9)


def read_checkpoint(folder: Path) -> None:
    """The safetensors library reads the same tensors, of the same bytes."""
    checkpoint = Checkpoint.open(folder)
    for file in checkpoint.files:
        with as_own_reader(lambda file=file: safe_open(file, framework="pt"), "safetensors") as theirs:
            own = {name: ref for name, ref in checkpoint.tensors.items() if ref.file == file}
            expect(sorted(own), sorted(theirs.keys()), "names")
            for name, ref in own.items():
                tensor = as_own_reader(lambda name=name, theirs=theirs: theirs.get_tensor(name), "safetensors")
                expect((ref.dtype, ref.shape), (tensor.dtype, tuple(tensor.shape)), name)
                with open(file, "rb") as stream:
                    stream.seek(ref.offset)
                    found = stream.read(ref.nbytes)
                raw = tensor.contiguous().flatten().view(torch.uint8) if tensor.numel() else torch.empty(0)
                expect(found, raw.numpy().tobytes(), name)
    read_model(folder)


def index_case(dice: Random, sources: Path, folder: Path) -> None:
    """An index of shards; its names may lead out of the folder."""
    damage(dice, linked(sources / "sharded", folder, "model.safetensors.index.json"))
    if dice.random() < 0.3:
        shutil.copy(sources / "llama" / "model.safetensors", folder / "x")


def read_index(folder: Path) -> None:
    """Every shard is a name in the folder, and the map's tensors are there."""
    checkpoint = Checkpoint.open(folder)
    for file in checkpoint.files:
        expect(os.path.dirname(file), str(folder), "the shard's folder")
    index = folder / "model.safetensors.index.json"
    if not (folder / "model.safetensors").exists():
        expect(set(json.loads(index.read_bytes())["weight_map"]) - set(checkpoint.tensors), set(), "missing")
    read_model(folder)


def read_model(folder: Path) -> None:
    """An accepted folder opens as a model; whatever it refuses, it refuses in words."""
    model = Model(folder)
    expect(model.num_layers, model.config.get_text_config().num_hidden_layers, "layers")


def adapter_case(dice: Random, sources: Path, folder: Path) -> None:
    """An adapter beside its base: its configuration or its tensors are damaged."""
    (folder / "base").symlink_to(sources / "llama")
    (folder / "adapter").mkdir()
    names = ("adapter_config.json", "adapter_config.json", "adapter_model.safetensors")
    path = linked(sources / "adapter", folder / "adapter", dice.choice(names))
    damage(dice, path, is_json=path.suffix == ".json")


def read_adapter(folder: Path) -> None:
    """An accepted adapter changes the tensors of its base, whose parts can still be planned."""
    adapted, base = Model(folder / "base", adapter=folder / "adapter"), Model(folder / "base")
    expect([part.layer for part in adapted.parts(1 << 20)], [part.layer for part in base.parts(1 << 20)], "parts")


def read_plan(folder: Path) -> None:
    """An accepted configuration can be planned, and transformers reads the same one."""
    models = read_models(resolve(EngineOptions(target=folder, device_memory=1 << 28)))
    request = request_for(models)
    make_plan(models.footprint(request), request)
    theirs = as_own_reader(lambda: transformers.AutoConfig.from_pretrained(folder), "transformers")
    expect(models.target.vocab_size, theirs.get_text_config().vocab_size, "vocab_size")


def read_engine(folder: Path) -> None:
    """An accepted configuration gives the greedy tokens of transformers."""
    prompt = [5, 6, 7, 8]
    text = aspec.generate([prompt], target=folder, max_new_tokens=3, ignore_eos=True, device_memory=1 << 28, threads=1)
    load = transformers.AutoModelForCausalLM.from_pretrained
    theirs = as_own_reader(lambda: load(folder, attn_implementation="eager").eval(), "transformers")
    scores = as_own_reader(lambda: greedy(theirs, prompt, 3), "transformers")
    for token, logits in zip(text[0].token_ids, scores, strict=True):
        margin = float(logits.max() - logits[token])
        expect(margin < 1e-3 and margin == margin, True, f"token {token} by {margin}")
        if margin:
            return  # a near tie: the texts part here


def greedy(model: Any, prompt: list[int], count: int) -> list[torch.Tensor]:
    """The logits of greedy decoding."""
    ids, scores = torch.tensor([prompt]), []
    with torch.inference_mode():
        for _ in range(count):
            scores.append(model(input_ids=ids).logits[0, -1].float())
            ids = torch.cat([ids, scores[-1].argmax().view(1, 1)], 1)
    return scores


# -- tokenizers ----------------------------------------------------------------------------------------------------


def read_tokenizer(folder: Path) -> None:
    """The same ids and texts as transformers' own tokenizer."""
    tokenizer = Tokenizer.load(folder)
    theirs = as_own_reader(lambda: transformers.AutoTokenizer.from_pretrained(folder), "transformers")
    for text in TEXTS:
        ids = tokenizer.encode(text)
        expect(ids, as_own_reader(lambda text=text: theirs.encode(text), "transformers"), text)
        tokenizer.decode(ids)
        for token in ids[:4]:
            tokenizer.kind(token)


def read_template(folder: Path) -> None:
    """The conversation as transformers lays it out, in one of the forms that a content may have."""
    tokenizer = Tokenizer.load(folder)
    tokens = tokenizer.encode_chat(MESSAGES, limit=TimeLimit(TEMPLATE_S))
    theirs = as_own_reader(lambda: transformers.AutoTokenizer.from_pretrained(folder), "transformers")
    texts = []
    for parts in product((False, True), repeat=len(MESSAGES)):
        formed = [in_parts(message) if own else message for own, message in zip(parts, MESSAGES, strict=True)]
        with suppress(Exception):  # a template may take one form only
            texts.append(theirs.apply_chat_template(formed, add_generation_prompt=True, tokenize=False))
    expect(tokens in [theirs.encode(text, add_special_tokens=False) for text in texts], True, f"one of {texts}")


def in_parts(message: dict[str, str]) -> dict[str, Any]:
    """A message whose content is a list of parts."""
    return {**message, "content": [{"type": "text", "text": message["content"]}]}


def read_generation(folder: Path) -> None:
    """Generation defaults become sampling parameters, or are refused."""
    sampling_params(generation_defaults(folder), {})

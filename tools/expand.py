"""Grow a small trained Llama checkpoint into a larger shape that computes the same function.

    python tools/expand.py aspec/demo/target /tmp/target-2gb --size 2GB
    python tools/expand.py aspec/demo/target /tmp/mixtral-2gb --size 2GB --experts 8
    python tools/expand.py aspec/demo/target /tmp/experts-2gb --size 2GB --experts 64 --top-k 4 --routing zipf:1.0

Gigabytes of real bytes, with the small model's text and hence its draft's real acceptance. How each dimension grows:

hidden        Integer factor: whole replicas of the residual stream. What writes to it is repeated, what reads it is
              split over the replicas; the mean square that RMSNorm sees stays, so the norm scale is exactly 1.
heads         Every new query head copies an old one of the group that its kv head copies; o_proj is split.
head size     Integer factor k: old rotary frequency i is new frequency i * k, the frequencies between carry nothing,
              and q_proj grows by sqrt(k) because attention divides by the square root of the head size.
intermediate  Every new unit copies an old one; down_proj is split.
layers        A source layer becomes an attention-only and an MLP-only layer while there is room; further layers are
              copies that write nothing.
experts       Each is the grown MLP with a shuffle of its own, so any mixture whose weights sum to 1 is that MLP. The
              routers send tokens by `--routing` (routers.py). The checkpoint is a Mixtral's, in its published names.

Splits are powers of two that sum to 1. So, with a head size factor of 1, 4 or 16, bf16 weights stay exact and logits
differ from the source's only by the order of summation. Channels, heads and units are shuffled: real weights lie in
every part of every tensor. Weights that ought to be zero get `--noise` times the source tensor's spread.
The file holds shapes, tensors, files, entry, in this order, axes.py what one dimension does; no model code.
"""

import argparse
import hashlib
import json
import math
import re
import shutil
import struct
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from tools.axes import Axis, all_dims, copies, grow_heads, identity, nothing, rotary_dims, value_dims
from tools.routers import Routers, expert_shares, residual_writers

DTYPES = {"bf16": (torch.bfloat16, "BF16", "bfloat16"), "fp32": (torch.float32, "F32", "float32")}
UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
COPIED_FILES = ("generation_config.json", "special_tokens_map.json", "tokenizer*", "chat_template*")
UNSUPPORTED = ("tie_word_embeddings", "attention_bias", "mlp_bias")
CONFIG_KEYS = {"hidden": "hidden_size", "intermediate": "intermediate_size", "layers": "num_hidden_layers"}
CONFIG_KEYS |= {"heads": "num_attention_heads", "kv_heads": "num_key_value_heads", "head_dim": "head_dim"}
BLOCK_ELEMENTS = 2**24  # weights that are built and written at a time
HIDDEN_PER_LAYER = 96  # usual width / depth: Llama-2-7B 4096 / 32 = 128, TinyLlama 2048 / 22 = 93
HIDDEN_PER_SPARSE_LAYER = 40  # Qwen3-30B-A3B 2048 / 48 = 43; one tensor holds half of all experts: many thin layers
HIDDEN_FACTORS = sorted([2**i for i in range(8)] + [3 * 2**i for i in range(6)])
INTERMEDIATE_STEP = 64  # keeps GEMM shapes even
SPARSE_STEP = 16  # the same for experts, of which a layer has several; grouped products take no odd widths
FREE = 0.5  # spread of weights whose value cannot matter, relative to the source tensor's
SPARSE_CONFIG = {"architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "sliding_window": None}
SPARSE_CONFIG |= {"router_jitter_noise": 0.0}
LLAMA_ONLY = ("attention_bias", "mlp_bias", "pretraining_tp")


@dataclass(frozen=True)
class Shape:
    """The sizes of a checkpoint; field names are the command line's."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    experts: int = 0  # of a layer, `intermediate` is of each; 0: the MLP is dense
    top_k: int = 0  # experts of a token

    @classmethod
    def of_config(cls, config: dict[str, Any]) -> "Shape":
        """Read the sizes from a `config.json`."""
        head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
        sizes = {name: config[key] for name, key in CONFIG_KEYS.items() if name != "head_dim"}
        sizes |= {"head_dim": head_dim, "vocab": config["vocab_size"]}
        sizes |= {"experts": config.get("num_local_experts", 0), "top_k": config.get("num_experts_per_tok", 0)}
        return cls(**sizes)

    def num_params(self) -> int:
        """Weights of the whole checkpoint, embedding and head untied."""
        attention = 2 * (self.heads + self.kv_heads) * self.head_dim
        layers = self.layers * (attention + 3 * self.intermediate * max(1, self.experts) + self.experts + 2)
        return self.hidden * (2 * self.vocab + layers + 1)


def choose_shape(source: Shape, num_params: int) -> Shape:
    """The expansion of `source` nearest the usual width per depth at `num_params` weights; ValueError if none is."""
    step, usual = (SPARSE_STEP, HIDDEN_PER_SPARSE_LAYER) if source.experts else (INTERMEDIATE_STEP, HIDDEN_PER_LAYER)
    candidates = []
    for factor in HIDDEN_FACTORS:
        wide = _widen(source, factor)
        outside = replace(wide, layers=0).num_params()
        layers = round((num_params - outside) * wide.layers / (wide.num_params() - outside))
        if layers >= source.layers:
            candidates.append(replace(wide, layers=layers))
    if not candidates:
        raise ValueError(f"{num_params} weights are too few: the smallest expansion has {source.num_params()}")
    best = min(candidates, key=lambda shape: abs(math.log(shape.hidden / shape.layers / usual)))
    units_of_a_step = best.layers * max(1, best.experts) * step
    missing = round((num_params - best.num_params()) / (3 * best.hidden * units_of_a_step))
    return replace(best, intermediate=max(source.intermediate, best.intermediate + missing * step))


def _widen(source: Shape, factor: int) -> Shape:
    """`source` with its widths times `factor`, and heads of up to 128 dimensions.

    The experts that one token uses have as many units together as a dense MLP.
    """
    head_dim = source.head_dim * (4 if factor >= 4 and source.head_dim <= 32 else 1)
    heads = factor * source.heads * source.head_dim // head_dim
    kv_heads = source.kv_heads * (2 if factor >= 16 else 1)
    intermediate = source.intermediate * factor
    if source.experts:
        intermediate = max(source.intermediate, intermediate // source.top_k)
        intermediate += -intermediate % SPARSE_STEP
    wide = replace(source, hidden=source.hidden * factor, intermediate=intermediate)
    return replace(wide, heads=heads, kv_heads=kv_heads, head_dim=head_dim)


def check_shape(source: Shape, target: Shape) -> None:
    """Raise ValueError unless `source` can be expanded into `target`."""
    for name, old in asdict(source).items():
        new = getattr(target, name)
        if new < old:
            raise ValueError(f"{name} must not shrink: the source has {old}, asked for {new}")
        if name in ("hidden", "kv_heads", "head_dim") and new % old:
            raise ValueError(f"{name} must be a multiple of the source's {old}, asked for {new}")
    if target.experts and not 0 < target.top_k <= target.experts:
        raise ValueError(f"experts must be 0 or at least the {target.top_k} of a token, asked for {target.experts}")
    if target.experts and target.intermediate % SPARSE_STEP:
        raise ValueError(f"experts need an intermediate of whole {SPARSE_STEP}s, asked for {target.intermediate}")
    if target.heads % target.kv_heads:
        raise ValueError(f"heads must be a multiple of kv_heads {target.kv_heads}, asked for {target.heads}")


@dataclass(frozen=True)
class TreeLevel:
    """A new tensor: the rows and columns of tensor `source` along two axes; a norm is one row."""

    name: str
    source: str
    rows: Axis
    columns: Axis
    fill: float  # spread of the weights without a source, relative to the spread of `source`
    made: torch.Tensor | None = None  # in place of tensor `source`

    def shape(self) -> list[int]:
        """The tensor's shape in the file."""
        shape = [len(self.rows.index), len(self.columns.index)]
        return shape[1:] if self.source.endswith("norm.weight") else shape

    def blocks(self, old: torch.Tensor, generator: torch.Generator) -> Iterator[torch.Tensor]:
        """The tensor in blocks of whole rows, in the dtype of `old`, the source."""
        old = old.reshape(-1, old.shape[-1])
        spread = float(old.float().std()) * self.fill
        step = max(1, BLOCK_ELEMENTS // len(self.columns.index))
        for start in range(0, len(self.rows.index), step):
            rows = slice(start, start + step)
            block = old[self.rows.index[rows].clamp(min=0)][:, self.columns.index.clamp(min=0)]
            block *= self.rows.scale[rows, None].to(old.dtype)
            block *= self.columns.scale.to(old.dtype)
            empty = (self.rows.index[rows, None] < 0) | (self.columns.index < 0)
            if empty.any():
                noise = torch.randn(block.shape, generator=generator).mul_(spread) + 0.0  # no negative zeros
                block = torch.where(empty, noise.to(old.dtype), block)
            yield block


@dataclass(frozen=True)
class LayerPlan:
    """One new layer: the source layer it copies, and which of its halves write to the residual stream."""

    source: int
    attention: bool
    mlp: bool


def plan_layers(old: int, new: int) -> list[LayerPlan]:
    """Split as many source layers in two as fit, then spread layers that write nothing evenly."""
    num_split = min(old, new - old)
    halves = ((True, False), (False, True))
    plan = [LayerPlan(layer, *half) for layer in range(num_split) for half in halves]
    plan += [LayerPlan(layer, True, True) for layer in range(num_split, old)]
    num_working, num_idle = len(plan), new - len(plan)
    for idle in range(num_idle):
        place = round((idle + 0.5) * num_working / num_idle) + idle
        plan.insert(place, LayerPlan(plan[max(0, place - 1)].source, False, False))
    return plan


class Expansion:
    """All tensors of one expansion, in file order; random choices depend on the seed and a tensor's name only."""

    def __init__(self, folder: Path, source: Shape, target: Shape, options: argparse.Namespace) -> None:
        check_shape(source, target)
        self.source, self.target, self.seed, self.noise = source, target, options.seed, options.noise
        self.layers = plan_layers(source.layers, target.layers)
        self.routers = None
        if target.experts:
            shares = expert_shares(options.routing, target.experts, target.top_k)
            self.routers = Routers(folder, shares, target.top_k, self.generator("text"))
        self.reads = copies(source.hidden, target.hidden, self.generator("hidden"))
        self.writes = self.reads.unscaled()

    def generator(self, name: str) -> torch.Generator:
        """A generator of its own for `name`."""
        digest = hashlib.sha256(f"{self.seed}/{name}".encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:4], "little"))

    def tensors(self) -> Iterator[TreeLevel]:
        """Every tensor of the new checkpoint."""
        words = identity(self.source.vocab)
        yield TreeLevel("model.embed_tokens.weight", "model.embed_tokens.weight", words, self.writes, self.noise)
        writers = residual_writers([(plan.source, plan.attention, plan.mlp) for plan in self.layers])
        for number, plan in enumerate(self.layers):
            new, old = f"model.layers.{number}.", f"model.layers.{plan.source}."
            for part in [*self._attention(new, plan), *self._mlp(new, plan, writers[number])]:
                yield replace(part, name=f"{new}{part.name}.weight", source=f"{old}{part.source}.weight")
        yield TreeLevel("model.norm.weight", "model.norm.weight", identity(1), self.writes, self.noise)
        yield TreeLevel("lm_head.weight", "lm_head.weight", words, self.reads, self.noise)

    def _attention(self, layer: str, plan: LayerPlan) -> Iterator[TreeLevel]:
        """The attention half's tensors, with names as within a layer."""
        old, new = self.source.head_dim, self.target.head_dim
        queries, kv = grow_heads(self.source, self.target, self.generator(f"{layer}heads"))
        values = value_dims(old, new)
        query_rows = all_dims(queries.unscaled(), rotary_dims(old, new, math.sqrt(new / old)), old)
        key_rows = all_dims(kv, rotary_dims(old, new, 1.0), old)
        output = all_dims(queries, values, old) if plan.attention else nothing(self.target.heads * new)
        yield TreeLevel("input_layernorm", "input_layernorm", identity(1), self.writes, FREE)
        yield TreeLevel("self_attn.q_proj", "self_attn.q_proj", query_rows, self.reads, self.noise)
        yield TreeLevel("self_attn.k_proj", "self_attn.k_proj", key_rows, self.reads, FREE)
        yield TreeLevel("self_attn.v_proj", "self_attn.v_proj", all_dims(kv, values.unscaled(), old), self.reads, FREE)
        yield TreeLevel("self_attn.o_proj", "self_attn.o_proj", self.writes, output, self.noise)

    def _mlp(self, layer: str, plan: LayerPlan, writer: tuple[int, str]) -> Iterator[TreeLevel]:
        """The MLP half's tensors, with names as within a layer."""
        yield TreeLevel("post_attention_layernorm", "post_attention_layernorm", identity(1), self.writes, FREE)
        if self.routers is None:
            yield from self._units(layer, plan, "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
            return
        router = self.routers.make(writer, plan.source, self.generator(f"{layer}router"))
        yield TreeLevel("block_sparse_moe.gate", "made", identity(self.target.experts), self.reads, FREE, router)
        for number in range(self.target.experts):
            expert = f"block_sparse_moe.experts.{number}."
            yield from self._units(f"{layer}{expert}", plan, f"{expert}w1", f"{expert}w3", f"{expert}w2")

    def _units(self, place: str, plan: LayerPlan, gate: str, up: str, down: str) -> Iterator[TreeLevel]:
        """An MLP's three tensors, whose names are given; `place` seeds the shuffle of its units."""
        size = self.target.intermediate
        units = copies(self.source.intermediate, size, self.generator(f"{place}units"))
        yield TreeLevel(gate, "mlp.gate_proj", units.unscaled(), self.reads, FREE)
        yield TreeLevel(up, "mlp.up_proj", units.unscaled(), self.reads, FREE)
        yield TreeLevel(down, "mlp.down_proj", self.writes, units if plan.mlp else nothing(size), self.noise)


def read_config(folder: Path) -> dict[str, Any]:
    """The source's `config.json`; ValueError if it asks for what this tool cannot expand."""
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    rope = config.get("rope_scaling") or config.get("rope_parameters") or {}
    kinds = (config["model_type"], rope.get("rope_type", "default"))
    if kinds != ("llama", "default") or any(config.get(key) for key in UNSUPPORTED):
        raise ValueError(f"{folder}: needs a llama with default rope and without {UNSUPPORTED}, found {config}")
    return config


def read_tensor(folder: Path, name: str, dtype: torch.dtype) -> torch.Tensor:
    """One source tensor in `dtype`."""
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            if name in file.keys():  # noqa: SIM118 (a safe_open is no mapping)
                return file.get_tensor(name).to(dtype)
    raise ValueError(f"{folder} has no tensor {name}")


def pack_shards(sizes: dict[str, int], shard_nbytes: int) -> list[list[str]]:
    """Tensor names by shard, in order; a shard exceeds `shard_nbytes` only if its one tensor does."""
    shards: list[list[str]] = [[]]
    for name in sizes:
        if shards[-1] and sum(sizes[other] for other in [*shards[-1], name]) > shard_nbytes:
            shards.append([])
        shards[-1].append(name)
    return shards


def header_bytes(growths: list[TreeLevel], sizes: dict[str, int], dtype: str) -> bytes:
    """The head of a safetensors file: length, then JSON padded to 8 bytes."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for growth in growths:
        end = offset + sizes[growth.name]
        header[growth.name] = {"dtype": dtype, "shape": growth.shape(), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def write_weights(source: Path, target: Path, expansion: Expansion, dtype: str, shard_nbytes: int) -> None:
    """Write all shards and, if there are several, their index."""
    torch_dtype, file_dtype, _ = DTYPES[dtype]
    growths = {growth.name: growth for growth in expansion.tensors()}
    sizes = {name: math.prod(growth.shape()) * torch_dtype.itemsize for name, growth in growths.items()}
    shards = pack_shards(sizes, shard_nbytes)
    where: dict[str, str] = {}
    for number, names in enumerate(shards, 1):
        part = f"-{number:05d}-of-{len(shards):05d}" if len(shards) > 1 else ""
        where |= dict.fromkeys(names, f"model{part}.safetensors")
        with (target / f"model{part}.safetensors").open("wb") as file:
            file.write(header_bytes([growths[name] for name in names], sizes, file_dtype))
            for name in names:
                made = growths[name].made
                old = read_tensor(source, growths[name].source, torch_dtype) if made is None else made.to(torch_dtype)
                for block in growths[name].blocks(old, expansion.generator(name)):
                    file.write(block.contiguous().view(torch.uint8).numpy())
    if len(shards) > 1:
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": where}
        (target / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))


def grown_config(config: dict[str, Any], shape: Shape) -> dict[str, Any]:
    """The source's `config.json` with the sizes of `shape`, a Mixtral's where that has experts."""
    config = config | {key: getattr(shape, name) for name, key in CONFIG_KEYS.items()}
    if not shape.experts:
        return config
    kept = {key: value for key, value in config.items() if key not in LLAMA_ONLY}
    return kept | SPARSE_CONFIG | {"num_local_experts": shape.experts, "num_experts_per_tok": shape.top_k}


def expand(source: Path, target: Path, shape: Shape, options: argparse.Namespace) -> None:
    """Write the expansion of the checkpoint in `source` to the folder `target`; ValueError if it holds anything."""
    if target.exists() and any(target.iterdir()):
        raise ValueError(f"{target} is not empty: remove it or name another folder")
    config = read_config(source)
    expansion = Expansion(source, Shape.of_config(config), shape, options)
    target.mkdir(parents=True, exist_ok=True)
    write_weights(source, target, expansion, options.dtype, options.shard_size)
    config = grown_config(config, shape) | {"dtype": DTYPES[options.dtype][2]}
    (target / "config.json").write_text(json.dumps(config, indent=2))
    for path in (path for pattern in COPIED_FILES for path in source.glob(pattern)):
        shutil.copyfile(path, target / path.name)


def parse_size(text: str) -> int:
    """Bytes of "2GB", "500 MiB" or "1000"."""
    match = re.fullmatch(r"(\d+\.?\d*) ?([A-Z]*)", text.strip().upper())
    if not match or match[2] not in UNITS:
        raise argparse.ArgumentTypeError(f"{text!r} is no size; expected a number and a unit of {list(UNITS)}")
    return int(float(match[1]) * UNITS[match[2]])


def parse_options(arguments: list[str] | None) -> argparse.Namespace:
    """The command line; a size that was not given is None."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("source", type=Path, help="folder of a trained Llama checkpoint, embeddings untied")
    add("target", type=Path, help="folder to write; new or empty")
    add("--size", type=parse_size, help="bytes of weights, such as 2GB: picks a shape")
    for name in CONFIG_KEYS:
        add("--" + name.replace("_", "-"), type=int, help="overrides --size's shape, or the source's")
    add("--experts", type=int, default=0, help="experts per layer (default: none)")
    add("--top-k", type=int, default=2, help="experts of a token (default: %(default)s)")
    add("--routing", default="zipf:1.0", help="how often experts are chosen: uniform or zipf:S (default: %(default)s)")
    add("--dtype", choices=DTYPES, default="bf16", help="dtype of the weights (default: %(default)s)")
    add("--shard-size", type=parse_size, default=500 * 10**6, help="largest file (default: 500MB)")
    add("--seed", type=int, default=0, help="of shuffles and noise (default: %(default)s)")
    add("--noise", type=float, default=1e-4, help="relative spread of zeros (default: %(default)s)")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    """Pick the shape, write the checkpoint, say what was written."""
    options = parse_options(arguments)
    itemsize = DTYPES[options.dtype][0].itemsize
    top_k = options.top_k if options.experts else 0
    shape = replace(Shape.of_config(read_config(options.source)), experts=options.experts, top_k=top_k)
    if options.size is not None:
        shape = choose_shape(shape, options.size // itemsize)
    shape = replace(shape, **{name: size for name in CONFIG_KEYS if (size := getattr(options, name)) is not None})
    expand(options.source, options.target, shape, options)
    print(f"{options.target}: {shape}, {shape.num_params() * itemsize / 1e9:.3f} GB")


if __name__ == "__main__":
    main()

"""The settings of compressed-tensors: which scheme quantises a module, by the library's own rules of matching.

A target, or an entry of ``ignore``, is a module's name, a pattern of names after "re:", or the name of a class of
modules. Among the targets that match a module, names and patterns come before classes, and the first in alphabetical
order wins, as in the library: https://github.com/vllm-project/compressed-tensors (``match_targets``, ``QuantizationArgs``).
No torch here: of a module only the name is known, which tells an embedding from a linear layer.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from aspec.errors import UnsupportedModelError
from aspec.models.formats.fields import CONFIG, Fields, compiled, is_empty

PATTERN = "re:"
STRATEGIES = ("tensor", "channel", "group", "block", "tensor_group")
TYPES = ("int", "float")
ORDERS = {"group": True, "dynamic": True, "weight": False, "static": False, "": False}
"""``actorder`` -> whether each column has a group of its own choice, as ``weight_g_idx`` tells."""

KNOWN = frozenset(
    {
        "config_groups",
        "dequantize",
        "format",
        "global_compression_ratio",
        "ignore",
        "kv_cache_scheme",
        "quant_method",
        "quantization_status",  # what is stored tells: old files say "frozen" of compressed weights
        "run_compressed",
        "sparsity_config",
        "use_optimized_inference",
        "version",
    }
)
GROUP = frozenset({"format", "input_activations", "output_activations", "targets", "weights"})
ARGUMENTS = frozenset(
    {
        "actorder",
        "block_structure",
        "dynamic",
        "group_size",
        "num_bits",
        "observer",
        "observer_kwargs",
        "scale_dtype",  # as stored
        "strategy",
        "symmetric",
        "type",
        "zp_dtype",
    }
)


@dataclass(frozen=True, slots=True)
class Scheme:
    """How the weights of some modules are quantised."""

    format: str  # of the group, or else of the model
    type: str
    bits: int
    symmetric: bool
    strategy: str
    group_size: int  # columns; 0 without groups
    block: tuple[int, int]  # rows, columns; (0, 0) without blocks
    reordered: bool  # weight_g_idx tells the group of a column

    @property
    def text(self) -> str:
        """For people: "pack-quantized int4, groups of 128"."""
        parts = {"group": f"groups of {self.group_size}", "tensor_group": f"groups of {self.group_size}"}
        parts |= {"channel": "by channel", "tensor": "by tensor", "block": f"blocks of {self.block[0]}x{self.block[1]}"}
        return f"{self.format} {self.type}{self.bits}, {parts[self.strategy]}"


@dataclass(frozen=True, slots=True)
class Target:
    """A name, a pattern of names, or the name of a class of modules."""

    text: str
    pattern: re.Pattern[str] | None

    @classmethod
    def of(cls, text: str, where: str) -> Self:
        """A target as it stands in the settings."""
        return cls(text, compiled(text.removeprefix(PATTERN), where) if text.startswith(PATTERN) else None)

    def is_name_of(self, module: str) -> bool:
        """Whether the module's name matches."""
        return self.text == module if self.pattern is None else self.pattern.match(module) is not None

    def is_class_of(self, module: str) -> bool:
        """Whether the module's class has this name."""
        return self.text in _classes(module)


@dataclass(frozen=True, slots=True)
class Settings:
    """The settings of one checkpoint."""

    targets: tuple[tuple[Target, Scheme | None], ...]  # None: weights that are not quantised
    ignore: tuple[Target, ...]
    remarks: tuple[str, ...]  # texts for the user

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Self:
        """From a ``quantization_config``. Raises UnsupportedModelError, by name, for what is not supported."""
        fields = Fields.of(config, CONFIG)
        fields.check_known(KNOWN)
        sparsity = Fields.of(fields.raw.get("sparsity_config") or {}, f"{CONFIG}.sparsity_config")
        if sparsity.text("format", "dense") != "dense":
            raise sparsity.unsupported("format", "dense")
        groups = Fields.of(fields.raw.get("config_groups") or {}, f"{CONFIG}.config_groups")
        schemes: dict[str, Scheme | None] = {}
        activations = []
        for name, value in groups.raw.items():
            group = Fields.of(value, f"{groups.where}.{name}")
            group.check_known(GROUP)
            scheme = _scheme(group, fields.text("format"))
            schemes |= dict.fromkeys(group.texts("targets"), scheme)  # of equal targets the last one counts
            activations += [key for key in ("input_activations", "output_activations") if not is_empty(value.get(key))]
        if not is_empty(fields.raw.get("kv_cache_scheme")):
            activations.append("kv_cache_scheme")
        order = sorted(schemes, key=lambda text: (PATTERN in text, text))
        return cls(
            tuple((Target.of(text, groups.where), schemes[text]) for text in order),
            tuple(Target.of(text, f"{CONFIG}.ignore") for text in fields.texts("ignore")),
            (_remark(activations),) if activations else (),
        )

    def scheme_of(self, module: str) -> Scheme | None:
        """The scheme of a module's weight; None if it is not quantised."""
        if any(target.is_name_of(module) or target.is_class_of(module) for target in self.ignore):
            return None
        by_name = (scheme for target, scheme in self.targets if target.is_name_of(module))
        by_class = (scheme for target, scheme in self.targets if target.is_class_of(module))
        return next(by_name, next(by_class, None))


def _classes(module: str) -> tuple[str, ...]:
    """The names of a module's classes, by its name."""
    last = module.rpartition(".")[2]
    kind = "Embedding" if "embed" in last or last in ("wte", "wpe") else "Linear"
    return kind, "Module"


def _remark(keys: list[str]) -> str:
    names = " and ".join(dict.fromkeys(keys))
    return (
        f"{CONFIG} asks for {names}: only the weights are decoded, and activations keep their precision, as in "
        f"transformers with dequantize=True."
    )


def _scheme(group: Fields, default: str) -> Scheme | None:
    if is_empty(group.raw.get("weights")):
        return None
    weights = Fields.of(group.raw["weights"], f"{group.where}.weights")
    weights.check_known(ARGUMENTS)
    if not is_empty(weights.raw.get("dynamic")):
        raise weights.unsupported("dynamic", "false")
    kind = weights.text("type", "int")
    if kind not in TYPES:
        raise weights.unsupported("type", "int or float")
    size = weights.integer("group_size", 0, least=-1)
    block = weights.raw.get("block_structure")
    strategy = weights.text("strategy") or ("group" if size > 0 else "channel" if size == -1 else "tensor")
    if strategy not in STRATEGIES:
        raise weights.unsupported("strategy", " or ".join(STRATEGIES))
    if ("group" in strategy) != (size > 0):
        raise weights.refuse("group_size", f"{'positive' if 'group' in strategy else 'null'} with strategy {strategy}")
    return Scheme(
        format=group.text("format") or default,
        type=kind,
        bits=weights.integer("num_bits", 8),
        symmetric=weights.flag("symmetric", True),
        strategy=strategy,
        group_size=max(size, 0),
        block=_block(weights, block) if strategy == "block" else (0, 0),
        reordered=_reordered(weights),
    )


def _block(weights: Fields, value: object) -> tuple[int, int]:
    """The rows and columns of a block: a list of two, or a text such as "128x128"."""
    sizes = value.split("x") if isinstance(value, str) else value
    if isinstance(sizes, list) and len(sizes) == 2 and all(str(size).isdecimal() and int(size) > 0 for size in sizes):
        return int(sizes[0]), int(sizes[1])
    raise weights.refuse("block_structure", "two whole numbers from 1 on")


def _reordered(weights: Fields) -> bool:
    value = weights.raw.get("actorder")
    if isinstance(value, bool):
        return value
    found = ORDERS.get(weights.text("actorder"))
    if found is None:
        raise weights.unsupported("actorder", "group or weight")
    return found


def unsupported(module: str, scheme: Scheme, expected: str) -> UnsupportedModelError:
    """An error for weights that are quantised in a way that aspec does not decode."""
    return UnsupportedModelError(
        f"{module}: weights that are {scheme.text} are not supported: expected {expected}. Give a copy of the model "
        f"that is quantised in another way, or the original model."
    )

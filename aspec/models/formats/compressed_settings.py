"""The settings of compressed-tensors: which scheme quantises a module, by the library's own rules of matching.

A target, or an entry of ``ignore``, is a module's name, a pattern of names after "re:", or the name of a class of
modules. Among the targets that match a module, names and patterns come before classes, and the first in alphabetical
order wins, as in the library: https://github.com/vllm-project/compressed-tensors (``match_targets``). Of a module only
the name is known here, which tells an embedding from a linear layer.
"""

import re
from dataclasses import dataclass
from typing import Self

from aspec.models.formats.integers.fields import Fields

PATTERN = "re:"
MOST = 1 << 30  # rows or columns of a block
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
        """For people: "pack-quantized, int4, groups of 128"."""
        parts = {"group": f"groups of {self.group_size}", "tensor_group": f"groups of {self.group_size}"}
        parts |= {"channel": "by channel", "tensor": "by tensor", "block": f"blocks of {self.block[0]}x{self.block[1]}"}
        return f"{self.format or 'a layout without a name'}, {self.type}{self.bits}, {parts[self.strategy]}"


@dataclass(frozen=True, slots=True)
class Target:
    """A name, a pattern of names, or the name of a class of modules."""

    text: str
    pattern: re.Pattern[str] | None

    @classmethod
    def of(cls, text: str, fields: Fields) -> Self:
        """A target as it stands in the settings."""
        return cls(text, fields.pattern(text.removeprefix(PATTERN)) if text.startswith(PATTERN) else None)

    def is_name_of(self, module: str) -> bool:
        """Whether the module's name matches."""
        return self.text == module if self.pattern is None else self.pattern.match(module) is not None

    def is_class_of(self, module: str) -> bool:
        """Whether the module's class has this name."""
        return self.text in _classes(module)


class Schemes:
    """The schemes of one checkpoint, by module."""

    def __init__(self, fields: Fields) -> None:
        fields.check_known(KNOWN)
        fields.inner("sparsity_config").text("format", "dense", ("dense",))
        groups = fields.inner("config_groups")
        schemes: dict[str, Scheme | None] = {}
        unapplied = []
        for name in groups.values:
            group = groups.inner(name)
            group.check_known(GROUP)
            scheme = _scheme(group, fields.text("format", ""))
            schemes |= dict.fromkeys(group.names("targets"), scheme)  # of equal targets the last one counts
            unapplied += [key for key in ("input_activations", "output_activations") if group.inner(key).values]
        unapplied += ["kv_cache_scheme"] * bool(fields.inner("kv_cache_scheme").values)
        order = sorted(schemes, key=lambda text: (PATTERN in text, text))
        self._targets = [(Target.of(text, groups), schemes[text]) for text in order]
        self.named = [text for text in order if not text.startswith(PATTERN)]  # modules, and classes of modules
        self._ignored = [Target.of(text, fields) for text in fields.names("ignore")]
        self.remarks = (_remark(fields.where, unapplied),) if unapplied else ()

        self._found: dict[str, Scheme | None] = {}  # by module that was asked for

    def of(self, module: str) -> Scheme | None:
        """The scheme of a module's weight; None if it is not quantised."""
        if module not in self._found:
            self._found[module] = self._find(module)
        return self._found[module]

    def _find(self, module: str) -> Scheme | None:
        if any(target.is_name_of(module) or target.is_class_of(module) for target in self._ignored):
            return None
        by_name = (scheme for target, scheme in self._targets if target.is_name_of(module))
        by_class = (scheme for target, scheme in self._targets if target.is_class_of(module))
        return next(by_name, next(by_class, None))


def _classes(module: str) -> tuple[str, ...]:
    """The names of a module's classes, by its name."""
    last = module.rpartition(".")[2]
    return "Embedding" if "embed" in last or last in ("wte", "wpe") else "Linear", "Module"


def _remark(where: str, keys: list[str]) -> str:
    names = " and ".join(dict.fromkeys(keys))
    return (
        f"{where} asks for {names}. Only weights are decoded: activations and the KV cache keep their precision, as in "
        f"transformers with dequantize=True."
    )


def _scheme(group: Fields, default: str) -> Scheme | None:
    weights = group.inner("weights")
    if not weights.values:
        return None
    weights.check_known(ARGUMENTS)
    weights.choice("dynamic", (False, None), False)
    size, block = weights.whole("group_size", 0, least=-1), weights.values.get("block_structure")
    strategy = weights.text("strategy", "group" if size > 0 else "tensor" if size == 0 else "channel", STRATEGIES)
    if ("group" in strategy) != (size > 0):
        weights.refuse("group_size", f"{'a size' if 'group' in strategy else 'null'} with strategy {strategy}")
    return Scheme(
        format=group.text("format", default),
        type=weights.text("type", "int", TYPES),
        bits=weights.whole("num_bits", 8),
        symmetric=weights.flag("symmetric", True),
        strategy=strategy,
        group_size=max(size, 0),
        block=_block(weights, block) if strategy == "block" else (0, 0),
        reordered=_reordered(weights),
    )


def _block(weights: Fields, value: object) -> tuple[int, int]:
    """The rows and columns of a block: a list of two, or a text such as "128x128"."""
    sizes = [str(size) for size in value] if isinstance(value, list) else str(value).split("x")
    if len(sizes) != 2 or not all(size.isdecimal() and 0 < int(size) <= MOST for size in sizes):
        weights.refuse("block_structure", "two whole numbers from 1 on")
    return int(sizes[0]), int(sizes[1])


def _reordered(weights: Fields) -> bool:
    value = weights.values.get("actorder")
    return value if isinstance(value, bool) else ORDERS[weights.text("actorder", "", ORDERS)]

"""What an ``adapter_config.json`` of peft says: which adapters are plain LoRA, and each module's rank and scale.

A key that is not listed here changes the maths in a way that aspec does not know, unless its value is empty: such an
adapter is refused by the name of the key. Format: https://github.com/huggingface/peft (LoraConfig). No torch here.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aspec.errors import CheckpointError, UnsupportedModelError
from aspec.io.json_file import read_json

CONFIG = "adapter_config.json"
MAX_RANK = 1 << 16

READ = frozenset(
    {
        "alpha_pattern",
        "base_model_name_or_path",
        "exclude_modules",
        "layers_pattern",
        "layers_to_transform",
        "lora_alpha",
        "modules_to_save",
        "peft_type",
        "r",
        "rank_pattern",
        "revision",
        "target_modules",
        "use_rslora",
    }
)
NEUTRAL = frozenset(
    {
        "auto_mapping",
        "eva_config",  # of the first values of training
        "fan_in_fan_out",  # follows from the module's class, as in peft
        "inference_mode",
        "lora_dropout",  # in training only
        "megatron_config",
        "megatron_core",
        "peft_version",
        "qalora_group_size",  # without use_qalora
        "task_type",
    }
)
"""Keys that do not change the text."""

REMEDY = "Merge the adapter with peft (merge_and_unload), and give the merged model as --target."
PLAIN_STARTS = (True, False, None, "gaussian", "eva", "orthogonal")  # others change the base's weights, too
_REPEATED_GROUP = re.compile(r"\)[*+{]")  # may take exponential time
_REPEAT = re.compile(r"(?<!\\)[*+{]")
MAX_REPEATS = 4  # in a pattern, which bounds its time


@dataclass(frozen=True, slots=True)
class AdapterConfig:
    """A plain LoRA adapter: W + scale * B @ A for the targeted modules."""

    path: Path
    base: str | None  # a folder or a hub id
    rank: int
    alpha: float
    rank_pattern: Mapping[str, float]  # a pattern of module names -> rank
    alpha_pattern: Mapping[str, float]
    rank_stabilised: bool
    target: tuple[str, ...] | str | None  # last parts of module names; a text is a pattern, which is not evaluated
    excluded: tuple[str, ...] | str
    layers: tuple[int, ...]  # empty: all
    layers_pattern: tuple[str, ...]
    saved: tuple[str, ...]  # modules that the adapter stores whole

    def rank_of(self, module: str) -> int:
        """The rank of a module's update."""
        return int(_first_match(self.rank_pattern, module, self.rank))

    def scale_of(self, module: str, rank: int) -> float:
        """The factor of B @ A for a module whose update has this rank."""
        alpha = _first_match(self.alpha_pattern, module, self.alpha)
        return alpha / math.sqrt(rank) if self.rank_stabilised else alpha / rank

    def targets(self, module: str) -> bool | None:
        """Whether the adapter changes a module; None where a pattern decides, which is not evaluated."""
        if isinstance(self.excluded, str) or not isinstance(self.target, tuple):
            return None
        if _ends_with(module, self.excluded) or any(is_within(module, name) for name in self.saved):
            return False
        if not _ends_with(module, self.target):
            return False
        return not self.layers or self._layer_of(module) in self.layers

    def _layer_of(self, module: str) -> int | None:
        names = "|".join(map(re.escape, self.layers_pattern)) or r"[^.]*"
        match = re.match(rf"(?:^|.*?\.)(?:{names})\.(\d+)\.", module)
        return int(match[1]) if match else None


def has_adapter(folder: Path) -> bool:
    """Whether a folder holds an adapter, with or without its base."""
    return (folder / CONFIG).is_file()


def read_adapter_config(folder: Path) -> AdapterConfig:
    """The configuration of a folder's adapter.

    Raises CheckpointError for a file that is no such configuration, and UnsupportedModelError, by name, for what is
    not plain LoRA.
    """
    path = folder / CONFIG
    raw = read_json(path, "the configuration of an adapter", error=CheckpointError, constants=True)
    if not isinstance(raw, dict):
        raise CheckpointError(f"{path}: expected a JSON object, found {type(raw).__name__}. Fetch the adapter again.")
    if reason := _refusal(raw):
        raise UnsupportedModelError(f"{path}: {reason}. Only plain LoRA can be merged while loading. {REMEDY}")
    fields = _Fields(path, raw)
    return AdapterConfig(
        path=path,
        base=fields.text("base_model_name_or_path"),
        rank=fields.rank(raw.get("r"), "r"),
        alpha=fields.number(raw.get("lora_alpha"), "lora_alpha"),
        rank_pattern={key: fields.rank(value, key) for key, value in fields.pattern("rank_pattern").items()},
        alpha_pattern={key: fields.number(value, key) for key, value in fields.pattern("alpha_pattern").items()},
        rank_stabilised=bool(raw.get("use_rslora")),
        target=fields.modules("target_modules") or None,
        excluded=fields.modules("exclude_modules"),
        layers=fields.layers(),
        layers_pattern=fields.names("layers_pattern"),
        saved=fields.names("modules_to_save"),
    )


def _refusal(raw: Mapping[str, Any]) -> str | None:
    """The reason why an adapter is not plain LoRA; None if it is."""
    kind = raw.get("peft_type")
    if kind != "LORA":
        return f"adapters of type {kind!r:.40} are not supported"
    if raw.get("bias", "none") != "none":
        return f"trained biases (bias {raw['bias']!r:.40}) are not supported"
    if raw.get("revision") not in (None, "main"):
        return f"a base of another revision ({raw['revision']!r:.60}) is not supported"
    if (start := raw.get("init_lora_weights")) not in PLAIN_STARTS:
        return f"init_lora_weights {start!r:.40} changes the base's own weights, which is not supported"
    known = READ | NEUTRAL | {"bias", "init_lora_weights"}
    unknown = sorted(key for key, value in raw.items() if key not in known and not _is_empty(value))
    if not unknown:
        return None
    names = ", ".join(f"{name!r:.40}" for name in unknown[:4])
    return f"its key{'s' * (len(unknown) > 1)} {names} {'are' if len(unknown) > 1 else 'is'} not supported"


def _is_empty(value: object) -> bool:
    """Whether a value switches nothing on: null, false, or a container of such values."""
    return not value or (isinstance(value, dict) and all(map(_is_empty, value.values())))


@dataclass(frozen=True, slots=True)
class _Fields:
    """Typed access to the fields of an adapter's configuration; each method raises CheckpointError."""

    path: Path
    raw: Mapping[str, Any]

    def refuse(self, key: str, expected: str, found: object) -> CheckpointError:
        return CheckpointError(
            f"{self.path}: expected {key:.60} to be {expected}, found {found!r:.80}. Correct the file."
        )

    def text(self, key: str) -> str | None:
        value = self.raw.get(key)
        if value is not None and not isinstance(value, str):
            raise self.refuse(key, "a text", value)
        return value

    def rank(self, value: object, key: str) -> int:
        if type(value) is not int or not 1 <= value <= MAX_RANK:
            raise self.refuse(key, f"a rank from 1 to {MAX_RANK}", value)
        return value

    def number(self, value: object, key: str) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise self.refuse(key, "a number", value)
        return float(value)

    def names(self, key: str) -> tuple[str, ...]:
        """A list of names; one name alone is a list of one."""
        value = self.raw.get(key)
        found = [] if value is None else [value] if isinstance(value, str) else value
        if not isinstance(found, list) or not all(isinstance(name, str) for name in found):
            raise self.refuse(key, "a list of names", value)
        return tuple(found)

    def modules(self, key: str) -> tuple[str, ...] | str:
        """A list of modules, or a pattern of their names."""
        value = self.raw.get(key)
        return value if isinstance(value, str) else self.names(key)

    def layers(self) -> tuple[int, ...]:
        value = self.raw.get("layers_to_transform")
        found = [] if value is None else value if isinstance(value, list) else [value]
        if not all(type(layer) is int for layer in found):
            raise self.refuse("layers_to_transform", "a layer's number or a list of them", value)
        return tuple(found)

    def pattern(self, key: str) -> Mapping[str, Any]:
        """Patterns of module names, each of which ends soon for every name."""
        value = self.raw.get(key) or {}
        if not isinstance(value, dict):
            raise self.refuse(key, "an object of patterns", value)
        for pattern in value:
            if _REPEATED_GROUP.search(pattern) or len(_REPEAT.findall(pattern)) > MAX_REPEATS:
                raise self.refuse(key, f"patterns with at most {MAX_REPEATS} repeats and no repeated group", pattern)
            try:
                re.compile(_whole(pattern))
            except (re.error, OverflowError, RecursionError) as error:
                raise self.refuse(key, f"regular expressions ({error})", pattern) from error
        return value


def is_within(name: str, module: str) -> bool:
    """Whether a name is that of a module or of something in it; ``module`` may be the end of the module's name."""
    return f".{module}." in f".{name}."


def _ends_with(module: str, names: tuple[str, ...]) -> bool:
    return any(module == name or module.endswith(f".{name}") for name in names)


def _first_match(patterns: Mapping[str, float], module: str, default: float) -> float:
    """The value of the first pattern that matches the end of a module's name, as in peft."""
    return next((value for pattern, value in patterns.items() if re.match(_whole(pattern), module)), default)


def _whole(pattern: str) -> str:
    return rf"(.*\.)?({pattern})$"

"""Checked access to the fields of a ``quantization_config`` and to the stored tensors of a quantised module."""

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import torch

from aspec.errors import CheckpointError, UnsupportedModelError, shown
from aspec.io.checkpoint import FETCH_AGAIN, TensorRef
from aspec.io.weight_format import REMEDY
from aspec.models.formats.settings import Settings

FLOATS = (torch.float16, torch.bfloat16, torch.float32)
"""Dtypes of scales."""

MISFIT = "config.json and the weights do not belong together: fetch both again."

_REPEATED_GROUP = re.compile(r"\)[*+{]")  # may take exponential time
_REPEAT = re.compile(r"(?<!\\)[*+{]")
MAX_REPEATS = 6  # in a pattern, which bounds its time


@dataclass(frozen=True, slots=True)
class Fields(Settings):
    """Settings with whole numbers, texts and settings inside."""

    def check_known(self, known: Collection[str]) -> None:
        """Raise UnsupportedModelError, by name, for fields that are not known and that switch something on."""
        other = sorted(key for key, value in self.values.items() if key not in known and not is_empty(value))
        if other:
            raise UnsupportedModelError(
                f"{self.where}: quantization_config of {self.method}: expected fields that aspec knows, found "
                f"{shown(other[0])} = {shown(self.values[other[0]])}, which may change the weights. {REMEDY}"
            )

    def whole(self, key: str, default: int, least: int = 1) -> int:
        """A whole number that is at least ``least``; null is ``default``."""
        value = self.values.get(key)
        if value is None:
            return default
        if type(value) is not int or value < least:
            self.refuse(key, f"a whole number from {least} on")
        return value

    def text(self, key: str, default: str, known: Collection[str] | None = None) -> str:
        """A text in lower case, out of ``known``; null is ``default``."""
        value = self.values.get(key)
        if value is None:
            return default
        if not isinstance(value, str) or (known is not None and value.lower() not in known):
            self.refuse(key, "a text" if known is None else f"one of {', '.join(known)}")
        return value.lower()

    def inner(self, key: str) -> "Fields":
        """Settings inside; null is none."""
        value = self.values.get(key)
        if value is None:
            value = {}
        if not isinstance(value, Mapping) or not all(isinstance(name, str) for name in value):
            self.refuse(key, "an object")
        return Fields(value, self.where, f"{self.method}, {key}")

    def pattern(self, text: str) -> re.Pattern[str]:
        """A pattern of modules' names that ends soon for every name."""
        expected = f"patterns with at most {MAX_REPEATS} repeats and no repeated group"
        if not _REPEATED_GROUP.search(text) and len(_REPEAT.findall(text)) <= MAX_REPEATS:
            try:
                return re.compile(text)
            except (re.error, OverflowError, RecursionError) as error:
                expected = f"a regular expression ({error})"
        raise UnsupportedModelError(
            f"{self.where}: quantization_config of {self.method}: expected {expected}, found {shown(text)}. {REMEDY}"
        )


def is_empty(value: object) -> bool:
    """Whether a value switches nothing on: null, false, or a container of such values."""
    return not value or (isinstance(value, Mapping) and all(map(is_empty, value.values())))


def modules_with(tensors: Mapping[str, TensorRef], end: str) -> list[str]:
    """The names of the modules that store a tensor ``end``."""
    return [name.removesuffix(f".{end}") for name in tensors if name.endswith(f".{end}")]


@dataclass(frozen=True, slots=True)
class Module:
    """The stored tensors of one quantised module."""

    name: str
    tensors: Mapping[str, TensorRef]

    def find(self, end: str) -> TensorRef | None:
        """A tensor of the module."""
        return self.tensors.get(f"{self.name}.{end}")

    def need(self, end: str) -> TensorRef:
        """A tensor of the module. Raises CheckpointError if it is missing."""
        ref = self.find(end)
        if ref is None:
            raise CheckpointError(
                f"{shown(self.name)}: expected a tensor {end} beside {', '.join(self._ends())}, found none. The "
                f"checkpoint is incomplete. {FETCH_AGAIN}"
            )
        return ref

    def get(self, end: str, dtypes: Collection[torch.dtype], shape: Sequence[int] = (-1, -1)) -> TensorRef:
        """A tensor of the module. Raises CheckpointError if it is missing, or has another dtype or shape.

        ``shape``: -1 is any size.
        """
        ref = self.need(end)
        fits = len(shape) == len(ref.shape) and all(own in (-1, n) for own, n in zip(shape, ref.shape, strict=True))
        if ref.dtype not in dtypes or not fits:
            kinds = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
            raise CheckpointError(
                f"{ref.file}: tensor {shown(ref.name)}: expected {kinds} {_shown(shape)}, found "
                f"{str(ref.dtype).removeprefix('torch.')} {list(ref.shape)}. {MISFIT}"
            )
        return ref

    def misfit(self, problem: str) -> CheckpointError:
        """An error for the module as a whole."""
        return CheckpointError(f"{shown(self.name)}: {problem}. {MISFIT}")

    def _ends(self) -> list[str]:
        return sorted(name.removeprefix(f"{self.name}.") for name in self.tensors if name.startswith(f"{self.name}."))


def _shown(shape: Sequence[int]) -> str:
    return f"[{', '.join('any' if size == -1 else str(size) for size in shape)}]"

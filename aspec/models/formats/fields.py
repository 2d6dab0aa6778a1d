"""Checked access to the fields of a ``quantization_config`` and to the stored tensors of a quantised module."""

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from aspec.errors import CheckpointError, UnsupportedModelError, shown
from aspec.io.checkpoint import FETCH_AGAIN, TensorRef

FLOATS = (torch.float16, torch.bfloat16, torch.float32)
"""Dtypes of scales."""

CONFIG = "quantization_config"


@dataclass(frozen=True, slots=True)
class Fields:
    """The fields of a method's settings; ``where`` names them in messages."""

    raw: Mapping[str, Any]
    where: str = CONFIG

    @classmethod
    def of(cls, value: object, where: str) -> "Fields":
        """Settings inside settings. Raises CheckpointError if they are no object."""
        if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
            raise CheckpointError(f"{where}: expected an object, found {shown(value)}. Correct config.json.")
        return cls(value, where)

    def refuse(self, key: str, expected: str) -> CheckpointError:
        """An error for a field with a value that makes no sense."""
        found = shown(self.raw.get(key))
        return CheckpointError(f"{self.where}: expected {key} to be {expected}, found {found}. Correct config.json.")

    def unsupported(self, key: str, supported: str) -> UnsupportedModelError:
        """An error for a field with a value that aspec cannot follow."""
        return UnsupportedModelError(
            f"{self.where}: {shown(key)} {shown(self.raw.get(key))} is not supported: expected {supported}. "
            f"Give a copy of the model that is quantised in another way, or the original model."
        )

    def integer(self, key: str, default: int, least: int = 1) -> int:
        """A whole number that is at least ``least``."""
        value = self.raw.get(key, default)
        value = default if value is None else value
        if type(value) is not int or value < least:
            raise self.refuse(key, f"a whole number from {least} on")
        return value

    def flag(self, key: str, default: bool) -> bool:
        """True or false."""
        value = self.raw.get(key, default)
        value = default if value is None else value
        if not isinstance(value, bool):
            raise self.refuse(key, "true or false")
        return value

    def text(self, key: str, default: str = "") -> str:
        """A text in lower case."""
        value = self.raw.get(key, default)
        value = default if value is None else value
        if not isinstance(value, str):
            raise self.refuse(key, "a text")
        return value.lower()

    def texts(self, key: str) -> tuple[str, ...]:
        """A list of texts; null is an empty one."""
        value = self.raw.get(key)
        found = [] if value is None else value
        if not isinstance(found, list) or not all(isinstance(name, str) for name in found):
            raise self.refuse(key, "a list of names")
        return tuple(found)

    def check_known(self, known: Collection[str]) -> None:
        """Raise UnsupportedModelError, by name, for fields that are not known and not empty."""
        unknown = sorted(key for key, value in self.raw.items() if key not in known and not is_empty(value))
        if unknown:
            names = ", ".join(shown(name) for name in unknown[:4])
            raise UnsupportedModelError(
                f"{self.where}: the field{'s' * (len(unknown) > 1)} {names} {'are' if len(unknown) > 1 else 'is'} not "
                f"known, and may change the weights. Give a copy of the model that is quantised in another way, or "
                f"the original model."
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

    def get(self, end: str, dtypes: Sequence[torch.dtype], shape: Sequence[int] | None = None) -> TensorRef:
        """A tensor of the module. Raises CheckpointError if it is missing, or has another dtype or shape.

        ``shape``: -1 is any size; None is any shape with two dimensions.
        """
        ref = self.find(end)
        if ref is None:
            raise CheckpointError(
                f"{shown(self.name)}: expected a tensor {end} beside {', '.join(self._ends())}, found none. The "
                f"checkpoint is incomplete. {FETCH_AGAIN}"
            )
        wanted = (-1, -1) if shape is None else tuple(shape)
        fits = len(wanted) == len(ref.shape) and all(w in (-1, n) for w, n in zip(wanted, ref.shape, strict=True))
        if ref.dtype not in dtypes or not fits:
            kinds = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
            raise CheckpointError(
                f"{ref.file}: tensor {shown(ref.name)}: expected {kinds} {_shown(wanted)}, found "
                f"{str(ref.dtype).removeprefix('torch.')} {list(ref.shape)}. {CONFIG} and the weights do not belong "
                f"together."
            )
        return ref

    def refuse(self, problem: str, remedy: str = FETCH_AGAIN) -> CheckpointError:
        """An error for the module as a whole."""
        return CheckpointError(f"{shown(self.name)}: {problem}. {remedy}")

    def _ends(self) -> list[str]:
        return sorted(name.removeprefix(f"{self.name}.") for name in self.tensors if name.startswith(f"{self.name}."))


def _shown(shape: Sequence[int]) -> str:
    return f"[{', '.join('any' if size == -1 else str(size) for size in shape)}]"


_REPEATED_GROUP = re.compile(r"\)[*+{]")  # may take exponential time
_REPEAT = re.compile(r"(?<!\\)[*+{]")
MAX_REPEATS = 6  # in a pattern, which bounds its time


def compiled(pattern: str, where: str) -> re.Pattern[str]:
    """A pattern of module names that ends soon for every name. Raises CheckpointError for any other one."""
    expected = f"a pattern with at most {MAX_REPEATS} repeats and no repeated group"
    if not _REPEATED_GROUP.search(pattern) and len(_REPEAT.findall(pattern)) <= MAX_REPEATS:
        try:
            return re.compile(pattern)
        except (re.error, OverflowError, RecursionError) as error:
            expected = f"a regular expression ({error})"
    raise CheckpointError(f"{where}: expected {expected}, found {shown(pattern)}. Correct config.json.")

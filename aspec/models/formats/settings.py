"""Reading of a ``quantization_config``, and the refusals that all methods share.

A field that is not known could change the weights, so it is refused by its name; so is a value of another type.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NoReturn

from aspec.errors import CheckpointError, UnsupportedModelError, shown
from aspec.io.checkpoint import FETCH_AGAIN, TensorRef
from aspec.io.weight_format import REMEDY

ACTIVATIONS = (
    ".activation_scale",
    ".input_global_scale",
    ".input_scale",
    ".input_zero_point",
    ".k_scale",
    ".output_scale",
    ".prob_scale",
    ".q_scale",
    ".qscale_act",
    ".v_scale",
)
"""The ends of the names of scales of activations and of the KV cache.

Some kernels round activations with them. aspec computes with activations as they are, as transformers does with the
dequantised weights, so these tensors have no use and are not read.
"""


def is_of_activations(name: str) -> bool:
    """Whether a stored tensor that no parameter wants only scales activations, which aspec leaves as they are."""
    return name.endswith(ACTIVATIONS)


@dataclass(frozen=True, slots=True)
class Settings:
    """The ``quantization_config`` of a checkpoint; ``where`` names its file in messages."""

    values: Mapping[str, object]
    where: str
    method: str  # for people

    def check_known(self, known: Sequence[str]) -> None:
        """Raise UnsupportedModelError for a field that the method is not known to have."""
        other = sorted(map(str, self.values.keys() - set(known)))
        if other:
            raise UnsupportedModelError(
                f"{self.where}: quantization_config has {shown(other[0])} = {shown(self.values[other[0]])}, which "
                f"aspec does not know and which may change the weights: expected only fields that {self.method} is "
                f"known to have ({', '.join(sorted(known))}). {REMEDY}"
            )

    def choice(self, key: str, known: Sequence[object], default: object) -> object:
        """A value out of ``known``. Raises UnsupportedModelError for all others."""
        value = self.values.get(key, default)
        if not any(value == own and type(value) is type(own) for own in known):
            self.refuse(key, "one of " + ", ".join(map(repr, known)))
        return value

    def flag(self, key: str, default: bool = False) -> bool:
        """A true or false value."""
        return bool(self.choice(key, (True, False), default))

    def names(self, key: str) -> list[str]:
        """A list of names of modules; empty for null."""
        value = self.values.get(key)
        if value is None:
            return []
        if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
            self.refuse(key, "a list of names of modules")
        return value

    def excludes(self, module: str, *keys: str) -> bool:
        """Whether one of the lists names a module, by the start or the end of its name, as in transformers."""
        names = (name for key in keys for name in self.names(key))
        return any(module.startswith(name) or module.endswith(name) for name in names)

    def sizes(self, key: str, count: int) -> tuple[int, ...] | None:
        """``count`` whole numbers above zero; None for null."""
        value = self.values.get(key)
        if value is None:
            return None
        if not isinstance(value, list) or len(value) != count or not all(type(n) is int and n > 0 for n in value):
            self.refuse(key, f"{count} whole numbers above zero")
        return tuple(value)

    def refuse(self, key: str, expected: str) -> NoReturn:
        """Raise UnsupportedModelError for the value of ``key``."""
        raise UnsupportedModelError(
            f"{self.where}: quantization_config of {self.method}: expected {expected} as {key}, found "
            f"{shown(self.values.get(key))}. {REMEDY}"
        )

    def check_found(self, count: int, expected: str) -> None:
        """Raise CheckpointError if no stored tensor is quantised."""
        if count == 0:
            raise CheckpointError(
                f"{self.where} says that the weights are quantised with {self.method}: expected {expected}, found "
                f"none. config.json and the weights do not belong together: fetch both again, or remove "
                f"quantization_config if the weights are not quantised."
            )


def misfit(ref: TensorRef, expected: str, found: object = None) -> CheckpointError:
    """The error of a stored tensor of another dtype or shape than its method asks for."""
    what = f"{_name(ref)} {list(ref.shape)}" if found is None else found
    return CheckpointError(f"{ref.file}: tensor {shown(ref.name)}: expected {expected}, found {what}. {FETCH_AGAIN}")


def missing(ref: TensorRef, companion: str) -> CheckpointError:
    """The error of a stored tensor whose companion isn't stored."""
    return CheckpointError(
        f"{ref.file}: tensor {shown(ref.name)} ({_name(ref)}) cannot be decoded alone: expected {shown(companion)} "
        f"beside it, found no such tensor. {FETCH_AGAIN}"
    )


def check_shape(ref: TensorRef, shape: Sequence[int], why: str) -> None:
    """Raise CheckpointError unless the tensor has the shape."""
    if tuple(ref.shape) != tuple(shape):
        raise misfit(ref, f"{list(shape)} ({why})", list(ref.shape))


def _name(ref: TensorRef) -> str:
    return str(ref.dtype).removeprefix("torch.")

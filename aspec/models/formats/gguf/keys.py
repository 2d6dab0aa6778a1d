"""The metadata of an architecture, read key by key: a key that nobody asked for is refused, because it may be maths."""

from collections.abc import Mapping
from pathlib import Path
from typing import NoReturn

from aspec.errors import CheckpointError, UnsupportedModelError, shown
from aspec.io.gguf import Value

NO_MATHS = frozenset(
    {"rope.scaling.finetuned", "tensor_data_layout", "interleave_moe_layer_step", "pooling_type", "attention.causal"}
)
"""Keys that do not change the numbers of a decoder. The last two mark other kinds of models, which are refused."""
OTHER_PARTS = ("vision.", "mm.", "audio.")  # of a multimodal model, whose text model is all that the file holds


class Keys:
    """The keys that begin with the name of an architecture."""

    def __init__(self, path: Path, architecture: str, metadata: Mapping[str, Value]) -> None:
        self._path, self._architecture = path, architecture
        prefix = f"{architecture}."
        self._values = {key.removeprefix(prefix): value for key, value in metadata.items() if key.startswith(prefix)}
        self._asked: set[str] = set()

    def has(self, key: str) -> bool:
        """Whether the file says something."""
        return key in self._values

    def whole(self, key: str, missing: int | None = None, least: int = 1) -> int:
        """A whole number; of a list with one a layer, the value that all have. Needed if ``missing`` is None."""
        value = self._one(key)
        if value is None and missing is not None:
            return missing
        if type(value) is not int or value < least:
            self._refuse(key, f"a whole number of {least} or more", value)
        return value

    def number(self, key: str, missing: float | None = None, above: float = -float("inf")) -> float:
        """A number that is finite, and larger than ``above``."""
        value = self._one(key)
        if value is None and missing is not None:
            return missing
        if not isinstance(value, int | float) or isinstance(value, bool) or not above < value < float("inf"):
            self._refuse(key, "a number" if above < 0 else f"a number above {above:g}", value)
        return float(value)

    def text(self, key: str, missing: str) -> str:
        """A text."""
        value = self._one(key)
        if value is not None and not isinstance(value, str):
            self._refuse(key, "a text", value)
        return missing if value is None else value

    def truth(self, key: str, missing: bool) -> bool:
        """A truth value."""
        value = self._one(key)
        if value is not None and not isinstance(value, bool):
            self._refuse(key, "a truth value", value)
        return missing if value is None else value

    def truths(self, key: str, count: int) -> list[bool] | None:
        """A truth value for each of ``count`` layers; None if the key is missing or no list."""
        value = self._values.get(key)
        if value is None or isinstance(value, bool | int | float | str):
            return None
        self._asked.add(key)
        if len(value) != count or not all(isinstance(one, bool) for one in value):
            self._refuse(key, f"{count} truth values", list(value[:8]))
        return list(map(bool, value))

    def expect(self, key: str, value: object) -> None:
        """Refuse a key that has another value."""
        found = self._one(key)
        if found is not None and found != value:
            raise UnsupportedModelError(
                f"{self._path}: {self._architecture}.{key} is {shown(found)}, and aspec runs {self._architecture} "
                f"models only with {shown(value)}. Choose another model."
            )

    def refuse_rest(self) -> None:
        """Raise UnsupportedModelError for a key that was not asked for."""
        self.expect("attention.causal", True)
        self.expect("pooling_type", 0)
        rest = sorted(key for key in self._values.keys() - self._asked - NO_MATHS if not key.startswith(OTHER_PARTS))
        if rest:
            raise UnsupportedModelError(
                f"{self._path}: the key {self._architecture}.{shown(rest[0])} is not known to aspec, and may change "
                f"the model's numbers. Choose another file of the model, or its safetensors checkpoint."
            )

    def _one(self, key: str) -> Value | None:
        self._asked.add(key)
        value = self._values.get(key)
        if value is None or isinstance(value, bool | int | float | str):
            return value
        if len(value) == 0 or any(other != value[0] for other in value):
            self._refuse(key, "the same value for every layer", list(value[:8]))
        return value[0]

    def _refuse(self, key: str, expected: str, found: object) -> NoReturn:
        what = "nothing" if found is None else shown(found)
        raise CheckpointError(
            f"{self._path}: expected {self._architecture}.{key} to be {expected}, found {what}. Fetch the file again."
        )

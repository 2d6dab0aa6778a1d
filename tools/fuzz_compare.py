"""How a fuzzed reader is compared with the format's own reader."""

from collections.abc import Callable
from typing import Any


class WrongAcceptanceError(Exception):
    """An input was accepted that the format's own reader refuses or reads otherwise."""


def expect(found: Any, wanted: Any, what: str) -> None:
    """Raise WrongAcceptanceError unless both are equal."""
    if found != wanted:
        raise WrongAcceptanceError(f"{what}: accepted {found!r:.300}, expected {wanted!r:.300}")


def as_own_reader(read: Callable[[], Any], what: str) -> Any:
    """What the format's own reader makes of the input; its refusal is a wrong acceptance of ours."""
    try:
        return read()
    except Exception as error:
        raise WrongAcceptanceError(f"{what} refuses it: {type(error).__name__}: {error!s:.300}") from error

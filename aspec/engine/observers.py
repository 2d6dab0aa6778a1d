"""Observers from users: one that raises is dropped with a warning, and the run goes on."""

import warnings
from collections.abc import Callable
from typing import ParamSpec

P = ParamSpec("P")


def guarded(observer: Callable[P, object]) -> Callable[P, None]:
    """The same observer until it raises; then it is not called again, and one RuntimeWarning says so."""
    dropped = False

    def observe(*args: P.args, **kwargs: P.kwargs) -> None:
        nonlocal dropped
        if dropped:
            return
        try:
            observer(*args, **kwargs)
        except Exception as error:  # code of a user may raise anything
            dropped = True
            name = getattr(observer, "__qualname__", type(observer).__qualname__)
            warnings.warn(
                f"the observer {name} raised {type(error).__name__}: {error}. It is dropped; the run goes on.",
                RuntimeWarning,
                stacklevel=2,
            )

    return observe

"""Observers that others bring: one that raises is dropped with a warning, and what it observed goes on."""

import warnings
from collections.abc import Callable
from typing import ParamSpec

P = ParamSpec("P")


def guarded(observer: Callable[P, object]) -> Callable[P, None]:
    """The same observer until it raises: then a RuntimeWarning says so once, and it is not called again."""
    dropped = False

    def observe(*args: P.args, **kwargs: P.kwargs) -> None:
        nonlocal dropped
        if dropped:
            return
        try:
            observer(*args, **kwargs)
        except Exception as error:  # it is not ours: it may raise anything
            dropped = True
            name = getattr(observer, "__qualname__", type(observer).__qualname__)
            warnings.warn(
                f"the observer {name} raised {type(error).__name__}: {error}. It is dropped; the run goes on.",
                RuntimeWarning,
                stacklevel=2,
            )

    return observe

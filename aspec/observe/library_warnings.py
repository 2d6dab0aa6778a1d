"""Warnings of libraries while a command runs: they are held back, and shown as one line each after the answer.

Two roads lead to a terminal: Python's ``warnings``, and the loggers of those libraries that bring a handler of their
own. Filters (``-W``, PYTHONWARNINGS) stay as they are: a warning that they turn into an error still is one.
"""

import logging
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from aspec.observe.console import Console

LOGGERS = ("transformers", "huggingface_hub")


class _Held(logging.Handler):
    """Messages of a library, to whom they concern."""

    def __init__(self, hold: Callable[[str], None]) -> None:
        super().__init__(logging.WARNING)
        self._hold = hold

    def emit(self, record: logging.LogRecord) -> None:
        """Hold one."""
        self._hold(record.getMessage())


@contextmanager
def held_back(console: Console) -> Iterator[None]:
    """Hold warnings back while the block runs; ``console`` shows them at its end, where it has not done so before.

    Only loggers whose library is imported already are held back.
    """

    def show(message: Warning | str, category: type[Warning], *_: object, **__: object) -> None:
        console.warn(f"{category.__name__}: {message}")

    loggers = [logging.getLogger(name) for name in LOGGERS if name in sys.modules]
    handlers, before = [logger.handlers for logger in loggers], warnings.showwarning
    for logger in loggers:
        logger.handlers = [_Held(console.warn)]
    warnings.showwarning = show
    try:
        yield
    finally:
        warnings.showwarning = before
        for logger, own in zip(loggers, handlers, strict=True):
            logger.handlers = own
        console.show_warnings()

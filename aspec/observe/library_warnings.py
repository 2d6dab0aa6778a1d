"""Holds back the warnings of libraries while a command runs, and shows them after the answer, one line each.

Libraries warn in two ways: through Python's ``warnings``, and through loggers with a handler of their own. Filters
(``-W``, PYTHONWARNINGS) stay in force: a warning that they turn into an error is still an error.
"""

import logging
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from aspec.observe.console import Console

LOGGERS = ("transformers", "huggingface_hub")


class _HoldingHandler(logging.Handler):
    """Passes the messages of a logger to ``hold``."""

    def __init__(self, hold: Callable[[str], None]) -> None:
        super().__init__(logging.WARNING)
        self._hold = hold

    def emit(self, record: logging.LogRecord) -> None:
        """Pass one message on."""
        self._hold(record.getMessage())


@contextmanager
def held_back(console: Console) -> Iterator[None]:
    """Hold warnings back while the block runs; at its end ``console`` shows those that were not shown before.

    This covers only the loggers of libraries that are imported already.
    """

    def show(message: Warning | str, category: type[Warning], *_: object, **__: object) -> None:
        console.warn(f"{category.__name__}: {message}")

    loggers = [logging.getLogger(name) for name in LOGGERS if name in sys.modules]
    handlers, before = [logger.handlers for logger in loggers], warnings.showwarning
    for logger in loggers:
        logger.handlers = [_HoldingHandler(console.warn)]
    warnings.showwarning = show
    try:
        yield
    finally:
        warnings.showwarning = before
        for logger, own in zip(loggers, handlers, strict=True):
            logger.handlers = own
        console.show_warnings()

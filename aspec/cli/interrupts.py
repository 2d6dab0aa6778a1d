"""How a command that serves many rows reacts to SIGINT and SIGTERM."""

import asyncio
import signal
from typing import Self

from aspec.observe.console import Console


class Interrupts:
    """Signal handlers of the running task: SIGTERM and the second SIGINT cancel it, the first SIGINT sets ``drain``.

    While ``can_drain`` is False, the first SIGINT cancels, too. Mutable, because the second signal means more than
    the first. Use it only on the loop's thread.
    """

    def __init__(self, console: Console) -> None:
        self.drain = asyncio.Event()
        self.can_drain = False
        self._console = console
        self._cancelled = False  # cancel only once: a second cancel would interrupt the closing of the engine

    def __enter__(self) -> Self:
        self._loop, self._main = asyncio.get_running_loop(), asyncio.current_task()
        self._loop.add_signal_handler(signal.SIGINT, self._interrupt)
        self._loop.add_signal_handler(signal.SIGTERM, self._stop)
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.remove_signal_handler(signal.SIGINT)
        self._loop.remove_signal_handler(signal.SIGTERM)

    def _interrupt(self) -> None:
        if not self.can_drain or self.drain.is_set():
            self._stop()
            return
        self.drain.set()
        self._console.note(
            "no new rows start; the rows in progress will finish. Press Ctrl-C again to stop at once: "
            "no finished row is lost"
        )

    def _stop(self) -> None:
        if not self._cancelled and self._main is not None:
            self._cancelled = True
            self._main.cancel()

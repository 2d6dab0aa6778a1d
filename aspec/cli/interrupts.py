"""How a command reacts to signals: one object for the life of the process, the same rules in every command.

SIGINT, SIGTERM and SIGHUP stop a command in order: the code unwinds, the terminal is restored, the text so far is
printed, and the exit code is 128 plus the signal's number. The third signal that had no effect yet ends the process at
once, whatever hangs. SIGTSTP (Ctrl-Z) gives the terminal back before the process stops. A signal that the parent
ignores (``nohup``, a background job) stays ignored.
"""

import os
import select
import signal
import sys
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn, Self, TypeVar

from aspec.observe.console import Console

if TYPE_CHECKING:  # the command line starts without it
    import asyncio

if sys.platform != "win32":
    import termios

T = TypeVar("T")

STOPPING, SUSPENDING = ("SIGINT", "SIGTERM", "SIGHUP"), "SIGTSTP"
MOST_SIGNALS = 3  # the last of them ends the process
LONGEST_WAIT_S = 0.2  # for a terminal that takes no more output


class Interrupts:
    """The signals so far, and the work that they stop. Mutable, because a later signal means more than the first.

    Python calls the handlers on the main thread. They cancel work that runs on a loop; other work sees
    KeyboardInterrupt.
    """

    def __init__(self) -> None:
        self.console: Console | None = None
        self.drain: Callable[[], None] | None = None  # the first SIGINT calls it and cancels nothing
        self.always_drains = False  # the first signal of any kind calls it
        self._stopped_by: signal.Signals | None = None  # SIGINT until it had its effect, SIGTERM and SIGHUP for ever
        self._count = 0  # of signals since the last one that had its effect
        self._loop: asyncio.AbstractEventLoop | None = None  # while it runs work
        self._work: asyncio.Task[Any] | None = None
        self._cancelled = False  # cancel only once: a second cancel would interrupt the closing of the engine
        self._finishing = False  # what runs now must not be broken off
        self._modes = terminal_modes()
        self._before: dict[signal.Signals, Any] = {}  # the handlers of the caller

    def install(self) -> Self:
        """Handle the signals from now on."""
        for name in (*STOPPING, SUSPENDING):
            number = getattr(signal, name, None)  # Windows lacks some
            if number is not None and signal.getsignal(number) is not signal.SIG_IGN:
                handler = self._suspend if name == SUSPENDING else self._receive
                self._before[number] = signal.signal(number, handler)
        return self

    def remove(self) -> None:
        """Handle signals as before ``install``."""
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @classmethod
    @contextmanager
    def watching(cls, console: Console) -> "Iterator[Interrupts]":
        """The interrupts of this process, which restore ``console``'s terminal; without any, new ones for the block."""
        found = _installed()
        if found is not None:
            found.console = console
            yield found
            return
        made = cls().install()
        made.console = console
        try:
            yield made
        finally:
            made.remove()

    @property
    def must_end(self) -> bool:
        """Whether SIGTERM or SIGHUP came: no command goes on after them."""
        return self._stopped_by not in (None, signal.SIGINT)

    @property
    def exit_code(self) -> int | None:
        """The exit code that the last signal asks for, if there was one without an effect."""
        return None if self._stopped_by is None else 128 + self._stopped_by

    @property
    def words(self) -> str:
        """The last line of a command that was stopped."""
        return f"stopped by {self._stopped_by.name}" if self._stopped_by and self.must_end else "interrupted"

    def settle(self) -> None:
        """Call it where Ctrl-C had its effect and the command goes on. Raises KeyboardInterrupt if it must end."""
        if self.must_end:
            raise KeyboardInterrupt
        self._count, self._stopped_by = 0, None

    def run(self, runner: "asyncio.Runner", work: Coroutine[Any, Any, T]) -> T:
        """Run work that a signal cancels; work that ends without an error in spite of SIGINT has dealt with it.

        Raises KeyboardInterrupt if a signal ended the work, and after SIGTERM and SIGHUP in any case.
        """
        from asyncio import CancelledError

        try:
            with self.finishing():
                result = runner.run(self._cancellable(work, self._count))
        except CancelledError:
            if self._stopped_by is None:
                raise
            raise KeyboardInterrupt from None
        self.settle()
        return result

    @contextmanager
    def finishing(self) -> Iterator[None]:
        """No signal breaks the block off, such as the closing of an engine; the last one ends the process."""
        before, self._finishing = self._finishing, True
        try:
            yield
        finally:
            self._finishing = before

    async def _cancellable(self, work: Coroutine[Any, Any, T], count: int) -> T:
        """``work``, which signals cancel, also one that came since there were ``count``."""
        from asyncio import current_task, get_running_loop

        self._loop, self._work, self._cancelled = get_running_loop(), current_task(), False
        if self._count > count:
            self._loop.call_soon(self._stop_work, self._stopped_by)
        try:
            return await work
        finally:
            self._loop = self._work = None

    def _receive(self, number: int, _: FrameType | None) -> None:
        self._count += 1
        if not self.must_end:
            self._stopped_by = signal.Signals(number)
        if self._count >= MOST_SIGNALS:
            self.end_now(128 + number)
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._stop_work, number)
        elif not self._finishing:
            raise KeyboardInterrupt

    def _stop_work(self, number: int | None) -> None:
        if self.drain is not None and (number == signal.SIGINT or self.always_drains):
            drain, self.drain = self.drain, None
            drain()
        elif self._work is not None and not self._cancelled:
            self._cancelled = True
            self._work.cancel()

    def end_now(self, code: int) -> NoReturn:
        """Restore the terminal, print the text so far, and end without cleaning up."""
        for descriptor, text in (self.console.abandon() if self.console else {}).items():
            with suppress(OSError, ValueError):
                if select.select([], [descriptor], [], LONGEST_WAIT_S)[1]:
                    os.write(descriptor, text.encode("utf-8", "replace"))
        restore_terminal_modes(self._modes)
        os._exit(code)

    def _suspend(self, *_: object) -> None:
        """Give the terminal back, stop, and note how long."""
        console = self.console or Console(quiet=True)
        with console.suspended():
            begun_s = time.perf_counter()
            own = signal.signal(signal.SIGTSTP, signal.SIG_DFL)
            signal.raise_signal(signal.SIGTSTP)  # returns after SIGCONT
            signal.signal(signal.SIGTSTP, own)
            console.stops.add(begun_s, time.perf_counter())


@contextmanager
def loop_runner() -> "Iterator[asyncio.Runner]":
    """A runner of aspec's event loop; no signal breaks off its closing."""
    from asyncio import Runner

    from aspec.api import loop_factory

    runner = Runner(loop_factory=loop_factory())
    try:
        yield runner
    finally:
        with present().finishing():
            runner.close()


def run(main: Callable[[], Awaitable[T]]) -> T:
    """Run a coroutine function as ``aspec.api.run`` does, so that a signal cancels it and raises KeyboardInterrupt."""
    from aspec.errors import first_error

    async def body() -> T:
        return await main()

    try:
        with loop_runner() as runner:
            return present().run(runner, body())
    except BaseExceptionGroup as group:
        raise first_error(group) from None


@contextmanager
def draining(drain: "asyncio.Event", console: Console) -> Iterator[None]:
    """The first Ctrl-C inside the block sets ``drain``, and tells what happens now."""

    def start() -> None:
        drain.set()
        console.note(
            "no new rows start; the rows in progress will finish. Press Ctrl-C again to stop at once: "
            "no finished row is lost"
        )

    present().drain = start
    try:
        yield
    finally:
        present().drain = None


def present() -> Interrupts:
    """The interrupts of this process; of a process that has none, new ones that no signal reaches."""
    return _installed() or Interrupts()


def _installed() -> Interrupts | None:
    for name in STOPPING:
        owner = getattr(signal.getsignal(getattr(signal, name, signal.SIGINT)), "__self__", None)
        if isinstance(owner, Interrupts):
            return owner
    return None


def terminal_modes() -> list[Any] | None:
    """The modes of the terminal of standard input, None if it is none."""
    if sys.platform == "win32":
        return None
    with suppress(termios.error):
        return termios.tcgetattr(0)
    return None


def restore_terminal_modes(modes: list[Any] | None) -> None:
    """Set the terminal of standard input to ``modes``, unless another process holds it."""
    if sys.platform == "win32" or modes is None:
        return
    try:
        is_held = os.tcgetpgrp(0) != os.getpgrp()  # then the system would stop this process
    except OSError:  # not the terminal that controls this session: nobody is stopped
        is_held = False
    if not is_held:
        with suppress(termios.error, OSError):
            termios.tcsetattr(0, termios.TCSANOW, modes)

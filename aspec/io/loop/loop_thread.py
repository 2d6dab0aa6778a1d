"""An event loop in a thread of its own, for callers that have no loop, or that already run inside one (a notebook).

Calls come from any thread and wait for their result. An interrupted caller cancels its call and waits for its end. The
loop ends with ``close``, or with the program's main thread: a forgotten loop never keeps a process alive. Whatever ends
it, ``at_end`` runs on it last.
"""

import asyncio
import contextlib
import os
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from types import TracebackType
from typing import Any, Self, TypeVar

from aspec.errors import ClosedError, UserError

T = TypeVar("T")

CHECK_EVERY_S = 0.1  # whether the program has ended


class LoopThread:
    """A running loop; use as a context manager, or call ``close``."""

    def __init__(self, name: str, loop_factory: Callable[[], asyncio.AbstractEventLoop]) -> None:
        self.at_end: Callable[[], Coroutine[Any, Any, object]] | None = None  # the owner sets it once
        self._factory = loop_factory
        self._process = os.getpid()  # threads do not follow a fork
        self._ended: Future[None] = Future()
        self._started: Future[asyncio.AbstractEventLoop] = Future()
        self._stop = asyncio.Event()  # set on the loop's thread
        self._thread = threading.Thread(target=self._run, name=name)
        self._thread.start()
        self._loop = self._started.result()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def call(self, work: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """The result of a coroutine function, which runs on the loop.

        Raises what it raises, ClosedError if the loop has ended, and UserError for a call from the loop's own thread or
        from another process.
        """
        if os.getpid() != self._process:
            raise UserError(
                "the engine belongs to the process that opened it: expected a call there, found one in a fork of it. "
                "Open an engine in each process, or call it from threads."
            )
        if threading.current_thread() is self._thread:
            raise UserError(
                "a call from inside the engine would wait for itself: expected a call from another thread, found one "
                "in a callback of the engine. Let the callback return first."
            )
        result: Future[T] = Future()
        task: asyncio.Task[None]

        def begin() -> None:
            nonlocal task
            task = self._loop.create_task(_deliver(work, result))

        self._post(begin)
        try:
            return result.result()
        except KeyboardInterrupt:
            self._post(lambda: task.cancel())
            result.exception()  # wait until it has ended; a second interrupt ends the wait
            raise

    def close(self) -> None:
        """End the loop and wait for it, from any thread but its own, which does not wait. Raises the error of the end.

        What still runs is cancelled after ``at_end``. May be called twice; later calls do nothing.
        """
        if self._ended.done() or os.getpid() != self._process:
            return
        self._post(self._stop.set, closed_is_fine=True)
        if threading.current_thread() is not self._thread:
            self._ended.result()

    def _post(self, call: Callable[[], object], *, closed_is_fine: bool = False) -> None:
        try:
            self._loop.call_soon_threadsafe(call)
        except RuntimeError as error:  # the loop has ended
            if not closed_is_fine:
                raise ClosedError("the engine is closed: open another one.") from error

    def _run(self) -> None:
        try:
            with asyncio.Runner(loop_factory=self._factory) as runner:
                runner.run(self._serve())
        except BaseException as error:
            self._ended.set_exception(error)
        else:
            self._ended.set_result(None)

    async def _serve(self) -> None:
        self._started.set_result(asyncio.get_running_loop())
        while not self._stop.is_set() and threading.main_thread().is_alive():
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stop.wait(), CHECK_EVERY_S)
        if self.at_end is not None:
            await self.at_end()


async def _deliver(work: Callable[[], Coroutine[Any, Any, T]], result: Future[T]) -> None:
    """Hand the outcome of ``work`` to the thread that waits for it."""
    try:
        result.set_result(await work())
    except asyncio.CancelledError:
        result.set_exception(ClosedError("the engine was closed before this call had ended."))
    except BaseException as error:
        result.set_exception(error)

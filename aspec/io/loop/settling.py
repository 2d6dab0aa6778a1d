"""Waiting for work that cannot be cancelled, even if its waiter is; closing several resources."""

import asyncio
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from typing import TypeVar

T = TypeVar("T")


async def settle(future: asyncio.Future[T], on_cancel: Callable[[], object] = lambda: None) -> T:
    """Wait until ``future`` has ended, and return its result; until then it uses its buffers.

    A cancellation of the caller is raised only after that; ``on_cancel`` is called at once.
    """
    cancelled: asyncio.CancelledError | None = None
    while not future.done():
        try:
            await asyncio.wait([future])
        except asyncio.CancelledError as error:
            cancelled = error
            on_cancel()
    if cancelled is not None:
        if not future.cancelled():
            future.exception()  # marks it as retrieved: the cancelled caller does not need it
        raise cancelled
    return future.result()


def in_thread(function: Callable[[], T]) -> asyncio.Future[T]:
    """Call a function in a thread of the loop's own pool.

    In contrast to ``asyncio.to_thread`` there is no task in between that could be cancelled while the thread runs.
    """
    return asyncio.get_running_loop().run_in_executor(None, function)


async def settle_all(futures: Iterable[asyncio.Future[T]], timeout_s: float | None = None) -> None:
    """Wait until all futures have ended, in error too, or ``timeout_s`` seconds have passed.

    A cancellation of the caller is raised only after that.
    """
    loop = asyncio.get_running_loop()
    deadline = None if timeout_s is None else loop.time() + timeout_s
    waiting, cancelled = set(futures), None
    while waiting:
        left = None if deadline is None else max(0.0, deadline - loop.time())
        try:
            await asyncio.wait(waiting, timeout=left)
            break
        except asyncio.CancelledError as error:
            cancelled = error
            waiting = {future for future in waiting if not future.done()}
    if cancelled is not None:
        raise cancelled


def close_all(closers: Iterable[Callable[[], object]]) -> None:
    """Call every closer, also after one raises. The last error is raised at the end; the others are its context."""
    with ExitStack() as stack:
        for close in reversed(list(closers)):
            stack.callback(close)

"""The event lane: one thread blocks on the events of one stream and hands the results to the loop.

Events of one stream complete in the order of their recording, so one thread is enough and nothing polls. The thread
waits for every event, also after a failure: no future resolves while its work may still touch a buffer.
"""

import asyncio
import queue
import threading
from collections.abc import Callable
from typing import Protocol

from aspec.errors import DeviceError
from aspec.io.loop.mailbox import LoopMailbox
from aspec.tasks.task import Completion

Outcome = Completion | BaseException
Conclude = Callable[[BaseException | None], Outcome]
"""The lane's thread calls it after an event, with the error that the wait raised, or None."""


class DeviceEvent(Protocol):
    """A mark in a stream."""

    def synchronize(self) -> None:
        """Block, without the interpreter lock, until the stream has passed the last recording of this event."""
        ...


class EventLane:
    """Waits for the events of one stream, in order; wake-ups of the loop are batched."""

    def __init__(self, name: str, loop: asyncio.AbstractEventLoop) -> None:
        self._queue: queue.SimpleQueue[tuple[DeviceEvent | None, Conclude, asyncio.Future[Completion]] | None] = (
            queue.SimpleQueue()
        )
        self._mailbox: LoopMailbox[Completion] = LoopMailbox(loop)
        self._thread = threading.Thread(target=self._run, name=f"aspec-{name}", daemon=True)
        self._thread.start()

    def wait(self, event: DeviceEvent | None, conclude: Conclude, future: asyncio.Future[Completion]) -> None:
        """Resolve ``future`` with ``conclude`` after ``event``, which must be recorded; from any thread.

        Without an event (nothing was launched) it resolves after the events that were submitted before.
        """
        self._queue.put((event, conclude, future))

    def close(self, timeout_s: float = 30.0) -> None:
        """Wait for the submitted events, join, hand over the results; may be called twice.

        Raises DeviceError if the thread does not end in time.
        """
        self._queue.put(None)
        self._thread.join(timeout_s)
        if self._thread.is_alive():
            raise DeviceError(f"{self._thread.name}: an event did not complete within {timeout_s:g} s of closing")
        self._mailbox.empty()

    def _run(self) -> None:
        while (item := self._queue.get()) is not None:
            event, conclude, future = item
            self._mailbox.post(future, _outcome(event, conclude))
            del item, event, conclude, future


def _outcome(event: DeviceEvent | None, conclude: Conclude) -> Outcome:
    failure: BaseException | None = None
    try:
        if event is not None:
            event.synchronize()
    except BaseException as error:
        failure = error
    try:
        return conclude(failure)
    except BaseException as error:
        return error

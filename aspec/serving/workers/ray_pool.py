"""Engine processes on the nodes of a Ray cluster: an actor per node or card starts the same process as a local worker.

The actor only relays frames. So Ray's own settings of threads and signals reach no engine, and there is one form of
worker. Ray ends the actors of a driver that dies; the engine process ends with its actor, because its input ends.
"""

import asyncio
import importlib
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from aspec.errors import UserError, reason_of
from aspec.serving.workers.local import LocalWorker
from aspec.serving.workers.pool import StartError

THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")  # Ray sets them to the CPUs that an actor asks for
LONGEST_END_S = 5.0  # that a call may take to end after its actor has ended
LOG_CRITICAL = 50  # logging.CRITICAL: the driver itself tells of a worker that ends


class Relay:
    """The actor's class: an engine process beside it, whose frames it passes on."""

    async def start(self, threads: str | None) -> None:
        """Start the process; ``threads``: OMP_NUM_THREADS of the driver, in place of Ray's."""
        for name in THREADS:
            os.environ.pop(name, None)
        self._worker = await LocalWorker.start({} if threads is None else {THREADS[0]: threads})

    async def send(self, content: bytes) -> None:
        """Pass a frame to the process."""
        self._worker.send(content)

    async def receive(self) -> bytes | None:
        """The next frame of the process; None when it has ended."""
        return await self._worker.receive()

    async def close(self) -> str:
        """End the process; returns how it ended."""
        return await self._worker.close()


class RayWorker:
    """An engine process on a node, by its actor."""

    def __init__(self, ray: Any, actor: Any) -> None:
        self._ray, self._actor = ray, actor
        self._errors = _errors(ray)
        self._receiving: asyncio.Future[bytes | None] | None = None  # the last call of ``receive``
        self._lost = ""  # why the actor does not answer any more

    def send(self, content: bytes) -> None:
        """Queue a frame; nothing happens if the actor has ended."""
        with suppress(*self._errors):
            self._actor.send.remote(content)

    async def receive(self) -> bytes | None:
        """The next frame; None when the process, its actor or its node has ended."""
        self._receiving = asyncio.ensure_future(self._receive())
        return await asyncio.shield(self._receiving)  # Ray's client cannot set the result of a call that is cancelled

    async def _receive(self) -> bytes | None:
        try:
            content: bytes | None = await self._actor.receive.remote()
        except self._errors as error:
            self._lost = type(error).__name__
            return None
        return content

    async def close(self) -> str:
        """End the process and its actor; returns how the process ended."""
        how = f"its Ray actor ended: {self._lost}"
        if not self._lost:
            with suppress(*self._errors):
                how = await self._actor.close.remote()
        with suppress(*self._errors):
            self._ray.kill(self._actor)
        if self._receiving is not None:
            await asyncio.wait([self._receiving], timeout=LONGEST_END_S)
        return how


class RayPool:
    """The nodes of a cluster; a node with cards is a place for each of them. Close it at the end."""

    def __init__(self, address: str) -> None:
        """Connect to a cluster; blocks. Raises UserError."""
        ray = self._ray = importlib.import_module("ray")
        with _own_signals():
            try:
                ray.init(address=address, log_to_driver=False, logging_level=LOG_CRITICAL)
            except Exception as error:  # Ray has no common type for what goes wrong here
                raise UserError(
                    f"--workers {address}: no Ray cluster answers ({reason_of(error)}). Start one (ray start --head; "
                    f"ray start --address HOST:6379 on the other machines), or give --workers ray://HOST:10001 of one "
                    f"that runs."
                ) from error
        self._errors = _errors(ray)
        self._places = list(_places(ray.nodes()))
        if not self._places:
            self.close()
            raise UserError(f"--workers {address}: the Ray cluster has no node that is alive. Start one: ray start.")

    @property
    def size(self) -> int:
        """Number of places."""
        return len(self._places)

    async def start(self, place: int) -> RayWorker:
        """Start an actor and its process. Raises StartError."""
        node, cards = self._places[place]
        strategies = importlib.import_module("ray.util.scheduling_strategies")
        there = strategies.NodeAffinitySchedulingStrategy(node, soft=False)
        kind = self._ray.remote(num_cpus=0, num_gpus=cards, max_restarts=0)(Relay)
        actor = kind.options(scheduling_strategy=there).remote()
        try:
            await actor.start.remote(os.environ.get(THREADS[0]))
        except self._errors as error:
            with suppress(*self._errors):
                self._ray.kill(actor)
            raise StartError(f"no worker starts on the Ray node {node[:12]}: {reason_of(error)}") from error
        return RayWorker(self._ray, actor)

    def close(self) -> None:
        """Leave the cluster; its actors end."""
        self._ray.shutdown()


def _errors(ray: Any) -> tuple[type[Exception], ...]:
    """What a call raises when its actor, its node or the way to the cluster has gone."""
    return ray.exceptions.RayError, ConnectionError


def _places(nodes: list[dict[str, Any]]) -> Iterator[tuple[str, int]]:
    """The id of the node of every place, and its number of cards."""
    for node in nodes:
        if node["Alive"]:
            cards = int(node["Resources"].get("GPU", 0))
            yield from [(node["NodeID"], 1)] * cards or [(node["NodeID"], 0)]


@contextmanager
def _own_signals() -> Iterator[None]:
    """Ray sets handlers of its own while it connects; afterwards they are those of before."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

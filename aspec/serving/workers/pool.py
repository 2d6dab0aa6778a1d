"""What the driver needs of the places that start its workers."""

from typing import Protocol

from aspec.errors import AspecError


class StartError(AspecError):
    """A worker could not be started; the text says why."""


class Worker(Protocol):
    """A running engine process, near or far. Contents of frames go in and come out."""

    def send(self, content: bytes) -> None:
        """Queue a frame for the worker; nothing happens if it has ended."""
        ...

    async def receive(self) -> bytes | None:
        """The next frame of the worker; None when it has ended."""
        ...

    async def close(self) -> str:
        """End the worker if it runs; returns how it ended, in words."""
        ...


class Pool(Protocol):
    """Places for workers: each is a share of a machine."""

    @property
    def size(self) -> int:
        """Number of places."""
        ...

    async def start(self, place: int) -> Worker:
        """Start a worker at a place. Raises StartError."""
        ...

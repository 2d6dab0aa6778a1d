"""CUDA graphs through torch: work is captured in the stream that runs it, without a wait for the device.

``torch.cuda.graph`` would wait for the whole device and flush its allocator before every capture, so this file begins
and ends the capture itself. Only the calling thread captures: others may allocate, record and wait meanwhile.
"""

import contextlib
from collections.abc import Callable
from typing import Any

import torch

from aspec.backends.device import Replay
from aspec.io.memory import no_collections

_cuda: Any = torch.cuda  # torch gives its graphs no types


class TorchCapture:
    """Captures on torch's current device and stream, which must not be the default stream; for one thread."""

    def __init__(self) -> None:
        self._pool = _cuda.graph_pool_handle()
        self._failed: list[object] = []  # kept, because torch's allocator still asks a graph after a failed capture

    def capture(self, work: Callable[[], object]) -> Replay:
        """A function that repeats the work in its memory. Raises RuntimeError if CUDA refuses; computes nothing."""
        graph = _cuda.CUDAGraph()
        with no_collections():  # freeing may call the device, which is forbidden during a capture
            try:
                graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
                work()
                graph.capture_end()
            except BaseException:
                self._end_failed(graph)
                raise
        replay: Replay = graph.replay
        return replay

    def _end_failed(self, graph: Any) -> None:
        """End the capture in the stream and in the allocator, as far as each has begun."""
        self._failed.append(graph)
        with contextlib.suppress(RuntimeError):
            graph.capture_end()
        with contextlib.suppress(RuntimeError):  # a failed capture_end skips this
            torch._C._cuda_endAllocateToPool(_cuda.current_device(), self._pool)

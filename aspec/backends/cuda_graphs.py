"""CUDA graphs by way of torch: work captured in the stream that runs it, with nothing of the device held up.

``torch.cuda.graph`` would wait for the whole device and flush its allocator before every capture, so the capture is
begun and ended by hand. It holds for the calling thread alone: others may allocate, record and wait meanwhile.
"""

import contextlib
import gc
from collections.abc import Callable, Iterator
from typing import Any

import torch

from aspec.backends.device import Replay

_cuda: Any = torch.cuda  # torch leaves the signatures of its graphs untyped


class TorchCapture:
    """Captures on torch's current device and stream, which must be a stream of its own; one thread uses it."""

    def __init__(self) -> None:
        self._pool = _cuda.graph_pool_handle()
        self._failed: list[object] = []  # torch's allocator goes on asking a graph whose capture did not end well

    def capture(self, work: Callable[[], object]) -> Replay:
        """What repeats the work over the same memory. Raises RuntimeError where CUDA refuses; nothing is computed."""
        graph = _cuda.CUDAGraph()
        with _uncollected():
            try:
                graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
                work()
                graph.capture_end()
            except BaseException:
                self._abandon(graph)
                raise
        replay: Replay = graph.replay
        return replay

    def _abandon(self, graph: Any) -> None:
        """The stream leaves its capture and the allocator forgets it, as far as either has begun."""
        self._failed.append(graph)
        with contextlib.suppress(RuntimeError):
            graph.capture_end()
        with contextlib.suppress(RuntimeError):  # an end that fails leaves it out
            torch._C._cuda_endAllocateToPool(_cuda.current_device(), self._pool)


@contextlib.contextmanager
def _uncollected() -> Iterator[None]:
    """No garbage is collected inside: what it frees may ask the device, which a stream in capture forbids."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()

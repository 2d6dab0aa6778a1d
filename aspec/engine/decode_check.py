"""Compares the seconds of a run's decoding with the kept prices, so that one measured in a busy moment is not kept."""

from collections import defaultdict

from aspec.models.model import Model
from aspec.profiling.profile_cache import doubt_decoding
from aspec.tasks.op import Op
from aspec.tasks.task import Decoding, Span


class DecodeCheck:
    """An observer of a whole run; mutable while it goes on."""

    def __init__(self, target: Model, threads: int) -> None:
        """``threads``: that decode at the same time."""
        self._target, self._threads = target, threads
        self._made: dict[int, tuple[int, float]] = defaultdict(lambda: (0, 0.0))  # by layer: bytes, seconds

    def observe(self, span: Span) -> None:
        """Count a finished task."""
        work = span.task.payload
        if span.task.op is Op.DECODE and isinstance(work, Decoding):
            nbytes, seconds = self._made[work.layer]
            self._made[work.layer] = nbytes + work.nbytes, seconds + span.stop_s - span.start_s

    def conclude(self) -> None:
        """Drop the prices that the run contradicts."""
        doubt_decoding(self._target, self._threads, self._made)

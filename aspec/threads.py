"""Compute threads: how many serve which kind of work, and how they wait while there is none.

By default OpenMP's threads wait for the next product in a loop. Beside any other work on the machine each product then
takes as long as a time slice of the system: 6 ms in place of 0.04 for a product of 576 x 576 on two cores, one of them
busy. Passive threads take 0.07 there, and as long as looping ones on idle cores where a product takes a millisecond.
The runtime reads its variables once, while torch is imported.
"""

import os
import sys
from dataclasses import dataclass

WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME", "KMP_LIBRARY")
"""Variables that say how idle threads wait. If the user has set one of them, aspec sets none."""


@dataclass(frozen=True, slots=True)
class Threads:
    """The number of compute threads by kind of work. The last bits of a product differ between numbers."""

    decode: int = 1  # the target's passes over decoding rows and their proposals
    prefill: int = 1  # the target's passes over prompts
    draft: int = 1
    weights: int = 1  # that decode stored weights beside the target's passes, a part each

    @classmethod
    def all(cls, number: int) -> "Threads":
        """The same number for all work."""
        return cls(number, number, number, number)

    def __str__(self) -> str:
        target = f"{self.decode} thread" + "s" * (self.decode > 1)
        words = [f"{self.prefill} for prompts"] if self.prefill != self.decode else []
        words += [f"{self.draft} for the draft"] if self.draft != self.decode else []
        return ", ".join([target, *words])


def wait_passively() -> None:
    """Let the compute threads of this process sleep while they have no work; too late once torch is imported."""
    if "torch" not in sys.modules and not any(name in os.environ for name in WAITING):
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"


def asked_threads(given: int | None) -> int | None:
    """The number of threads that the user wants: the option's, or that of OMP_NUM_THREADS; None: aspec decides."""
    if given is not None:
        return given
    first = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip()  # a list is by level of nesting
    return int(first) if first.isdecimal() and int(first) else None


def num_cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1

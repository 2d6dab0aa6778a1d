"""The state of a run at one moment: an immutable record; the loop makes it, the dashboard's thread draws it."""

from dataclasses import dataclass
from enum import StrEnum

from aspec.observe.timeline import Interval
from aspec.units import format_bytes

MEASURING = "measuring this machine, once"
"""What a viewer reads in the stage ``options.MEASURE``."""


class SlotState(StrEnum):
    """The state of a slot."""

    FREE = "free"
    LOADING = "loading"
    READY = "ready"
    IN_USE = "in use"


@dataclass(frozen=True, slots=True)
class LaneView:
    """The recent work of one lane: (start, stop, bytes), and the starts of its tasks in flight."""

    name: str
    work: tuple[tuple[float, float, int], ...]
    running: tuple[float, ...] = ()

    def until(self, now_s: float) -> list[Interval]:
        """The busy intervals; tasks in flight end at ``now_s``."""
        return [(a, b) for a, b, _ in self.work] + [(a, now_s) for a in self.running]


@dataclass(frozen=True, slots=True)
class ExpertView:
    """What became of experts that are read on demand; while decoding, the prompts do not count."""

    unions: int = 0  # layers of passes, all items together
    chosen: int = 0  # experts that these touched
    missing: int = 0  # that had to be read when they were chosen
    guessed: int = 0  # read before they were chosen
    read_bytes: int = 0  # from the disk
    tokens: int = 0  # made meanwhile

    @property
    def facts(self) -> list[str]:
        """In words, the most important first."""
        held = max(0.0, 1.0 - self.missing / self.chosen)
        words = [f"{held:.0%} in memory", f"{self.chosen / self.unions:.1f} of a layer and pass"]
        words += [f"{format_bytes(self.read_bytes // self.tokens)} a token"] if self.tokens else []
        return [*words, f"{self.missing} read"] + ([f"{self.guessed} ahead of their routes"] if self.guessed else [])


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The state of a run at ``now_s``, seconds on the backend's clock."""

    now_s: float
    stage: str  # "index", "plan", "measure", "load", "prefill", "decode"
    done: int = 0  # of the stage: bytes; prompt tokens while prefilling, new tokens while decoding
    total: int = 0  # 0: unknown
    stage_s: float = 0.0  # seconds since the stage began
    lanes: tuple[LaneView, ...] = ()
    slots: tuple[tuple[SlotState, int], ...] = ()  # [slot]: (state, layer); layer -1 while free
    residency: tuple[float, ...] = ()  # [layer]: the share of its bytes that stays on the device
    experts: ExpertView | None = None  # None: none was chosen
    accepted: tuple[int, ...] = ()  # [n]: number of times that a row accepted n proposals in a round
    tokens: int = 0  # generated so far, all rows
    rounds: int = 0
    tokens_per_s: float | None = None  # over the last rounds
    tokens_per_pass: float | None = None
    held: str = ""  # the memory plan in one line
    process_bytes: int = 0  # that the process holds in memory; 0: unknown
    about: tuple[str, ...] = ()  # models, sampling and prompts, the most important first
    texts: tuple[str, ...] = ()  # [row]: the end of the text that it generated

    @property
    def counts_tokens(self) -> bool:
        """Whether ``done`` and ``total`` are tokens."""
        return self.stage in ("prefill", "decode")

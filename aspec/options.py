"""The options of an engine: one frozen record with defaults."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from aspec.errors import UserError
from aspec.plan import Workload

SPECULATION = ("auto", "chain", "tree", "off")
ATTENTION = ("auto", "device", "cpu")
NGRAM = "ngram"  # the name of the draft that needs no model
DEMO = Path(__file__).parent / "demo"  # the embedded pair: folders target and draft

Progress = Callable[[str, int, int], None]
"""Called with (stage, done, total) while an engine opens; ``total`` 0 means unknown."""


def cache_folder() -> Path:
    """Where aspec keeps what it can make again, in the user's cache folder (XDG Base Directory Specification)."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(base) if os.path.isabs(base) else Path.home() / ".cache") / "aspec"


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """How to open an engine. None means: decide from the model, the machine and measured costs."""

    target: str | Path | None = None  # folder or hub id; None: the embedded demo pair
    draft: str | Path | None = None
    device: str = "auto"
    device_memory: int | None = None  # bytes
    host_memory: int | None = None  # bytes for pinned layers and KV, behind a device's link
    resident_memory: int | None = None  # at most these bytes of layers are resident, even where more would fit
    dtype: str = "auto"
    speculation: str = "auto"  # auto, chain, tree or off
    num_draft_tokens: int | None = None  # proposals of a row in a pass: a chain's length, a tree's nodes; 0: off
    draft_depth: int | None = None  # tokens of a tree's longest path
    draft_ahead: bool = True  # trees grow for the next round while the target verifies them
    attention: str = "auto"  # auto, device, or cpu: in parallel with the other layer work, on two halves of the rows
    exact: bool | None = None  # the same bits for every draft, batch and plan; None: on where this was proved
    shared_noise: bool = True  # the draft ranks with the noise of the target's draws; False: by probability alone
    max_batch: int | None = None  # sequences served at once
    num_groups: int | None = None  # groups of rows: the draft works for one while the target verifies another
    max_context: int | None = None  # most tokens of a sequence, prompt included
    prefill_tokens: int | None = None  # most tokens of one prefill item
    reuse_prefix: bool = True  # a prompt reuses the KV of an ended sequence with the same start; False: to measure
    link_rate: float | None = None  # bytes per second; throttles the disk lane
    threads: int | None = None  # torch intra-op threads
    workload: Workload | None = None  # the expected work; if given, a search chooses the open options
    progress: Progress | None = None

    def __post_init__(self) -> None:
        counts = {
            "device_memory": (self.device_memory, 1),
            "host_memory": (self.host_memory, 1),
            "resident_memory": (self.resident_memory, 0),
            "num_draft_tokens": (self.num_draft_tokens, 0),
            "draft_depth": (self.draft_depth, 1),
            "max_batch": (self.max_batch, 1),
            "num_groups": (self.num_groups, 1),
            "max_context": (self.max_context, 2),
            "prefill_tokens": (self.prefill_tokens, 1),
            "threads": (self.threads, 1),
        }
        for name, (value, least) in counts.items():
            if value is not None and value < least:
                raise UserError(f"{name} must be at least {least}, found {value}.")
        if self.num_groups is not None and self.max_batch is not None and self.num_groups > self.max_batch:
            raise UserError(f"num_groups must be at most max_batch = {self.max_batch}, found {self.num_groups}.")
        if self.link_rate is not None and self.link_rate <= 0:
            raise UserError(f"link_rate must be a positive number of bytes per second, found {self.link_rate}.")
        if self.speculation not in SPECULATION:
            raise UserError(f"speculation must be one of {', '.join(SPECULATION)}, found {self.speculation!r}.")
        if self.attention not in ATTENTION:
            raise UserError(f"attention must be one of {', '.join(ATTENTION)}, found {self.attention!r}.")
        if self.device not in ("auto", "cpu", "cuda"):
            raise UserError(f"device must be auto, cpu or cuda, found {self.device!r}.")

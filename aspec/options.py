"""The options of an engine: one frozen record with defaults."""

import difflib
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from numbers import Integral, Real
from pathlib import Path
from typing import Any

from aspec.errors import UserError
from aspec.plan import Workload
from aspec.units import parse_bytes, parse_rate

SPECULATION = ("auto", "chain", "tree", "off")
ATTENTION = ("auto", "device", "cpu")
PRODUCTS = ("auto", "packed", "decoded")
EXPERTS = ("auto", "on-demand", "whole")
DEVICES = ("auto", "cpu", "cuda")
NGRAM = "ngram"  # the name of the draft that needs no model
SELF_DRAFT = "self:4bit"  # the name of the draft that is made from the target
NO_MODELS = (NGRAM, SELF_DRAFT)  # names of drafts that are no models of their own
DEMO = Path(__file__).parent / "demo"  # the embedded pair: folders target and draft

Progress = Callable[[str, int, int], None]
"""Called with (stage, done, total) while an engine opens; ``total`` 0 means unknown."""

MEASURE = "measure"
"""The stage in which rates of this machine and numbers of rows are found out; they are kept for later runs."""


def cache_folder() -> Path:
    """Where aspec keeps what it can make again, in the user's cache folder (XDG Base Directory Specification)."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(base) if os.path.isabs(base) else Path.home() / ".cache") / "aspec"


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """How to open an engine. None means: decide from the model, the machine and measured costs.

    Raises UserError for a value that cannot be used.
    """

    target: str | Path | None = None  # folder, GGUF file or hub id; None: the embedded demo pair
    draft: str | Path | None = None  # the same, ngram or self:4bit; None: the text itself proposes, where that is free
    adapter: str | Path | None = None  # folder or hub id of a LoRA adapter for the target
    device: str = "auto"
    device_memory: int | None = None  # bytes, or a text such as 8GiB (as for every size and rate here)
    process_memory: int | None = None  # bytes of the whole process, on a CPU; instead of device_memory
    host_memory: int | None = None  # bytes for pinned layers and KV, behind a device's link
    resident_memory: int | None = None  # at most these bytes of layers are resident, even where more would fit
    dtype: str = "auto"
    speculation: str = "auto"  # auto, chain, tree or off
    num_draft_tokens: int | None = None  # proposals of a row in a pass: a chain's length, a tree's nodes; 0: off
    draft_depth: int | None = None  # tokens of a tree's longest path
    draft_ahead: bool = True  # trees grow for the next round while the target verifies them
    attention: str = "auto"  # auto, device, or cpu: in parallel with the other layer work, on two halves of the rows
    experts: str = "auto"  # auto, on-demand: read when a router has chosen them, or whole: with their layer
    prefetch_experts: bool | None = None  # read those of a layer's last pass again while the disk rests; None: if few
    exact: bool | None = None  # the same bits for every draft, batch and plan; None: on where this was proved
    products: str = "auto"  # with 4-bit weights of the target: packed, decoded; auto: packed if stored for it
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
        for name, convert in CONVERTED.items():
            if (given := getattr(self, name)) is not None:
                object.__setattr__(self, name, convert(name, given))
        for name, least in LEAST.items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise UserError(f"{name} must be at least {least}, found {value}.")
        if self.device_memory is not None and self.process_memory is not None:
            raise UserError(
                "device_memory and process_memory were given: expected one of them; process_memory counts the "
                "interpreter and torch, too."
            )
        if self.num_groups is not None and self.max_batch is not None and self.num_groups > self.max_batch:
            raise UserError(f"num_groups must be at most max_batch = {self.max_batch}, found {self.num_groups}.")
        if self.link_rate is not None and self.link_rate <= 0:
            raise UserError(f"link_rate must be a positive number of bytes per second, found {self.link_rate}.")
        if str(self.draft).startswith("self:") and self.draft != SELF_DRAFT:
            raise UserError(f"draft {self.draft!r} is not known: expected {SELF_DRAFT} for a copy of the target.")
        for name, known in CHOICES.items():
            if getattr(self, name) not in known:
                raise UserError(f"{name} must be one of {', '.join(known)}, found {getattr(self, name)!r}.")


def engine_options(given: Mapping[str, Any], also: Iterable[str] = ()) -> EngineOptions:
    """The options of these keywords. Raises UserError for an unknown one; ``also`` are known names of the caller."""
    known = EngineOptions.__dataclass_fields__
    for name in given:
        if name not in known:
            raise UserError(f"there is no option {name!r}{suggestion(name, [*known, *also])}.")
    return EngineOptions(**given)


def suggestion(name: str, known: Iterable[str]) -> str:
    """The words that follow an unknown name: the known one that was meant, or all of them."""
    names = list(known)
    meant = ELSEWHERE.get(name) or next(iter(difflib.get_close_matches(name, names, 1)), None)
    return f". Did you mean {meant!r}?" if meant in names else f": expected one of {', '.join(names)}"


def _size(name: str, value: object) -> int:
    """A number of bytes, or a text such as 8GiB."""
    if isinstance(value, str):
        try:
            return parse_bytes(value)
        except ValueError as error:
            raise UserError(f"{name}: {error}.") from error
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, Integral) and not isinstance(value, bool):
        return int(value)
    raise UserError(f"{name} must be a whole number of bytes or a text such as '8GiB', found {value!r}.")


def _rate(name: str, value: object) -> float:
    """A number of bytes per second, or a text such as 1.5GB/s."""
    if isinstance(value, str):
        try:
            return parse_rate(value)
        except ValueError as error:
            raise UserError(f"{name}: {error}.") from error
    if isinstance(value, Real) and not isinstance(value, bool):
        return float(value)
    raise UserError(f"{name} must be a number of bytes per second or a text such as '1.5GB/s', found {value!r}.")


def _count(name: str, value: object) -> int:
    if isinstance(value, Integral) and not isinstance(value, bool):
        return int(value)
    raise UserError(f"{name} must be a whole number, found {value!r}.")


def _flag(name: str, value: object) -> bool:
    if isinstance(value, bool):
        return value
    raise UserError(f"{name} must be True or False, found {value!r}.")


def _model(name: str, value: object) -> str | Path:
    if isinstance(value, str):
        return value
    if isinstance(value, os.PathLike):
        return Path(value)
    raise UserError(
        f"{name} must be a folder, a GGUF file or a hub id, found {type(value).__name__}. Save a model with its "
        f"tokenizer into a folder first (save_pretrained), and give the folder."
    )


def _dtype(name: str, value: object) -> str:
    """A name, also of a torch.dtype."""
    return value if isinstance(value, str) else str(value).removeprefix("torch.")


LEAST = {
    "device_memory": 1,
    "process_memory": 1,
    "host_memory": 1,
    "resident_memory": 0,
    "num_draft_tokens": 0,
    "draft_depth": 1,
    "max_batch": 1,
    "num_groups": 1,
    "max_context": 2,
    "prefill_tokens": 1,
    "threads": 1,
}
CHOICES = {
    "speculation": SPECULATION,
    "attention": ATTENTION,
    "experts": EXPERTS,
    "products": PRODUCTS,
    "device": DEVICES,
}
CONVERTED: dict[str, Callable[[str, object], object]] = {
    "target": _model,
    "draft": _model,
    "adapter": _model,
    "dtype": _dtype,
    **dict.fromkeys(LEAST, _count),
    **dict.fromkeys(("device_memory", "process_memory", "host_memory", "resident_memory"), _size),
    **dict.fromkeys(("draft_ahead", "prefetch_experts", "exact", "shared_noise", "reuse_prefix"), _flag),
    "link_rate": _rate,
}
ELSEWHERE = {  # what neighbours call it
    "model": "target",
    "max_tokens": "max_new_tokens",
    "max_completion_tokens": "max_new_tokens",
    "max_length": "max_new_tokens",
    "n_predict": "max_new_tokens",
    "assistant_model": "draft",
    "draft_model": "draft",
    "speculative_model": "draft",
    "num_speculative_tokens": "num_draft_tokens",
    "num_assistant_tokens": "num_draft_tokens",
    "max_model_len": "max_context",
    "n_ctx": "max_context",
    "max_num_seqs": "max_batch",
    "max_memory": "device_memory",
    "n_threads": "threads",
    "torch_dtype": "dtype",
    "messages": "prompts",
    "prompt": "prompts",
}

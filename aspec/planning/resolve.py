"""From what a user asks to answers: where the models are, what proposes, on which device, in how much memory.

Asked once, when an engine or a plan is wanted: below, no floor looks for a folder, a device or free memory again.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from aspec.backends.registry import Kind, kind_of
from aspec.errors import UserError
from aspec.io import hub
from aspec.io.host_memory import available_bytes
from aspec.options import DEMO, NGRAM, EngineOptions
from aspec.plan import Speculation

MIB = 1 << 20
DEMO_BUDGET_BYTES = 14 * MIB  # below the demo target's 16 MB, so that streaming really happens
DEMO_RESIDENT_BYTES = 4 * MIB  # of its layers on a device, for the same reason
HOST_SHARE, DEVICE_SHARE = 0.7, 0.9  # of the memory that is free: the default budgets

DTYPES = {
    "auto": None,
    "bfloat16": torch.bfloat16,
    "bf16": torch.bfloat16,
    "float32": torch.float32,
    "fp32": torch.float32,
    "float16": torch.float16,
    "fp16": torch.float16,
}
"""By the name that a user gives; None: the checkpoint's own."""


@dataclass(frozen=True, slots=True)
class DraftMethod:
    """How tokens are proposed: a row of the table below."""

    shapes: tuple[Speculation, ...]  # that it can propose; empty: it proposes nothing
    has_model: bool = False  # a checkpoint of its own
    grows_ahead: bool = False  # its trees can grow on while they are verified


NO_DRAFT = DraftMethod(())
MODEL_DRAFT = DraftMethod((Speculation.CHAIN, Speculation.TREE), has_model=True, grows_ahead=True)
NGRAM_DRAFT = DraftMethod((Speculation.TREE,))  # a lookup's chain is a tree of one branch


@dataclass(frozen=True, slots=True)
class Resolved:
    """An engine's options and the answers to what they leave open; ``replace`` it for a machine that is not here."""

    options: EngineOptions  # what the user has fixed of a plan, and how the engine runs it
    target: Path
    draft: Path | None  # None: the method needs no checkpoint
    method: DraftMethod
    kind: Kind | None  # of device; None: the host's own memory
    dtype: torch.dtype | None  # None: the checkpoint's own
    exact: bool
    budget_bytes: int
    host_bytes: int | None  # for pinned layers and KV behind a device's link; None: the device is the host's memory
    resident_bytes: int | None  # of layers at most, even where more would fit


def resolve(options: EngineOptions | Resolved) -> Resolved:
    """Find the models, which fetches hub ids, and the device. Blocks; what is resolved stays as it is.

    Raises UserError where a model or a device cannot be found.
    """
    if isinstance(options, Resolved):
        return options
    method = draft_method(options)
    return _resolved(options, method, *_folders(options, method))


def revise(resolved: Resolved, **changes: Any) -> Resolved:
    """The same models under other options; the hub is not asked again."""
    options = replace(resolved.options, **changes)
    method = draft_method(options)
    assert not method.has_model or resolved.draft is not None, "a draft model is found before options are revised"
    return _resolved(options, method, resolved.target, resolved.draft if method.has_model else None)


def draft_method(options: EngineOptions) -> DraftMethod:
    """The row of the table that options mean."""
    if options.num_draft_tokens == 0 or options.speculation == "off":
        return NO_DRAFT
    if options.draft == NGRAM:
        return NGRAM_DRAFT
    return MODEL_DRAFT if options.draft is not None or options.target is None else NO_DRAFT


def _resolved(options: EngineOptions, method: DraftMethod, target: Path, draft: Path | None) -> Resolved:
    kind = kind_of(options.device)
    shows_streaming = options.target is None and options.device_memory is None and kind is not None
    return Resolved(
        options=options,
        target=target,
        draft=draft,
        method=method,
        kind=kind,
        dtype=_dtype(options.dtype),
        exact=kind is None if options.exact is None else options.exact,  # on a CPU it was proved
        budget_bytes=options.device_memory or _default_budget(options, kind),
        host_bytes=None if kind is None else options.host_memory or _host_share(),
        resident_bytes=DEMO_RESIDENT_BYTES
        if options.resident_memory is None and shows_streaming
        else options.resident_memory,
    )


def _folders(options: EngineOptions, method: DraftMethod) -> tuple[Path, Path | None]:
    """Where target and draft are; hub ids are fetched. Raises UserError where they cannot be found."""
    if options.target is None:
        if options.draft not in (None, NGRAM):
            raise UserError("--draft was given without --target: a draft serves one target; name both or neither.")
        return DEMO / "target", DEMO / "draft" if method.has_model else None
    target = hub.resolve(str(options.target), what="target")
    return target, hub.resolve(str(options.draft), what="draft") if method.has_model else None


def _dtype(name: str) -> torch.dtype | None:
    if name not in DTYPES:
        raise UserError(f"--dtype {name!r} is not known: expected one of {', '.join(DTYPES)}.")
    return DTYPES[name]


def _default_budget(options: EngineOptions, kind: Kind | None) -> int:
    """Most of the memory that is free now; for the embedded demo less than its target, to show the streaming."""
    if kind is not None:
        return int(kind.free_bytes() * DEVICE_SHARE)
    return DEMO_BUDGET_BYTES if options.target is None else _host_share()


def _host_share() -> int:
    """Of the host's memory that is free now, in bytes."""
    return int(available_bytes() * HOST_SHARE)

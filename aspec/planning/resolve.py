"""Resolves a user's options: the folders of the models, the draft method, the device, the memory budgets.

An engine or a plan resolves its options once. No code below looks for a folder, a device or free memory again.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from aspec.backends.registry import Kind, kind_of
from aspec.errors import UserError
from aspec.io import hub
from aspec.io.fetching.fetch import Fetches
from aspec.io.host_memory import available_bytes
from aspec.options import DEMO, NGRAM, EngineOptions
from aspec.plan import Speculation

MIB = 1 << 20
DEMO_BUDGET_BYTES = 14 * MIB  # less than the demo target's 16 MB, so that the demo streams
DEMO_RESIDENT_BYTES = 4 * MIB  # of the demo's layers on a device, for the same reason
HOST_SHARE, DEVICE_SHARE = 0.7, 0.9  # of the free memory: the default budgets

DTYPES = {
    "auto": None,
    "bfloat16": torch.bfloat16,
    "bf16": torch.bfloat16,
    "float32": torch.float32,
    "fp32": torch.float32,
    "float16": torch.float16,
    "fp16": torch.float16,
}
"""Name on the command line -> dtype; None: the checkpoint's own dtype."""


@dataclass(frozen=True, slots=True)
class DraftMethod:
    """How tokens are proposed. The three methods follow as constants."""

    shapes: tuple[Speculation, ...]  # of proposals; empty: no proposals
    has_model: bool = False  # the method needs a draft checkpoint
    grows_ahead: bool = False  # trees can grow while the target verifies them


NO_DRAFT = DraftMethod(())
MODEL_DRAFT = DraftMethod((Speculation.CHAIN, Speculation.TREE), has_model=True, grows_ahead=True)
NGRAM_DRAFT = DraftMethod((Speculation.TREE,))  # the chain of an n-gram lookup is a tree with one branch


@dataclass(frozen=True, slots=True)
class Resolved:
    """An engine's options and all values that follow from them. For a machine not at hand, ``replace`` fields."""

    options: EngineOptions  # the settings of the user
    target: Path
    draft: Path | None  # None: the method needs no checkpoint
    method: DraftMethod
    kind: Kind | None  # the kind of device; None: the host's own memory
    dtype: torch.dtype | None  # None: the checkpoint's own dtype
    exact: bool
    budget_bytes: int
    host_bytes: int | None  # host memory for pinned layers and KV; None: the device is the host's memory
    resident_bytes: int | None  # limit on resident layers, even if more would fit


def resolve(options: EngineOptions | Resolved, fetches: Fetches | None = None, *, weights: bool = True) -> Resolved:
    """Find the models (those of the hub are fetched) and the device. Blocks. A ``Resolved`` is returned unchanged.

    ``weights``: False for a plan; of a model on the hub it needs the headers only. Raises UserError if a model or a
    device is not found.
    """
    if isinstance(options, Resolved):
        return options
    method = draft_method(options)
    return _resolved(options, method, *_folders(options, method, fetches or Fetches(options.progress), weights))


def revise(resolved: Resolved, **changes: Any) -> Resolved:
    """The same models with changed options; the hub is not asked again."""
    options = replace(resolved.options, **changes)
    method = draft_method(options)
    assert not method.has_model or resolved.draft is not None, (
        "the new options need a draft model, and none was resolved"
    )
    return _resolved(options, method, resolved.target, resolved.draft if method.has_model else None)


def draft_method(options: EngineOptions) -> DraftMethod:
    """The draft method that the options select."""
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
        exact=kind is None if options.exact is None else options.exact,  # a CPU's default: proved there
        budget_bytes=options.device_memory or _default_budget(options, kind),
        host_bytes=None if kind is None else options.host_memory or _host_share(),
        resident_bytes=DEMO_RESIDENT_BYTES
        if options.resident_memory is None and shows_streaming
        else options.resident_memory,
    )


def _folders(options: EngineOptions, method: DraftMethod, fetches: Fetches, weights: bool) -> tuple[Path, Path | None]:
    """The folders of target and draft. Raises UserError if one is not found."""
    if options.target is None:
        if options.draft not in (None, NGRAM):
            raise UserError("--draft was given without --target: a draft belongs to one target. Give both or neither.")
        return DEMO / "target", DEMO / "draft" if method.has_model else None
    how: dict[str, Any] = {"weights": weights, "fetches": fetches}
    target = hub.resolve(str(options.target), what="target", **how)
    return target, hub.resolve(str(options.draft), what="draft", **how) if method.has_model else None


def _dtype(name: str) -> torch.dtype | None:
    if name not in DTYPES:
        raise UserError(f"--dtype {name!r} is not known: expected one of {', '.join(DTYPES)}.")
    return DTYPES[name]


def _default_budget(options: EngineOptions, kind: Kind | None) -> int:
    """Bytes: most of the free memory; for the embedded demo, less than its target needs, so that it streams."""
    if kind is not None:
        return int(kind.free_bytes() * DEVICE_SHARE)
    return DEMO_BUDGET_BYTES if options.target is None else _host_share()


def _host_share() -> int:
    """Bytes: a share of the host's free memory."""
    return int(available_bytes() * HOST_SHARE)

"""Resolves a user's options: the folders of the models, the draft method, the device, the memory budgets.

An engine or a plan resolves its options once. No code below looks for a folder, a device or free memory again.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from aspec.backends.registry import Kind, kind_of
from aspec.errors import UserError
from aspec.io import hub
from aspec.io.fetching.fetch import Fetches
from aspec.io.host_memory import available_bytes, growth_bytes, process_bytes
from aspec.models.formats.gguf.folder import folder_of
from aspec.models.weights.adapter_config import has_adapter, read_adapter_config
from aspec.options import DEMO, NGRAM, NO_MODELS, SELF_DRAFT, EngineOptions
from aspec.plan import Speculation
from aspec.preparing.self_draft import self_draft
from aspec.units import format_bytes

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
    """How tokens are proposed. The five methods follow as constants."""

    shapes: tuple[Speculation, ...]  # of proposals; empty: no proposals
    has_model: bool = False  # the method needs a draft checkpoint
    grows_ahead: bool = False  # trees can grow while the target verifies them
    agrees: bool = False  # the draft is nearly always right, so that a chain is accepted and branches are not
    if_free: bool = (
        False  # nobody asked for it: the plan is made without it, and takes it where it costs almost nothing
    )


NO_DRAFT = DraftMethod(())
MODEL_DRAFT = DraftMethod((Speculation.CHAIN, Speculation.TREE), has_model=True, grows_ahead=True)
COPY_DRAFT = replace(MODEL_DRAFT, agrees=True)
NGRAM_DRAFT = DraftMethod((Speculation.TREE,))  # the chain of an n-gram lookup is a tree with one branch
FREE_NGRAM_DRAFT = DraftMethod((Speculation.TREE,), if_free=True)


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
    asked_context: int | None = None  # the user's own max_context, which may exceed the length the target was made for
    adapter: Path | None = None  # of the target
    draft_adapter: Path | None = None

    @property
    def tokenizer(self) -> Path:
        """The folder of the target's tokenizer: an adapter may bring one of its own."""
        own = self.adapter
        return self.target if own is None or not (own / "tokenizer_config.json").is_file() else own

    @property
    def trained(self) -> Path:
        """The folder that tells the target from others: its adapter's, or its own."""
        return self.adapter or self.target


Weights = tuple[Path, Path | None]
"""The folder of a model and the folder of its adapter."""

ADAPTER = "adapter"

Find = Callable[..., Path]
"""From the name of a model to its folder, or to the one that stands for its GGUF file."""


def resolve(options: EngineOptions | Resolved, fetches: Fetches | None = None, *, weights: bool = True) -> Resolved:
    """Find the models (those of the hub are fetched) and the device. Blocks. A ``Resolved`` is returned unchanged.

    ``weights``: False for a plan; of a model on the hub it needs the headers only. Raises UserError if a model or a
    device is not found.
    """
    if isinstance(options, Resolved):
        return options
    method = draft_method(options)
    found = _folders(options, method, fetches or Fetches(options.progress), weights)
    return replace(_resolved(options, method, *found), asked_context=options.max_context)


def revise(resolved: Resolved, **changes: Any) -> Resolved:
    """The same models with changed options; the hub is not asked again."""
    options = replace(resolved.options, **changes)
    method = draft_method(options)
    assert not method.has_model or resolved.draft is not None, (
        "the new options need a draft model, and none was resolved"
    )
    draft = (resolved.draft, resolved.draft_adapter) if resolved.draft is not None and method.has_model else None
    revised = _resolved(options, method, (resolved.target, resolved.adapter), draft)
    return replace(revised, asked_context=resolved.asked_context)


def draft_method(options: EngineOptions) -> DraftMethod:
    """The draft method that the options select."""
    if options.num_draft_tokens == 0 or options.speculation == "off":
        return NO_DRAFT
    if options.draft == SELF_DRAFT:
        return COPY_DRAFT
    if options.draft != NGRAM and (options.draft is not None or options.target is None):
        return MODEL_DRAFT
    nothing_asked = options.draft is None and options.num_draft_tokens is None and options.speculation == "auto"
    return FREE_NGRAM_DRAFT if nothing_asked else NGRAM_DRAFT


def _resolved(options: EngineOptions, method: DraftMethod, target: Weights, draft: Weights | None) -> Resolved:
    kind = kind_of(options.device)
    shows_streaming = options.target is None and options.device_memory is None and kind is not None
    return Resolved(
        options=options,
        target=target[0],
        draft=None if draft is None else draft[0],
        method=method,
        kind=kind,
        dtype=_dtype(options.dtype),
        exact=kind is None if options.exact is None else options.exact,  # a CPU's default: proved there
        budget_bytes=options.device_memory or _process_budget(options, kind) or _default_budget(options, kind),
        host_bytes=None if kind is None else options.host_memory or _host_share(),
        resident_bytes=DEMO_RESIDENT_BYTES
        if options.resident_memory is None and shows_streaming
        else options.resident_memory,
        adapter=target[1],
        draft_adapter=None if draft is None else draft[1],
    )


def _folders(
    options: EngineOptions, method: DraftMethod, fetches: Fetches, weights: bool
) -> tuple[Weights, Weights | None]:
    """The folders of target and draft. Raises UserError if one is not found."""
    if options.target is None:
        for name, value in (("draft", options.draft), ("adapter", options.adapter)):
            if value not in (None, *NO_MODELS):
                raise UserError(f"--{name} was given without --target: it belongs to one target. Give both or neither.")
        draft = DEMO / "draft"
        if options.draft == SELF_DRAFT and method.has_model:
            draft = self_draft(DEMO / "target", fetches.progress, weights=weights)
        return (DEMO / "target", None), (draft, None) if method.has_model else None

    def find(name: str, *, what: str) -> Path:
        found = hub.resolve(name, what=what, weights=weights, fetches=fetches)
        if found.is_file() and what == ADAPTER:
            raise UserError(
                f"adapter {name!r} is a GGUF file: expected a folder with adapter_config.json and "
                f"adapter_model.safetensors. Give the adapter as peft saved it, before its conversion."
            )
        return folder_of(found) if found.is_file() else found

    target = _weights(find, str(options.target), "target", options.adapter)
    if options.draft == SELF_DRAFT and method.has_model:
        return target, (self_draft(target[0], fetches.progress, weights=weights), None)
    return target, _weights(find, str(options.draft), "draft") if method.has_model else None


def _weights(find: Find, name: str, what: str, adapter: str | Path | None = None) -> Weights:
    """The folders of a model and of its adapter, which may be beside the model's weights, or name the model.

    Raises UserError if one is not found, or if there are two adapters.
    """
    folder = find(name, what=what)
    if not has_adapter(folder):
        return folder, None if adapter is None else _adapter(find, str(adapter))
    if adapter is not None:
        raise UserError(
            f"{what} {name!r} holds a LoRA adapter of its own, and --adapter {adapter} is a second one. Give one of "
            f"them; to stack adapters, merge the first with peft (merge_and_unload)."
        )
    if (folder / "config.json").is_file():
        return folder, folder
    config = read_adapter_config(folder)
    if config.base is None:
        raise UserError(
            f"{config.path} names no base model: expected base_model_name_or_path, found none. Give the base as "
            f"--{what}, and the adapter with --adapter."
        )
    beside = folder / config.base  # a relative path may be relative to the adapter
    found = str(beside) if os.path.isdir(beside) else config.base
    base = find(found, what=f"the base of {what} {name!r},")
    if has_adapter(base):
        raise UserError(
            f"{config.path}: its base {config.base!r:.200} holds an adapter, too. Merge that one with peft first."
        )
    return base, folder


def _adapter(find: Find, name: str) -> Path:
    folder = find(name, what=ADAPTER)
    if not has_adapter(folder):
        raise UserError(
            f"adapter {name!r}: expected a folder with adapter_config.json and adapter_model.safetensors, found no "
            f"adapter_config.json in {folder}. Check the path."
        )
    return folder


def _dtype(name: str) -> torch.dtype | None:
    if name not in DTYPES:
        raise UserError(f"--dtype {name!r} is not known: expected one of {', '.join(DTYPES)}.")
    return DTYPES[name]


def _process_budget(options: EngineOptions, kind: Kind | None) -> int | None:
    """Bytes: the rest of --process-memory beside the interpreter and torch; None if the option was not given."""
    if options.process_memory is None:
        return None
    if kind is not None:
        raise UserError(
            f"--process-memory is for a CPU, whose device memory is the process's own; the device is {kind.name()}. "
            f"Give --device-memory and --host-memory."
        )
    own = process_bytes()
    if options.process_memory <= own:
        raise UserError(
            f"--process-memory {format_bytes(options.process_memory)} leaves nothing for a model: the interpreter and "
            f"torch take about {format_bytes(own)}. Give more than that."
        )
    return options.process_memory - own


def _default_budget(options: EngineOptions, kind: Kind | None) -> int:
    """Bytes: most of the free memory; for the embedded demo, less than its target needs, so that it streams."""
    if kind is not None:
        return int(kind.free_bytes() * DEVICE_SHARE)
    return DEMO_BUDGET_BYTES if options.target is None else _host_share()


def _host_share() -> int:
    """Bytes: a share of the host's free memory, less if the process itself needs the rest."""
    free = available_bytes()
    return max(MIB, min(int(free * HOST_SHARE), free - growth_bytes()))

"""What a model's layers need that run in two halves around their attention, found by a run on meta tensors."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig

from aspec.errors import InternalError, UnsupportedModelError
from aspec.models.attention import attend
from aspec.models.hf_compat import cache_argument
from aspec.models.kv_cache import KVCache, StepCache
from aspec.models.kv_offload import HostAttention
from aspec.models.probing.facts import ModelFacts, OffloadFacts
from aspec.models.probing.layers import build_probe
from aspec.models.probing.masks import probe_mask
from aspec.models.skeleton import find_layers
from aspec.models.split_layer import finish, project, to_host

SPLIT = "aspec-probe-split"

AttentionInterface.register(SPLIT, attend)
AttentionMaskInterface.register(SPLIT, probe_mask)


def examine_split(config: PreTrainedConfig, dtype: torch.dtype, facts: ModelFacts) -> tuple[int, int]:
    """Largest number of bytes that a split layer holds, per token of an item and per slot of its rows.

    Raises UnsupportedModelError if a layer cannot be split at its attention, for example if it attends twice.
    """
    _refuse_split(config, facts, offloaded=False)
    run = _run_split(config, dtype, facts, offloaded=False)

    def measure(num_tokens: int, num_slots: int) -> int:
        return max(nbytes for nbytes, _ in run(num_tokens, num_slots))

    least = measure(64, 128)
    return -(-(measure(128, 128) - least) // 128), -(-(measure(64, 192) - least) // 128)


def _refuse_split(config: PreTrainedConfig, facts: ModelFacts, *, offloaded: bool) -> None:
    """Raise UnsupportedModelError for layers that cannot run in two halves around an attention, or one on the host."""
    why = None
    if any(layer.mask_argument is None for layer in facts.layers):
        why = "its recurrent layers run in one piece, where their state is"
    elif facts.own_attention:
        why = "its layers attend by code of their own"
    elif offloaded and facts.selects:
        why = "its layers select what they attend to, where their indexer is"
    if why is not None:
        raise UnsupportedModelError(f"{config.model_type}: {why}. Run it with --attention device.")


def examine_offload(config: PreTrainedConfig, dtype: torch.dtype, facts: ModelFacts) -> OffloadFacts:
    """Probe a model whose layers attend with KV in host memory.

    Raises UnsupportedModelError if a layer cannot be split, or attends to tensors that the host cannot store.
    """
    _refuse_split(config, facts, offloaded=True)
    run = _run_split(config, dtype, facts, offloaded=True)
    few, many = (run(num_tokens, 128) for num_tokens in (64, 128))
    more = max(nbytes for nbytes, _ in many) - max(nbytes for nbytes, _ in few)
    attentions = [attention for _, attention in few if attention is not None]
    return OffloadFacts(
        -(-more // 128),
        tuple(attention.kv_shape for attention in attentions),
        tuple(attention.token_bytes for attention in attentions),
    )


_SplitState = tuple[int, HostAttention | None]
"""Bytes that a split layer holds before its second half, and its attention on the host, if any."""


def _run_split(
    config: PreTrainedConfig, dtype: torch.dtype, facts: ModelFacts, *, offloaded: bool
) -> Callable[[int, int], list[_SplitState]]:
    """A function of tokens and slots per row; it runs two rows through split layers on meta, returns their states."""
    model = build_probe(config, dtype, SPLIT)
    held: list[_SplitState] = []
    finished: set[object] = set()
    argument = cache_argument(model)
    for index, layer in enumerate(find_layers(model)[1]):
        layer.forward = _watch_split(layer, index, facts, held, finished)

    def run(num_tokens: int, num_slots: int) -> list[_SplitState]:
        """Rows 0 and 2 are not consecutive, so that their slots are gathered (the larger copy)."""
        held.clear()
        cache = KVCache(facts.kv_shapes, 3, num_slots, dtype, "meta", offloaded=offloaded)
        step = cache.step([0, 2], [num_slots - num_tokens] * 2, [num_tokens] * 2)
        tokens = torch.zeros(2, num_tokens, dtype=torch.long, device="meta")
        try:
            model(input_ids=tokens, position_ids=tokens, use_cache=True, **{argument: step})
        except InternalError as error:
            raise UnsupportedModelError(
                f"{config.model_type}: its attention cannot run apart from the rest of its layers: {error}. "
                f"Run it with --attention device."
            ) from error
        return list(held)

    return run


def _watch_split(
    layer: nn.Module, index: int, facts: ModelFacts, held: list[_SplitState], finished: set[object]
) -> Callable[..., object]:
    """A forward that runs the layer in two halves and appends its state between them to ``held``.

    The second half only shows whether a layer can be split, so of equal layers (``finished``) one runs it. After its
    attention a layer may fail on meta if it reads values (experts); at that time it holds no bytes.
    """
    original, own = layer.forward, facts.layers[index]
    modules = tuple((type(each), tuple(p.shape for p in each.parameters(recurse=False))) for each in layer.modules())

    def forward(hidden: torch.Tensor, *args: Any, **kwargs: Any) -> object:
        split = project(lambda: original(hidden, *args, **kwargs), hidden)
        assert split.call is not None
        _, query, _, value, *_ = split.call[0]
        step = next(given for given in (*args, *kwargs.values()) if isinstance(given, StepCache))
        if step.offloaded:
            to_host(split, step, index, own.mask, stores=own.kv is not None)
        back = query.new_empty(query.shape[0], query.shape[2], query.shape[1], value.shape[-1])
        split.output = split.host_attention.device_result if split.host_attention is not None else back
        held.append((split.nbytes, split.host_attention))
        try:
            if (own, modules) not in finished:
                finish(lambda: original(hidden, *args, **kwargs), split)
        except (InternalError, Warning):
            raise
        except Exception:
            assert split.output is None
        finished.add((own, modules))
        return facts.result(hidden)

    return forward

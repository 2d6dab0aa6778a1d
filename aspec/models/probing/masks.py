"""The masks of a probed model: which layer gets one, and which kind of mask equals a family's own rule."""

from collections.abc import Callable

import torch
from transformers import PreTrainedConfig

from aspec.models.exact.paths import MaskKind
from aspec.models.probing.noted import UnfitError
from aspec.models.state.rows import LOCAL, layer_type

SAMPLES = 4096  # pairs of positions for the comparison of a family's mask with aspec's

MaskRule = Callable[[int, int, torch.Tensor, torch.Tensor], torch.Tensor]
"""transformers' form of a mask: (row, head, query positions, key positions) -> bool, True where visible."""


def probe_mask(
    *args: object, batch_size: int, q_length: int, kv_length: int, mask_function: MaskRule, **_: object
) -> torch.Tensor:
    """The mask function of a probe: a bool mask [B, 1, T, S] on meta with its rule as an attribute."""
    mask = torch.ones(batch_size, 1, q_length, kv_length, dtype=torch.bool, device="meta")
    mask.aspec_rule = mask_function  # type: ignore[attr-defined]  # read by rule_of
    return mask


def causal(_row: int, _head: int, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """The rule of plain decoding: see ``MaskRule``."""
    return key <= query


def mask_kind(config: PreTrainedConfig, index: int, rule: MaskRule) -> MaskKind:
    """The kind of mask that equals a family's rule, compared at many pairs of positions, near edges and random."""
    text = config.get_text_config()
    if layer_type(config, index) == LOCAL:
        return MaskKind(window=text.window_size)
    window, chunk = getattr(text, "sliding_window", None), getattr(text, "attention_chunk_size", None)
    kinds = [
        MaskKind(),
        *([MaskKind(window=window)] if window else []),
        *([MaskKind(chunk=chunk)] if chunk else []),
    ]
    generator = torch.Generator().manual_seed(0)
    query = torch.randint(4 * max(window or 0, chunk or 0, 64), (SAMPLES,), generator=generator)
    near = query + torch.randint(-2, 3, (SAMPLES,), generator=generator)  # near every edge; random pairs follow
    edges = [near - shift for shift in (0, window or 0, chunk or 0)]
    key = torch.cat([*edges, torch.randint(int(query.max()) + 1, (SAMPLES,), generator=generator)]).clamp(min=0)
    query = query.repeat(len(edges) + 1)
    try:
        visible = rule(0, 0, query, key)
    except (RuntimeError, NotImplementedError):  # the rule reads a tensor on meta: use the configuration
        of_type = {"chunked_attention": MaskKind(chunk=chunk)} if chunk else {}
        if getattr(text, "use_bidirectional_attention", None) == "vision":  # it asks which tokens are images
            of_type |= {"full_attention": MaskKind(), "sliding_attention": MaskKind(window=window)}
        types = getattr(text, "layer_types", None) or []
        if index < len(types) and (kind := of_type.get(types[index])) is not None:
            return kind
        raise UnfitError("its attention mask depends on more than positions") from None
    for kind in kinds:
        if torch.equal(kind.visible(query, key), visible.expand_as(query)):
            return kind
    raise UnfitError(
        f"layer {index} attends by a rule that is neither causal, nor a sliding window of {window}, "
        f"nor chunks of {chunk}"
    )


def rule_of(value: object) -> MaskRule | None:
    """The rule of a mask that the probe made, also of a slice that covers all of it; None for other values."""
    if not isinstance(value, torch.Tensor):
        return None
    base = value if value._base is None or value.shape != value._base.shape else value._base
    rule: MaskRule | None = getattr(base, "aspec_rule", None)
    return rule

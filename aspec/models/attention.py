"""aspec's attention: grouped-query products under an explicit bool mask, softmax in fp32.

It is registered with transformers under the name "aspec", for attention and for masks: transformers gives no mask,
without a warning, to a function that has no mask function. It supports soft caps, attention sinks and value heads of
another width. On a CPU it is several times faster than masked sdpa, which repeats the keys per query head.

A step gives it what its queries see in two forms: exact steps (``KVCache.exact``) take the paths, see
``exact/attention.py``; others do where a compiled kernel is faster, and the mask elsewhere.
"""

import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import handle_torch_function, has_torch_function_unary
from transformers import AttentionInterface, AttentionMaskInterface

from aspec.models.exact.attention import MAX_GROUP_BYTES, MOST_REST, attend_by_paths, flash_bytes, tile_bytes
from aspec.models.exact.flash import MAX_COPIED_BYTES
from aspec.models.exact.paths import PIECE, Seen
from aspec.models.exact.scoring import Scoring
from aspec.models.exact.tiles import MAX_SCORE_BYTES
from aspec.models.hf_compat import sdpa_mask

NAME = "aspec"
DEVICE_SCORE_BYTES = 64 << 20
"""Bytes of fp32 scores in one block of query tokens on a device, which is faster with fewer launches."""


def attend(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | Seen,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    *,
    indices: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    **_: object,
) -> tuple[torch.Tensor, None]:
    """Attention of query [B, H, T, D] over key [B, G, S, D] and value [B, G, S, Dv]; returns [B, T, H, Dv].

    ``attention_mask``: what a step's queries see, or bool [B, 1, T, S], True where visible; every query sees a key.
    ``s_aux`` [H]: a learned logit per head that takes part in the softmax and adds no value (attention sink).
    ``indices`` [B, T, K] int: the slots that an indexer has selected for each query (DeepSeek-V3.2, arXiv 2512.02556);
    it takes a mask, not paths. ``out`` [B, T, H, Dv] receives the result; None: new memory.
    The function holds about ``temporary_bytes`` besides the result while it runs. A torch function mode can intercept
    it like torch's own functions (``split_layer.py``).
    """
    if indices is not None:
        attention_mask = _narrowed(_mask(attention_mask), indices)
    if has_torch_function_unary(query):
        arguments = (module, query, key, value, attention_mask, scaling, dropout, softcap, s_aux)
        result: tuple[torch.Tensor, None] = handle_torch_function(attend, (query,), *arguments)
        return result
    batch, heads, tokens, width = query.shape
    scoring = Scoring(width**-0.5 if scaling is None else scaling, softcap, s_aux)
    output = query.new_empty(batch, tokens, heads, value.shape[-1]) if out is None else out
    if isinstance(attention_mask, Seen) and attend_by_paths(output, query, key, value, attention_mask, scoring):
        return output, None
    mask = _mask(attention_mask)
    if scoring.plain and query.is_cpu and width == value.shape[-1]:
        mixed = scaled_dot_product_attention(
            query, key, value, mask, scale=scoring.scale, enable_gqa=heads != key.shape[1]
        )
        return output.copy_(mixed.transpose(1, 2)), None
    block = _block_tokens(batch * heads * key.shape[2], MAX_SCORE_BYTES if query.is_cpu else DEVICE_SCORE_BYTES)
    for start in range(0, tokens, block):
        stop = min(tokens, start + block)
        output[:, start:stop] = _attend_block(query[:, :, start:stop], key, value, mask[:, :, start:stop], scoring)
    return output, None


def _mask(seen: torch.Tensor | Seen) -> torch.Tensor:
    return seen.mask() if isinstance(seen, Seen) else seen


def _narrowed(mask: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """The mask without the slots that are not among ``indices``."""
    batch, _, tokens, length = mask.shape
    chosen = torch.zeros(batch, tokens, length, dtype=torch.bool, device=mask.device)
    return mask & chosen.scatter_(2, indices.long(), True)[:, None]


def temporary_bytes(batch: int, heads: int, tokens: int, length: int, max_bytes: int = MAX_SCORE_BYTES) -> int:
    """Bytes that ``attend`` holds for T = ``tokens`` and S = ``length``: scores, weights, and a cast of one of them.

    ``max_bytes``: bytes of scores in one block of query tokens.
    """
    return 3 * min(tokens, _block_tokens(batch * heads * length, max_bytes)) * batch * heads * length * 4


def temporary_bytes_exact(
    batch: int, heads: int, tokens: int, length: int, slot_bytes: int, head_bytes: int, most_tree: int
) -> int:
    """Bytes that ``attend`` holds in an exact step of ``batch`` rows with ``tokens`` tokens in total.

    ``slot_bytes``: of keys and values in one slot; ``head_bytes``: of one head's value; ``most_tree``: most tokens of
    a row's tree, whose queries have copies of their own keys. Pieces run one after another, or those of several
    rows together.
    """
    piece, tree, rest = min(tokens, PIECE), min(most_tree, PIECE), min(length, MOST_REST)
    copies = max(rest * slot_bytes, min(MAX_COPIED_BYTES, rest * tree * slot_bytes)) if tree else 0
    one = max(
        temporary_bytes(1, heads, piece, length) * 4 // 3,
        flash_bytes(heads, slot_bytes, head_bytes, piece, rest),
        flash_bytes(heads, slot_bytes, head_bytes, tree, rest) + copies,
    )
    several = max(
        flash_bytes(heads, slot_bytes, head_bytes, tokens, rest) + batch * rest * slot_bytes,
        tile_bytes(heads, slot_bytes, tokens, length) + (2 * batch - 3) * length * slot_bytes,
    )
    return max(one, min(MAX_GROUP_BYTES, several) if batch > 1 else 0) + length * slot_bytes


def _block_tokens(scores_per_token: int, max_bytes: int) -> int:
    """Number of query tokens in one block of scores."""
    return max(1, max_bytes // (scores_per_token * 4))


def _attend_block(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor, scoring: Scoring
) -> torch.Tensor:
    """One block of query tokens; returns [B, T, H, Dv]."""
    batch, heads, tokens, width = query.shape
    groups, length = key.shape[1], key.shape[2]
    shared = heads // groups
    grouped = query.reshape(batch, groups, shared * tokens, width)
    products = torch.matmul(grouped, key.transpose(-1, -2)).view(batch, groups, shared, tokens, length)
    weights = scoring.weights(products, ~mask[:, :, None])
    mixed = torch.matmul(weights.reshape(batch, groups, shared * tokens, length), value)
    return mixed.view(batch, heads, tokens, value.shape[-1]).transpose(1, 2)


AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, sdpa_mask)

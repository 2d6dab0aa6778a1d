"""Products whose bits depend on the token only, so that speculative output is bit-identical to plain decoding.

A CPU library splits a product's inner length depending on the number of rows, and computes the remainder of a width
with other instructions. So a token's last bits depend on the number of tokens in the pass. This file fixes both
sizes. ``attention.py`` and ``kv_cache.py`` do the same for attention. ``tests/test_exact.py`` checks it with one and
two threads; bits differ between thread counts, and between exact and other steps.
"""

import contextlib
from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType
from typing import Any

import torch
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from aspec.models.kv_cache import StepCache

BLOCK_ROWS = 64
"""Rows of every product of an exact step except attention's. Another number gives other last bits. Measured, CPU ms of
a pass of 1 / 16 / 64 / 256 tokens, 2 layers of 2048, fp32, 2 threads: without blocks 19 / 47 / 76 / 195, blocks of 32
rows 68 / 61 / 128 / 347, of 64 rows 66 / 85 / 103 / 267, of 128 rows 106 / 136 / 128 / 231."""

VECTOR_ELEMENTS = 64
"""Elements that one iteration of a CPU's elementwise loop computes: two vectors of 64 bytes in bf16."""


def matmul_mode(step: StepCache) -> contextlib.AbstractContextManager[object]:
    """The context in which a step's products are computed: FixedTileMatmul if the step is exact."""
    if step.exact:
        return FixedTileMatmul()
    return contextlib.nullcontext()


class FixedTileMatmul(TorchFunctionMode):
    """Computes products of activations and weights in blocks of BLOCK_ROWS rows, on the thread that enters the mode.

    In blocks of one size a token's bits depend on the token only: not on its place in the block and not on the
    other rows. ``torch.matmul`` is unchanged, because only attention uses it. Inputs of activation functions are padded
    to whole vectors, because other instructions compute the remainder of a width.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: object, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _WHOLE_VECTORS:
            return _in_whole_vectors(func, *args, **kwargs)
        handler = _IN_BLOCKS.get(func)
        return func(*args, **kwargs) if handler is None else handler(*args, **kwargs)


def _in_blocks(rows: torch.Tensor, product: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """``product`` of [..., M, K], block by block, the last block padded with zeros; returns [..., M, N]."""
    count = rows.shape[-2]
    filled = functional.pad(rows, (0, 0, 0, -count % BLOCK_ROWS))
    made = [product(block) for block in torch.split(filled, BLOCK_ROWS, -2)]
    return (made[0] if len(made) == 1 else torch.cat(made, -2)).narrow(-2, 0, count).contiguous()


def _linear(rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    flat = rows.reshape(-1, rows.shape[-1])
    return _in_blocks(flat, lambda block: functional.linear(block, weight, bias)).view(*rows.shape[:-1], -1)


def _addmm(bias: torch.Tensor, rows: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return _in_blocks(rows, lambda block: torch.addmm(bias, block, weight))


def _bmm(rows: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    return _in_blocks(rows, lambda block: torch.bmm(block, weights))


def _grouped_mm(rows: torch.Tensor, weights: torch.Tensor, offs: torch.Tensor, **options: object) -> torch.Tensor:
    """Product of experts: rows [M, K] in groups that end at ``offs`` [E], weights [E, K, N]; returns [M, N]."""
    assert not any(value is not None for value in options.values()), f"a grouped product with {options}"
    ends = offs.tolist()
    made = [
        _in_blocks(rows[start:end], partial(torch.mm, mat2=weight))
        for start, end, weight in zip([0, *ends[:-1]], ends, weights, strict=True)
        if start < end
    ]
    return torch.cat(made)


def _in_whole_vectors(func: Callable[..., torch.Tensor], values: torch.Tensor, **options: Any) -> torch.Tensor:
    """An elementwise function of ``values``, computed over whole vectors only."""
    if values.shape[-1] % VECTOR_ELEMENTS == 0:
        return func(values, **options)
    filled = functional.pad(
        values.flatten(), (0, -values.numel() % VECTOR_ELEMENTS)
    )  # torch computes a view with gaps row by row
    return func(filled, **options)[: values.numel()].view(values.shape)


_WHOLE_VECTORS = frozenset({torch.sigmoid, torch.Tensor.sigmoid, functional.silu, functional.gelu, functional.softplus})

_IN_BLOCKS: Mapping[object, Callable[..., torch.Tensor]] = MappingProxyType(
    {
        functional.linear: _linear,
        torch.addmm: _addmm,
        torch.bmm: _bmm,
        torch._grouped_mm: _grouped_mm,
    }
)

PRODUCTS = frozenset(_IN_BLOCKS)
"""The functions that multiply activations by weights."""

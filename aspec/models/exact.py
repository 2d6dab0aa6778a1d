"""Products whose bits depend on nothing but the token: what makes speculative output bit-identical to plain decoding.

A CPU library splits a product's inner length by its number of rows, and finishes an uneven width by other
instructions; so a token's last bits depend on how many others are in the pass. Here neither is left to chance. The
other half, attention in the order of a node's own path, is in ``attention.py`` and ``kv.py``. Proved at one and two
threads (``tests/test_exact.py``); bits differ between thread counts, and from steps that are not exact.
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
"""Rows of every product of an exact step but attention's: with another number, other last bits. Measured, CPU ms of a
pass of 1 / 16 / 64 / 256 tokens, 2 layers of 2048, fp32, 2 threads: without blocks 19 / 47 / 76 / 195, of 32 rows
68 / 61 / 128 / 347, of 64 rows 66 / 85 / 103 / 267, of 128 rows 106 / 136 / 128 / 231."""

VECTORS = 64
"""Elements that a CPU's elementwise loops take at a time: two vectors of 64 bytes in bf16."""


def matmul_mode(step: StepCache) -> contextlib.AbstractContextManager[object]:
    """What a step's products are computed in."""
    if step.exact:
        return FixedTileMatmul()
    return contextlib.nullcontext()


class FixedTileMatmul(TorchFunctionMode):
    """While this is entered, on this thread, activations meet weights in blocks of BLOCK_ROWS rows.

    A CPU library splits a product's inner length by its number of rows, so a token's last bits depend on how many
    others are in the pass. In a block of one size they depend on nothing but the token: not on its place in the
    block and not on its neighbours. ``torch.matmul`` is left alone: attention's own. Activation functions of an
    uneven width are filled up to whole vectors, because what is left over is computed by other instructions.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: object, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _BY_VECTORS:
            return _by_vectors(func, *args, **kwargs)
        handler = _IN_BLOCKS.get(func)
        return func(*args, **kwargs) if handler is None else handler(*args, **kwargs)


def _in_blocks(rows: torch.Tensor, product: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """``product`` of [..., M, K], block by block, the last one filled up with zeros; returns [..., M, N]."""
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
    """Experts: rows [M, K] in groups that end at ``offs`` [E], weights [E, K, N]."""
    assert not any(value is not None for value in options.values()), f"a grouped product with {options}"
    ends = offs.tolist()
    made = [
        _in_blocks(rows[start:end], partial(torch.mm, mat2=weight))
        for start, end, weight in zip([0, *ends[:-1]], ends, weights, strict=True)
        if start < end
    ]
    return torch.cat(made)


def _by_vectors(func: Callable[..., torch.Tensor], values: torch.Tensor, **options: Any) -> torch.Tensor:
    """An elementwise function over whole vectors only."""
    if values.shape[-1] % VECTORS == 0:
        return func(values, **options)
    filled = functional.pad(values.flatten(), (0, -values.numel() % VECTORS))  # a view with gaps goes row by row
    return func(filled, **options)[: values.numel()].view(values.shape)


_BY_VECTORS = frozenset({torch.sigmoid, torch.Tensor.sigmoid, functional.silu, functional.gelu, functional.softplus})

_IN_BLOCKS: Mapping[object, Callable[..., torch.Tensor]] = MappingProxyType(
    {
        functional.linear: _linear,
        torch.addmm: _addmm,
        torch.bmm: _bmm,
        torch._grouped_mm: _grouped_mm,
    }
)

PRODUCTS = frozenset(_IN_BLOCKS)
"""The functions in which activations meet weights."""

"""torch's int4 product on a CPU: its private names, and what is proved of it on this machine before it is used.

``proved_block`` multiplies a few small weights and asks: are the codes laid out as ``form.py`` says, does the product
agree with the decoded weight, and has a row the same bits beside any number of other rows? It sums every output over
its inputs one after another, so it has; a build of torch where it does not is not used.
"""

from functools import cache

import torch

from aspec.models.formats.int4.form import Int4, Int4Decode, in_blocks, pack_codes

BLOCKS = {"AVX512": 64, "AVX2": 32}
"""Rows of a block, by the instruction set for which torch chose its kernels; with others the product is slow."""

ROWS = 67  # of the proof: more than the kernel takes at once, in no multiple of them
TOLERANCE = 1e-2  # of the sum of an output's absolute terms: two roundings to bf16


def int4_product(rows: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, group: int) -> torch.Tensor:
    """Rows bf16 [M, K] times the transposed weight: bf16 [M, N], summed in fp32."""
    made: torch.Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(rows, codes, group, scales)
    return made


@cache
def proved_block() -> int | None:
    """Rows of a block of codes in this machine's product; None: there is no product that pays, or no proof."""
    block = BLOCKS.get(torch.backends.cpu.get_cpu_capability())
    try:
        proved = block is not None and all(_holds(Int4(2 * block, 512, group, block)) for group in (32, 128))
    except (RuntimeError, AttributeError):  # a build of torch without the product, or with another signature
        return None
    return block if proved else None


@torch.inference_mode()
def _holds(sizes: Int4) -> bool:
    generator = torch.Generator().manual_seed(7)
    numbers = torch.randint(16, (sizes.rows, sizes.columns), dtype=torch.uint8, generator=generator)
    codes = torch.empty(sizes.codes, dtype=torch.uint8)
    pack_codes(numbers.clone(), sizes.block, in_blocks(codes, sizes.block))
    if not torch.equal(codes, torch.ops.aten._convert_weight_to_int4pack_for_cpu(numbers.to(torch.int32), 1)):
        return False
    scales = torch.randn(sizes.scales, generator=generator).bfloat16()
    rows = torch.randn(ROWS, sizes.columns, generator=generator) * 2.0 ** torch.arange(ROWS).remainder(9)[:, None]
    rows = rows.bfloat16()
    made = int4_product(rows, codes, scales, sizes.group)
    weight, decode = torch.empty(sizes.rows, sizes.columns), Int4Decode(sizes)
    decode((codes, scales), weight, torch.empty(decode.workspace_bytes, dtype=torch.uint8))
    terms = rows.float().abs() @ weight.abs().t()
    close = bool(((made - rows.float() @ weight.t()).abs() <= TOLERANCE * terms).all())
    counts = (1, 2, 3, 4, 5, 8, 16, 33)
    return close and all(
        torch.equal(int4_product(rows[at : at + count], codes, scales, sizes.group), made[at : at + count])
        for count in counts
        for at in (0, ROWS - count)
    )

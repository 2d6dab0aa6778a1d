"""Proves on this machine which numbers of rows give equal bits, for one kind of product.

The operands cancel: every sum is tiny beside its terms, so another order of summation changes almost every output, in
bf16 too. Every number of rows up to the largest is multiplied; then the same rows at other places, beside rows of
extreme size, and at another alignment. What is not proven runs in blocks of one size (``recipe.BLOCKS``).
"""

import contextlib
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from math import inf, prod

import torch
from torch.nn import functional

from aspec.models.exact.blocks import Product, in_blocks, pack
from aspec.models.exact.recipe import BLOCKS, MOST_PACKED_BYTES, SMALL_BLOCK, Packing, Recipe, candidates, cost

SMALLEST_WEIGHT = 128 * 128
"""Elements; the blocks of smaller weights cost next to nothing, so nothing is probed."""

LARGEST_BYTES = 512 << 20
"""Of a weight; the probe of a larger one would take more memory and seconds than it is worth."""

DENSE = ((32 << 20, 64), (64 << 20, 32))
"""Up to so many bytes of a weight every number of rows up to the second number is tried; above the last, 16. It
bounds the seconds of a probe."""

LARGER, MOST_PRODUCTS = (32, 64, 128, 256, 512, 1024), 4 << 30
"""Single numbers of rows above the dense ones, and the most multiplications of one product."""

HINTS = (1, 32, 128)
"""Rows that weights are reordered for; the library derives its layout and its blocks from them."""

FASTER, TIMED = 0.9, 8  # packed weights are kept if they take at most this share of the seconds; calls of a timing
TURNS, REST_S = 2, 0.03  # of works that are compared; seconds of the first ones before each
OUTPUTS, MOST_WEIGHTS = 1024, 32  # results compared per row: narrow products are computed with several weights
HUGE, SMALL = 1e30, 1e-7  # rows beside others; a bias, which must not hide what is left of a sum
TRIED = 3  # recipes, the cheapest first, before the proof is given up


@dataclass(frozen=True, slots=True)
class ProductKind:
    """What the kernel of a product can depend on, besides its number of rows."""

    op: str  # a key of OPERATIONS
    dtype: torch.dtype
    batch: int  # products side by side; 0: rows [M, K]
    out: int
    inner: int
    transposed: bool  # the weight is stored [N, K] and not [K, N]
    bias: bool
    threads: int

    @property
    def name(self) -> str:
        """A name for files."""
        sizes = "x".join(str(size) for size in (self.batch, self.out, self.inner) if size)
        flags = ("-transposed" if self.transposed else "") + ("-bias" if self.bias else "")
        return f"{self.op}{flags}-{str(self.dtype).removeprefix('torch.')}-{sizes}-{self.threads}"

    def resized(self, out: int) -> "ProductKind":
        """The same with so many outputs."""
        return replace(self, out=out)


@torch.inference_mode()
def probe(kind: ProductKind) -> Recipe:
    """The cheapest proven recipe; takes up to about a second. Call it with ``kind.threads`` threads set."""
    elements = max(1, kind.batch) * kind.out * kind.inner
    nbytes = elements * kind.dtype.itemsize
    if elements < SMALLEST_WEIGHT or nbytes > LARGEST_BYTES or kind.dtype not in (torch.bfloat16, torch.float32):
        return BLOCKS
    dense = next((rows for limit, rows in DENSE if nbytes <= limit), 16)
    larger = [size for size in LARGER if size > dense and size * elements <= MOST_PRODUCTS]
    generator = torch.Generator().manual_seed(5)
    rows = kind_rows(max([2 * dense, *larger]), kind, generator)
    operands = [kind_operands(kind, generator) for _ in range(min(MOST_WEIGHTS, max(1, OUTPUTS // kind.out)))]
    product = side_by_side([_product(kind, *own) for own in operands])
    recipe = prove(product, rows, dense, larger)
    if kind.op == "linear" and nbytes <= MOST_PACKED_BYTES:
        recipe = replace(recipe, packing=_packing(recipe, product, rows[: 2 * dense], operands))
    return recipe


def _packing(recipe: Recipe, product: Product, rows: torch.Tensor, operands: "list[Operands]") -> Packing | None:
    """The cheapest packing whose bits are those of the recipe; None if packing would never pay."""
    most = len(rows)
    expected = in_blocks(rows, product, recipe.blocks(most))
    found: list[Packing] = []
    for hint in HINTS:
        with contextlib.suppress(RuntimeError, AttributeError):  # a build of torch without these products
            packed = side_by_side([pack(weight, bias, hint) for weight, bias in operands])
            faster = _row_seconds(packed, rows) < FASTER * _row_seconds(product, rows)
            if not faster and recipe.highest >= SMALL_BLOCK:
                break
            counts = [*range(1, most // 2 + 1), most]
            agrees = [torch.equal(packed(rows[:count]), expected[:count]) for count in counts]
            own = candidates(agrees[:-1], [(most, agrees[-1])], wanted=True)
            if own and _holds(own[0], packed, rows, expected):
                found.append(Packing(hint, own[0], faster))
            if all(agrees):
                break
    return min(found, key=lambda packing: cost(packing.recipe), default=None)


def _row_seconds(product: Product, rows: torch.Tensor) -> float:
    return least_seconds(lambda: product(rows[:1]))


def least_seconds(work: Callable[[], object], timed: int = TIMED) -> float:
    """Seconds of ``work``, the least of a few; compared only with others of the same moment."""
    seconds = []
    for _ in range(timed):
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def share_of_seconds(pairs: Iterable[tuple[Callable[[], object], Callable[[], object]]]) -> float:
    """The seconds of the first works as a share of those of the second ones: the geometric mean over all pairs.

    All first works and all second ones run in turns, each the first time for nothing: it may create kernels. Before
    them the first ones run until threads of the second ones are asleep, which wait for their next call at a core's full
    speed unless OMP_WAIT_POLICY says passive (kernels that take 0.45 took 1.1, and a recipe serves all processes).
    """
    ones, others = zip(*pairs, strict=True)
    least = dict.fromkeys((*ones, *others), inf)
    for _ in range(TURNS):
        begun = time.perf_counter()
        while time.perf_counter() < begun + REST_S:
            ones[0]()
        for work in least:
            work()
            least[work] = min(least[work], least_seconds(work, TIMED // TURNS))
    shares = [least[one] / least[other] for one, other in zip(ones, others, strict=True)]
    return prod(shares) ** (1 / len(shares))


def proves_all(product: Product, rows: torch.Tensor, dense: int, larger: list[int]) -> bool:
    """Whether a row has the same bits in every number of rows that ``prove`` tries."""
    found = prove(product, rows, dense, larger)
    return (found.lowest, found.highest, len(found.larger)) == (1, dense, len(larger))


def prove(product: Product, rows: torch.Tensor, dense: int, larger: list[int]) -> Recipe:
    """The cheapest recipe that holds for ``product``: every number of rows up to ``dense``, and the ``larger`` ones.

    ``rows`` [..., M, K], M at least the largest of these numbers.
    """
    groups: list[torch.Tensor] = []  # of equal bits: the result with the most rows

    def group(count: int) -> int:
        made = product(rows[..., :count, :])
        for index, longest in enumerate(groups):
            common = min(count, longest.shape[-2])
            if torch.equal(made[..., :common, :], longest[..., :common, :]):
                if count > common:
                    groups[index] = made
                return index
        groups.append(made)
        return len(groups) - 1

    kinds = [group(count) for count in range(1, dense + 1)]
    singles = [(count, group(count)) for count in larger]
    for recipe in candidates(kinds, singles)[:TRIED]:
        if cost(recipe) < cost(BLOCKS) and _holds(recipe, product, rows, groups[kinds[recipe.lowest - 1]]):
            return recipe
    return BLOCKS


def _holds(recipe: Recipe, product: Product, rows: torch.Tensor, expected: torch.Tensor) -> bool:
    """Whether a row has the ``expected`` bits at other places, beside extreme rows, and at another alignment."""
    lowest, highest = recipe.lowest, recipe.highest
    middle = (lowest + highest) // 2 | 1
    counts = sorted({lowest, min(lowest + 1, highest), min(middle, highest), max(highest - 1, lowest), highest})
    for count in (*counts, *recipe.larger):
        own, bits = rows[..., :count, :], expected[..., :count, :]
        orders = (own.roll(1, -2), bits.roll(1, -2)), (own.flip(-2), bits.flip(-2)), (_misaligned(own), bits)
        if not all(torch.equal(product(given), wanted) for given, wanted in orders):
            return False
    for count in counts:
        for place in {0, count // 2, count - 1}:
            beside = torch.full_like(rows[..., :count, :], HUGE)
            beside[..., place, :] = rows[..., place, :]
            if not torch.equal(product(beside)[..., place, :], expected[..., place, :]):
                return False
    return True


# -- operands ------------------------------------------------------------------------------------------------


def kind_rows(count: int, kind: ProductKind, generator: torch.Generator) -> torch.Tensor:
    """[B, M, K] or [M, K]: in two of three rows the second half repeats the first, as ``kind_operands`` orders it."""
    half, shape = kind.inner // 2, (kind.batch, count) if kind.batch else (count,)
    values = uneven((*shape, kind.inner), generator)
    cancels = torch.arange(count) % 3 < 2
    values[..., cancels, half : 2 * half] = values[..., cancels, :half].roll(7, -1)
    sizes = 2.0 ** (6 * (torch.arange(count) % 5) - 12)
    return (values * sizes[:, None]).to(kind.dtype)


Operands = tuple[torch.Tensor, torch.Tensor | None]
"""A weight [N, K], [K, N] or [B, K, N], and a bias [N] or None."""


def kind_operands(kind: ProductKind, generator: torch.Generator) -> Operands:
    """Random operands, in the order of memory that ``kind`` tells."""
    bias = (SMALL * torch.randn(kind.out, generator=generator)).to(kind.dtype) if kind.bias else None
    return _weight(kind, generator), bias


def side_by_side(products: list[Product]) -> Product:
    """The results of several products [..., M, K] -> [..., M, N], beside each other: more to compare."""
    return products[0] if len(products) == 1 else lambda rows: torch.cat([one(rows) for one in products], -1)


def _weight(kind: ProductKind, generator: torch.Generator) -> torch.Tensor:
    half, few = kind.inner // 2, min(kind.out, 61)
    base = uneven((few, kind.inner), generator)
    base[:, half : 2 * half] = -base[:, :half].roll(7, -1)
    stored = base.to(kind.dtype).repeat(-(-kind.out // few), 1)[: kind.out]  # [N, K]
    if kind.op == "linear":
        return stored.contiguous()
    memory = (stored if kind.transposed else stored.t()).contiguous()
    memory = memory.repeat(kind.batch, 1, 1) if kind.batch else memory
    return memory.transpose(-1, -2) if kind.transposed else memory


def uneven(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """Random numbers of many sizes, so that sums in fp32 are rounded at every step."""
    powers = torch.randint(-6, 7, shape, dtype=torch.int8, generator=generator)
    return torch.randn(shape, generator=generator).mul_(torch.exp2(powers))


def _product(kind: ProductKind, weight: torch.Tensor, bias: torch.Tensor | None) -> Product:
    operation = OPERATIONS[kind.op]
    return lambda rows: operation(rows, weight, bias)


def _misaligned(rows: torch.Tensor) -> torch.Tensor:
    """A copy whose memory begins one element after an aligned address."""
    memory = rows.new_empty(rows.numel() + 1)[1:].view(rows.shape)
    return memory.copy_(rows)


OPERATIONS: dict[str, Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor]] = {
    "linear": functional.linear,
    "addmm": lambda rows, weight, bias: torch.addmm(_given(bias), rows, weight),
    "mm": lambda rows, weight, bias: torch.mm(rows, weight),
    "bmm": lambda rows, weight, bias: torch.bmm(rows, weight),
}


def _given(bias: torch.Tensor | None) -> torch.Tensor:
    assert bias is not None, "addmm adds a bias"
    return bias

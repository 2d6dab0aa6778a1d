"""Products whose bits depend on the token only, so that speculative output is bit-identical to plain decoding.

A CPU library splits a product's inner length depending on the number of rows, and computes the remainder of a width
with other instructions. So a token's last bits depend on the number of tokens in the pass. Here every product uses
numbers of rows that were proven to give equal bits on this machine (``row_probe.py``), or blocks of one size. Where
they are faster, kernels of this machine (``compiled/``) compute it; without a compiler, where the processor has no
instructions for bf16, weights become fp32 panel by panel (``panels.py``). Both in all steps.
``attention.py`` and ``kv_cache.py`` do the same for attention. ``tests/test_exact.py`` checks it with one and two
threads; bits of torch's products differ between thread counts, and between exact and other steps.
"""

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional
from torch.overrides import handle_torch_function, has_torch_function_unary

from aspec.models.compiled.factor import Factor, dense_factor, int4_factor
from aspec.models.compiled.products import compile_now, dense_product, several_products
from aspec.models.exact.blocks import Product, in_blocks, pack
from aspec.models.exact.int4_panels import panel_product
from aspec.models.exact.int4_probe import FEWEST_WEIGHTS, NEVER, int4_kind, int4_product_of, panels_kind
from aspec.models.exact.known_recipes import recipe_for
from aspec.models.exact.panels import in_panels, widened
from aspec.models.exact.recipe import BLOCKS, Recipe
from aspec.models.exact.row_probe import ProductKind
from aspec.models.formats.int4.form import Int4

_thread = threading.local()  # .exact: whether this thread is in an exact step


def set_exact(exact: bool) -> None:
    """Say whether this thread is in an exact step."""
    _thread.exact = exact


class Operand(NamedTuple):
    """A weight for a kernel."""

    factor: Factor
    first: int  # the address of its numbers or codes
    second: int  # and of its scales or its bias; 0: it has none


# -- linear modules ------------------------------------------------------------------------------------------


class RoutedLinear:
    """The forward of one ``nn.Linear``: exact in an exact step, the fastest in others.

    ``packed``: its weight in the library's own order, with the same bits as the plain one, or in 4 bits; None: it is
    not packed. ``sizes``: of a weight that is bound in 4 bits.
    """

    __slots__ = ("_nothing", "_table", "packed", "recipe", "sizes")

    def __init__(self, module: nn.Linear) -> None:
        self._table = module._parameters
        self._nothing: nn.Parameter | None = None  # see ``_replace``; made once
        self.packed: PackedWeight | None = None
        self.sizes: Int4 | None = None
        self.recipe: Recipe | None = None  # of plain weights; known once it is proven

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        """[..., K] -> [..., N]. A torch function mode sees one call of ``multiply``."""
        table = self._table
        return multiply(rows, table["weight"], table["bias"], self.packed, self.recipe)  # type: ignore[arg-type]

    @property
    def weight(self) -> torch.Tensor:
        """The weight, or what stands in its place."""
        weight = self._table["weight"]
        assert weight is not None, "a linear module has a weight"
        return weight

    def operand(self, count: int) -> Operand | None:
        """What a kernel multiplies so many rows by in a step of this thread; None: another way is taken."""
        own, weight, bias = self.packed, self.weight, self._table["bias"]
        if own is not None:
            many = count >= own.from_rows and not getattr(_thread, "exact", False)
            return None if many or bias is not None else own.operand
        recipe = self.recipe
        if recipe is None or not recipe.compiled or not weight.is_contiguous() or weight.is_meta:
            return None
        factor = dense_factor(*weight.shape, biased=bias is not None)
        return Operand(factor, weight.data_ptr(), 0 if bias is None else bias.data_ptr())

    def prove(self) -> None:
        """Prove the recipe of the weight's kind now, bound or not: a probe takes memory, later there may be less."""
        weight = self.weight
        if self.sizes is not None:
            _ready(int4_kind(self.sizes, torch.get_num_threads()), self.sizes)
            _panels(self.sizes)
            return
        (out, inner), biased = weight.shape, self._table["bias"] is not None
        kind = ProductKind("linear", weight.dtype, 0, out, inner, False, biased, torch.get_num_threads())
        self.recipe = _ready(kind)

    def pack(self) -> bool:
        """Keep a packed copy of the bound weight if products with it are faster; the plain one is not read then.

        Returns whether there is one. In place of the plain weight stands a tensor of the same shape without memory,
        whose numbers are not numbers: code that reads it would be noticed.
        """
        weight, bias = self.weight, self._table["bias"]
        packing = _recipe("linear", weight, bias).packing
        if packing is None or not packing.faster:
            return False
        self.packed = PackedWeight(pack(weight, bias, packing.hint), packing.recipe)
        self._replace(weight)
        return True

    def take(self, sizes: Int4, codes: torch.Tensor, scales: torch.Tensor) -> None:
        """Multiply by this weight in 4 bits from now on, see ``formats/int4/form.py``."""
        table, weight = self._table, self.weight

        def product(rows: torch.Tensor) -> torch.Tensor:
            return biased(multiplied(rows, codes, scales, sizes))

        def in_panels(rows: torch.Tensor) -> torch.Tensor:
            return biased(panel_product(rows, codes, scales, sizes, dtype))

        def biased(made: torch.Tensor) -> torch.Tensor:
            bias = table["bias"]
            return made if bias is None else made.add_(bias)

        from_rows, dtype = _panels(sizes)
        recipe = recipe_for(int4_kind(sizes, torch.get_num_threads()))
        multiplied = int4_product_of(recipe)
        factor = int4_factor(sizes, integers=recipe.integers) if recipe.compiled else None
        operand = None if factor is None else Operand(factor, codes.data_ptr(), scales.data_ptr())
        self.packed = PackedWeight(product, recipe, in_panels, from_rows, operand)
        self._replace(weight)

    def drop(self) -> None:
        """Put the weight back on meta after ``take``."""
        weight, self.packed = self.weight, None
        self._table["weight"] = nn.Parameter(torch.empty_like(weight, device="meta"), requires_grad=False)

    def _replace(self, weight: torch.Tensor) -> None:
        """Put a tensor without memory in place of the weight."""
        if self._nothing is None:
            nothing = torch.full((1, 1), float("nan"), dtype=weight.dtype).expand(weight.shape)
            self._nothing = nn.Parameter(nothing, requires_grad=False)
        self._table["weight"] = self._nothing


@dataclass(frozen=True, slots=True)
class PackedWeight:
    """A product with a packed weight, how an exact step computes it, and what others compute for many rows."""

    product: Product
    recipe: Recipe
    of_many: Product | None = None
    from_rows: int = NEVER  # the least number of rows for ``of_many``
    operand: Operand | None = None  # of a kernel that computes it


def route(model: nn.Module) -> dict[str, RoutedLinear]:
    """Give every linear module of ``model`` a RoutedLinear, once after it is built; by the name of its weight."""
    routed = {}
    for name, module in model.named_modules():
        if type(module) is nn.Linear and module.weight.numel():  # the empty ones are of towers
            module.forward = routed[f"{name}.weight"] = RoutedLinear(module)  # type: ignore[assignment]
    return routed


def multiply(
    rows: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    packed: PackedWeight | None,
    recipe: Recipe | None,
) -> torch.Tensor:
    """``functional.linear``, exact in an exact step; ``packed`` takes the place of ``weight`` and ``bias``."""
    if has_torch_function_unary(rows):
        made: torch.Tensor = handle_torch_function(multiply, (rows,), rows, weight, bias, packed, recipe)
        return made
    exact = getattr(_thread, "exact", False)
    if packed is not None:
        flat = rows.reshape(-1, rows.shape[-1])
        if exact:
            made = _multiply(flat, packed.product, packed.recipe)
        elif packed.of_many is not None and len(flat) >= packed.from_rows:
            made = packed.of_many(flat)
        else:
            made = packed.product(flat)
        return made.view(*rows.shape[:-1], -1)
    if recipe is not None and recipe.compiled and weight.is_contiguous():
        return dense_product(rows, weight, bias)
    if exact:
        return _linear(rows, weight, bias)
    if recipe is not None and recipe.widening is not None:
        flat = rows.reshape(-1, rows.shape[-1])
        if len(flat) >= recipe.widening.from_rows:
            return _widened(flat, weight.t(), (len(flat),), bias).view(*rows.shape[:-1], -1)
    return functional.linear(rows, weight, bias)


def fastest(rows: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Rows [..., K] times a weight [N, K] as a linear module does it."""
    return multiply(rows, weight, None, None, _recipe("linear", weight))


def fastest_int4(rows: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, sizes: Int4) -> torch.Tensor:
    """Rows [M, K] times a weight of 4 bits as a step that is not exact does it."""
    from_rows, dtype = _panels(sizes)
    if len(rows) >= from_rows:
        return panel_product(rows, codes, scales, sizes, dtype)
    return exact_int4(rows, codes, scales, sizes)


def exact_int4(rows: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, sizes: Int4) -> torch.Tensor:
    """The same, as an exact step does it for numbers of rows that need no blocks."""
    recipe = recipe_for(int4_kind(sizes, torch.get_num_threads()))
    return int4_product_of(recipe)(rows, codes, scales, sizes)


def widens_experts(weights: torch.Tensor) -> bool:
    """Whether products with the weights [E, K, N] of experts are faster one by one, compiled or in panels."""
    recipe = _recipe("mm", weights[0]) if weights.is_cpu else BLOCKS
    return recipe.compiled or recipe.widening is not None


def prove_experts(weights: torch.Tensor, *, transposed: bool) -> None:
    """Prove the recipe of the products of single experts, see ``RoutedLinear.prove``.

    ``weights``: of all experts, [E, K, N], or [E, N, K] if a product takes them ``transposed``; bound or not.
    """
    first, second = weights.shape[1:]
    out, inner = (first, second) if transposed else (second, first)
    kind = ProductKind("mm", weights.dtype, 0, out, inner, transposed, False, torch.get_num_threads())
    if _ready(kind).compiled:
        compile_now(experts=True)


def expert_products(rows: torch.Tensor, counts: Sequence[int], weights: Sequence[torch.Tensor]) -> torch.Tensor:
    """Rows [M, K] in groups of ``counts``, each times the weight [K, N] of its expert: [M, N].

    In an exact step with the bits of a grouped product.
    """
    recipe = _recipe("mm", weights[0]) if weights[0].is_cpu else BLOCKS
    if recipe.compiled and all(weight.stride() == weights[0].stride() for weight in weights):
        return several_products(rows, counts, [weight.t() for weight in weights])
    made = [_expert_product(*own) for own in zip(torch.split(rows, list(counts)), weights, strict=True)]
    return made[0] if len(made) == 1 else torch.cat(made)


def _expert_product(rows: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    if getattr(_thread, "exact", False):
        return _mm(rows, weight)
    recipe = _recipe("mm", weight) if weight.is_cpu else BLOCKS
    if recipe.compiled:
        return dense_product(rows, weight.t())
    if recipe.widening is not None and len(rows) >= recipe.widening.from_rows:
        return _widened(rows, weight, (len(rows),))
    return torch.mm(rows, weight)


# -- products ------------------------------------------------------------------------------------------------


def _linear(rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """functional.linear as the recipe of its weight says."""
    flat, recipe = rows.reshape(-1, rows.shape[-1]), _recipe("linear", weight, bias)
    count = flat.shape[0]
    if recipe.compiled:
        made = dense_product(flat, weight, bias)
    elif recipe.widening is not None:
        made = _widened(flat, weight.t(), recipe.widening.recipe.blocks(count), bias)
    elif recipe.lowest <= count <= recipe.highest:
        made = functional.linear(flat, weight, bias)
    elif recipe.packing is not None and recipe.packs(count):
        made = in_blocks(flat, pack(weight, bias, recipe.packing.hint), recipe.packing.recipe.blocks(count))
    else:
        made = in_blocks(flat, lambda block: functional.linear(block, weight, bias), recipe.blocks(count))
    return made.view(*rows.shape[:-1], -1)


def _addmm(bias: torch.Tensor, rows: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return _multiply(rows, lambda block: torch.addmm(bias, block, weight), _recipe("addmm", weight, bias))


def _bmm(rows: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    return _multiply(rows, lambda block: torch.bmm(block, weights), _recipe("bmm", weights))


def grouped_product(rows: torch.Tensor, weights: torch.Tensor, offs: torch.Tensor, **options: object) -> torch.Tensor:
    """Product of experts: rows [M, K] in groups that end at ``offs`` [E], weights [E, K, N]; returns [M, N]."""
    assert not any(value is not None for value in options.values()), f"a grouped product with {options}"
    ends = offs.tolist()
    groups = [
        (end - start, weight) for start, end, weight in zip([0, *ends[:-1]], ends, weights, strict=True) if start < end
    ]
    return expert_products(rows[: ends[-1]], [count for count, _ in groups], [weight for _, weight in groups])


def _mm(rows: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    recipe = _recipe("mm", weight)
    if recipe.compiled:
        return dense_product(rows, weight.t())
    if recipe.widening is not None:
        return _widened(rows, weight, recipe.widening.recipe.blocks(len(rows)))
    return _multiply(rows, lambda block: torch.mm(block, weight), recipe)


def _widened(
    rows: torch.Tensor, weight: torch.Tensor, blocks: Sequence[int], bias: torch.Tensor | None = None
) -> torch.Tensor:
    """Rows [M, K] times a weight [K, N] in panels."""
    return in_panels(rows, weight.shape[1], widened(weight), blocks, bias)


def _multiply(rows: torch.Tensor, product: Product, recipe: Recipe) -> torch.Tensor:
    """``product`` of rows [..., M, K] as its recipe says; [..., M, N]."""
    count = rows.shape[-2]
    return product(rows) if recipe.lowest <= count <= recipe.highest else in_blocks(rows, product, recipe.blocks(count))


def _panels(sizes: Int4) -> tuple[int, torch.dtype]:
    """From how many rows on panels are faster than products with 4 bits, and the panels' dtype."""
    if sizes.rows * sizes.columns < FEWEST_WEIGHTS:
        return NEVER, torch.float32
    threads, found = torch.get_num_threads(), []
    for dtype in (torch.float32, torch.bfloat16):
        widening = recipe_for(panels_kind(sizes, dtype, threads)).widening
        found.append((NEVER if widening is None else widening.from_rows, dtype))
    return min(found, key=lambda own: own[0])


def _ready(kind: ProductKind, sizes: Int4 | None = None) -> Recipe:
    """The recipe of a kind, its kernel compiled; ``sizes``: of weights of 4 bits."""
    recipe = recipe_for(kind)
    if recipe.compiled:
        compile_now(sizes, integers=recipe.integers)
    return recipe


def _recipe(op: str, weight: torch.Tensor, bias: torch.Tensor | None = None) -> Recipe:
    """The recipe of a product with ``weight``; blocks of one size for memory in another order than probes use."""
    *_, first, second = weight.shape
    key = (op, weight.dtype, weight.shape, weight.stride(), bias is None, torch.get_num_threads(), weight.device.type)
    found = _recipes.get(key)
    if found is None:
        memory = weight.mT if weight.mT.is_contiguous() else weight
        plain = memory.is_contiguous() and weight.is_cpu and (op != "linear" or weight.is_contiguous())
        out, inner = (first, second) if op == "linear" else (second, first)
        batch = weight.shape[0] if weight.dim() == 3 else 0
        transposed = op != "linear" and memory is not weight
        kind = ProductKind(op, weight.dtype, batch, out, inner, transposed, bias is not None, key[5])
        found = _recipes[key] = recipe_for(kind) if plain else BLOCKS
    return found


_recipes: dict[object, Recipe] = {}  # by what a product can be told apart by, at once


PRODUCTS: Mapping[object, Callable[..., torch.Tensor]] = MappingProxyType(
    {
        functional.linear: _linear,
        torch.addmm: _addmm,
        torch.bmm: _bmm,
        torch._grouped_mm: grouped_product,
    }
)
"""The functions that multiply activations by weights, and how an exact step computes them."""

WHOLE_VECTORS = frozenset({torch.sigmoid, torch.Tensor.sigmoid, functional.silu, functional.gelu, functional.softplus})

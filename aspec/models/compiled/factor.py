"""The weights of products by kernels: their sizes and forms. One object for all weights that are alike."""

from dataclasses import dataclass
from functools import cache

from aspec.models.compiled.build import multiplies_pairs
from aspec.models.compiled.products import PAIRS
from aspec.models.formats.int4.form import Int4


@dataclass(frozen=True, slots=True)
class Factor:
    """The weight of a product: its sizes, and how it is multiplied."""

    outputs: int
    inner: int
    sizes: Int4 | None = None  # of 4 bits
    integers: bool = False  # they are multiplied in whole numbers
    biased: bool = False  # a weight in bf16 has a bias

    @property
    def form(self) -> str:
        """The form in which it takes rows."""
        if self.integers:
            return "quantised"
        pairs = self.sizes is None and self.inner % PAIRS == 0 and multiplies_pairs()
        return "plain" if pairs else "wide"


@cache
def dense_factor(outputs: int, inner: int, *, biased: bool) -> Factor:
    """Of weights in bf16."""
    return Factor(outputs, inner, biased=biased)


@cache
def int4_factor(sizes: Int4, *, integers: bool) -> Factor:
    """Of weights of 4 bits."""
    return Factor(sizes.rows, sizes.columns, sizes, integers)

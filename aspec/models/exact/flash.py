"""Attention to many keys that all queries see, with torch's own kernel: several times faster than separate products.

The kernel splits queries and keys into blocks, and a library multiplies these. That a query's bits do not depend on the
other queries is proven on this machine, in the way of ``row_probe.py``, for the numbers of queries that are used.
"""

import torch

from aspec.models.exact.blocks import in_blocks
from aspec.models.exact.known_recipes import recipe_for
from aspec.models.exact.recipe import BLOCKS, Recipe
from aspec.models.exact.row_probe import ProductKind, attention_product


def flash_recipe(key: torch.Tensor, value: torch.Tensor) -> Recipe | None:
    """Numbers of queries, proven for keys [B, G, S, D] and values [B, G, S, Dv]; None if the kernel cannot be used."""
    if not key.is_cpu or key.shape[-1] != value.shape[-1]:
        return None
    kind = ProductKind(
        "flash", key.dtype, key.shape[1], key.shape[-1], key.shape[-1], False, False, torch.get_num_threads()
    )
    recipe = recipe_for(kind)
    return None if recipe == BLOCKS else recipe


def attend_all(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, recipe: Recipe
) -> torch.Tensor:
    """Attention of query [H, T, D] to all of key [G, S, D] and value [G, S, D], in fp32: [H, T, D + 1].

    The last column is the logarithm of the sum of exponentials, to join the result with that of other keys.
    """
    heads, tokens, width = query.shape
    rows = query.reshape(key.shape[0], -1, width)
    made = in_blocks(rows, attention_product(key, value, scale), recipe.blocks(rows.shape[1]))
    return made.view(heads, tokens, width + 1)

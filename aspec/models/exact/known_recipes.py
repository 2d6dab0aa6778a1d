"""The recipes of this machine: proven once, then kept in the cache folder, beside the machine's profile.

One file per processor, its instruction sets, versions of torch and the compiler, and settings that change kernels. A
kind of product that is not in the file is probed now. An unreadable file counts as missing; if it cannot be written,
the next run probes. Probes time kernels, so two of them may differ: threads wait for one, and of two processes the
first decides for both.
"""

import hashlib
import os
import threading
from dataclasses import replace
from functools import cache

import torch

from aspec.io.host_info import cpu_features, host_info
from aspec.io.json_file import read_record, replace_json
from aspec.models.exact.compiled_attention import ATTENTION, probe_attention
from aspec.models.exact.compiled_probe import compiled_pays
from aspec.models.exact.flash_probe import FLASH, probe_flash
from aspec.models.exact.int4_probe import INT4, INT4_PANELS, probe_int4, probe_panels
from aspec.models.exact.recipe import BLOCKS, COMPILED, IN_INTEGERS, Packing, Recipe, Widening
from aspec.models.exact.row_probe import ProductKind, probe
from aspec.models.exact.widening_probe import probe_widening
from aspec.options import cache_folder

VERSION = 7  # of the format, and of what a proof means
SETTINGS = ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA", "MKL_CBWR", "MKL_ENABLE_INSTRUCTIONS", "ATEN_CPU_CAPABILITY")
"""Environment variables that change which kernels run."""

PROBES = {ATTENTION: probe_attention, FLASH: probe_flash, INT4: probe_int4, INT4_PANELS: probe_panels}
"""The probes of operations that are no plain products."""

KERNELS = {"compiled": COMPILED, "integers": IN_INTEGERS}
"""Recipes by the first word of their entry; the most rows follow."""

_known: dict[ProductKind, Recipe] = {}
_probing = threading.Lock()


def recipe_for(kind: ProductKind) -> Recipe:
    """The recipe of a kind of product. The first call of a machine probes it: up to about a second."""
    found = _known.get(kind)
    if found is None:
        with _probing:
            found = _known.get(kind) or _kept(kind)
            _known[kind] = found
    return found


def _kept(kind: ProductKind) -> Recipe:
    """What the file says, or a probe that it keeps."""
    file = cache_folder() / f"rows-{_machine()}.json"
    found = _recipe(read_record(file).get(kind.name))
    if found is None:
        made = PROBES.get(kind.op, _probe)(kind)
        record = read_record(file)
        found = _recipe(record.get(kind.name)) or made
        if found is made:
            replace_json(file, {**record, kind.name: _entry(made)})
    return found


def _probe(kind: ProductKind) -> Recipe:
    """Compiled or widened where that is faster, else the product as it is."""
    if compiled_pays(kind):
        return COMPILED
    widening = probe_widening(kind)
    return probe(kind) if widening is None else replace(BLOCKS, widening=widening)


@cache
def _machine() -> str:
    host = host_info()
    settings = [os.environ.get(name, "") for name in SETTINGS]
    kernels = (host.torch, host.compiler, torch.get_float32_matmul_precision())
    words = (host.cpu, cpu_features(), *kernels, *settings, str(VERSION))
    return hashlib.sha256("\n".join(words).encode()).hexdigest()[:16]


def _entry(recipe: Recipe) -> list[object]:
    for word, kernel in KERNELS.items():
        if recipe == replace(kernel, highest=recipe.highest):
            return [word, recipe.highest]
    if (wide := recipe.widening) is not None:
        return [wide.from_rows, _entry(wide.recipe)]
    packing = recipe.packing
    own = [] if packing is None else [packing.hint, packing.faster, _entry(packing.recipe)]
    return [recipe.lowest, recipe.highest, recipe.larger, own]


def _recipe(entry: object) -> Recipe | None:
    """The recipe of an entry; None if it is not one."""
    match entry:
        case [str(word), int(highest)] if word in KERNELS and highest >= 1:
            return replace(KERNELS[word], highest=highest)
        case [int(from_rows), list(own)] if from_rows >= 1:
            wide = _recipe(own)
            return wide and replace(BLOCKS, widening=Widening(wide, from_rows))
        case [int(lowest), int(highest), list(larger), []] if 1 <= lowest <= highest and _descends(larger, highest):
            return Recipe(lowest, highest, tuple(larger))
        case [int(), int(), list(), [int(hint), bool(faster), list(own)]]:
            plain, packed = _recipe([*entry[:3], []]), _recipe(own)
            return plain and packed and replace(plain, packing=Packing(hint, packed, faster))
    return None


def _descends(sizes: list[object], least: int) -> bool:
    """Whether all are whole numbers above ``least``, in descending order."""
    whole = [size for size in sizes if isinstance(size, int) and size > least]
    return len(whole) == len(sizes) and whole == sorted(set(whole), reverse=True)

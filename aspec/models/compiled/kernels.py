"""The kernels of this machine, each compiled when it is first asked for: a few tenths of a second.

What they take is said where they are written. Raises ImportError without the package that compiles.
"""

from functools import cache

from aspec.models.compiled.build import Compiled, build, has_threads, multiplies_bytes, vector_lanes


@cache
def attention(width: int, value_width: int) -> Compiled:
    """Heads of such widths, see ``attention_kernel``."""
    from aspec.models.compiled.attention import attention_kernel

    return build(attention_kernel(vector_lanes(), width, value_width, parallel=has_threads()), 7, 4)


@cache
def several(pairs: bool) -> Compiled:
    """See ``several_kernel``."""
    from aspec.models.compiled.dense import several_kernel

    return build(several_kernel(vector_lanes(), pairs=pairs, parallel=has_threads()), 4, 4)


@cache
def norm() -> Compiled:
    """See ``norm_kernel``."""
    from aspec.models.compiled.elements import norm_kernel

    return build(norm_kernel(vector_lanes(), parallel=has_threads()), 3, 5)


@cache
def gate() -> Compiled:
    """See ``gate_kernel``."""
    from aspec.models.compiled.elements import gate_kernel

    return build(gate_kernel(vector_lanes(), parallel=has_threads()), 3, 4)


@cache
def dense(pairs: bool) -> Compiled:
    """See ``dense_kernel``."""
    from aspec.models.compiled.dense import dense_kernel

    return build(dense_kernel(vector_lanes(), pairs=pairs, parallel=has_threads()), 4, 5)


@cache
def int4(block: int) -> Compiled:
    """See ``int4_kernel``."""
    from aspec.models.compiled.int4 import int4_kernel

    return build(int4_kernel(vector_lanes(), block, parallel=has_threads()), 4, 4)


@cache
def quantise() -> Compiled:
    """See ``quantise_kernel``."""
    from aspec.models.compiled.int4_integers import quantise_kernel

    return build(quantise_kernel(parallel=has_threads()), 4, 1)


@cache
def integers(block: int) -> Compiled:
    """See ``integer_kernel``."""
    from aspec.models.compiled.int4_integers import integer_kernel

    return build(integer_kernel(block, multiplies_bytes=multiplies_bytes(), parallel=has_threads()), 6, 4)


@cache
def add() -> Compiled:
    """See ``add_kernel``."""
    from aspec.models.compiled.elements import add_kernel

    return build(add_kernel(vector_lanes(), parallel=has_threads()), 3, 1)


@cache
def widen() -> Compiled:
    """See ``widen_kernel``."""
    from aspec.models.compiled.elements import widen_kernel

    return build(widen_kernel(vector_lanes(), parallel=has_threads()), 2, 1)


@cache
def rotary() -> Compiled:
    """See ``rotary_kernel``."""
    from aspec.models.compiled.elements import rotary_kernel

    return build(rotary_kernel(parallel=has_threads()), 8, 5)

"""Compiles kernels for this machine's processor, with LLVM as ``llvmlite`` brings it: an optional package.

On systems without POSIX threads a kernel runs on the calling thread.
"""

import ctypes
import os
from collections.abc import Callable
from functools import cache
from typing import Any

Compiled = Callable[..., None]
"""A compiled kernel: addresses and counts, then the number of threads. The interpreter's lock is released."""

_alive: list[Any] = []  # engines, which hold the code in memory


@cache
def vector_lanes() -> int:
    """Numbers in fp32 of a vector register. Raises ImportError without the package."""
    from llvmlite import binding

    features = binding.get_host_cpu_features()
    return 16 if features.get("avx512f") else 8 if features.get("avx") else 4


@cache
def multiplies_pairs() -> bool:
    """Whether the processor adds products of two neighbours in bf16 at once, in vectors of 16."""
    from llvmlite import binding

    return bool(binding.get_host_cpu_features().get("avx512bf16"))


@cache
def multiplies_bytes() -> bool:
    """Whether the processor adds products of four bytes at once, in vectors of 8."""
    from llvmlite import binding

    features = binding.get_host_cpu_features()
    return bool(features.get("avx512vnni") and features.get("avx512vl"))


@cache
def multiplies_integers() -> bool:
    """Whether the processor has the instructions of ``compiled/int4_integers.py``."""
    from llvmlite import binding

    return bool(binding.get_host_cpu_features().get("avx2"))


@cache
def has_threads() -> bool:
    """Whether this system has threads for kernels, see ``team.py``; they are made known to the compiler."""
    from llvmlite import binding

    from aspec.models.compiled.emit import SHARE
    from aspec.models.compiled.team import team

    if os.name != "posix":
        return False
    engine = _compiled(team())
    prepare = ctypes.CFUNCTYPE(None)(engine.get_function_address("prepare"))
    prepare()
    os.register_at_fork(after_in_child=prepare)
    binding.add_symbol(SHARE, engine.get_function_address(SHARE))
    engine.detach()  # its threads run until the process ends: their code must stay
    return True


def build(text: str, pointers: int, counts: int) -> Compiled:
    """Compile a kernel of ``emit.py``: a few tenths of a second. Raises RuntimeError if LLVM refuses it."""
    engine = _compiled(text)
    kinds = [*(ctypes.c_void_p,) * pointers, *(ctypes.c_int64,) * counts, ctypes.c_int32]
    _alive.append(engine)
    return ctypes.CFUNCTYPE(None, *kinds)(engine.get_function_address("run"))


def _compiled(text: str) -> Any:
    from llvmlite import binding

    binding.initialize_native_target()
    binding.initialize_native_asmprinter()
    module = binding.parse_assembly(text)
    module.verify()
    features = binding.get_host_cpu_features().flatten()
    machine = binding.Target.from_default_triple().create_target_machine(
        cpu=binding.get_host_cpu_name(), features=features, opt=3
    )
    engine = binding.create_mcjit_compiler(module, machine)
    engine.finalize_object()
    return engine

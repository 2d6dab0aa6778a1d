"""Compiles kernels for this machine's processor, with LLVM as ``llvmlite`` brings it: an optional package.

Threads are those of the OpenMP runtime that torch has loaded. Without one a kernel runs on the calling thread.
"""

import ctypes
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

ENTRY = ("GOMP_parallel", "omp_get_thread_num", "omp_get_num_threads")
"""What a kernel calls of the runtime."""

Compiled = Callable[..., None]
"""A compiled kernel: addresses and counts, then the number of threads. The interpreter's lock is released."""

_alive: list[Any] = []  # what holds the code in memory


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
    """Whether the process has loaded an OpenMP runtime for kernels; its functions are made known to the compiler."""
    from llvmlite import binding

    found = _runtime()
    if found is None:
        return False
    for name in ENTRY:
        address = ctypes.cast(getattr(found, name), ctypes.c_void_p).value
        binding.add_symbol(name, address)
    return True


def _runtime() -> ctypes.CDLL | None:
    """The runtime that is loaded already: another one would have threads of its own."""
    try:
        lines = Path("/proc/self/maps").read_text(encoding="utf-8").splitlines()
    except OSError:  # another system than Linux
        return None
    files = {line.split(maxsplit=5)[-1] for line in lines if "omp" in line.rpartition("/")[2]}
    for file in sorted(files):
        try:
            library = ctypes.CDLL(file)
        except OSError:
            continue
        if all(hasattr(library, name) for name in ENTRY):
            return library
    return None


def build(text: str, pointers: int, counts: int) -> Compiled:
    """Compile a kernel of ``emit.py``: a few tenths of a second. Raises RuntimeError if LLVM refuses it."""
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
    _alive.append((engine, module))
    kinds = [*(ctypes.c_void_p,) * pointers, *(ctypes.c_int64,) * counts, ctypes.c_int32]
    return ctypes.CFUNCTYPE(None, *kinds)(engine.get_function_address("run"))

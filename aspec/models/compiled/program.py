"""Several kernels in one call: a program is a list of calls, whose arguments are numbers that change from run to run.

The interpreter's own work for a kernel takes as long as the kernel where weights are small. So a layer is one call.
"""

import ctypes
from collections.abc import Callable, Sequence
from functools import cache

import numpy as np
from llvmlite import ir

from aspec.models.compiled.build import build
from aspec.models.compiled.emit import I32, I64, VOID, Loop, number

MOST_ARGUMENTS = 14  # of a kernel, the number of threads included
RECORD = 1 + MOST_ARGUMENTS  # numbers of a call: the kernel's address, then its arguments

Argument = int | tuple[str, int]
"""A number, or a name and a number that is added to the name's value."""

Kernel = Callable[..., None]
"""What ``build`` returns."""


class Program:
    """Calls of kernels, one after another."""

    def __init__(self, names: Sequence[str]) -> None:
        """``names``: of the values that are known when it runs."""
        self._places = {name: place for place, name in enumerate(names, 1)}  # 0: no value
        self._added: list[list[int]] = []
        self._values: list[list[int]] = []

    def call(self, kernel: Kernel, *arguments: Argument) -> None:
        """Add a call; raises ValueError for too many arguments."""
        if len(arguments) > MOST_ARGUMENTS:
            raise ValueError(f"a kernel takes at most {MOST_ARGUMENTS} arguments, found {len(arguments)}")
        address = ctypes.cast(kernel, ctypes.c_void_p).value  # type: ignore[arg-type]
        parts = [("", own) if isinstance(own, int) else own for own in (address or 0, *arguments)]
        parts += [("", 0)] * (RECORD - len(parts))
        self._values.append([self._places[name] if name else 0 for name, _ in parts])
        self._added.append([added for _, added in parts])

    def ready(self) -> Callable[[Sequence[int]], None]:
        """A function that runs all calls with the values of the names, in their order."""
        count, run = len(self._added), _script()
        added, places = (np.array(own, dtype=np.int64).ravel() for own in (self._added, self._values))

        def start(values: Sequence[int]) -> None:
            records = np.array((0, *values), dtype=np.int64)[places]
            records += added
            run(records.ctypes.data, count, 1)

        return start


def script() -> str:
    """``run(records, count, threads)``: so many calls, see ``RECORD``.

    Numbers and addresses are passed alike, so one type of function serves all kernels; they read the arguments that
    they have, of the last one its lower half.
    """
    module = ir.Module()
    run = ir.Function(module, ir.FunctionType(VOID, [I64.as_pointer(), I64, I32]), "run")
    build_ = ir.IRBuilder(run.append_basic_block())
    records, count, _ = run.args
    called = ir.FunctionType(VOID, [I64] * MOST_ARGUMENTS).as_pointer()
    with Loop(build_, number(0), count, number(1), ()) as calls:
        start = build_.mul(calls.index, number(RECORD))
        kernel, *given = (build_.load(build_.gep(records, [build_.add(start, number(at))])) for at in range(RECORD))
        build_.call(build_.inttoptr(kernel, called), given)
    build_.ret_void()
    return str(module)


@cache
def _script() -> Kernel:
    return build(script(), 1, 1)

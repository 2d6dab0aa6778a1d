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
        self._places = {name: place for place, name in enumerate(("", *names))}
        self._calls: list[list[tuple[int, int]]] = []  # for each argument the place of a value, and what is added to it

    def call(self, kernel: Kernel, *arguments: Argument) -> None:
        """Add a call; raises ValueError for too many arguments."""
        if len(arguments) > MOST_ARGUMENTS:
            raise ValueError(f"a kernel takes at most {MOST_ARGUMENTS} arguments, found {len(arguments)}")
        address = ctypes.cast(kernel, ctypes.c_void_p).value or 0  # type: ignore[arg-type]
        named = [("", own) if isinstance(own, int) else own for own in (address, *arguments)]
        named += [("", 0)] * (RECORD - len(named))
        self._calls.append([(self._places[name], added) for name, added in named])

    def ready(self) -> Callable[[int], None]:
        """A function that runs all calls. It is given the address of int64 values: a zero, then those of the names."""
        calls, run, count = np.array(self._calls, dtype=np.int64), _script(), len(self._calls)
        address = calls.ctypes.data

        def start(values: int) -> None:
            run(address, values, count, 1)

        start.calls = calls  # type: ignore[attr-defined]  # whose memory is read
        return start


def script() -> str:
    """``run(calls, values, count, threads)``: so many calls, for each RECORD pairs: a value's place, and what is added.

    Numbers and addresses are passed alike, so one type of function serves all kernels; they read the arguments that
    they have, of the last one its lower half.
    """
    module = ir.Module()
    run = ir.Function(module, ir.FunctionType(VOID, [I64.as_pointer(), I64.as_pointer(), I64, I32]), "run")
    write = ir.IRBuilder(run.append_basic_block())
    calls, values, count, _ = run.args
    called = ir.FunctionType(VOID, [I64] * MOST_ARGUMENTS).as_pointer()
    with Loop(write, number(0), count, number(1), ()) as each:
        start, given = write.mul(each.index, number(2 * RECORD)), []
        for at in range(RECORD):
            place, added = (write.load(write.gep(calls, [write.add(start, number(2 * at + own))])) for own in range(2))
            given.append(write.add(write.load(write.gep(values, [place])), added))
        write.call(write.inttoptr(given[0], called), given[1:])
    write.ret_void()
    return str(module)


@cache
def _script() -> Kernel:
    return build(script(), 2, 1)

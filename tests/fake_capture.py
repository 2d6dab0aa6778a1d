"""A capture without a device: the operators of some work with the very tensors they had, repeated without Python.

What was an int or a slice while it was recorded stays what it was, and what a replay leaves in memory of its own is
spoilt behind it: other graphs share that memory.
"""

from dataclasses import dataclass

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

aten = torch.ops.aten
REFUSED = {
    aten._local_scalar_dense,
    aten.nonzero,
    aten.masked_select,
    aten._unique2,
    aten.bincount,
    aten.repeat_interleave,
    aten.equal,
    aten.lift_fresh,
}
READS = {torch.Tensor.tolist, torch.Tensor.numpy, torch.Tensor.item, torch.Tensor.__bool__, torch.Tensor.__int__}


class CaptureError(RuntimeError):
    """What a device would raise."""


def tensors(values):
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, torch.Tensor)]


def memory(tensor):
    return tensor.untyped_storage().data_ptr()


@dataclass
class Kernel:
    func: object
    args: tuple
    kwargs: dict
    made: list  # its result, where it was when it was recorded

    def run(self):
        for old, new in zip(self.made, tensors(self.func(*self.args, **self.kwargs)), strict=True):
            if memory(old) != memory(new):
                assert old.shape == new.shape
                old.copy_(new)


class Recorder(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.kernels = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        with self:
            made = func.decompose(*args, **kwargs)
        if made is not NotImplemented:
            return made
        indices = tensors(args[1]) if func.overloadpacket in (aten.index, aten.index_put, aten.index_put_) else []
        if func.overloadpacket in REFUSED or any(index.dtype == torch.bool for index in indices):
            raise CaptureError(f"{func} while a stream is capturing")
        made = func(*args, **kwargs)
        self.kernels.append(Kernel(func, args, kwargs, tensors(made)))
        return made


class NoReads(TorchFunctionMode):
    """On a CPU these reach no operator."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in READS:
            raise CaptureError(f"{func} while a stream is capturing")
        return func(*args, **(kwargs or {}))


class FakeCapture:
    """Counts what it records and what is repeated."""

    def __init__(self):
        self.captures = self.replays = 0

    def capture(self, work):
        recorder = Recorder()
        with NoReads(), recorder:
            work()
        self.captures += 1
        kernels = recorder.kernels
        own = own_memory(kernels)

        def replay():
            self.replays += 1
            for kernel in kernels:
                kernel.run()
            spoil(own)

        spoil(own)
        return replay


def own_memory(kernels):
    """What was made while it was recorded: every storage once, as bytes."""
    known, own = set(), {}
    for kernel in kernels:
        known |= {memory(tensor) for tensor in tensors((kernel.args, kernel.kwargs)) if memory(tensor) not in own}
        for tensor in kernel.made:
            if memory(tensor) not in known and tensor.numel():
                own[memory(tensor)] = torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())
    return list(own.values())


def spoil(storages):
    """NaN in every float type."""
    for storage in storages:
        storage.fill_(255)

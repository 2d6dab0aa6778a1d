"""The most that tensors hold while some work runs: what a pool of memory must have."""

import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Peak(TorchDispatchMode):
    """Counts what is made inside; what was there before counts for nothing."""

    def __init__(self):
        super().__init__()
        self.live = self.nbytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        with self:
            made = func.decompose(*args, **kwargs)
        if made is not NotImplemented:
            return made
        made = func(*args, **kwargs)
        given = {leaf.untyped_storage().data_ptr() for leaf in tree_leaves((args, kwargs)) if torch.is_tensor(leaf)}
        for leaf in tree_leaves(made):
            if torch.is_tensor(leaf) and leaf.numel() and leaf.untyped_storage().data_ptr() not in given:
                storage = leaf.untyped_storage()
                self.live += storage.nbytes()
                self.nbytes = max(self.nbytes, self.live)
                weakref.finalize(storage, self._freed, storage.nbytes())
        return made

    def _freed(self, nbytes):
        self.live -= nbytes

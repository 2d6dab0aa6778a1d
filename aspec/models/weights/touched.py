"""Which tensors of a model does a run use? Text never enters the towers of images and sounds.

A run on meta tensors shows it: every function of torch that makes a tensor is watched for parameters among its
arguments. The inside of the decoder layers is not asked, because a probe stops them at their attention.
"""

from collections.abc import Callable, Mapping, Sequence, Set
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel

from aspec.models.hf_compat import tied_weights


class TensorWatch(TorchFunctionMode):
    """Collects the tensors that functions of torch compute with while it is active; mutable while it is."""

    def __init__(self) -> None:
        super().__init__()
        self._used: set[int] = set()  # identities; those of parameters stay theirs, because the model lives on

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Run the function. A result without a tensor, such as a shape or a dtype, depends on no value."""
        kwargs = dict(kwargs or {})
        result = func(*args, **kwargs)
        if any(isinstance(leaf, torch.Tensor) for leaf in tree_leaves(result)):
            self.note(args, kwargs)
        return result

    def note(self, *values: object) -> None:
        """Count the tensors in these values as used."""
        self._used |= {id(leaf) for leaf in tree_leaves(values) if isinstance(leaf, torch.Tensor)}

    def unused(self, model: PreTrainedModel, layers: str) -> frozenset[str]:
        """Names of the parameters and buffers that are not used; ``layers`` names a list of modules that use theirs.

        Of tied names, all are used if one is: a checkpoint may store any of them.
        """
        everything = (model.named_parameters, model.named_buffers)
        tensors = [found for named in everything for found in named(remove_duplicate=False)]
        used = self._used | {id(tensor) for name, tensor in tensors if name.startswith(f"{layers}.")}
        unused = {name for name, tensor in tensors if id(tensor) not in used}
        sources = tied_weights(model)
        kept = {sources.get(name, name) for name in sources.keys() | set(sources.values()) if name not in unused}
        return frozenset(name for name in unused if sources.get(name, name) not in kept)


def give_up(model: nn.Module, names: Set[str], device: torch.device) -> None:
    """Replace parameters that are not used by empty ones on ``device``, because a model asks its first for a device."""
    for name in names:
        path, _, last = name.rpartition(".")
        table = model.get_submodule(path)._parameters
        if (own := table.get(last)) is not None:
            table[last] = nn.Parameter(torch.empty(0, dtype=own.dtype, device=device), requires_grad=False)


def same_memory(first: torch.Tensor, second: torch.Tensor) -> bool:
    """Whether two tensors are the same view of the same memory; works on meta too."""
    return (
        first.untyped_storage()._cdata == second.untyped_storage()._cdata
        and first.storage_offset() == second.storage_offset()
        and first.shape == second.shape
        and first.stride() == second.stride()
    )

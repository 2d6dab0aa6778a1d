"""Which weights of a checkpoint are quantised, and the piece that quantises one.

The matrices of linear layers in the decoder layers are, and those of routed experts: stored one by one, or in one
tensor, if the form has such. Kept are embeddings, the head, norms, biases, routers, and what does not fit the form.
"""

import re
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from aspec.errors import UserError
from aspec.io.checkpoint import TensorRef
from aspec.models.formats.packed import PackedWeight, StoredWeight, methods_of
from aspec.models.weights.parts import REST, as_tensor, layer_of
from aspec.models.weights.tensor_map import CASTABLE, Entry
from aspec.preparing.forms import CompressedTensors, ProductForm, StoredForm
from aspec.preparing.pieces import NewTensor, Piece, Reader
from aspec.preparing.source import Source

PRODUCT_BITS = 4  # torch has products with such weights
DEFAULT_GROUP = 32
SUFFIX = ".weight"
ROUTER = re.compile(r"(^|\.)(gate|router|shared_expert_gate)$")  # a module; a wrong route costs more than its bytes
TILE = 1 << 18  # weights that are rounded at once: what is computed of them stays in the cache


@dataclass(slots=True)
class Quantised:
    """A weight in fewer bits. Mutable: it keeps its tensors until the last one is written."""

    ref: TensorRef
    form: StoredForm
    module: str
    group: int
    _made: list[torch.Tensor | None] = field(default_factory=list)

    @property
    def tensors(self) -> tuple[NewTensor, ...]:
        """See ``Piece``."""
        rows, columns = self.ref.shape
        return self.form.tensors(self.module, rows, columns)

    def data(self, index: int, reader: Reader) -> Iterator[memoryview]:
        """See ``Piece``."""
        if not self._made:
            self._made = list(self.make(reader))
        made, self._made[index] = self._made[index], None
        assert made is not None, "each tensor is written once"
        if all(own is None for own in self._made):
            self._made = []
        yield _bytes(made)

    def make(self, reader: Reader) -> Sequence[torch.Tensor]:
        """The contents of the tensors."""
        rows, columns = self.ref.shape
        groups, round_groups = columns // self.group, self.form.rounding
        codes = torch.empty(rows, columns, dtype=torch.uint8)
        scales, offsets = torch.empty(rows, groups), torch.empty(rows, groups)
        row_bytes, at = columns * self.ref.dtype.itemsize, 0
        tile = max(1, TILE // columns)
        for chunk in reader.chunks(self.ref.file, self.ref.offset, self.ref.nbytes, tile * row_bytes):
            stored = as_tensor(chunk).clone().view(self.ref.dtype)
            own = slice(at, at + stored.numel() // columns)
            made, scale, offset = round_groups(stored.float().view(-1, groups, self.group))
            codes[own] = made.view(-1, columns).to(torch.uint8)
            scales[own], offsets[own] = scale[..., 0], offset[..., 0]
            at = own.stop
        return self.form.store(codes, scales, offsets)


@dataclass(slots=True)
class QuantisedExperts:
    """The matrices [E, N, K] of all experts of a layer, of which one at a time is in memory.

    Mutable: the first tensor is written matrix by matrix, and what the others hold of each is kept until then.
    """

    matrices: tuple[Quantised, ...]
    _rest: list[Sequence[torch.Tensor]] = field(default_factory=list)  # by matrix

    @property
    def tensors(self) -> tuple[NewTensor, ...]:
        """See ``Piece``."""
        own, number = self.matrices[0].tensors, len(self.matrices)
        return tuple(NewTensor(tensor.name, tensor.dtype, (number, *tensor.shape)) for tensor in own)

    def data(self, index: int, reader: Reader) -> Iterator[memoryview]:
        """See ``Piece``."""
        if index == 0:
            self._rest = []
            for matrix in self.matrices:
                first, *others = matrix.make(reader)
                self._rest.append(others)
                yield _bytes(first)
            return
        for rest in self._rest:
            yield _bytes(rest[index - 1])


def _bytes(made: torch.Tensor) -> memoryview:
    array: Any = made.contiguous().view(torch.uint8).flatten().numpy()
    return memoryview(array)


@dataclass(slots=True)
class Quantiser:
    """Chooses the weights to quantise; mutable, because it notes what it has chosen."""

    source: Source
    form: StoredForm
    group: int
    linears: Set[str]  # the weights of linear modules
    num_weights: int = 0
    nbytes: int = 0  # of these weights as they were stored
    kept: dict[str, None] = field(default_factory=dict)  # modules of linear layers whose weights stay

    def __call__(self, weight: StoredWeight, entry: Entry) -> Piece | None:
        """The piece of a weight; None: it is copied."""
        if isinstance(weight, TensorRef) and len(weight.shape) == 3 and self._is_experts(weight, entry):
            self._note(weight)
            each = (weight.cut(index) for index in range(weight.shape[0]))
            return QuantisedExperts(
                tuple(Quantised(replace(own, shape=own.shape[1:]), self.form, weight.name, self.group) for own in each)
            )
        if not isinstance(weight, TensorRef) or not weight.name.endswith(SUFFIX) or len(weight.shape) != 2:
            return None
        module = weight.name.removesuffix(SUFFIX)
        if not self._is_chosen(weight, entry, module):
            self.kept[module] = None
            return None
        self._note(weight)
        return Quantised(weight, self.form, module, self.group)

    def _note(self, weight: TensorRef) -> None:
        self.num_weights, self.nbytes = self.num_weights + 1, self.nbytes + weight.nbytes

    def _is_experts(self, weight: TensorRef, entry: Entry) -> bool:
        """Whether a tensor holds the matrices of all experts of a layer as the model has them, and fits the form."""
        shapes = [tuple(shape) for shape, _ in entry.outputs.values()]
        alone = entry.converter is None and shapes == [weight.shape]
        return self.form.takes_experts and alone and self._fits(weight, entry)

    def _is_chosen(self, weight: TensorRef, entry: Entry, module: str) -> bool:
        """Whether a matrix is of a linear layer, or of an expert, in a decoder layer, and fits the form."""
        shapes = [shape for shape, _ in entry.outputs.values()]
        chosen = all(name in self.linears or len(shape) == 3 for name, shape in zip(entry.outputs, shapes, strict=True))
        return chosen and self._fits(weight, entry) and not ROUTER.search(module)

    def _fits(self, weight: TensorRef, entry: Entry) -> bool:
        """Whether a weight is in a decoder layer, in a dtype and of a shape that can be quantised."""
        *_, rows, columns = weight.shape
        fits = rows % self.form.multiple == 0 and columns % self.group == 0 and rows * columns > 0
        inner = layer_of(entry.name, self.source.layers) != REST
        return inner and fits and weight.dtype in CASTABLE

    def config(self) -> Mapping[str, object]:
        """The config.json of the quantised checkpoint. Raises UserError if no weight can be quantised."""
        if not self.num_weights:
            raise UserError(
                f"{self.source.folder} has no weights to quantise: expected matrices of linear layers with inputs in "
                f"groups of {self.group} and outputs in multiples of {self.form.multiple}, found none."
            )
        settings: dict[str, Any] = self.form.settings(list(self.kept | dict.fromkeys(_head(self.source))))
        return {**self.source.config, "quantization_config": settings}


def quantiser(source: Source, bits: int, group: int | None, *, published: bool) -> Quantiser:
    """A quantiser of a checkpoint of plain weights. Raises UserError if some are packed.

    ``published``: in a form that other programs read, too.
    """
    packed = [own for entry in source.tensors.entries for own, _ in entry.sources if isinstance(own, PackedWeight)]
    if packed:
        raise UserError(
            f"{source.folder} is quantised already ({', '.join(methods_of(packed)[:2])}): expected weights in bf16, "
            f"fp16 or fp32. Take the checkpoint that it was made from."
        )
    stored = {ref.dtype for entry in source.tensors.entries for ref in entry.refs}
    dtype = torch.float16 if stored == {torch.float16} else torch.bfloat16
    group = group or DEFAULT_GROUP
    published = published or bits != PRODUCT_BITS
    form = CompressedTensors(bits, group, dtype) if published else ProductForm.of_this_machine(group)
    return Quantiser(source, form, group, set(source.linears))


def _head(source: Source) -> list[str]:
    """The name of the head's module."""
    head = source.model.get_output_embeddings()
    return [name for name, own in source.model.named_modules() if own is head]

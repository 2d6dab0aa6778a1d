"""Captures draft steps once and replays them: a GPU runs a small model faster than Python can launch it.

A captured step repeats its kernels over the same memory, so only data differs from step to step: token ids, positions,
slots, trees. One copy brings them into the step's own inputs; the graph makes the masks from them. Steps are rounded
up to a few shapes. A shape is captured when it recurs, in the stream that runs it; the least recently used one is
dropped. If a model cannot be captured, one warning is given and all its steps run eagerly from then on.
All captured steps share one memory pool: nothing in it outlives a replay, because the logits are copied out of it.
"""

import warnings
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from math import gcd

import torch

from aspec.backends.device import Capture, Replay
from aspec.models.attention import temporary_bytes
from aspec.models.exact.paths import MaskKind
from aspec.models.exact.trees import TreeNodes
from aspec.models.hf_compat import Cache
from aspec.models.kv_cache import KVCache, StepCache
from aspec.models.model import Model
from aspec.speculation.capture_check import RefusedError, warm_up

MAX_COLUMNS = 32
"""Most tokens per row in a captured step, as in a tree level. Prompts are longer; launches do not limit them."""

MAX_TOKENS = 256
"""Most tokens of a captured step, all rows together."""

MIN_LENGTH, MIN_NODES = 256, 64
"""Fewest slots and nodes of a captured step; smaller steps are rounded up."""

ROW_STEPS = 8
"""Both ends of a span of rows are rounded to 1 / ROW_STEPS of its size, so most changes of rows keep the shape."""

MAX_GRAPHS = 32
"""Most captured steps that are kept. A growing context leaves old shapes behind."""

CAPTURE_AT_USE = 2
"""A shape is captured at this use: most shapes that occur once never occur again."""

MAX_MASKS = 3
"""Most masks of one step: those of the model's layers, and the plain one for its own forward."""

POOL_ROUNDING = 24 << 20
"""Bytes that torch's allocator takes at once: 2 MiB for small blocks, 20 MiB for medium ones, 2 MiB of rounding."""


@dataclass(frozen=True, slots=True)
class Shape:
    """The fixed sizes of a captured step."""

    rows: range  # keys are read in place, so rows between the wanted ones are included
    columns: int  # tokens per row
    length: int  # slots per row that the step attends to
    nodes: int  # of each row's tree; 0: a chain

    @property
    def tokens(self) -> int:
        """Tokens of all rows together."""
        return len(self.rows) * self.columns

    @property
    def input_bytes(self) -> int:
        """Bytes of a step's inputs."""
        return _input_bytes(self.tokens, len(self.rows), self.nodes)


@dataclass(frozen=True, slots=True)
class _Inputs:
    """The inputs of a step, as views of one buffer."""

    flat: torch.Tensor  # uint8
    ids: torch.Tensor  # [B, T] int64, as all below but the last
    positions: torch.Tensor  # [B, T]
    slots: torch.Tensor  # [B, T]
    starts: torch.Tensor  # [B, 1]
    keep: torch.Tensor  # [B, 1]: the column whose logits a chain needs
    depths: torch.Tensor  # [B, N]
    seen: torch.Tensor  # [B, T, N] bool

    @staticmethod
    def of(shape: Shape, device: torch.device | str) -> "_Inputs":
        flat = torch.empty(shape.input_bytes, dtype=torch.uint8, device=device)
        rows, columns, nodes = len(shape.rows), shape.columns, shape.nodes
        sizes = [(rows, columns)] * 3 + [(rows, 1)] * 2 + [(rows, nodes)]
        views, at = [], 0
        for size in sizes:
            nbytes = 8 * torch.Size(size).numel()
            views.append(flat[at : at + nbytes].view(torch.int64).view(size))
            at += nbytes
        ids, positions, slots, starts, keep, depths = views
        seen = flat[at:].view(torch.bool).view(rows, columns, nodes)
        return _Inputs(flat, ids, positions, slots, starts, keep, depths, seen)

    def fill(self, ids: torch.Tensor, step: StepCache, places: Sequence[int], counts: Sequence[int]) -> None:
        """Fill from a step on the host that has this width; its row i goes to row ``places[i]`` here.

        ``ids`` [B, T] are padded with their last column. The other rows write to the trash slot and attend to the
        first slot; their results are not used.
        """
        self.flat.zero_()
        self.slots.fill_(step.storage.capacity)
        self.starts.fill_(1)
        at = torch.tensor(places)
        self.ids[at] = ids[:, torch.arange(self.ids.shape[1]).clamp(max=ids.shape[1] - 1)]
        self.positions[at], self.slots[at] = step.position_ids, step.slots
        self.keep[at] = torch.tensor(counts)[:, None] - 1
        trees = step.tree_nodes()
        if trees is not None:
            known = trees.depths.shape[1]
            self.starts[at] = trees.starts
            self.depths[at, :known] = trees.depths
            self.seen[at, :, :known] = trees.seen

    @property
    def trees(self) -> TreeNodes | None:
        """The trees, as masks need them; None: chains."""
        return TreeNodes(self.starts, self.depths, self.seen) if self.depths.shape[1] else None


class FixedStep(StepCache):
    """A step of one shape over inputs that are filled later; Python knows only its shape."""

    def __init__(self, storage: KVCache, shape: Shape, inputs: _Inputs) -> None:
        Cache.__init__(self, layers=[])
        self.storage, self.exact, self.high = storage, False, shape.length
        self.position_ids, self.slots, self._trees = inputs.positions, inputs.slots, inputs.trees
        self._starts = [0]
        first, end, stride = shape.rows.start, shape.rows.stop, shape.rows.step
        self._rows = torch.arange(first, end, stride, device=storage.device)
        self._row_slice, self._slot_slice = slice(first, end, stride), None
        self._masks: dict[MaskKind, torch.Tensor] = {}

    def tree_nodes(self) -> TreeNodes | None:
        """The step's trees, as masks need them; None: chains."""
        return self._trees

    def seen(self, kind: MaskKind) -> torch.Tensor:
        """The mask: Python does not know the positions that paths are made of."""
        return self.mask(kind)


@dataclass(slots=True)
class _Captured:
    """The graph of one shape, its inputs, and the logits that it writes."""

    replay: Replay
    inputs: _Inputs
    logits: torch.Tensor


class DraftGraphs:
    """The captured steps of one model and its KV. One thread uses it, inside the stream that runs the model."""

    def __init__(self, model: Model, kv: KVCache, capture: Capture) -> None:
        self._model, self._kv, self._capture = model, kv, capture
        self._captured: OrderedDict[Shape, _Captured] = OrderedDict()  # the most recently used last
        self._uses: OrderedDict[Shape, int] = OrderedDict()  # of shapes that are not captured yet
        self._logits: torch.Tensor | None = None  # flat; every captured step writes its logits here
        self._refused = kv.exact or kv.recurrent is not None  # whether all steps run eagerly from now on

    def run(
        self,
        ids: torch.Tensor,
        rows: Sequence[int],
        starts: Sequence[int],
        counts: Sequence[int],
        parents: Sequence[Sequence[int]] | None = None,
        firsts: Sequence[int] | None = None,
    ) -> torch.Tensor | None:
        """One forward over ``ids`` [B, T] int64 on the host, the rest as in ``KVCache.step``; None: run it eagerly.

        Returns logits [B, 1, V] of a chain's last token, or [B, T, V] of a tree's nodes; read them before the next run.
        """
        shape = self._shape(ids.shape[1], rows, starts, counts, parents, firsts)
        if shape is None or not self._is_due(shape):
            return None
        step = self._kv.step(rows, starts, counts, parents, firsts, width=shape.columns, device=torch.device("cpu"))
        data = _Inputs.of(shape, "cpu")
        places = [shape.rows.index(row) for row in rows]
        data.fill(ids, step, places, counts)
        captured = self._captured.get(shape) or self._prepare(shape, data)
        if captured is None:
            return None
        self._captured.move_to_end(shape)
        _copy_inputs(data.flat, captured.inputs.flat)
        captured.replay()
        logits = captured.logits[:, : ids.shape[1]]
        return logits if places == list(range(len(logits))) else torch.stack([logits[place] for place in places])

    def _shape(
        self,
        columns: int,
        rows: Sequence[int],
        starts: Sequence[int],
        counts: Sequence[int],
        parents: Sequence[Sequence[int]] | None,
        firsts: Sequence[int] | None,
    ) -> Shape | None:
        """The step's shape, rounded up; None if it is too large for a graph, or its rows are too far apart."""
        columns, span = _power_of_two(columns), self._span(rows)
        if self._refused or columns > MAX_COLUMNS or columns * len(span) > MAX_TOKENS or len(span) > 2 * len(rows):
            return None
        firsts = firsts or [0] * len(rows)
        end = max(sum(ends) for ends in zip(starts, firsts, counts, strict=True))
        length = min(_power_of_two(end, MIN_LENGTH), self._kv.capacity)
        nodes = 0 if parents is None else _power_of_two(max(map(len, parents)), MIN_NODES)
        return Shape(span, columns, length, nodes)

    def _span(self, rows: Sequence[int]) -> range:
        """Evenly spaced rows, as a group has them, that include all of ``rows``."""
        first = min(rows)
        stride = gcd(*(row - first for row in rows)) or 1
        low, high = first // stride, max(rows) // stride
        granule = max(1, _power_of_two(high - low + 1) // ROW_STEPS)
        begin, end = low // granule * granule, (high // granule + 1) * granule
        return range(begin * stride + first % stride, self._kv.num_rows, stride)[: end - begin]

    def _is_due(self, shape: Shape) -> bool:
        """Whether a shape is captured, or is to be captured now; count its uses until then."""
        if shape in self._captured:
            return True
        uses = self._uses.pop(shape, 0) + 1
        if uses >= CAPTURE_AT_USE:
            return True
        self._uses[shape] = uses
        if len(self._uses) > MAX_GRAPHS:
            self._uses.popitem(last=False)
        return False

    def _prepare(self, shape: Shape, data: _Inputs) -> _Captured | None:
        """Capture a shape; None, with one warning, if this model cannot be captured."""
        device = self._kv.device
        inputs = _Inputs.of(shape, device)
        _copy_inputs(data.flat, inputs.flat)
        if len(self._captured) >= MAX_GRAPHS:
            self._captured.popitem(last=False)
        try:
            logits = self._logits_buffer(warm_up(lambda: self._forward(shape, inputs), device), shape)
            replay = self._capture.capture(lambda: logits.copy_(self._forward(shape, inputs)))
        except (RefusedError, RuntimeError) as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            self._refused = True
            self._captured.clear()
            warnings.warn(
                f"the draft ({self._model.config.model_type}) cannot be captured: {error}. Its steps run "
                f"without a graph, which is slower.",
                RuntimeWarning,
                stacklevel=2,
            )
            return None
        captured = self._captured[shape] = _Captured(replay, inputs, logits)
        return captured

    def _forward(self, shape: Shape, inputs: _Inputs) -> torch.Tensor:
        """The model's own forward over a shape's inputs."""
        step = FixedStep(self._kv, shape, inputs)
        activation = self._model.embed(inputs.ids, step)
        for layer in range(self._model.num_layers):
            self._model.layer(layer, activation)
        return self._model.head(activation, None if shape.nodes else inputs.keep)

    def _logits_buffer(self, like: torch.Tensor, shape: Shape) -> torch.Tensor:
        """The buffer for a shape's logits, in the shape of ``like``; all shapes share it."""
        count = like.numel()
        if self._logits is None or self._logits.numel() < count or self._logits.dtype != like.dtype:
            max_numel = logits_kept(self._kv.num_rows, trees=bool(shape.nodes)) * like.shape[-1]
            self._logits = torch.empty(max_numel, dtype=like.dtype, device=like.device)
        return self._logits[:count].view(like.shape)


def logits_kept(num_rows: int, *, trees: bool) -> int:
    """Most tokens whose logits stay allocated for the captured steps of a cache of ``num_rows`` rows."""
    return min(num_rows * MAX_COLUMNS, MAX_TOKENS) if trees else num_rows


def graph_bytes(model: Model, num_rows: int, capacity: int, tree_slots: int) -> int:
    """Most bytes of torch's memory that captured steps hold, for a cache of ``capacity`` slots per row.

    ``tree_slots`` of these slots are for tree nodes; 0: chains. The bytes are

        MAX_GRAPHS x a step's inputs  +  logits  +  2 x temporaries of the largest step  +  POOL_ROUNDING

    The pool of all graphs keeps the memory of the largest step. Blocks that smaller shapes left in it are reused only
    if they fit; shapes grow by powers of two, so these blocks together take at most the same amount again.
    """
    if any(model.state_shapes):
        return 0  # steps of recurrent layers run eagerly
    rows, tokens = min(num_rows, MAX_TOKENS), min(num_rows * MAX_COLUMNS, MAX_TOKENS)
    inputs = _input_bytes(tokens, rows, _power_of_two(tree_slots, MIN_NODES) if tree_slots else 0)
    logits = logits_kept(rows, trees=bool(tree_slots)) * model.vocab_size * model.dtype.itemsize
    return MAX_GRAPHS * inputs + logits + 2 * _step_bytes(model, rows, tokens, capacity, logits) + POOL_ROUNDING


def _input_bytes(tokens: int, num_rows: int, nodes: int) -> int:
    """Bytes of ids, positions and slots per token, start and column per row; for trees also depths and visibility."""
    return 8 * (3 * tokens + num_rows * (2 + nodes)) + tokens * nodes


def _step_bytes(model: Model, num_rows: int, tokens: int, capacity: int, logits: int) -> int:
    """Bytes of a running step: hidden states, masks, and the largest of attention, the rest of a layer, the head."""
    text, item = model.config.get_text_config(), model.dtype.itemsize
    shapes = [shape for shape in model.kv_shapes() if shape]
    heads, experts = int(text.num_attention_heads), int(getattr(text, "num_experts_per_tok", None) or 1)
    inner = heads * max(max(shape[1:]) for shape in shapes)
    wide = getattr(text, "intermediate_size", None) or 4 * text.hidden_size
    wide = max(wide) if isinstance(wide, list | tuple) else int(wide)
    hidden = tokens * text.hidden_size * (2 * item + 12)
    masks = tokens * capacity * (MAX_MASKS + 12)
    copies = -(-num_rows // 2) * max(shape[0] * max(shape[1:]) for shape in shapes)  # for rows that are not neighbours
    if getattr(text, "kv_lora_rank", None):  # keys and values of every head are computed from the stored ones
        copies += 2 * num_rows * heads * (text.qk_nope_head_dim + text.qk_rope_head_dim + text.v_head_dim)
    attention = tokens * inner * (4 * item + 8) + copies * capacity * item
    attention += temporary_bytes(num_rows, heads, MAX_COLUMNS, capacity)
    layer = tokens * experts * (8 * wide + 4 * text.hidden_size) * item
    return int(hidden + masks + max(attention, layer, 2 * logits))


def _power_of_two(count: int, least: int = 1) -> int:
    """The smallest power of two that is at least ``count`` and ``least``."""
    return max(least, 1 << (count - 1).bit_length())


def _copy_inputs(source: torch.Tensor, target: torch.Tensor) -> None:
    """Copy host bytes into a captured step's inputs, without waiting; torch keeps pinned memory until it is read."""
    target.copy_(source.pin_memory() if target.is_cuda else source, non_blocking=True)

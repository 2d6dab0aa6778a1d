"""Draft steps that are captured once and replayed: a GPU runs a small model faster than Python can launch it.

A captured step repeats its kernels over the same memory, so all that differs from step to step is data: token ids,
positions, slots, trees. One copy brings them into the step's own inputs; the masks are made from them in the graph.
Steps are rounded up to few shapes. A shape is captured when it recurs, in the stream that runs it, and given up when
it has not been seen for long. What cannot be captured runs eagerly, for good, after one warning.
All captured steps share one pool of memory: nothing in it outlives a replay, because the logits are copied out of it.
"""

import warnings
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from math import gcd

import torch

from aspec.backends.device import Capture, Replay
from aspec.models.attention import temporary_bytes
from aspec.models.hf_compat import Cache
from aspec.models.kv_cache import KVCache, MaskKind, StepCache, TreeNodes
from aspec.models.model import Model
from aspec.speculation.capture_check import RefusedError, warm_up

MAX_COLUMNS = 32
"""Tokens of a row in a captured step: what a tree's level has at most. Prompts are longer, and no launch binds them."""

MAX_TOKENS = 256
"""Tokens of a captured step, of all rows."""

MIN_LENGTH, MIN_NODES = 256, 64
"""Slots and nodes below which a step is rounded up to them."""

ROW_STEPS = 8
"""Into how many steps the rows of a large batch are divided: as rows come and go there, most steps keep their shape."""

MAX_GRAPHS = 32
"""Captured steps that are kept. A context that grows leaves its shapes behind."""

CAPTURED_AT = 2
"""The use of a shape at which it is captured: most that come once never come again."""

KINDS = 3
"""Masks of one step at most: what a model's layers see, and the plain one that its own forward is given."""

POOL_ROUNDING = 24 << 20
"""What torch's allocator takes at once for small blocks and for middling ones: 2 MiB and 20 MiB, and 2 MiB to round."""


@dataclass(frozen=True, slots=True)
class Shape:
    """What is fixed in a captured step."""

    rows: range  # keys are read where they are, so rows between others come along
    columns: int  # tokens of a row
    length: int  # slots of a row that are attended to
    nodes: int  # of a row's tree; 0: a chain

    @property
    def tokens(self) -> int:
        """Of all rows."""
        return len(self.rows) * self.columns

    @property
    def input_bytes(self) -> int:
        """Bytes of a step's inputs."""
        return _input_bytes(self.tokens, len(self.rows), self.nodes)


@dataclass(frozen=True, slots=True)
class _Inputs:
    """A step's data as views of one buffer."""

    flat: torch.Tensor  # uint8
    ids: torch.Tensor  # [B, T] int64, as all but the last
    positions: torch.Tensor  # [B, T]
    slots: torch.Tensor  # [B, T]
    starts: torch.Tensor  # [B, 1]
    keep: torch.Tensor  # [B, 1]: the column whose logits a chain is asked for
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
        """From a step as wide as this that was made on the host; its rows stand at ``places`` here.

        Its ids [B, T] are padded by their last column. Rows that only come along write to the trash slot, see the
        first slot, whatever is in it, and nobody reads what they bring.
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
        """What masks need of them; None: chains."""
        return TreeNodes(self.starts, self.depths, self.seen) if self.depths.shape[1] else None


class FixedStep(StepCache):
    """A step of one shape over inputs that are filled later; nothing of it is known to Python but the shape."""

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
        """What a mask needs of the step's trees; None: chains."""
        return self._trees


@dataclass(slots=True)
class _Captured:
    """One shape's graph, its inputs, and where its logits are."""

    replay: Replay
    inputs: _Inputs
    logits: torch.Tensor


class DraftGraphs:
    """The captured steps of one model and its KV; used by one thread, inside the stream that runs the model."""

    def __init__(self, model: Model, kv: KVCache, capture: Capture) -> None:
        self._model, self._kv, self._capture = model, kv, capture
        self._captured: OrderedDict[Shape, _Captured] = OrderedDict()  # the latest used last
        self._uses: OrderedDict[Shape, int] = OrderedDict()  # of shapes that are not captured
        self._logits: torch.Tensor | None = None  # flat; where every captured step leaves what it is asked for
        self._refused = kv.exact  # whether everything runs eagerly from now on

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

        Logits [B, 1, V] of a chain's last token or [B, T, V] of a tree's nodes, to be read before the next run.
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
        _send(data.flat, captured.inputs.flat)
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
        """What the step is rounded up to; None where it is too large, or too scattered, to be worth a graph."""
        columns, span = _power(columns), self._span(rows)
        if self._refused or columns > MAX_COLUMNS or columns * len(span) > MAX_TOKENS or len(span) > 2 * len(rows):
            return None
        firsts = firsts or [0] * len(rows)
        end = max(sum(ends) for ends in zip(starts, firsts, counts, strict=True))
        length = min(_power(end, MIN_LENGTH), self._kv.capacity)
        nodes = 0 if parents is None else _power(max(map(len, parents)), MIN_NODES)
        return Shape(span, columns, length, nodes)

    def _span(self, rows: Sequence[int]) -> range:
        """Rows at even distances, as those of a group are, with all of these among them."""
        first = min(rows)
        stride = gcd(*(row - first for row in rows)) or 1
        low, high = first // stride, max(rows) // stride
        granule = max(1, _power(high - low + 1) // ROW_STEPS)
        begin, end = low // granule * granule, (high // granule + 1) * granule
        return range(begin * stride + first % stride, self._kv.num_rows, stride)[: end - begin]

    def _is_due(self, shape: Shape) -> bool:
        """Whether a shape is captured or to be captured; counts its uses until then."""
        if shape in self._captured:
            return True
        uses = self._uses.pop(shape, 0) + 1
        if uses >= CAPTURED_AT:
            return True
        self._uses[shape] = uses
        if len(self._uses) > MAX_GRAPHS:
            self._uses.popitem(last=False)
        return False

    def _prepare(self, shape: Shape, data: _Inputs) -> _Captured | None:
        """Capture a shape; None, and one warning, where this model cannot be captured."""
        device = self._kv.device
        inputs = _Inputs.of(shape, device)
        _send(data.flat, inputs.flat)
        if len(self._captured) >= MAX_GRAPHS:
            self._captured.popitem(last=False)
        try:
            logits = self._room_for(warm_up(lambda: self._forward(shape, inputs), device), shape)
            replay = self._capture.capture(lambda: logits.copy_(self._forward(shape, inputs)))
        except (RefusedError, RuntimeError) as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            self._refused = True
            self._captured.clear()
            warnings.warn(
                f"the draft ({self._model.config.model_type}) cannot be captured: {error}. Its steps run one by one, "
                f"which takes longer.",
                RuntimeWarning,
                stacklevel=2,
            )
            return None
        made = self._captured[shape] = _Captured(replay, inputs, logits)
        return made

    def _forward(self, shape: Shape, inputs: _Inputs) -> torch.Tensor:
        """The model's own forward over a shape's inputs."""
        step = FixedStep(self._kv, shape, inputs)
        activation = self._model.embed(inputs.ids, step)
        for layer in range(self._model.num_layers):
            self._model.layer(layer, activation)
        return self._model.head(activation, None if shape.nodes else inputs.keep)

    def _room_for(self, like: torch.Tensor, shape: Shape) -> torch.Tensor:
        """Where a shape's logits go; shapes share it."""
        count = like.numel()
        if self._logits is None or self._logits.numel() < count or self._logits.dtype != like.dtype:
            most = logits_kept(self._kv.num_rows, trees=bool(shape.nodes)) * like.shape[-1]
            self._logits = torch.empty(most, dtype=like.dtype, device=like.device)
        return self._logits[:count].view(like.shape)


def logits_kept(num_rows: int, *, trees: bool) -> int:
    """Tokens whose logits the captured steps of a cache of so many rows leave behind at most."""
    return min(num_rows * MAX_COLUMNS, MAX_TOKENS) if trees else num_rows


def graph_bytes(model: Model, num_rows: int, capacity: int, tree_slots: int) -> int:
    """Bytes of torch's memory that captured steps hold at most, over a cache of ``capacity`` slots a row.

    ``tree_slots`` of them are for the nodes of trees; 0: chains. It is

        MAX_GRAPHS x a step's inputs  +  logits  +  2 x what the largest step holds while it runs  +  POOL_ROUNDING

    The pool of all graphs keeps what the largest step needs. Blocks that smaller shapes left in it are reused only as
    far as they fit; shapes grow by powers of two, so all of them together are at most as much again.
    """
    rows, tokens = min(num_rows, MAX_TOKENS), min(num_rows * MAX_COLUMNS, MAX_TOKENS)
    inputs = _input_bytes(tokens, rows, _power(tree_slots, MIN_NODES) if tree_slots else 0)
    logits = logits_kept(rows, trees=bool(tree_slots)) * model.vocab_size * model.dtype.itemsize
    return MAX_GRAPHS * inputs + logits + 2 * _step_bytes(model, rows, tokens, capacity, logits) + POOL_ROUNDING


def _input_bytes(tokens: int, num_rows: int, nodes: int) -> int:
    """Ids, positions and slots of every token, start and column of every row; of trees depths, and who sees whom."""
    return 8 * (3 * tokens + num_rows * (2 + nodes)) + tokens * nodes


def _step_bytes(model: Model, num_rows: int, tokens: int, capacity: int, logits: int) -> int:
    """What a step holds while it runs: hidden states and masks, and the widest of attention, rest of a layer, head."""
    text, item = model.config.get_text_config(), model.dtype.itemsize
    shapes = [shape for shape in model.kv_shapes() if shape]
    heads, experts = int(text.num_attention_heads), int(getattr(text, "num_experts_per_tok", None) or 1)
    inner = heads * max(max(shape[1:]) for shape in shapes)
    wide = getattr(text, "intermediate_size", None) or 4 * text.hidden_size
    wide = max(wide) if isinstance(wide, list | tuple) else int(wide)
    hidden = tokens * text.hidden_size * (2 * item + 12)
    masks = tokens * capacity * (KINDS + 12)
    copies = -(-num_rows // 2) * max(shape[0] * max(shape[1:]) for shape in shapes)  # of rows with others between
    if getattr(text, "kv_lora_rank", None):  # keys and values are made of what is stored, for every head
        copies += 2 * num_rows * heads * (text.qk_nope_head_dim + text.qk_rope_head_dim + text.v_head_dim)
    attention = tokens * inner * (4 * item + 8) + copies * capacity * item
    attention += temporary_bytes(num_rows, heads, MAX_COLUMNS, capacity)
    layer = tokens * experts * (8 * wide + 4 * text.hidden_size) * item
    return int(hidden + masks + max(attention, layer, 2 * logits))


def _power(count: int, least: int = 1) -> int:
    """The smallest power of two that is not below."""
    return max(least, 1 << (count - 1).bit_length())


def _send(source: torch.Tensor, target: torch.Tensor) -> None:
    """Host bytes to where a captured step finds them, without waiting; torch keeps pinned memory until it is read."""
    target.copy_(source.pin_memory() if target.is_cuda else source, non_blocking=True)

"""The cost table: seconds of every task on one machine for one pair of models.

Pure policy: counts in, seconds out. ``roofline.py`` makes a table from a machine and the shapes of the models; the
simulated machine takes its seconds from the table.
"""

from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise
from math import inf

from aspec.profiling.hardware import TaskSeconds
from aspec.tasks.op import Op
from aspec.tasks.task import LayerWork, Task, WorkItem

KEY_TILE = 64  # attention runs over whole tiles of keys, see ``kv_cache.py``
TREE_DEPTH = 16  # assumed tokens of a tree's longest path; deeper nodes are not priced higher


@dataclass(frozen=True, slots=True)
class PiecewiseLinear:
    """Seconds by a count: linear between points, constant below the first, the last piece extended beyond the last.

    ``each_s``: further seconds per count. Raises ValueError for points that do not ascend.
    """

    points: tuple[tuple[float, float], ...]
    each_s: float = 0.0

    def __post_init__(self) -> None:
        if not self.points or any(a >= b for (a, _), (b, _) in pairwise(self.points)):
            raise ValueError(f"a line needs points in ascending order of count, found {self}")

    def times(self, factor: float) -> "PiecewiseLinear":
        """A line whose points take ``factor`` times as long."""
        return replace(self, points=tuple((x, factor * y) for x, y in self.points))

    def at(self, count: float) -> float:
        """Seconds of a count; at a point, exactly the point's seconds."""
        return self._between(count) + self.each_s * count

    def _between(self, count: float) -> float:
        above = bisect_right(self.points, (count, inf))
        if above == 0 or len(self.points) == 1:
            return self.points[0][1]
        last = min(above, len(self.points) - 1)
        (x, y), (x2, y2) = self.points[last - 1 : last + 1]
        return y + (y2 - y) * (count - x) / (x2 - x) if count != x2 else y2


@dataclass(frozen=True, slots=True)
class Attention:
    """Seconds of a layer's attention for one item.

    ``exact``: each row attends to its own keys; rows with trees run one after another, and each query reads its own
    path. Otherwise all rows run together, over as many keys as the longest row has.
    """

    call_s: float = 0.0
    row_s: float = 0.0
    key_s: float = 0.0  # per key of a row
    pair_s: float = 0.0  # per query token and key
    own_pair_s: float = 0.0  # further seconds per query token of a tree and key of its path
    exact: bool = False

    def times(self, factor: float) -> "Attention":
        """Attention that takes ``factor`` times as long."""
        names = ("call_s", "row_s", "key_s", "pair_s", "own_pair_s")
        return replace(self, **{name: factor * getattr(self, name) for name in names})

    def seconds(self, item: WorkItem, *, tree: bool = False) -> float:
        """Seconds of one item; ``tree``: its proposals are trees."""
        width = max(item.counts)
        ends = [start + count for start, count in zip(item.starts, item.counts, strict=True)]
        lengths = [_whole_tiles(end if self.exact else max(ends)) for end in ends]
        total = self.call_s + sum(self.row_s + length * (self.key_s + self.pair_s * width) for length in lengths)
        if not (self.exact and tree and width > 1 and not item.prefill):
            return total
        own = (_whole_tiles(start % KEY_TILE + min(width, TREE_DEPTH)) for start in item.starts)
        return total + self.call_s * (len(item.rows) - 1) + self.own_pair_s * width * sum(own)


@dataclass(frozen=True, slots=True)
class LayerCost:
    """Seconds of one layer; the lines are over padded tokens."""

    project: PiecewiseLinear  # the norm and the projections to queries, keys and values
    rest: PiecewiseLinear  # the output projection and everything after it
    attention: Attention
    decode_byte_s: float = 0.0  # per byte of weights decoded from what is stored

    def times(self, factor: float) -> "LayerCost":
        """One layer that costs as much as ``factor`` of these."""
        lines = self.project.times(factor), self.rest.times(factor)
        return LayerCost(*lines, self.attention.times(factor), self.decode_byte_s)

    def seconds(self, item: WorkItem, *, tree: bool = False) -> float:
        """Seconds of the whole layer for one item."""
        tokens = item.padded_tokens
        return self.project.at(tokens) + self.attention.seconds(item, tree=tree) + self.rest.at(tokens)


@dataclass(frozen=True, slots=True)
class ModelCost:
    """Seconds of one model: embeddings, layers, head, draws."""

    layers: tuple[LayerCost, ...]
    embed: PiecewiseLinear  # by padded tokens
    head: PiecewiseLinear  # by rows of logits
    draw_s: float  # per drawn token
    mask_pair_s: float = 0.0  # per query token and key, once for all layers
    offer_s: float = 0.0  # per node of a tree: finding its children, instead of a draw

    def embed_seconds(self, item: WorkItem) -> float:
        """Seconds from token ids to hidden states, positions and masks."""
        length = max(start + count for start, count in zip(item.starts, item.counts, strict=True))
        return self.embed.at(item.padded_tokens) + self.mask_pair_s * item.padded_tokens * length

    def layer_seconds(self, item: WorkItem, *, tree: bool = False) -> float:
        """Seconds of all layers, one after another; ``tree``: the item's proposals are trees."""
        return self._over_layers(lambda layer: layer.seconds(item, tree=tree))

    def attention_seconds(self, item: WorkItem, *, tree: bool = False) -> float:
        """Seconds of the attention in all layers."""
        return self._over_layers(lambda layer: layer.attention.seconds(item, tree=tree))

    def product_seconds(self, item: WorkItem) -> float:
        """Seconds of all layers without their attention."""
        tokens = item.padded_tokens
        return self._over_layers(lambda layer: layer.project.at(tokens) + layer.rest.at(tokens))

    def _over_layers(self, seconds_of: Callable[[LayerCost], float]) -> float:
        """The sum over all layers; equal layers are computed once."""
        kinds = {id(layer): layer for layer in self.layers}
        seconds = {key: seconds_of(layer) for key, layer in kinds.items()}
        return sum(seconds[id(layer)] for layer in self.layers)

    def head_seconds(self, rows: int, draws: int) -> float:
        """Seconds of ``rows`` rows of logits, and of ``draws`` draws from them."""
        return self.head.at(rows) + self.draw_s * draws


@dataclass(frozen=True, slots=True)
class CostTable:
    """Seconds of every task that computes; loads and copies are priced by the rate of their link."""

    target: ModelCost
    draft: ModelCost | None = None
    accept_s: float = 1e-4
    accept_row_s: float = 0.0
    tree_row_s: float = 0.0  # further seconds per row whose tree was verified
    node_s: float = 0.0  # per node of a tree: adding the node and its children to the tree
    task_s: float = 0.0  # fixed seconds of every task on its lane
    routed_s: float = 0.0  # further seconds of a layer whose experts are read on demand
    experts_s: float = 0.0  # fixed seconds of computing some of them
    handover_s: float = 0.0  # of the loop, for every task that ends: what waits for it starts later, its lane does not
    tree: bool = False  # proposals are trees
    decoders: int = 1  # threads that decode weights, a part each
    read_contention: float = 1.0  # factor on seconds of computing while the disk lane reads

    def seconds(self, task: Task) -> float:
        """Seconds of a task that computes an item. Raises KeyError for a task that loads."""
        if task.op is Op.DECODE and task.layer is not None:
            return self.task_s + task.nbytes * self.target.layers[task.layer].decode_byte_s / self.decoders
        item = task.item
        assert item is not None, f"{task.label} carries no work item"
        return self.task_s + _SECONDS_OF[task.op](self, task, item)


@dataclass(frozen=True, slots=True)
class SimCosts(TaskSeconds):
    """The costs of a machine: rates in bytes per second, and flat seconds of computing tasks.

    If there is a ``cost_table``, it gives the seconds of computing tasks, and the flat seconds are ignored.
    """

    disk_bytes_per_s: float = 2e9
    copy_bytes_per_s: float | None = None  # None: the device is the host's own memory
    d2h_bytes_per_s: float | None = None  # None: the same as copy_bytes_per_s
    cost_table: CostTable | None = None


def _whole_tiles(length: int) -> int:
    return -(-length // KEY_TILE) * KEY_TILE


def _layer(table: CostTable, task: Task, item: WorkItem) -> float:
    return _layer_of(table, task).seconds(item, tree=table.tree)


def _project(table: CostTable, task: Task, item: WorkItem) -> float:
    return _layer_of(table, task).project.at(item.padded_tokens)


def _layer_of(table: CostTable, task: Task) -> LayerCost:
    """The cost of a task's layer."""
    work = task.payload
    assert isinstance(work, LayerWork), f"{task.label} belongs to no layer"
    return table.target.layers[work.layer]


def _attend(table: CostTable, task: Task, item: WorkItem) -> float:
    return _layer_of(table, task).attention.seconds(item, tree=table.tree)


def _ffn(table: CostTable, task: Task, item: WorkItem) -> float:
    return _layer_of(table, task).rest.at(item.padded_tokens)


def _route(table: CostTable, task: Task, item: WorkItem) -> float:
    layer = _layer_of(table, task)
    attention_s = layer.attention.seconds(item, tree=table.tree)
    return table.routed_s + layer.project.at(item.padded_tokens) + attention_s


def _experts(table: CostTable, task: Task, item: WorkItem) -> float:
    return table.experts_s  # their products are counted in ``_combine``, those of all experts of the layer


def _combine(table: CostTable, task: Task, item: WorkItem) -> float:
    computes = isinstance(task.payload, LayerWork) and bool(task.payload.experts)
    return _ffn(table, task, item) + (table.experts_s if computes else 0.0)


def _embed(table: CostTable, task: Task, item: WorkItem) -> float:
    return table.target.embed_seconds(item)


def _head(table: CostTable, task: Task, item: WorkItem) -> float:
    if item.prefill:
        return table.target.head_seconds(len(item.rows), len(item.rows))
    return table.target.head_seconds(item.padded_tokens, item.num_tokens)


def _accept(table: CostTable, task: Task, item: WorkItem) -> float:
    trees = 0 if item.prefill else sum(count > 1 for count in item.counts)
    return table.accept_s + table.accept_row_s * len(item.rows) + table.tree_row_s * trees


def _draft(table: CostTable, task: Task, item: WorkItem) -> float:
    draft = table.draft
    if draft is None:  # an n-gram lookup
        return table.node_s * item.num_tokens
    layers_s = draft.embed_seconds(item) + draft.layer_seconds(item)
    if task.growth is None:
        return layers_s + draft.head_seconds(len(item.rows), len(item.rows))
    nodes = item.num_tokens
    return layers_s + draft.head_seconds(nodes, 0) + nodes * (draft.offer_s + table.node_s)


def _draft_prefill(table: CostTable, task: Task, item: WorkItem) -> float:
    return 0.0 if table.draft is None else table.draft.embed_seconds(item) + table.draft.layer_seconds(item)


_SECONDS_OF = {
    Op.EMBED: _embed,
    Op.LAYER: _layer,
    Op.PROJECT: _project,
    Op.ATTEND: _attend,
    Op.FFN: _ffn,
    Op.ROUTE: _route,
    Op.EXPERTS: _experts,
    Op.COMBINE: _combine,
    Op.HEAD: _head,
    Op.ACCEPT: _accept,
    Op.DRAFT: _draft,
    Op.DRAFT_PREFILL: _draft_prefill,
}

"""The slot KV cache: one storage per layer for all rows, and a window of it for each work item.

Rows are ragged: every row has its own length and positions, nothing is padded on the left. Committed slot ``j`` of
a row holds position ``j``; what a pass writes behind the committed tokens is either committed or overwritten.
New tokens form a chain unless ``parents`` makes them a tree: then slots follow the order of the nodes, positions
their depth, and ``KVCache.gather`` moves an accepted path to where a chain would have put it. A tree may be written
in one step or grow over several; either way a node stands in the same slot.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from weakref import ref

import numpy as np
import torch
from torch.overrides import handle_torch_function, has_torch_function_unary

from aspec.io.upload import upload
from aspec.models.hf_compat import Cache

KVShape = tuple[int, int, int]
"""Heads, key width and value width of one layer."""


KEY_TILE = 64
"""Attention runs over whole tiles of slots: on a CPU every new length costs a product its compiled kernel, which is
kept, so lengths that recur save time and memory. Exact attention adds up tile by tile."""


@dataclass(frozen=True, slots=True)
class MaskKind:
    """Which of the earlier positions a query may see, besides causality."""

    window: int | None = None  # the last ``window`` positions
    chunk: int | None = None  # positions of the same chunk

    def narrow(self, query: torch.Tensor, key: torch.Tensor, visible: torch.Tensor) -> torch.Tensor:
        """Of what is visible, the part of this kind; positions and result broadcast against one another."""
        if self.window is not None:
            visible = visible & (query - key < self.window)
        if self.chunk is not None:
            visible = visible & (query // self.chunk == key // self.chunk)
        return visible

    def visible(self, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        """Whether a query at one position may look at a key at another."""
        return self.narrow(query, key, key <= query)


@dataclass(frozen=True, slots=True)
class Paths:
    """What exact attention needs of one row: its keys in the order of their positions, as decoding would store them.

    Positions below ``prefix`` are in slots of the same number, for every query. Behind them a query of a tree finds
    its own path: ``tail`` [T, W] int64 is the slot of position ``prefix + w``. ``visible`` [T, P] bool is over
    positions, P = prefix + W. All three lengths are whole tiles; a chain is all prefix, without a tail.
    """

    num_slots: int  # of the row, up to its last node
    prefix: int
    tail: torch.Tensor | None
    visible: torch.Tensor


class KVCache:
    """Keys [R, H, C + 1, Dk] and values [R, H, C + 1, Dv] per layer; slot C takes the padding, never visible.

    ``exact``: a node's logits are bit for bit those of decoding its path token by token, at a price: attention as
    ``aspec/attention.py`` says, all other products in blocks of rows of one size. Without it they are equal up to
    rounding.
    ``offloaded``: the layers are on the other side of a link. What they would store is handed through, and whoever
    attends (``offload.py``) stores it; positions and masks are made here, beside the cache.
    """

    def __init__(
        self,
        shapes: Sequence[KVShape | None],
        num_rows: int,
        capacity: int,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        *,
        exact: bool = False,
        offloaded: bool = False,
    ) -> None:
        self.exact = exact
        self.offloaded = offloaded
        self.num_rows = num_rows
        self.capacity = capacity
        self.dtype = dtype
        self.device = torch.device(device)
        self.keys: list[torch.Tensor | None] = []
        self.values: list[torch.Tensor | None] = []
        for shape in shapes:
            heads, key_width, value_width = shape or (0, 0, 0)
            common = (num_rows, heads, capacity + 1)
            self.keys.append(torch.zeros(*common, key_width, dtype=dtype, device=device) if shape else None)
            self.values.append(torch.zeros(*common, value_width, dtype=dtype, device=device) if shape else None)

    @staticmethod
    def bytes_per_token(shapes: Sequence[KVShape | None], dtype: torch.dtype) -> int:
        """Bytes that one position of one row takes over all layers; a row holds ``capacity + 1``."""
        return sum(shape[0] * (shape[1] + shape[2]) * dtype.itemsize for shape in shapes if shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the whole storage."""
        return sum(tensor.nbytes for tensor in (*self.keys, *self.values) if tensor is not None)

    def step(
        self,
        rows: Sequence[int],
        starts: Sequence[int],
        counts: Sequence[int],
        parents: Sequence[Sequence[int]] | None = None,
        firsts: Sequence[int] | None = None,
        *,
        width: int = 0,
        device: torch.device | None = None,
    ) -> "StepCache":
        """A work item's window: row ``rows[b]`` writes ``counts[b]`` nodes behind its ``starts[b]`` committed tokens.

        They are nodes ``firsts[b]`` (default 0) and following of the row's tree; earlier steps wrote the others.
        ``parents[b][n]`` is the node that node ``n`` continues, -1 for the last committed token; it lists all nodes
        so far, ``firsts[b] + counts[b]``, parents before their children. Node ``n`` stands in slot ``starts[b] + n``,
        its position is ``starts[b]`` plus its depth. Without ``parents`` every node continues the one before.
        Rows are padded to ``width`` tokens at least; ``device``: where the step's tensors are, if not the storage's.
        Raises ValueError for rows that repeat or do not exist, a tree that is none, and beyond the capacity.
        """
        firsts = [0] * len(rows) if firsts is None else firsts
        if not len(rows) == len(starts) == len(counts) == len(firsts) or min(counts, default=0) < 1:
            raise ValueError(f"expected a start and at least one token per row, found {rows=} {starts=} {counts=}")
        if min(*starts, *firsts) < 0:
            raise ValueError(f"expected starts and first nodes from 0 on, found {starts=} {firsts=}")
        if len(set(rows)) != len(rows) or not 0 <= min(rows) <= max(rows) < self.num_rows:
            raise ValueError(f"expected distinct rows of {self.num_rows}, found {rows}")
        totals = [first + count for first, count in zip(firsts, counts, strict=True)]
        if max(start + total for start, total in zip(starts, totals, strict=True)) > self.capacity:
            raise ValueError(f"rows {rows} at {starts} with {totals} tokens pass the capacity of {self.capacity}")
        if parents is not None and [len(links) for links in parents] != totals:
            raise ValueError(f"expected the parents of {totals} nodes, found {[len(links) for links in parents]}")
        return StepCache(self, rows, starts, counts, firsts, parents, width=width, device=device)

    def gather(self, row: int, start: int, path: Sequence[int]) -> None:
        """Keep of the nodes a row wrote from slot ``start`` on those in ``path``, in its order, from ``start`` on."""
        if list(path) == list(range(len(path))):
            return
        source = upload(start + torch.tensor(path), self.device)
        for storage in (*self.keys, *self.values):
            if storage is not None:  # indexing copies before it writes, so overlap is safe
                storage[row, :, start : start + len(path)] = storage[row][:, source]

    def clear(self, row: int, start: int = 0) -> None:
        """Zero a row from slot ``start`` on."""
        for storage in (*self.keys, *self.values):
            if storage is not None:
                storage[row, :, start:].zero_()


class StepCache(Cache):  # type: ignore[misc]  # transformers is untyped
    """What transformers' layers see as their cache while one work item goes through them.

    ``position_ids`` [B, T] int64; T is the largest count or ``width``, shorter rows are padded at their end. A padded
    token writes to the trash slot and sees what the row's last real token sees.
    """

    is_compileable = False

    def __init__(
        self,
        storage: KVCache,
        rows: Sequence[int],
        starts: Sequence[int],
        counts: Sequence[int],
        firsts: Sequence[int],
        parents: Sequence[Sequence[int]] | None = None,
        *,
        width: int = 0,
        device: torch.device | None = None,
    ) -> None:
        super().__init__(layers=[])
        device = device or storage.device
        self.storage = storage
        self.exact = storage.exact
        width = max(width, *counts)
        self._starts = starts
        self._totals = [first + count for first, count in zip(firsts, counts, strict=True)]
        end = max(start + total for start, total in zip(starts, self._totals, strict=True))
        self.high = min(_whole_tiles(end), storage.capacity)
        told = upload(torch.tensor([list(starts), list(counts), list(firsts), list(rows)]), device)
        self._start, last, first = told[0][:, None], told[1][:, None] - 1, told[2][:, None]  # [B, 1]
        offsets = torch.arange(width, device=device)[None]  # [1, T]
        real = offsets <= last
        self._node = torch.minimum(offsets, last) + first  # [B, T]: the node of a token, for padding the row's last
        self._tree = None if parents is None else _Tree.of(parents, device)
        depth = self._node if self._tree is None else self._tree.depths.gather(1, self._node)
        self.position_ids = self._start + depth
        self.slots = torch.where(real, self._start + self._node, storage.capacity)  # [B, T]
        self._rows = told[3]
        consecutive = list(rows) == list(range(rows[0], rows[0] + len(rows)))
        self._row_slice = slice(rows[0], rows[0] + len(rows)) if consecutive else None
        begins = {start + first for start, first in zip(starts, firsts, strict=True)}
        uniform = len(begins) == 1 and set(counts) == {width}
        self._slot_slice = slice(min(begins), min(begins) + width) if uniform else None
        self._masks: dict[MaskKind, torch.Tensor] = {}
        self._paths: dict[MaskKind, tuple[Paths, ...]] = {}
        self.attended: dict[int, ref[torch.Tensor]] = {}  # offloaded: by layer, the new keys that it attended to

    @property
    def offloaded(self) -> bool:
        """Whether the layers are on the other side of a link."""
        return self.storage.offloaded

    def layer_mask(self, kind: MaskKind) -> "torch.Tensor | tuple[Paths, ...]":
        """What a layer gets as its mask: ``mask``, or in an exact step the paths of every row."""
        if not self.exact:
            return self.mask(kind)
        if kind not in self._paths:
            self._paths[kind] = self._make_paths(kind)
        return self._paths[kind]

    def mask(self, kind: MaskKind | None = None) -> torch.Tensor:
        """Bool [B, 1, T, S] over the first S slots of every row: True where a query may look."""
        kind = kind or MaskKind()
        if kind not in self._masks:
            self._masks[kind] = self._make_mask(kind)[:, None]
        return self._masks[kind]

    def _make_mask(self, kind: MaskKind) -> torch.Tensor:
        return visible_slots(kind, self.position_ids, self.high, self.tree_nodes())

    def tree_nodes(self) -> "TreeNodes | None":
        """What a mask needs of the step's trees; None: chains."""
        if self._tree is None:
            return None
        depths = self._tree.depths
        seen = torch.zeros(*self._node.shape, depths.shape[1], dtype=torch.bool, device=depths.device)
        return TreeNodes(self._start, depths, seen.scatter_(2, self._node_paths(self._tree), True))

    def _node_paths(self, tree: "_Tree") -> torch.Tensor:
        """[B, T, D] int64: the nodes from the root of a token's path down to itself, which fills the rest."""
        return tree.paths.gather(1, self._node[:, :, None].expand(-1, -1, tree.paths.shape[2]))

    def _make_paths(self, kind: MaskKind) -> tuple[Paths, ...]:
        ends = (self.position_ids.amax(1) + 1).tolist()
        nodes = None if self._tree is None else self._node_paths(self._tree)
        made = []
        for row, (start, end) in enumerate(zip(self._starts, ends, strict=True)):
            length = _whole_tiles(end)
            position = torch.arange(length, device=self.position_ids.device)
            visible = kind.visible(self.position_ids[row, :, None], position)
            if self._tree is None or nodes is None or self._tree.is_chain[row]:
                made.append(Paths(length, length, None, visible))
                continue
            prefix = start // KEY_TILE * KEY_TILE
            position = position[prefix:]
            level = (position - start).clamp(0, nodes.shape[2] - 1)
            tail = torch.where(position < start, position, start + nodes[row][:, level])
            made.append(Paths(_whole_tiles(start + self._totals[row]), prefix, tail, visible))
        return tuple(made)

    def update(
        self,
        key_states: torch.Tensor,
        value_states: torch.Tensor,
        layer_idx: int,
        *args: object,
        **kwargs: object,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Store [B, H, T, D] of the new tokens; returns keys and values [B, H, S, D] of the rows so far.

        Offloaded, it hands the new ones back. A torch function mode meets it like torch's own functions (``split.py``).
        """
        if has_torch_function_unary(key_states):
            given = (self, key_states, value_states, layer_idx)
            result: tuple[torch.Tensor, torch.Tensor] = handle_torch_function(StepCache.update, (key_states,), *given)
            return result
        if self.offloaded:
            return key_states, value_states
        self.store(layer_idx, key_states, value_states)
        return self.stored(layer_idx)

    def store(self, layer: int, *states: torch.Tensor) -> None:
        """Keys and values [B, H, T, D] of the new tokens."""
        for storage, new in zip(self._storages(layer), states, strict=True):
            if self._row_slice is not None and self._slot_slice is not None:
                storage[self._row_slice, :, self._slot_slice] = new
            else:
                storage[self._rows[:, None], :, self.slots] = new.transpose(1, 2)

    def stored(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values [B, H, S, D] of the rows so far."""
        own = self._rows if self._row_slice is None else self._row_slice
        keys, values = (storage[own, :, : self.high] for storage in self._storages(layer))
        return keys, values

    def _storages(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        keys, values = self.storage.keys[layer], self.storage.values[layer]
        assert keys is not None
        assert values is not None
        return keys, values

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens before this item's, for models that ask; positions are always given explicitly."""
        return max(self._starts)

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """Key length and offset of a mask; masks are always given explicitly."""
        return self.high, 0

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """Slots per row."""
        return self.storage.capacity


@dataclass(frozen=True, slots=True)
class TreeNodes:
    """The trees of a step: where each begins, how deep its nodes are, and which of them a token has above it."""

    starts: torch.Tensor  # [B, 1] int64: committed tokens
    depths: torch.Tensor  # [B, N] int64
    seen: torch.Tensor  # [B, T, N] bool: on the token's path, itself included


def visible_slots(kind: MaskKind, positions: torch.Tensor, length: int, tree: TreeNodes | None) -> torch.Tensor:
    """Bool [B, T, S] over the first S = ``length`` slots: where tokens at ``positions`` [B, T] may look."""
    query = positions[:, :, None]
    slot = torch.arange(length, device=query.device)[None, None]
    if tree is None:
        return kind.visible(query, slot)
    start, depths, seen = tree.starts[:, :, None], tree.depths, tree.seen
    offset = slot - start  # [B, 1, S]: the node in a slot, negative where committed
    node = offset.clamp(0, depths.shape[1] - 1)
    key = torch.where(offset < 0, slot, start + depths[:, None].gather(2, node))
    own = seen.gather(2, node.expand(-1, seen.shape[1], -1)) & (offset < depths.shape[1])
    return kind.narrow(query, key, (offset < 0) | own)


def _whole_tiles(length: int) -> int:
    return -(-length // KEY_TILE) * KEY_TILE


@dataclass(frozen=True, slots=True)
class _Tree:
    """The nodes of every row: ``paths`` [B, N, D] int64 from the root down to a node, which fills the rest, and
    ``depths`` [B, N] int64; N and D are the most nodes and levels of a row. Nodes beyond a row's own are roots."""

    paths: torch.Tensor
    depths: torch.Tensor
    is_chain: tuple[bool, ...]  # per row: every node continues the one before

    @staticmethod
    def of(parents: Sequence[Sequence[int]], device: torch.device) -> "_Tree":
        """Raises ValueError where a node does not continue an earlier one."""
        size = max(len(links) for links in parents)
        beyond = size  # stands for the last committed token, and is its own parent
        above = np.full((len(parents), size + 1), beyond)
        is_chain = []
        for row, links in zip(above, parents, strict=True):
            given, nodes = np.asarray(links), np.arange(len(links))
            if (wrong := (given < -1) | (given >= nodes)).any():
                bad = int(wrong.argmax())
                raise ValueError(f"node {bad} continues node {links[bad]}: expected an earlier node or -1")
            row[: len(links)] = np.where(given < 0, beyond, given)
            is_chain.append(bool((given == nodes - 1).all()))
        row_at = np.arange(len(parents))[:, None] * (size + 1)
        flat = (above + row_at).ravel()
        node = np.arange(size) + row_at
        climbed = []  # the node itself, its parent, the parent's parent: one product per level, not per node
        while (node - row_at != beyond).any():
            climbed.append(node - row_at)
            node = flat[node]
        ancestors = np.stack(climbed, -1)  # [B, N, D]
        depths = (ancestors != beyond).sum(-1) - 1
        levels = np.maximum(depths[:, :, None] - np.arange(len(climbed)), 0)
        paths = np.take_along_axis(ancestors, levels, -1)
        return _Tree(upload(torch.from_numpy(paths), device), upload(torch.from_numpy(depths), device), tuple(is_chain))

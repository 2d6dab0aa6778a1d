"""The slot cache: what every layer keeps of all rows, and a window of it for each work item.

Rows are ragged: every row has its own length and positions, without padding on the left. Committed slot ``j`` of a
row holds position ``j``. The slots that a pass writes after the committed tokens are committed or overwritten later.
New tokens form a chain, or a tree if ``parents`` is given. In a tree, slots follow the order of the nodes, positions
follow their depth, and ``KVCache.gather`` moves an accepted path to the slots of a chain. A tree is written in one step
or in several; a node's slot is the same in both cases. Recurrent layers (``state/``) keep one state of a row's
committed tokens, and log the nodes after them.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any
from weakref import ref

import torch
from torch.overrides import handle_torch_function, has_torch_function_unary

from aspec.io.pinned import upload
from aspec.models.exact.paths import KEY_TILE, PIECE, MaskKind, Paths, Seen, whole_tiles
from aspec.models.exact.trees import Tree, TreeNodes, visible_slots
from aspec.models.hf_compat import Cache
from aspec.models.state.kernels import MixerStep
from aspec.models.state.layer_state import KVState, LayerState
from aspec.models.state.mixers import MixerCache
from aspec.models.state.nodes import Window
from aspec.models.state.shapes import StateShape
from aspec.models.state.states import RecurrentStates, StatesOfStep

KVShape = tuple[int, int, int]
"""Heads, key width and value width of one layer.

Where layers select slots by keys of an indexer, as many shapes follow those of the layers: one head without values.
"""


class KVCache:
    """Keys [R, H, C + 1, Dk] and values [R, H, C + 1, Dv] per layer; padding is written to slot C, never visible.

    ``exact``: a node's logits are bit-identical to those of decoding its path token by token. This is slower: see
    ``attention.py`` for attention and ``exact.py`` for all other products. Otherwise they are equal up to rounding.
    ``offloaded``: the layers are on a device and this cache is in host memory. ``StepCache.update`` then returns the
    new keys and values without storing them, and ``HostAttention`` stores them; positions and masks are on the host.
    ``states``: by layer, what else it keeps; ``log_slots``: most nodes of a row that may be taken back; ``saves``: one
    more state of every row can be saved.
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
        states: Sequence[StateShape | None] = (),
        log_slots: int = 0,
        saves: bool = False,
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
        stored = zip(self.keys, self.values, strict=True)
        self._kv = [KVState(keys, values) for keys, values in stored if keys is not None and values is not None]
        self.recurrent: RecurrentStates | None = None
        if any(states):
            self.recurrent = RecurrentStates(states, num_rows, log_slots, dtype, self.device, saves=saves)

    @staticmethod
    def bytes_per_token(shapes: Sequence[KVShape | None], dtype: torch.dtype) -> int:
        """Bytes of one position of one row in all layers; a row has ``capacity + 1`` positions."""
        return sum(shape[0] * (shape[1] + shape[2]) * dtype.itemsize for shape in shapes if shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the whole storage."""
        return sum(state.nbytes for state in self._states)

    @property
    def _states(self) -> "list[LayerState]":
        """What all layers keep."""
        return [*self._kv, *(() if self.recurrent is None else self.recurrent.all)]

    def room(self, start: int) -> int:
        """Most nodes that a row can have after its first ``start`` tokens, which are final."""
        left = self.capacity - start
        return left if self.recurrent is None else min(left, self.recurrent.log_slots)

    def reusable(self, row: int, length: int) -> int:
        """How many of the first ``length`` tokens of what is in a row a step may continue; 0: it must start anew."""
        return length if self.recurrent is None else self.recurrent.reusable(row, length)

    def save(self, row: int) -> None:
        """Save the state of a row's final tokens for another sequence; keys and values of all tokens stay anyway."""
        if self.recurrent is not None:
            self.recurrent.save(row)

    def step(
        self,
        rows: Sequence[int],
        starts: Sequence[int],
        counts: Sequence[int],
        parents: Sequence[Sequence[int]] | None = None,
        firsts: Sequence[int] | None = None,
        *,
        finals: Sequence[int] | None = None,
        width: int = 0,
        device: torch.device | None = None,
    ) -> "StepCache":
        """A work item's window: row ``rows[b]`` writes ``counts[b]`` nodes after its ``starts[b]`` committed tokens.

        The nodes have the numbers ``firsts[b]`` (default 0) and following in the row's tree; earlier steps wrote the
        nodes before them. ``parents[b][n]`` is the parent of node ``n``, -1 for the last committed token; it lists all
        nodes so far, ``firsts[b] + counts[b]``, parents before their children. Node ``n`` is in slot ``starts[b] + n``,
        its position is ``starts[b]`` plus its depth. Without ``parents`` every node continues the node before it.
        Rows are padded to at least ``width`` tokens. The step's tensors are on ``device``, default the storage's.
        ``finals[b]`` leading tokens of the row are never taken back, default ``starts[b]``; recurrent layers log the
        nodes after them. Raises ValueError for repeated or unknown rows, for an invalid tree, and for tokens beyond the
        capacity.
        """
        firsts = [0] * len(rows) if firsts is None else firsts
        if not len(rows) == len(starts) == len(counts) == len(firsts) or min(counts, default=0) < 1:
            raise ValueError(f"expected a start and at least one token per row, found {rows=} {starts=} {counts=}")
        if min(*starts, *firsts) < 0:
            raise ValueError(f"expected starts and first nodes of at least 0, found {starts=} {firsts=}")
        if len(set(rows)) != len(rows) or not 0 <= min(rows) <= max(rows) < self.num_rows:
            raise ValueError(f"expected distinct rows below {self.num_rows}, found {rows}")
        totals = [first + count for first, count in zip(firsts, counts, strict=True)]
        if max(start + total for start, total in zip(starts, totals, strict=True)) > self.capacity:
            raise ValueError(f"rows {rows} at {starts} with {totals} tokens exceed the capacity of {self.capacity}")
        if parents is not None and [len(links) for links in parents] != totals:
            raise ValueError(f"expected parents for {totals} nodes, found {[len(links) for links in parents]}")
        step = StepCache(self, rows, starts, counts, firsts, parents, width=width, device=device)
        if self.recurrent is not None:
            links = [None] * len(rows) if parents is None else parents
            windows = [Window(*own) for own in zip(rows, starts, firsts, counts, finals or starts, links, strict=True)]
            step.states = self.recurrent.of_step(windows, step.position_ids.shape[1], exact=self.exact)
        return step

    def gather(self, row: int, start: int, path: Sequence[int]) -> None:
        """Move the accepted nodes ``path``, numbered from slot ``start``, to the slots from ``start`` on, in order."""
        if self.recurrent is not None:
            self.recurrent.keep(row, start, path)
        if list(path) == list(range(len(path))):
            return
        source, target = upload(start + torch.tensor(path), self.device), slice(start, start + len(path))
        for kept in self._kv:
            kept.move(row, target, source)

    def clear(self, row: int, start: int = 0) -> None:
        """Forget a row from slot ``start`` on: NaN there would spoil even a sum in which its weight is 0."""
        for state in self._states:
            state.clear(row, start)


class StepCache(Cache):  # type: ignore[misc]  # transformers is untyped
    """The cache of transformers' layers while one work item runs through them.

    ``position_ids`` [B, T] int64; T is the larger of ``width`` and the largest count. Shorter rows are padded at their
    end. A padding token writes to the trash slot and sees the same slots as the row's last real token.
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
        self.rows = tuple(rows)
        self._starts = starts
        self._totals = [first + count for first, count in zip(firsts, counts, strict=True)]
        end = max(start + total for start, total in zip(starts, self._totals, strict=True))
        self.high = min(whole_tiles(end), storage.capacity)
        uploaded = upload(torch.tensor([list(starts), list(counts), list(firsts), list(rows)]), device)
        self._start, last, first = uploaded[0][:, None], uploaded[1][:, None] - 1, uploaded[2][:, None]  # [B, 1]
        offsets = torch.arange(width, device=device)[None]  # [1, T]
        real = offsets <= last
        self._node = torch.minimum(offsets, last) + first  # [B, T]: each token's node; padding: the row's last
        self._tree = None if parents is None else Tree.of(parents, device)
        depth = self._node if self._tree is None else self._tree.depths.gather(1, self._node)
        self.position_ids = self._start + depth
        self.slots = torch.where(real, self._start + self._node, storage.capacity)  # [B, T]
        self._rows = uploaded[3]
        consecutive = list(rows) == list(range(rows[0], rows[0] + len(rows)))
        self._row_slice = slice(rows[0], rows[0] + len(rows)) if consecutive else None
        begins = {start + first for start, first in zip(starts, firsts, strict=True)}
        uniform = len(begins) == 1 and set(counts) == {width}
        self._slot_slice = slice(min(begins), min(begins) + width) if uniform else None
        self._masks: dict[MaskKind, torch.Tensor] = {}
        self._added: dict[MaskKind, torch.Tensor] = {}
        self._paths: dict[MaskKind, tuple[Paths, ...]] = {}
        self._places: dict[object, torch.Tensor] = {}  # by strides, see ``places``
        self.told: dict[object, Any] = {}  # what is made once for the layers of a step (``exact/whole_layers.py``)
        self.attended: dict[int, ref[torch.Tensor]] = {}  # if offloaded, by layer: the new keys it attended to
        self.states: StatesOfStep | None = None  # None: no layer is recurrent

    @property
    def offloaded(self) -> bool:
        """Whether the layers are on a device while the cache is in host memory."""
        return self.storage.offloaded

    def seen(self, kind: MaskKind) -> Seen | torch.Tensor:
        """What the queries see in layers of a kind: the mask argument of layers that attend with ``attend``."""
        return Seen(self.exact, partial(self.paths, kind), partial(self.mask, kind))

    def paths(self, kind: MaskKind) -> tuple[Paths, ...]:
        """The paths of every row."""
        if kind not in self._paths:
            self._paths[kind] = self._make_paths(kind)
        return self._paths[kind]

    def mask(self, kind: MaskKind | None = None) -> torch.Tensor:
        """Bool [B, 1, T, S] over the first S slots of every row: True where a query may see the slot."""
        kind = kind or MaskKind()
        if kind not in self._masks:
            self._masks[kind] = self._make_mask(kind)[:, None]
        return self._masks[kind]

    def added_mask(self, kind: MaskKind) -> torch.Tensor:
        """``mask`` as [B, 1, T, S] of the model's dtype, to be added to scores: 0 where a query may see the slot."""
        if kind not in self._added:
            mask = self.mask(kind)
            zeros = torch.zeros(mask.shape, dtype=self.storage.dtype, device=mask.device)
            self._added[kind] = zeros.masked_fill_(~mask, torch.finfo(zeros.dtype).min)
        return self._added[kind]

    def biased(self, bias: torch.Tensor) -> torch.Tensor:
        """A bias of positions [B * H, 1, S] or [B, H, 1, S], which counts slots, as one of what is in the slots."""
        if (tree := self.tree_nodes()) is None:
            return bias
        positions = tree.slot_positions(self.high).clamp_(max=self.high - 1)
        by_row = bias.reshape(len(positions), -1, self.high)
        return by_row.gather(2, positions[:, None].expand(by_row.shape)).view(bias.shape)

    def _make_mask(self, kind: MaskKind) -> torch.Tensor:
        return visible_slots(kind, self.position_ids, self.high, self.tree_nodes())

    def tree_nodes(self) -> TreeNodes | None:
        """The trees of the step, for its masks; None if all rows are chains."""
        if self._tree is None:
            return None
        depths = self._tree.depths
        seen = torch.zeros(*self._node.shape, depths.shape[1], dtype=torch.bool, device=depths.device)
        return TreeNodes(self._start, depths, seen.scatter_(2, self._node_paths(self._tree), True))

    def _node_paths(self, tree: Tree) -> torch.Tensor:
        """[B, T, D] int64: each token's path from its root to its own node, which is repeated up to D."""
        return tree.paths.gather(1, self._node[:, :, None].expand(-1, -1, tree.paths.shape[2]))

    def _make_paths(self, kind: MaskKind) -> tuple[Paths, ...]:
        nodes = None if self._tree is None else self._node_paths(self._tree)
        made = []
        for row, (start, positions) in enumerate(zip(self._starts, self.position_ids.tolist(), strict=True)):
            length = (max(positions) // PIECE + 1) * PIECE
            if self._tree is None or nodes is None or self._tree.is_chain[row]:
                made.append(Paths(kind, positions, length, length, None, self.position_ids.device))
                continue
            prefix = start // KEY_TILE * KEY_TILE
            position = torch.arange(prefix, length, device=self.position_ids.device)
            level = (position - start).clamp(0, nodes.shape[2] - 1)
            tail = torch.where(position < start, position, start + nodes[row][:, level])
            num_slots = whole_tiles(start + self._totals[row])
            made.append(Paths(kind, positions, num_slots, prefix, tail, self.position_ids.device))
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

        If offloaded, it stores nothing and returns its arguments. A torch function mode can intercept it like torch's
        own functions (``split_layer.py``).
        """
        if has_torch_function_unary(key_states):
            arguments = (self, key_states, value_states, layer_idx)
            result: tuple[torch.Tensor, torch.Tensor] = handle_torch_function(
                StepCache.update, (key_states,), *arguments
            )
            return result
        if self.offloaded:
            return key_states, value_states
        self.store(layer_idx, key_states, value_states)
        return self.stored(layer_idx)

    def update_indexer(self, index_states: torch.Tensor, layer_idx: int) -> torch.Tensor:
        """Store keys [B, T, D] by which a layer selects slots; returns [B, S, D] of the rows so far: see ``update``."""
        if has_torch_function_unary(index_states):
            arguments = (self, index_states, layer_idx)
            made: torch.Tensor = handle_torch_function(StepCache.update_indexer, (index_states,), *arguments)
            return made
        place, keys = len(self.storage.keys) // 2 + layer_idx, index_states[:, None]
        self.store(place, keys, keys[..., :0])
        return self.stored(place)[0][:, 0]

    def store(self, layer: int, *states: torch.Tensor) -> None:
        """Store keys and values [B, H, T, D] of the new tokens."""
        for storage, new in zip(self.storages(layer), states, strict=True):
            if self._row_slice is not None and self._slot_slice is not None:
                storage[self._row_slice, :, self._slot_slice] = new
            else:
                storage[self._rows[:, None], :, self.slots] = new.transpose(1, 2)

    def places(self, layer: int) -> torch.Tensor | None:
        """Where the step's tokens go in keys and values: elements, int64 [B T, 2].

        None if heads of keys and of values lie in other distances.
        """
        strides = [own.stride() for own in self.storages(layer)]
        if strides[0][1] != strides[1][1]:
            return None
        found = self._places.get(key := tuple(strides))
        if found is None:
            both = [self._rows[:, None] * own[0] + self.slots * own[2] for own in strides]
            found = self._places[key] = torch.stack(both, -1).view(-1, 2)
        return found

    def written(self, layer: int) -> list[torch.Tensor]:
        """Keys and values [B, H, T, D] of the new tokens, copied from the cache."""
        return [own[self._rows[:, None], :, self.slots].transpose(1, 2) for own in self.storages(layer)]

    def stored(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values [B, H, S, D] of the rows so far."""
        own = self._rows if self._row_slice is None else self._row_slice
        keys, values = (storage[own, :, : self.high] for storage in self.storages(layer))
        return keys, values

    def storages(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values [R, H, S + 1, D] of all rows; what is put into the last slot is not read."""
        keys, values = self.storage.keys[layer], self.storage.values[layer]
        assert keys is not None
        assert values is not None
        return keys, values

    def mixer(self, layer_idx: int) -> "tuple[MixerCache, MixerStep]":
        """What the mixer of a recurrent layer runs on."""
        assert self.states is not None, "a model with recurrent layers has their states"
        return self.states.of_layer(layer_idx)

    def has_previous_state(self, layer_idx: int | None = None) -> bool:
        """Whether recurrent layers go another way for one token: they never do."""
        return False

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens before this item's tokens. Some models ask for it; positions are always given explicitly."""
        return max(self._starts)

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """Key length and offset of a mask; masks are always given explicitly."""
        return self.high, 0

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """Slots per row."""
        return self.storage.capacity

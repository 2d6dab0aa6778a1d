"""What a layer keeps of every row from pass to pass, and how an accepted path stays and the rest is taken back."""

from collections.abc import Sequence
from typing import Protocol

import torch

from aspec.io.pinned import upload
from aspec.models.state.nodes import Reach, Window


class LayerState(Protocol):
    """One kind of state of one layer. Nodes are numbered by slots: see ``KVCache``."""

    @property
    def nbytes(self) -> int:
        """Bytes of the storage of all rows."""
        ...

    def keep(self, row: int, start: int, path: Sequence[int]) -> None:
        """Make the accepted nodes ``path``, numbered from slot ``start``, a chain from that slot on."""
        ...

    def clear(self, row: int, start: int) -> None:
        """Forget a row from slot ``start`` on, so that no number of it is used, also not times 0."""
        ...

    def reusable(self, row: int, length: int) -> int:
        """The most leading tokens of a row, at most ``length``, that a step may continue."""
        ...


class KVState:
    """Keys [R, H, C + 1, Dk] and values [R, H, C + 1, Dv]: a node is in its slot, so any slot can be continued."""

    def __init__(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        self.keys, self.values = keys, values

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values."""
        return self.keys.nbytes + self.values.nbytes

    def keep(self, row: int, start: int, path: Sequence[int]) -> None:
        """Move the nodes of a path; see ``LayerState``."""
        self.move(row, slice(start, start + len(path)), upload(start + torch.tensor(path), self.keys.device))

    def move(self, row: int, target: slice, source: torch.Tensor) -> None:
        """Move the nodes in the slots ``source`` [N] int64 to the slots ``target``."""
        for storage in (self.keys, self.values):  # indexing copies before it writes, so slots may overlap
            storage[row, :, target] = storage[row][:, source]

    def clear(self, row: int, start: int) -> None:
        """Set a row to zero from a slot on."""
        self.keys[row, :, start:].zero_()
        self.values[row, :, start:].zero_()

    def reusable(self, row: int, length: int) -> int:
        """See ``LayerState``."""
        return length


class LoggedState:
    """Committed tensors [R, ...], and a log [R, W, ...] of what every node after the committed tokens adds to them.

    ``reaches``: by row, what is known. A node in slot n is in the log at place n % W. With ``saves``, another state of
    every row can be saved, and continued later (``save``).
    """

    def __init__(self, committed: torch.Tensor, log: Sequence[torch.Tensor], *, saves: bool) -> None:
        self.committed, self.log = committed, tuple(log)
        self.reaches = [Reach() for _ in range(len(committed))]
        self._saved = torch.zeros_like(committed) if saves else None
        self._saved_lengths = [0] * len(committed)  # 0: nothing is saved

    @property
    def nbytes(self) -> int:
        """Bytes of states and log."""
        saved = 0 if self._saved is None else self._saved.nbytes
        return self.committed.nbytes + saved + sum(tensor.nbytes for tensor in self.log)

    def save(self, row: int) -> None:
        """Keep a copy of a row's committed state, in place of the last one."""
        assert self._saved is not None, "the states were made to be saved"
        self._saved[row] = self.committed[row]
        self._saved_lengths[row] = self.reaches[row].length

    def begin(self, windows: Sequence[Window]) -> tuple[Reach, ...]:
        """Go back to what was saved where a step continues it; returns what is known of its rows."""
        for window in windows:
            row, length = window.row, self._saved_lengths[window.row]
            if window.begin == 0:
                self._saved_lengths[row] = 0
            elif self._saved is not None and window.begin == length < self.reaches[row].length:
                self.committed[row] = self._saved[row]
                self.reaches[row] = Reach(length, length)
        return tuple(self.reaches[window.row] for window in windows)

    def keep(self, row: int, start: int, path: Sequence[int]) -> None:
        """Move the logged nodes of a path; those that are committed already have no entry. See ``LayerState``."""
        reach = self.reaches[row]
        self.reaches[row] = Reach(reach.length, max(reach.length, start + len(path)))
        moved = [(start + node, start + at) for at, node in enumerate(path) if start + at >= reach.length]
        if not moved or all(source == target for source, target in moved):
            return
        places = torch.tensor(moved) % self.log[0].shape[1]
        source, target = upload(places.T.contiguous(), self.committed.device)
        for tensor in self.log:
            tensor[row, target] = tensor[row, source]

    def clear(self, row: int, start: int) -> None:
        """Forget the nodes from a slot on; from slot 0 on the state too. See ``LayerState``."""
        reach = self.reaches[row]
        self.reaches[row] = Reach(min(reach.length, start), min(reach.end, start))
        if start < reach.length or not start:
            self.committed[row].zero_()
            self.reaches[row], self._saved_lengths[row] = Reach(), 0
        for tensor in self.log:
            if size := tensor.shape[1]:
                slots = torch.arange(min(reach.end, max(start, reach.end - size)), reach.end, device=tensor.device)
                tensor[row, slots % size] = 0

    def reusable(self, row: int, length: int) -> int:
        """See ``LayerState``."""
        saved = self._saved_lengths[row]
        return length if self.reaches[row].may_start(length) else saved if saved <= length else 0

    def advance(self, windows: Sequence[Window]) -> None:
        """A step has run."""
        for window in windows:
            self.reaches[window.row] = self.reaches[window.row].after(window)

"""The sizes of what recurrent layers keep."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

PIECE = 64
"""Tokens of a prompt whose pairs are weighed at once, in a step that is not exact."""


@dataclass(frozen=True, slots=True)
class RecurrenceShape:
    """S [H, Dk, Dv]: H = ``groups * shared`` heads, of which those of a group share keys and queries."""

    groups: int
    shared: int
    key: int  # Dk
    value: int  # Dv
    rate: tuple[int, int]  # of the decay: 1 or Dk, 1 or Dv

    @property
    def heads(self) -> int:
        """H."""
        return self.groups * self.shared

    @property
    def state_bytes(self) -> int:
        """Bytes of one state; states are fp32."""
        return self.heads * self.key * self.value * 4

    @property
    def node_bytes(self) -> int:
        """Bytes that the log keeps of a node: its key, its update u and its decay."""
        heads = self.heads
        return (self.groups * self.key + heads * self.value + heads * math.prod(self.rate)) * 4


@dataclass(frozen=True, slots=True)
class StateShape:
    """What one layer keeps of a row beside keys and values."""

    convolutions: tuple[tuple[int, int], ...] = ()  # (channels, inputs of one result) of every causal convolution
    recurrence: RecurrenceShape | None = None

    def row_bytes(self, dtype: torch.dtype) -> int:
        """Bytes of a row's committed state."""
        tails = sum(channels * (size - 1) for channels, size in self.convolutions) * dtype.itemsize
        return tails + (0 if self.recurrence is None else self.recurrence.state_bytes)

    def node_bytes(self, dtype: torch.dtype) -> int:
        """Bytes of a node in a row's log."""
        inputs = sum(channels for channels, _ in self.convolutions) * dtype.itemsize
        return inputs + (0 if self.recurrence is None else self.recurrence.node_bytes)

    def step_bytes(self, nodes: int, num_rows: int, tokens: int, dtype: torch.dtype) -> int:
        """Most bytes that a step of so many tokens holds, if a tree of a row has at most ``nodes``.

        A convolution holds its inputs twice, and three fp32 tensors of that size. A recurrence holds its inputs and
        results in fp32, the logged nodes likewise, two states, and one of every node that waits while lighter nodes
        that continue it run: each of these has at most half of the nodes of the one before it. A step that is not exact
        holds weights of pairs of a row's nodes.
        """
        inputs = max((channels for channels, _ in self.convolutions), default=0) * (2 * dtype.itemsize + 3 * 4)
        own = self.recurrence
        if own is None:
            return tokens * inputs
        heads = own.heads
        states = 2 + nodes.bit_length() + (3 if own.rate[1] > 1 else 0)  # a decay of that size
        recurred = (2 * own.groups * own.key + heads * (5 * own.key + 5 * own.value + 2 * math.prod(own.rate))) * 4
        pairs = heads * max(nodes, PIECE) * 2 * max(nodes, PIECE) * 4 * 4
        return max(tokens * inputs, (tokens + num_rows * nodes) * recurred + pairs + states * own.state_bytes)


def row_bytes(shapes: Sequence[StateShape | None], dtype: torch.dtype) -> int:
    """Bytes of one row's states in all layers."""
    return sum(shape.row_bytes(dtype) for shape in shapes if shape)


def node_bytes(shapes: Sequence[StateShape | None], dtype: torch.dtype) -> int:
    """Bytes of one node of a row's log in all layers."""
    return sum(shape.node_bytes(dtype) for shape in shapes if shape)

"""What each operation computes: the tensors behind the task records.

Called on lane threads, never on the loop. The graph orders every two tasks that touch the same state, so
nothing here locks. Source of the acceptance rule: the target draws with noise keyed by (request seed, position),
and a proposal is accepted while it is the very token drawn (Daliri et al., "Coupling without communication").
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from aspec.io.layout import Part
from aspec.kv import KVCache
from aspec.model import Activation, Model
from aspec.sampling import draw_rows
from aspec.sequence import Sequence as TokenSequence
from aspec.tasks.task import Op, RowOutcome, Seating, Task, WorkItem


@dataclass(slots=True)
class RowState:
    """What the maths keeps of an occupied row; mutable, because tasks of one row are ordered by the graph."""

    sequence: TokenSequence
    proposals: list[int] = field(default_factory=list)
    drafted: int = 0  # positions 0 .. drafted-1 of the draft's KV belong to committed tokens or live proposals


@dataclass(frozen=True, slots=True)
class Weights:
    """Where a model's streamed parts land: the slots as uint8 tensors, the parts by index, one scratch buffer."""

    parts: Mapping[int, Part]
    slots: Sequence[torch.Tensor]
    scratch: torch.Tensor


class ModelRunner:
    """Runs tasks on the target and the draft model."""

    def __init__(
        self,
        target: Model,
        target_kv: KVCache,
        weights: Weights,
        draft: Model | None = None,
        draft_kv: KVCache | None = None,
    ) -> None:
        self._target, self._target_kv, self._weights = target, target_kv, weights
        self._draft, self._draft_kv = draft, draft_kv
        self._sequences: dict[int, TokenSequence] = {}  # those that wait for a row
        self._rows: dict[int, RowState] = {}
        self._activations: dict[int, Activation] = {}  # by item index, between EMBED and HEAD
        self._bound: dict[int, int] = {}  # streamed part -> the pass it was last bound in
        self._draws: dict[int, list[list[int]]] = {}  # by item index, between HEAD and ACCEPT
        self._ops: Mapping[Op, Callable[[Task], tuple[RowOutcome, ...]]] = {
            Op.EMBED: self._embed,
            Op.LAYER: self._layer,
            Op.HEAD: self._head,
            Op.ACCEPT: self._accept,
            Op.DRAFT: self._draft_step,
            Op.DRAFT_PREFILL: self._draft_prefill,
        }

    def admit(self, sequence: TokenSequence) -> None:
        """Know a sequence before the scheduler may seat it."""
        self._sequences[sequence.id] = sequence

    def sequence_in(self, row: int) -> TokenSequence:
        """The sequence that sits in a row."""
        return self._rows[row].sequence

    def seat(self, seatings: Sequence[Seating]) -> None:
        """Rows change hands between passes."""
        for seating in seatings:
            if seating.sequence is None:
                del self._rows[seating.row]
            else:
                self._rows[seating.row] = RowState(self._sequences.pop(seating.sequence))

    @torch.inference_mode()
    def run(self, task: Task) -> tuple[RowOutcome, ...]:
        """Compute one task. Raises NumericError where the target's logits are not numbers."""
        return self._ops[task.op](task)

    # -- target ----------------------------------------------------------------------------------------------

    def _embed(self, task: Task) -> tuple[RowOutcome, ...]:
        item = _item(task)
        step = self._target_kv.step(item.rows, item.starts, item.counts)
        tokens = [self._tokens(*triple) for triple in zip(item.rows, item.starts, item.counts, strict=True)]
        self._activations[item.index] = self._target.embed(_pad(tokens), step)
        return ()

    def _tokens(self, row: int, start: int, count: int) -> list[int]:
        """The committed tokens from ``start`` on, then the row's proposals."""
        state = self._rows[row]
        committed = state.sequence.tokens[start : start + count]
        return committed + state.proposals[: count - len(committed)]

    def _layer(self, task: Task) -> tuple[RowOutcome, ...]:
        weights = self._weights
        for part, slot in task.slots:
            if self._bound.get(part) != task.number:  # several items of a pass share what one bind converted
                self._target.bind(weights.parts[part], weights.slots[slot], weights.scratch)
                self._bound[part] = task.number
        self._target.layer(task.layer, self._activations[_item(task).index])
        return ()

    def _head(self, task: Task) -> tuple[RowOutcome, ...]:
        item = _item(task)
        activation = self._activations.pop(item.index)
        keep = torch.tensor([[count - 1] for count in item.counts]) if item.prefill else None
        logits = self._target.head(activation, keep)
        spans = [(s + c, 1) if item.prefill else (s + 1, c) for s, c in zip(item.starts, item.counts, strict=True)]
        positions = [list(range(first, first + n)) for first, n in spans]
        samplers = [self._rows[row].sequence.sampler for row in item.rows]
        self._draws[item.index] = draw_rows(samplers, logits, positions)
        return ()

    def _accept(self, task: Task) -> tuple[RowOutcome, ...]:
        item = _item(task)
        draws = self._draws.pop(item.index)
        return tuple(
            self._accept_row(row, drawn, 0 if item.prefill else count - 1)
            for row, drawn, count in zip(item.rows, draws, item.counts, strict=True)
        )

    def _accept_row(self, row: int, drawn: list[int], num_proposed: int) -> RowOutcome:
        """Commit the draws up to and including the first that no proposal foresaw."""
        state = self._rows[row]
        proposals = state.proposals[:num_proposed]
        matches = [proposal == draw for proposal, draw in zip(proposals, drawn, strict=False)]
        accepted = matches.index(False) if False in matches else num_proposed
        num_new = state.sequence.commit(drawn[: accepted + 1])
        state.drafted = min(state.drafted, len(state.sequence.tokens) - 1)
        state.proposals = []
        stopped = state.sequence.finish_reason is not None
        return RowOutcome(row, num_proposed, accepted, num_new, stopped)

    # -- draft -----------------------------------------------------------------------------------------------

    def _draft_step(self, task: Task) -> tuple[RowOutcome, ...]:
        """Propose one more token for every row: the draft catches up with what it has not seen, then draws."""
        item = _item(task)
        states = [self._rows[row] for row in item.rows]
        fed = [(state.sequence.tokens + state.proposals)[state.drafted :] for state in states]
        logits = self._run_draft(item.rows, [state.drafted for state in states], fed)
        positions = [[state.drafted + len(tokens)] for state, tokens in zip(states, fed, strict=True)]
        samplers = [state.sequence.sampler for state in states]
        drawn = draw_rows(samplers, logits, positions, limit=self._target.vocab_size)
        for state, tokens, row_draw in zip(states, fed, drawn, strict=True):
            state.drafted += len(tokens)
            state.proposals.append(row_draw[0])
        return ()

    def _draft_prefill(self, task: Task) -> tuple[RowOutcome, ...]:
        """A chunk of prompts into the draft's KV; the last token waits for the first draft step."""
        item = _item(task)
        states = [self._rows[row] for row in item.rows]
        fed = [
            state.sequence.tokens[start : start + count]
            for state, start, count in zip(states, item.starts, item.counts, strict=True)
        ]
        self._run_draft(item.rows, item.starts, fed, want_logits=False)
        for state, tokens in zip(states, fed, strict=True):
            state.drafted += len(tokens)
        return ()

    def _run_draft(
        self, rows: Sequence[int], starts: Sequence[int], fed: list[list[int]], *, want_logits: bool = True
    ) -> torch.Tensor:
        """One forward of the draft; logits [B, 1, V] at every row's last token."""
        assert self._draft is not None
        assert self._draft_kv is not None
        counts = [len(tokens) for tokens in fed]
        ids = _pad(fed)
        ids = ids.where(ids < self._draft.vocab_size, 0)  # padding may differ: what the draft cannot know costs a miss
        activation = self._draft.embed(ids, self._draft_kv.step(rows, starts, counts))
        for layer in range(self._draft.num_layers):
            self._draft.layer(layer, activation)
        if not want_logits:
            return activation.hidden
        return self._draft.head(activation, torch.tensor([[count - 1] for count in counts]))


def _item(task: Task) -> WorkItem:
    assert task.item is not None, f"{task.label} carries no work item"
    return task.item


def _pad(rows: list[list[int]]) -> torch.Tensor:
    """Token ids as [B, T] int64; shorter rows repeat their last token, whose results nobody reads."""
    width = max(len(tokens) for tokens in rows)
    return torch.tensor([tokens + [tokens[-1]] * (width - len(tokens)) for tokens in rows])

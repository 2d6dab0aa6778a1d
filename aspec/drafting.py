"""The draft of every row: chains and trees of proposals, the draft model's KV, and what acceptance teaches.

Called on a lane's thread, never on the loop; the graph orders tasks that touch the same state. A chain grows by one
token a step; a tree grows by one level a step, best-first by calibrated path probability. Wherever a draw of the
target is chased, the draft ranks with the noise of that very draw.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from aspec.calibration import Calibration
from aspec.kv import KVCache
from aspec.model import Model
from aspec.params import SamplingParams
from aspec.penalties import Context
from aspec.sampling import Sampler, draw_rows
from aspec.sequence import Sequence as TokenSequence
from aspec.tasks.task import Grown, Growth, Task, WorkItem
from aspec.tasks.tree import ROOT, Proposal, Tree, best_children

GREEDY = Sampler(SamplingParams(temperature=0.0))
"""Proposes the likeliest token, whatever the target will draw."""

GREEDY_TEMPERATURE = 0.5  # of the scores where the target takes the likeliest token: 10.3 tokens per pass against 7.8


@dataclass(slots=True)
class DraftState:
    """What the draft keeps of an occupied row; mutable, because tasks of one row are ordered by the graph."""

    sequence: TokenSequence
    drafted: int = 0  # positions of the draft's KV that hold committed tokens or the live chain
    chain: list[int] = field(default_factory=list)
    tree: Tree | None = None
    proposal: Proposal | None = None  # of the tree, once it is to be verified

    def context(self, paths: Sequence[tuple[int, ...]]) -> Context | None:
        """What leads to the positions behind some paths; None where no penalty asks."""
        return None if self.sequence.counts is None else Context(self.sequence.counts, paths)


class Drafter(ABC):
    """Proposes for the rows it is told of; a draft method is a subclass."""

    def __init__(self) -> None:
        self._rows: dict[int, DraftState] = {}

    def seat(self, row: int, sequence: TokenSequence | None) -> None:
        """A row changes hands."""
        self._rows.pop(row, None)
        if sequence is not None:
            self._rows[row] = DraftState(sequence)

    @abstractmethod
    def prefill(self, item: WorkItem) -> None:
        """Take a chunk of prompts."""

    @abstractmethod
    def extend_chains(self, item: WorkItem) -> None:
        """Propose one more token for every row."""

    @abstractmethod
    def grow_trees(self, item: WorkItem, growth: Growth) -> tuple[Grown, ...]:
        """Grow one level of every row's tree."""

    @abstractmethod
    def settle(self, row: int, path: list[int]) -> None:
        """The target has spoken and the sequence has grown: learn from the accepted path, forget the proposal."""

    def propose(self, row: int, count: int) -> tuple[list[int], list[int] | None]:
        """The first ``count`` proposed tokens of a row, and their parents (-1: the last committed one); None: a chain.

        From now on until ``settle`` they are what is verified.
        """
        state = self._rows[row]
        if state.tree is None:
            return state.chain[:count], None
        state.proposal = state.tree.proposal().first(count)
        return list(state.proposal.tokens), list(state.proposal.parents)

    def follow(self, row: int, drawn: list[int], count: int) -> tuple[list[int], list[int]]:
        """The accepted path, as places in the proposal, and the tokens that the target has thereby drawn."""
        state = self._rows[row]
        if state.proposal is not None:
            return state.proposal.follow(drawn)
        matches = [proposed == draw for proposed, draw in zip(state.chain[:count], drawn, strict=False)]
        accepted = matches.index(False) if False in matches else count
        return list(range(accepted)), drawn[: accepted + 1]


class ModelDrafter(Drafter):
    """A small model with the target's vocabulary."""

    def __init__(self, model: Model, kv: KVCache, target_vocab_size: int, *, shared_noise: bool = True) -> None:
        super().__init__()
        self._model, self._kv, self._limit = model, kv, target_vocab_size
        self._shared_noise = shared_noise
        self._calibration = {greedy: Calibration() for greedy in (True, False)}

    # -- growth ----------------------------------------------------------------------------------------------

    def prefill(self, item: WorkItem) -> None:
        """A chunk of prompts into the draft's KV; the last token waits for the first draft step."""
        states = [self._rows[row] for row in item.rows]
        fed = [
            state.sequence.tokens[start : start + count]
            for state, start, count in zip(states, item.starts, item.counts, strict=True)
        ]
        self._run(item.rows, item.starts, fed, want_logits=False)
        for state, tokens in zip(states, fed, strict=True):
            state.drafted += len(tokens)

    def extend_chains(self, item: WorkItem) -> None:
        """Propose one more token for every row: the draft catches up with what it has not seen, then draws."""
        states = [self._rows[row] for row in item.rows]
        fed = [(state.sequence.tokens + state.chain)[state.drafted :] for state in states]
        logits = self._run(item.rows, [state.drafted for state in states], fed)
        positions = [[state.drafted + len(tokens)] for state, tokens in zip(states, fed, strict=True)]
        samplers = [state.sequence.sampler if self._shared_noise else GREEDY for state in states]
        contexts = [state.context([tuple(state.chain)]) for state in states]
        drawn = draw_rows(samplers, logits, positions, limit=self._limit, contexts=contexts)
        for state, tokens, row_draw in zip(states, fed, drawn, strict=True):
            state.drafted += len(tokens)
            state.chain.append(row_draw[0])

    def grow_trees(self, item: WorkItem, growth: Growth) -> tuple[Grown, ...]:
        """One level of every row's tree; the first level catches up with what the draft has not seen."""
        states = [self._rows[row] for row in item.rows]
        limits = list(zip(states, growth.budgets, growth.depths, strict=True))
        first = growth.level == 0
        nodes = self._plant(item.rows, limits) if first else self._feed(item.rows, states, growth.beams)
        for (state, budget, _), (fed, logits) in zip(limits, nodes, strict=True):
            assert state.tree is not None
            self._offer(state, state.tree, fed, logits, growth.width)
            state.tree.prune(budget)
        return tuple(self._grown(row, state, growth.beams) for row, state in zip(item.rows, states, strict=True))

    def _plant(
        self, rows: Sequence[int], limits: Sequence[tuple[DraftState, int, int]]
    ) -> list[tuple[list[int], torch.Tensor]]:
        """New trees, and the draft's logits at their roots."""
        states = [state for state, _, _ in limits]
        fed = [state.sequence.tokens[state.drafted :] for state in states]
        logits = self._run(rows, [state.drafted for state in states], fed)
        for (state, _, depth), tokens in zip(limits, fed, strict=True):
            state.drafted += len(tokens)
            calibration = self._calibration[state.sequence.sampler.greedy]
            state.tree = Tree(depth, state.sequence.end_ids, calibration.log_probability)
            state.tree.feed([ROOT])
        return [([ROOT], own) for own in logits]

    def _feed(
        self, rows: Sequence[int], states: Sequence[DraftState], beams: int
    ) -> list[tuple[list[int], torch.Tensor]]:
        """The next level's nodes of every tree, and the draft's logits at them."""
        nodes, firsts = [], []
        for state in states:
            assert state.tree is not None
            firsts.append(len(state.tree.slots))
            nodes.append(state.tree.frontier(self._beams(state, beams)))
            state.tree.feed(nodes[-1])
        trees = [state.tree for state in states if state.tree is not None]
        tokens = [[tree.nodes[node].token for node in own] for tree, own in zip(trees, nodes, strict=True)]
        parents = [tree.slot_parents() for tree in trees]
        starts = [state.drafted for state in states]
        logits = self._run(rows, starts, tokens, parents=parents, firsts=firsts)
        return [(own, logits[row, : len(own)]) for row, own in enumerate(nodes)]

    def _offer(self, state: DraftState, tree: Tree, nodes: list[int], logits: torch.Tensor, width: int) -> None:
        """Children of some nodes, scored for the positions they would stand at."""
        sampler = state.sequence.sampler
        depths = [0 if node == ROOT else tree.nodes[node].depth for node in nodes]
        positions = [state.drafted + depth for depth in depths]
        noise = sampler.noise(positions, logits.shape[-1]) if self._shared_noise else None
        logits = sampler.penalised(logits[..., : self._limit], state.context([tree.path(node) for node in nodes]))
        temperature = GREEDY_TEMPERATURE if sampler.greedy else sampler.temperature
        tokens, scores = best_children(logits, width, noise, temperature=temperature, limit=self._limit)
        for node, own_tokens, own_scores in zip(nodes, tokens.tolist(), scores.tolist(), strict=True):
            tree.extend(node, own_tokens, own_scores)

    def _grown(self, row: int, state: DraftState, beams: int) -> Grown:
        """What the policy hears of a tree."""
        assert state.tree is not None
        return Grown(row, tuple(state.tree.probabilities()), state.tree.promise(self._beams(state, beams)))

    def _beams(self, state: DraftState, beams: int) -> int:
        """Forwards of a level: no more than the draft's KV has room for."""
        assert state.tree is not None
        return min(beams, self._kv.capacity - state.drafted - len(state.tree.slots))

    # -- verification ----------------------------------------------------------------------------------------

    def settle(self, row: int, path: list[int]) -> None:
        """Keep the accepted path in the draft's KV, learn, forget."""
        state = self._rows[row]
        proposal = state.proposal
        if proposal is not None:
            calibration = self._calibration[state.sequence.sampler.greedy]
            for place, accepted in proposal.verdicts(path):
                offered = proposal.offered[place]
                if offered is not None:
                    calibration.observe(offered, accepted)
            standing = proposal.standing(path)
            self._kv.gather(row, state.drafted, standing)
            state.drafted += len(standing)
        state.drafted = min(state.drafted, len(state.sequence.tokens) - 1)
        state.chain, state.tree, state.proposal = [], None, None

    # -- the model -------------------------------------------------------------------------------------------

    def _run(
        self,
        rows: Sequence[int],
        starts: Sequence[int],
        fed: list[list[int]],
        *,
        parents: Sequence[Sequence[int]] | None = None,
        firsts: Sequence[int] | None = None,
        want_logits: bool = True,
    ) -> torch.Tensor:
        """One forward of the draft; logits [B, 1, V] at every row's last token, of trees [B, T, V] at all nodes."""
        counts = [len(tokens) for tokens in fed]
        ids = pad(fed)
        ids = ids.where(ids < self._model.vocab_size, 0)  # padding may differ: what the draft cannot know costs a miss
        activation = self._model.embed(ids, self._kv.step(rows, starts, counts, parents, firsts))
        for layer in range(self._model.num_layers):
            self._model.layer(layer, activation)
        if not want_logits:
            return activation.hidden
        keep = None if parents is not None else torch.tensor([[count - 1] for count in counts])
        return self._model.head(activation, keep)


def pad(rows: list[list[int]]) -> torch.Tensor:
    """Token ids as [B, T] int64; shorter rows repeat their last token, whose results nobody reads."""
    width = max(len(tokens) for tokens in rows)
    return torch.tensor([tokens + [tokens[-1]] * (width - len(tokens)) for tokens in rows])


def item_of(task: Task) -> WorkItem:
    """The work item that a task computes."""
    assert task.item is not None, f"{task.label} carries no work item"
    return task.item

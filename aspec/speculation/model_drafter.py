"""Proposals of a draft model: chains and trees, the KV of the draft, and what it learns from acceptance.

A chain grows by one token a step. A tree grows by one level a step, best first by calibrated path probability. It goes
on growing while the target verifies its best nodes: the part below the target's draws is the next round's tree.
Where the draft chases a draw of the target, it ranks the tokens with the noise of that same draw.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, takewhile
from math import log

import torch

from aspec.backends.device import Capture
from aspec.errors import NoTokenError, NumericError
from aspec.generation.params import SamplingParams
from aspec.generation.sampler import Sampler, draw_rows
from aspec.generation.sequence import Sequence as TokenSequence
from aspec.io.pinned import upload
from aspec.models.kv_cache import KVCache
from aspec.models.model import Model
from aspec.speculation.calibration import Calibration
from aspec.speculation.candidates import best_children
from aspec.speculation.draft_graphs import DraftGraphs
from aspec.speculation.drafter import Drafter, DraftState, pad
from aspec.speculation.proposal import ROOT, Proposal
from aspec.speculation.tree import Tree
from aspec.tasks.task import TreeLevel, TreeStatus, WorkItem

GREEDY = Sampler(SamplingParams(temperature=0.0))
"""Proposes the likeliest token, without the noise of the target's draw."""

NUM_NGRAM_BRANCHES = 2  # of a new tree
MIN_LOG_PROBABILITY = log(0.25)  # of a path in an n-gram branch

GREEDY_TEMPERATURE = 0.5  # of scores for a greedy target: 10.3 tokens per pass; 7.8 at 1 (see ``best_children``)


@dataclass(frozen=True, slots=True)
class _Level:
    """The nodes of a row's tree that go through the draft in one step, and the tokens fed for them."""

    row: int
    state: DraftState
    tree: Tree
    nodes: list[int]
    start: int  # committed tokens that the draft had seen before
    tokens: list[int]  # of the nodes; for a new tree all tokens that the draft has not seen, the root last
    parents: list[int]  # slots of the parents, for every slot after the committed tokens; -1: the root
    first: int = 0  # slots that earlier levels filled


class ModelDrafter(Drafter):
    """A small model with the target's vocabulary proposes; with a ``capture`` its steps run as captured graphs."""

    def __init__(
        self,
        model: Model,
        kv: KVCache,
        target_vocab_size: int,
        *,
        shared_noise: bool = True,
        capture: Capture | None = None,
    ) -> None:
        super().__init__()
        self._model, self._kv, self._limit = model, kv, target_vocab_size
        self._graphs = None if capture is None else DraftGraphs(model, kv, capture)
        self._shared_noise = shared_noise
        self._calibration = {greedy: Calibration() for greedy in (True, False)}
        self._ngram_calibration = Calibration()  # of n-gram branches

    # -- growth ----------------------------------------------------------------------------------------------

    def assign_row(self, row: int, sequence: TokenSequence | None) -> None:
        """Assign a row; where the draft's state of the cached tokens is not known, it will process them anew."""
        super().assign_row(row, sequence)
        if sequence is not None:
            self._rows[row].drafted = self._kv.reusable(row, self._rows[row].drafted)

    def prefill(self, item: WorkItem) -> None:
        """Bring a chunk of prompts into the draft's KV, and before it the cached tokens that it has not seen."""
        states = [self._rows[row] for row in item.rows]
        begins = [state.drafted for state in states]
        ends = [start + count for start, count in zip(item.starts, item.counts, strict=True)]
        spans = zip(states, begins, ends, strict=True)
        self._run(item.rows, begins, [state.sequence.tokens[a:b] for state, a, b in spans], want_logits=False)
        for state, end in zip(states, ends, strict=True):
            state.drafted = end

    def extend_chains(self, item: WorkItem) -> None:
        """Propose one more token for every row, after the tokens that the draft has not seen yet."""
        states = [self._rows[row] for row in item.rows]
        fed = [(state.sequence.tokens + state.chain)[state.drafted :] for state in states]
        logits = self._run(item.rows, [state.drafted for state in states], fed)
        positions = [[state.drafted + len(tokens)] for state, tokens in zip(states, fed, strict=True)]
        samplers = [state.sequence.sampler if self._shared_noise else GREEDY for state in states]
        contexts = [state.sequence.context_of([tuple(state.chain)]) for state in states]
        errors: dict[tuple[int, int], NumericError] = {}
        drawn = draw_rows(samplers, logits, positions, self._limit, contexts, errors)
        for state, tokens, row_draw in zip(states, fed, drawn, strict=True):
            state.drafted += len(tokens)
            state.chain.append(max(row_draw[0], 0))
        for (index, _), error in errors.items():
            self._fail(states[index], error)

    def grow_trees(self, item: WorkItem, growth: TreeLevel) -> tuple[TreeStatus, ...]:
        """Grow one level of every row's tree; a new tree starts with the tokens that the draft has not seen yet."""
        limits = zip(item.rows, growth.budgets, growth.depths, strict=True)
        levels = [self._next_level(row, budget, depth, growth) for row, budget, depth in limits]
        logits = iter(self._run_levels([level for level in levels if level.nodes]))
        statuses = []
        for level, budget in zip(levels, growth.budgets, strict=True):
            if level.nodes:
                try:
                    self._add_candidates(level, next(logits), growth.width)
                except NumericError as error:
                    self._fail(level.state, error)
                level.tree.prune(budget + growth.ahead)
            statuses.append(self._status(level.row, level.tree, growth.beams))
        return tuple(statuses)

    @staticmethod
    def _fail(state: DraftState, error: NumericError) -> None:
        """End a sequence whose draft is damaged; a proposal that may not be continued is only a proposal less."""
        if not isinstance(error, NoTokenError):
            state.sequence.fail(error)

    def _next_level(self, row: int, budget: int, depth: int, growth: TreeLevel) -> "_Level":
        """The next level of a row's tree: the committed tokens that the draft has not seen, or the best nodes."""
        state = self._rows[row]
        room = budget + growth.ahead, depth
        state.budget, state.beams = budget, growth.beams
        if state.tree is None:
            state.room = room
            calibration = self._calibration[state.sequence.sampler.greedy]
            log_ngram = self._ngram_calibration.log_probability
            tree = state.tree = Tree(depth, state.sequence.end_ids, calibration.log_probability, log_ngram)
            tree.feed([ROOT])
            self._add_ngram_branches(state, tree, depth)
            start, tokens = state.drafted, state.sequence.tokens[state.drafted :]
            state.drafted += len(tokens)
            return _Level(row, state, tree, [ROOT], start, tokens, list(range(-1, len(tokens) - 1)))
        tree, first = state.tree, len(state.tree.slots)
        if state.room != room:
            tree.reopen(depth)
            tree.prune(room[0])
            state.room = room
        nodes = tree.frontier(self._beams(row, tree, growth.beams))
        tree.feed(nodes)
        tokens = [tree.nodes[node].token for node in nodes]
        return _Level(row, state, tree, nodes, state.drafted, tokens, tree.slot_parents(), first)

    def _add_ngram_branches(self, state: DraftState, tree: Tree, depth: int) -> None:
        """Add n-gram branches to a new tree: earlier continuations of this text, as long as they are likely."""
        state.index.extend(state.sequence.tokens[state.index.length :])
        for tokens, confidences in state.index.propose(depth, NUM_NGRAM_BRANCHES):
            scores = [log(confidence) for confidence in confidences]
            paths = accumulate(self._ngram_calibration.log_probability(score) for score in scores)
            likely = sum(1 for _ in takewhile(lambda path: path > MIN_LOG_PROBABILITY, paths))
            likely = state.sequence.num_allowed(tokens[:likely])
            tree.add_branch(tokens[:likely], scores[:likely])

    def _run_levels(self, levels: Sequence["_Level"]) -> list[torch.Tensor]:
        """The draft's logits [N, V] at the N nodes of every level, one tensor per level."""
        if not levels:
            return []
        logits = self._run(
            [level.row for level in levels],
            [level.start for level in levels],
            [level.tokens for level in levels],
            parents=[level.parents for level in levels],
            firsts=[level.first for level in levels],
        )
        ends = [len(level.tokens) for level in levels]
        return [own[end - len(level.nodes) : end] for own, end, level in zip(logits, ends, levels, strict=True)]

    def _add_candidates(self, level: "_Level", logits: torch.Tensor, width: int) -> None:
        """Add the candidates for children of a level's nodes, scored with the noise of their own positions."""
        state, tree = level.state, level.tree
        sampler = state.sequence.sampler
        depths = [0 if node == ROOT else tree.nodes[node].depth for node in level.nodes]
        positions = [state.drafted + depth for depth in depths]
        noise = sampler.noise(positions, logits.shape[-1], logits.device) if self._shared_noise else None
        context = state.sequence.context_of([tree.path(node) for node in level.nodes])
        logits = sampler.processed(logits[..., : self._limit], context)
        temperature = GREEDY_TEMPERATURE if sampler.greedy else sampler.temperature
        tokens, scores = best_children(logits, width, noise, temperature=temperature, limit=self._limit)
        for node, own_tokens, own_scores in zip(level.nodes, tokens.tolist(), scores.tolist(), strict=True):
            tree.extend(node, own_tokens, own_scores)

    def _status(self, row: int, tree: Tree, beams: int) -> TreeStatus:
        """The status of a tree for the policy."""
        return TreeStatus(row, tuple(tree.probabilities()), tree.gain_bound(self._beams(row, tree, beams)))

    def _beams(self, row: int, tree: Tree, beams: int) -> int:
        """The number of forwards of a level: at most the free slots of the row in the draft's KV."""
        return min(beams, self._kv.room(self._rows[row].drafted) - len(tree.slots))

    def clear(self, row: int) -> None:
        """Drop all state of a row whose sequence has failed, and its KV."""
        super().clear(row)
        self._kv.clear(row)

    # -- verification ----------------------------------------------------------------------------------------

    def commit(self, row: int, path: list[int], emitted: list[int]) -> TreeStatus | None:
        """Learn, drop the proposal; keep the KV of the draws that the draft has seen, and the tree below them."""
        state = self._rows[row]
        if state.proposal is not None:
            self._learn(state, state.proposal, path)
        tree, below = state.tree, None
        if tree is not None:
            slots, below = tree.descend(emitted)
            self._kv.gather(row, state.drafted, slots)
            state.drafted += len(emitted) if below is not None else len(slots)
        if below is None:
            state.drafted = min(state.drafted, len(state.sequence.tokens) - 1)
        state.chain, state.tree, state.proposal = [], below, None
        if below is None or state.sequence.finish_reason is not None:
            return None
        below.prune(state.budget)
        return self._status(row, below, state.beams)

    def _learn(self, state: DraftState, proposal: Proposal, path: list[int]) -> None:
        calibration = self._calibration[state.sequence.sampler.greedy]
        for place, accepted in proposal.verdicts(path):
            draft_score, ngram_score = proposal.draft_score[place], proposal.ngram_score[place]
            if draft_score is not None:
                calibration.observe(draft_score, accepted)
            if ngram_score is not None:
                self._ngram_calibration.observe(ngram_score, accepted)

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
        """One forward of the draft: logits [B, 1, V] at every row's last token, or [B, T, V] at all nodes of trees.

        Without ``want_logits`` it returns hidden states, which are not used.
        """
        counts = [len(tokens) for tokens in fed]
        ids = pad(fed)
        ids = ids.where(ids < self._model.vocab_size, 0)  # a token that the draft does not know only costs a miss
        if self._graphs is not None and want_logits:
            logits = self._graphs.run(ids, rows, starts, counts, parents, firsts)
            if logits is not None:
                return logits
        ids = upload(ids, self._kv.device)
        finals = None if self._kv.recurrent is None else [len(self._rows[row].sequence.tokens) for row in rows]
        activation = self._model.embed(ids, self._kv.step(rows, starts, counts, parents, firsts, finals=finals))
        for layer in range(self._model.num_layers):
            self._model.layer(layer, activation)
        if not want_logits:
            return activation.hidden
        last = torch.tensor([[count - 1] for count in counts])
        return self._model.head(activation, None if parents is not None else upload(last, self._kv.device))

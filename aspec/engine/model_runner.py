"""The computation of each op: the tensors behind the task records.

Lane threads call this, never the loop. The graph orders every two tasks that touch the same state, so this file needs
no locks. Source of the acceptance rule: the target draws with noise keyed by (request seed, position), and proposals
are accepted up to the first that differs from the drawn token (Daliri et al., "Coupling without communication").
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from aspec.errors import NumericError
from aspec.generation.penalties import Context
from aspec.generation.sampler import draw_rows, token_logprobs
from aspec.generation.sequence import Sequence as TokenSequence
from aspec.io.pinned import upload
from aspec.models.kv_cache import KVCache
from aspec.models.model import Activation, Model
from aspec.models.weights.parts import Part
from aspec.speculation.drafter import Drafter, item_of, pad
from aspec.tasks.op import Op
from aspec.tasks.task import NOTHING, Decoding, LayerWork, Report, RowChanges, RowOutcome, Task, TreeStatus, WorkItem
from aspec.threads import Threads

SCORED_COLUMNS = 16  # of a prompt that is scored: logits that are held at once


@dataclass(frozen=True, slots=True)
class Weights:
    """The memory of parts that passes bind: the parts by index, and uint8 tensors."""

    parts: Mapping[int, Part]
    slots: Sequence[torch.Tensor]
    scratch: Sequence[torch.Tensor]
    packed: Mapping[int, torch.Tensor] = field(default_factory=dict)  # resident parts as they are stored, by index


@dataclass(frozen=True, slots=True)
class _VerifiedRow:
    """One row after its verification."""

    row: int
    start: int  # position of the last committed token before
    path: list[int]  # accepted places in the proposal
    emitted: list[int]  # drawn tokens
    num_new: int  # of them committed
    spoilt: bool  # some logits behind the path are not numbers, so their KV may hold NaN, which spoils every sum
    failed: bool  # the last logits of the path itself are not numbers


class ModelRunner:
    """Runs tasks on the target and the draft model."""

    def __init__(
        self,
        target: Model,
        target_kv: KVCache,
        weights: Weights,
        drafter: Drafter | None = None,
        threads: Threads | None = None,
    ) -> None:
        """``threads``: None for as many as torch has."""
        self._target, self._target_kv, self._weights = target, target_kv, weights
        self._drafter, self._threads = drafter, threads
        self._sequences: dict[int, TokenSequence] = {}  # by id: waiting for a row
        self._rows: dict[int, TokenSequence] = {}  # the sequence in each row, or the last one there
        self._activations: dict[str, Activation] = {}  # by item, between EMBED and HEAD
        self._depths: dict[str, list[list[int]]] = {}  # likewise: the depths of each row's tokens
        self._bound: dict[int, int] = {}  # streamed part -> the pass it was last bound in
        self._draws: dict[str, list[list[int]]] = {}  # by item, between HEAD and ACCEPT
        self._errors: dict[str, dict[tuple[int, int], NumericError]] = {}  # likewise, by row and column of the draws
        self._logits: dict[str, torch.Tensor] = {}  # likewise, if logprobs are requested
        self._ops: Mapping[Op, Callable[[Task], Report]] = {
            Op.ASSIGN_ROWS: self._assign_rows,
            Op.DECODE: self._decode,
            Op.EMBED: self._embed,
            Op.LAYER: self._layer,
            Op.PROJECT: self._project,
            Op.SEND: self._send,
            Op.ATTEND: self._attend,
            Op.RETURN: self._return,
            Op.FFN: self._finish,
            Op.ROUTE: self._route,
            Op.EXPERTS: self._experts,
            Op.COMBINE: self._combine,
            Op.HEAD: self._head,
            Op.ACCEPT: self._accept,
            Op.DRAFT: self._draft,
            Op.DRAFT_PREFILL: self._draft_prefill,
        }

    def admit(self, sequence: TokenSequence) -> None:
        """Add a sequence, before the scheduler may assign it a row."""
        self._sequences[sequence.id] = sequence

    def forget(self, sequence: int) -> None:
        """Remove a sequence that will get no row."""
        self._sequences.pop(sequence, None)

    def sequence_in(self, row: int) -> TokenSequence:
        """The sequence in a row, or the last one there."""
        return self._rows[row]

    def sequences_in_rows(self) -> list[TokenSequence]:
        """The sequences in the rows, or the last ones there, without failed ones, which have no KV.

        The KV of all their tokens but the last stays until the row is assigned again.
        """
        return [sequence for sequence in self._rows.values() if sequence.failure is None]

    def reusable(self, sequence: TokenSequence, length: int) -> int:
        """How many of its leading ``length`` tokens another sequence may continue, in the row of an ended one.

        A recurrent state is known from its last pass on only. That of an aborted sequence may still change.
        """
        row = next((row for row, one in self._rows.items() if one is sequence), None)
        if row is None or self._target_kv.recurrent is None:
            return length
        return self._target_kv.reusable(row, length) if sequence.finish_reason in ("stop", "length") else 0

    @torch.inference_mode()
    def run(self, task: Task) -> Report:
        """Compute one task; logits that are not numbers fail only their own sequence."""
        use_threads(None if self._threads is None else _number_of_threads(task, self._threads))
        return self._ops[task.op](task)

    def _assign_rows(self, task: Task) -> Report:
        """Assign rows to other sequences, between passes."""
        assert isinstance(task.payload, RowChanges)
        for change in task.payload.rows:
            sequence = None if change.sequence is None else self._sequences.pop(change.sequence)
            if sequence is not None:
                sequence.num_cached_tokens = change.num_cached_tokens
                self._rows[change.row] = sequence
            if self._drafter is not None:
                self._drafter.assign_row(change.row, sequence)
        return NOTHING

    # -- target ----------------------------------------------------------------------------------------------

    def _decode(self, task: Task) -> Report:
        work, weights = task.payload, self._weights
        assert isinstance(work, Decoding)
        stored = weights.packed[work.part] if work.slot is None else weights.slots[work.slot]
        self._target.bind(weights.parts[work.part], stored, weights.scratch[work.scratch])
        return NOTHING

    def _embed(self, task: Task) -> Report:
        item = item_of(task)
        tokens, parents, finals = [], [], []
        for row, start, count in zip(item.rows, item.starts, item.counts, strict=True):
            own, links = self._tokens(row, start, count)
            tokens.append(own)
            parents.append(links)
            before_draw = item.prefill and item.samples  # the last token runs again if the prompt is repeated
            finals.append(min(start + count, len(self._rows[row].tokens)) - before_draw)
        tree = any(links is not None for links in parents)
        nodes = [links or list(range(-1, count - 1)) for links, count in zip(parents, item.counts, strict=True)]
        self._depths[item.name] = [depths_of(links) for links in nodes]
        step = self._target_kv.step(item.rows, item.starts, item.counts, nodes if tree else None, finals=finals)
        self._activations[item.name] = self._target.embed(upload(pad(tokens), self._target.device), step)
        return NOTHING

    def _tokens(self, row: int, start: int, count: int) -> tuple[list[int], list[int] | None]:
        """The committed tokens from ``start`` on, then the proposal, and the parents of its tree from there."""
        committed = self._rows[row].tokens[start : start + count]
        if len(committed) == count or self._drafter is None:
            return committed, None
        proposed, parents = self._drafter.propose(row, count - len(committed))
        return committed + proposed, None if parents is None else [-1, *(parent + 1 for parent in parents)]

    def _layer(self, task: Task) -> Report:
        activation = self._activations[item_of(task).name]
        self._target.layer(self._bound_layer(task), activation)
        states = activation.step.states
        return NOTHING if states is None else Report(states_s=states.nodes.taken_s())

    def _project(self, task: Task) -> Report:
        self._target.project(self._bound_layer(task), self._activations[item_of(task).name])
        return NOTHING

    def _attend(self, task: Task) -> Report:
        self._target.attend(self._activations[item_of(task).name])
        return NOTHING

    def _send(self, task: Task) -> Report:
        self._target.send(self._activations[item_of(task).name])
        return NOTHING

    def _return(self, task: Task) -> Report:
        self._target.bring_back(self._activations[item_of(task).name])
        return NOTHING

    def _finish(self, task: Task) -> Report:
        assert isinstance(task.payload, LayerWork)
        self._target.finish(task.payload.layer, self._activations[item_of(task).name])
        return NOTHING

    def _route(self, task: Task) -> Report:
        return Report(routed=self._target.route(self._bound_layer(task), self._activations[item_of(task).name]))

    def _experts(self, task: Task) -> Report:
        assert isinstance(task.payload, LayerWork)
        activation = self._activations[item_of(task).name]
        self._target.compute_experts(task.payload.layer, activation, task.payload.experts)
        return NOTHING

    def _combine(self, task: Task) -> Report:
        assert isinstance(task.payload, LayerWork)
        self._experts(task)
        self._target.combine(task.payload.layer, self._activations[item_of(task).name])
        return NOTHING

    def _bound_layer(self, task: Task) -> int:
        """The layer of a task, its parameters bound to the slots once per pass, so that items share conversions."""
        work, weights = task.payload, self._weights
        assert isinstance(work, LayerWork)
        for part, slot in work.slots:
            if self._bound.get(part) != task.number:
                self._target.bind(weights.parts[part], weights.slots[slot], None)
                self._bound[part] = task.number
        return work.layer

    def _head(self, task: Task) -> Report:
        item = item_of(task)
        activation, depths = self._activations.pop(item.name), self._depths.pop(item.name)
        if item.scored:
            self._score(item, activation)
        if not item.samples:
            return NOTHING
        last = torch.tensor([[count - 1] for count in item.counts])
        logits = self._target.head(activation, upload(last, self._target.device) if item.prefill else None)
        drawn_at = [own[-1:] if item.prefill else own for own in depths]
        positions = [[start + 1 + depth for depth in own] for start, own in zip(item.starts, drawn_at, strict=True)]
        samplers = [self._rows[row].sampler for row in item.rows]
        proposed = [0 if item.prefill else count - 1 for count in item.counts]
        contexts = [self._context(row, count) for row, count in zip(item.rows, proposed, strict=True)]
        errors = self._errors[item.name] = {}
        self._draws[item.name] = draw_rows(samplers, logits, positions, contexts=contexts, errors=errors)
        if any(self._rows[row].params.logprobs is not None for row in item.rows):
            self._logits[item.name] = logits
        return NOTHING

    def _score(self, item: WorkItem, activation: Activation) -> None:
        """The logprobs of the prompt's tokens that follow the item's, a few columns at a time: logits are large."""
        (row,), (start,), (count,) = item.rows, item.starts, item.counts
        sequence, num_top = self._rows[row], self._rows[row].params.logprobs or 0
        count = min(count, sequence.num_prompt - 1 - start)  # after the prompt's last token comes a draw
        for column in range(0, count, SCORED_COLUMNS):
            columns = range(column, min(count, column + SCORED_COLUMNS))
            logits = self._target.head(activation, upload(torch.tensor([list(columns)]), self._target.device))
            following = sequence.tokens[start + 1 + column : start + 1 + columns.stop]
            scores = token_logprobs(logits[0], following, num_top)
            sequence.prompt_logprobs |= {start + 1 + at: one for at, one in zip(columns, scores, strict=True)}

    def _context(self, row: int, num_proposed: int) -> Context | None:
        """The tokens that lead to the drawn positions of a row; None if its draws do not read them."""
        sequence, drafter = self._rows[row], self._drafter
        if not sequence.reads_context or drafter is None or not num_proposed:
            return sequence.context()
        return sequence.context(*drafter.proposed(row, num_proposed))

    def _accept(self, task: Task) -> Report:
        item = item_of(task)
        draws, logits = self._draws.pop(item.name), self._logits.pop(item.name, None)
        errors = self._errors.pop(item.name)
        outcomes, carried_over = [], []
        for place, (row, drawn) in enumerate(zip(item.rows, draws, strict=True)):
            start, count = item.starts[place], item.counts[place]
            if item.prefill:
                self._target_kv.save(row)
                start, count = start + count - 1, 1
            own = None if logits is None else logits[place]
            failed = {column: error for (index, column), error in errors.items() if index == place}
            outcome, grown = self._accept_row(row, start, drawn, count - 1, own, failed)
            outcomes.append(outcome)
            carried_over += [] if grown is None else [grown]
        recurrent = self._target_kv.recurrent
        states_s = 0.0 if recurrent is None else recurrent.commits.taken_s()
        return Report(tuple(outcomes), tuple(carried_over), states_s=states_s)

    def _accept_row(
        self,
        row: int,
        start: int,
        drawn: list[int],
        num_proposed: int,
        logits: torch.Tensor | None,
        errors: Mapping[int, NumericError],
    ) -> tuple[RowOutcome, TreeStatus | None]:
        """Commit the draws up to and including the first that was not proposed; also return the draft's tree below.

        ``errors`` holds, by column, the draws whose logits are not numbers: such a draw ends the sequence.
        """
        sequence, drafter = self._rows[row], self._drafter
        path, emitted = drafter.follow(row, drawn, num_proposed) if drafter and num_proposed else ([], drawn[:1])
        places = [0, *(place + 1 for place in path)]
        error = sequence.failure or errors.get(places[-1])
        if error is not None:
            emitted = [] if sequence.failure else emitted[:-1]
        wanted = sequence.params.logprobs
        own = places[: len(emitted)]
        logprobs = [] if wanted is None or logits is None else token_logprobs(logits[own], emitted, wanted)
        num_new = sequence.commit(emitted, logprobs)
        if error is not None:
            sequence.fail(error)
        verified = _VerifiedRow(row, start, path, emitted, num_new, bool(errors), error is not None)
        grown = self._settle_row(verified)
        accepted = min(len(path), num_new)  # proposals after a stop do not count
        return RowOutcome(row, num_proposed, accepted, num_new, sequence.ended), grown

    def _settle_row(self, verified: _VerifiedRow) -> TreeStatus | None:
        """Keep only the KV of the accepted path; returns the draft's tree below it.

        KV from logits that are not numbers is cleared: NaN would spoil even a sum in which its weight is 0.
        """
        row, start, failed = verified.row, verified.start, verified.failed
        drafter, places = self._drafter, [0, *(place + 1 for place in verified.path)]
        if self._rows[row].failure is not None:
            self._target_kv.clear(row)
        elif drafter is not None:
            self._target_kv.gather(row, start, places)
            if verified.spoilt:
                self._target_kv.clear(row, start + (verified.num_new if failed else len(places)))
        if drafter is None or not failed:
            return None if drafter is None else drafter.commit(row, verified.path, verified.emitted)
        drafter.clear(row)
        return None

    # -- draft -----------------------------------------------------------------------------------------------

    def _draft(self, task: Task) -> Report:
        assert self._drafter is not None
        if task.growth is not None:
            return Report(grown=self._drafter.grow_trees(item_of(task), task.growth))
        self._drafter.extend_chains(item_of(task))
        return NOTHING

    def _draft_prefill(self, task: Task) -> Report:
        assert self._drafter is not None
        self._drafter.prefill(item_of(task))
        return NOTHING


def use_threads(number: int | None) -> None:
    """Let this thread's products run on so many threads; None: as many as the process is set to.

    A thread that never asked would use every core.
    """
    if torch.get_num_threads() != number and number is not None:
        torch.set_num_threads(number)


def _number_of_threads(task: Task, threads: Threads) -> int:
    if task.op in (Op.DRAFT, Op.DRAFT_PREFILL):
        return threads.draft
    if task.op is Op.DECODE:
        return 1  # its operations are too small to share
    return threads.prefill if task.item is not None and task.item.prefill else threads.decode


def depths_of(parents: Sequence[int]) -> list[int]:
    """The depth of every node from its parents; the root's is 0."""
    depths: list[int] = []
    for parent in parents:
        depths.append(0 if parent < 0 else depths[parent] + 1)
    return depths

"""The policy: the assignment of rows, the sizes of drafts, and the tasks of every pass.

A round of a group of rows drafts for the decoding rows, verifies their proposals in one pass of the target together
with the prompts that join, and ends when every row's counts are back. Then the group's next round is emitted; the
weight stream does not wait for it. With several groups the draft works for one while the target verifies another
(SpecOffload, arXiv 2505.10259): their passes follow one another without a gap.
Chains are emitted with their pass. Trees grow level by level from the results of the last level (SpecExec, arXiv
2406.02532), while a level is worth its seconds, or costs none because another group's pass runs; then the pass verifies
the nodes that are worth their seconds. The trees of a single group grow during its pass, one level at a time: the next
round starts from the nodes below the target's draws. So the end of such a pass is emitted late, behind the last level
that was drafted ahead.
What may NOT go in: tensors, token values, asyncio, clocks, randomness. Counts, ids, bytes and seconds only.
"""

from collections.abc import Sequence
from dataclasses import replace

from aspec.plan import Plan, Speculation
from aspec.tasks.cost_model import CostModel
from aspec.tasks.draft_sizing import DraftSizing
from aspec.tasks.experts.prefetch import NO_COUNTS, ExpertCounts
from aspec.tasks.experts.prices import ExpertPrices
from aspec.tasks.experts.stream import ExpertStream
from aspec.tasks.group import Draft, Group, Pass
from aspec.tasks.layers.weights import Numbering, WeightStream
from aspec.tasks.op import Op
from aspec.tasks.passes import Emission
from aspec.tasks.rows import Row, RowTable, decode_item, micro_batches, prefill_items, prefill_stops
from aspec.tasks.task import (
    Access,
    Event,
    ExpertLoad,
    RequestAborted,
    RequestAdded,
    Shutdown,
    Span,
    Started,
    Task,
    TreeStatus,
    WorkItem,
)

PROMPT_SHARE = 1.0  # of a decoding pass's seconds: by so much a pass may take longer for the prompts that join it


class Scheduler:
    """Returns, for every batch of events, the tasks that follow from them."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.passes = 0  # passes emitted
        self.done = False
        self._next_id = Numbering()
        self._stream = WeightStream(plan, self._next_id)
        self._experts, prices = None, None
        if plan.experts is not None:
            self._experts = ExpertStream(plan.experts, self._next_id, prefetch=plan.request.prefetch_experts)
            prices = ExpertPrices(plan.experts, self._experts)
        self.costs = CostModel(plan, prices)
        self.sizing = DraftSizing(plan, self.costs)
        self._loading = 0  # loads under way that are no guesses
        self._emitting: list[Group] = []  # groups whose passes are not all emitted; weights stream for the first one
        self._rows = RowTable(plan.num_rows, plan.num_groups, plan.prefill_pass_tokens)
        self._groups = [Group(number, plan, self._next_id) for number in range(plan.num_groups)]
        self._closing = False
        self._dropped: list[int] = []  # sequences that ended before they had a row, until ``take_dropped``

    def handle(self, events: Sequence[Event]) -> list[Task]:
        """The tasks that follow from the events since the last call, in program order."""
        tasks: list[Task] = []
        for event in events:
            match event:
                case Started():
                    tasks += self._stream.fill()
                case RequestAdded():
                    self._rows.add(event)
                case RequestAborted():
                    self._dropped += self._rows.cancel(event.sequence)
                case Shutdown():
                    self._closing = True
                    if event.now:
                        self._dropped += self._rows.cancel()
                case Span():
                    self._loading -= _is_wanted_load(event.task)
                    if self._experts is not None:
                        self._experts.land(event.task)
                    self.costs.observe(event)
                    tasks += self._continue_round(event)
        for group in self._groups:
            if group.idle:
                tasks += self._assign_rows(group)
        self.done = self._closing and self.idle and not self._rows.rows
        self._loading += sum(map(_is_wanted_load, tasks))
        if self._experts is not None and not self._loading and not self.idle:
            tasks += self._experts.guess(self._next_route)
        return tasks

    def validate(self) -> None:
        """Check the invariants; tests call it after every event."""
        self._rows.validate(self.plan.capacity)
        for group in self._groups:
            assert group.running is None or group.running.num_open > 0
            assert group.running is None or group.draft is None, "a group drafts for its next pass while one is running"

    def take_dropped(self) -> list[int]:
        """Sequences that ended before they had a row, since the last call: no task will use them."""
        dropped, self._dropped = self._dropped, []
        return dropped

    def num_kv(self, sequence: int) -> int:
        """Leading tokens of a sequence that have KV in a row, at the latest when the running pass ends."""
        return self._rows.num_kv(sequence)

    @property
    def idle(self) -> bool:
        """Whether no round is running: only an event from outside starts the next one."""
        return all(group.idle for group in self._groups)

    @property
    def waits_for(self) -> str:
        """The routes without which no pass goes on; empty if there are none."""
        return "; ".join(group.running.emission.waits_for for group in self._emitting[:1] if group.running)

    @property
    def expert_counts(self) -> ExpertCounts:
        """What has happened to experts on demand so far."""
        return NO_COUNTS if self._experts is None else self._experts.counts

    @property
    def _next_route(self) -> int:
        """The layer whose experts will be chosen next."""
        running = self._emitting[0].running if self._emitting else None
        return 0 if running is None else running.emission.next_route

    # -- a round ---------------------------------------------------------------------------------------------

    def _assign_rows(self, group: Group) -> list[Task]:
        """Between two passes of a group: free and assign rows, and begin the next round if any row is occupied."""
        changes = self._rows.assign_rows(group.number)
        tasks = [group.assign(changes, self.passes)] if changes else []
        return tasks + (self._begin_round(group) if self._rows.rows_of(group.number) else [])

    def _begin_round(self, group: Group) -> list[Task]:
        """Draft for the decoding rows, then verify them and prefill the joining rows in one pass."""
        decoding = self._rows.decoding(group.number)
        if self.plan.speculation is Speculation.TREE:
            group.draft = self._start_tree(group, decoding)
            if group.draft is not None:
                return self._draft_or_verify(group, group.draft)
            return self._emit_pass(group, decoding, {}, [])
        lengths = self.sizing.chains({n: group.max_proposal(row) for n, row in decoding.items()})
        return self._emit_pass(group, decoding, lengths, group.emit_chains(self.passes, decoding, lengths))

    def _emit_pass(
        self,
        group: Group,
        decoding: dict[int, Row],
        lengths: dict[int, int],
        tasks: list[Task],
        draft: Draft | None = None,
    ) -> list[Task]:
        """Append the tasks of a pass to ``tasks``; ``lengths``: proposed tokens to verify, by row."""
        number = self.passes
        self.passes += 1
        decode = [decode_item(decoding, lengths, group.number)] if decoding else []
        items = [part for item in decode for part in micro_batches(item, self.plan.micro_batches)]
        joining = self._rows.joining(group.number)
        most = self._prompt_tokens(decode)
        stops = prefill_stops(joining, most, self.plan.prefill_tokens, beside_decoding=bool(decode))
        items += prefill_items(joining, len(items), self.plan.prefill_tokens, group.number, stops)
        proposes = any(lengths.values())

        def inputs(item: WorkItem) -> tuple[Access, ...]:
            return group.inputs(with_proposal=proposes and not item.prefill)

        prefills = [task for item in items if item.prefill for task in group.emit_prefill(item, joining, number)]
        emission = Emission(number, items, self._stream, self._experts, self._next_id, self.plan, inputs)
        num_open = len(prefills) + sum(item.samples for item in items)
        for row, stop in stops.items():
            joining[row].num_prefilled = stop - joining[row].num_cached_tokens
        group.last_pass = number
        group.running = Pass(number, items, draft, emission, num_open=num_open)
        self._emitting.append(group)
        return tasks + prefills + self._emit_layers()

    def _emit_layers(self) -> list[Task]:
        """The layers of the passes, one pass after another, as far as routes are known; then the end of each pass.

        The end is left out where levels may be drafted ahead: then ``_continue_round`` emits it.
        """
        tasks: list[Task] = []
        while self._emitting and (running := self._emitting[0].running) is not None:
            tasks += running.emission.advance()
            if not running.emission.finished:
                break
            group = self._emitting.pop(0)
            if not self._may_draft_ahead or self._in_tail(running):
                tasks += group.emit_end(running)
        return tasks

    def _prompt_tokens(self, decode: list[WorkItem]) -> int | None:
        """The most prompt tokens of a pass, None for no limit; beside decoding rows, so few that these do not wait.

        Prompts then span passes; each takes at most ``PROMPT_SHARE`` of its own seconds longer, or one item.
        """
        most = self.plan.prefill_pass_tokens
        if not decode or most is None:
            return most
        item = self.plan.prefill_tokens
        prompt_s = self.costs.compute_seconds(self.plan, item)
        pass_s = self.costs.round_seconds(self.plan, decode[0].padded_tokens, 0.0)
        if not prompt_s or pass_s is None:
            return item
        return min(most, item * max(1, int(PROMPT_SHARE * pass_s / prompt_s)))

    def _continue_round(self, span: Span) -> list[Task]:
        """The tasks that follow directly from a finished task within a round."""
        for outcome in span.outcomes:
            self._rows.advance(outcome)
        task = span.task
        if task.item is None:
            return []
        group = self._groups[task.item.group]
        running = group.running
        if task.growth is not None:
            return self._end_level(group, span)
        if running is None:
            return []
        if task.op is Op.ROUTE:
            running.emission.take_route(span)
            return self._emit_layers()
        if task.op in (Op.ACCEPT, Op.DRAFT_PREFILL):
            group.carried_over |= {tree.row: tree for tree in span.grown}
            running.num_open -= 1
            if not running.num_open:
                group.running = None
                self.costs.end_round(running.number, span.stop_s)
        elif (task.op is Op.EMBED or task.op.ends_layer) and task.item == running.items[-1]:
            running.next_layer = 0 if task.layer is None else task.layer + 1
            if self._in_tail(running) and running.emission.finished and not running.ending:
                return group.emit_end(running)
            return self._draft_ahead(group, running, span.stop_s) + self._draft_beside(span.stop_s)
        return []

    def _in_tail(self, running: Pass) -> bool:
        """Whether at most one layer is left, so that the next pass must be ready when it ends."""
        return running.next_layer >= self.plan.num_layers - 1

    # -- trees -----------------------------------------------------------------------------------------------

    def _start_tree(self, group: Group, decoding: dict[int, Row]) -> Draft | None:
        """The trees of this round, with their limits; None where no row has room or speculation loses."""
        carried_over, group.carried_over = group.carried_over, {}
        rows = {n: row for n, row in decoding.items() if group.max_proposal(row) > 0}
        if not rows or self.sizing.skips_draft():
            return None
        depths = {n: min(self.sizing.max_depth, group.max_proposal(row)) for n, row in rows.items()}
        trees = {n: carried_over.get(n, TreeStatus(n, (), gain_bound=1.0)) for n in rows}
        return Draft(rows, dict.fromkeys(rows, self.sizing.max_nodes), depths, trees)

    def _end_level(self, group: Group, span: Span) -> list[Task]:
        """Take the results of a finished level; the tasks that follow from them."""
        running = group.running
        draft = running.draft if running else group.draft
        assert draft is not None
        draft.growing = False
        gain_bound, before = sum(draft.gain_bounds.values()), draft.probabilities
        draft.trees |= {tree.row: tree for tree in span.grown}
        if running is not None:
            return self._draft_ahead(group, running, span.stop_s)
        self.sizing.learn(span.task.draft.step, gain_bound, before, draft.probabilities)
        if self._covering_pass is not None:
            return self._draft_beside(span.stop_s)
        draft.seconds += span.stop_s - span.start_s
        return self._draft_or_verify(group, draft)

    def _draft_or_verify(self, group: Group, draft: Draft) -> list[Task]:
        """The next level while it pays; otherwise the pass over the nodes that pay."""
        gain_bound = sum(draft.gain_bounds.values())
        some_empty = not all(draft.probabilities.values())
        pays = self.sizing.level_pays(draft.levels, gain_bound, draft.seconds, draft.probabilities)
        if gain_bound and (pays or (some_empty and not draft.levels)):
            return [group.emit_level(self.passes, draft, draft.gain_bounds)]
        if self._covering_pass is not None:
            return []  # ``_draft_beside`` emits the pass in the tail of the other one
        group.draft = None
        decoding = self._rows.decoding(group.number)
        chosen = self.sizing.nodes(draft.probabilities, draft.seconds)
        # a level ahead may add AHEAD_NODES, so the bounds of full trees no longer hold
        draft.trees = {n: replace(tree, gain_bound=1.0) for n, tree in draft.trees.items()}
        return self._emit_pass(group, decoding, chosen, [], draft if any(chosen.values()) else None)

    @property
    def _covering_pass(self) -> Pass | None:
        """A running pass before its tail: while it runs, drafts of other groups cost no extra time."""
        passes = (group.running for group in self._groups if group.running)
        return next((running for running in passes if not self._in_tail(running)), None)

    def _draft_beside(self, now_s: float) -> list[Task]:
        """Levels of groups' trees during another group's pass; in its tail, the pass of the longest waiting group."""
        tasks: list[Task] = []
        waiting = [group for group in self._groups if group.draft is not None and not group.draft.growing]
        for group in sorted(waiting, key=lambda group: (group.last_pass, group.number)):
            draft = group.draft
            assert draft is not None
            covering = self._covering_pass
            if covering is None:
                tasks += self._draft_or_verify(group, draft)
            elif gains := draft.gain_bounds:
                loads = self._stream.loads_before(covering.next_layer)
                if self.sizing.ahead_pays(sum(gains.values()), loads, now_s):
                    tasks.append(group.emit_level(self.passes, draft, gains))
        return tasks

    def _draft_ahead(self, group: Group, running: Pass, now_s: float) -> list[Task]:
        """One more level below the nodes that the target is verifying, if no layer has to wait for it."""
        draft = running.draft
        if draft is None or draft.growing or running.ending or not self._may_draft_ahead:
            return []
        gains = draft.gain_bounds
        loads = self._stream.loads_before(running.next_layer)
        if not self.sizing.ahead_pays(sum(gains.values()), loads, now_s):
            return []
        return [group.emit_level(running.number, draft, gains, ahead=True)]

    @property
    def _may_draft_ahead(self) -> bool:
        """Whether levels are drafted between the layers of a pass: for trees of a single group, and 2 layers or more.

        The last layer overlaps with emitting the end of the pass. Several groups draft during each other's passes.
        """
        single = self.plan.num_groups == 1 and self.plan.num_layers > 1
        return single and self.plan.draft_ahead and self.plan.speculation is Speculation.TREE


def _is_wanted_load(task: Task) -> bool:
    """Whether a task loads weights that will be used."""
    return task.op.loads and not (isinstance(task.payload, ExpertLoad) and task.payload.guessed)

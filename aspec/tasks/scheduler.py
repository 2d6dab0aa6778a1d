"""The policy: which sequences sit in which rows, how large the drafts are, and what every pass does.

A round of a group of rows drafts for those that decode, verifies them in one pass of the target together with the
prompts that join, and ends when every row's counts are back. The group's next round is emitted then; the weight stream
did not wait. With several groups the draft works for one while the target verifies another (SpecOffload, arXiv
2505.10259): their passes follow one another without a gap.
Chains are emitted with their pass. Trees grow level by level on what the last level found (SpecExec, arXiv
2406.02532), as long as a level is worth its seconds, or costs none because another group's pass runs; then the pass
takes the nodes that are worth theirs. The trees of a lone group grow on beside its pass, one level at a time: what
stands below the target's draws is where the next round begins. So the end of such a pass is emitted late, behind the
last level that was drafted ahead.
What may NOT go in: tensors, token values, asyncio, clocks, randomness. Counts, ids, bytes and seconds only.
"""

from collections.abc import Sequence
from dataclasses import replace

from aspec.plan import Plan, Speculation
from aspec.tasks.cost_model import CostModel
from aspec.tasks.draft_sizing import Sizing
from aspec.tasks.group import Draft, Group, Pass
from aspec.tasks.op import Op
from aspec.tasks.passes import Numbering, WeightStream, emit_pass
from aspec.tasks.rows import Row, RowTable, decode_item, micro_batches, prefill_items
from aspec.tasks.task import (
    Access,
    Event,
    RequestAborted,
    RequestAdded,
    Shutdown,
    Span,
    Started,
    Task,
    TreeStatus,
    WorkItem,
)


class Scheduler:
    """Answers every event with the tasks that follow from it."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.costs = CostModel()
        self.sizing = Sizing(plan, self.costs)
        self.passes = 0  # passes emitted
        self.done = False
        self._next_id = Numbering()
        self._stream = WeightStream(plan, self._next_id)
        self._rows = RowTable(plan.num_rows, plan.num_groups, plan.prefill_pass_tokens)
        self._groups = [Group(number, plan, self._next_id) for number in range(plan.num_groups)]
        self._closing = False
        self._dropped: list[int] = []  # sequences that ended before they had a row, until they are taken

    def handle(self, events: Sequence[Event]) -> list[Task]:
        """The tasks that follow from all that has happened since the last call, in program order."""
        tasks: list[Task] = []
        for event in events:
            match event:
                case Started():
                    tasks += self._stream.fill()
                case RequestAdded():
                    self._rows.arrive(event)
                case RequestAborted():
                    self._dropped += self._rows.cancel(event.sequence)
                case Shutdown():
                    self._closing = True
                    if event.now:
                        self._dropped += self._rows.cancel()
                case Span():
                    self.costs.observe(event)
                    tasks += self._go_on(event)
        for group in self._groups:
            if group.idle:
                tasks += self._reseat(group)
        self.done = self._closing and self.idle and not self._rows.rows
        return tasks

    def validate(self) -> None:
        """Check the invariants; tests call it after every event."""
        self._rows.validate(self.plan.capacity)
        for group in self._groups:
            assert group.running is None or group.running.open > 0
            assert group.running is None or group.draft is None, "trees that are to be verified grow before their pass"

    def take_dropped(self) -> list[int]:
        """Sequences that ended before they had a row, since the last call: no task will ever need them."""
        dropped, self._dropped = self._dropped, []
        return dropped

    @property
    def idle(self) -> bool:
        """Whether no round is running: only an event from outside brings the next one."""
        return all(group.idle for group in self._groups)

    # -- a round ---------------------------------------------------------------------------------------------

    def _reseat(self, group: Group) -> list[Task]:
        """Between two passes of a group: rows change hands, and the next round begins where any is occupied."""
        changes = self._rows.reseat(group.number)
        tasks = [group.assign(changes, self.passes)] if changes else []
        return tasks + (self._begin_round(group) if self._rows.rows_of(group.number) else [])

    def _begin_round(self, group: Group) -> list[Task]:
        """Drafts for the rows that decode, then one pass that verifies them and prefills those that joined."""
        decoding = self._rows.decoding(group.number)
        if self.plan.speculation is Speculation.TREE:
            group.draft = self._start_tree(group, decoding)
            if group.draft is not None:
                return self._draft_or_verify(group, group.draft)
            return self._emit_pass(group, decoding, {}, [])
        lengths = self.sizing.chains({n: group.most(row) for n, row in decoding.items()})
        return self._emit_pass(group, decoding, lengths, group.emit_chains(self.passes, decoding, lengths))

    def _emit_pass(
        self,
        group: Group,
        decoding: dict[int, Row],
        lengths: dict[int, int],
        tasks: list[Task],
        draft: Draft | None = None,
    ) -> list[Task]:
        """The pass behind ``tasks`` up to its end; ``lengths``: tokens to verify of a row, if any."""
        number = self.passes
        self.passes += 1
        decode = [decode_item(decoding, lengths, group.number)] if decoding else []
        items = [part for item in decode for part in micro_batches(item, self.plan.micro_batches)]
        joining = self._rows.joining(group.number)
        items += prefill_items(joining, len(items), self.plan.prefill_tokens, group.number)
        proposes = any(lengths.values())

        def inputs(item: WorkItem) -> tuple[Access, ...]:
            return group.inputs(with_proposal=proposes and not item.prefill)

        tasks += emit_pass(number, items, self._stream, self._next_id, self.plan, inputs)
        prefills = [item for item in items if item.prefill] if self.plan.max_draft_tokens else []
        tasks += [group.emit_prefill(item, number) for item in prefills]
        group.last_pass = number
        group.running = Pass(number, items, draft, open=len(prefills) + sum(item.samples for item in items))
        return tasks if self._may_draft_ahead else tasks + group.emit_end(group.running)

    def _go_on(self, span: Span) -> list[Task]:
        """What follows at once from a finished task, in the midst of a round."""
        for outcome in span.outcomes:
            self._rows.advance(outcome)
        task = span.task
        if task.item is None:
            return []
        group = self._groups[task.item.group]
        running = group.running
        if task.growth is not None:
            return self._grown(group, span)
        if running is None:
            return []
        if task.op in (Op.ACCEPT, Op.DRAFT_PREFILL):
            group.carried_over |= {grown.row: grown for grown in span.grown}
            running.open -= 1
            if not running.open:
                group.running = None
                self.costs.end_round(running.number, span.stop_s)
        elif (task.op is Op.EMBED or task.op.ends_layer) and task.item == running.items[-1]:
            running.next_layer = 0 if task.layer is None else task.layer + 1
            if self._in_tail(running) and not running.ending:
                return group.emit_end(running)
            return self._draft_ahead(group, running, span.stop_s) + self._draft_beside(span.stop_s)
        return []

    def _in_tail(self, running: Pass) -> bool:
        """Whether one layer is left at most: the next pass is to be ready behind it."""
        return running.next_layer >= self.plan.num_layers - 1

    # -- trees -----------------------------------------------------------------------------------------------

    def _start_tree(self, group: Group, decoding: dict[int, Row]) -> Draft | None:
        """What the trees of this round may become; None where no row has room or speculation loses."""
        carried_over, group.carried_over = group.carried_over, {}
        rows = {n: row for n, row in decoding.items() if group.most(row) > 0}
        if not rows or self.sizing.rests():
            return None
        depths = {n: min(self.sizing.deepest, group.most(row)) for n, row in rows.items()}
        found = {n: carried_over.get(n, TreeStatus(n, (), gain_bound=1.0)) for n in rows}
        return Draft(rows, dict.fromkeys(rows, self.sizing.most), depths, found)

    def _grown(self, group: Group, span: Span) -> list[Task]:
        """A level is back."""
        running = group.running
        draft = running.draft if running else group.draft
        assert draft is not None
        draft.growing = False
        gain_bound, before = sum(draft.gain_bounds.values()), draft.probabilities
        draft.found |= {grown.row: grown for grown in span.grown}
        if running is not None:
            return self._draft_ahead(group, running, span.stop_s)
        self.sizing.learn(span.task.draft.step, gain_bound, before, draft.probabilities)
        if self._passing is not None:
            return self._draft_beside(span.stop_s)
        draft.seconds += span.stop_s - span.start_s
        return self._draft_or_verify(group, draft)

    def _draft_or_verify(self, group: Group, draft: Draft) -> list[Task]:
        """The next level while it pays, otherwise the pass over the nodes that pay."""
        gain_bound = sum(draft.gain_bounds.values())
        unplanted = not all(draft.probabilities.values())
        nodes = len(draft.rows) + sum(map(len, draft.probabilities.values()))
        pays = self.sizing.level_pays(draft.levels, gain_bound, draft.seconds, nodes)
        if gain_bound and (pays or (unplanted and not draft.levels)):
            return [group.emit_level(self.passes, draft, draft.gain_bounds)]
        if self._passing is not None:
            return []  # its turn comes
        group.draft = None
        decoding = self._rows.decoding(group.number)
        chosen = self.sizing.nodes(draft.probabilities, draft.seconds)
        draft.found = {
            n: replace(grown, gain_bound=1.0) for n, grown in draft.found.items()
        }  # ahead there is more room
        return self._emit_pass(group, decoding, chosen, [], draft if any(chosen.values()) else None)

    @property
    def _passing(self) -> Pass | None:
        """The pass beside which other groups draft for nothing: it has more than its tail before it."""
        passes = (group.running for group in self._groups if group.running)
        return next((one for one in passes if not self._in_tail(one)), None)

    def _draft_beside(self, now_s: float) -> list[Task]:
        """Levels of groups' trees beside another group's pass; in its tail whoever waits longest is verified next."""
        tasks: list[Task] = []
        waiting = [group for group in self._groups if group.draft is not None and not group.draft.growing]
        for group in sorted(waiting, key=lambda group: (group.last_pass, group.number)):
            draft = group.draft
            assert draft is not None
            passing = self._passing
            if passing is None:
                tasks += self._draft_or_verify(group, draft)
            elif gains := draft.gain_bounds:
                loads = self._stream.loads_before(passing.next_layer)
                if self.sizing.ahead_pays(sum(gains.values()), loads, now_s):
                    tasks.append(group.emit_level(self.passes, draft, gains))
        return tasks

    def _draft_ahead(self, group: Group, running: Pass, now_s: float) -> list[Task]:
        """One more level below what is being verified, where it keeps no layer waiting."""
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
        """Between the layers of a pass, of which the last one hides its end; several groups draft for one another."""
        alone = self.plan.num_groups == 1 and self.plan.num_layers > 1
        return alone and self.plan.draft_ahead and self.plan.speculation is Speculation.TREE

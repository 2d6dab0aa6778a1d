"""A simulated machine: every task takes the seconds of a hardware profile, and completes on the loop's clock.

The scheduler, graph and executor are those of the real machines; only seconds and acceptance counts come from here.
The draft's trees are real, but their tokens are ranks: rank 0 is the draft's likeliest token. An integer hash of (seed,
sequence, position) decides which rank the target draws, so the draws are the same under every plan. The draft's
confidence differs between positions, so rows grow trees of different sizes.
"""

import asyncio
import math
from bisect import bisect_right
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import accumulate

from aspec.expert_plan import ExpertShape
from aspec.planning.experts.routes import SimRoutes
from aspec.profiling.cost_tables import SimCosts
from aspec.speculation.proposal import ROOT, Proposal
from aspec.speculation.tree import Tree
from aspec.tasks.op import Cost, Op
from aspec.tasks.task import (
    COMPUTE,
    CPU,
    D2H,
    DECODE,
    DISK,
    DRAFT_COMPUTE,
    EXPERT_DISK,
    H2D,
    H2D_RESULTS,
    NOTHING,
    Completion,
    Report,
    Resource,
    RowChanges,
    RowOutcome,
    Task,
    TreeLevel,
    TreeStatus,
)

MAX_RANKS = 8  # children that a simulated draft offers for every node

HOST_RESOURCES = (
    Resource(DISK, depth=3),
    Resource(EXPERT_DISK, depth=8),
    Resource(COMPUTE, depth=2, domain="host"),
    Resource(CPU, depth=1),
    Resource(DECODE, depth=2),
)
"""A machine whose device is the host's own memory."""

DEVICE_RESOURCES = (
    Resource(DISK, depth=3),
    Resource(EXPERT_DISK, depth=8),
    Resource(H2D, depth=2, domain="device"),
    Resource(D2H, depth=2, domain="device"),
    Resource(H2D_RESULTS, depth=2, domain="device"),
    Resource(COMPUTE, depth=2, domain="device"),
    Resource(DRAFT_COMPUTE, depth=2, domain="device"),
    Resource(DECODE, depth=2, domain="device"),
    Resource(CPU, depth=1),
)
"""A machine with a device behind a link."""


@dataclass(slots=True)
class _RowState:
    """The draft's tree of a row; mutable, because the tree grows."""

    sequence: int
    tree: Tree | None = None
    proposal: Proposal | None = None
    budget: int = 0  # most nodes of a proposal
    room: tuple[int, int] = (0, 0)  # (most nodes, most depth) of its latest level


@dataclass(slots=True)
class _Lane:
    free_s: float = 0.0  # time at which an in-order resource has finished its issued tasks


@dataclass(slots=True)
class SimBackend:
    """Runs tasks in virtual time. ``fail`` = (op, n) injects an error at the n-th task of an op."""

    profile: SimCosts
    resources: tuple[Resource, ...] = HOST_RESOURCES
    fail: tuple[Op, int] | None = None
    experts: ExpertShape | None = None  # that are read on demand
    in_flight: int = 0  # tasks issued and not completed; 0 after close
    closed: bool = False
    _told_s: float = 0.0  # time at which the loop has dealt with all tasks that have ended
    _lanes: dict[str, _Lane] = field(default_factory=dict)
    _stops: dict[int, float] = field(default_factory=dict)  # task id -> end in seconds, for the tasks that follow it
    _rows: dict[int, _RowState] = field(default_factory=dict)
    _issued: dict[Op, int] = field(default_factory=dict)
    _poisoned: dict[str, BaseException] = field(default_factory=dict)  # errors by domain
    _routes: SimRoutes | None = field(init=False)
    _bounds: list[float] = field(init=False)  # cumulative chances of ranks: below the first one the target draws rank 0
    _log_rest: list[float] = field(init=False)  # log chances of ranks from 1 on, given that rank 0 is not drawn

    def __post_init__(self) -> None:
        self._routes = None if self.experts is None else SimRoutes(self.experts, self._chance)
        acceptance = self.profile.acceptance
        spread = min(self.profile.spread, acceptance)
        rest = [spread * (1.0 - spread) ** rank for rank in range(MAX_RANKS - 1)]
        self._bounds = list(accumulate([acceptance, *((1.0 - acceptance) * chance for chance in rest)]))
        self._log_rest = [_log(chance) for chance in rest]

    def now(self) -> float:
        """Virtual seconds."""
        return asyncio.get_running_loop().time()

    def issue(self, task: Task, after: tuple[int, ...] = ()) -> asyncio.Future[Completion]:
        """Start the task when its lane is free and the tasks ``after`` are done; it takes ``price`` seconds."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Completion] = loop.create_future()
        lane = self._lanes.setdefault(task.resource, _Lane())
        start = max(loop.time(), lane.free_s, *(self._stops.get(task_id, 0.0) for task_id in after))
        seconds = self._with_contention(task, start, self.price(task))
        stop = round((start + seconds) * 1e9) * 1e-9  # the loop's clock counts whole nanoseconds
        lane.free_s = self._stops[task.id] = stop
        overtaken = {Op.RETURN: H2D, Op.LOAD_EXPERT: DISK}.get(task.op)
        loads = None if overtaken is None else self._lanes.get(overtaken)
        if loads is not None and loads.free_s > start:
            loads.free_s += seconds  # it overtakes the loads, which end later: both use one link
        self.in_flight += 1
        self._issued[task.op] = self._issued.get(task.op, 0) + 1
        faulty = self.fail == (task.op, self._issued[task.op])
        done = Completion(start, stop, self._report(task))
        loop.call_at(stop, self._hand_over, lambda: self._finish(future, task, done, faulty))
        return future

    def _hand_over(self, finish: Callable[[], None]) -> None:
        """A task has ended: the loop deals with one after another, and takes ``handover_s`` for each."""
        handover_s = self.profile.cost_table.handover_s if self.profile.cost_table else 0.0
        if not handover_s:
            finish()
            return
        self._told_s = round((max(self._told_s, self.now()) + handover_s) * 1e9) * 1e-9
        asyncio.get_running_loop().call_at(self._told_s, finish)

    async def close(self) -> None:
        """Wait, in virtual time, until no task is in flight."""
        while self.in_flight:
            await asyncio.sleep(max(0.0, max(self._told_s, *self._stops.values()) - self.now()))
        self.closed = True

    def price(self, task: Task) -> float:
        """Seconds of a task by the profile, without other tasks beside it."""
        rates = self._rates
        if task.op.cost in rates:
            overhead_s = 0.0 if task.op.loads else self._task_s  # negligible for a load
            return overhead_s + task.nbytes / rates[task.op.cost]
        if task.op.cost is Cost.NOTHING:
            return 0.0
        if self.profile.cost_table is not None:
            return self.profile.cost_table.seconds(task)
        return self._flat_s(task)

    @property
    def _task_s(self) -> float:
        """Fixed seconds of every task."""
        return self.profile.cost_table.task_s if self.profile.cost_table else 0.0

    @property
    def _rates(self) -> dict[Cost, float]:
        """Bytes per second of the tasks that move data."""
        profile = self.profile
        copy_rate = profile.copy_bytes_per_s or math.inf
        back_rate = profile.d2h_bytes_per_s or copy_rate
        return {
            Cost.DISK: profile.disk_bytes_per_s,
            Cost.H2D: copy_rate,
            Cost.D2H: back_rate,
            Cost.H2D_RESULTS: copy_rate,
        }

    def _flat_s(self, task: Task) -> float:
        """Seconds of a computing task without a cost table; the pieces of a split layer sum to the whole layer."""
        profile = self.profile
        excess = max(0, task.num_tokens - profile.knee_tokens)
        flat: Mapping[Cost, float] = {
            Cost.DECODE: profile.decode_s,
            Cost.EMBED: profile.embed_s,
            Cost.LAYER: task.op.layer_share * (profile.layer_s + profile.layer_token_s * excess),
            Cost.HEAD: profile.head_s,
            Cost.ACCEPT: profile.accept_s,
            Cost.DRAFT: profile.draft_s,
            Cost.DRAFT_PREFILL: profile.draft_s + profile.draft_token_s * task.num_tokens,
        }
        return flat[task.op.cost]

    def _with_contention(self, task: Task, start_s: float, seconds: float) -> float:
        """Seconds of a task beside reads: they take memory bandwidth, so computing is slower until they end."""
        cost_table = self.profile.cost_table
        if (
            cost_table is None
            or cost_table.read_contention <= 1.0
            or task.resource not in (COMPUTE, CPU, DECODE)
            or not seconds
        ):
            return seconds
        reading_s = max(0.0, self._lanes.get(DISK, _Lane()).free_s - start_s)
        return seconds + min(seconds, reading_s / cost_table.read_contention) * (cost_table.read_contention - 1.0)

    def _finish(self, future: asyncio.Future[Completion], task: Task, completion: Completion, faulty: bool) -> None:
        self.in_flight -= 1
        self._stops.pop(task.id)
        domain = next(r.domain for r in self.resources if r.name == task.resource) or f"task {task.id}"
        if faulty:
            self._poisoned[domain] = OSError(f"injected fault in {task.label}")
        error = self._poisoned.get(domain)
        if error is not None:
            future.set_exception(error)
        else:
            future.set_result(completion)

    def _report(self, task: Task) -> Report:
        item = task.item
        if isinstance(task.payload, RowChanges):  # acceptance depends on the sequence in a row
            changes = task.payload.rows
            self._rows |= {one.row: _RowState(one.sequence) for one in changes if one.sequence is not None}
            return NOTHING
        if item is not None and task.op is Op.ROUTE and task.layer is not None:
            assert self._routes is not None, "only experts on demand are routed"
            sequences = [self._rows[row].sequence for row in item.rows]
            return Report(routed=tuple(sorted(self._routes.of_item(item, task.layer, sequences).items())))
        if item is not None and task.growth is not None:
            limits = zip(item.rows, task.growth.budgets, task.growth.depths, strict=True)
            starts = dict(zip(item.rows, item.starts, strict=True))
            return Report(grown=tuple(self._grow(row, starts[row], task.growth, *limit) for row, *limit in limits))
        if item is not None and task.op is Op.EMBED and not item.prefill:
            for row, count in zip(item.rows, item.counts, strict=True):
                if (state := self._rows.get(row)) is not None:
                    state.proposal = state.tree.proposal().first(count - 1) if state.tree else None
        if item is None or task.op is not Op.ACCEPT:
            return NOTHING
        triples = zip(item.rows, item.starts, item.counts, strict=True)
        accepted = [self._accept(row, start, 1 if item.prefill else count) for row, start, count in triples]
        return Report(tuple(outcome for outcome, _ in accepted), tuple(grown for _, grown in accepted if grown))

    def _grow(self, row: int, start: int, growth: TreeLevel, budget: int, depth: int) -> TreeStatus:
        """Grow one level of a row's tree, whose root is at ``start``; all nodes of one depth have the same children."""
        state = self._rows[row]
        room = budget + growth.ahead, depth
        if state.tree is not None and room != state.room:
            state.tree.reopen(depth)
            state.tree.prune(room[0])
        state.budget, state.room = budget, room
        tree = state.tree = state.tree or Tree(depth)
        nodes = tree.frontier(growth.beams)
        tree.feed(nodes)
        for node in nodes:
            depth = 0 if node == ROOT else tree.nodes[node].depth
            scores = self._log_scores(state.sequence, start + depth)
            tree.extend(node, range(MAX_RANKS)[: growth.width], scores[: growth.width])
        tree.prune(room[0])
        return TreeStatus(row, tuple(tree.probabilities()), tree.gain_bound(growth.beams))

    def _log_scores(self, sequence: int, position: int) -> list[float]:
        """The draft's log probabilities of the ranks after a position; they are calibrated.

        The chance of rank 0 has a Beta(a, 1) distribution whose mean is the acceptance. It is drawn by Bayes' rule,
        given the target's draw: from Beta(a + 1, 1) if the target draws rank 0; otherwise from Beta(a, 2), as the
        product of a Beta(a + 1, 1) and a Beta(a, 1) draw.
        """
        acceptance = self.profile.acceptance
        if not 0.0 < acceptance < 1.0:
            return [_log(acceptance), *(_log(1.0 - acceptance) + rest for rest in self._log_rest)]
        a = acceptance / (1.0 - acceptance)
        chance = self._chance(sequence, position, 2) ** (1.0 / (a + 1.0))
        if self._rank(sequence, position) != 0:
            chance *= self._chance(sequence, position, 3) ** (1.0 / a)
        return [_log(chance), *(_log(1.0 - chance) + rest for rest in self._log_rest)]

    def _rank(self, sequence: int, position: int) -> int:
        """The rank that the target draws after a position; the draft may not offer that rank."""
        return bisect_right(self._bounds, self._chance(sequence, position, 0))

    def _accept(self, row: int, start: int, count: int) -> tuple[RowOutcome, TreeStatus | None]:
        """Accept proposals as long as they equal the target's draws; also the status of the tree that remains."""
        state = self._rows[row]
        draws = [self._rank(state.sequence, start + i) for i in range(count)]
        if state.proposal is None:
            accepted = next((i for i, rank in enumerate(draws[:-1]) if rank != 0), count - 1)
        else:
            accepted = len(state.proposal.follow([draws[depth] for depth in (0, *state.proposal.depths)])[0])
        emitted = draws[: accepted + 1]
        below = state.tree.descend(emitted)[1] if state.tree else None
        state.tree, state.proposal = below, None
        ends = (
            i for i in range(accepted + 1) if self._chance(state.sequence, start + i, 1) < self.profile.end_probability
        )
        end = next(ends, None)
        new = accepted + 1 if end is None else end + 1
        outcome = RowOutcome(row, count - 1, accepted, new, stopped=end is not None)
        if below is None:
            return outcome, None
        below.prune(state.budget)
        return outcome, TreeStatus(row, tuple(below.probabilities()), below.gain_bound(MAX_RANKS))

    def _chance(self, sequence: int, position: int, stream: int) -> float:
        """A number in [0, 1) from the arguments and the seed only (finaliser of splitmix64)."""
        mask = (1 << 64) - 1
        place = position * 2 + stream % 2 + stream // 2 * 0x94D049BB133111EB
        x = (self.profile.seed * 0x9E3779B97F4A7C15 + sequence * 0xBF58476D1CE4E5B9 + place) & mask
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
            x = ((x ^ (x >> shift)) * factor) & mask
        return (x ^ (x >> 31)) / 2.0**64


def _log(chance: float) -> float:
    return math.log(chance) if chance > 0.0 else -math.inf

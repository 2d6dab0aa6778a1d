"""The search for a plan: it varies what the user left open, and scores every plan by a run of the scheduler itself.

A plan is not run if its lower bound ``least_s`` is not below the best seconds found so far. Pure policy: the caller
passes ``forecast``, which runs the scheduler in virtual time on measured costs. So no formula can disagree with the
real schedule.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product

from aspec.errors import BudgetError
from aspec.plan import SPARE_SLOTS, Plan, PlanRequest, Speculation
from aspec.planning.placement import Footprint, make_plan

ROWS = (1, 2, 4, 8, 16, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048)
TREE_ROWS = 16  # with more rows, growing trees on the host takes longer than a pass, and chains fill the pass too
GROUPS = (1, 2, 3)
SLOTS = (1, 10)  # numbers of spare slots that are tried beside SPARE_SLOTS
DECODINGS = ((2, True), (1, False), (1, True))  # scratch buffers, and whether resident layers stay packed
CAPS = (4, 8, 32)  # limits on the proposals of a row that are tried beside the usual limit
MOST_FORECASTS = 40  # in one search
MARGIN = 0.99  # a plan is run only if its bound is below this share of the best seconds
GUESS_MARGIN = 1.5  # while acceptance is a guess, another form of proposals must be faster than the usual one by this


@dataclass(frozen=True, slots=True)
class Forecast:
    """The result of running a plan in virtual time."""

    tokens_per_s: float  # of decoding, all rows together
    prefill_s: float  # from the start until the first rows have their first token
    job_s: float  # of the whole workload
    tokens_per_pass: float  # per row
    bottleneck: str


@dataclass(frozen=True, slots=True)
class Candidate:
    """A plan, the request it was made for, and its forecast."""

    request: PlanRequest
    plan: Plan
    forecast: Forecast


@dataclass(frozen=True, slots=True)
class Search:
    """The result of a search: the plans that were run, the best first, and those that were not run."""

    found: tuple[Candidate, ...]
    num_too_large: int  # plans that do not fit into the budget
    num_pruned: int  # plans that fit and were not run
    pruned: tuple[tuple[float, Plan], ...] = ()  # (lower bound of the job's seconds, plan)

    @property
    def best(self) -> Candidate:
        """The plan to run."""
        return self.found[0]


@dataclass(frozen=True, slots=True)
class SearchSpace:
    """The values that the search tries for each setting; a single entry is a fixed setting."""

    rows: tuple[int, ...]
    groups: tuple[int, ...] = GROUPS
    speculations: tuple[tuple[Speculation | None, int], ...] = ((None, 0),)  # (shape, most proposals of a row)
    attention: tuple[str, ...] = ("compute",)
    micro_batches: int = 2  # if attention has its own lane
    caps: tuple[int, ...] = ()
    slots: tuple[int, ...] = SLOTS
    decodings: tuple[tuple[int, bool], ...] = ()  # that are tried beside the usual one, for weights that are decoded
    prefills: tuple[int, ...] = ()  # tokens of smaller prefill items, for plans that do not fit otherwise
    usual: Speculation | None = None  # the form of proposals that is preferred by GUESS_MARGIN; None: the fastest wins

    def order(self, plan: Plan, seconds: float) -> float:
        """The number that the search minimises: the job's seconds, weighted."""
        is_usual = self.usual is None or (plan.max_draft_tokens > 0 and plan.speculation is self.usual)
        return seconds if is_usual else seconds * GUESS_MARGIN


def rows_for(num_prompts: int) -> tuple[int, ...]:
    """The row counts to try for so many prompts; the last one runs all prompts at once."""
    most = min(num_prompts, ROWS[-1])
    return (*(rows for rows in ROWS if rows < most), most)


def search(
    request: PlanRequest,
    space: SearchSpace,
    footprint: Callable[[PlanRequest], Footprint],
    least_s: Callable[[Plan], float],
    forecast: Callable[[Plan], Forecast],
    progress: Callable[[int], None] = lambda _: None,
) -> Search:
    """The plans that fit, best first. Raises BudgetError if none fits.

    The search varies rows, groups, speculation and the place of attention first. Around the best of those plans it
    varies how weights are decoded, then the spare slots and the limit on proposals.
    """
    runs = _Runs(footprint, least_s, forecast, space, progress)
    runs.run(_main_choices(request, space))
    if not runs.found:
        assert runs.refusal is not None
        raise runs.refusal
    best = runs.ranked[0].request
    runs.run(replace(best, scratch_buffers=number, keep_packed=packed) for number, packed in space.decodings)
    runs.run(_refinements(runs.ranked[0].request, space))
    pruned = sorted(runs.pruned, key=lambda one: one[0])
    return Search(tuple(runs.ranked), runs.num_too_large, len(pruned), tuple(pruned))


class _Runs:
    """Runs requests in the order of their lower bounds, and keeps the results."""

    def __init__(
        self,
        footprint: Callable[[PlanRequest], Footprint],
        least_s: Callable[[Plan], float],
        forecast: Callable[[Plan], Forecast],
        space: SearchSpace,
        progress: Callable[[int], None],
    ) -> None:
        self._footprint, self._least_s, self._forecast, self._progress = footprint, least_s, forecast, progress
        self._space = space
        self.found: list[Candidate] = []
        self.pruned: list[tuple[float, Plan]] = []
        self.num_too_large = 0
        self.refusal: BudgetError | None = None

    @property
    def ranked(self) -> Sequence[Candidate]:
        """The candidates that were run, the best first."""
        return sorted(self.found, key=self._order)

    def _order(self, candidate: Candidate) -> float:
        return self._space.order(candidate.plan, candidate.forecast.job_s)

    def run(self, requests: Iterable[PlanRequest]) -> None:
        """Forecast every request that fits and could be better than the candidates so far."""
        for bound, request, plan in sorted(self._planned(requests), key=lambda one: one[0]):
            best = min(map(self._order, self.found), default=float("inf"))
            if bound >= MARGIN * best or len(self.found) >= MOST_FORECASTS:
                self.pruned.append((self._least_s(plan), plan))
                continue
            self.found.append(Candidate(request, plan, self._forecast(plan)))
            self._progress(len(self.found))

    def _planned(self, requests: Iterable[PlanRequest]) -> Iterator[tuple[float, PlanRequest, Plan]]:
        """The new plans that fit: lower bound of their order, fitted request, plan."""
        known = [candidate.plan for candidate in self.found]
        for request in requests:
            fitting = self._fitting(request)
            if fitting is None:
                self.num_too_large += 1
            elif fitting[1] not in known:
                known.append(fitting[1])
                yield self._space.order(fitting[1], self._least_s(fitting[1])), *fitting

    def _fitting(self, request: PlanRequest) -> tuple[PlanRequest, Plan] | None:
        """The request with the largest prefill items that fit, and its plan; None if none fits."""
        smaller = (tokens for tokens in self._space.prefills if tokens < request.prefill_tokens)
        for tokens in (request.prefill_tokens, *smaller):
            fitted = replace(request, prefill_tokens=tokens)
            try:
                return fitted, make_plan(self._footprint(fitted), fitted)
            except BudgetError as error:
                self.refusal = error
        return None


def _main_choices(request: PlanRequest, space: SearchSpace) -> Iterator[PlanRequest]:
    """The request with every combination of rows, groups, speculation and place of attention."""
    for rows, groups, (kind, most), place in product(space.rows, space.groups, space.speculations, space.attention):
        if kind is Speculation.TREE and rows > TREE_ROWS and len(space.rows) > 1:
            continue
        if groups > rows or (kind is None and groups > 1 and 1 in space.groups):
            continue  # without a draft there is no drafting to hide behind another group's pass
        yield replace(
            request,
            speculation=kind or Speculation.CHAIN,
            max_draft_tokens=most,
            fixed_draft_tokens=request.fixed_draft_tokens if kind else None,
            fixed_draft_depth=request.fixed_draft_depth if kind else None,
            num_rows=rows,
            num_groups=groups,
            prefill_tokens=min(request.prefill_tokens, rows * request.capacity),
            attention_resource=place,
            micro_batches=1 if place == "compute" else space.micro_batches,
        )


def _refinements(best: PlanRequest, space: SearchSpace) -> Iterator[PlanRequest]:
    """Variations of the best request: other numbers of spare slots, lower limits on proposals."""
    for spare in space.slots:
        if spare != SPARE_SLOTS:
            yield replace(best, spare_slots=spare)
    for cap in space.caps:
        if cap < best.max_draft_tokens:
            yield replace(best, max_draft_tokens=cap)

"""The search for a plan: what is left open is varied, and every plan is scored by a run of the scheduler itself.

A plan whose job cannot end sooner than the best one found, whatever the schedule, is not run: ``least_s`` bounds it
from below. Pure policy: it is handed ``forecast``, which runs the scheduler in virtual time on measured costs, so no
formula for a schedule can drift from the schedule.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product

from aspec.errors import BudgetError
from aspec.plan import SPARE_SLOTS, Plan, PlanRequest, Speculation
from aspec.planning.placement import Footprint, make_plan

ROWS = (1, 2, 4, 8, 16, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048)
TREE_ROWS = 16  # with more, the host grows trees for longer than a pass takes, and chains fill the pass as well
GROUPS = (1, 2, 3)
SLOTS = (1, 10)  # spare ones, beside the usual
CAPS = (4, 8, 32)  # proposals of a row at most, beside the usual
MOST_FORECASTS = 40  # of one search
MARGIN = 0.99  # a plan that can be better by less is not worth a run


@dataclass(frozen=True, slots=True)
class Forecast:
    """What a run of a plan in virtual time came to."""

    tokens_per_s: float  # of decoding, all rows together
    prefill_s: float  # until the first rows have their first token
    job_s: float  # the whole workload
    tokens_per_pass: float  # of a row
    bottleneck: str

    @property
    def order(self) -> float:
        """What the search makes small."""
        return self.job_s


@dataclass(frozen=True, slots=True)
class Candidate:
    """A plan, what it was asked for, and its forecast."""

    request: PlanRequest
    plan: Plan
    forecast: Forecast


@dataclass(frozen=True, slots=True)
class Search:
    """How the search went: plans from the best down, and what was not run."""

    found: tuple[Candidate, ...]
    num_too_large: int  # for the budget
    num_pruned: int  # that could not have been better
    pruned: tuple[tuple[float, Plan], ...] = ()  # those, and the seconds that the job takes with each at least

    @property
    def best(self) -> Candidate:
        """The plan to run."""
        return self.found[0]


@dataclass(frozen=True, slots=True)
class SearchSpace:
    """What of a plan is left open; a single entry is fixed."""

    rows: tuple[int, ...]
    groups: tuple[int, ...] = GROUPS
    speculations: tuple[tuple[Speculation | None, int], ...] = ((None, 0),)  # and what is proposed of a row at most
    attention: tuple[str, ...] = ("compute",)
    micro_batches: int = 2  # where attention has a lane of its own
    caps: tuple[int, ...] = ()
    slots: tuple[int, ...] = SLOTS
    prefills: tuple[int, ...] = ()  # smaller prefill items, for plans that do not fit otherwise


def rows_for(num_prompts: int) -> tuple[int, ...]:
    """Row counts worth a look for so many prompts: all of them at once is one of them."""
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
    """The plans that fit, best first. Raises BudgetError where none does.

    Rows, groups, speculation and the place of attention come first; slots and the most that is proposed are then
    varied around the best of those.
    """
    hunt = _Hunt(footprint, least_s, forecast, space.prefills, progress)
    hunt.run(_coarse(request, space))
    if not hunt.found:
        assert hunt.refusal is not None
        raise hunt.refusal
    hunt.run(_fine(hunt.ranked[0].request, space))
    pruned = sorted(hunt.pruned, key=lambda one: one[0])
    return Search(tuple(hunt.ranked), hunt.num_too_large, len(pruned), tuple(pruned))


class _Hunt:
    """Runs candidates, those of the smallest bound first, and remembers."""

    def __init__(
        self,
        footprint: Callable[[PlanRequest], Footprint],
        least_s: Callable[[Plan], float],
        forecast: Callable[[Plan], Forecast],
        prefills: tuple[int, ...],
        progress: Callable[[int], None],
    ) -> None:
        self._footprint, self._least_s, self._forecast, self._progress = footprint, least_s, forecast, progress
        self._prefills = prefills
        self.found: list[Candidate] = []
        self.pruned: list[tuple[float, Plan]] = []
        self.num_too_large = 0
        self.refusal: BudgetError | None = None

    @property
    def ranked(self) -> Sequence[Candidate]:
        """What was run, the best first."""
        return sorted(self.found, key=lambda found: found.forecast.order)

    def run(self, candidates: Iterable[PlanRequest]) -> None:
        """Forecast every candidate that fits and could be better than what is known."""
        for bound, request, plan in sorted(self._planned(candidates), key=lambda one: one[0]):
            best = min((found.forecast.order for found in self.found), default=float("inf"))
            if bound >= MARGIN * best or len(self.found) >= MOST_FORECASTS:
                self.pruned.append((bound, plan))
                continue
            self.found.append(Candidate(request, plan, self._forecast(plan)))
            self._progress(len(self.found))

    def _planned(self, candidates: Iterable[PlanRequest]) -> Iterator[tuple[float, PlanRequest, Plan]]:
        known = [found.plan for found in self.found]
        for request in candidates:
            found = self._fitting(request)
            if found is None:
                self.num_too_large += 1
            elif found[1] not in known:
                known.append(found[1])
                yield self._least_s(found[1]), *found

    def _fitting(self, request: PlanRequest) -> tuple[PlanRequest, Plan] | None:
        """The plan, with prefill items as large as fit."""
        for tokens in (request.prefill_tokens, *self._prefills):
            fitted = replace(request, prefill_tokens=tokens)
            try:
                return fitted, make_plan(self._footprint(fitted), fitted)
            except BudgetError as error:
                self.refusal = error
        return None


def _coarse(request: PlanRequest, space: SearchSpace) -> Iterator[PlanRequest]:
    for rows, groups, (kind, most), place in product(space.rows, space.groups, space.speculations, space.attention):
        if kind is Speculation.TREE and rows > TREE_ROWS and len(space.rows) > 1:
            continue
        if groups > rows or (kind is None and groups > 1 and 1 in space.groups):
            continue  # without a draft there is nothing to hide beside another group
        yield replace(
            request,
            speculation=kind or Speculation.CHAIN,
            max_draft_tokens=most,
            fixed_draft_tokens=request.fixed_draft_tokens if kind else None,
            fixed_draft_depth=request.fixed_draft_depth if kind else None,
            num_rows=rows,
            num_groups=groups,
            attention_resource=place,
            micro_batches=1 if place == "compute" else space.micro_batches,
        )


def _fine(best: PlanRequest, space: SearchSpace) -> Iterator[PlanRequest]:
    """Around the best: other numbers of slots, less that may be proposed."""
    for spare in space.slots:
        if spare != SPARE_SLOTS:
            yield replace(best, spare_slots=spare)
    for cap in space.caps:
        if cap < best.max_draft_tokens:
            yield replace(best, max_draft_tokens=cap)

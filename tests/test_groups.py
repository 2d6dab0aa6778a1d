"""Several groups of rows: the draft works for one while another is verified, and rows refill in the midst of a job."""

from functools import partial
from itertools import pairwise

import pytest

from aspec.errors import InternalError
from aspec.plan import Speculation
from aspec.planning.sim_backend import DEVICE_RESOURCES, HOST_RESOURCES, SimCosts
from aspec.tasks.op import Op
from aspec.tasks.races import find_races
from aspec.tasks.rows import RowTable
from aspec.tasks.scheduler import Scheduler
from aspec.tasks.task import RequestAdded, Started
from tests.simulate import make_plan, simulate

JOB = [(number, 5 + 13 * number % 90, 8 + 7 * number % 30) for number in range(24)]
LINK_BOUND = SimCosts(disk_bytes_per_s=4e7, layer_s=5e-3, layer_token_s=1e-5, draft_s=0.1, acceptance=0.85)


def overlap(first, second):
    """Seconds that two lists of spans have in common."""
    return sum(max(0.0, min(a.stop_s, b.stop_s) - max(a.start_s, b.start_s)) for a in first for b in second)


@pytest.mark.parametrize("speculation", [Speculation.CHAIN, Speculation.TREE])
@pytest.mark.parametrize("groups", [2, 3])
@pytest.mark.parametrize("resources", [HOST_RESOURCES, DEVICE_RESOURCES])
def test_a_job_is_served_whatever_the_groups(virtual, speculation, groups, resources):
    own = resources is DEVICE_RESOURCES
    plan = make_plan(
        num_rows=6,
        num_groups=groups,
        speculation=speculation,
        fixed_draft_tokens=None,
        num_staging=2 if own else 0,
        draft_resource="draft" if own else "compute",
    )
    spans, scheduler, _ = virtual(lambda: simulate(plan, JOB, profile=LINK_BOUND, resources=resources))
    assert sum(o.num_new for span in spans for o in span.outcomes) == sum(new for *_, new in JOB)
    assert find_races(spans) == []
    assert scheduler.done
    for span in spans:
        if span.task.item is not None:
            assert {row % groups for row in span.task.item.rows} == {span.task.item.group}


@pytest.mark.parametrize("speculation", [Speculation.CHAIN, Speculation.TREE])
def test_the_draft_works_for_one_group_while_another_is_verified(virtual, speculation):
    """A pass of 2 s and drafts of 0.5 s on a lane of their own."""
    profile = SimCosts(disk_bytes_per_s=1e12, layer_s=0.5, layer_token_s=1e-4, draft_s=0.1, acceptance=0.85)
    hidden = {}
    for groups in (1, 2):
        plan = make_plan(
            num_rows=6,
            num_groups=groups,
            num_staging=2,
            draft_resource="draft",
            speculation=speculation,
            fixed_draft_tokens=5,
            draft_ahead=False,
        )
        arrivals = [(number, 10, 60) for number in range(6)]
        run = partial(simulate, plan, arrivals, profile=profile, resources=DEVICE_RESOURCES)
        spans, _, _ = virtual(run)
        drafts = [span for span in spans if span.task.op is Op.DRAFT]
        layers = [span for span in spans if span.task.op is Op.LAYER]
        hidden[groups] = overlap(drafts, layers) / sum(span.stop_s - span.start_s for span in drafts)
    assert hidden[1] == 0.0
    assert hidden[2] > 0.9


def test_passes_of_groups_follow_one_another_without_a_gap(virtual):
    """Compute-bound: the next group's pass is ready when one has ended."""
    profile = SimCosts(disk_bytes_per_s=1e12, layer_s=0.1, draft_s=0.01, acceptance=0.85)
    plan = make_plan(num_rows=4, num_groups=2, draft_resource="draft", num_staging=2)
    arrivals = [(number, 10, 60) for number in range(4)]
    spans, _, _ = virtual(lambda: simulate(plan, arrivals, profile=profile, resources=DEVICE_RESOURCES))
    layers = sorted((s for s in spans if s.task.op is Op.LAYER), key=lambda s: s.start_s)
    steady = [span for span in layers if 2.0 < span.start_s < layers[-1].stop_s - 2.0]
    gaps = [b.start_s - a.stop_s for a, b in pairwise(steady)]
    assert max(gaps) <= profile.head_s + profile.embed_s + 1e-9, "nothing but heads and embeddings between layers"


def test_who_waits_takes_a_place_in_the_midst_of_the_job(virtual):
    plan = make_plan(num_rows=4, num_groups=2, fixed_draft_tokens=0)
    arrivals = [(number, 5, 3 if number % 2 else 30) for number in range(12)]
    spans, _, _ = virtual(lambda: simulate(plan, arrivals, profile=LINK_BOUND))
    rows = [len(span.task.item.rows) for span in spans if span.task.op is Op.HEAD and not span.task.item.prefill]
    prefills = [span for span in spans if span.task.op is Op.HEAD and span.task.item.prefill]
    assert sum(len(span.task.item.rows) for span in prefills) == 12
    assert len({span.task.number for span in prefills}) > 3, "they join while others decode"
    assert sum(count == 2 for count in rows) > len(rows) / 2, "groups are full most of the time"


def test_arrivals_that_come_together_share_the_first_pass():
    scheduler = Scheduler(make_plan())
    scheduler.handle([Started()])
    tasks = scheduler.handle([RequestAdded(0, 10, 5), RequestAdded(1, 12, 5)])
    assert {row for task in tasks if task.op is Op.EMBED for row in task.item.rows} == {0, 1}


def test_groups_share_what_there_is():
    rows = RowTable(num_rows=8, num_groups=2)
    for number in range(5):
        rows.add(RequestAdded(number, 4, 4))
    assert [seating.row for seating in rows.assign_rows(0)] == [0, 2, 4]
    assert [seating.row for seating in rows.assign_rows(1)] == [1, 3]


def test_prompts_beyond_what_a_pass_takes_wait_and_a_longer_one_joins_alone():
    rows = RowTable(num_rows=8, most_prompt_tokens=100)
    for number, tokens in enumerate((60, 40, 10, 500, 7)):
        rows.add(RequestAdded(number, tokens, 4))
    assert [seating.sequence for seating in rows.assign_rows()] == [0, 1]
    assert [seating.sequence for seating in rows.assign_rows()] == [2]
    assert [seating.sequence for seating in rows.assign_rows()] == [3]
    assert [seating.sequence for seating in rows.assign_rows()] == [4]


def test_more_groups_than_rows_cannot_be():
    with pytest.raises(InternalError, match="3 rows cannot form 4 groups"):
        make_plan(num_rows=3, num_groups=4)

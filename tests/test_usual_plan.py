"""The plan of an engine whose work is not known: layers come before rows and proposals that nobody asked for."""

from dataclasses import replace

import pytest

from aspec.engine.design import decide
from aspec.engine.engine import describe_plan
from aspec.errors import BudgetError
from aspec.options import EngineOptions
from aspec.plan import Workload
from aspec.planning import workload
from aspec.planning.footprint import DEFAULT_ROWS, read_models, request_for
from aspec.planning.resolve import resolve, revise
from aspec.planning.search import TREE_ROWS
from aspec.planning.usual import FREE_SHARE, ROWS_SHARE
from aspec.planning.workload import CostBasis
from aspec.profiling.hardware import Hardware
from aspec.profiling.profile_cache import AcceptanceStats
from tests import tiny

MIB = 1 << 20
SIZES = {"hidden_size": 128, "num_hidden_layers": 8, "max_position_embeddings": 512}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    target = tiny.build(tmp_path_factory.mktemp("usual") / "target", "llama", sizes=SIZES)
    return read_models(resolve(EngineOptions(target=target, device="cpu", device_memory=64 * MIB)))


def plan(models, budget, **options):
    """The plan under a budget; the parts of the model do not depend on it."""
    resolved = replace(revise(models.resolved, device_memory=budget, **options), budget_bytes=budget)
    return decide(replace(models, resolved=resolved))[1]


def budgets(models):
    """From the least that one row needs to more than all rows need."""
    most = plan(models, 64 * MIB).held_bytes
    return range(most // 4, 2 * most, most // 24)


def test_rows_are_as_many_as_memory_has_for_nothing(models):
    assert plan(models, 64 * MIB).num_rows == DEFAULT_ROWS
    alone = plan(models, 64 * MIB, max_batch=1, speculation="off")
    tight = plan(models, alone.held_bytes, speculation="off")  # rows without proposals: trees hold more than a row
    assert (tight.num_rows, tight.streamed) == (1, ())


def test_no_layer_streams_for_a_row_that_nobody_asked_for(models):
    seen = set()
    for budget in budgets(models):
        try:
            alone = plan(models, budget, max_batch=1)
        except BudgetError:
            continue
        open_rows = plan(models, budget)
        assert open_rows.capacity == alone.capacity, "a context that a prompt may need is not given up for rows"
        assert open_rows.streamed_bytes <= alone.streamed_bytes * (1 + ROWS_SHARE)
        seen.add((open_rows.num_rows, bool(open_rows.streamed)))
    assert seen >= {(1, True), (1, False), (DEFAULT_ROWS, False)}


def test_rows_that_are_asked_for_are_reserved(models):
    budget = plan(models, 64 * MIB, max_batch=1).held_bytes
    one, four = (plan(models, budget, max_batch=rows) for rows in (1, 4))
    assert four.num_rows == 4
    assert four.arithmetic["KV cache"] == 4 * one.arithmetic["KV cache"]


@pytest.mark.parametrize("work", [{}, {"workload": Workload(3, 20, 24)}], ids=["usual", "searched"])
def test_the_text_itself_proposes_where_that_costs_almost_nothing(models, work):
    seen = set()
    for budget in budgets(models):
        try:
            without = plan(models, budget, speculation="off", **work)
        except BudgetError:
            continue
        found = plan(models, budget, **work)
        assert found.num_rows == without.num_rows
        assert found.streamed_bytes <= without.streamed_bytes * (1 + FREE_SHARE)
        assert found.num_slots >= without.num_slots or not found.streamed
        assert found.held_bytes <= budget
        assert found.request.from_text == (found.max_draft_tokens > 0) == ("from the text" in describe_plan(found))
        seen.add((found.max_draft_tokens, bool(found.streamed)))
    assert (128, False) in seen
    assert (0, True) in seen, "a layer more would stream"


def test_many_rows_propose_nothing_unasked(models):
    assert not plan(models, 64 * MIB, max_batch=TREE_ROWS + 1).max_draft_tokens
    assert plan(models, 64 * MIB, max_batch=TREE_ROWS).max_draft_tokens


# -- experts ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sparse(tmp_path_factory):
    sizes = {**SIZES, "num_local_experts": 16, "intermediate_size": 256}
    target = tiny.build(tmp_path_factory.mktemp("sparse") / "target", "mixtral", sizes=sizes)
    return read_models(resolve(EngineOptions(target=target, device="cpu", device_memory=64 * MIB)))


def chosen(models, budget, **options):
    return decide(replace(models, resolved=replace(revise(models.resolved, **options), budget_bytes=budget)))


def test_experts_are_read_on_demand_where_whole_layers_would_stream(sparse):
    roomy = plan(sparse, 256 * MIB)
    assert (roomy.experts, roomy.streamed_bytes) == (None, 0)
    budget = roomy.held_bytes // 2
    reading, tight = chosen(sparse, budget)
    assert tight.experts is not None
    assert reading.on_demand is not None
    whole_models, whole = chosen(sparse, budget, experts="whole")
    assert whole.experts is None
    assert whole.streamed_bytes > 0
    assert whole_models.on_demand is None
    many = plan(sparse, budget, max_batch=32, max_context=64)
    assert many.experts is None, "so many rows choose nearly all experts of a layer"


def test_experts_are_read_ahead_where_a_layer_has_few_of_them(sparse, tmp_path):
    def prefetches(models, **options):
        resolved = revise(models.resolved, experts="on-demand", **options)
        return request_for(replace(models, resolved=resolved).reading_experts(on_demand=True)).prefetch_experts

    target = tiny.build(tmp_path / "few", "mixtral", sizes={"num_local_experts": 8, "num_experts_per_tok": 2})
    few = read_models(resolve(EngineOptions(target=target, device="cpu", device_memory=64 * MIB)))
    assert prefetches(few)
    assert not prefetches(few, prefetch_experts=False)
    assert not prefetches(sparse), "it has many"
    assert prefetches(sparse, prefetch_experts=True)


def test_experts_are_read_on_demand_where_no_whole_layer_fits(sparse):
    with pytest.raises(BudgetError):
        plan(sparse, 5 * MIB, experts="whole", max_batch=1, max_context=64, speculation="off")
    assert plan(sparse, 5 * MIB, max_batch=1, max_context=64, speculation="off").experts is not None


def test_many_rows_that_choose_most_experts_are_planned_with_whole_layers_alone(sparse, monkeypatch):
    """To foretell the experts of 64 rows takes half a minute: it is not done where nearly all are read anyway."""
    asked, plain = [], workload.best_plans

    def noted(models, *given):
        asked.append(models.on_demand is not None)
        return plain(models, *given)

    monkeypatch.setattr(workload, "best_plans", noted)
    budget = plan(sparse, 256 * MIB).held_bytes // 2

    def choice(prompts, **options):
        asked.clear()
        work = Workload(prompts, 10, 10)
        resolved = revise(sparse.resolved, workload=work, max_context=32, speculation="off", **options)
        basis = CostBasis(Hardware(), AcceptanceStats())
        return workload.choose(replace(sparse, resolved=replace(resolved, budget_bytes=budget)), basis)

    many = choice(32, max_batch=32)
    assert asked == [False]
    assert many.models.on_demand is None
    assert many.obstacle == "32 rows choose most of a layer together"
    choice(32, max_batch=2)
    assert asked == [False, True]
    choice(1, max_batch=2)
    assert asked[0] is True, "few prompts do not wait for two searches"

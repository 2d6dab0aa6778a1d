"""The plan of an engine whose work is not known: layers come before rows that nobody asked for."""

from dataclasses import replace

import pytest

from aspec.engine.design import decide
from aspec.errors import BudgetError
from aspec.options import EngineOptions
from aspec.planning.footprint import DEFAULT_ROWS, read_models
from aspec.planning.resolve import resolve
from aspec.planning.usual import ROWS_SHARE
from tests import tiny

MIB = 1 << 20
SIZES = {"hidden_size": 128, "num_hidden_layers": 8, "max_position_embeddings": 512}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    target = tiny.build(tmp_path_factory.mktemp("usual") / "target", "llama", sizes=SIZES)
    return read_models(resolve(EngineOptions(target=target, device="cpu", device_memory=64 * MIB)))


def plan(models, budget, **options):
    """The plan under a budget; the parts of the model do not depend on it."""
    resolved = replace(
        models.resolved, budget_bytes=budget, options=replace(models.resolved.options, device_memory=budget, **options)
    )
    return decide(replace(models, resolved=resolved))


def budgets(models):
    """From the least that one row needs to more than all rows need."""
    most = plan(models, 64 * MIB).held_bytes
    return range(most // 4, 2 * most, most // 24)


def test_rows_are_as_many_as_memory_has_for_nothing(models):
    assert plan(models, 64 * MIB).num_rows == DEFAULT_ROWS
    tight = plan(models, plan(models, 64 * MIB, max_batch=1).held_bytes)
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

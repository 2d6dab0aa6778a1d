"""Expected unions and misses of experts: exact where routes are independent, fitted where neighbours share experts."""

import random
from collections import Counter
from dataclasses import replace
from itertools import pairwise

import pytest

from aspec.expert_plan import ExpertPlan, ExpertShape
from aspec.planning.coarsening import coarse
from aspec.planning.experts.routes import SKEW, SimRoutes
from aspec.planning.experts.traffic import chain_worth, expert_traffic
from aspec.profiling.cost_tables import SimCosts
from aspec.tasks.experts import routing
from aspec.tasks.experts.cache import ExpertCache
from aspec.tasks.experts.routing import TEXT_EXPONENT, CachedPasses, LayerRoutes, RoutingStats, zipf_chances
from aspec.tasks.task import WorkItem
from tests.simulate import make_plan, with_experts


def drawn(chances, rng) -> list[int]:
    """The experts of a token, each chosen with its own chance."""
    return [expert for expert, chance in enumerate(chances) if rng.random() < chance]


def pass_of(chances, tokens, rng, repeat=0.0) -> Counter:
    """The routes of a pass; a token has the experts of the one before with chance ``repeat``."""
    routed: Counter = Counter()
    own = drawn(chances, rng)
    for _ in range(tokens):
        own = own if rng.random() < repeat else drawn(chances, rng)
        routed.update(own)
    return routed


def test_before_any_route_experts_are_alike_and_one_token_has_top_k():
    stats = RoutingStats({0: 64}, 4)
    assert stats.expected_union(0, 1) == pytest.approx(4.0)
    draws = 8**stats.exponent
    assert stats.expected_union(0, 8) == pytest.approx(64 * (1 - (1 - 4 / 64) ** draws))
    assert stats.expected_missing(0, 8, range(32)) == pytest.approx(stats.expected_union(0, 8) / 2)
    assert stats.expected_missing(0, 8, range(64)) == pytest.approx(0.0)


def test_frequencies_are_those_of_the_routes_and_follow_a_new_text():
    layer = LayerRoutes(4, 2)
    for _ in range(400):
        layer.add(4, {0: 4, 1: 3, 2: 1})
    assert layer.chances() == pytest.approx([1.0, 0.75, 0.25, 0.0], abs=0.03)
    for _ in range(400):
        layer.add(1, {3: 1, 2: 1})
    assert layer.chances() == pytest.approx([0.2, 0.15, 0.8, 0.8], abs=0.06)
    layer.add(100_000, {0: 100_000, 1: 100_000})
    assert layer.chances() == pytest.approx([1.0, 1.0, 0.0, 0.0], abs=0.03)
    assert sum(layer.chances()) == pytest.approx(2.0, abs=0.01)


@pytest.mark.parametrize(("repeat", "exponent"), [(0.0, 1.0), (0.6, 0.7)], ids=["independent", "neighbours share"])
def test_exponent_is_fitted_to_the_unions(repeat, exponent):
    rng, chances = random.Random(1), zipf_chances(64, 4, 1.0)
    stats = RoutingStats({0: 64}, 4)
    for _ in range(150):
        stats.observe(0, 12, pass_of(chances, 12, rng, repeat))
    assert stats.exponent == pytest.approx(exponent, abs=0.12)
    unions = [len(pass_of(chances, 12, rng, repeat)) for _ in range(150)]
    assert stats.expected_union(0, 12) == pytest.approx(sum(unions) / 150, rel=0.1)
    uniform = 64 * (1 - (1 - 4 / 64) ** 12)
    assert uniform > 1.2 * stats.expected_union(0, 12)  # what a price would overstate without frequencies


def test_one_token_and_no_routes_tell_nothing_of_the_exponent():
    stats = RoutingStats({0: 8}, 2)
    stats.observe(0, 1, {0: 1, 1: 1})
    stats.observe(0, 4, {})
    assert stats.exponent == routing.FIRST_EXPONENT


def test_layers_have_frequencies_of_their_own():
    stats = RoutingStats({1: 8, 3: 8}, 2)
    for _ in range(200):
        stats.observe(1, 2, {0: 2, 1: 2})
    assert stats.expected_missing(1, 4, (0, 1)) < 0.3
    assert stats.expected_missing(3, 4, (0, 1)) > 2.0


def test_zipf_shares_sum_to_top_k_and_none_is_above_one():
    assert zipf_chances(4, 2, 1.0) == pytest.approx([0.96, 0.48, 0.32, 0.24])
    assert zipf_chances(8, 2, 0.0) == pytest.approx([0.25] * 8)
    steep = zipf_chances(4, 2, 2.0)
    assert steep[0] == pytest.approx(1.0)
    assert steep[1] / steep[2] == pytest.approx(9 / 4)
    assert sum(steep) == pytest.approx(2.0)


@pytest.mark.parametrize("slots", [14, 24, 40])
def test_expected_misses_are_those_of_a_simulated_cache(slots):
    rng, chances = random.Random(2), zipf_chances(64, 4, 1.0)
    recent: dict[int, None] = {}
    touched = missed = 0
    for number in range(3000):
        union = list(pass_of(chances, 4, rng))
        if number >= 500:
            touched += len(union)
            missed += sum(expert not in recent for expert in union)
        for expert in union:
            recent.pop(expert, None)
            recent[expert] = None
        while len(recent) > slots:
            del recent[next(iter(recent))]
    expected = CachedPasses.of(chances, slots, 4.0, 1.0)
    assert expected.touched == pytest.approx(touched / 2500, rel=0.03)
    assert expected.missing == pytest.approx(missed / 2500, rel=0.1)


def test_all_experts_in_slots_or_none():
    chances = zipf_chances(64, 4, 1.0)
    assert CachedPasses.of(chances, 64, 4.0, 1.0).missing == 0.0
    bare = CachedPasses.of(chances, 0, 4.0, 1.0)
    assert bare.missing == pytest.approx(bare.touched)


@pytest.mark.parametrize(("share", "hits"), [(0.32, 0.84), (0.48, 0.94)])
def test_expected_hits_are_those_published_for_qwen3_30b(share, hits):
    chances = zipf_chances(128, 8, SKEW)
    found = CachedPasses.of(chances, share * 128, 1.0, TEXT_EXPONENT)
    assert found.touched == pytest.approx(8.0)
    assert 1.0 - found.missing / found.touched == pytest.approx(hits, abs=0.03)
    assert 43 < CachedPasses.of(chances, 0, 25**TEXT_EXPONENT, 1.0).touched < 50


# -- the routes of a simulated text ------------------------------------------------------------------------


def chance(sequence, position, stream):
    return random.Random(f"{sequence} {position} {stream}").random()


def routes(num_tokens, layer=0):
    shape = ExpertShape((128, 128), 8, (1, 1), 1)
    drawn, row = SimRoutes(shape, chance), WorkItem(0, (0,), (0,), (1,))
    return [drawn.of_item(replace(row, starts=(at,)), layer, [5]) for at in range(num_tokens)]


@pytest.fixture(scope="module")
def text():
    return routes(400)


def test_simulated_routes_are_those_of_trained_models(text):
    assert all(len(one) == 8 for one in text)
    pairs = [len(a.keys() & b.keys()) / len(a.keys() | b.keys()) for a, b in pairwise(text)]
    assert 0.2 < sum(pairs) / len(pairs) < 0.4  # published: 0.3
    unions = [len(set().union(*text[at : at + 25])) for at in range(0, 400, 25)]
    assert 40 < sum(unions) / len(unions) < 53  # published: 43 to 50
    for share, published in ((0.32, 0.84), (0.48, 0.94)):
        cache, hits = ExpertCache(range(int(share * 128))), []
        for one in text:
            hits.append(len(cache.place(list(one)).held))
        assert sum(hits[100:]) / 8 / 300 == pytest.approx(published, abs=0.05)


def test_simulated_routes_differ_by_layer_and_are_the_same_again(text):
    assert routes(3) == text[:3]
    assert routes(3, layer=1) != text[:3]
    shape = ExpertShape((128, 128), 8, (1, 1), 1)
    prompt = SimRoutes(shape, chance).of_item(WorkItem(0, (0,), (0,), (512,), prefill=True), 0, [5])
    assert 90 < len(prompt) < 128
    assert sum(prompt.values()) == pytest.approx(8 * 512, rel=0.1)


# -- what a plan says of them ------------------------------------------------------------------------------


def expert_plan(cached, nbytes=3_000_000):
    shape = ExpertShape((0, 128, 128), 8, (0, nbytes, nbytes), nbytes)
    return ExpertPlan(shape, (0, cached, cached), 4)


def test_a_pass_reads_what_its_experts_miss():
    one, eight = (expert_traffic(expert_plan(40), tokens) for tokens in (1, 8))
    assert one.touched == pytest.approx(16.0)
    assert one.read_bytes == pytest.approx(3_000_000 * one.missing)
    assert 0.75 < one.hit_rate < 0.9
    assert eight.hit_rate < one.hit_rate
    assert one.read_bytes < eight.read_bytes < 8 * one.read_bytes
    assert expert_traffic(expert_plan(128), 8).read_bytes == 0.0


def test_a_chain_is_worth_its_experts_only_if_it_is_accepted():
    likely, unlikely = (chain_worth(expert_plan(40), acceptance) for acceptance in (0.95, 0.3))
    assert likely.tokens > 0.95 * likely.reads  # a token's experts are read once, in one pass or in another
    assert unlikely.tokens < 0.75 * unlikely.reads  # those of a refused token for nothing
    assert chain_worth(expert_plan(128), 0.3).proposals == 0  # nothing is read: nothing to weigh


def test_merged_layers_have_the_bytes_and_the_slots_of_their_layers():
    parts = make_plan(num_layers=8, parts_per_layer=1, num_slots=8, resident=range(8))
    plan = with_experts(parts, 12, 8, 64, 4, dense=(0,), nbytes=1000)
    merged, _ = coarse(plan, SimCosts(), max_tasks=40)
    assert merged.experts is not None
    assert merged.num_layers < 8
    assert merged.experts.shape.total_bytes == plan.experts.shape.total_bytes
    assert set(merged.experts.cached) == {12}

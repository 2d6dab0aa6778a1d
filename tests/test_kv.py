"""The slot cache: masks against a slow reference, ragged rows, trees, padding that nobody ever sees."""

import itertools
import random

import pytest
import torch

from aspec.models.attention import attend, temporary_bytes, temporary_bytes_exact
from aspec.models.exact.attention import MAX_GROUP_BYTES
from aspec.models.exact.paths import KEY_TILE, MaskKind
from aspec.models.exact.tiles import MAX_SCORE_BYTES
from aspec.models.kv_cache import KVCache

KINDS = [MaskKind(), MaskKind(window=3), MaskKind(chunk=4), MaskKind(window=5, chunk=4)]
SHAPES = [(2, 4, 4), None, (1, 6, 3)]


def cache(num_rows=4, capacity=16, exact=False):
    return KVCache(SHAPES, num_rows, capacity, torch.float32, exact=exact)


def slow_mask(kind, start, count, high, parents=None):
    """Row by row, slot by slot: [count][high]."""
    parents = parents or [t - 1 for t in range(count)]

    def path(node):
        return [] if node < 0 else [*path(parents[node]), node]

    position = {start + t: start + len(path(t)) - 1 for t in range(count)} | {s: s for s in range(start)}
    rows = []
    for t in range(count):
        seen = set(range(start)) | {start + n for n in path(t)}
        query = position[start + t]
        inside = [
            s in seen
            and (kind.window is None or query - position[s] < kind.window)
            and (kind.chunk is None or query // kind.chunk == position[s] // kind.chunk)
            for s in range(high)
        ]
        rows.append(inside)
    return rows


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("starts", "counts", "parents"),
    [
        ([0], [5], None),
        ([4, 4], [3, 3], None),
        ([0, 7, 2], [6, 1, 4], None),
        ([5], [6], [[-1, 0, 0, 1, 2, 4]]),
        ([5, 1, 9], [6, 2, 1], [[-1, -1, 0, 1, 3, 3], [-1, -1], [-1]]),
        ([3, 3], [4, 4], [[-1, 0, 1, 2], [-1, -1, -1, -1]]),
    ],
)
def test_masks_and_positions(kind, starts, counts, parents):
    step = cache().step(list(range(len(starts))), starts, counts, parents)
    mask = step.mask(kind)
    high = step.high  # whole tiles, the last one cut at the capacity: what lies behind a row's end is invisible
    assert high >= max(s + c for s, c in zip(starts, counts, strict=True))
    assert mask.shape == (len(starts), 1, max(counts), high)
    assert mask.dtype == torch.bool
    for row, (start, count) in enumerate(zip(starts, counts, strict=True)):
        links = parents[row] if parents else None
        expected = torch.tensor(slow_mask(kind, start, count, high, links))
        assert torch.equal(mask[row, 0, :count], expected)
        assert torch.equal(mask[row, 0, count:], expected[-1:].expand(max(counts) - count, -1)), "padding sees the same"
        if links is None:
            assert step.position_ids[row, :count].tolist() == list(range(start, start + count))
    assert mask.any(-1).all(), "no query is blind"
    assert step.mask(kind) is mask, "computed once"


def random_parents(count, generator, bushy=0.5):
    """A tree of ``count`` nodes: the lower ``bushy``, the more a node continues the one before."""
    return [-1, *(generator.randrange(-1, n) if generator.random() < bushy else n - 1 for n in range(1, count))]


def permuted(parents, generator):
    """The same tree with siblings (and cousins) in another order, and the new number of every old node."""
    children = {}
    for node, parent in enumerate(parents):
        children.setdefault(parent, []).append(node)
    order, open_nodes = [], children.get(-1, [])[:]
    while open_nodes:
        node = open_nodes.pop(generator.randrange(len(open_nodes)))
        order.append(node)
        open_nodes += children.get(node, [])
    new = {node: at for at, node in enumerate(order)} | {-1: -1}
    return [new[parents[node]] for node in order], new


TREES = {
    "single node": [-1],
    "two equal tokens under different parents": [-1, -1, 0, 1],
    "deep chain": list(range(-1, 39)),
    "star": [-1] * 20,
    "shared prefixes": [-1, 0, 1, 2, 2, 2, 3, 3, 4, 6, 6, 9],
    "random": random_parents(30, random.Random(1)),
    "siblings permuted": permuted(random_parents(30, random.Random(1)), random.Random(2))[0],
}


def grow(storage, rows, starts, trees, generator):
    """The steps that write the trees in pieces of random length; a row whose tree is complete repeats nothing."""
    firsts = [0] * len(rows)
    while open_rows := [b for b, tree in enumerate(trees) if firsts[b] < len(tree)]:
        counts = [generator.randint(1, len(trees[b]) - firsts[b]) for b in open_rows]
        upto = [trees[b][: firsts[b] + count] for b, count in zip(open_rows, counts, strict=True)]
        own = [[values[b] for b in open_rows] for values in (rows, starts, firsts)]
        yield open_rows, own[2], counts, storage.step(own[0], own[1], counts, upto, own[2])
        for b, count in zip(open_rows, counts, strict=True):
            firsts[b] += count


def slow_path(parents, node):
    return [] if node < 0 else [*slow_path(parents, parents[node]), node]


@pytest.mark.parametrize("name", TREES)
@pytest.mark.parametrize("exact", [False, True])
def test_a_growing_tree_equals_one_that_is_written_at_once(name, exact):
    """Masks, positions, slots and what is stored; against a slow parent walk too."""
    generator = random.Random(0)
    starts, trees, rows = [70, 0, 61], [TREES[name], TREES["shared prefixes"], TREES[name][:7]], [2, 0, 3]
    storage, other = (cache(capacity=128, exact=exact) for _ in range(2))
    states = torch.randn(len(rows), 2, max(map(len, trees)), 4)
    whole = storage.step(rows, starts, [len(tree) for tree in trees], trees)
    padded = torch.nn.functional.pad(states, (0, 0, 0, whole.slots.shape[1] - states.shape[2]))
    whole.update(padded, padded, 0)
    for kind in KINDS:
        for open_rows, firsts, counts, step in grow(other, rows, starts, trees, generator):
            new = torch.zeros(len(open_rows), 2, step.slots.shape[1], 4)
            for b, (row, first, count) in enumerate(zip(open_rows, firsts, counts, strict=True)):
                nodes, tree = slice(first, first + count), trees[row][: first + count]
                assert step.slots[b, :count].tolist() == list(range(starts[row] + first, starts[row] + first + count))
                assert step.position_ids[b, :count].tolist() == whole.position_ids[row, nodes].tolist()
                mask = step.mask(kind)[b, 0, :count]
                assert torch.equal(mask, whole.mask(kind)[row, 0, nodes, : step.high])
                slow = slow_mask(kind, starts[row], first + count, step.high, tree)
                assert mask.tolist() == slow[first:]
                if exact:
                    check_paths(step.paths(kind)[b], starts[row], tree, first, kind)
                new[b, :, :count] = states[row, :, nodes]
            step.update(new, new, 0)
        assert torch.equal(storage.keys[0][:, :, :-1], other.keys[0][:, :, :-1])


def check_paths(paths, start, tree, first, kind):
    """What exact attention is given: every query's keys in the order of decoding its path alone."""
    assert paths.prefix % KEY_TILE == 0
    assert paths.num_slots % KEY_TILE == 0
    assert paths.num_slots >= start + len(tree)
    for at in range(len(tree) - first):
        slots = list(range(start)) + [start + node for node in slow_path(tree, first + at)]
        assert paths.hidden.shape[1] % KEY_TILE == 0
        expected = slow_mask(kind, len(slots) - 1, 1, paths.hidden.shape[1])[0]
        assert (~paths.hidden[at]).tolist() == expected
        found = list(range(paths.prefix)) + ([] if paths.tail is None else paths.tail[at].tolist())
        assert found[: len(slots)] == slots
        assert max(found) < paths.num_slots


def test_chains_need_no_tail():
    storage = cache(capacity=200, exact=True)
    for parents in (None, [[-1, 0, 1], [-1, 0]]):
        assert all(paths.tail is None for paths in storage.step([0, 1], [62, 9], [3, 2], parents).paths(KINDS[0]))
    chain, tree = storage.step([0, 1], [62, 9], [3, 2], [[-1, 0, 1], [-1, -1]]).paths(KINDS[0])
    assert chain.tail is None
    assert tree.tail is not None


def test_a_chain_that_grows():
    step = cache().step([1, 2], [4, 0], [2, 1], firsts=[3, 0])
    assert step.slots.tolist() == [[7, 8], [0, 16]]
    assert step.position_ids.tolist() == [[7, 8], [0, 0]]
    assert torch.equal(step.mask(), cache().step([1, 2], [7, 0], [2, 1]).mask())


@pytest.mark.parametrize(
    ("rows", "starts", "counts"),
    [
        ([0, 1, 2, 3], [2, 2, 2, 2], [3, 3, 3, 3]),
        ([1, 2], [0, 4], [3, 1]),
        ([3, 0], [2, 2], [2, 2]),
        ([2], [13], [3]),
        ([3, 1, 0], [0, 5, 14], [4, 2, 2]),
    ],
)
def test_update_writes_its_rows_and_nothing_else(rows, starts, counts):
    storage = cache()
    generator = torch.Generator().manual_seed(0)
    for tensor in (*storage.keys, *storage.values):
        if tensor is not None:
            tensor.copy_(torch.randn(tensor.shape, generator=generator))
    before = [None if t is None else t.clone() for t in storage.keys]
    step = storage.step(rows, starts, counts)
    for layer, shape in enumerate(SHAPES):
        if shape is None:
            continue
        heads, key_width, value_width = shape
        new = torch.randn(len(rows), heads, max(counts), key_width, generator=generator)
        values = torch.randn(len(rows), heads, max(counts), value_width, generator=generator)
        keys, got = step.update(new, values, layer)
        assert keys.shape == (len(rows), heads, step.high, key_width)
        assert got.shape == (len(rows), heads, step.high, value_width)
        expected = before[layer].clone()
        for b, (row, start, count) in enumerate(zip(rows, starts, counts, strict=True)):
            expected[row, :, start : start + count] = new[b, :, :count]
            assert torch.equal(got[b, :, start : start + count], values[b, :, :count])
        assert torch.equal(storage.keys[layer][:, :, :-1], expected[:, :, :-1]), "but for the trash slot"
        assert torch.equal(keys, expected[rows][:, :, : step.high])


def test_consecutive_rows_are_not_copied():
    storage = cache()
    keys, _ = storage.step([1, 2], [0, 3], [2, 1]).update(torch.ones(2, 2, 2, 4), torch.ones(2, 2, 2, 4), 0)
    assert keys.untyped_storage().data_ptr() == storage.keys[0].untyped_storage().data_ptr()


def test_gather_keeps_an_accepted_path():
    storage = cache()
    for tensor in (*storage.keys, *storage.values):
        if tensor is not None:
            tensor.copy_(torch.arange(17)[None, None, :, None].expand_as(tensor))
    storage.gather(2, 5, [0, 2, 3, 7])
    for tensor in (*storage.keys, *storage.values):
        if tensor is not None:
            assert tensor[2, 0, :, 0].tolist() == [0, 1, 2, 3, 4, 5, 7, 8, 12, *range(9, 17)]
            assert tensor[1, 0, :, 0].tolist() == list(range(17))


@pytest.mark.parametrize(
    ("rows", "starts", "counts", "parents"),
    [
        ([0], [10], [7], None),
        ([0, 0], [0, 0], [1, 1], None),
        ([4], [0], [1], None),
        ([-1], [0], [1], None),
        ([0], [-1], [1], None),
        ([0], [0], [0], None),
        ([], [], [], None),
        ([0, 1], [0], [1, 1], None),
        ([0], [0], [2], [[-1, 1]]),
        ([0], [0], [2], [[-1, -2]]),
    ],
)
def test_windows_that_cannot_be_are_refused(rows, starts, counts, parents):
    with pytest.raises(ValueError):
        cache().step(rows, starts, counts, parents)


@pytest.mark.parametrize(
    ("counts", "parents", "firsts"),
    [
        ([2], [[-1, 0]], [1]),
        ([1], [[-1, 1]], [1]),
        ([1], [[-1, -2]], [1]),
        ([1], None, [-1]),
        ([1], [[-1]], [0, 0]),
        ([1], None, [16]),
        ([1], [[0]], [0]),
    ],
)
def test_growth_that_cannot_be_is_refused(counts, parents, firsts):
    with pytest.raises(ValueError):
        cache().step([0], [0], counts, parents, firsts)


def test_the_last_slot_can_be_used():
    step = cache(capacity=16).step([0], [15], [1])
    assert step.mask().shape[-1] == 16


def test_bytes():
    storage = cache(num_rows=3, capacity=7)
    assert KVCache.bytes_per_token(SHAPES, torch.float32) == 4 * (2 * 8 + 9)
    assert KVCache.bytes_per_token(SHAPES, torch.bfloat16) == 2 * (2 * 8 + 9)
    assert storage.nbytes == 3 * (7 + 1) * KVCache.bytes_per_token(SHAPES, torch.float32)


def slow_attention(query, key, value, mask, scale, softcap=None, sinks=None):
    """transformers' eager attention in fp64."""
    query, key, value = query.double(), key.double(), value.double()
    shared = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(shared, 1), value.repeat_interleave(shared, 1)
    scores = query @ key.transpose(-1, -2) * scale
    if softcap:
        scores = torch.tanh(scores / softcap) * softcap
    scores = scores.masked_fill(~mask, float("-inf"))
    if sinks is not None:
        scores = torch.cat([scores, sinks.double()[None, :, None, None].expand(*scores.shape[:3], 1)], -1)
    weights = scores.softmax(-1)[..., : value.shape[2]]
    return (weights @ value).transpose(1, 2)


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("block", [MAX_SCORE_BYTES, 3000])
def test_attention_equals_the_definition(softcap, sinks, block, monkeypatch):
    monkeypatch.setattr("aspec.models.attention.MAX_SCORE_BYTES", block)
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(2, 6, 7, 8, generator=generator)
    key, value = torch.randn(2, 2, 11, 8, generator=generator), torch.randn(2, 2, 11, 5, generator=generator)
    mask = torch.rand(2, 1, 7, 11, generator=generator) > 0.4
    mask[..., 0] = True
    extra = torch.randn(6, generator=generator) if sinks else None
    got, _ = attend(None, query, key, value, mask, scaling=0.4, softcap=softcap, s_aux=extra)
    torch.testing.assert_close(
        got.double(), slow_attention(query, key, value, mask, 0.4, softcap, extra), rtol=0, atol=2e-6
    )


def test_attention_holds_a_bounded_block():
    assert temporary_bytes(1, 32, 16, 256) == 3 * 16 * 32 * 256 * 4
    assert temporary_bytes(4, 32, 512, 4096) == 3 * 4 * 32 * 4096 * 4, "one token at a time"
    assert temporary_bytes(64, 64, 1, 1 << 16) == 3 * 64 * 64 * (1 << 16) * 4, "one token's scores are never split"


STEPS = {  # rows, start of the first, tokens of each, parents
    "decode": (1, 1400, 1, None),
    "tree": (1, 1400, 32, [-1] + [0] * 31),
    "prompt": (1, 1000, 400, None),
    "rows": (8, 1400, 1, None),
    "short rows": (8, 100, 3, None),
}


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("name", STEPS)
@pytest.mark.parametrize(
    ("heads", "groups", "width", "dtype"), [(9, 3, 64, torch.bfloat16), (16, 1, 64, torch.float32)]
)
def test_exact_attention_holds_no_more_than_is_told(heads, groups, width, dtype, name, softcap):
    rows, start, tokens, parents = STEPS[name]
    storage = KVCache([(groups, width, width)], rows, 1500, dtype, exact=True)
    trees = parents and [parents] * rows
    step = storage.step(list(range(rows)), [start + 9 * row for row in range(rows)], [tokens] * rows, trees)
    query, out = torch.zeros(rows, heads, tokens, width, dtype=dtype), torch.empty(rows, tokens, heads, width).to(dtype)
    arguments = (None, query, *step.stored(0), step.seen(MaskKind()))
    attend(*arguments, softcap=softcap, out=out)  # what is proven and kept once does not count
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        attend(*arguments, softcap=softcap, out=out)
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = itertools.accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns()))
    slot = 2 * groups * width * dtype.itemsize
    told = temporary_bytes_exact(
        rows, heads, rows * tokens, 1500, slot, width * dtype.itemsize, tokens if parents else 0
    )
    assert max(held, default=0) <= told
    assert told <= 4 * MAX_GROUP_BYTES + 1500 * slot, "whatever the step"

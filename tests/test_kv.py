"""The slot cache: ragged rows, masks, padding."""

import pytest
import torch

from aspec.attention import attend
from aspec.kv import KVCache, MaskKind

SHAPES = [(2, 4, 6), None, (1, 4, 4)]


def cache(capacity=16, rows=4):
    return KVCache(SHAPES, rows, capacity, torch.float32)


def test_bytes_per_token_counts_what_is_stored():
    made = cache()
    stored = sum(t.numel() * t.element_size() for t in (*made.keys, *made.values) if t is not None)
    assert KVCache.bytes_per_token(SHAPES, torch.float32) * 4 * 17 == stored


@pytest.mark.parametrize("rows", [[0, 1], [1, 3], [2], [3, 0]])
def test_ragged_rows_store_and_read_their_own_tokens(rows):
    made = cache()
    starts = [3, 0][: len(rows)]
    counts = [2, 5][: len(rows)]
    step = made.step(rows, starts, counts)
    width = max(counts)
    keys = torch.arange(len(rows) * 2 * width * 4.0).view(len(rows), 2, width, 4) + 1
    values = torch.arange(len(rows) * 2 * width * 6.0).view(len(rows), 2, width, 6) + 1
    seen_keys, seen_values = step.layers[0].update(keys, values)
    assert seen_keys.shape[2] == seen_values.shape[2] == step.high
    for i, (row, start, count) in enumerate(zip(rows, starts, counts, strict=True)):
        assert torch.equal(made.keys[0][row, :, start : start + count], keys[i, :, :count])
        assert torch.equal(seen_values[i, :, start : start + count], values[i, :, :count])
        rest = torch.ones(17, dtype=torch.bool)
        rest[start : start + count] = False
        rest[16] = False  # the trash slot
        assert not made.keys[0][row][:, rest].any(), "padding went nowhere else"


def test_masks_are_causal_windowed_and_chunked():
    step = cache().step([0, 1], [5, 0], [3, 2])
    full, window, chunk = (step.mask(kind) for kind in (MaskKind(), MaskKind(window=3), MaskKind(chunk=4)))
    assert full.shape == (2, 1, 3, 8)
    for row, start, count in ((0, 5, 3), (1, 0, 2)):
        for i in range(count):
            position = start + i
            wanted = torch.arange(8) <= position
            assert torch.equal(full[row, 0, i], wanted)
            assert torch.equal(window[row, 0, i], wanted & (torch.arange(8) > position - 3))
            assert torch.equal(chunk[row, 0, i], wanted & (torch.arange(8) // 4 == position // 4))
    assert all(mask.any(-1).all() for mask in (full, window, chunk)), "no query is left without a key"


def test_a_row_beyond_the_capacity_is_refused():
    with pytest.raises(ValueError, match="capacity"):
        cache(capacity=8).step([0], [6], [3])


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("sinks", [False, True])
def test_attention_equals_a_plain_loop(softcap, sinks):
    torch.manual_seed(0)
    query, key, value = torch.randn(2, 4, 3, 8), torch.randn(2, 2, 7, 8), torch.randn(2, 2, 7, 5)
    mask = torch.rand(2, 1, 3, 7) > 0.4
    mask[..., 0] = True
    sink = torch.randn(4) if sinks else None
    got, _ = attend(torch.nn.Module(), query, key, value, mask, softcap=softcap, s_aux=sink)
    for b in range(2):
        for h in range(4):
            for t in range(3):
                score = key[b, h // 2] @ query[b, h, t] * 8**-0.5
                score = softcap * torch.tanh(score / softcap) if softcap else score
                score = score.masked_fill(~mask[b, 0, t], float("-inf"))
                weights = torch.cat([score, sink[h : h + 1]]).softmax(0)[:-1] if sinks else score.softmax(0)
                assert torch.allclose(got[b, t, h], weights @ value[b, h // 2], atol=1e-5)

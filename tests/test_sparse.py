"""Layers that select the slots that they attend to (DeepSeek Sparse Attention), and the keys of their indexers."""

import pytest
import torch

from aspec.errors import UnsupportedModelError, UserError
from aspec.models.attention import attend
from aspec.models.hf_compat import auto_class
from aspec.models.kv_cache import KVCache
from aspec.models.model import Model
from aspec.models.probing.layers import examine
from tools import families, family_configs

PROMPTS = [list(range(3, 3 + count)) for count in (20, 37, 11)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checkpoint whose layers select 8 of up to 53 slots."""
    path = tmp_path_factory.mktemp("sparse") / "target"
    config = family_configs.tiny_config("deepseek_v32")
    assert config.index_topk == 8
    families.build(auto_class(config), config, path)
    return path


@pytest.mark.slow
@pytest.mark.parametrize("name", ["deepseek_v32", "axk2", "dots3_note_text", "glm_moe_dsa:shared", "hy_v4"])
def test_tokens_without_a_draft_with_chains_and_with_trees_equal_transformers(tmp_path, name):
    assert families.outcome(name, tmp_path)[0] == "equal"


def test_the_keys_of_indexers_are_kept_beside_keys_and_values(folder):
    model = Model(folder)
    layers, indexes = model.kv_shapes()[: model.num_layers], model.kv_shapes()[model.num_layers :]
    assert indexes == [(1, 16, 0)] * model.num_layers
    assert all(layers)
    own, all_of_it = (KVCache.bytes_per_token(shapes, torch.float32) for shapes in (layers, model.kv_shapes()))
    assert all_of_it - own == model.num_layers * 16 * 4


def test_a_selection_goes_to_the_next_layer_and_rows_come_first():
    """In GLM-5 a layer may select as the one before it; in Hy4 a hidden state is [B, T, streams, H]."""
    glm, hy = (examine(family_configs.tiny_config(name), torch.float32) for name in ("glm_moe_dsa:shared", "hy_v4"))
    assert [layer.taken for layer in glm.layers] == [None, *["prev_topk_indices"] * 3]
    assert [layer.index_width for layer in glm.layers] == [16, 0, 16, 0]
    assert hy.rows_first
    assert hy.width == 4 * 64, "of all streams"
    assert glm.width == 64
    assert not examine(family_configs.tiny_config("gemma3n_text"), torch.float32).rows_first  # [streams, B, T, H]


def test_an_accepted_path_moves_the_keys_of_indexers(folder):
    cache = KVCache(Model(folder).kv_shapes(), 2, 12, torch.float32)
    keys = torch.randn(1, 5, 16)
    for layer in range(4):
        step = cache.step([1], [3], [5], [[-1, 0, 0, 1, 2]])
        found = step.update_indexer(keys, layer)
        assert torch.equal(found[0, 3:8], keys[0])
    cache.gather(1, 3, [0, 2, 4])
    kept = cache.step([1], [6], [1]).update_indexer(keys[:, :1], 2)
    assert torch.equal(kept[0, 3:6], keys[0, [0, 2, 4]])


def test_attention_sees_the_selected_slots_and_no_hidden_one():
    query, key, value = torch.randn(3, 1, 2, 5, 8).unbind()
    mask = torch.ones(5, 5, dtype=torch.bool).tril()[None, None]
    indices = torch.tensor([[[0, 4], [1, 2], [0, 2], [3, 1], [4, 0]]])
    chosen = torch.zeros(5, 5, dtype=torch.bool)
    for query_at, slots in enumerate(indices[0].tolist()):
        chosen[query_at, slots] = True
    found = attend(None, query, key, value, mask, indices=indices.int())[0]
    assert torch.equal(found, attend(None, query, key, value, mask & chosen)[0])


def test_halves_of_a_layer_give_the_same_tokens(folder):
    whole, _ = families.run(folder, None, "off", PROMPTS, None)
    halves, _ = families.run(folder, None, "off", PROMPTS, None, attention="cpu")
    assert halves == whole


def test_exact_passes_are_refused_where_they_are_asked_for(folder):
    with pytest.raises(UserError, match=r"has no exact passes.*Leave out --exact"):
        families.run(folder, None, "off", PROMPTS, None, exact=True)


def test_the_host_has_no_indexer(folder):
    with pytest.raises(UnsupportedModelError, match=r"where their indexer is.*--attention device"):
        Model(folder).kv_shapes(offloaded=True)

"""Layers that attend by code of their own: it adds the mask, and a bias of positions, to the scores."""

import pytest
import torch

from aspec.errors import UnsupportedModelError, UserError
from aspec.models.attention import temporary_bytes
from aspec.models.exact.paths import MaskKind
from aspec.models.hf_compat import auto_class
from aspec.models.kv_cache import KVCache
from aspec.models.model import Model
from aspec.models.probing.layers import examine
from aspec.models.skeleton import build_skeleton
from aspec.planning.footprint import own_attention_bytes
from tests import tiny
from tests.peak import Peak
from tools import families, family_configs

TYPES = ["bloom", "falcon", "gpt_neo", "gpt_neox_japanese", "megatron-bert", "rembert", "xglm"]
PROMPTS = [list(range(3, 3 + count)) for count in (20, 37, 11)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("own") / "target"
    config = family_configs.tiny_config("bloom")
    families.build(auto_class(config), config, path)
    return path


@pytest.mark.slow
@pytest.mark.parametrize("name", [*TYPES, "falcon:alibi", "falcon:new"])
def test_tokens_without_a_draft_with_chains_and_with_trees_equal_transformers(tmp_path, name):
    assert families.outcome(name, tmp_path)[0] == "equal"


def test_the_probe_sees_masks_biases_and_windows():
    bloom, neo = (examine(family_configs.tiny_config(name), torch.float32) for name in ("bloom", "gpt_neo"))
    assert bloom.own_attention
    assert bloom.biased
    assert not neo.biased
    assert {layer.mask_argument for layer in (*bloom.layers, *neo.layers)} == {"attention_mask"}
    assert {layer.mask for layer in neo.layers} == {MaskKind(), MaskKind(window=8)}


def test_a_mask_that_a_layer_holds_itself_hides_nothing():
    config = family_configs.tiny_config("gpt_neo")
    masks = [
        own
        for name, own in build_skeleton(config, torch.float32, torch.device("cpu")).named_buffers()
        if ".bias" in name
    ]
    assert masks
    for mask in masks:
        seen = mask[:, :, 5000 - 7 : 5000, :5000]
        assert seen.shape == (1, 1, 7, 5000)
        assert seen.all()
        assert mask.untyped_storage().nbytes() == 1


def test_a_node_has_the_bias_of_its_position_in_whatever_slot_it_is():
    cache = KVCache([(2, 4, 4)], 2, 20, torch.float32)
    slopes = torch.tensor([0.5, 0.25])
    by_slot = (slopes[:, None, None] * torch.arange(20)).repeat(2, 1, 1)
    assert cache.step([0, 1], [3, 5], [1, 1]).biased(by_slot[..., :6]).shape == (4, 1, 6)
    step = cache.step([0, 1], [3, 5], [5, 2], [[-1, 0, 0, 1, 2], [-1, -1]])
    found = step.biased(by_slot[..., : step.high])
    assert torch.equal(found[0, 0, :8] / slopes[0], torch.tensor([0.0, 1, 2, 3, 4, 4, 5, 5]))
    assert torch.equal(step.biased(by_slot[..., : step.high].view(2, 2, 1, -1)).view(found.shape), found)
    assert torch.equal(found[3, 0, :7] / slopes[1], torch.tensor([0.0, 1, 2, 3, 4, 5, 5]))


def test_an_added_mask_is_the_mask():
    step = KVCache([(2, 4, 4)], 1, 20, torch.bfloat16).step([0], [3], [3], [[-1, -1, 0]])
    for kind in (MaskKind(), MaskKind(window=3)):
        added = step.added_mask(kind)
        assert added.dtype == torch.bfloat16
        assert torch.equal(added == 0, step.mask(kind))
        assert torch.equal(added == torch.finfo(torch.bfloat16).min, ~step.mask(kind))


@pytest.mark.parametrize("name", ["bloom", "falcon", "gpt_neo"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_layer_holds_no_more_than_is_told(tmp_path, name, dtype):
    config = family_configs.tiny_config(name)
    config.save_pretrained(tmp_path)
    families.build(auto_class(config), config, tmp_path)
    model, tokens, slots, held = Model(tmp_path, dtype=dtype), 96, 250, []
    for part in model.parts(1 << 30):
        held.append((tiny.read_part(part), torch.empty(part.scratch_bytes, dtype=torch.uint8)))
        model.bind(part, *held[-1])
    step = KVCache(model.kv_shapes(), 1, slots, dtype).step([0], [slots - tokens], [tokens])
    with torch.inference_mode():
        activation = model.embed(torch.ones(1, tokens, dtype=torch.long), step)
        with Peak() as peak:
            model.layer(0, activation)
    told = own_attention_bytes(model, tokens, slots)
    rest = tokens * 8 * 64 * 4  # hidden states of a layer
    assert peak.nbytes <= told + rest
    assert told < 4 * peak.nbytes
    assert told > temporary_bytes(1, 4, tokens, slots)


def test_exact_passes_and_attention_apart_are_refused(folder):
    with pytest.raises(UserError, match=r"has no exact passes: its layers attend by code of their own.*Leave out"):
        families.run(folder, None, "off", PROMPTS, None, exact=True)
    with pytest.raises(UnsupportedModelError, match=r"by code of their own.*--attention device"):
        Model(folder).kv_shapes(offloaded=True)

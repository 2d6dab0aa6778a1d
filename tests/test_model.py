"""The generic driver against transformers, family by family; and what it refuses."""

import json

import pytest
import torch

from aspec.errors import CheckpointError, UnsupportedModelError
from aspec.kv import KVCache
from aspec.model import Model
from tests import tiny

TOLERANCE = 3e-5  # logits have a standard deviation of 0.3 to 4


def scratch(part):
    return torch.zeros(part.scratch_bytes, dtype=torch.uint8)


class Driven:
    """A model whose parts are read into poisoned buffers just before each layer."""

    def __init__(self, folder, dtype=None, most=20_000):
        self.model = Model(folder, dtype=dtype)
        self.parts = self.model.plan(most)
        for part in self.parts:
            if part.layer < 0:
                self.model.bind(part, tiny.read_part(part, fill=255), scratch(part))

    def layer(self, index, *activations):
        held = []
        for part in self.parts:
            if part.layer == index:
                held.append((tiny.read_part(part, fill=255), scratch(part)))
                self.model.bind(part, *held[-1])
        for activation in activations:
            self.model.layer(index, activation)
        for buffer, converted in held:
            buffer.fill_(255)
            converted.fill_(255)

    def run(self, ids, step):
        activation = self.model.embed(ids, step)
        for index in range(self.model.num_layers):
            self.layer(index, activation)
        return activation


def pad(rows):
    width = max(map(len, rows))
    return torch.tensor([row + [0] * (width - len(row)) for row in rows])


def compare(folder, dtype=None, steps=(0, 1, 5)):
    """The largest difference of ragged prefill, one token and a block from transformers on each row alone."""
    driven, reference = Driven(folder, dtype), tiny.reference(folder, dtype)
    model = driven.model
    cache = KVCache(model.kv_shapes(), 3, 64, model.dtype)
    generator = torch.Generator().manual_seed(1)
    rows = [torch.randint(3, 256, (n,), generator=generator).tolist() for n in (21, 13)]
    worst = 0.0
    with torch.inference_mode():
        for new in steps:
            for row in rows:
                row += torch.randint(3, 256, (new,), generator=generator).tolist()
            starts = [0, 0] if not new else [len(row) - new for row in rows]
            counts = [len(row) - start for row, start in zip(rows, starts, strict=True)]
            ids = pad([row[start:] for row, start in zip(rows, starts, strict=True)])
            logits = model.head(driven.run(ids, cache.step([0, 2], starts, counts)))
            for row, start, count, mine in zip(rows, starts, counts, logits, strict=True):
                theirs = reference(torch.tensor([row])).logits[0, start:]
                worst = max(worst, (theirs - mine[:count]).abs().max().item())
    return worst


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_logits_equal_transformers(tmp_path, family):
    assert compare(tiny.build(tmp_path, family)) < TOLERANCE


@pytest.mark.parametrize("family", ["llama", "gpt_oss", "deepseek_v3", "mixtral"])
def test_logits_in_bf16_are_close(tmp_path, family):
    """deepseek_v3 and gpt_oss keep some parameters in fp32: they are converted into the scratch buffer."""
    assert compare(tiny.build(tmp_path, family, dtype=torch.bfloat16)) < 0.15


def test_a_stored_fp32_checkpoint_runs_in_bf16_and_the_other_way_round(tmp_path):
    stored = tiny.build(tmp_path / "fp32", "mixtral")
    assert compare(stored, torch.bfloat16) < 0.15
    assert compare(tiny.build(tmp_path / "bf16", "mixtral", dtype=torch.bfloat16), torch.float32) < TOLERANCE


def test_two_items_interleave_and_kept_columns_are_the_same_logits(tmp_path):
    driven = Driven(tiny.build(tmp_path, "gemma3"))
    model = driven.model
    cache = KVCache(model.kv_shapes(), 2, 64, model.dtype)
    rows = [list(range(10, 40)), list(range(100, 112))]
    with torch.inference_mode():
        ids = [torch.tensor([row]) for row in rows]
        steps = [cache.step([i], [0], [len(row)]) for i, row in enumerate(rows)]
        alone = [model.head(driven.run(*pair)) for pair in zip(ids, steps, strict=True)]
        both = [model.embed(*pair) for pair in zip(ids, steps, strict=True)]
        for index in range(model.num_layers):
            driven.layer(index, *both)
        for activation, logits in zip(both, alone, strict=True):
            assert torch.equal(model.head(activation), logits)
            last = torch.tensor([[logits.shape[1] - 1, 0]])
            assert torch.allclose(model.head(activation, last), logits[:, [-1, 0]], atol=1e-5)


def test_a_layer_without_its_weights_fails_loudly(tmp_path):
    driven = Driven(tiny.build(tmp_path, "llama"))
    cache = KVCache(driven.model.kv_shapes(), 1, 8, driven.model.dtype)
    with torch.inference_mode():
        activation = driven.model.embed(torch.tensor([[1, 2]]), cache.step([0], [0], [2]))
        with pytest.raises((RuntimeError, NotImplementedError)):
            driven.model.layer(0, activation)


@pytest.mark.parametrize("kind", tiny.REFUSED)
def test_what_the_driver_cannot_take_is_refused_by_name(tmp_path, kind):
    config = tiny.REFUSED[kind]()
    config.save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModelError, match="not supported") as caught:
        Model(tmp_path)
    assert "\n" not in str(caught.value)
    assert config.model_type in str(caught.value)


def test_a_quantised_checkpoint_is_refused(tmp_path):
    tiny.edit_config(tiny.build(tmp_path, "llama"), quantization_config={"quant_method": "gptq", "bits": 4})
    with pytest.raises(UnsupportedModelError, match="quantised"):
        Model(tmp_path)


def test_unknown_and_damaged_configs_are_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        Model(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "from_the_future"}))
    with pytest.raises(UnsupportedModelError, match="not known"):
        Model(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises((UnsupportedModelError, CheckpointError)):
        Model(tmp_path)


def test_rebinding_is_cheap_and_sees_new_bytes(tmp_path):
    driven = Driven(tiny.build(tmp_path, "llama"))
    part = next(p for p in driven.parts if p.layer == 0)
    buffer = tiny.read_part(part)
    driven.model.bind(part, buffer)
    first = driven.model._assignments[(part.index, buffer.data_ptr())]
    driven.model.bind(part, buffer)
    assert driven.model._assignments[(part.index, buffer.data_ptr())] is first
    assert all(tensor.untyped_storage().data_ptr() == buffer.data_ptr() for _, _, tensor in first)

"""Every family, streamed part by part, computes what transformers computes; what cannot be run is refused."""

import copy
import dataclasses
import json

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from aspec.errors import CheckpointError, InternalError, UnsupportedModelError, UserError
from aspec.models.configuration.generation_defaults import generation_defaults
from aspec.models.kv_cache import KVCache
from aspec.models.model import Model
from aspec.models.weights import layout
from tests import tiny

TOLERANCE = 2e-5  # of fp32 logits
WIDER = {"gemma3n_text": 5e-5}  # its logits have a deviation of 4, its layers four streams
PROMPTS, STEPS = (17, 29), ((17, 29), (1, 1), (5, 5))  # longer than the window of 8 and the chunk of 16
SCALE = {"llama_tied": 8.0, "gemma4_text": 8.0}  # logits of tied heads are that much larger
CAST = ("llama", "llama_tied", "mixtral", "gpt_oss", "deepseek_v3", "gemma4_text")


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Builds a family's checkpoint once."""
    root, built = tmp_path_factory.mktemp("tiny"), {}

    def get(family, **kwargs):
        key = (family, *kwargs.items())
        if key not in built:
            built[key] = tiny.build(root / str(len(built)), family, **kwargs)
        return built[key]

    return get


def sequences(seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, tiny.VOCAB, (n + 6,), generator=generator) for n in PROMPTS]


def differences(path, dtype=torch.float32, streamed=None):
    """Per position the largest difference to transformers' logits, over a ragged prefill, a step and a block."""
    reference = tiny.reference(path, dtype)
    streamed = streamed or tiny.Streamed(Model(path, dtype=dtype))
    model = streamed.model
    cache = KVCache(model.kv_shapes(), 3, 64, model.dtype)
    tokens, at, found = sequences(), [0, 0], []
    with torch.inference_mode():
        expected = [reference(input_ids=row[None]).logits[0] for row in tokens]
    for counts in STEPS:
        ids = tiny.pad([row[a : a + n].tolist() for row, a, n in zip(tokens, at, counts, strict=True)])
        (logits,) = streamed.run((ids, cache.step([2, 0], at, counts)))
        for row, (a, n) in enumerate(zip(at, counts, strict=True)):
            found.append((logits[row, :n] - expected[row][a : a + n]).abs().amax(-1))
        at = [a + n for a, n in zip(at, counts, strict=True)]
    return torch.cat(found)


@pytest.mark.compat
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_family_equals_transformers(folder, family, record_property):
    path = folder(family)
    streamed = tiny.Streamed(Model(path))
    worst = float(differences(path, streamed=streamed).max())
    record_property("worst", worst)
    assert worst <= WIDER.get(family, TOLERANCE)
    assert max(len(streamed.of(layer)) for layer in range(streamed.model.num_layers)) > 1
    assert not streamed.model.unexpected
    assert not any(part.conversions for part in streamed.parts), "fp32 stored as fp32 needs no conversion"


@pytest.mark.parametrize("family", CAST)
def test_bf16_is_close_to_transformers(folder, family):
    """Stored in bf16: views; stored in fp32: cast into scratch that the layer's parts share without overlap.

    A near tie of two experts may fall either way in bf16, in transformers' own two implementations too, so the odd
    position is far off.
    """
    streamed = tiny.Streamed(Model(folder(family), dtype=torch.bfloat16))
    assert all(part.conversions for part in streamed.parts)
    for found in (
        differences(folder(family, dtype=torch.bfloat16), torch.bfloat16),
        differences(folder(family), torch.bfloat16, streamed),
    ):
        assert found.median() <= 0.05 * SCALE.get(family, 1.0)
        assert (found > 0.2 * SCALE.get(family, 1.0)).sum() <= len(found) // 10


@pytest.mark.compat
@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_generic_conversion_equals_the_direct_one(folder, family, dtype, monkeypatch):
    tokens = sequences()[0][None]
    logits = []
    for direct in (True, False):
        if not direct:
            monkeypatch.setattr(layout, "_fused_places", lambda entry: None)
        streamed = tiny.Streamed(Model(folder(family), dtype=dtype))
        cache = KVCache(streamed.model.kv_shapes(), 1, 64, dtype)
        logits += streamed.run((tokens, cache.step([0], [0], [tokens.shape[1]])))
    assert any(c.converter for part in streamed.parts for c in part.conversions)
    torch.testing.assert_close(*logits, rtol=0, atol=2e-6 if dtype == torch.float32 else 0.02)


def test_binding_copies_no_converter_and_makes_the_same_every_time(folder, monkeypatch):
    """A part that streams is bound once a pass: its converter is its own from the plan on."""
    monkeypatch.setattr(layout, "_fused_places", lambda entry: None)
    streamed = tiny.Streamed(Model(folder("mixtral"), dtype=torch.float32))
    converters = [c.converter for part in streamed.parts for c in part.conversions if c.converter]
    assert len(converters) > 1
    assert len({id(converter) for converter in converters}) == len(converters), "no two parts share one"
    copies = []
    monkeypatch.setattr(copy, "deepcopy", lambda value, memo=None: copies.append(value))
    tokens, made = sequences()[0][None], []
    for _ in range(3):
        cache = KVCache(streamed.model.kv_shapes(), 1, 64, torch.float32)
        made += streamed.run((tokens, cache.step([0], [0], [tokens.shape[1]])))
    assert not copies
    assert all(torch.equal(made[0], other) for other in made[1:])
    assert not any(converter.collected_tensors for converter in converters), "none holds a tensor between binds"


@pytest.mark.parametrize("family", ["mistral", "gemma3", "gpt2", "gemma3n_text", "qwen3_moe"])
def test_interleaved_items_do_not_disturb_each_other(folder, family):
    """A decode item and a prefill chunk go through each layer in turn and give what each gives alone."""
    streamed = tiny.Streamed(Model(folder(family)))
    model, (first, second) = streamed.model, sequences()

    def items(cache):
        return [
            (first[None, 12:14], cache.step([1], [12], [2])),
            (tiny.pad([second[:20].tolist(), second[:9].tolist()]), cache.step([0, 2], [0, 0], [20, 9])),
        ]

    def fresh():
        cache = KVCache(model.kv_shapes(), 3, 32, model.dtype)
        streamed.run((first[None, :12], cache.step([1], [0], [12])))
        return items(cache)

    together = streamed.run(*fresh())
    alone = [streamed.run(item)[0] for item in fresh()]
    for one, other in zip(together, alone, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("family", ["llama", "gemma2", "gemma3n_text"])
def test_head_at_kept_columns(folder, family):
    streamed = tiny.Streamed(Model(folder(family)))
    model = streamed.model
    ids = sequences()[1][None, :12].repeat(2, 1)
    cache = KVCache(model.kv_shapes(), 2, 32, model.dtype)
    with torch.inference_mode():
        activation = model.embed(ids, cache.step([0, 1], [0, 0], [12, 12]))
        for layer in range(model.num_layers):
            streamed.load(layer)
            model.layer(layer, activation)
        whole, kept = model.head(activation), model.head(activation, torch.tensor([[11, 3], [0, 5]]))
    expected = torch.stack([whole[0, [11, 3]], whole[1, [0, 5]]])
    torch.testing.assert_close(kept, expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("family", ["mistral", "gemma2", "deepseek_v2", "gpt_oss", "phi3"])
def test_tree_equals_its_paths(folder, family):
    """Every node of a tree pass gets the logits of its root path alone, and an accepted path continues as a chain."""
    streamed = tiny.Streamed(Model(folder(family)))
    model, prompt = streamed.model, sequences()[0][:14].tolist()
    parents, nodes = [-1, 0, 0, 1, 2, 2, 4, -1], [9, 30, 31, 32, 33, 34, 35, 10]
    cache = KVCache(model.kv_shapes(), 2, 64, model.dtype)

    def logits_of(tokens):
        alone = KVCache(model.kv_shapes(), 1, 64, model.dtype)
        return streamed.run((torch.tensor([tokens]), alone.step([0], [0], [len(tokens)])))[0][0]

    def path_to(node):
        return [] if node < 0 else [*path_to(parents[node]), node]

    streamed.run((tiny.pad([prompt, prompt[:5]]), cache.step([0, 1], [0, 0], [14, 5])))
    step = cache.step([0, 1], [14, 5], [8, 2], parents=[parents, [-1, 0]])
    (tree,) = streamed.run((tiny.pad([nodes, [7, 8]]), step))
    for node in range(len(nodes)):
        expected = logits_of(prompt + [nodes[n] for n in path_to(node)])[-1]
        torch.testing.assert_close(tree[0, node], expected, rtol=0, atol=TOLERANCE)
    torch.testing.assert_close(tree[1, 1], logits_of([*prompt[:5], 7, 8])[-1], rtol=0, atol=TOLERANCE)
    path = path_to(6)
    cache.gather(0, 14, path)
    (after,) = streamed.run((torch.tensor([[50]]), cache.step([0], [14 + len(path)], [1])))
    expected = logits_of([*prompt, *(nodes[n] for n in path), 50])[-1]
    torch.testing.assert_close(after[0, 0], expected, rtol=0, atol=TOLERANCE)


def test_a_layer_without_weights_fails_loudly(folder):
    streamed = tiny.Streamed(Model(folder("llama")))
    model = streamed.model
    cache = KVCache(model.kv_shapes(), 1, 8, model.dtype)
    with torch.inference_mode():
        activation = model.embed(torch.tensor([[5, 6]]), cache.step([0], [0], [2]))
        streamed.load(0)
        model.layer(0, activation)
        model.unbind(streamed.of(0)[0])
        with pytest.raises(InternalError, match="layer 0 runs while its weight is not bound"):
            model.layer(0, activation)
        model.forget(streamed.parts)
        with pytest.raises((InternalError, RuntimeError, NotImplementedError)):
            model.head(activation)


def test_scratch_and_buffers_that_are_too_small_are_refused(folder):
    model = Model(folder("llama"), dtype=torch.bfloat16)
    part = model.parts(1 << 20)[1]
    buffer = tiny.read_part(part)
    with pytest.raises(InternalError, match="scratch, was given none"):
        model.bind(part, buffer)
    with pytest.raises(InternalError, match="needs a scratch of"):
        model.bind(part, buffer, torch.empty(8, dtype=torch.uint8))
    with pytest.raises(InternalError, match="needs a buffer of"):
        model.bind(dataclasses.replace(part), torch.empty(part.size - 1, dtype=torch.uint8))


@pytest.mark.compat
def test_what_a_model_says_of_itself(folder):
    model = Model(folder("phi3_longrope"))
    assert (model.num_layers, model.vocab_size, model.end_ids) == (4, tiny.VOCAB, frozenset({2}))
    assert model.max_context == 128, "longrope changes its angles beyond the original length"
    assert model.kv_shapes() == [(2, 16, 16)] * 4
    shared = Model(folder("gemma3n_text")).kv_shapes()
    assert shared[:4] == [(2, 16, 16)] * 4
    assert shared[4:] == [None, None]


@pytest.mark.parametrize("stored", ["both", "target", "source"])
def test_tied_weights_are_found_on_either_side(folder, tmp_path, stored):
    """The head, the embedding or both may be stored; all give the same logits."""
    source = folder("llama_tied", shards=1)
    for name in ("config.json", "generation_config.json"):
        (tmp_path / name).write_text((source / name).read_text())
    tensors = load_file(source / "model.safetensors")
    if stored != "source":
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    if stored == "target":
        del tensors["model.embed_tokens.weight"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert differences(source, streamed=tiny.Streamed(Model(tmp_path))).max() <= TOLERANCE


def change(path, edit, into):
    """A copy of a single-shard checkpoint whose tensors ``edit`` has changed."""
    (into / "config.json").write_text((path / "config.json").read_text())
    tensors = load_file(path / "model.safetensors")
    edit(tensors)
    save_file(tensors, into / "model.safetensors", metadata={"format": "pt"})
    return into


@pytest.mark.parametrize(
    ("family", "edit", "message"),
    [
        ("llama", lambda t: t.pop("model.layers.2.mlp.up_proj.weight"), "1 of the 39 tensors .* not stored"),
        ("llama", lambda t: t.update({"lm_head.weight": torch.zeros(9, 64)}), "lm_head.weight does not fit"),
        ("llama", lambda t: t.update({"model.norm.weight": torch.zeros(64, dtype=torch.int8)}), "stored as torch.int8"),
        ("llama", lambda t: t.update({"norm.weight": torch.zeros(64)}), "2 stored tensors map to"),
        ("mixtral", lambda t: t.pop("model.layers.1.block_sparse_moe.experts.3.w1.weight"), "cannot be combined"),
        ("mixtral", lambda t: t.pop("model.layers.1.block_sparse_moe.experts.3.w2.weight"), "does not fit"),
    ],
)
def test_weights_that_are_not_the_models_are_refused(folder, tmp_path, family, edit, message):
    with pytest.raises(CheckpointError, match=message):
        Model(change(folder(family, shards=1), edit, tmp_path))


def test_weights_without_a_use_are_told(folder, tmp_path):
    extra = {"model.rotary_emb.inv_freq": torch.zeros(8), "model.extra.weight": torch.zeros(8)}
    assert Model(change(folder("llama", shards=1), lambda t: t.update(extra), tmp_path)).unexpected == (
        "model.extra.weight",
    )


def is_a_paragraph(error):
    text = str(error.value)
    return "\n" not in text and text.endswith(".") and ".." not in text.replace("...", "") and len(text) < 600


@pytest.mark.compat
@pytest.mark.parametrize("family", tiny.REFUSED)
def test_what_cannot_be_run_is_refused_by_name(tmp_path, family):
    config = tiny.REFUSED[family]()
    config.save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModelError, match=f"{config.model_type} is not supported") as error:
        Model(tmp_path)
    assert is_a_paragraph(error)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"quantization_config": {"quant_method": "aqlm", "in_group_size": 8}},
            "the weights are quantised with AQLM",
        ),
        ({"model_type": "nonesuch", "auto_map": {"AutoConfig": "code.Config"}}, "brings its own code"),
        ({"model_type": "nonesuch"}, "not known to the installed transformers"),
        ({"rope_parameters": {"rope_type": "sideways", "rope_theta": 1e4}}, "sideways"),
        ({"num_hidden_layers": 0}, "no decoder layers|expected a list of 0"),
        ({"hidden_act": "sideways"}, "cannot build"),
        ({"alibi": [1]}, "alibi"),
    ],
)
def test_configurations_that_are_refused(folder, tmp_path, changes, message):
    config = json.loads((folder("llama") / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | changes))
    with pytest.raises(UnsupportedModelError, match=message) as error:
        Model(tmp_path)
    assert is_a_paragraph(error)


@pytest.mark.parametrize(
    "text", [None, "", "[]", "{}", '{"model_type": null}', "{not json", '{"model_type": "llama", "hidden_size": "x"}']
)
def test_a_config_that_is_none(tmp_path, text):
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(UserError) as error:
        Model(tmp_path)
    assert is_a_paragraph(error)


@pytest.mark.parametrize("text", ["{", "[]"])
def test_damaged_generation_defaults(tmp_path, text):
    (tmp_path / "generation_config.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"generation_config\.json") as error:
        generation_defaults(tmp_path)
    assert is_a_paragraph(error)


HARMLESS = [
    ("gpt2", {"pad_token_id": 0}),
    ("gpt2", {"pad_token_id": 50256}),  # beyond the embedding
    ("llama", {"pad_token_id": tiny.VOCAB}),
    ("gpt_neox", {"pad_token_id": 0}),
    ("opt", {"pad_token_id": 1}),
    ("mixtral", {"output_router_logits": True}),
    ("llama", {"output_attentions": True, "output_hidden_states": True}),
    ("llama", {"return_dict": False}),
    ("llama", {"use_cache": False}),
    ("llama", {"torchscript": True}),
    ("llama", {"attn_implementation": "flash_attention_2"}),
    ("gpt2", {"reorder_and_upcast_attn": True, "attn_pdrop": 0.5}),
    ("gemma3", {"use_bidirectional_attention": False}),
    ("llama", {"quantization_config": None, "rope_scaling": None, "architectures": ["SomethingElse"]}),
]


@pytest.mark.compat
@pytest.mark.parametrize(("family", "changes"), HARMLESS, ids=str)
def test_a_value_that_changes_no_logits_is_no_reason_to_refuse(folder, tmp_path, family, changes):
    source = folder(family, shards=1)
    (tmp_path / "config.json").write_text((source / "config.json").read_text())
    (tmp_path / "model.safetensors").symlink_to(source / "model.safetensors")
    streamed = tiny.Streamed(Model(tiny.edit_config(tmp_path, **changes)))
    assert differences(source, streamed=streamed).max() <= TOLERANCE

"""From GGUF files to models of transformers: the weights and logits of the model that a file was written from."""

import json
import random

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from aspec.errors import CheckpointError, UnsupportedModelError, UserError
from aspec.io.gguf import read_gguf
from aspec.io.hub import known_as, source_of
from aspec.models.formats.gguf.architectures import ARCHITECTURES
from aspec.models.formats.gguf.config import generation_config, model_config
from aspec.models.formats.gguf.folder import folder_of, open_stored
from aspec.models.formats.gguf.weights import open_weights
from aspec.models.model import Model
from tests.gguf_files import BOOL, F32, LIST, PAIRS, TEXT, U32, builds_tokenizers, floats, small_tensors, write

gguf = pytest.importorskip("gguf", reason="gguf-py is not installed")
from gguf import GGMLQuantizationType as Type  # noqa: E402 - after the check that it is there

from tests.gguf_models import MODELS, architecture, tiny_model, write_model  # noqa: E402


def read(ref):
    """A stored tensor."""
    raw = np.fromfile(ref.file, dtype=np.uint8, count=ref.nbytes, offset=ref.offset)
    return torch.from_numpy(raw).view(ref.dtype).view(ref.shape)


def state_of(path, dtype=torch.float32):
    """All parameters that a file gives, by aspec."""
    found = read_gguf(path)
    weights = open_weights(found, model_config(found))
    state = {name: read(ref).to(dtype) for name, ref in weights.tensors.items()}
    for weight in weights.packed:
        out = torch.full(weight.shape, 7.0, dtype=dtype)
        weight.decode([read(ref) for ref in weight.refs], out, torch.empty(weight.workspace_bytes, dtype=torch.uint8))
        state[weight.name] = out
    return state


def logits_of(model):
    tokens = torch.arange(40).view(2, 20) * 5 % 256
    with torch.inference_mode():
        return model(tokens).logits


def built(path):
    """The model of a file's configuration with a file's weights."""
    config = model_config(read_gguf(path))
    made = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config), dtype=torch.float32).eval()
    missing, unexpected = made.load_state_dict(state_of(path), strict=False)
    assert not unexpected
    assert set(missing) <= set(made.all_tied_weights_keys or {})
    made.tie_weights()
    return made


def test_every_architecture_is_tried():
    assert {architecture(name) for name in MODELS} == set(ARCHITECTURES)


@pytest.mark.parametrize("name", MODELS)
def test_a_file_gives_the_model_that_it_was_written_from(tmp_path, name):
    """Weights bit for bit, and through the configuration the same logits."""
    model = tiny_model(name)
    path = write_model(tmp_path / "model.gguf", name, model)
    state, own = state_of(path), model.state_dict()
    assert state.keys() == own.keys() - set(model.all_tied_weights_keys or {})
    shifted = architecture(name).startswith("gemma")
    for parameter, tensor in state.items():
        expected = own[parameter]
        if shifted and parameter.endswith("norm.weight"):
            expected = (expected + 1) - 1  # as it was stored
        assert torch.equal(tensor, expected), parameter
    assert torch.equal(logits_of(built(path)), logits_of(model)) or shifted
    torch.testing.assert_close(logits_of(built(path)), logits_of(model), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "mixtral", "gpt-oss", "gemma2", "phi3"])
@pytest.mark.parametrize("kind", [Type.Q8_0, Type.F16])
def test_packed_weights_are_the_ones_that_the_library_unpacks(tmp_path, name, kind):
    """The same file in F32, after the library has quantised and dequantised its matrices, gives the same parameters."""
    model = tiny_model(name)
    packed = write_model(tmp_path / "packed.gguf", name, model, kind)
    plain = write_model(tmp_path / "plain.gguf", name, model)
    found, whole = read_gguf(packed), read_gguf(plain)
    with plain.open("r+b") as file:
        for tensor, other in zip(found.tensors.values(), whole.tensors.values(), strict=True):
            assert tensor.ref.name == other.ref.name
            if tensor.kind == kind.name:
                raw = np.fromfile(packed, dtype=np.uint8, count=tensor.ref.nbytes, offset=tensor.ref.offset)
                rows = raw.reshape(-1, tensor.ref.shape[-1] * tensor.ref.dtype.itemsize)
                file.seek(other.ref.offset)
                file.write(np.ascontiguousarray(gguf.quants.dequantize(rows, kind), dtype=np.float32).tobytes())
    for dtype in (torch.float32, torch.bfloat16):
        one, other = state_of(packed, dtype), state_of(plain, dtype)
        assert one.keys() == other.keys()
        for parameter in one:
            assert torch.equal(one[parameter], other[parameter]), parameter


# -- what a configuration cannot say, and what no file may say --------------------------------------------------------


def small(folder, pairs=(), tensors=None, without=(), arch="llama"):
    """A small file with other metadata and tensors; ``pairs`` replace keys of the same name, as for a llama."""
    named = {key: (key, kind, value) for key, kind, value in PAIRS if key not in without}
    named["general.architecture"] = ("general.architecture", TEXT, arch)
    named |= {key: (key, kind, value) for key, kind, value in pairs}
    made = [(key.replace("llama.", f"{arch}."), *rest) for key, *rest in named.values()]
    return write(folder / "model.gguf", made, small_tensors() if tensors is None else tensors)


def opened(path):
    found = read_gguf(path)
    config = model_config(found)
    return config, open_weights(found, config)


@pytest.mark.parametrize(
    ("pairs", "expected"),
    [
        (
            [("general.architecture", TEXT, "mamba")],
            r"architecture mamba are not supported; these are: gemma, .*smollm3",
        ),
        ([("general.architecture", U32, 3)], "expected general.architecture to name an architecture, found 3"),
        ([("general.type", TEXT, "adapter")], "expected a model, found general.type adapter"),
        ([("llama.new_maths", F32, 1.0)], "the key llama.new_maths is not known to aspec"),
        ([("llama.rope.scaling.type", TEXT, "ntk")], "scaled by ntk, which aspec does not know"),
        ([("llama.attention.value_length", U32, 16)], "llama.attention.value_length is 16"),
        ([("llama.attention.causal", 7, False)], "llama.attention.causal is False"),
        ([("llama.block_count", U32, 0)], "expected llama.block_count to be a whole number of 1 or more, found 0"),
        ([("llama.block_count", TEXT, "1")], "expected llama.block_count to be a whole number"),
        ([("llama.attention.head_count", LIST, (U32, [4, 8]))], "to be the same value for every layer"),
        (
            [("llama.rope.freq_base", F32, float("nan"))],
            "expected llama.rope.freq_base to be a number above 0, found nan",
        ),
        ([("llama.attention.head_count", U32, 5)], "an embedding_length that 5 heads divide, or .*, found 32"),
        (
            [("llama.attention.head_count", U32, 5), ("llama.attention.key_length", U32, 8)],
            "tensor blk.0.attn_q.weight does not fit: found shape .* for 5 heads",
        ),
        ([("tokenizer.ggml.eos_token_id", U32, 99)], "eos_token_id to be a token from 0 to 29, found 99"),
    ],
)
def test_what_changes_the_numbers_unnoticed_is_refused(tmp_path, pairs, expected):
    with pytest.raises(UserError, match=expected) as caught:
        opened(small(tmp_path, pairs))
    assert "\n" not in str(caught.value)


def test_a_key_that_is_needed_is_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"expected llama\.context_length to be .*, found nothing"):
        opened(small(tmp_path, without=("llama.context_length",)))


@pytest.mark.parametrize("kind", ["IQ2_XXS", "TQ2_0", "NVFP4", "Q8_1"])
def test_a_type_that_is_not_read_is_refused_by_name(tmp_path, kind):
    number = int(Type[kind])
    size, nbytes = gguf.GGML_QUANT_SIZES[number]
    tensors = [*small_tensors(), ("blk.0.attn_sub_norm.weight", (size, 2), number, bytes(2 * nbytes))]
    with pytest.raises(
        UnsupportedModelError, match=rf"stored as {kind}, which aspec does not read; it reads Q4_0, .*Q4_K_M"
    ):
        opened(small(tmp_path, tensors=tensors))


def test_an_expert_without_its_partner_is_refused(tmp_path):
    tensors = [*small_tensors(), ("blk.0.ffn_gate_exps.weight", (32, 8, 4), 0, bytes(4096))]
    with pytest.raises(
        CheckpointError, match="gate_up_proj is made of 2 stored tensors: expected as many of equal shape"
    ):
        opened(small(tmp_path, tensors=tensors))
    tensors += [("blk.0.ffn_up_exps.weight", (32, 9, 4), 0, bytes(4608))]
    with pytest.raises(CheckpointError, match="expected as many of equal shape"):
        opened(small(tmp_path, tensors=tensors))


def test_a_tensor_of_no_known_name_keeps_it(tmp_path):
    tensors = [
        *small_tensors(),
        ("blk.0.attn_rot_embd", (8,), 0, bytes(32)),
        ("blk.7.attn_norm.weight", (32,), 0, bytes(128)),
    ]
    weights = opened(small(tmp_path, tensors=tensors))[1]
    assert {"blk.0.attn_rot_embd", "blk.7.attn_norm.weight"} <= weights.tensors.keys()


def test_factors_that_are_not_llama_3s_are_taken_as_they_are(tmp_path):
    factors = np.array([1.0, 2.0, 3.0, 5.0], dtype=np.float32)
    found = opened(small(tmp_path, tensors=[("rope_freqs.weight", (4,), 0, factors.tobytes()), *small_tensors()]))[0]
    rope = AutoConfig.for_model(**found).rope_parameters
    assert (rope["rope_type"], rope["short_factor"], rope["attention_factor"]) == ("longrope", [1, 2, 3, 5], 1.0)
    for wrong in (factors[:3], -factors):
        tensors = [("rope_freqs.weight", (len(wrong),), 0, wrong.tobytes()), *small_tensors()]
        with pytest.raises(CheckpointError, match=r"expected 4 numbers in F32|expected factors above 0"):
            opened(small(tmp_path, tensors=tensors))


def test_layers_of_gemma_3_that_see_only_a_window(tmp_path):
    window = ("llama.attention.sliding_window", U32, 8)
    for value, types in (
        ((U32, 1), ["full_attention"]),
        ((U32, 6), ["sliding_attention"]),
        ((LIST, (BOOL, [True])), ["sliding_attention"]),
        ((LIST, (BOOL, [False])), ["full_attention"]),
    ):
        pattern = ("llama.attention.sliding_window_pattern", *value)
        vision = ("llama.vision.image_size", U32, 896)
        found = opened(small(tmp_path, [window, pattern, vision], arch="gemma3"))[0]
        assert AutoConfig.for_model(**found).layer_types == types
    pattern = ("llama.attention.sliding_window_pattern", LIST, (BOOL, [True, False]))
    with pytest.raises(CheckpointError, match="sliding_window_pattern to be 1 truth values"):
        opened(small(tmp_path, [window, pattern], arch="gemma3"))


def test_the_publishers_sampling_and_ends_are_the_generations_defaults(tmp_path):
    found = generation_config(
        read_gguf(
            small(
                tmp_path,
                [
                    ("tokenizer.ggml.eot_token_id", U32, 5),
                    ("general.sampling.temp", F32, 0.5),
                    ("general.sampling.top_k", 5, 20),
                ],
            )
        )
    )
    assert found == {"bos_token_id": 0, "eos_token_id": [1, 5], "temperature": 0.5, "top_k": 20, "do_sample": True}


ODD = [
    *((U32, number) for number in (0, 1, 7, 64, 1 << 31)),
    *((F32, number) for number in (-1.0, 0.0, 2.0, float("inf"), float("nan"))),
    *((TEXT, text) for text in ("", "yarn", "linear", "longrope", "gpt2")),
    *((LIST, value) for value in ((U32, []), (U32, [2, 2]), (TEXT, ["a"]), (F32, [1.0] * 30))),
    (7, True),
]
MORE_KEYS = [
    *(
        f"rope.scaling.{name}"
        for name in ("type", "factor", "original_context_length", "attn_factor", "yarn_beta_fast")
    ),
    *(
        "expert_count",
        "expert_used_count",
        "expert_feed_forward_length",
        "attention.key_length",
        "attention.value_length",
    ),
    *("attention.sliding_window", "vocab_size", "attention.causal", "embedding_scale", "final_logit_softcapping"),
]
MORE_TENSORS = [
    ("rope_freqs.weight", (4,), 0, floats(4)),
    ("rope_factors_long.weight", (4,), 0, np.ones(4, np.float32).tobytes()),
    ("blk.0.ffn_gate_exps.weight", (32, 8, 2), 0, floats(32, 8, 2)),
    ("blk.0.ffn_up_exps.weight", (32, 8, 2), 26, floats(32, 8, 2)),
    ("blk.0.ffn_gate_inp.weight", (32, 2), 0, floats(32, 2)),
    ("output.weight", (32, 30), 24, bytes(960)),
]


def test_mutated_metadata_and_tensors_are_refused_or_mapped(tmp_path):
    """1,000 files whose headers are sound and whose values are not: one error of the user each, or a model."""
    chance, refused = random.Random(3), []
    names = [name for name, *_ in small_tensors()]
    for _ in range(1000):
        arch = chance.choice(["llama", *ARCHITECTURES])
        keys = [key.removeprefix("llama.") for key, *_ in PAIRS[1:10]] + MORE_KEYS
        pairs = [(f"llama.{chance.choice(keys)}", *chance.choice(ODD)) for _ in range(chance.randrange(3))]
        pairs += [(chance.choice(PAIRS)[0], *chance.choice(ODD))] * (chance.random() < 0.2)
        tensors = [list(one) for one in [*small_tensors(), *chance.sample(MORE_TENSORS, chance.randrange(3))]]
        for tensor in chance.sample(tensors, chance.randrange(2)):
            if chance.random() < 0.5:
                tensor[0] = chance.choice(names).replace("attn", chance.choice(["ffn", "attn_q", "exps"])) + "x"
            else:
                size = chance.choice([(32,), (32, 1), (32, 2, 2), (64, 3)])
                tensor[1:] = size, 0, bytes(4 * int(np.prod(size)))
        path = small(tmp_path, pairs, tensors, arch=arch)
        try:
            state_of(path)
        except UserError as error:
            refused.append(str(error))
    assert 400 < len(refused) < 950
    assert not [text for text in refused if "\n" in text or len(text) > 2000]


# -- the folder that stands for a file -------------------------------------------------------------------------------


@builds_tokenizers
def test_a_folder_stands_for_a_file(tmp_path):
    path = small(tmp_path, [("tokenizer.chat_template", TEXT, "{{ messages[0]['content'] }}!")])
    folder = folder_of(path)
    assert source_of(folder) == path
    assert source_of(tmp_path) is None
    assert AutoConfig.from_pretrained(folder).num_hidden_layers == 1
    assert json.loads((folder / "generation_config.json").read_text())["eos_token_id"] == 1
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.bos_token_id == tokenizer.encode("abc")[0] == 0
    assert tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False) == "Hi!"
    checkpoint, packed = open_stored(folder, path)
    assert checkpoint.nbytes == sum(len(data) for *_, data in small_tensors())
    assert set(checkpoint.files) == {str(path)}
    assert sum(ref.nbytes for ref in checkpoint.tensors.values()) == checkpoint.nbytes
    assert {ref.name for one in packed for ref in one.refs} < checkpoint.tensors.keys()
    assert known_as(folder) == known_as(folder / "config.json") == path
    assert known_as(tmp_path) == tmp_path
    assert folder_of(path) == folder, "it is made once"


@builds_tokenizers
def test_a_changed_file_gets_another_folder_and_a_refused_one_none(tmp_path):
    path = small(tmp_path)
    first = folder_of(path)
    assert folder_of(small(tmp_path, [("general.name", TEXT, "another")])) != first
    before = set(first.parent.iterdir())
    for pairs, expected in (
        ([("tokenizer.ggml.model", TEXT, "bert")], "tokenizers of kind bert are not supported; gpt2 and llama are"),
        (
            [("tokenizer.ggml.model", TEXT, "gpt2"), ("tokenizer.ggml.merges", LIST, (TEXT, ["a b"]))],
            "rule None .tokenizer.ggml.pre.",
        ),
        ([("tokenizer.ggml.tokens", LIST, (TEXT, ["a", "a"]))], "eos_token_id|texts of which each is there once"),
        (
            [("tokenizer.ggml.scores", LIST, (F32, [1.0]))],
            "expected scores of its tokenizer to be a list of 30 numbers",
        ),
        ([("tokenizer.ggml.add_bos_token", U32, 1)], "expected add_bos_token of its tokenizer to be a truth value"),
        ([("tokenizer.chat_template", U32, 1)], "expected chat_template of its tokenizer to be a text"),
    ):
        with pytest.raises(UserError, match=expected):
            folder_of(small(tmp_path, pairs))
    assert set(first.parent.iterdir()) == before, "nothing is left of what was refused"


@builds_tokenizers
def test_folders_of_files_that_are_gone_or_have_changed_are_removed(tmp_path):
    gone, other = (tmp_path / name for name in ("gone", "other"))
    paths = []
    for folder in (gone, other):
        folder.mkdir()
        paths.append(small(folder))
    removed, kept = map(folder_of, paths)
    paths[0].unlink()
    changed = folder_of(small(tmp_path))
    assert not removed.exists()
    assert kept.is_dir()
    last = folder_of(small(tmp_path, [("general.name", TEXT, "another")]))
    assert not changed.exists()
    assert kept.is_dir()
    assert last.is_dir()
    assert folder_of(paths[1]) == kept


@builds_tokenizers
def test_a_link_keeps_its_name_and_a_cache_that_cannot_be_written_is_named(tmp_path, monkeypatch):
    (tmp_path / "blob").write_bytes(small(tmp_path).read_bytes())
    link = tmp_path / "linked.gguf"
    link.symlink_to("blob")
    folder = folder_of(link)
    assert folder.name.startswith("linked-")
    assert source_of(folder) == link
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(
        CheckpointError, match=r"expected a folder .*file/aspec/gguf that can be written, found: Not a dir"
    ):
        folder_of(link)


@builds_tokenizers
def test_a_shape_that_the_header_contradicts_is_an_error_of_the_file(tmp_path):
    with pytest.raises(CheckpointError, match=r"from its header") as caught:
        Model(folder_of(small(tmp_path, [("llama.feed_forward_length", U32, 24)])))
    assert "config.json" not in str(caught.value)

"""Tokenizers of GGUF files: the tokens of transformers' own reader, and of llama.cpp where that one forgets a rule."""

import pytest
from transformers import AutoTokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

from aspec.errors import UnsupportedModelError
from aspec.io.gguf import read_gguf
from aspec.models.formats.gguf import tokenizer as files
from tests.gguf_files import BOOL, F32, LIST, PAIRS, TEXT, U32, builds_tokenizers, floats, write

pytest.importorskip("gguf", reason="gguf-py is not installed")  # transformers' own reader needs it

TEXTS = (
    "Hello there, world",
    "  two  spaces\n\n\tand 2024 12345.67",
    "don't WON'T I'll",
    "é ü 日本 🙂",
    "<s>[INST] Hi</s> <think>",
    "",
    "a" * 50,
)
ALPHABET = list(bytes_to_unicode().values())
WORDS = ["hello", "there", "and", "world", "2024", "Ġthe", "Ġworld", "Ġ2024"]
PREFIXES = list(dict.fromkeys(word[:end] for word in WORDS for end in range(2, len(word) + 1)))


def byte_level(pre, **flags):
    tokens = ["<s>", "</s>", "<think>", *ALPHABET, *PREFIXES]
    merges = [f"{word[:-1]} {word[-1]}" for word in PREFIXES]
    return {
        "model": (TEXT, "gpt2"),
        "pre": (TEXT, pre),
        "tokens": (LIST, (TEXT, tokens)),
        "token_type": (LIST, (5, [3, 3, 4, *[1] * (len(tokens) - 3)])),
        "merges": (LIST, (TEXT, merges)),
        "bos_token_id": (U32, 0),
        "eos_token_id": (U32, 1),
        **{name: (BOOL, value) for name, value in flags.items()},
    }


def sentencepiece(**flags):
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    letters = [chr(code) for code in range(33, 127)]
    words = [
        "▁",
        "▁h",
        "▁he",
        "he",
        "ll",
        "hell",
        "hello",
        "▁hello",
        "▁t",
        "th",
        "▁th",
        "▁the",
        "re",
        "▁w",
        "wor",
        "ld",
        "  ",
    ]
    tokens = ["<unk>", "<s>", "</s>", *bytes_, *words, *letters, "<think>"]
    kinds = [2, 3, 3, *[6] * 256, *[1] * (len(words) + len(letters)), 4]
    return {
        "model": (TEXT, "llama"),
        "pre": (TEXT, "default"),
        "tokens": (LIST, (TEXT, tokens)),
        "scores": (LIST, (F32, [-float(index) for index in range(len(tokens))])),
        "token_type": (LIST, (5, kinds)),
        "unknown_token_id": (U32, 0),
        "bos_token_id": (U32, 1),
        "eos_token_id": (U32, 2),
        **{name: (BOOL, value) for name, value in flags.items()},
    }


FILES = {
    "llama": ("llama", sentencepiece()),
    "llama without a beginning": ("llama", sentencepiece(add_bos_token=False, add_eos_token=True)),
    "gemma": ("gemma3", sentencepiece(add_bos_token=True, add_space_prefix=False)),
    "phi3": ("phi3", sentencepiece()),
    "llama 3": ("llama", byte_level("llama-bpe", add_bos_token=True)),
    "qwen2": ("qwen2", byte_level("qwen2", add_bos_token=False)),
    "gpt-oss": ("gpt-oss", byte_level("gpt-4o")),
    "tekken": ("llama", byte_level("tekken", add_bos_token=True)),
    "gpt-2": ("llama", byte_level("gpt-2")),
}


def write_tokenizer(folder, arch, parts):
    """A file of no layer that can run, with a tokenizer."""
    size = len(parts["tokens"][1][1])
    pairs = [(key.replace("llama.", f"{arch}."), *rest) for key, *rest in PAIRS if not key.startswith("tokenizer.")]
    pairs[0] = ("general.architecture", TEXT, arch)
    pairs += [
        (f"{arch}.attention.sliding_window", U32, 8),
        (f"{arch}.expert_count", U32, 4),
        (f"{arch}.expert_used_count", U32, 2),
    ]
    pairs += [(f"tokenizer.ggml.{name}", *value) for name, value in parts.items()]
    return write(folder / "model.gguf", pairs, [("token_embd.weight", (32, size), 0, floats(32, size))])


def tokenizer_of(path):
    files.save_tokenizer(read_gguf(path), path.parent)
    return AutoTokenizer.from_pretrained(path.parent)


@builds_tokenizers
@pytest.mark.parametrize("name", FILES)
def test_tokens_are_those_of_transformers_own_reader(tmp_path, name):
    path = write_tokenizer(tmp_path, *FILES[name])
    own = AutoTokenizer.from_pretrained(tmp_path, gguf_file="model.gguf")
    if name in ("llama 3", "tekken"):  # as in the tokenizer.json of these models, which that reader forgets
        own.backend_tokenizer.model.ignore_merges = True
    made = tokenizer_of(path)
    for text in TEXTS:
        assert made.encode(text) == own.encode(text), text
        assert made.decode(own.encode(text)) == own.decode(own.encode(text))
    assert made.get_vocab() == own.get_vocab()
    assert (made.bos_token_id, made.eos_token_id) == (own.bos_token_id, own.eos_token_id)


@builds_tokenizers
def test_llama_3_begins_a_text_where_the_file_does_not_say(tmp_path):
    assert tokenizer_of(write_tokenizer(tmp_path, "llama", byte_level("llama-bpe"))).encode("hello")[0] == 0


@builds_tokenizers
def test_a_word_that_is_a_token_is_taken_whole_by_llama_3(tmp_path):
    parts = byte_level("llama-bpe")
    parts["tokens"][1][1].append("xyz")
    parts["token_type"][1][1].append(1)
    made = tokenizer_of(write_tokenizer(tmp_path, "llama", parts))
    assert made.convert_ids_to_tokens(made.encode("xyz")) == ["<s>", "xyz"]


@builds_tokenizers
@pytest.mark.parametrize("arch", ["llama", "phi3"])
def test_a_vocabulary_without_a_space_before_the_text(tmp_path, arch):
    made = tokenizer_of(write_tokenizer(tmp_path, arch, sentencepiece(add_space_prefix=False, add_bos_token=False)))
    assert made.convert_ids_to_tokens(made.encode("hello the")) == ["hello", "▁the"]
    assert made.decode(made.encode(" hello")) == " hello"


@builds_tokenizers
def test_digits_are_split_off_by_the_rules_that_say_so(tmp_path):
    made = tokenizer_of(write_tokenizer(tmp_path, "llama", byte_level("smollm")))
    assert made.convert_ids_to_tokens(made.encode("2024 12")) == ["2", "0", "2", "4", "Ġ", "1", "2"]


@builds_tokenizers
def test_a_rule_that_is_not_known_is_refused_by_name(tmp_path):
    path = write_tokenizer(tmp_path, "llama", byte_level("some-bpe"))
    with pytest.raises(UnsupportedModelError, match=r"splits text by the rule some-bpe \(tokenizer\.ggml\.pre\)"):
        tokenizer_of(path)


@pytest.mark.compat
def test_an_older_transformers_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "tokenizer_from_gguf", lambda architecture, parts: None)
    path = write_tokenizer(tmp_path, "llama", byte_level("llama-bpe"))
    with pytest.raises(UnsupportedModelError, match=r"expected 5\.18 or newer\. Run: pip install -U transformers"):
        tokenizer_of(path)

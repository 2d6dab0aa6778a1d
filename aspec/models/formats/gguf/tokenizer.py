"""A GGUF file's tokenizer and chat template as the files that transformers keeps beside a model.

transformers builds the tokenizer from the metadata. It splits text like GPT-2 where it does not know the rule that a
vocabulary was made with, so a rule is refused here unless transformers or this file knows it.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NoReturn

from tokenizers import decoders, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from aspec.errors import CheckpointError, UnsupportedModelError, reason_of, shown
from aspec.io.gguf import Gguf
from aspec.models.formats.gguf.config import token_id
from aspec.models.hf_compat import text_splits_of_gguf, tokenizer_from_gguf

PARTS: Mapping[str, str] = MappingProxyType(
    {
        "model": "tokenizer_type",
        "pre": "pre_tokenizer_type",
        "tokens": "tokens",
        "scores": "scores",
        "token_type": "token_type",
        "merges": "merges",
        "precompiled_charsmap": "precompiled_charsmap",
        "add_space_prefix": "add_prefix_space",
    }
)
"""Keys of ``tokenizer.ggml`` -> names of transformers' reader."""

MAX_TOKEN = 4096  # characters; the longest are runs of some hundred spaces
SPECIAL = {
    "bos_token": "bos_token_id",
    "eos_token": "eos_token_id",
    "unk_token": "unknown_token_id",
    "pad_token": "padding_token_id",
}
BYTE_LEVEL, SENTENCEPIECE = "gpt2", "llama"
LIKE_GPT2 = frozenset({"gpt-2", "mpt", "olmo", "jais", "trillion"})
DIGITS = frozenset({"smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"})
"""Rules of llama.cpp that split like GPT-2, and those that also split every digit off."""
WHOLE_WORDS = BEGINS = frozenset({"llama3", "llama-v3", "llama-bpe", "tekken"})
"""Rules whose vocabularies take a word that is a token as it is, and begin a text with a token of its own, where the
file does not say otherwise. llama.cpp knows both by the rule's name.
"""
SPACE = "\N{LOWER ONE EIGHTH BLOCK}"  # for a space, in a vocabulary of sentencepiece


def save_tokenizer(gguf: Gguf, folder: Path) -> None:
    """Write tokenizer.json, tokenizer_config.json and the chat template.

    Raises CheckpointError for a damaged vocabulary, UnsupportedModelError for a kind of tokenizer that is not known.
    """
    parts = _parts(gguf)
    settings = _settings(gguf, parts)
    try:
        backend = tokenizer_from_gguf(str(gguf.metadata["general.architecture"]), parts)
        if backend is not None:
            _amend(backend, parts)
            PreTrainedTokenizerFast(tokenizer_object=backend, **settings).save_pretrained(folder)
    except (Warning, OSError):  # the caller's filter, or the disk; not the file
        raise
    except BaseException as error:  # the library, and the Rust one, raise any type for a vocabulary they cannot use
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise CheckpointError(
            f"{gguf.path}: its tokenizer cannot be used: expected a vocabulary that transformers takes, found one that "
            f"it refuses: {reason_of(error)}. Fetch the file again."
        ) from error
    if backend is None:
        raise UnsupportedModelError(
            f"{gguf.path}: the installed transformers cannot build the tokenizer of a GGUF file: expected 5.18 or "
            f"newer. Run: pip install -U transformers"
        )


def _amend(backend: Any, parts: Mapping[str, Any]) -> None:
    """Add what the metadata say and transformers' conversion leaves out."""
    rule = parts.get("pre_tokenizer_type")
    if parts["tokenizer_type"] == BYTE_LEVEL:
        if rule in DIGITS:
            backend.pre_tokenizer = pre_tokenizers.Sequence(
                [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
            )
        if rule in WHOLE_WORDS:
            backend.model.ignore_merges = True
    elif parts.get("add_prefix_space") is False:
        backend.normalizer = normalizers.Replace(" ", SPACE)
        backend.pre_tokenizer = None
        backend.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()])


def _parts(gguf: Gguf) -> dict[str, Any]:
    """What transformers' conversion reads, checked."""
    parts = {
        name: gguf.metadata[f"tokenizer.ggml.{key}"]
        for key, name in PARTS.items()
        if f"tokenizer.ggml.{key}" in gguf.metadata
    }
    tokens = _texts(gguf, parts, "tokens")
    if not tokens or len(set(tokens)) < len(tokens):
        _refuse(
            gguf, "tokens", "texts of which each is there once", f"{len(tokens)}, {len(set(tokens))} of them different"
        )
    if (longest := max(map(len, tokens))) > MAX_TOKEN:  # merges are derived from every split of every token
        _refuse(gguf, "tokens", f"texts of at most {MAX_TOKEN} characters", f"one of {longest}")
    _texts(gguf, parts, "merges")
    for name in ("scores", "token_type"):
        found = parts.get(name, tokens)
        if isinstance(found, int | float | str) or len(found) != len(tokens):
            _refuse(gguf, name, f"a list of {len(tokens)} numbers, one for a token", found)
    kind, rule = parts.get("tokenizer_type"), parts.get("pre_tokenizer_type")
    if not isinstance(kind, str):
        _refuse(gguf, "model", "the name of a kind of tokenizer", kind)
    if kind not in (BYTE_LEVEL, SENTENCEPIECE):
        raise UnsupportedModelError(
            f"{gguf.path}: tokenizers of kind {shown(kind)} are not supported; {BYTE_LEVEL} and {SENTENCEPIECE} are. "
            f"Give the model's safetensors checkpoint instead."
        )
    needed = "merges" if kind == BYTE_LEVEL else "scores"
    if needed not in parts and "merges" not in parts:
        _refuse(gguf, needed, "a list", None)
    known = text_splits_of_gguf() | LIKE_GPT2 | DIGITS
    if kind == BYTE_LEVEL and rule not in known and text_splits_of_gguf():
        raise UnsupportedModelError(
            f"{gguf.path}: its tokenizer splits text by the rule {shown(rule)} (tokenizer.ggml.pre), which is not "
            f"supported. Give the model's safetensors checkpoint instead."
        )
    return parts


def _settings(gguf: Gguf, parts: Mapping[str, Any]) -> dict[str, Any]:
    """The content of tokenizer_config.json."""
    settings: dict[str, Any] = {}
    for name, key in SPECIAL.items():
        token = token_id(gguf, key)
        settings[name] = None if token is None else parts["tokens"][token]
    usual = parts["tokenizer_type"] == SENTENCEPIECE or parts.get("pre_tokenizer_type") in BEGINS
    for name, missing in (("add_bos_token", usual), ("add_eos_token", False)):
        found = gguf.metadata.get(f"tokenizer.ggml.{name}", missing)
        if not isinstance(found, bool):
            _refuse(gguf, name, "a truth value", found)
        if found or f"tokenizer.ggml.{name}" in gguf.metadata:
            settings[name] = found
    template = gguf.metadata.get("tokenizer.chat_template")
    if template is not None:
        if not isinstance(template, str):
            _refuse(gguf, "chat_template", "a text", template)
        settings["chat_template"] = template
    return settings


def _texts(gguf: Gguf, parts: Mapping[str, Any], name: str) -> Sequence[str]:
    value = parts.get(name, [])
    if not isinstance(value, list) or not all(isinstance(text, str) for text in value[:1]):
        _refuse(gguf, name, "a list of texts", value)
    return value


def _refuse(gguf: Gguf, key: str, expected: str, found: object) -> NoReturn:
    what = "none" if found is None else shown(found)
    raise CheckpointError(
        f"{gguf.path}: expected {key} of its tokenizer to be {expected}, found {what}. Fetch the file again."
    )

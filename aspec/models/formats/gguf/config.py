"""From a GGUF file's metadata to transformers' config.json and generation_config.json."""

from collections import Counter
from typing import Any

from aspec.errors import CheckpointError, UnsupportedModelError, shown
from aspec.io.gguf import Gguf
from aspec.models.formats.gguf.architectures import ARCHITECTURES, Architecture
from aspec.models.formats.gguf.keys import Keys
from aspec.models.formats.gguf.rope import rope_parameters

EMBEDDING, HEAD = "token_embd.weight", "output.weight"
DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
IDS = {"bos_token_id": "bos_token_id", "eos_token_id": "eos_token_id", "pad_token_id": "padding_token_id"}
ENDS = ("eos_token_id", "eot_token_id", "eom_token_id")  # of a text, of a turn, of a message
SAMPLING = {
    "temp": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "penalty_repeat": "repetition_penalty",
}
"""Keys of ``general.sampling`` -> fields of transformers' GenerationConfig."""


def architecture_of(gguf: Gguf) -> Architecture:
    """The row of a file's architecture. Raises UnsupportedModelError, CheckpointError."""
    name = gguf.metadata.get("general.architecture")
    if not isinstance(name, str):
        raise CheckpointError(
            f"{gguf.path}: expected general.architecture to name an architecture, found {shown(name)}. Fetch the file "
            f"again."
        )
    kind = gguf.metadata.get("general.type", "model")
    if kind != "model":
        raise UnsupportedModelError(
            f"{gguf.path}: expected a model, found general.type {shown(kind)}. Give the file of the model itself."
        )
    if name not in ARCHITECTURES:
        raise UnsupportedModelError(
            f"{gguf.path}: GGUF files of architecture {shown(name)} are not supported; these are: "
            f"{', '.join(sorted(ARCHITECTURES))}. Give the model's safetensors checkpoint instead."
        )
    return ARCHITECTURES[name]


def model_config(gguf: Gguf) -> dict[str, Any]:
    """The content of config.json. Raises UnsupportedModelError for a key that may change the numbers unnoticed."""
    architecture = architecture_of(gguf)
    keys = Keys(gguf.path, str(gguf.metadata["general.architecture"]), gguf.metadata)
    hidden, heads = keys.whole("embedding_length"), keys.whole("attention.head_count")
    if hidden % heads and not keys.has("attention.key_length"):
        raise CheckpointError(
            f"{gguf.path}: expected an embedding_length that {heads} heads divide, or attention.key_length, found "
            f"{hidden}. Fetch the file again."
        )
    head_dim = keys.whole("attention.key_length", hidden // heads)
    keys.expect("attention.value_length", head_dim)
    rotated = keys.whole("rope.dimension_count", head_dim)
    context = keys.whole("context_length")
    config: dict[str, Any] = {
        "model_type": architecture.model_type,
        "max_position_embeddings": context,
        "hidden_size": hidden,
        "intermediate_size": keys.whole("feed_forward_length"),
        "num_hidden_layers": keys.whole("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": keys.whole("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "rms_norm_eps": keys.number("attention.layer_norm_rms_epsilon", above=0),
        "rope_parameters": rope_parameters(gguf, keys, context, rotated),
        "vocab_size": _vocabulary_size(gguf, keys),
        "tie_word_embeddings": HEAD not in gguf.tensors,
        "dtype": _dtype(gguf),
        **token_ids(gguf),
    }
    if rotated != head_dim:
        config["rope_parameters"]["partial_rotary_factor"] = rotated / head_dim
        if architecture.model_type != "phi3":
            keys.expect("rope.dimension_count", head_dim)
    architecture.finish(gguf, keys, config)
    keys.refuse_rest()
    return config


def generation_config(gguf: Gguf) -> dict[str, Any]:
    """The content of generation_config.json: what ends a text, and the sampling that the publisher recommends."""
    made: dict[str, Any] = {name: token for name, token in token_ids(gguf).items() if token is not None}
    ends = sorted({token for key in ENDS if (token := token_id(gguf, key)) is not None})
    if ends:
        made["eos_token_id"] = ends if len(ends) > 1 else ends[0]
    for key, name in SAMPLING.items():
        value = gguf.metadata.get(f"general.sampling.{key}")
        if isinstance(value, int | float) and not isinstance(value, bool):
            made[name] = value
    if "temperature" in made:
        made["do_sample"] = made["temperature"] > 0
        if not made["do_sample"]:
            del made["temperature"]
    return made


def token_ids(gguf: Gguf) -> dict[str, int | None]:
    """The special tokens that transformers knows by name."""
    return {name: token_id(gguf, key) for name, key in IDS.items()}


def token_id(gguf: Gguf, key: str) -> int | None:
    """A special token, None if the file names none. Raises CheckpointError if it is no token of the vocabulary."""
    value = gguf.metadata.get(f"tokenizer.ggml.{key}")
    if value is None:
        return None
    tokens = gguf.metadata.get("tokenizer.ggml.tokens")
    size = len(tokens) if isinstance(tokens, list) else 0
    if type(value) is not int or not 0 <= value < size:
        raise CheckpointError(
            f"{gguf.path}: expected tokenizer.ggml.{key} to be a token from 0 to {size - 1}, found {shown(value)}. "
            f"Fetch the file again."
        )
    return value


def _vocabulary_size(gguf: Gguf, keys: Keys) -> int:
    """The rows of the embedding; the list of tokens may be shorter, where the embedding is padded."""
    keys.whole("vocab_size", 1)
    embedding = gguf.tensors.get(EMBEDDING)
    if embedding is None or len(embedding.shape) != 2:
        raise CheckpointError(
            f"{gguf.path}: expected an embedding, the matrix {EMBEDDING}, found none. Fetch the file again."
        )
    return embedding.shape[0]


def _dtype(gguf: Gguf) -> str:
    """The type of most matrices; of packed ones, the type that models are published in."""
    counts = Counter(tensor.kind for tensor in gguf.tensors.values() if len(tensor.shape) > 1)
    return DTYPES.get(counts.most_common(1)[0][0], "bfloat16")

"""GGUF files for tests: byte by byte, and tiny models of transformers as llama.cpp's conversion writes them."""

import struct
from pathlib import Path

import numpy as np
import pytest

from aspec.models.hf_compat import text_splits_of_gguf

builds_tokenizers = pytest.mark.skipif(not text_splits_of_gguf(), reason="transformers builds no tokenizer from GGUF")

CODES = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
U32, F32, BOOL, TEXT, LIST, U64 = 4, 6, 7, 8, 9, 10


def text(value):
    raw = value if isinstance(value, bytes) else value.encode()
    return struct.pack("<Q", len(raw)) + raw


def value_bytes(kind, value):
    """A value; of a list, ``value`` is the type of its elements and the elements."""
    if kind == LIST:
        element, values = value
        return struct.pack("<IQ", element, len(values)) + b"".join(value_bytes(element, one) for one in values)
    return text(value) if kind == TEXT else struct.pack(f"<{CODES[kind]}", value)


def pair(key, kind, value):
    return text(key) + struct.pack("<I", kind) + value_bytes(kind, value)


def info(name, sizes, kind, offset):
    """``sizes`` in ggml's order: of a row first."""
    return text(name) + struct.pack(f"<I{len(sizes)}QIQ", len(sizes), *sizes, kind, offset)


def file_bytes(pairs, tensors, version=3, alignment=32, counts=None, magic=b"GGUF", places=None):
    """A whole file. ``tensors``: (name, sizes, type, data); ``places``: other offsets of theirs."""
    offsets, end = [], 0
    for *_, data in tensors:
        offsets.append(end)
        end += len(data) + -len(data) % alignment
    offsets = places or offsets
    num_tensors, num_pairs = counts or (len(tensors), len(pairs))
    head = magic + struct.pack("<IQQ", version, num_tensors, num_pairs)
    head += b"".join(pair(*one) for one in pairs)
    head += b"".join(info(*one[:3], offset) for one, offset in zip(tensors, offsets, strict=True))
    body = b"".join(data + bytes(-len(data) % alignment) for *_, data in tensors)
    return head + bytes(-len(head) % alignment) + body


TOKENS = ["<s>", "</s>", *(chr(97 + index) for index in range(26)), "ab", "abc"]
PAIRS = [
    ("general.architecture", TEXT, "llama"),
    ("llama.block_count", U32, 1),
    ("llama.context_length", U32, 64),
    ("llama.embedding_length", U32, 32),
    ("llama.feed_forward_length", U32, 64),
    ("llama.attention.head_count", U32, 4),
    ("llama.attention.head_count_kv", U32, 2),
    ("llama.attention.layer_norm_rms_epsilon", F32, 1e-5),
    ("llama.rope.freq_base", F32, 10000.0),
    ("llama.rope.dimension_count", U32, 8),
    ("tokenizer.ggml.model", TEXT, "llama"),
    ("tokenizer.ggml.tokens", LIST, (TEXT, TOKENS)),
    ("tokenizer.ggml.scores", LIST, (F32, [-float(index) for index in range(len(TOKENS))])),
    ("tokenizer.ggml.token_type", LIST, (5, [3, 3, *[1] * (len(TOKENS) - 2)])),
    ("tokenizer.ggml.bos_token_id", U32, 0),
    ("tokenizer.ggml.eos_token_id", U32, 1),
]
"""The metadata of a model of one layer."""


def floats(*sizes, seed=0):
    return np.random.default_rng(seed).standard_normal(sizes, dtype=np.float32).tobytes()


def small_tensors():
    """The tensors of ``PAIRS``: plain ones, and one of each of Q8_0 and Q4_0 with random bytes."""
    rng = np.random.default_rng(0)

    def packed(rows, row_bytes):
        return rng.integers(0, 60, rows * row_bytes, dtype=np.uint8).tobytes()

    return [
        ("token_embd.weight", (32, len(TOKENS)), 8, packed(len(TOKENS), 34)),
        ("output_norm.weight", (32,), 0, floats(32)),
        ("blk.0.attn_norm.weight", (32,), 0, floats(32)),
        ("blk.0.attn_q.weight", (32, 32), 2, packed(32, 18)),
        ("blk.0.attn_k.weight", (32, 16), 1, np.ones(512, np.float16).tobytes()),
        ("blk.0.attn_v.weight", (32, 16), 2, packed(16, 18)),
        ("blk.0.attn_output.weight", (32, 32), 2, packed(32, 18)),
        ("blk.0.ffn_norm.weight", (32,), 0, floats(32)),
        ("blk.0.ffn_gate.weight", (32, 64), 2, packed(64, 18)),
        ("blk.0.ffn_up.weight", (32, 64), 2, packed(64, 18)),
        ("blk.0.ffn_down.weight", (64, 32), 2, packed(32, 36)),
    ]


def write(path: Path, *args, **kwargs):
    path.write_bytes(file_bytes(*args, **kwargs))
    return path

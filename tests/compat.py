"""Which families stand for all: in tests with the oldest supported transformers too, and in the quick ones."""

import pytest
import torch

FAMILIES = {"llama", "mixtral"}

KINDS = {"llama", "qwen3", "mixtral", "gemma3", "gpt_oss", "deepseek_v3", "phi", "gemma3n_text"}
"""One family of every kind of layer: plain, normed heads, experts, windows, sinks, latent keys, parallel, shared KV."""


def marked(families):
    """Families as parameters, some of them marked ``compat``."""
    return [pytest.param(name, marks=pytest.mark.compat if name in FAMILIES else ()) for name in families]


def of_kinds(families, *more, quick=KINDS):
    """The same; those beyond one of every kind, or beyond ``quick``, are marked ``slow``. ``more``: values beside."""

    def marks(name):
        return pytest.mark.compat if name in FAMILIES else () if name in quick else pytest.mark.slow

    return [pytest.param(name, *more, marks=marks(name)) for name in families]


def in_both(families):
    """Families with their dtype: in bf16, which rounds more, one of every kind; in fp32 the plainest are enough."""
    return [*of_kinds(families, torch.bfloat16), *of_kinds(families, torch.float32, quick=FAMILIES)]


def few(values, quick):
    """Values as parameters; those beyond the first ``quick`` are marked ``slow``."""
    return [pytest.param(value, marks=pytest.mark.slow if i >= quick else ()) for i, value in enumerate(values)]

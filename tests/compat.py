"""Which families stand for all: in tests with the oldest supported transformers too, and in the quick ones."""

import pytest

FAMILIES = {"llama", "mixtral"}

KINDS = {"llama", "qwen3", "mixtral", "gemma3", "gpt_oss", "deepseek_v3", "phi", "gemma3n_text"}
"""One family of every kind of layer: plain, normed heads, experts, windows, sinks, latent keys, parallel, shared KV."""


def marked(families):
    """Families as parameters, some of them marked ``compat``."""
    return [pytest.param(name, marks=pytest.mark.compat if name in FAMILIES else ()) for name in families]


def of_kinds(families):
    """The same; those beyond one of every kind are marked ``slow``."""
    return [
        pytest.param(name, marks=pytest.mark.compat if name in FAMILIES else () if name in KINDS else pytest.mark.slow)
        for name in families
    ]


def few(values, quick):
    """Values as parameters; those beyond the first ``quick`` are marked ``slow``."""
    return [pytest.param(value, marks=pytest.mark.slow if i >= quick else ()) for i, value in enumerate(values)]

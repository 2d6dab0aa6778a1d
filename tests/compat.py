"""Which families stand for all where tests run with the oldest supported transformers too."""

import pytest

FAMILIES = {"llama", "mixtral"}


def marked(families):
    """Families as parameters, some of them marked ``compat``."""
    return [pytest.param(name, marks=pytest.mark.compat if name in FAMILIES else ()) for name in families]

"""Tables of recurrent families: what the driver cannot measure on meta tensors."""

from transformers import PreTrainedConfig

STORES_NOTHING = frozenset({"mlp", "moe"})
"""Types of layers, in a configuration's list of them, that keep nothing of a row."""


LOCAL = "local"
"""The type of layers, in GPT-Neo, that have a window of their own: the mask that they receive does not show it."""

TYPES = ("layer_types", "layers_block_type", "attention_layers")
"""A configuration's lists of the types of layers."""


def layer_type(config: PreTrainedConfig, index: int) -> str | None:
    """What a configuration calls the type of a layer; None where it has no list of types."""
    text = config.get_text_config()
    types = next((types for name in TYPES if (types := getattr(text, name, None))), ())
    return types[index] if index < len(types) else None

"""Tables of recurrent families: what the driver cannot measure on meta tensors."""

from transformers import PreTrainedConfig

STORES_NOTHING = frozenset({"mlp", "moe"})
"""Types of layers, in a configuration's list of them, that keep nothing of a row."""


def layer_type(config: PreTrainedConfig, index: int) -> str | None:
    """What a configuration calls the type of a layer; None where it has no list of types."""
    text = config.get_text_config()
    types = getattr(text, "layer_types", None) or getattr(text, "layers_block_type", None) or ()
    return types[index] if index < len(types) else None

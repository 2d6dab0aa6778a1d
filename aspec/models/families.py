"""Tables of what the generic driver refuses or does differently per family. Most families need no row.

``probe.py`` measures most properties of a family: keys and values, masks, arguments of layers. The tables below hold
only properties that cannot be measured on meta tensors.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

ENCODER = "encoder-decoder models are not supported; aspec runs decoder-only models"
COUNTS = "it counts positions itself, and not those that its forward is given"
STATEFUL = "it keeps recurrent state in a form that cannot be rolled back when a proposal is refused"

REFUSED_KEYS: Mapping[str, str] = MappingProxyType(
    {
        "is_encoder_decoder": ENCODER,
        "alibi": "positions as an attention bias (alibi) are not supported",
        "use_bidirectional_attention": "attention to later tokens is not supported",
        "add_cross_attention": "cross attention is not supported",
    }
)
"""Config keys that, when true, change the maths in a way the driver does not support: key -> reason and remedy."""


ALIASES: Mapping[str, str] = MappingProxyType({"kimi_k2": "deepseek_v3"})
"""Types that only their publishers' code knows -> the type of transformers that is the same model."""

HARMLESS: Mapping[str, object] = MappingProxyType({"use_bidirectional_attention": "vision"})  # image tokens only
"""Values of refused keys that do not change the maths of text."""


@dataclass(frozen=True, slots=True)
class Family:
    """Differences from the generic driver for one ``model_type``.

    transformers' default for experts is "grouped_mm". Measured, CPU ms on one Zen 4 thread, 64 experts of
    [256, 512], 8 per token, bf16, T = 1 / 8 / 64: grouped_mm 1.3 / 7.4 / 13.0, eager 1.3 / 9.4 / 19.0.
    """

    refused: str | None = None  # reason and remedy; None: supported
    experts: str | None = None  # implementation of experts; None: transformers' default
    text_class: bool = False  # of a model with towers: its class of text alone, because the whole cannot run on text
    own_attention: bool = False  # its layers attend by code of their own, which adds the mask to the scores
    biased: bool = False  # its configuration may ask for positions as a bias (alibi), which its layers take
    own_cache: bool = False  # told to use a cache, it takes none but that of its own class


FAMILIES: Mapping[str, Family] = MappingProxyType(
    {
        **dict.fromkeys(
            ("bloom", "gpt_neo", "gpt_neox_japanese", "megatron-bert", "rembert", "xglm"),
            Family(own_attention=True),
        ),
        "mpt": Family(refused="its positions are an attention bias (alibi) that all rows of a pass share"),
        "big_bird": Family(refused="how its layers attend depends on the length of the text"),
        "roformer": Family(refused=COUNTS),
        "trocr": Family(refused=ENCODER),
        "jetmoe": Family(refused="its experts of attention share tokens out by values that a probe does not have"),
        "falcon": Family(own_attention=True, biased=True),
        "xlm": Family(refused="its layers are parallel lists, not modules that run one after another"),
        "zamba": Family(refused="its layers share weights"),
        "zamba2": Family(refused="its layers share weights"),
        "longcat_flash": Family(refused="each of its layers consists of two layers with two caches"),
        "kosmos-2.5": Family(refused=COUNTS),
        "llama4": Family(text_class=True),
        "minimax": Family(own_cache=True),
        "shieldgemma2": Family(refused="it classifies images"),
    }
)


def family_of(model_type: str) -> Family:
    """The row of a family; the default row where the table has none."""
    return FAMILIES.get(model_type, Family())

"""Default sampling parameters: the user's, otherwise the checkpoint's, otherwise greedy.

``FIELDS`` says of every field of transformers' GenerationConfig how a checkpoint's value is treated: it is applied, it
does not change the text, or it is refused by its name.
"""

import reprlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from aspec.errors import CheckpointError, PromptError
from aspec.generation.params import SamplingParams

FROM_CONFIG = "_from_model_config"  # as ``models.model`` marks defaults of config.json
MOST_TEXTS = 3  # that a summary names


@dataclass(frozen=True, slots=True)
class Applied:
    """A field that is applied, as a field of SamplingParams."""

    name: str | None = None  # in SamplingParams; None: the same
    sampled_only: bool = False  # greedy text does not read it


@dataclass(frozen=True, slots=True)
class Unused:
    """A field that does not change the text."""

    why: str


@dataclass(frozen=True, slots=True)
class Refused:
    """A field that changes the text in a way that aspec does not know."""

    what: str
    harmless: Callable[[Any], bool] = lambda value: not value  # values that do not change the text


def _at_most_one(value: Any) -> bool:
    return value is None or value in (0, 1)


BEAMS = Refused("beam search", _at_most_one)
DRAFTS = Unused("it says how tokens are proposed; the target draws each of them")
CACHE = Unused("it says how keys and values are kept; aspec keeps them unchanged")
OUTPUT = Unused("it says what else is returned")
SPEED = Unused("it says how fast, not which")
BEAMS_ONLY = Unused("it is read by beam search, which is refused")
ENCODER = Unused("it is read by encoder-decoder models")
NOTE = Unused("it is a note")
WARPER = Applied(sampled_only=True)

FIELDS: Mapping[str, Applied | Unused | Refused] = {
    "do_sample": Unused("``sampling_params`` reads it: without it the temperature is 0"),
    "eos_token_id": Unused("the model reads it: these tokens end a text"),
    "stop_strings": Applied("stop"),
    "max_new_tokens": Applied(),
    "max_length": Applied(),
    **dict.fromkeys(("temperature", "top_h", "top_k", "top_p", "min_p"), WARPER),
    **dict.fromkeys(("typical_p", "epsilon_cutoff", "eta_cutoff"), WARPER),
    **dict.fromkeys(("min_length", "min_new_tokens", "repetition_penalty", "encoder_repetition_penalty"), Applied()),
    **dict.fromkeys(("no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "bad_words_ids"), Applied()),
    **dict.fromkeys(("suppress_tokens", "begin_suppress_tokens", "sequence_bias"), Applied()),
    **dict.fromkeys(("forced_bos_token_id", "forced_eos_token_id"), Applied()),
    "exponential_decay_length_penalty": Applied(),
    "renormalize_logits": Unused("it subtracts one number from all logits of a position"),
    "remove_invalid_values": Unused("logits that are not numbers end the request with an error"),
    **dict.fromkeys(("num_beams", "num_beam_groups"), BEAMS),
    "num_return_sequences": Refused("several texts for one prompt", _at_most_one),
    "penalty_alpha": Refused("contrastive search"),
    "dola_layers": Refused("decoding by contrasting layers"),
    "guidance_scale": Refused("classifier-free guidance", _at_most_one),
    "constraints": Refused("constrained beam search"),
    "force_words_ids": Refused("constrained beam search"),
    "watermarking_config": Refused("a watermark"),
    "token_healing": Refused("token healing"),
    "max_time": Refused("a text that the clock ends"),
    "cache_implementation": Refused("a quantised cache", lambda value: value != "quantized"),
    **dict.fromkeys(("length_penalty", "early_stopping", "diversity_penalty", "low_memory"), BEAMS_ONLY),
    **dict.fromkeys(("use_mtp", "prompt_lookup_num_tokens", "max_matching_ngram_size", "speculation_type"), DRAFTS),
    **dict.fromkeys(("is_assistant", "num_assistant_tokens", "num_assistant_tokens_schedule"), DRAFTS),
    **dict.fromkeys(("assistant_confidence_threshold", "assistant_early_exit", "assistant_lookbehind"), DRAFTS),
    **dict.fromkeys(("target_lookbehind", "assistant_ensemble_weight"), DRAFTS),
    **dict.fromkeys(("use_cache", "cache_config", "max_cache_len"), CACHE),
    **dict.fromkeys(("output_attentions", "output_hidden_states", "output_scores", "output_logits"), OUTPUT),
    "return_dict_in_generate": OUTPUT,
    **dict.fromkeys(("compile_config", "disable_compile", "continuous_batching_config", "prefill_chunk_size"), SPEED),
    "decoder_start_token_id": ENCODER,
    "pad_token_id": Unused("rows are not padded with tokens"),
    "bos_token_id": Unused("the tokenizer puts it before a prompt"),
    **dict.fromkeys((FROM_CONFIG, "transformers_version"), NOTE),
}
"""Every field of GenerationConfig in the versions of transformers that aspec takes; its ``generate`` reads no other."""


def sampling_params(
    defaults: Mapping[str, Any], given: Mapping[str, Any], max_new_tokens: int = SamplingParams().max_new_tokens
) -> SamplingParams:
    """Values of the user first, then of generation_config.json (``defaults``), then greedy; None means not given.

    ``max_new_tokens``: the limit if neither says. Raises PromptError for a value of the user that is not valid, and
    CheckpointError for one of the checkpoint that is not valid or not supported.
    """
    return SamplingParams(
        **{
            "max_new_tokens": max_new_tokens,
            **from_checkpoint(defaults, given),
            **{name: value for name, value in given.items() if value is not None},
        }
    )


def from_checkpoint(defaults: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of SamplingParams that are taken from generation_config.json, beside those ``given`` by the user.

    A temperature alone does not make text sampled: ``do_sample`` does. Raises CheckpointError as ``sampling_params``.
    """
    taken: dict[str, Any] = {}
    for name, value in defaults.items():
        field = FIELDS.get(name)
        if isinstance(field, Refused) and not field.harmless(value):
            raise CheckpointError(
                f"{source(defaults)} asks for {field.what} ({name} = {reprlib.repr(value)}), which is not supported: "
                f"the text would be another one. Remove {name} from the file to generate without it."
            )
        if isinstance(field, Applied) and value is not None:
            taken[field.name or name] = value
    sampled = bool(defaults.get("do_sample"))
    taken["temperature"] = taken.get("temperature", 1.0) if sampled else 0.0
    if "max_new_tokens" in taken or given.get("max_new_tokens") is not None:
        taken.pop("max_length", None)  # as in transformers: the number of new tokens has precedence
    taken = {name: value for name, value in taken.items() if given.get(name) is None}
    for name, value in taken.items():
        try:
            SamplingParams(**{name: value})
        except PromptError as error:
            reason = str(error).partition(" Change it")[0]
            raise CheckpointError(
                f"{source(defaults)}: {reason} Correct or remove it, or give another value."
            ) from error
    return taken


def source(defaults: Mapping[str, Any]) -> str:
    """The name of the file that holds the defaults; older checkpoints have them in config.json."""
    return "config.json" if defaults.get(FROM_CONFIG) else "generation_config.json"


def describe(defaults: Mapping[str, Any], given: Mapping[str, Any]) -> str | None:
    """One line: the values of generation_config.json that change the text; None if none does."""
    params, taken = sampling_params(defaults, given), from_checkpoint(defaults, given)
    if params.temperature == 0:
        sampled_only = {name for name, field in FIELDS.items() if field is WARPER}
        taken = {name: value for name, value in taken.items() if name not in sampled_only}
    off = SamplingParams()
    words = [_in_words(name, getattr(params, name)) for name in taken if getattr(params, name) != getattr(off, name)]
    return f"from {source(defaults)}: {', '.join(words)}" if words else None


def _in_words(name: str, value: Any) -> str:
    if not isinstance(value, tuple):
        return f"{name} {value}"
    texts = all(isinstance(one, str) for one in value)
    return f"{name} {' '.join(map(repr, value))}" if texts and len(value) <= MOST_TEXTS else f"{name} of {len(value)}"

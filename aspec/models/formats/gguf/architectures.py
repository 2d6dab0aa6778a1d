"""The architectures of GGUF that aspec maps: configuration and names. A new one is a row, and often a function.

Sources: llama.cpp's conversion from transformers (``convert_hf_to_gguf.py``), read backwards, and its graphs, where a
constant of the maths is in no key. Norms of gemma are stored as weight + 1.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from aspec.io.gguf import Gguf
from aspec.models.formats.gguf.keys import Keys
from aspec.models.formats.gguf.places import (
    Form,
    as_is,
    half,
    interleaved,
    key_heads,
    one_row,
    query_heads,
    transposed,
)

Config = dict[str, Any]
Finish = Callable[[Gguf, Keys, Config], None]
"""Adds what one architecture has to a configuration."""


@dataclass(frozen=True, slots=True)
class Architecture:
    """How one value of ``general.architecture`` becomes a model of transformers."""

    model_type: str
    finish: Finish
    names: Mapping[str, str]  # of a tensor of a block, without its end -> in a layer of transformers, likewise
    forms: Mapping[str, tuple[str, Form]] = field(default_factory=dict)  # whole name -> whole name, and its form
    norm_offset: float = 0.0  # of all norms, in the file


TOP: Mapping[str, str] = MappingProxyType(
    {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
)
USED_ELSEWHERE = frozenset({"rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight"})
"""Tensors that are read for the configuration."""

ATTENTION = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
}
FEED_FORWARD = {"ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"}
QK_NORMS = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
DENSE = {**ATTENTION, **FEED_FORWARD}
FOUR_NORMS = {
    **DENSE,
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
ROUTER = {"ffn_gate_inp": "mlp.gate"}
SHARED = {f"ffn_{name}_shexp": f"mlp.shared_expert.{name}_proj" for name in ("gate", "up", "down")}
PAIRED = {  # llama.cpp rotates neighbours, transformers halves
    f"attn_{letter}.{end}": (f"self_attn.{letter}_proj.{end}", form)
    for letter, form in (("q", query_heads), ("k", key_heads))
    for end in ("weight", "bias")
}
EXPERTS = {
    "ffn_gate_exps.weight": ("mlp.experts.gate_up_proj", half(0)),
    "ffn_up_exps.weight": ("mlp.experts.gate_up_proj", half(1)),
    "ffn_gate_up_exps.weight": ("mlp.experts.gate_up_proj", as_is),
    "ffn_down_exps.weight": ("mlp.experts.down_proj", as_is),
}
GPT_OSS = {
    "attn_sinks.weight": ("self_attn.sinks", as_is),
    "ffn_gate_exps.weight": ("mlp.experts.gate_up_proj", interleaved(0)),
    "ffn_up_exps.weight": ("mlp.experts.gate_up_proj", interleaved(1)),
    "ffn_gate_exps.bias": ("mlp.experts.gate_up_proj_bias", interleaved(0)),
    "ffn_up_exps.bias": ("mlp.experts.gate_up_proj_bias", interleaved(1)),
    "ffn_down_exps.weight": ("mlp.experts.down_proj", transposed),
    "ffn_down_exps.bias": ("mlp.experts.down_proj_bias", as_is),
}


def _nothing(gguf: Gguf, keys: Keys, config: Config) -> None:
    """The common keys say all."""


def _biases(gguf: Gguf, keys: Keys, config: Config) -> None:
    config["attention_bias"] = "blk.0.attn_q.bias" in gguf.tensors
    config["mlp_bias"] = "blk.0.ffn_gate.bias" in gguf.tensors


def _llama(gguf: Gguf, keys: Keys, config: Config) -> None:
    if keys.whole("expert_count", 0, least=0):
        config["model_type"] = "mixtral"
        config["num_local_experts"] = keys.whole("expert_count")
        config["num_experts_per_tok"] = keys.whole("expert_used_count")
        keys.expect("expert_feed_forward_length", config["intermediate_size"])
        return
    keys.expect("expert_used_count", 0)
    _biases(gguf, keys, config)


def _granite(gguf: Gguf, keys: Keys, config: Config) -> None:
    _biases(gguf, keys, config)
    config["embedding_multiplier"] = keys.number("embedding_scale", 1.0)
    config["residual_multiplier"] = keys.number("residual_scale", 1.0)
    config["logits_scaling"] = keys.number("logit_scale", 1.0)
    config["attention_multiplier"] = keys.number("attention.scale", config["head_dim"] ** -0.5)


def _qwen3(gguf: Gguf, keys: Keys, config: Config) -> None:
    config["attention_bias"] = "blk.0.attn_q.bias" in gguf.tensors


def _experts(keys: Keys, config: Config) -> None:
    config["num_experts"] = keys.whole("expert_count")
    config["num_experts_per_tok"] = keys.whole("expert_used_count")
    config["moe_intermediate_size"] = keys.whole("expert_feed_forward_length")
    config |= {"decoder_sparse_step": 1, "mlp_only_layers": []}


def _qwen2moe(gguf: Gguf, keys: Keys, config: Config) -> None:
    _experts(keys, config)
    config["norm_topk_prob"] = keys.truth("expert_weights_norm", False)
    config["shared_expert_intermediate_size"] = keys.whole("expert_shared_feed_forward_length")


def _qwen3moe(gguf: Gguf, keys: Keys, config: Config) -> None:
    _experts(keys, config)
    _qwen3(gguf, keys, config)
    config["norm_topk_prob"] = keys.truth("expert_weights_norm", True)


def _gemma2(gguf: Gguf, keys: Keys, config: Config) -> None:
    config["attn_logit_softcapping"] = keys.number("attn_logit_softcapping", 50.0)
    config["final_logit_softcapping"] = keys.number("final_logit_softcapping", 30.0)
    config["sliding_window"] = keys.whole("attention.sliding_window", 4096)
    config["query_pre_attn_scalar"] = _query_scalar(config, largest=46)


def _gemma3(gguf: Gguf, keys: Keys, config: Config) -> None:
    if keys.has("final_logit_softcapping"):
        config["final_logit_softcapping"] = keys.number("final_logit_softcapping")
    config["sliding_window"] = keys.whole("attention.sliding_window")
    near_layers = keys.truths("attention.sliding_window_pattern", config["num_hidden_layers"])
    if near_layers is None:
        config["sliding_window_pattern"] = keys.whole("attention.sliding_window_pattern", 6)
    else:
        config["layer_types"] = ["sliding_attention" if one else "full_attention" for one in near_layers]
    config["query_pre_attn_scalar"] = _query_scalar(config, largest=62)
    near = {"rope_type": "default", "rope_theta": keys.number("rope.freq_base_swa", 10000.0, above=0)}
    config["rope_parameters"] = {"full_attention": config["rope_parameters"], "sliding_attention": near}


def _query_scalar(config: Config, largest: int) -> int:
    """What queries are divided by, squared: the largest model of a family has another one, known by its layers."""
    if config["num_hidden_layers"] == largest:
        return int(config["hidden_size"] // config["num_attention_heads"])
    return int(config["head_dim"])


def _phi3(gguf: Gguf, keys: Keys, config: Config) -> None:
    config["sliding_window"] = keys.whole("attention.sliding_window", 0, least=0) or None
    rope = config["rope_parameters"]
    config["original_max_position_embeddings"] = rope.get(
        "original_max_position_embeddings", config["max_position_embeddings"]
    )


def _gpt_oss(gguf: Gguf, keys: Keys, config: Config) -> None:
    config["sliding_window"] = keys.whole("attention.sliding_window")
    config["num_local_experts"] = keys.whole("expert_count")
    config["num_experts_per_tok"] = keys.whole("expert_used_count")
    config["intermediate_size"] = keys.whole("expert_feed_forward_length", config["intermediate_size"])
    config["attention_bias"] = True
    config["rope_parameters"].setdefault("truncate", False)


ARCHITECTURES: Mapping[str, Architecture] = MappingProxyType(
    {
        "llama": Architecture("llama", _llama, {**DENSE, **ROUTER}, {**PAIRED, **EXPERTS}),
        "smollm3": Architecture("smollm3", _biases, DENSE, PAIRED),
        "granite": Architecture("granite", _granite, DENSE, PAIRED),
        "qwen2": Architecture("qwen2", _nothing, DENSE),
        "qwen2moe": Architecture(
            "qwen2_moe",
            _qwen2moe,
            {**DENSE, **ROUTER, **SHARED},
            {**EXPERTS, "ffn_gate_inp_shexp.weight": ("mlp.shared_expert_gate.weight", one_row)},
        ),
        "qwen3": Architecture("qwen3", _qwen3, {**DENSE, **QK_NORMS}),
        "qwen3moe": Architecture("qwen3_moe", _qwen3moe, {**DENSE, **ROUTER, **QK_NORMS}, EXPERTS),
        "gemma": Architecture("gemma", _nothing, DENSE, norm_offset=1.0),
        "gemma2": Architecture("gemma2", _gemma2, FOUR_NORMS, norm_offset=1.0),
        "gemma3": Architecture("gemma3_text", _gemma3, {**FOUR_NORMS, **QK_NORMS}, norm_offset=1.0),
        "phi3": Architecture(
            "phi3", _phi3, {**ATTENTION, "attn_qkv": "self_attn.qkv_proj", **FEED_FORWARD, "ffn_up": "mlp.gate_up_proj"}
        ),
        "gpt-oss": Architecture(
            "gpt_oss",
            _gpt_oss,
            {**ATTENTION, "post_attention_norm": "post_attention_layernorm", "ffn_gate_inp": "mlp.router"},
            GPT_OSS,
        ),
    }
)

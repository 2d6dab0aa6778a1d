"""Tiny models of transformers as GGUF files: written by gguf-py, as llama.cpp's convert_hf_to_gguf does it.

The names are gguf-py's own table; the orders and offsets of elements are the conversion's, in the direction that
aspec's mapping reads backwards.
"""

import gguf
import numpy as np
import torch
import transformers as T
from gguf import GGMLQuantizationType as Type
from transformers import AutoModelForCausalLM

from tests import tiny

TOKENS = ["<unk>", "<s>", "</s>", *(f"t{index}" for index in range(253))]
COMMON = {**tiny.COMMON, "num_hidden_layers": 3}
LLAMA3 = dict(rope_type="llama3", rope_theta=5e5, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0)
YARN = dict(rope_type="yarn", rope_theta=1e4, factor=4.0, original_max_position_embeddings=64)
LONG = [1.0 + index / 4 for index in range(8)]
PHI = dict(rope_type="longrope", short_factor=LONG, long_factor=[2 * one for one in LONG], rope_theta=1e4)
GPT_OSS = dict(rope_type="yarn", factor=8.0, beta_fast=32.0, beta_slow=1.0, truncate=False, rope_theta=150000.0)
GEMMA = dict(
    full_attention=dict(rope_type="linear", factor=8.0, rope_theta=1e6),
    sliding_attention=dict(rope_type="default", rope_theta=1e4),
)

MODELS = {
    "llama": lambda: T.LlamaConfig(**COMMON),
    "llama, llama3 rope, tied, biases": lambda: T.LlamaConfig(
        **COMMON,
        attention_bias=True,
        mlp_bias=True,
        tie_word_embeddings=True,
        rope_parameters={**LLAMA3, "original_max_position_embeddings": 8192},
        head_dim=32,
    ),
    "mixtral": lambda: T.MixtralConfig(**COMMON, num_local_experts=4, num_experts_per_tok=2),
    "smollm3": lambda: T.SmolLM3Config(**{**COMMON, "num_hidden_layers": 5}),
    "granite": lambda: T.GraniteConfig(
        **COMMON, embedding_multiplier=12.0, residual_multiplier=0.22, logits_scaling=8.0, attention_multiplier=0.0625
    ),
    "qwen2": lambda: T.Qwen2Config(**COMMON, rope_parameters=YARN),
    "qwen2moe": lambda: T.Qwen2MoeConfig(
        **COMMON, moe_intermediate_size=32, num_experts=4, num_experts_per_tok=2, shared_expert_intermediate_size=64
    ),
    "qwen3": lambda: T.Qwen3Config(**COMMON, head_dim=32),
    "qwen3moe": lambda: T.Qwen3MoeConfig(
        **COMMON, head_dim=32, moe_intermediate_size=32, num_experts=4, num_experts_per_tok=2, norm_topk_prob=True
    ),
    "gemma": lambda: T.GemmaConfig(**COMMON, head_dim=32),
    "gemma2": lambda: T.Gemma2Config(**COMMON, head_dim=32, query_pre_attn_scalar=32, sliding_window=8),
    "gemma3": lambda: T.Gemma3TextConfig(
        **{**COMMON, "num_hidden_layers": 7},
        head_dim=32,
        query_pre_attn_scalar=32,
        sliding_window=8,
        rope_parameters=GEMMA,
    ),
    "phi3": lambda: T.Phi3Config(**COMMON, original_max_position_embeddings=64, rope_parameters=PHI),
    "gpt-oss": lambda: T.GptOssConfig(
        **COMMON,
        head_dim=16,
        num_local_experts=4,
        num_experts_per_tok=2,
        sliding_window=8,
        rope_parameters={**GPT_OSS, "original_max_position_embeddings": 64},
    ),
}
"""A configuration of every architecture, and of what changes the positions."""

ARCHITECTURE = {"mixtral": "llama", "llama, llama3 rope, tied, biases": "llama"}


def tiny_model(name, **sizes):
    """The model, in fp32, with norms that are not all one."""
    torch.manual_seed(len(name))
    config = tiny.resized(MODELS[name](), **sizes) if sizes else MODELS[name]()
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.05 + (1.0 if parameter.dim() == 1 else 0.0))
    return model


def architecture(name):
    return ARCHITECTURE.get(name, name)


def write_model(path, name, model, kind=Type.F32, pack=gguf.quants.quantize):
    """Write a model; matrices of whole blocks are quantised as ``kind``, or as ``pack`` does it."""
    config, arch = model.config, architecture(name)
    writer = gguf.GGUFWriter(path, arch)
    write_keys(writer, arch, config)
    write_tokenizer(writer)
    number = next(number for number, text in gguf.MODEL_ARCH_NAMES.items() if text == arch)
    names = gguf.get_tensor_name_map(number, config.num_hidden_layers)
    tied = set(model.all_tied_weights_keys or {})
    for parameter, tensor in model.state_dict().items():
        if parameter not in tied:
            for stored, values in converted(arch, config, parameter, tensor.float()):
                stem, _, end = (
                    stored.rpartition(".") if stored.endswith((".weight", ".bias")) else (stored, "", "weight")
                )
                target = names.get_name(stem) or names.get_name(stored)
                assert target is not None, stored
                add(writer, f"{target}.{end}", values, kind, pack)
    for extra, values in extra_tensors(config):
        writer.add_tensor(extra, np.array(values, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def add(writer, name, values, kind, pack):
    values = values.contiguous().numpy()
    own = kind if values.ndim > 1 and "ffn_gate_inp" not in name else Type.F32  # as llama.cpp's rules have it
    raw = pack(values, own) if own != Type.F32 else values
    writer.add_tensor(name, raw, raw_dtype=Type.F32 if raw.dtype == np.float32 else own)


def write_keys(writer, arch, config):
    rope = config.rope_parameters
    near, rope = rope.get("sliding_attention"), rope.get("full_attention", rope)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    writer.add_file_type(0)
    if getattr(config, "head_dim", None):
        writer.add_key_length(config.head_dim)
        writer.add_value_length(config.head_dim)
    for name, put in (
        ("num_experts", writer.add_expert_count),
        ("num_local_experts", writer.add_expert_count),
        ("num_experts_per_tok", writer.add_expert_used_count),
        ("moe_intermediate_size", writer.add_expert_feed_forward_length),
        ("shared_expert_intermediate_size", writer.add_expert_shared_feed_forward_length),
        ("attn_logit_softcapping", writer.add_attn_logit_softcapping),
        ("final_logit_softcapping", writer.add_final_logit_softcapping),
        ("embedding_multiplier", writer.add_embedding_scale),
        ("residual_multiplier", writer.add_residual_scale),
        ("logits_scaling", writer.add_logit_scale),
        ("attention_multiplier", writer.add_attention_scale),
    ):
        if vars(config).get(name):
            put(vars(config)[name])
    if arch in ("gemma2", "gemma3", "gpt-oss"):
        writer.add_sliding_window(config.sliding_window)
    if arch == "gpt-oss":
        writer.add_expert_feed_forward_length(config.intermediate_size)
    if arch == "phi3":
        writer.add_sliding_window(config.sliding_window or 0)
        writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
        writer.add_rope_scaling_orig_ctx_len(config.original_max_position_embeddings)
        writer.add_rope_scaling_attn_factors(1.1547005383792515)  # sqrt(1 + log(4) / log(64))
    if rope["rope_type"] == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    if rope["rope_type"] == "yarn":
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(rope["factor"])
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
        if "beta_fast" in rope:
            writer.add_rope_scaling_yarn_beta_fast(rope["beta_fast"])
            writer.add_rope_scaling_yarn_beta_slow(rope["beta_slow"])
    assert near is None or near["rope_theta"] == 1e4, "llama.cpp's constant"


def write_tokenizer(writer):
    writer.add_tokenizer_model("llama")
    writer.add_token_list(TOKENS)
    writer.add_token_scores([-float(index) for index in range(256)])
    writer.add_token_types([2, 3, 3, *[1] * 253])
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)


def converted(arch, config, name, tensor):
    """Names and elements as the conversion hands them to gguf-py's table."""
    heads, key_heads = config.num_attention_heads, config.num_key_value_heads
    if arch in ("llama", "smollm3", "granite") and "q_proj" in name:
        tensor = paired(tensor, heads)
    if arch in ("llama", "smollm3", "granite") and "k_proj" in name:
        tensor = paired(tensor, key_heads)
    if arch.startswith("gemma") and name.endswith("norm.weight"):
        tensor = tensor + 1
    if name.endswith("shared_expert_gate.weight"):
        tensor = tensor[0]
    if name.endswith("experts.gate_up_proj_bias") or (arch == "gpt-oss" and name.endswith("experts.gate_up_proj")):
        end = ".bias" if name.endswith("_bias") else ".weight"
        tensor = tensor if name.endswith("_bias") else tensor.transpose(1, 2)
        stem = name.removesuffix("_bias").removesuffix("gate_up_proj")
        return [(f"{stem}{part}_proj{end}", tensor[:, number::2]) for number, part in enumerate(("gate", "up"))]
    if name.endswith("experts.gate_up_proj"):
        stem = name.removesuffix("gate_up_proj")
        return [
            (f"{stem}{part}_proj.weight", half) for part, half in zip(("gate", "up"), tensor.chunk(2, 1), strict=True)
        ]
    if arch == "gpt-oss" and name.endswith("experts.down_proj"):
        tensor = tensor.transpose(1, 2)
    if name.endswith("experts.down_proj"):
        return [(f"{name}.weight", tensor)]
    if name.endswith("down_proj_bias"):
        return [(name.replace("_bias", ".bias"), tensor)]
    return [(name, tensor)]


def paired(tensor, heads):
    """LlamaModel.permute of llama.cpp's conversion."""
    return (
        tensor.reshape(heads, 2, tensor.shape[0] // heads // 2, *tensor.shape[1:]).swapaxes(1, 2).reshape(tensor.shape)
    )


def extra_tensors(config):
    rope = config.rope_parameters
    if rope.get("rope_type") == "longrope":
        yield "rope_factors_long.weight", rope["long_factor"]
        yield "rope_factors_short.weight", rope["short_factor"]
    if rope.get("rope_type") == "llama3":
        plain = T.LlamaConfig(
            **{
                **COMMON,
                "rope_parameters": {"rope_theta": rope["rope_theta"], "rope_type": "default"},
                "head_dim": config.head_dim,
            }
        )
        one, other = (AutoModelForCausalLM.from_config(each).model.rotary_emb.inv_freq for each in (plain, config))
        yield "rope_freqs.weight", (one / other).tolist()

"""Tiny configurations of every family of transformers, for ``families.py``.

A default configuration is shrunk key by key: layers about 64 wide, and few of them, but every kind of layer at least
once. Where that is not enough, a row of ``ROWS`` sets keys. Towers for images and sounds become one layer.
"""

import copy
from collections.abc import Mapping
from typing import Any

import transformers
from transformers import CONFIG_MAPPING, PreTrainedConfig

VOCAB = 256
FEWEST_LAYERS = 4

_SMALL = {
    VOCAB: "vocab_size vocab_size_per_layer_input encoder_vocab_size unpadded_vocab_size max_position_embeddings"
    " n_positions max_seq_len n_ctx model_max_length context_length max_target_positions"
    " original_max_position_embeddings",
    200: "ngram_vocab_size_base",
    128: "mamba_d_ssm",
    96: "intermediate_size ffn_dim d_inner dff dim_ff ffn_hidden_size prefix_dense_intermediate_size d_ff"
    " intermediate_size_mlp dense_intermediate_size feed_forward_size decoder_ffn_dim encoder_ffn_dim",
    64: "hidden_size n_embd d_model embedding_size emb_dim embed_dim embedding_dim word_embed_proj_dim"
    " input_embedding_size output_embedding_size attention_hidden_size lru_width rel_extent max_source_positions"
    " encoder_hash_byte_group_vocab index_n_heads",
    48: "shared_expert_intermediate_size shared_intermediate_size shared_experts_intermediate_size"
    " moe_shared_expert_intermediate_size",
    32: "expert_ffn_hidden_size moe_intermediate_size moe_hidden_size share_expert_dim expert_dim hidden_size_encoder"
    " dim_model_base pronunciation_vocab_size shape_vocab_size",
    24: "q_lora_rank qk_head_dim",
    16: "head_dim swa_head_dim dim_head d_head d_kv kv_channels global_head_dim attention_head_size attention_head_dim"
    " kv_lora_rank qk_nope_head_dim v_head_dim o_lora_rank index_head_dim indexer_head_dim linear_key_head_dim"
    " linear_value_head_dim linear_head_dim mamba_d_state mamba_d_head mamba_head_dim ssm_state_size state_size"
    " mamba_headdim attention_chunk_size keep_window_size hidden_size_per_layer_input hc_lowrank ple_embed_dim"
    " router_hidden_size pronunciation_embed_dim shape_embed_dim",
    8: "rotary_dim qk_rope_head_dim index_topk indexer_budget mamba_n_heads mamba_chunk_size mamba_num_heads"
    " mamba_dt_rank time_step_rank chunk_size n_mamba_heads adapter_rank sliding_window sliding_window_size"
    " attention_window_size window_size local_attention block_size laurel_rank make_ngram_vocab_size_divisible_by"
    " gated_norm_rank loop_gate_rank d_rel num_buckets",
    4: "num_attention_heads n_head n_heads num_heads attention_heads decoder_attention_heads encoder_attention_heads"
    " swa_num_attention_heads num_sliding_attention_heads num_decoder_attention_heads num_encoder_attention_heads"
    " num_kv_heads num_hidden_layers n_layer n_layers num_layers decoder_layers num_decoder_layers layers num_blocks"
    " num_experts num_local_experts n_routed_experts moe_num_experts index_block_size index_topk_blocks"
    " index_kpool indexer_n_heads indexer_compress_ratio linear_num_value_heads linear_num_heads"
    " linear_conv_kernel_dim short_conv_kernel_size mamba_d_conv split_ngram_parts prompt_length",
    3: "moe_layer_end_index",
    2: "num_key_value_heads swa_num_key_value_heads num_query_groups encoder_layers num_encoder_layers"
    " num_experts_per_tok num_experts_per_token moe_topk moe_k top_k_experts zero_expert_num o_groups indexer_kv_heads"
    " linear_num_key_heads mamba_expand expand num_kv_shared_layers heads_per_ngram layer_group_size"
    " attn_layer_period expert_layer_period n_layers_per_attn_res_block",
    1: "n_group topk_group num_expert_group n_shared_experts num_shared_experts moe_num_shared_experts"
    " first_k_dense_replace num_dense_layers moe_layer_start_index mamba_n_groups n_groups attn_layer_offset"
    " expert_layer_offset",
}
SIZES: Mapping[str, int] = {key: size for size, keys in _SMALL.items() for key in keys.split()}
"""The small value of a key, where the default has a larger one. With few heads an indexer's scores tie at zero."""

TOWER: Mapping[str, Any] = {
    "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "depth": 1, "num_heads": 2,
    "num_attention_heads": 2,
    "embed_dim": 32, "out_hidden_size": 64, "image_size": 28, "patch_size": 14, "in_channels": 3, "num_channels": 3,
    "spatial_merge_size": 2, "temporal_patch_size": 2, "window_size": 28, "projection_dim": 32,
    "num_position_embeddings": 16,
    "deepstack_visual_indexes": [0], "fullatt_block_indexes": [0], "mm_hidden_size": 64, "text_hidden_size": 64,
    "init_pos_emb_height": 4, "init_pos_emb_width": 4, "init_pos_emb_time": 1, "merge_kernel_size": [2, 2],
    "vt_hidden_size": 32,
    "vt_intermediate_size": 32, "vt_num_hidden_layers": 1, "vt_num_attention_heads": 2, "encoder_layers": 1,
    "num_layers": 1,
    "encoder_attention_heads": 2, "encoder_ffn_dim": 32, "d_model": 32, "num_key_value_heads": 2, "mlp_ratio": 2,
    "head_dim": 16,
    "num_blocks": 1, "conv_depths": [1], "layers": 1, "hidden_dim": 32, "vision_output_dim": 32,
    "projection_input_dim": 32,
    "max_position_embeddings": 64, "embed_dims": 32,
}  # fmt: skip
"""Keys of towers."""

FULL, SLIDE, LINEAR, HYBRID = "full_attention", "sliding_attention", "linear_attention", "hybrid"
ROPE = {"rope_type": "default", "rope_theta": 10000.0}
GEMMA: Mapping[str, Any] = {
    "hidden_size_per_layer_input": 16, "vocab_size_per_layer_input": VOCAB, "num_hidden_layers": 6,
    "num_kv_shared_layers": 2,
    "layer_types": [SLIDE, SLIDE, FULL] * 2,
}  # fmt: skip
WIDE_LAYERS = {"02": {"head_dim": 32}, "05": {"head_dim": 32}}  # of Gemma 4, where all tokens are attended to
ZAMBA: Mapping[str, Any] = {
    "num_hidden_layers": 6, "layers_block_type": [LINEAR, LINEAR, HYBRID, LINEAR, HYBRID, LINEAR],
    "attention_hidden_size": 128,
    "attention_head_dim": 32,
}  # fmt: skip
DECODERS = (
    "bert bert-generation big_bird camembert data2vec-text electra ernie megatron-bert rembert roberta"
    " roberta-prelayernorm roc_bert roformer xlm-roberta xlm-roberta-xl xmod reformer"
)
ROWS: dict[str, dict[str, Any]] = {
    **{model_type: {"is_decoder": True} for model_type in DECODERS.split()},
    "bamba": {"attn_layer_indices": [1, 3]},
    "cohere_compass_text": {"rope_parameters": {FULL: ROPE, SLIDE: ROPE}, "layer_types": [SLIDE, FULL] * 2},
    "dbrx": {"attn_config": {"kv_n_heads": 2, "clip_qkv": 8, "rope_theta": 10000.0}, "pad_token_id": None,
                 "ffn_config": {"ffn_hidden_size": 96, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": 64}},
    "deepseek_v2": {"n_routed_experts": 4, "num_experts_per_tok": 2},
    "deepseek_v3": {"n_routed_experts": 8, "n_group": 2},
    "dots1": {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1, "layer_types": [FULL, SLIDE] * 2},
    "dots3_note_text": {"per_layer_config": {}, "head_dim": 24},
    "falcon:alibi": {"alibi": True},
    "falcon:new": {"new_decoder_architecture": True, "num_kv_heads": 2},
    "falcon_h1": {"mamba_d_head": 16, "mamba_d_ssm": 128},
    "gemma3n_text": dict(GEMMA, intermediate_size=[96] * 6, activation_sparsity_pattern=[0.95] * 2 + [0.0] * 4),
    "gemma4_text": dict(GEMMA, per_layer_config=WIDE_LAYERS),
    "gemma4_text:moe": dict(GEMMA, per_layer_config=WIDE_LAYERS, hidden_size_per_layer_input=0, num_experts=4,
                            num_kv_shared_layers=0, enable_moe_block=True, top_k_experts=2, moe_intermediate_size=32,
                            attention_k_eq_v=True),
    "gemma4_unified_text": {"num_hidden_layers": 6, "layer_types": [SLIDE, SLIDE, FULL] * 2,
        "per_layer_config": WIDE_LAYERS},
    "glm_moe_dsa:shared": {"indexer_types": ["full", "shared"] * 2},
    "gpt2:pad": {"pad_token_id": 0},
    "granitemoehybrid": {"layer_types": [LINEAR, FULL] * 2, "mamba_d_head": 16, "num_key_value_heads": 2},
    "granitemoehybrid:attention": {"layer_types": [FULL] * 4, "mamba_d_head": 16, "num_key_value_heads": 2,
                                       "num_local_experts": 0, "position_embedding_type": "rope"},
    "hunyuan_v1_dense": {"head_dim": 16},
    "hunyuan_v1_moe": {"head_dim": 16, "num_experts": 4, "moe_topk": 2},
    "hunyuan_vl_text": {"head_dim": 16},
    "inkling_text": {"tie_word_embeddings": False},
    "inkling2_text": {"tie_word_embeddings": False},
    "inkling2_loop_text": {"tie_word_embeddings": False},
    "laguna": {"layer_types": [FULL, SLIDE, SLIDE, FULL], "num_attention_heads_per_layer": [4, 8, 8, 4]},
    "lfm2": {"layer_types": ["conv", "conv", FULL, "conv"], "full_attn_idxs": [2]},
    "lfm2_moe": {"layer_types": ["conv", "conv", FULL, "conv"]},
    "llama4_text": {"intermediate_size": 32, "interleave_moe_layer_step": 2, "num_experts_per_tok": 1,
        "moe_layers": [1, 3]},
    "mamba2": {"num_heads": 8, "head_dim": 16, "n_groups": 2},
    "mimo_v2_flash": {"head_dim": 24, "v_head_dim": 16},
    "minimax": {"head_dim": 16},
    "minimax_m3_vl_text": {"layer_types": [FULL, "minimax_m3_sparse"] * 2},
    "ministral": {"head_dim": 16, "layer_types": [SLIDE, FULL] * 2},
    "nemotron": {"num_key_value_heads": 2},
    "nemotron_h": {"n_groups": 2},
    "phi3:longrope": {"max_position_embeddings": 512, "original_max_position_embeddings": 128, "rope_parameters": {
        **ROPE, "rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [2.0] * 8,
        "original_max_position_embeddings": 128}},
    "phi4_multimodal": {
        "vision_config": {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2},
        "audio_config": {"hidden_size": 32, "intermediate_size": 32, "num_blocks": 1, "num_attention_heads": 2,
                          "nemo_conv_channels": 32, "ext_pw_out_channel": 32}},
    "qwen2:sliding": {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2,
                          "layer_types": [FULL, FULL, SLIDE, SLIDE]},
    "qwen4_exp_text": {"indexer_n_heads": 4, "indexer_kv_heads": 1, "indexer_head_dim": 16, "indexer_budget": 8,
                           "indexer_compress_ratio": 4, "ple_layer_ids": [1], "output_gate_type": "silu",
                           "eos_token_id": 2},
    "reformer": {"is_decoder": True, "axial_pos_embds": False},
    "step3p5": {"sliding_window": 8, "layer_types": [FULL, SLIDE] * 2, "rope_parameters": {FULL: ROPE,
        SLIDE: ROPE}},
    "xmod": {"is_decoder": True, "default_language": "en_XX"},
    "zamba": dict(ZAMBA),
    "zamba2": dict(ZAMBA, hybrid_layer_ids=[2, 4], n_mamba_heads=8, mamba_headdim=16),
}  # fmt: skip
"""Keys that shrinking alone does not give; a name may have a variant behind a colon."""

WHOLE_ROWS: dict[str, dict[str, Any]] = {"step3p7": {"tie_word_embeddings": False}}
"""Keys of a model with towers, beside those of its language model."""

SECTIONED = "qwen2_vl qwen2_5_vl qwen2_5_omni_thinker glm4v glm46v glm_ocr glmga paddleocr_vl glm4v_moe"
SECTIONS: Mapping[str, list[int]] = {key: [2, 3, 3] for key in SECTIONED.split()} | {"glm4v_moe": [2, 1, 1]}
"""Widths of positions in time, height and width, which fill half a head; other families shrink by their defaults."""

HELD_TOKENS = ("image", "video", "audio", "vision", "boi", "eoi", "boa")


def tiny_config(name: str) -> PreTrainedConfig:
    """The tiny configuration of a type, which may have a variant behind a colon."""
    model_type = name.partition(":")[0]
    base = CONFIG_MAPPING[model_type]()
    text = base.get_text_config(decoder=True)
    if text is base or not base.sub_configs or model_type in ROWS:
        return _shrunk(base, ROWS.get(name, {}))
    return _shrunk_whole(base, text)


def _shrunk_whole(base: PreTrainedConfig, text: PreTrainedConfig) -> PreTrainedConfig:
    """A model with towers: its language model shrunk, each tower one layer."""
    given: dict[str, Any] = {}
    for name in base.sub_configs:
        own = getattr(base, name, None)
        if own is None:
            continue
        values = own.to_dict()
        if own is text:
            small = _shrunk(own, _positions(base, own) | ROWS.get(own.model_type, {})).to_dict()
        else:
            small = {key: _like(values[key], size) for key, size in TOWER.items() if values.get(key) is not None}
        given[name] = small | {"model_type": own.model_type}
    for key, value in base.to_dict().items():
        if key.startswith(HELD_TOKENS) and key.endswith(("_id", "_index")) and isinstance(value, int):
            given[key] = VOCAB - 6
    return type(base)(**given | WHOLE_ROWS.get(base.model_type, {}))


def _like(default: Any, size: Any) -> Any:
    """A small size in the form of the default: a fraction, or one for each direction."""
    if isinstance(default, list | tuple) and not isinstance(size, list):
        return [_like(one, size) for one in default]
    return float(size) if isinstance(default, float) else size


def _positions(base: PreTrainedConfig, text: PreTrainedConfig) -> dict[str, Any]:
    """Positions in time, height and width, whose sections have the width of a small head."""
    if base.model_type not in SECTIONS:
        return {}
    rope = getattr(text, "rope_parameters", None) or {}
    row: dict[str, Any] = {"rope_parameters": {**rope, **ROPE, "mrope_section": SECTIONS[base.model_type]}}
    return row | ({"head_dim": 16} if "head_dim" in text.to_dict() else {})


def _shrunk(base: PreTrainedConfig, row: Mapping[str, Any]) -> PreTrainedConfig:
    """The same family in small."""
    default = base.to_dict()
    given: dict[str, Any] = {}
    for key, value in default.items():
        small = SIZES.get(key)
        if small is not None and isinstance(value, int) and not isinstance(value, bool) and value > 0:
            given[key] = small if key == "vocab_size" else min(small, value)
    heads, kv_heads = default.get("num_attention_heads"), default.get("num_key_value_heads")
    if kv_heads is not None and (kv_heads == heads or kv_heads == 1):
        given["num_key_value_heads"] = given.get("num_attention_heads", 4) if kv_heads == heads else 1
    given |= _layers(default, given)
    if isinstance(default.get("intermediate_size"), list):
        given["intermediate_size"] = [96] * given["num_hidden_layers"]
    if default.get("rope_parameters"):
        given["rope_parameters"] = _rope(default["rope_parameters"], given.get("head_dim", 16))
    if default.get("head_dim") and default["head_dim"] == default.get("qk_rope_head_dim"):
        given["head_dim"] = given["qk_rope_head_dim"]
    return type(base)(**given | _tokens(default) | row)


def _layers(default: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """The number of layers, and the lists with a member for each, so that every kind is there once."""
    names = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_blocks")
    name = next((name for name in names if name in given), None)
    if name is None:
        return {}
    count = default[name]
    lists = {
        key: value for key, value in default.items() if isinstance(value, list | tuple) and len(value) == count > 2
    }
    kinds = list(
        zip(*[map(str, value) for key, value in lists.items() if key.endswith(("types", "type"))], strict=True)
    )
    chosen = sorted(kinds.index(kind) for kind in set(kinds))
    chosen += [index for index in range(count) if index not in chosen][: max(0, FEWEST_LAYERS - len(chosen))]
    chosen.sort()
    return {name: len(chosen)} | {key: [value[index] for index in chosen] for key, value in lists.items()}


def _rope(rope: Mapping[str, Any], head_dim: int) -> dict[str, Any]:
    """Rotary positions for a small head: sections and factors are as wide as its half."""
    rope = copy.deepcopy(dict(rope))
    for own in (rope, *(value for value in rope.values() if isinstance(value, dict))):
        half = int(head_dim * own.get("partial_rotary_factor", 1.0)) // 2
        if section := own.get("mrope_section"):
            small = [max(1, size * half // sum(section)) for size in section]
            own["mrope_section"] = [small[0] + half - sum(small), *small[1:]]
        if own.get("original_max_position_embeddings"):
            own["original_max_position_embeddings"] = VOCAB
        for key in ("short_factor", "long_factor"):
            if own.get(key):
                own[key] = own[key][: head_dim // 2]
    return rope


def _tokens(default: Mapping[str, Any]) -> dict[str, int]:
    """Special tokens within the small vocabulary."""
    ends = ("_token_id", "_token_index", "_id")
    large = [key for key, value in default.items() if key.endswith(ends) and type(value) is int and value >= 200]
    usual = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    named = {key: token for key, token in usual.items() if default.get(key) is not None}
    return {key: 200 + index for index, key in enumerate(large)} | named


def all_types() -> dict[str, str]:
    """Every type of transformers that makes text -> ``text``, or ``image-text`` for those of its other mapping."""
    auto = transformers.models.auto.modeling_auto
    kinds = dict.fromkeys(auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES, "image-text")
    return dict.fromkeys(auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, "text") | {
        name: kind for name, kind in kinds.items() if name not in auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    }

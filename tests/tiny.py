"""Tiny random checkpoints of many families: real safetensors files that transformers itself wrote."""

import json
import os
from pathlib import Path

import torch
import transformers as T
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

VOCAB = 256
COMMON = dict(
    vocab_size=VOCAB,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=256,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
WINDOW = 8
NO_GROUPS = {k: v for k, v in COMMON.items() if k != "num_key_value_heads"}
EXPERTS = dict(num_experts_per_tok=2, moe_intermediate_size=32)
MLA = dict(
    num_key_value_heads=4,
    kv_lora_rank=16,
    q_lora_rank=24,
    qk_nope_head_dim=16,
    qk_rope_head_dim=8,
    v_head_dim=16,
    n_shared_experts=1,
    first_k_dense_replace=1,
    topk_group=1,
)

FAMILIES = {
    "llama": lambda: T.LlamaConfig(**COMMON),
    "llama_tied": lambda: T.LlamaConfig(**COMMON, tie_word_embeddings=True),
    "mistral": lambda: T.MistralConfig(**COMMON, sliding_window=WINDOW),
    "mixtral": lambda: T.MixtralConfig(**COMMON, num_local_experts=4, num_experts_per_tok=2),
    "qwen2": lambda: T.Qwen2Config(**COMMON, use_sliding_window=True, sliding_window=WINDOW, max_window_layers=2),
    "qwen2_moe": lambda: T.Qwen2MoeConfig(**COMMON, **EXPERTS, num_experts=4, shared_expert_intermediate_size=48),
    "qwen3": lambda: T.Qwen3Config(**COMMON, head_dim=16),
    "qwen3_moe": lambda: T.Qwen3MoeConfig(**COMMON, **EXPERTS, head_dim=16, num_experts=4),
    "gemma2": lambda: T.Gemma2Config(**COMMON, head_dim=16, sliding_window=WINDOW),
    "gemma3": lambda: T.Gemma3TextConfig(
        **{**COMMON, "num_hidden_layers": 6}, head_dim=16, sliding_window=WINDOW, sliding_window_pattern=3
    ),
    "phi": lambda: T.PhiConfig(**COMMON),
    "phi3": lambda: T.Phi3Config(**COMMON),
    "olmo2": lambda: T.Olmo2Config(**COMMON),
    "olmo3": lambda: T.Olmo3Config(**COMMON, sliding_window=WINDOW),
    "granite": lambda: T.GraniteConfig(
        **COMMON,
        embedding_multiplier=3.0,
        logits_scaling=2.0,
        residual_multiplier=0.5,
        attention_multiplier=0.1,
    ),
    "granitemoe": lambda: T.GraniteMoeConfig(
        **COMMON, num_local_experts=4, num_experts_per_tok=2, embedding_multiplier=3.0, logits_scaling=2.0
    ),
    "gpt_neox": lambda: T.GPTNeoXConfig(**NO_GROUPS),
    "gpt_oss": lambda: T.GptOssConfig(
        **COMMON, head_dim=16, num_local_experts=4, num_experts_per_tok=2, sliding_window=WINDOW
    ),
    "deepseek_v2": lambda: T.DeepseekV2Config(**NO_GROUPS, **EXPERTS, **MLA, head_dim=8, n_routed_experts=4, n_group=1),
    "deepseek_v3": lambda: T.DeepseekV3Config(**NO_GROUPS, **EXPERTS, **MLA, n_routed_experts=8, n_group=2),
    "gpt2": lambda: T.GPT2Config(
        vocab_size=VOCAB, n_embd=64, n_layer=4, n_head=4, n_positions=256, bos_token_id=1, eos_token_id=2
    ),
    "opt": lambda: T.OPTConfig(
        vocab_size=VOCAB,
        hidden_size=64,
        ffn_dim=96,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=256,
        word_embed_proj_dim=64,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    ),
    "starcoder2": lambda: T.Starcoder2Config(**COMMON, sliding_window=WINDOW),
    "cohere2": lambda: T.Cohere2Config(**COMMON, sliding_window=WINDOW, layer_switch=4),
    "glm4": lambda: T.Glm4Config(**COMMON, head_dim=16),
    "glm4_moe": lambda: T.Glm4MoeConfig(
        **COMMON,
        **EXPERTS,
        head_dim=16,
        n_routed_experts=4,
        n_shared_experts=1,
        first_k_dense_replace=1,
        n_group=1,
        topk_group=1,
    ),
    "smollm3": lambda: T.SmolLM3Config(**COMMON),
}

REFUSED = {
    "bloom": lambda: T.BloomConfig(vocab_size=VOCAB, hidden_size=64, n_layer=2, n_head=4),
    "mamba": lambda: T.MambaConfig(vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2),
    "qwen3_next": lambda: T.Qwen3NextConfig(**COMMON, head_dim=16),
    "t5": lambda: T.T5Config(vocab_size=VOCAB, d_model=32, num_layers=2, num_heads=2),
    "dynamic_rope": lambda: T.LlamaConfig(**COMMON, rope_parameters={"rope_type": "dynamic", "factor": 2.0}),
}


def randomise(model, seed=0):
    """Weights such that logits vary over positions and greedy text does not loop at once."""
    generator = torch.Generator().manual_seed(seed)
    scale = 0.03 if model.config.tie_word_embeddings else 0.5  # a tied head would echo a loud embedding
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
            embedding = "embed" in name or "wte" in name
            if parameter.dim() >= 2:
                parameter.copy_(noise * (scale if embedding else 0.15))
            elif "norm" in name.lower() or "ln" in name.lower():
                parameter.add_(noise * 0.1)
            else:
                parameter.copy_(noise * 0.1)
    return model


def build(folder: Path, family: str, *, dtype=torch.float32, seed=0, shard="150KB") -> Path:
    """A checkpoint of a family in several shards, with a byte-level tokenizer."""
    torch.manual_seed(seed)
    config = FAMILIES[family]()
    model = randomise(AutoModelForCausalLM.from_config(config), seed).to(dtype).eval()
    model.generation_config.do_sample = False
    model.save_pretrained(folder, max_shard_size=shard)
    save_tokenizer(folder)
    return folder


def save_tokenizer(folder: Path, merges=0) -> None:
    """256 byte tokens, no merges; token 2 ends a sequence in the models above but is a plain byte here."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={char: i for i, char in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False).save_pretrained(folder)


def noisy_copy(source: Path, folder: Path, sigma: float, seed=1) -> Path:
    """A draft: the target with relative noise on every matrix."""
    model = AutoModelForCausalLM.from_pretrained(source)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                noise = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
                parameter.add_(noise * (sigma * parameter.float().std()).to(parameter.dtype))
    model.save_pretrained(folder)
    save_tokenizer(folder)
    return folder


def reference(folder: Path, dtype=None):
    """transformers' own model with aligned parameters: mapped ones are unaligned and change the last bits."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype or "auto", experts_implementation="eager").eval()
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    return model


def read_part(part, fill=0) -> torch.Tensor:
    """A part's buffer, read plainly."""
    buffer = torch.full((part.size,), fill, dtype=torch.uint8)
    view = memoryview(buffer.numpy())
    for segment in part.segments:
        fd = os.open(segment.file, os.O_RDONLY)
        assert os.preadv(fd, [view[segment.at : segment.at + segment.nbytes]], segment.offset) == segment.nbytes
        os.close(fd)
    return buffer


def edit_config(folder: Path, **changes) -> Path:
    """Change keys of a stored config.json."""
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return folder

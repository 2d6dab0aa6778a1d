"""Tiny random checkpoints of many families: real safetensors files that transformers itself wrote."""

import dataclasses
import functools
import json
import os
from pathlib import Path

import torch
import transformers as T
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from aspec.models.weights.parts import scratch_bytes

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


def _common(model_type):
    """A configuration from the usual keys; those a family does not have, it ignores."""
    experts = dict.fromkeys(("num_experts", "num_local_experts", "moe_num_experts", "n_routed_experts"), 4)
    return T.CONFIG_MAPPING[model_type](**COMMON, **EXPERTS, **experts, head_dim=16, sliding_window=WINDOW)


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

FAMILIES |= {
    "phi3_longrope": lambda: T.Phi3Config(
        **{**COMMON, "max_position_embeddings": 512},
        original_max_position_embeddings=128,
        rope_parameters={
            "rope_type": "longrope",
            "rope_theta": 10000.0,
            "short_factor": [1.0] * 8,
            "long_factor": [2.0] * 8,
            "original_max_position_embeddings": 128,
        },
    ),
    "olmoe": lambda: T.OlmoeConfig(**COMMON, num_experts=4, num_experts_per_tok=2),
    "gemma": lambda: T.GemmaConfig(**COMMON, head_dim=16),
    "cohere": lambda: T.CohereConfig(**COMMON),
    "llama4_text": lambda: T.Llama4TextConfig(
        **{**COMMON, "intermediate_size": 32},
        head_dim=16,
        num_local_experts=4,
        num_experts_per_tok=1,
        intermediate_size_mlp=96,
        attention_chunk_size=16,
        interleave_moe_layer_step=2,
    ),
    "gemma3n_text": lambda: T.Gemma3nTextConfig(
        **{**COMMON, "num_hidden_layers": 6, "intermediate_size": [96] * 6},
        head_dim=16,
        sliding_window=WINDOW,
        vocab_size_per_layer_input=VOCAB,
        hidden_size_per_layer_input=16,
        num_kv_shared_layers=2,
        activation_sparsity_pattern=[0.95] * 2 + [0.0] * 4,
        layer_types=["sliding_attention", "sliding_attention", "full_attention"] * 2,
        laurel_rank=8,
    ),
    "gemma4_text": lambda: T.Gemma4TextConfig(
        **{**COMMON, "num_hidden_layers": 6},
        head_dim=16,
        global_head_dim=16,
        sliding_window=WINDOW,
        vocab_size_per_layer_input=VOCAB,
        hidden_size_per_layer_input=16,
        num_kv_shared_layers=2,
        layer_types=["sliding_attention", "sliding_attention", "full_attention"] * 2,
    ),
}

for _name in ("apertus", "ernie4_5_moe", "exaone4", "glm", "granitemoeshared", "hunyuan_v1_dense", "minimax_m2"):
    FAMILIES[_name] = functools.partial(_common, _name)
for _name in ("nemotron", "olmo", "phimoe", "seed_oss", "vaultgemma"):
    FAMILIES[_name] = functools.partial(_common, _name)

FAMILIES |= {
    "stablelm": lambda: T.StableLmConfig(**COMMON),  # it takes a registered attention without saying so
    "biogpt": lambda: T.BioGptConfig(**COMMON),  # likewise
    "granitemoehybrid": lambda: T.GraniteMoeHybridConfig(  # a class with recurrent layers, of which this has none
        **COMMON,
        num_local_experts=4,
        num_experts_per_tok=2,
        shared_intermediate_size=48,
        layer_types=["attention"] * 4,
    ),
    "gemma4_unified_text": lambda: T.CONFIG_MAPPING["gemma4_unified_text"](  # its image tokens attend both ways
        **{**COMMON, "num_hidden_layers": 6},
        head_dim=16,
        global_head_dim=16,
        sliding_window=WINDOW,
        layer_types=["sliding_attention", "sliding_attention", "full_attention"] * 2,
    ),
}

GDN = dict(
    linear_key_head_dim=16,
    linear_value_head_dim=16,
    linear_num_key_heads=2,
    linear_num_value_heads=4,
    layer_types=["linear_attention", "full_attention"] * 2,
)
SSD = dict(mamba_n_heads=8, mamba_d_head=16, mamba_d_state=16, mamba_chunk_size=8)

STATEFUL = {
    "qwen3_next": lambda: T.Qwen3NextConfig(
        **COMMON, **EXPERTS, **GDN, head_dim=16, num_experts=4, shared_expert_intermediate_size=48
    ),
    "qwen3_5_text": lambda: T.Qwen3_5TextConfig(**COMMON, **GDN, head_dim=16),
    "kimi_linear": lambda: T.KimiLinearConfig(
        **NO_GROUPS,
        **EXPERTS,
        **MLA,
        head_dim=24,
        num_experts=4,
        linear_head_dim=16,
        linear_num_heads=4,
        layer_types=["linear_attention", "full_attention"] * 2,
    ),
    "bamba": lambda: T.BambaConfig(**COMMON, **SSD, attn_layer_indices=[1, 3]),
    "falcon_h1": lambda: T.FalconH1Config(**COMMON, **SSD, mamba_d_ssm=128, head_dim=16),
    "granite_h": lambda: T.GraniteMoeHybridConfig(
        **COMMON,
        **SSD,
        num_local_experts=4,
        num_experts_per_tok=2,
        shared_intermediate_size=48,
        layer_types=["mamba", "attention"] * 2,
    ),
    "nemotron_h": lambda: T.NemotronHConfig(
        **COMMON,
        **EXPERTS,
        head_dim=16,
        mamba_num_heads=8,
        mamba_head_dim=16,
        ssm_state_size=16,
        n_groups=2,
        chunk_size=8,
        n_routed_experts=4,
        moe_shared_expert_intermediate_size=48,
        layers_block_type=["mamba", "moe", "attention", "mlp"],
    ),
    "minimax": lambda: T.MiniMaxConfig(
        **COMMON, num_local_experts=2, head_dim=16, block_size=8, layer_types=["linear_attention", "full_attention"] * 2
    ),
    "mamba2": lambda: T.Mamba2Config(
        vocab_size=VOCAB, hidden_size=64, num_hidden_layers=3, num_heads=8, head_dim=16, state_size=16, n_groups=2
    ),
    "jamba": lambda: T.JambaConfig(
        **COMMON,
        num_experts=4,
        num_experts_per_tok=2,
        mamba_d_state=16,
        mamba_dt_rank=8,
        attn_layer_period=2,
        attn_layer_offset=1,
        expert_layer_period=2,
        expert_layer_offset=1,
    ),
    "mamba": lambda: T.MambaConfig(
        vocab_size=VOCAB, hidden_size=64, num_hidden_layers=3, state_size=16, time_step_rank=8, eos_token_id=2
    ),
    "lfm2": lambda: T.Lfm2Config(**COMMON, layer_types=["conv", "full_attention"] * 2),
}
"""Families with recurrent layers."""

REFUSED = {
    "mpt": lambda: T.MptConfig(vocab_size=VOCAB, d_model=64, n_layers=2, n_heads=4),
    "openai-gpt": lambda: T.OpenAIGPTConfig(vocab_size=VOCAB, n_embd=64, n_layer=2, n_head=4),
    "roformer": lambda: T.RoFormerConfig(vocab_size=VOCAB, hidden_size=64, num_hidden_layers=2, is_decoder=True),
    "musicgen": lambda: T.MusicgenConfig(
        text_encoder=T.T5Config().to_dict(),
        audio_encoder=T.EncodecConfig().to_dict(),
        decoder=T.MusicgenDecoderConfig().to_dict(),
    ),
    "recurrent_gemma": lambda: T.RecurrentGemmaConfig(**COMMON),
    "xlstm": lambda: T.xLSTMConfig(vocab_size=VOCAB, hidden_size=64, num_hidden_layers=2, num_heads=4),
    "t5": lambda: T.T5Config(vocab_size=VOCAB, d_model=32, num_layers=2, num_heads=2),
    "bert": lambda: T.BertConfig(vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, num_attention_heads=2),
    "whisper": lambda: T.WhisperConfig(vocab_size=VOCAB),
    "embedding_gemma": lambda: T.Gemma3TextConfig(**COMMON, head_dim=16, use_bidirectional_attention=True),
}


def randomise(model, seed=0, varied=False):
    """Weights such that logits vary over positions; ``varied``: so much that greedy text does not loop at once."""
    generator = torch.Generator().manual_seed(seed)
    loudness = 0.03 if varied and model.config.tie_word_embeddings else 0.5  # a tied head echoes a loud embedding
    weight = 0.15 if varied else 0.08
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
            embedding = "embed" in name or "wte" in name
            if parameter.dim() >= 2:
                parameter.copy_(noise * (loudness if embedding else weight))
            elif "norm" in name.lower() or "ln" in name.lower():
                parameter.add_(noise * 0.1)
            else:
                parameter.copy_(noise * 0.1)
    return model


def resized(config, **sizes):
    """The same family in another size; which kind each layer is follows from their number again."""
    stored = {name: value for name, value in config.to_dict().items() if not name.endswith("layer_types")}
    return type(config)(**{**stored, **sizes})


def build(folder: Path, family: str, *, dtype=torch.float32, seed=0, shards=3, varied=False, sizes=None) -> Path:
    """A checkpoint of a family in about ``shards`` shards, with a byte-level tokenizer."""
    torch.manual_seed(seed)
    config = (FAMILIES | STATEFUL)[family]()
    if sizes:
        config = resized(config, **sizes)
    model = randomise(AutoModelForCausalLM.from_config(config), seed, varied).to(dtype).eval()
    model.generation_config.do_sample = False
    total = sum(tensor.nbytes for tensor in model.parameters())
    model.save_pretrained(folder, max_shard_size=-(-total // shards))
    save_tokenizer(folder, config.vocab_size)
    return folder


def save_tokenizer(folder: Path, size: int = VOCAB) -> None:
    """256 byte tokens at most, no merges; token 2 ends a sequence in the models above but is a plain byte here."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())[:size]
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
    save_tokenizer(folder, model.config.vocab_size)
    return folder


def reference(folder: Path, dtype=None):
    """transformers' own model with aligned parameters: mapped ones are unaligned and change the last bits."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype or "auto", experts_implementation="eager").eval()
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    return model


def read_part(part, into=None) -> torch.Tensor:
    """A part's buffer, read plainly; what nothing is read into is filled with ones, which are NaN."""
    buffer = torch.empty(part.size, dtype=torch.uint8) if into is None else into
    buffer.fill_(255)
    view = memoryview(buffer.numpy())
    for segment in part.segments:
        fd = os.open(segment.file, os.O_RDONLY)
        assert os.preadv(fd, [view[segment.at : segment.at + segment.nbytes]], segment.offset) == segment.nbytes
        os.close(fd)
    return buffer


def bound(model) -> dict[str, torch.Tensor]:
    """Every parameter of a model as it is bound, by its name in transformers."""
    found, held = {}, []
    for part in model.parts(40_000):
        buffer, scratch = read_part(part), torch.empty(part.scratch_bytes, dtype=torch.uint8)
        model.bind(dataclasses.replace(part, scratch_at=0), buffer, scratch)
        held.append((buffer, scratch))
    modules = {f"{model._layers_name}.{index}.": module for index, module in enumerate(model.layer_modules)}
    for prefix, module in {"": model._frame, **modules}.items():
        for name, tensor in module.named_parameters():
            if not tensor.is_meta:
                found[prefix + name] = tensor.detach().clone()
    return found


class Streamed:
    """A model whose parts go through a few slots, poisoned between uses; everything in this thread."""

    def __init__(self, model, max_part_bytes=40_000):
        self.model, self.parts = model, model.parts(max_part_bytes)
        self.resident = []  # buffers that must live as long as their bindings
        for part in self.of(-1):
            buffer, scratch = read_part(part), torch.empty(part.scratch_bytes, dtype=torch.uint8)
            model.bind(part, buffer, scratch)
            self.resident += [buffer, scratch]
        most = max(len(self.of(layer)) for layer in range(model.num_layers))
        size = max(part.size for part in self.parts if part.layer >= 0)
        self.slots = [torch.empty(size, dtype=torch.uint8) for _ in range(most + 1)]
        self.scratch = torch.empty(scratch_bytes(self.parts), dtype=torch.uint8)
        self.used = 0  # slots used so far: the next one is this modulo their number

    def of(self, layer):
        """The parts of a layer."""
        return [part for part in self.parts if part.layer == layer]

    def load(self, layer):
        """Read and bind a layer's parts into the next slots."""
        self.scratch.fill_(255)
        for part in self.of(layer):
            slot = self.slots[self.used % len(self.slots)]
            self.used += 1
            self.model.bind(part, read_part(part, slot), self.scratch)

    @torch.inference_mode()
    def run(self, *items):
        """Logits of every (ids, step), all of which go through a layer before the next is loaded."""
        activations = [self.model.embed(ids, step) for ids, step in items]
        for layer in range(self.model.num_layers):
            self.load(layer)
            for activation in activations:
                self.model.layer(layer, activation)
            for part in self.of(layer):
                self.model.unbind(part)
        return [self.model.head(activation) for activation in activations]


def pad(rows) -> torch.Tensor:
    """Token lists as [B, T] int64."""
    width = max(len(row) for row in rows)
    return torch.tensor([list(row) + [3] * (width - len(row)) for row in rows])


def edit_config(folder: Path, **changes) -> Path:
    """Change keys of a stored config.json."""
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return folder

"""A published GGUF file: its parameters, tokenizer and tokens are those that transformers' own loader makes of it."""

import asyncio

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from aspec.engine.engine import open_engine
from aspec.generation.params import SamplingParams
from aspec.generation.text.tokenizer import Tokenizer
from aspec.models.formats.gguf.folder import folder_of
from aspec.plan import Tier
from tests.test_gguf_models import state_of

TEXTS = (
    "Hello world 2024, 12345.67 tests",
    "x = 1 + 22\n\tfor i in range(100):\n\n\n    pass",
    " 3.14159 and  two  spaces, don't",
    "日本語 2023年 é ü 🙂",
    "<|im_start|>user\nHi<|im_end|>",
)


def dequantised(path):
    """The model as transformers loads it, in fp32."""
    from transformers import GgufConfig

    here = {"pretrained_model_name_or_path": path.parent, "gguf_file": path.name}
    whole = GgufConfig(dequantize=True)
    return AutoModelForCausalLM.from_pretrained(**here, quantization_config=whole, dtype=torch.float32).eval()


@pytest.mark.slow
def test_every_parameter_has_the_bits_of_transformers_own_loader(smollm2_gguf):
    pytest.importorskip("accelerate", reason="transformers needs accelerate to load a GGUF file")
    model = dequantised(smollm2_gguf)
    state = state_of(smollm2_gguf)
    expected = {name: tensor for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
    assert state.keys() == expected.keys()
    assert [name for name, tensor in state.items() if not torch.equal(tensor, expected[name])] == []
    assert model.config.tie_word_embeddings


@pytest.mark.slow
def test_the_tokenizer_is_the_one_of_transformers_own_loader(smollm2_gguf):
    """llama.cpp's rule splits digits off, transformers forgets it; the merges give the same tokens."""
    own = AutoTokenizer.from_pretrained(smollm2_gguf.parent, gguf_file=smollm2_gguf.name)
    tokenizer = Tokenizer.load(folder_of(smollm2_gguf))
    for text in TEXTS:
        assert tokenizer.encode(text) == own.encode(text)
        assert tokenizer.decode(own.encode(text)) == own.decode(own.encode(text), skip_special_tokens=True)
    messages = [{"role": "user", "content": "How many are 12 and 30?"}]
    asked = own.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert tokenizer.encode_chat(messages) == own.encode(asked, add_special_tokens=False)


PROMPTS = (
    "Why is the sky blue?",
    "def fibonacci(n):",
    "The capital of France is",
    "List three uses of a paper clip.",
    "Es war einmal ein",
)


@pytest.mark.slow
async def test_the_tokens_are_transformers_own_with_no_layer_resident(smollm2_gguf):
    """100 tokens each, in fp32, of the file as it is: every layer is read, and decoded, for every pass."""
    pytest.importorskip("accelerate", reason="transformers needs accelerate to load a GGUF file")
    tokenizer = Tokenizer.load(folder_of(smollm2_gguf))
    prompts = [tokenizer.encode(prompt) for prompt in PROMPTS]
    model = dequantised(smollm2_gguf)
    params = SamplingParams(max_new_tokens=100, ignore_eos=True)
    options = dict(target=smollm2_gguf, dtype="float32", resident_memory=0, max_context=128, max_batch=len(prompts))
    async with open_engine(**options) as engine:
        assert not [part for part in engine.plan.parts if part.layer >= 0 and part.tier is Tier.DEVICE]

        async def answer(prompt):
            return [token async for piece in engine.stream(prompt, params) for token in piece.token_ids]

        found = await asyncio.gather(*map(answer, prompts))
    model.generation_config.eos_token_id = None
    for prompt, tokens in zip(prompts, found, strict=True):
        expected = model.generate(torch.tensor([prompt]), max_new_tokens=100, do_sample=False, pad_token_id=0)
        assert tokens == expected[0, len(prompt) :].tolist()

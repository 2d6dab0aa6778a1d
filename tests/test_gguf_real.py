"""A published GGUF file: every parameter and the tokenizer are those that transformers' own loader makes of it."""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from aspec.generation.text.tokenizer import Tokenizer
from aspec.models.formats.gguf.folder import folder_of
from tests.test_gguf_models import state_of

TEXTS = (
    "Hello world 2024, 12345.67 tests",
    "x = 1 + 22\n\tfor i in range(100):\n\n\n    pass",
    " 3.14159 and  two  spaces, don't",
    "日本語 2023年 é ü 🙂",
    "<|im_start|>user\nHi<|im_end|>",
)


@pytest.mark.slow
def test_every_parameter_has_the_bits_of_transformers_own_loader(smollm2_gguf):
    pytest.importorskip("accelerate", reason="transformers needs accelerate to load a GGUF file")
    from transformers import GgufConfig

    here = {"pretrained_model_name_or_path": smollm2_gguf.parent, "gguf_file": smollm2_gguf.name}
    whole = GgufConfig(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(**here, quantization_config=whole, dtype=torch.float32)
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

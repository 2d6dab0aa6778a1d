"""The demo's training: what it reads, how it attends, and a budget that counts the process' own time."""

import math
import time

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tools import demo_corpus, demo_fit


def test_a_head_of_comments_and_tables_are_left_out():
    licence, code = "# Copyright\n" * 9 + "\n", "def main(argv):\n    return len(argv)\n"
    assert demo_corpus.clean(licence + code) == code
    assert demo_corpus.clean("#!/usr/bin/env python\n" + code) == "#!/usr/bin/env python\n" + code
    assert demo_corpus.clean("TABLE = [\n" + "    (0x17f, 0x2d, 1),\n" * 50 + "]\n") == ""


@pytest.mark.parametrize("length", [1, 63, 64, 150])
def test_attention_in_blocks_is_attention(length):
    query, key, value = (torch.randn(2, heads, length, 16, dtype=torch.float64) for heads in (8, 4, 4))
    found, _ = demo_fit.block_attention(torch.nn.Identity(), query, key, value)
    expected = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
    torch.testing.assert_close(found, expected.transpose(1, 2), rtol=1e-5, atol=1e-6)


def test_a_budget_waits_while_the_process_does():
    spent = demo_fit.cpu_budget(0.25)
    time.sleep(0.3)
    assert spent() < 0.5, "asleep, as a process that others have paused"
    while spent() < 1.0:
        math.sqrt(2.0)


def test_a_fit_warms_up_ends_its_decay_and_learns(monkeypatch):
    monkeypatch.setattr(demo_fit, "WARM_STEPS", 4)
    monkeypatch.setattr(demo_fit, "compile_layers", lambda model: None)
    torch.manual_seed(0)
    sizes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2, vocab_size=16)
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_key_value_heads=1))
    batch = torch.arange(33).remainder(7)[None]
    losses, rates, steps = [], [], 20

    def loss_of(model, batch):
        loss = model(input_ids=batch[:, :-1], labels=batch[:, :-1]).loss
        losses.append(loss.item())
        return loss

    class Watched(torch.optim.AdamW):
        def step(self):
            rates.append(self.param_groups[0]["lr"])
            super().step()

    monkeypatch.setattr(demo_fit, "make_optimizers", lambda model: [Watched(model.parameters())])
    shares = iter([step / steps for step in range(steps + 1)])
    demo_fit.fit("tiny", model, iter([batch] * (steps + 9)), lambda: next(shares), 1e-2, loss_of)
    assert len(losses) == steps
    assert losses[-1] < losses[0] / 2
    assert rates[:2] == [1e-2 / 4, 1e-2 / 2 * (1 - 1 / steps)]
    assert rates[-1] == pytest.approx(1e-2 / steps)


def test_matrices_and_tables_have_optimizers_of_their_own():
    sizes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, vocab_size=16)
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_key_value_heads=1, tie_word_embeddings=True))
    held = [
        p for optimizer in demo_fit.make_optimizers(model) for group in optimizer.param_groups for p in group["params"]
    ]
    assert sorted(map(id, held)) == sorted(map(id, model.parameters())), "each once"

"""Routers of an expanded mixture of experts, whose experts are chosen as often as a distribution says.

An expert's score is a random projection of the token's hidden state plus a share of one direction on which every
token measures about 1: that share decides how often the expert is chosen. So routes follow the text, as in trained
models: like tokens have like experts, and neighbours share some. The shares are fitted, as in training with a bias for
balance (arXiv 2408.15664), to text that the source writes itself.
"""

import math
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel

ROWS, TOKENS = 16, 160  # of the text
STEPS = 160  # of the fit
RATE = 2.0  # of a step: standard deviations of the scores per missing share of the tokens
RIDGE = 1e-3  # of the mean square of the hidden states


def expert_shares(routing: str, experts: int, top_k: int) -> torch.Tensor:
    """The share of tokens by expert, descending, [experts] fp32; their sum is `top_k`. Zipf's law, cut at 1."""
    kind, _, exponent = routing.partition(":")
    if kind not in ("uniform", "zipf") or (kind == "zipf") != bool(exponent):
        raise ValueError(f"routing is uniform or zipf:EXPONENT, asked for {routing}")
    weights = torch.arange(1, experts + 1, dtype=torch.float32) ** -float(exponent or 0)
    shares = weights * top_k / weights.sum()
    for _ in range(experts):  # what is cut off goes to the others
        free = shares < 1.0
        if not free.any() or shares.max() <= 1.0:
            break
        shares = shares.clamp(max=1.0)
        shares[free] *= (top_k - (~free).sum()) / shares[free].sum()
    return shares


@torch.inference_mode()
def write_text(model: PreTrainedModel, generator: torch.Generator) -> torch.Tensor:
    """Text that the model writes at temperature 1 after one random token, [ROWS, TOKENS] int64."""
    start = torch.randint(model.config.vocab_size, (ROWS, 1), generator=generator)
    length = {"min_new_tokens": TOKENS - 1, "max_new_tokens": TOKENS - 1, "pad_token_id": 0}
    config = GenerationConfig(do_sample=True, temperature=1.0, top_k=0, top_p=1.0, repetition_penalty=1.0, **length)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(generator.initial_seed())
        return model.generate(start, generation_config=config)


class Routers:
    """Makes the routers of one source checkpoint's expansion."""

    def __init__(self, source: Path, shares: torch.Tensor, top_k: int, generator: torch.Generator) -> None:
        self._shares, self._top_k = shares, top_k
        model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
        self._layers = model.model.layers
        self._residuals: dict[tuple[int, str], torch.Tensor] = {}
        handles = []
        for number, layer in enumerate(self._layers):
            norm = layer.post_attention_layernorm
            handles.append(norm.register_forward_pre_hook(self._keep(number, "attention")))
            handles.append(layer.register_forward_hook(self._keep(number, "mlp")))
        tokens = write_text(model, generator)
        with torch.inference_mode():
            self._residuals[0, "embedding"] = model.model.embed_tokens(tokens).flatten(0, 1)
            model(tokens, use_cache=False)
        for handle in handles:
            handle.remove()

    def _keep(self, layer: int, state: str):  # noqa: ANN202 (a hook of torch)
        """A hook that keeps the residual stream after half a layer."""

        def keep(_module, arguments, output=None) -> None:  # noqa: ANN001 (as torch calls it)
            hidden = arguments[0] if output is None else output
            hidden = hidden[0] if isinstance(hidden, tuple) else hidden
            self._residuals[layer, state] = hidden.flatten(0, 1)

        return keep

    @torch.inference_mode()
    def make(self, written: tuple[int, str], norm: int, generator: torch.Generator) -> torch.Tensor:
        """The router behind the second norm of layer `norm`, [experts, hidden]; `written`: layer and half before it."""
        hidden = self._layers[norm].post_attention_layernorm(self._residuals[written])
        num_experts, size = len(self._shares), hidden.shape[1]
        square = hidden.T @ hidden / len(hidden)
        ridge = RIDGE * float(square.diagonal().mean())
        constant = torch.linalg.solve(square + ridge * torch.eye(size), hidden.mean(0))
        random = torch.randn(num_experts, size, generator=generator)
        scores = hidden @ random.T
        random /= scores.std(0)[:, None]
        scores = scores / scores.std(0)
        beside = hidden @ constant
        wanted = self._shares[torch.randperm(num_experts, generator=generator)]
        bias, total = torch.zeros(num_experts), torch.zeros(num_experts)
        for step in range(STEPS):
            chosen = (scores + beside[:, None] * bias).topk(self._top_k).indices
            found = torch.bincount(chosen.flatten(), minlength=num_experts) / len(hidden)
            bias += RATE * (wanted - found) * math.sqrt(10 / (10 + step)) / (wanted * (1.02 - wanted)).sqrt()
            total += bias * (step >= STEPS // 2)
        return random + total[:, None] / (STEPS - STEPS // 2) * constant


def residual_writers(plan: Sequence[tuple[int, bool, bool]]) -> list[tuple[int, str]]:
    """By layer of a plan of (source layer, attention, mlp): the half that wrote last before its second norm."""
    last, found = (0, "embedding"), []
    for source, attention, mlp in plan:
        last = (source, "attention") if attention else last
        found.append(last)
        last = (source, "mlp") if mlp else last
    return found

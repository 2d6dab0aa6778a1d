"""How a model of the demo pair is trained on a CPU: losses, attention, optimizers, and a budget of CPU time."""

import functools
import itertools
import math
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch.nn import functional
from transformers import AttentionInterface, LlamaForCausalLM

SEQUENCE = 512  # of the evaluation, and of every fourth batch
SHORT = 256  # of the others: attention costs half
BATCH_TOKENS = 4096
QUERIES = 64  # of a block of attention
WARM_STEPS = 100
SCRATCH = Path(tempfile.gettempdir())  # last weights of a run that was cut short: target.pt, draft.pt
SCRATCH_EVERY_S = 300.0


def batches(tokens: torch.Tensor, batch_size: int, length: int, seed: int) -> Iterator[torch.Tensor]:
    """Endless shuffled epochs of [batch_size, length + 1] windows, int64."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        offset = int(torch.randint(length, (1,), generator=generator))
        windows = tokens[offset : offset + (len(tokens) - offset - 1) // length * length]
        starts = offset + length * torch.randperm(len(windows) // length, generator=generator)
        for group in starts.split(batch_size):
            if len(group) == batch_size:
                yield torch.stack([tokens[s : s + length + 1] for s in group.tolist()])


def mixed(tokens: torch.Tensor) -> Iterator[torch.Tensor]:
    """Three batches of short windows, then one of long ones."""
    short = batches(tokens, BATCH_TOKENS // SHORT, SHORT, seed=1)
    long = batches(tokens, BATCH_TOKENS // SEQUENCE, SEQUENCE, seed=2)
    return alternating(short, short, short, long)


def shuffled(rows: torch.Tensor, batch_size: int) -> Iterator[torch.Tensor]:
    """Endless shuffled epochs of whole rows."""
    generator = torch.Generator().manual_seed(4)
    while True:
        for group in torch.randperm(len(rows), generator=generator).split(batch_size):
            if len(group) == batch_size:
                yield rows[group]


def alternating(*streams: Iterator[torch.Tensor]) -> Iterator[torch.Tensor]:
    """A batch of each stream in turn."""
    return (next(stream) for stream in itertools.cycle(streams))


Loss = Callable[[LlamaForCausalLM, torch.Tensor], torch.Tensor]
Budget = Callable[[], float]  # the share that is spent


def cross_entropy(model: LlamaForCausalLM, batch: torch.Tensor) -> torch.Tensor:
    """Mean negative log-likelihood of the next token, nats."""
    logits = model(input_ids=batch[:, :-1], use_cache=False).logits
    return compiled(likelihood)(logits.flatten(0, 1), batch[:, 1:].flatten())


@functools.cache
def compiled(function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """A function's fused kernels, one set per shape; built where it is first used."""
    return torch.compile(function, dynamic=False)


def likelihood(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy in fp32."""
    return functional.cross_entropy(logits.float(), ids)


def divergence(logits: torch.Tensor, wanted: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """KL from the teacher's logits, plus a little cross-entropy, in fp32."""
    found, sought = logits.float().log_softmax(-1), wanted.float().log_softmax(-1)
    kl = functional.kl_div(found, sought, log_target=True, reduction="none").sum(-1).mean()
    return kl + 0.1 * functional.nll_loss(found, ids)


def distillation(teacher: LlamaForCausalLM) -> Loss:
    """KL from the teacher's distribution, plus a little cross-entropy on the text."""
    compile_layers(teacher)

    def loss(model: LlamaForCausalLM, batch: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            wanted = teacher(input_ids=batch[:, :-1], use_cache=False).logits
        logits = model(input_ids=batch[:, :-1], use_cache=False).logits
        return compiled(divergence)(logits.flatten(0, 1), wanted.flatten(0, 1), batch[:, 1:].flatten())

    return loss


def block_attention(
    module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: object, **__: object
) -> tuple[torch.Tensor, None]:
    """Causal attention, QUERIES queries at a time over the keys before their end.

    torch's fused kernel for CPUs takes half of a training step at heads of this size; plain products take a fifth less
    of the whole.
    """
    batch, heads, length, size = query.shape
    kv_heads = key.shape[1]
    grouped = query.view(batch, kv_heads, heads // kv_heads, length, size)
    parts = []
    for start in range(0, length, QUERIES):
        end = min(start + QUERIES, length)
        count = end - start
        rows = grouped[:, :, :, start:end].reshape(batch, kv_heads, -1, size)
        scores = (rows @ key[:, :, :end].transpose(-1, -2)).view(batch, kv_heads, -1, count, end)
        later = torch.ones(count, end, dtype=torch.bool).triu(start + 1)
        weights = (scores.float() / math.sqrt(size)).masked_fill(later, -math.inf).softmax(-1).to(value.dtype)
        out = weights.view(batch, kv_heads, -1, end) @ value[:, :, :end]
        parts.append(out.view(batch, heads, count, size))
    return torch.cat(parts, dim=2).transpose(1, 2), None


AttentionInterface.register("blocks", block_attention)


def compile_layers(model: LlamaForCausalLM) -> None:
    """Block attention, and one compiled layer for all: a whole model's code takes minutes to build."""
    model.set_attn_implementation("blocks")
    for layer in model.model.layers:
        layer.compile(dynamic=False)


def make_optimizers(model: LlamaForCausalLM) -> list[torch.optim.Optimizer]:
    """Muon for the layers' matrices, AdamW for tables of tokens and norms."""
    tables = [p for name, p in model.named_parameters() if p.dim() == 2 and ("embed" in name or "lm_head" in name)]
    matrices = [p for name, p in model.named_parameters() if p.dim() == 2 and all(p is not t for t in tables)]
    norms = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": tables, "weight_decay": 0.1}, {"params": norms, "weight_decay": 0.0}]
    return [
        torch.optim.Muon(matrices, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=True),
    ]


def cpu_budget(seconds: float) -> Budget:
    """Share of a budget of this process' CPU time that is spent: others may pause the process, and the rate waits."""
    begin = time.process_time()
    return lambda: (time.process_time() - begin) / seconds


def fit(
    name: str, model: LlamaForCausalLM, data: Iterator[torch.Tensor], budget: Budget, rate: float, loss_of: Loss
) -> None:
    """Warm up, then a straight line to zero over the budget; bf16 autocast. The weights go to SCRATCH now and then."""
    optimizers = make_optimizers(model)
    compile_layers(model)
    model.train()
    begin = last = saved = time.process_time()
    steps = seen = 0
    average = math.nan
    for batch in data:
        now, share = time.process_time(), budget()
        if share >= 1.0:
            break
        for group in (group for optimizer in optimizers for group in optimizer.param_groups):
            group["lr"] = rate * min(1.0, (steps + 1) / WARM_STEPS) * (1 - share)
        with torch.autocast("cpu", torch.bfloat16):
            loss = loss_of(model, batch)
        model.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        steps += 1
        seen += batch.shape[0] * (batch.shape[1] - 1)
        average = loss.item() if math.isnan(average) else 0.98 * average + 0.02 * loss.item()
        if now - last > 15:
            last = now
            speed = seen / (now - begin)
            print(f"{name} step {steps} loss {average:.3f} {speed:.0f} tok/s, {share:.0%} of the time", flush=True)
        if now - saved > SCRATCH_EVERY_S:
            saved = now
            torch.save(model.state_dict(), SCRATCH / f"{name}.pt")
    model.eval()
    print(f"{name} done: {steps} steps, {seen / 1e6:.1f} M tokens, loss {average:.3f}", flush=True)

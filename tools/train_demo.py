"""Train the embedded demo pair: a small Llama target and a draft distilled from it, on the standard library.

    python tools/train_demo.py --minutes 50          # writes aspec/demo/
    python tools/train_demo.py --draft-only --minutes 60   # goes on with the stored draft
    python tools/train_demo.py --evaluate            # measures the pair that is there

Data: the sources of the running Python's standard library without its tests, split by file into train and
held-out by a hash of the file's name. Tokenizer: byte-level BPE. The learning rate follows the elapsed share of
the time budget, so a run always ends its decay. Everything is seeded; seconds decide how many steps there are.
"""

import argparse
import hashlib
import json
import math
import os
import random
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn import functional
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

DEMO = Path(__file__).resolve().parent.parent / "aspec" / "demo"
VOCAB_SIZE = 4096
END = "<|endoftext|>"
CONTEXT = 1024
SEQUENCE = 512
NUM_PROMPTS = 20
SKIPPED = ("test", "tests", "idle_test", "site-packages", "__pycache__", "pydoc_data", "lib2to3", "encodings")
SCRATCH = Path(tempfile.gettempdir())  # last weights of a run that was cut short: target.pt, draft.pt
SCRATCH_EVERY_S = 300.0
EVALUATION_TOKENS = 40_000  # held-out tokens for the cross-entropy


@dataclass(frozen=True)
class Corpus:
    """File contents by split."""

    train: list[str]
    heldout: list[str]


def read_corpus() -> Corpus:
    """The standard library's sources without tests and generated tables, split by file."""
    root = Path(sysconfig.get_path("stdlib"))
    train, heldout = [], []
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if any(part in SKIPPED or part.startswith("test_") for part in relative.parts):
            continue
        text = path.read_text(encoding="utf-8", errors="ignore")
        if len(text) < 200:
            continue
        held = int(hashlib.sha256(str(relative).encode()).hexdigest(), 16) % 20 == 0
        (heldout if held else train).append(text)
    return Corpus(train, heldout)


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE with an end-of-text token that separates documents."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END,
        pad_token=END,
        clean_up_tokenization_spaces=False,
        model_max_length=CONTEXT,
    )


def encode(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> torch.Tensor:
    """All documents as one stream of ids, int64, an end token behind each."""
    end = tokenizer.eos_token_id
    ids: list[int] = []
    for text in texts:
        ids += [*tokenizer.encode(text), end]
    return torch.tensor(ids)


def make_model(hidden: int, layers: int, intermediate: int, heads: int, kv_heads: int, tied: bool) -> LlamaForCausalLM:
    """A Llama with random weights, fp32."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCAB_SIZE,
            hidden_size=hidden,
            intermediate_size=intermediate,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            max_position_embeddings=CONTEXT,
            tie_word_embeddings=tied,
            bos_token_id=None,
            eos_token_id=0,
            pad_token_id=None,
        )
    )


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


Loss = Callable[[LlamaForCausalLM, torch.Tensor], torch.Tensor]


def cross_entropy(model: LlamaForCausalLM, batch: torch.Tensor) -> torch.Tensor:
    """Mean negative log-likelihood of the next token, nats."""
    logits = model(input_ids=batch[:, :-1], use_cache=False).logits
    return functional.cross_entropy(logits.flatten(0, 1).float(), batch[:, 1:].flatten())


def distillation(teacher: LlamaForCausalLM) -> Loss:
    """KL from the teacher's distribution, plus a little cross-entropy on the text."""
    teach = torch.compile(lambda ids: teacher(input_ids=ids, use_cache=False).logits.float().log_softmax(-1))

    def loss(model: LlamaForCausalLM, batch: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            wanted = teach(batch[:, :-1])
        logits = model(input_ids=batch[:, :-1], use_cache=False).logits.float()
        kl = functional.kl_div(logits.log_softmax(-1), wanted, log_target=True, reduction="none").sum(-1).mean()
        return kl + 0.1 * functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())

    return loss


def make_optimizer(model: LlamaForCausalLM) -> torch.optim.AdamW:
    """AdamW with weight decay on matrices only."""
    decayed = [p for p in model.parameters() if p.dim() >= 2]
    plain = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=True)


def fit(
    name: str,
    model: LlamaForCausalLM,
    tokens: torch.Tensor,
    seconds: float,
    rate: float,
    loss_of: Loss,
    batch_size: int,
) -> None:
    """AdamW under a cosine over the time budget, bf16 autocast; the weights go to SCRATCH now and then."""
    optimizer = make_optimizer(model)
    compiled = torch.compile(loss_of)
    model.train()
    begin = last = saved = time.monotonic()
    steps = seen = 0
    average = math.nan
    for batch in batches(tokens, batch_size, SEQUENCE, seed=1):
        share = (time.monotonic() - begin) / seconds
        if share >= 1.0:
            break
        warm = min(1.0, (steps + 1) / 100)
        for group in optimizer.param_groups:
            group["lr"] = rate * warm * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * share)))
        with torch.autocast("cpu", torch.bfloat16):
            loss = compiled(model, batch)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        steps += 1
        seen += batch.shape[0] * SEQUENCE
        average = loss.item() if math.isnan(average) else 0.95 * average + 0.05 * loss.item()
        if time.monotonic() - last > 15:
            last = time.monotonic()
            speed = seen / (last - begin)
            left = seconds - (last - begin)
            print(f"{name} step {steps} loss {average:.3f} {speed:.0f} tok/s, {left:.0f} s left", flush=True)
        if time.monotonic() - saved > SCRATCH_EVERY_S:
            saved = time.monotonic()
            torch.save(model.state_dict(), SCRATCH / f"{name}.pt")
    model.eval()
    print(f"{name} done: {steps} steps, {seen / 1e6:.1f} M tokens, loss {average:.3f}", flush=True)


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """bf16 weights, config, tokenizer."""
    rounded = LlamaForCausalLM(model.config)
    rounded.load_state_dict(model.state_dict())
    rounded = rounded.to(torch.bfloat16)
    rounded.generation_config = GenerationConfig(do_sample=False, eos_token_id=0, pad_token_id=0)
    rounded.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def choose_prompts(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> list[str]:
    """Twenty stretches of 64 tokens from held-out files, at places chosen by a seeded generator."""
    generator = random.Random(0)
    prompts = []
    while len(prompts) < NUM_PROMPTS:
        ids = tokenizer.encode(generator.choice(texts))
        if len(ids) >= 256:
            start = generator.randrange(0, len(ids) - 160)
            prompts.append(tokenizer.decode(ids[start : start + 64]))
    return prompts


@torch.inference_mode()
def heldout_loss(model: LlamaForCausalLM, tokens: torch.Tensor) -> float:
    """Mean cross-entropy over held-out windows, nats per token."""
    windows = tokens[: EVALUATION_TOKENS // SEQUENCE * SEQUENCE + 1]
    losses = [
        cross_entropy(model, windows[s : s + SEQUENCE + 1][None]).item() for s in range(0, len(windows) - 1, SEQUENCE)
    ]
    return sum(losses) / len(losses)


@torch.inference_mode()
def chain_tokens_per_pass(
    target: LlamaForCausalLM, draft: LlamaForCausalLM, ids: list[int], new: int, chain: int
) -> float:
    """Greedy chain speculation without caches: tokens that one verification brings."""
    tokens, passes = list(ids), 0
    while len(tokens) < len(ids) + new:
        base = len(tokens)
        trial = list(tokens)
        for _ in range(chain):
            trial.append(int(draft(torch.tensor([trial])).logits[0, -1].argmax()))
        drawn = target(torch.tensor([trial])).logits[0, base - 1 :].argmax(-1).tolist()
        accepted = 0
        while accepted < chain and trial[base + accepted] == drawn[accepted]:
            accepted += 1
        tokens += drawn[: accepted + 1]
        passes += 1
    return (len(tokens) - len(ids)) / passes


def repeated_4grams(tokens: list[int]) -> float:
    """Share of the 4-grams that occurred before in the same text."""
    grams = [tuple(tokens[i : i + 4]) for i in range(len(tokens) - 3)]
    return 1 - len(set(grams)) / len(grams)


def evaluate(folder: Path) -> dict[str, float]:
    """Measure the stored pair on held-out text."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder / "target")
    target = LlamaForCausalLM.from_pretrained(folder / "target", dtype=torch.float32).eval()
    draft = LlamaForCausalLM.from_pretrained(folder / "draft", dtype=torch.float32).eval()
    prompts = json.loads((folder / "heldout.json").read_text())
    texts = read_corpus().heldout
    tokens = encode(tokenizer, texts)
    bytes_per_token = sum(len(t.encode()) for t in texts) / len(tokens)
    repeats, speeds = [], []
    for prompt in prompts:
        ids = tokenizer.encode(prompt)
        speeds.append(chain_tokens_per_pass(target, draft, ids, 64, 5))
        out = target.generate(torch.tensor([ids]), max_new_tokens=64, min_new_tokens=64, do_sample=False)
        repeats.append(repeated_4grams(out[0, len(ids) :].tolist()))
    target_nats, draft_nats = heldout_loss(target, tokens), heldout_loss(draft, tokens)
    return {
        "target parameters": sum(p.numel() for p in target.parameters()),
        "draft parameters": sum(p.numel() for p in draft.parameters()),
        "target nats/token": target_nats,
        "draft nats/token": draft_nats,
        "target bits/byte": target_nats / math.log(2) / bytes_per_token,
        "draft bits/byte": draft_nats / math.log(2) / bytes_per_token,
        "tokens per pass, greedy chain of 5": sum(speeds) / len(speeds),
        "repeated 4-grams": sum(repeats) / len(repeats),
    }


def write_readme(folder: Path, figures: dict[str, float], minutes: float) -> None:
    """The pair's README: how it was made, from what, and what was measured."""
    rows = "\n".join(f"| {name} | {value:,.3f} |".replace(".000 |", " |") for name, value in figures.items())
    size = sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())
    (folder / "README.md").write_text(
        "# The embedded demo pair\n\n"
        "A Llama-type target and a draft distilled from it, so that `aspec generate` works out of the box. Made by\n"
        f"`python tools/train_demo.py --minutes {minutes:g}` from the sources of the Python standard library without\n"
        "its tests (Python Software Foundation License), split by file into train (19 of 20) and held-out.\n"
        f"Weights are bfloat16, the tokenizer is a byte-level BPE of {VOCAB_SIZE} tokens; {size / 1e6:.1f} MB in all.\n"
        "`heldout.json` holds the 20 held-out prompts of about 64 tokens, chosen by a seeded generator, on which the\n"
        "last two rows were measured (64 greedy tokens each); cross-entropy is over the first\n"
        f"{EVALUATION_TOKENS} held-out tokens.\n\n"
        f"| measured on held-out text, weights as stored | |\n|---|---|\n{rows}\n\n"
        "It completes Python after a fashion. It is here to show streaming and speculation, not to be useful.\n"
    )


def main() -> None:
    """Train, store, measure; or only measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=50.0, help="training time of both models, all in all")
    parser.add_argument("--out", type=Path, default=DEMO, help="folder to write (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="torch threads (default: all cores)")
    parser.add_argument("--draft-only", action="store_true", help="keep the stored target, go on with its draft")
    parser.add_argument("--evaluate", action="store_true", help="measure the stored pair and rewrite its README")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    if options.draft_only:
        train_draft(options.out, options.minutes * 60)
    elif not options.evaluate:
        train(options.out, options.minutes * 60)
    figures = evaluate(options.out)
    write_readme(options.out, figures, options.minutes)
    print(json.dumps(figures, indent=1))


def train(folder: Path, seconds: float) -> None:
    """Tokenizer, target, draft."""
    corpus = read_corpus()
    tokenizer = train_tokenizer(corpus.train)
    tokens = encode(tokenizer, corpus.train)
    print(
        f"{len(corpus.train)} train files, {len(corpus.heldout)} held-out, {len(tokens) / 1e6:.2f} M train tokens",
        flush=True,
    )
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "heldout.json").write_text(json.dumps(choose_prompts(tokenizer, corpus.heldout), indent=1))
    target = make_model(hidden=256, layers=8, intermediate=704, heads=8, kv_heads=4, tied=False)
    fit("target", target, tokens, seconds * 0.7, 2e-3, cross_entropy, batch_size=4)
    save(target, tokenizer, folder / "target")
    draft = make_model(hidden=128, layers=3, intermediate=352, heads=4, kv_heads=2, tied=True)
    fit("draft", draft, tokens, seconds * 0.3, 4e-3, distillation(target), batch_size=4)
    save(draft, tokenizer, folder / "draft")


def train_draft(folder: Path, seconds: float) -> None:
    """Go on with the stored draft against the stored target; the tokenizer and the prompts stay."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder / "target")
    tokens = encode(tokenizer, read_corpus().train)
    target = LlamaForCausalLM.from_pretrained(folder / "target", dtype=torch.float32).eval()
    draft = LlamaForCausalLM.from_pretrained(folder / "draft", dtype=torch.float32)
    fit("draft", draft, tokens, seconds, 3e-3, distillation(target), batch_size=8)
    save(draft, tokenizer, folder / "draft")


if __name__ == "__main__":
    main()

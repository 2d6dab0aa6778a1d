"""Train the embedded demo pair: a small Llama target and a draft distilled from it, on Python sources.

    python tools/train_demo.py --minutes 20                 # the stored target, then its draft, 20 minutes of CPU each
    python tools/train_demo.py --minutes 20 --only draft    # keeps the stored target
    python tools/train_demo.py --minutes 60 --fresh         # a new tokenizer, and random weights to begin with
    python tools/train_demo.py --evaluate                   # measures the pair that is there

It writes aspec/demo/ and prints the rows of the table of its README. Every run warms up and ends its decay, and goes on
with the weights of the one before. Everything is seeded; CPU time decides how many steps there are.
"""

import argparse
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import aspec
from aspec.options import DEMO
from tools.demo_corpus import Corpus, choose_prompts, encode, read_corpus
from tools.demo_fit import (
    BATCH_TOKENS,
    SEQUENCE,
    SHORT,
    Budget,
    alternating,
    batches,
    cpu_budget,
    cross_entropy,
    distillation,
    fit,
    mixed,
    shuffled,
)

VOCAB_SIZE = 4096
END = "<|endoftext|>"
CONTEXT = 1024
BEGINNING = 32  # tokens of a text that the target goes on with for its draft
OWN_ROWS = 64
OWN_SHARE = 0.2  # of the draft's time, for the target to write
SAMPLING = {"do_sample": True, "temperature": 0.7, "top_k": 40, "repetition_penalty": 1.05}  # generation_config.json
EVALUATION_TOKENS = 40_000  # held-out tokens for the cross-entropy
CHAIN = 5
WRITTEN = {  # what is written behind the held-out prompts: the figures of the demo as a benchmark, and as it comes
    "64 greedy tokens": {"max_new_tokens": 64, "temperature": 0.0, "repetition_penalty": 1.0},
    "128 tokens as it comes": {"max_new_tokens": 128},
}


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


@torch.inference_mode()
def own_texts(target: LlamaForCausalLM, tokens: torch.Tensor, budget: Budget) -> torch.Tensor:
    """What the target itself writes behind beginnings of texts, until the budget is spent: rows of SHORT + 1 ids."""
    data = batches(tokens, OWN_ROWS, BEGINNING, seed=3)
    rows = []
    while not rows or budget() < 1.0:
        begun = next(data)[:, :BEGINNING]
        new = SHORT + 1 - BEGINNING
        rows.append(target.generate(begun, max_new_tokens=new, min_new_tokens=new, **SAMPLING))
    return torch.cat(rows)


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """bf16 weights, config, tokenizer."""
    rounded = LlamaForCausalLM(model.config)
    rounded.load_state_dict(model.state_dict())
    rounded = rounded.to(torch.bfloat16)
    rounded.generation_config = GenerationConfig(**SAMPLING, eos_token_id=0, pad_token_id=0)
    rounded.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@torch.inference_mode()
def heldout_loss(model: LlamaForCausalLM, tokens: torch.Tensor) -> float:
    """Mean cross-entropy over held-out windows, nats per token."""
    windows = tokens[: EVALUATION_TOKENS // SEQUENCE * SEQUENCE + 1]
    losses = [
        cross_entropy(model, windows[s : s + SEQUENCE + 1][None]).item() for s in range(0, len(windows) - 1, SEQUENCE)
    ]
    return sum(losses) / len(losses)


def repeated_4grams(tokens: Sequence[int]) -> float:
    """Share of the 4-grams that occurred before in the same text."""
    grams = [tuple(tokens[i : i + 4]) for i in range(len(tokens) - 3)]
    return 1 - len(set(grams)) / len(grams)


def evaluate(folder: Path) -> dict[str, float]:
    """Measure the stored pair on held-out text."""
    texts = read_corpus().heldout
    figures: dict[str, float] = {}
    for name in ("target", "draft"):
        tokenizer, model = load(folder / name)
        tokens = encode(tokenizer, texts)
        nats = heldout_loss(model, tokens)
        figures |= {
            f"{name} parameters": sum(p.numel() for p in model.parameters()),
            f"{name} nats/token": nats,
            f"{name} bits/byte": nats / math.log(2) * len(tokens) / sum(len(text.encode()) for text in texts),
        }
    prompts = json.loads((folder / "heldout.json").read_text())
    shape = {"speculation": "chain", "num_draft_tokens": CHAIN}
    with aspec.LLM(target=folder / "target", draft=folder / "draft", **shape) as llm:
        for name, params in WRITTEN.items():
            results = llm.generate(prompts, ignore_eos=True, **params)
            speeds = [result.stats.tokens_per_pass for result in results]
            repeats = [repeated_4grams(result.token_ids) for result in results]
            figures[f"tokens per pass, chain of {CHAIN}, {name}"] = sum(speeds) / len(speeds)
            figures[f"repeated 4-grams, {name}"] = sum(repeats) / len(repeats)
    return figures


def main() -> None:
    """Train, store, measure; or only measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=50.0, help="CPU time of each model's training")
    parser.add_argument("--out", type=Path, default=DEMO, help="folder to write (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="torch threads (default: %(default)s)")
    parser.add_argument("--only", choices=["target", "draft"], help="train one model, keep the other")
    parser.add_argument("--fresh", action="store_true", help="begin with a new tokenizer and random weights")
    parser.add_argument("--evaluate", action="store_true", help="train nothing, measure the stored pair")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    if not options.evaluate:
        corpus = read_corpus()
        if options.fresh:
            begin(options.out, corpus)
        if options.only != "draft":
            train_target(options.out, corpus, options.minutes * 60)
        if options.only != "target":
            train_draft(options.out, corpus, options.minutes * 60)
    for name, value in evaluate(options.out).items():
        print(f"| {name} | {value:,.3f} |".replace(".000 |", " |"))


def begin(folder: Path, corpus: Corpus) -> None:
    """Tokenizer, held-out prompts and a pair of random weights."""
    tokenizer = train_tokenizer(corpus.train)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "heldout.json").write_text(json.dumps(choose_prompts(tokenizer, corpus.heldout), indent=1))
    save(make_model(256, 8, 704, 8, 4, tied=False), tokenizer, folder / "target")
    save(make_model(128, 3, 352, 4, 2, tied=True), tokenizer, folder / "draft")


def load(folder: Path) -> tuple[PreTrainedTokenizerFast, LlamaForCausalLM]:
    """A stored model in fp32, and its tokenizer."""
    return (
        PreTrainedTokenizerFast.from_pretrained(folder),
        LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval(),
    )


def train_target(folder: Path, corpus: Corpus, seconds: float) -> None:
    """Go on with the stored target; the tokenizer and the prompts stay."""
    tokenizer, target = load(folder / "target")
    tokens = encode(tokenizer, corpus.train)
    print(f"{len(tokens) / 1e6:.2f} M train tokens an epoch", flush=True)
    fit("target", target, mixed(tokens), cpu_budget(seconds), 2e-3, cross_entropy)
    save(target, tokenizer, folder / "target")


def train_draft(folder: Path, corpus: Corpus, seconds: float) -> None:
    """Go on with the stored draft against the stored target, on texts and on what the target itself samples."""
    tokenizer, target = load(folder / "target")
    _, draft = load(folder / "draft")
    tokens = encode(tokenizer, corpus.train)
    own = own_texts(target, tokens, cpu_budget(OWN_SHARE * seconds))
    print(f"the target wrote {own.numel() / 1e6:.2f} M tokens", flush=True)
    data = alternating(mixed(tokens), shuffled(own, BATCH_TOKENS // SHORT))
    fit("draft", draft, data, cpu_budget((1 - OWN_SHARE) * seconds), 3e-3, distillation(target))
    save(draft, tokenizer, folder / "draft")


if __name__ == "__main__":
    main()

"""A small real model with all weights in memory, aspec against transformers, in turns in one process.

    python tools/bench_resident.py [FOLDER] --threads 1 --rounds 5

Rows: 60 greedy tokens of a short prompt, as it comes, exact, and not exact; the same where the text repeats itself and
proposes from itself; the prefill of long prompts. A ratio above 1 means that aspec is faster. Seconds are the median of
the rounds. FOLDER: a checkpoint; without it the model of ``tools/real_model.py``.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import transformers

import aspec
from tools.real_model import real_model

SHORT = "The three most important things to know about the history of Rome are"
REPEATS = "def add(a, b):\n    return a + b\n\ndef sub(a, b):\n    return a - b\n\n" * 4
NEW_TOKENS = 60
PREFILLS = (2000, 7000)

Run = Callable[[], tuple[float, list[int]]]
"""Seconds, and the tokens that were made."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--prefill", type=int, nargs="*", default=PREFILLS, help="tokens of the long prompts")
    given = parser.parse_args()
    folder = given.folder or real_model()
    torch.set_num_threads(given.threads)
    transformers.logging.set_verbosity_error()
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    print(f"{folder}, {given.threads} threads, torch {torch.__version__}, transformers {transformers.__version__}")

    def theirs(ids: list[int], new: int) -> Run:
        return lambda: _timed(lambda: _generate(model, ids, new, given.threads))

    def ours(llm: aspec.LLM, ids: list[int], new: int) -> Run:
        return lambda: _timed(
            lambda: list(llm.generate(ids, max_new_tokens=new, temperature=0.0, ignore_eos=True, top_k=0).token_ids)
        )

    longest = max([*given.prefill, 1000]) + NEW_TOKENS
    settings = {"as it comes": {}, "exact": {"exact": True}, "not exact": {"exact": False}}
    for name, setting in settings.items():
        options = {"target": folder, "threads": given.threads, "max_context": longest, "reuse_prefix": False, **setting}
        with aspec.LLM(speculation="off", **options) as llm:
            short = _as_chat(tokenizer, SHORT)
            _compare(f"{NEW_TOKENS} tokens, {name}", ours(llm, short, NEW_TOKENS), theirs(short, NEW_TOKENS), given)
            for count in given.prefill if name != "as it comes" else ():
                long = (short * (count // len(short) + 1))[:count]
                _compare(f"prefill of {count}, {name}", ours(llm, long, 1), theirs(long, 1), given)
        with aspec.LLM(**options) as llm:
            ids = _as_chat(tokenizer, REPEATS)
            again = f"{NEW_TOKENS} tokens of a text that repeats itself, {name}"
            _compare(again, ours(llm, ids, NEW_TOKENS), theirs(ids, NEW_TOKENS), given)


def _as_chat(tokenizer: transformers.PreTrainedTokenizerBase, text: str) -> list[int]:
    """The tokens of a first message, as the model was trained to read it."""
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": text}], add_generation_prompt=True, tokenize=False
    )
    return [int(token) for token in tokenizer(chat, add_special_tokens=False)["input_ids"]]


def _generate(model: transformers.PreTrainedModel, ids: list[int], new: int, threads: int) -> list[int]:
    torch.set_num_threads(threads)
    with torch.inference_mode():
        given = torch.tensor([ids])
        made = model.generate(
            given, attention_mask=torch.ones_like(given), max_new_tokens=new, min_new_tokens=new, do_sample=False
        )
    return [int(token) for token in made[0, len(ids) :]]


def _timed(work: Callable[[], list[int]]) -> tuple[float, list[int]]:
    start = time.perf_counter()
    tokens = work()
    return time.perf_counter() - start, tokens


def _compare(what: str, ours: Run, theirs: Run, given: argparse.Namespace) -> None:
    """Print the medians of both, and the median of the ratios of the rounds."""
    seconds: tuple[list[float], list[float]] = ([], [])
    for run in (ours, theirs):
        run()
    for _ in range(given.rounds):
        for mine, run in zip(seconds, (ours, theirs), strict=True):
            took, _ = run()
            mine.append(took)
    own, other = map(statistics.median, seconds)
    ratio = statistics.median(b / a for a, b in zip(*seconds, strict=True))
    print(f"{what}: aspec {own:.2f} s, transformers {other:.2f} s, ratio {ratio:.2f}", flush=True)


if __name__ == "__main__":
    main()

"""The demo pair's texts: Python sources that are on this machine, as two streams of token ids.

Held-out is one file in twenty of the running Python's standard library, chosen by a hash of the file's name; it is read
as it is. Train is the rest of the standard library, and the permissively licensed LIBRARIES that are installed here,
without tests, generated tables and the licence comments that head a file: a model of this size would spend itself on
them.
"""

import hashlib
import importlib.util
import itertools
import random
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerFast

SKIPPED = (
    "test",
    "tests",
    "testing",
    "idle_test",
    "site-packages",
    "__pycache__",
    "pydoc_data",
    "lib2to3",
    "encodings",
)
SKIPPED_HERE = ("_vendor", "typeshed", "test-data", "_unicode_data")  # copies of other people's files, and tables
LIBRARIES = (
    *("numpy", "networkx", "huggingface_hub", "mypy", "pydantic", "rich", "fsspec", "jinja2", "prompt_toolkit"),
    *("urllib3", "typer", "yaml", "filelock", "packaging", "click"),
)  # licences: BSD, MIT or Apache-2.0
STANDARD_PASSES = 2  # times that the standard library is in one epoch: it is what held-out text is like
WORDS_AT_LEAST = 0.75  # share of letters and blanks below which a file is a table
COMMENT_AT_MOST = 4  # lines of comment that may head a file
MIN_CHARS = 200
NUM_PROMPTS = 20


@dataclass(frozen=True)
class Corpus:
    """File contents by split."""

    train: list[str]
    heldout: list[str]


def read_corpus() -> Corpus:
    """Standard library, split by file; libraries behind it."""
    root = Path(sysconfig.get_path("stdlib"))
    train, heldout = [], []
    for name, text in sources(root, SKIPPED):
        held = int(hashlib.sha256(name.encode()).hexdigest(), 16) % 20 == 0
        (heldout if held else train).append(text)
    texts = [cleaned for text in train if (cleaned := clean(text))] * STANDARD_PASSES
    for library in LIBRARIES:
        spec = importlib.util.find_spec(library)
        if spec is not None and spec.origin is not None:
            found = sources(Path(spec.origin).parent, (*SKIPPED, *SKIPPED_HERE))
            texts += [cleaned for _, text in found if (cleaned := clean(text))]
    return Corpus(texts, heldout)


def sources(root: Path, skipped: tuple[str, ...]) -> list[tuple[str, str]]:
    """Python files below a folder, names and texts; no tests, none of a few lines."""
    found = []
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if any(part in skipped or part.startswith("test_") for part in relative.parts):
            continue
        text = path.read_text(encoding="utf-8", errors="ignore")
        if len(text) >= MIN_CHARS:
            found.append((str(relative), text))
    return found


def clean(text: str) -> str:
    """The text without the comment that heads it; nothing where it is a table."""
    words = sum(c.isalpha() or c.isspace() or c == "_" for c in text)
    if words < WORDS_AT_LEAST * len(text):
        return ""
    lines = text.splitlines(keepends=True)
    heading = list(itertools.takewhile(lambda line: line.startswith("#"), lines))
    return "".join(lines[len(heading) :]).lstrip("\n") if len(heading) > COMMENT_AT_MOST else text


def encode(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> torch.Tensor:
    """All documents as one stream of ids, int64, an end token behind each."""
    ids: list[int] = []
    for document in tokenizer(texts)["input_ids"] if texts else []:
        ids += [*document, tokenizer.eos_token_id]
    return torch.tensor(ids)


def choose_prompts(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> list[str]:
    """Twenty stretches of 64 tokens from held-out files, at places chosen by a seeded generator."""
    generator = random.Random(0)
    prompts: list[str] = []
    while len(prompts) < NUM_PROMPTS:
        ids = tokenizer.encode(generator.choice(texts))
        if len(ids) >= 256:
            start = generator.randrange(0, len(ids) - 160)
            prompts.append(tokenizer.decode(ids[start : start + 64]))
    return prompts

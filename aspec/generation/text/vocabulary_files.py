"""Which Python packages a tokenizer without tokenizer.json needs, and whether they are installed.

transformers converts a sentencepiece vocabulary with the packages sentencepiece and protobuf. Where they are missing it
takes the file for a tiktoken vocabulary, and asks for a package that does not help.
"""

import base64
from importlib.util import find_spec
from pathlib import Path

FAST = "tokenizer.json"
HEAD_BYTES = 1 << 16  # a tiktoken file has a token per line, and the first lines show it
SENTENCEPIECE, TIKTOKEN = ("sentencepiece", "protobuf"), ("tiktoken",)
MODULES = {"protobuf": "google.protobuf"}  # package -> module, where the names differ


def missing_reader(folder: Path) -> str | None:
    """Why a binary vocabulary that is alone cannot be read; None if it can, or if the folder has other files."""
    if (folder / FAST).is_file() or any(folder.glob("vocab.*")):
        return None
    for path in sorted([*folder.glob("*.model"), *folder.glob("*.tiktoken")]):
        needed = TIKTOKEN if _is_tiktoken(path) else SENTENCEPIECE
        missing = [package for package in needed if not _installed(MODULES.get(package, package))]
        if missing:
            kind = "tiktoken" if needed is TIKTOKEN else "sentencepiece"
            return (
                f"{path.name} is a {kind} vocabulary, and there is no {' and no '.join(missing)} to read it: run "
                f"`pip install {' '.join(missing)}`"
            )
    return None


def _is_tiktoken(path: Path) -> bool:
    """Whether a vocabulary file is one of tiktoken: a token in base64 and its rank per line."""
    try:
        with path.open("rb") as file:
            first = file.read(HEAD_BYTES).splitlines()[:1]
        token, rank = first[0].split() if first else (b"", b"")
        return bool(base64.b64decode(token, validate=True)) and rank.isdigit()
    except (OSError, ValueError):
        return False


def _installed(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # the package above it is missing
        return False

"""Which GGUF files are one model, by their names: in a folder, or of a repository, ``Q4_K_M`` of ``org/repo:Q4_K_M``.

No torch here: commands find a wrong name before they import it.
"""

import re
from collections import defaultdict
from collections.abc import Collection, Iterable
from pathlib import Path, PurePosixPath

from aspec.errors import CheckpointError, shown

SUFFIX, MAGIC = ".gguf", b"GGUF"
SPLIT = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf", re.DOTALL)
MAX_SPLITS = 4096
LABEL = re.compile(
    r"(?<![A-Za-z0-9])(?:UD-)?(?:I?Q\d_?\w*|TQ\d_\d|MXFP4(?:_MOE)?|BF16|FP?16|FP?32)(?![A-Za-z0-9])", re.IGNORECASE
)
OTHERS = re.compile(r"mmproj|imatrix|ggml-vocab", re.IGNORECASE)  # parts of models, and data
DYNAMIC = "UD-"  # of Unsloth's quantisations, which a name may leave out


def check_begin(path: Path, start: bytes) -> None:
    """Raise CheckpointError unless the first bytes of a file are those of a GGUF file."""
    if not start.startswith(MAGIC):
        found = shown(start[: len(MAGIC)])
        raise CheckpointError(
            f"{path}: expected a GGUF file, found one that begins with {found}. Fetch the file again."
        )


def split_set(path: Path) -> list[Path]:
    """The files of the set that a file belongs to, in order. Raises CheckpointError if one is missing."""
    match = SPLIT.fullmatch(path.name)
    if match is None:
        return [path]
    count = int(match["count"])
    if not 1 <= int(match["number"]) <= count <= MAX_SPLITS:
        raise CheckpointError(
            f"{path}: expected a number from 1 to {min(count, MAX_SPLITS)} in the name of a file of a split model, "
            f"found {int(match['number'])} of {count}. Rename it as it was published."
        )
    paths = [path.with_name(f"{match['stem']}-{number:05}-of-{count:05}.gguf") for number in range(1, count + 1)]
    if missing := [file.name for file in paths if not file.is_file()]:
        raise CheckpointError(
            f"{path} is one of {count} files of a model: expected all of them in {path.parent}, found {len(missing)} "
            f"missing: {', '.join(map(shown, missing[:3]))}. Fetch the missing files."
        )
    return paths


def choose_files(names: Collection[str], quantisation: str) -> list[str]:
    """The files of the model that has a quantisation, or this name, in order. ``names``: files of the repository.

    Raises CheckpointError, a sentence without its subject, if there is none, several or half of one.
    """
    models = models_of(names)
    asked = quantisation.upper()
    found = (
        [key for key in models if key[0] == asked]
        or [key for key in models if key[0] == DYNAMIC + asked]
        or [key for key in models if PurePosixPath(key[1]).name.upper() == asked.removesuffix(SUFFIX.upper())]
    )
    if not found:
        labels = ", ".join(map(shown, quantisations(names))) or "none"
        raise CheckpointError(
            f"has no GGUF file of the quantisation {shown(quantisation)}: found {labels}. Choose one of them."
        )
    if len(found) > 1:
        stems = ", ".join(shown(stem) for _, stem in found[:3])
        raise CheckpointError(
            f"has {len(found)} GGUF models of the quantisation {shown(quantisation)}: expected one, found {stems}. "
            f"Give the name of one in place of the quantisation."
        )
    files = models[found[0]]
    count = max((int(match["count"]) for name in files if (match := _split(name))), default=1)
    if len(files) != count:
        raise CheckpointError(
            f"has {len(files)} of the {count} files of {shown(found[0][1])}: expected all of them. Choose another "
            f"quantisation."
        )
    return files


def quantisations(names: Iterable[str]) -> list[str]:
    """The quantisations of the GGUF models among files; of a model without one, its name."""
    return sorted({label or PurePosixPath(stem).name for label, stem in models_of(names)})


def label_of(name: str) -> str | None:
    """The quantisation in the name of a file, or of its folder: in capitals, None if there is none."""
    path = PurePosixPath(name)
    for part in (path.name.removesuffix(SUFFIX), *reversed(path.parts[:-1])):
        if labels := LABEL.findall(part):
            return str(labels[-1]).upper()
    return None


def models_of(names: Iterable[str]) -> dict[tuple[str | None, str], list[str]]:
    """The GGUF models among files: (quantisation, name without the number of a split file) -> files."""
    models: dict[tuple[str | None, str], list[str]] = defaultdict(list)
    for name in sorted(names):
        if name.lower().endswith(SUFFIX) and not OTHERS.search(name):
            match = _split(name)
            stem = str(PurePosixPath(name).with_name(match["stem"])) if match else name.removesuffix(SUFFIX)
            models[label_of(f"{stem}{SUFFIX}"), stem].append(name)
    return models


def _split(name: str) -> re.Match[str] | None:
    return SPLIT.fullmatch(PurePosixPath(name).name)

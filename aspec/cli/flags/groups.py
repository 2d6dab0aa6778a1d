"""The flags that several commands share: small records that each command's record inherits.

A dataclass lists the fields of its last base first. So a record names its bases in the reverse order of the help. The
records have no slots, because Python cannot combine several bases with slots.
"""

import errno
import sys
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any

import typer

from aspec.cli.flags.options import AUTO, MODELS, OUTPUT, PLACE, SAMPLING, count_or_auto, option, rate, size
from aspec.errors import printable
from aspec.generation.params import SamplingParams
from aspec.options import CHOICES, EngineOptions

THREADS = (
    "Compute threads. Default: OMP_NUM_THREADS if it is set; otherwise one, or one per core, by the measured costs of "
    "each kind of work."
)
MOST_BYTES = 64 << 20  # of a prompt: more than any context holds


@dataclass(frozen=True)
class ModelFlags:
    """The models to run."""

    target: Annotated[
        str | None,
        option(
            MODELS,
            "The big model: a folder, a GGUF file, or a hub id such as org/name@revision or org/name:Q4_K_M. Default: "
            "the embedded demo pair.",
            "--target",
            "--model",
            metavar="MODEL",
        ),
    ] = None
    draft: Annotated[
        str | None,
        option(
            MODELS,
            "A small model with the same vocabulary; it proposes tokens while the target's weights stream. self:4bit: "
            "a copy of the target in 4 bits, made once and kept in the cache folder. Default, or ngram: proposals come "
            "from the text itself, without a model; --speculation off ends them.",
            "--draft",
            "--draft-model",
            metavar="MODEL",
        ),
    ] = None
    adapter: Annotated[
        str | None,
        option(
            MODELS,
            "A LoRA adapter of the target, which is merged while loading: a folder or a hub id.",
            "--adapter",
            metavar="MODEL",
        ),
    ] = None
    dtype: Annotated[
        str,
        option(
            MODELS, "auto, bfloat16, float16 or float32. auto: the dtype of the checkpoint.", "--dtype", metavar="NAME"
        ),
    ] = "auto"


@dataclass(frozen=True)
class SystemFlags:
    """The system message."""

    system: Annotated[str | None, option(OUTPUT, "A system message, for models with a chat template.")] = None


def _read_text(path: Path) -> str:
    """The text of a file or a pipe. Raises OSError, also for more than ``MOST_BYTES``: a device never ends."""
    with path.open("rb") as file:
        data = file.read(MOST_BYTES + 1)
    if len(data) > MOST_BYTES:
        raise OSError(errno.EFBIG, f"it has more than {MOST_BYTES} bytes")
    return data.decode("utf-8-sig")  # a byte order mark is no text


@dataclass(frozen=True)
class PromptFlags:
    """The prompts."""

    prompt: Annotated[
        list[str] | None, option(OUTPUT, "A prompt; repeat the option for several prompts.", "--prompt", "-p")
    ] = None
    file: Annotated[
        list[Path] | None,
        option(OUTPUT, "A file with one prompt; repeat the option for several files.", "--file", "-f"),
    ] = None
    raw: Annotated[bool, option(OUTPUT, "Do not apply the chat template to the prompt.", "--raw")] = False

    def prompts(self) -> list[str]:
        """The texts of --prompt and --file, otherwise of piped input. Raises typer.BadParameter if there is none."""
        texts = [*self._words(), *(self.prompt or [])]
        for path in self.file or []:
            try:
                texts.append(_read_text(path))
            except (OSError, UnicodeDecodeError) as error:
                raise typer.BadParameter(printable(f"cannot read {path}: {error}"), param_hint="--file") from error
        if not texts and not sys.stdin.isatty():
            texts.append(sys.stdin.read().removeprefix("\ufeff"))
        if not texts:
            raise typer.BadParameter(
                "give a prompt: --prompt TEXT, --file PATH or standard input", param_hint="--prompt"
            )
        return texts

    def _words(self) -> list[str]:
        """The prompt that needs no option, if the command takes one."""
        return []


@dataclass(frozen=True)
class DebugFlags:
    """How errors are printed."""

    debug: Annotated[bool, option(OUTPUT, "Print the traceback of an error.", "--debug")] = False


@dataclass(frozen=True)
class QuietFlags:
    """The output besides the result."""

    quiet: Annotated[bool, option(OUTPUT, "No dashboard, no progress, no summary.", "--quiet", "-q")] = False


@dataclass(frozen=True)
class JsonFlags:
    """The format of the result."""

    as_json: Annotated[bool, option(OUTPUT, "JSON on stdout instead of text.", "--json")] = False


@dataclass(frozen=True)
class DashboardFlags:
    """How progress is displayed."""

    no_dashboard: Annotated[
        bool, option(OUTPUT, "Print plain progress lines, also when stderr is a terminal.", "--no-dashboard")
    ] = False


@dataclass(frozen=True)
class SamplingFlags:
    """How tokens are drawn; None: the checkpoint's value."""

    max_new_tokens: Annotated[
        int | None,
        option(
            SAMPLING,
            "Maximum number of tokens to generate. Default: the checkpoint's value, otherwise 128.",
            "--max-new-tokens",
            "-n",
            min=0,
        ),
    ] = None
    min_new_tokens: Annotated[
        int | None,
        option(SAMPLING, "No end of the text before this number of tokens.", "--min-new-tokens", "--min-tokens", min=0),
    ] = None
    temperature: Annotated[
        float | None,
        option(SAMPLING, "0: greedy decoding. Default: the value in the checkpoint's generation_config.json.", min=0.0),
    ] = None
    top_p: Annotated[float | None, option(SAMPLING, "Nucleus sampling: a probability in (0, 1].")] = None
    top_k: Annotated[int | None, option(SAMPLING, "Keep the K most likely tokens; 0 is off.", min=0)] = None
    min_p: Annotated[
        float | None, option(SAMPLING, "Keep tokens with at least this share of the highest probability.")
    ] = None
    repetition_penalty: Annotated[
        float | None, option(SAMPLING, "Penalty for tokens in the prompt and the text, as in transformers; 1 is off.")
    ] = None
    presence_penalty: Annotated[
        float | None, option(SAMPLING, "Penalty for tokens in the text, as in OpenAI's interface, -2 to 2; 0 is off.")
    ] = None
    frequency_penalty: Annotated[
        float | None, option(SAMPLING, "Penalty for each occurrence of a token in the text, -2 to 2; 0 is off.")
    ] = None
    no_repeat_ngram_size: Annotated[
        int | None, option(SAMPLING, "No sequence of N tokens occurs twice in prompt and text; 0 is off.", min=0)
    ] = None
    seed: Annotated[int, option(SAMPLING, "The same seed gives the same tokens, with or without a draft.")] = 0
    stop: Annotated[
        list[str] | None, option(SAMPLING, "Stop before this text; repeat the option for several texts.")
    ] = None

    def sampling(self) -> dict[str, Any]:
        """The sampling flags as fields of ``SamplingParams``; None for flags that were not given."""
        known = SamplingParams.__dataclass_fields__
        given = {field.name: getattr(self, field.name) for field in fields(self) if field.name in known}
        return {**given, "stop": tuple(self.stop) if self.stop else None}


@dataclass(frozen=True)
class LogprobFlags:
    """The log probabilities in the result."""

    logprobs: Annotated[
        int | None,
        option(SAMPLING, "With --json: log probabilities of each token and of the K most likely tokens.", metavar="K"),
    ] = None


@dataclass(frozen=True)
class EndFlags:
    """When generation ends."""

    ignore_eos: Annotated[bool, option(SAMPLING, "Continue after an end-of-sequence token.", "--ignore-eos")] = False


@dataclass(frozen=True)
class MachineFlags:
    """The machine that a command uses."""

    device: Annotated[
        str, option(PLACE, "auto, cpu or cuda. auto: a GPU if there is one.", "--device", metavar="NAME")
    ] = "auto"
    threads: Annotated[int | None, option(PLACE, THREADS, min=1)] = None
    link_rate: Annotated[
        float | None,
        option(
            PLACE,
            "Limit the rate of disk reads, for example 1.0GB/s; comparisons on a shared disk need a fixed rate.",
            parser=rate,
            metavar="RATE",
        ),
    ] = None

    def options(self) -> EngineOptions:
        """The engine's options, from the flags with the same names. Raises UserError for invalid values."""
        known = EngineOptions.__dataclass_fields__
        given = {field.name: getattr(self, field.name) for field in fields(self) if field.name in known}
        decided: dict[str, Any] = {name: None if value == AUTO else value for name, value in given.items()}
        return EngineOptions(**decided)

    def check(self) -> None:
        """Refuse invalid flags. Raises typer.BadParameter, which ends the command with exit code 2."""
        if self.device not in ("auto", "cpu", "cuda"):
            raise typer.BadParameter(f"expected auto, cpu or cuda, found {self.device!r}", param_hint="--device")


@dataclass(frozen=True)
class EngineFlags(MachineFlags):
    """How an engine runs; None and AUTO: aspec decides."""

    device_memory: Annotated[
        int | None,
        option(
            PLACE,
            "Budget for weights, KV, draft and activations, such as 8GiB; on a CPU the interpreter and torch take "
            "0.4 GiB more. Default: 70 % of free memory, on a GPU 90 %.",
            parser=size,
            metavar="SIZE",
        ),
    ] = None
    process_memory: Annotated[
        int | None,
        option(
            PLACE,
            "On a CPU, instead of --device-memory: a budget for the whole process, interpreter and torch included.",
            "--process-memory",
            parser=size,
            metavar="SIZE",
        ),
    ] = None
    host_memory: Annotated[
        int | None,
        option(
            PLACE,
            "Host memory for layers and KV that the device reads over its link, for example 64GiB; layers that do not "
            "fit stream from disk. Default: 70 % of free host memory.",
            "--host-memory",
            parser=size,
            metavar="SIZE",
        ),
    ] = None
    speculation: Annotated[
        str, option(PLACE, "What the draft proposes: auto, chain, tree or off.", "--speculation", metavar="NAME")
    ] = "auto"
    num_draft_tokens: Annotated[
        int,
        option(
            PLACE,
            "Proposals per pass: the length of a chain or the nodes of a tree. auto: from measured costs; 0 is off.",
            "--draft-budget",
            "--num-draft-tokens",
            parser=count_or_auto,
            metavar="auto|N",
        ),
    ] = "auto"  # type: ignore[assignment]  # typer parses the default too
    draft_depth: Annotated[
        int,
        option(PLACE, "Maximum depth of a tree; auto: 64.", "--draft-depth", parser=count_or_auto, metavar="auto|N"),
    ] = "auto"  # type: ignore[assignment]  # typer parses the default too
    draft_ahead: Annotated[
        bool,
        option(
            PLACE, "Extend trees for the next round while the target verifies them.", "--draft-ahead/--no-draft-ahead"
        ),
    ] = True
    attention: Annotated[
        str,
        option(
            PLACE,
            "Where attention runs. device: in its layer. cpu: on a separate lane, next to KV in host memory; half of "
            "the rows attend while the other half computes. The tokens are the same. auto: device.",
            "--attention",
            metavar="NAME",
        ),
    ] = "auto"
    experts: Annotated[
        str,
        option(
            PLACE,
            "How experts are read. on-demand: those that the router has chosen. whole: with their layer. The tokens "
            "are the same.",
            "--experts",
            metavar="NAME",
        ),
    ] = "auto"
    prefetch_experts: Annotated[
        bool | None,
        option(PLACE, "Read likely experts early. Default: if few.", "--prefetch-experts/--no-prefetch-experts"),
    ] = None
    exact: Annotated[
        bool | None,
        option(
            PLACE,
            "Tokens equal decoding without speculation bit by bit, also in bf16, at a fixed thread count; aspec bench "
            "shows the price. Default: on for a CPU, unless the job would take over 10 % longer.",
            "--exact/--no-exact",
        ),
    ] = None
    products: Annotated[
        str,
        option(
            PLACE,
            "How weights of 4 bits are multiplied on a CPU. packed: as they are, with bf16 scales. decoded: in bf16. "
            "auto: packed where aspec prepared the checkpoint.",
            "--products",
            metavar="NAME",
        ),
    ] = "auto"
    max_context: Annotated[
        int | None,
        option(PLACE, "Maximum tokens of a sequence, prompt included. Default: the need of the prompts.", min=2),
    ] = None

    def check(self) -> None:
        """Refuse invalid flags. Raises typer.BadParameter."""
        super().check()
        for name in ("speculation", "attention", "experts", "products"):
            if (found := getattr(self, name)) not in CHOICES[name]:
                names = ", ".join(CHOICES[name])
                raise typer.BadParameter(f"expected one of {names}, found {found!r}", param_hint=f"--{name}")


@dataclass(frozen=True)
class RowFlags:
    """The number of sequences in a pass, and of their groups."""

    max_batch: Annotated[
        int,
        option(PLACE, "Number of prompts that share a pass.", "--batch-size", parser=count_or_auto, metavar="auto|N"),
    ] = "auto"  # type: ignore[assignment]  # typer parses the default too
    num_groups: Annotated[
        int,
        option(
            PLACE,
            "Number of groups of prompts: the draft works for one group while the target verifies another.",
            "--groups",
            parser=count_or_auto,
            metavar="auto|N",
        ),
    ] = "auto"  # type: ignore[assignment]  # typer parses the default too


@dataclass(frozen=True)
class RunFlags(
    RowFlags,
    EngineFlags,
    SamplingFlags,
    DebugFlags,
    DashboardFlags,
    QuietFlags,
    JsonFlags,
    SystemFlags,
    PromptFlags,
    ModelFlags,
):
    """A run of given prompts."""

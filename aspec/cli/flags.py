"""The flags that the commands share: small records that a command's own record composes, and how it takes that one.

A dataclass lists the fields of its last base first, so bases are named from the bottom of the help to its top. They
have no slots: several bases with slots cannot be combined.
"""

import inspect
import sys
from collections.abc import Callable
from dataclasses import Field, dataclass, fields
from pathlib import Path
from typing import Annotated, Any, ClassVar, Protocol, TypeVar, get_type_hints

import typer

from aspec.generation.params import SamplingParams
from aspec.options import ATTENTION, SPECULATION, EngineOptions
from aspec.units import parse_bytes, parse_rate

AUTO = -1  # a count that is left to the planner
MODELS, SAMPLING, PLACE, OUTPUT = "Models", "Sampling", "Memory and speed", "Input and output"


def size(text: str) -> int:
    """Bytes as people write them. Raises typer.BadParameter."""
    try:
        return parse_bytes(text)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error


def rate(text: str) -> float:
    """Bytes per second as people write them. Raises typer.BadParameter."""
    try:
        return parse_rate(text)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error


def count_or_auto(text: str) -> int:
    """A count, or AUTO."""
    if text == "auto":
        return AUTO
    if text.isdigit():
        return int(text)
    raise typer.BadParameter(f"expected auto or a number from 0 up, found {text!r}")


def option(panel: str, help: str, *names: str, **rest: Any) -> Any:
    """An option of a command, under a heading of its help."""
    return typer.Option(*names, help=help, rich_help_panel=panel, **rest)


@dataclass(frozen=True)
class ModelFlags:
    """Which models."""

    target: Annotated[
        str | None,
        option(
            MODELS, "The big model: a folder or a hub id. Without it: the embedded demo pair.", "--target", "--model"
        ),
    ] = None
    draft: Annotated[
        str | None,
        option(
            MODELS,
            "A small model with the same vocabulary that proposes tokens while the target's weights travel; or ngram: "
            "look up what the text has said before.",
            "--draft",
            "--draft-model",
        ),
    ] = None
    dtype: Annotated[str, option(MODELS, "auto, bfloat16, float16 or float32. auto: the checkpoint's own.")] = "auto"


@dataclass(frozen=True)
class SystemFlags:
    """What stands before a conversation."""

    system: Annotated[str | None, option(OUTPUT, "A system message, for models with a chat template.")] = None


@dataclass(frozen=True)
class PromptFlags:
    """What to say to the model."""

    prompt: Annotated[list[str] | None, option(OUTPUT, "A prompt; repeat for several.", "--prompt", "-p")] = None
    file: Annotated[
        list[Path] | None, option(OUTPUT, "A file that holds a prompt; repeat for several.", "--file", "-f")
    ] = None
    raw: Annotated[bool, option(OUTPUT, "Give the prompt as it is: no chat template.", "--raw")] = False

    def prompts(self) -> list[str]:
        """--prompt, then --file, then standard input where it is piped. Raises typer.BadParameter without any."""
        texts = list(self.prompt or [])
        for path in self.file or []:
            try:
                texts.append(path.read_text(encoding="utf-8"))
            except (OSError, UnicodeDecodeError) as error:
                raise typer.BadParameter(f"cannot read {path}: {error}", param_hint="--file") from error
        if not texts and not sys.stdin.isatty():
            texts.append(sys.stdin.read())
        if not texts:
            raise typer.BadParameter(
                "give a prompt: --prompt TEXT, --file PATH or standard input", param_hint="--prompt"
            )
        return texts


@dataclass(frozen=True)
class DebugFlags:
    """How errors are shown."""

    debug: Annotated[bool, option(OUTPUT, "Show tracebacks.", "--debug")] = False


@dataclass(frozen=True)
class QuietFlags:
    """How much is said beside the result."""

    quiet: Annotated[bool, option(OUTPUT, "No dashboard, no progress, no summary.", "--quiet", "-q")] = False


@dataclass(frozen=True)
class JsonFlags:
    """The form of the result."""

    as_json: Annotated[bool, option(OUTPUT, "JSON on stdout instead of text.", "--json")] = False


@dataclass(frozen=True)
class DashboardFlags:
    """How progress is shown."""

    no_dashboard: Annotated[
        bool, option(OUTPUT, "Plain progress lines even where stderr is a terminal.", "--no-dashboard")
    ] = False


@dataclass(frozen=True)
class SamplingFlags:
    """How the text is drawn; None: as the checkpoint says."""

    max_new_tokens: Annotated[int, option(SAMPLING, "Tokens to generate at most.", "--max-new-tokens", "-n", min=0)] = (
        128
    )
    temperature: Annotated[
        float | None, option(SAMPLING, "0 is greedy. Default: the checkpoint's generation_config.json.", min=0.0)
    ] = None
    top_p: Annotated[float | None, option(SAMPLING, "Nucleus sampling, in (0, 1].")] = None
    top_k: Annotated[int | None, option(SAMPLING, "Keep the k likeliest; 0 is off.", min=0)] = None
    min_p: Annotated[float | None, option(SAMPLING, "Keep tokens this likely relative to the best.")] = None
    repetition_penalty: Annotated[
        float | None, option(SAMPLING, "Of tokens in prompt and text, as in transformers; 1 is off.")
    ] = None
    presence_penalty: Annotated[
        float | None, option(SAMPLING, "Of tokens in the text, as in OpenAI's interface, -2 .. 2; 0 is off.")
    ] = None
    frequency_penalty: Annotated[
        float | None, option(SAMPLING, "The same for every time a token has come, -2 .. 2; 0 is off.")
    ] = None
    seed: Annotated[int, option(SAMPLING, "The same seed gives the same tokens, with or without a draft.")] = 0
    stop: Annotated[list[str] | None, option(SAMPLING, "Stop before this text; repeat for several.")] = None

    def sampling(self) -> dict[str, Any]:
        """What was said of sampling: the fields of ``SamplingParams``; None where nothing was."""
        known = SamplingParams.__dataclass_fields__
        given = {field.name: getattr(self, field.name) for field in fields(self) if field.name in known}
        return {**given, "stop": tuple(self.stop or ())}


@dataclass(frozen=True)
class LogprobFlags:
    """What is told of every token."""

    logprobs: Annotated[
        int | None, option(SAMPLING, "With --json: logprobs of the tokens and of the K likeliest.", metavar="K")
    ] = None


@dataclass(frozen=True)
class EndFlags:
    """Where a text ends."""

    ignore_eos: Annotated[bool, option(SAMPLING, "Go on behind an end-of-sequence token.", "--ignore-eos")] = False


@dataclass(frozen=True)
class MachineFlags:
    """On what a command runs."""

    device: Annotated[str, option(PLACE, "auto, cpu or cuda. auto: a GPU where there is one.")] = "auto"
    threads: Annotated[int | None, option(PLACE, "Compute threads. Default: all cores but one.", min=1)] = None
    link_rate: Annotated[
        float | None,
        option(
            PLACE,
            "Throttle the disk lane, such as 1.0GB/s: comparisons on a shared disk need a fixed rate.",
            parser=rate,
            metavar="RATE",
        ),
    ] = None

    def options(self) -> EngineOptions:
        """How to open the engine: the fields that are its options. Raises UserError for values that no engine takes."""
        known = EngineOptions.__dataclass_fields__
        given = {field.name: getattr(self, field.name) for field in fields(self) if field.name in known}
        decided: dict[str, Any] = {name: None if value == AUTO else value for name, value in given.items()}
        return EngineOptions(**decided)

    def check(self) -> None:
        """Refuse what cannot be meant. Raises typer.BadParameter, which ends with exit code 2."""
        if self.device not in ("auto", "cpu", "cuda"):
            raise typer.BadParameter(f"expected auto, cpu or cuda, found {self.device!r}", param_hint="--device")


@dataclass(frozen=True)
class EngineFlags(MachineFlags):
    """How an engine runs; None or AUTO: decide."""

    device_memory: Annotated[
        int | None,
        option(
            PLACE,
            "Budget for weights, KV, draft and activations, such as 8GiB. Default: 70 % of what is free, of a GPU 90.",
            parser=size,
            metavar="SIZE",
        ),
    ] = None
    host_memory: Annotated[
        int | None,
        option(
            PLACE,
            "Host memory for layers and KV behind a device's link, such as 64GiB; what does not fit streams from disk. "
            "Default: 70 % of what is free.",
            "--host-memory",
            parser=size,
            metavar="SIZE",
        ),
    ] = None
    speculation: Annotated[
        str, option(PLACE, "auto, chain, tree or off: what the draft proposes.", "--speculation")
    ] = "auto"
    num_draft_tokens: Annotated[
        int,
        option(
            PLACE,
            "Proposals per pass, a chain's length or a tree's nodes; auto follows measured cost, 0 is off.",
            "--draft-budget",
            "--num-draft-tokens",
            parser=count_or_auto,
            metavar="auto|N",
        ),
    ] = "auto"  # type: ignore[assignment]  # typer parses the default too
    draft_depth: Annotated[
        int,
        option(PLACE, "Tokens of a tree's longest path.", "--draft-depth", parser=count_or_auto, metavar="auto|N"),
    ] = "auto"  # type: ignore[assignment]  # typer parses the default too
    draft_ahead: Annotated[
        bool,
        option(PLACE, "Trees grow on for the next round while they are verified.", "--draft-ahead/--no-draft-ahead"),
    ] = True
    attention: Annotated[
        str,
        option(
            PLACE,
            "Where attention runs: device, in its layer; cpu, on a lane of its own, behind a link beside KV in host "
            "memory: half of the rows attend while the others compute. The same tokens either way. auto: device.",
            "--attention",
        ),
    ] = "auto"
    exact: Annotated[
        bool | None,
        option(
            PLACE,
            "Speculation changes no bit: tokens equal decoding without it, in bf16 too, at a fixed thread count; takes "
            "1.3 to 1.8 times the compute. Default: on a CPU.",
            "--exact/--no-exact",
        ),
    ] = None
    max_context: Annotated[
        int | None,
        option(PLACE, "Tokens of a sequence, prompt included. Default: what the prompts need.", min=2),
    ] = None

    def check(self) -> None:
        """Likewise. Raises typer.BadParameter."""
        super().check()
        if self.speculation not in SPECULATION:
            known = ", ".join(SPECULATION)
            raise typer.BadParameter(f"expected one of {known}, found {self.speculation!r}", param_hint="--speculation")
        if self.attention not in ATTENTION:
            known = ", ".join(ATTENTION)
            raise typer.BadParameter(f"expected one of {known}, found {self.attention!r}", param_hint="--attention")


@dataclass(frozen=True)
class RowFlags:
    """How many sequences share a pass."""

    max_batch: Annotated[
        int, option(PLACE, "Prompts that share a pass.", "--batch-size", parser=count_or_auto, metavar="auto|N")
    ] = "auto"  # type: ignore[assignment]  # typer parses the default too
    num_groups: Annotated[
        int,
        option(
            PLACE,
            "Groups that prompts form: the draft works for one while another is verified.",
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
    """A run of prompts that are given."""


class Checked(Protocol):
    """A record of flags, a dataclass."""

    __dataclass_fields__: ClassVar[dict[str, Field[Any]]]

    def check(self) -> None:
        """Refuse what cannot be meant. Raises typer.BadParameter."""
        ...


Flags = TypeVar("Flags", bound=Checked)


def takes(record: type[Flags]) -> Callable[[Callable[[Flags], None]], Callable[..., None]]:
    """Give a command the fields of a flags record as its options; it receives the record, checked."""
    hints = get_type_hints(record, include_extras=True)
    keyword = inspect.Parameter.KEYWORD_ONLY
    parameters = [
        inspect.Parameter(f.name, keyword, default=f.default, annotation=hints[f.name]) for f in fields(record)
    ]

    def wrap(command: Callable[[Flags], None]) -> Callable[..., None]:
        def call(**values: Any) -> None:
            flags = record(**values)
            flags.check()
            command(flags)

        call.__name__, call.__doc__ = command.__name__, command.__doc__
        call.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]  # what typer reads
        call.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        return call

    return wrap

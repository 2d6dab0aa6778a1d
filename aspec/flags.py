"""The flags that the commands share: one record, and how a command takes it as its options."""

import inspect
import sys
from collections.abc import Callable
from dataclasses import Field, dataclass, fields
from pathlib import Path
from typing import Annotated, Any, ClassVar, Protocol, TypeVar, get_origin, get_type_hints

import typer

from aspec.options import ATTENTION, SPECULATION, EngineOptions
from aspec.units import parse_bytes, parse_rate

MODELS, SAMPLING, PLACE, OUTPUT = "Models", "Sampling", "Memory and speed", "Input and output"
TRACE, BENCH = "Trace", "Benchmark"


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
    """A count, or -1 for auto."""
    if text == "auto":
        return -1
    if text.isdigit():
        return int(text)
    raise typer.BadParameter(f"expected auto or a number from 0 up, found {text!r}")


def option(panel: str, help: str, *names: str, **rest: Any) -> Any:
    """An option of a command, under a heading of its help."""
    return typer.Option(*names, help=help, rich_help_panel=panel, **rest)


@dataclass(frozen=True, slots=True)
class GenerateFlags:
    """What to run, on what, and how; None or -1: decide."""

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
    prompt: Annotated[list[str] | None, option(OUTPUT, "A prompt; repeat for several.", "--prompt", "-p")] = None
    file: Annotated[
        list[Path] | None, option(OUTPUT, "A file that holds a prompt; repeat for several.", "--file", "-f")
    ] = None
    raw: Annotated[bool, option(OUTPUT, "Give the prompt as it is: no chat template.", "--raw")] = False
    system: Annotated[str | None, option(OUTPUT, "A system message, for models with a chat template.")] = None
    as_json: Annotated[bool, option(OUTPUT, "JSON on stdout instead of text.", "--json")] = False
    quiet: Annotated[bool, option(OUTPUT, "No dashboard, no progress, no summary.", "--quiet", "-q")] = False
    no_dashboard: Annotated[
        bool, option(OUTPUT, "Plain progress lines even where stderr is a terminal.", "--no-dashboard")
    ] = False
    debug: Annotated[bool, option(OUTPUT, "Show tracebacks.", "--debug")] = False
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
    logprobs: Annotated[
        int | None, option(SAMPLING, "With --json: logprobs of the tokens and of the K likeliest.", metavar="K")
    ] = None
    seed: Annotated[int, option(SAMPLING, "The same seed gives the same tokens, with or without a draft.")] = 0
    stop: Annotated[list[str] | None, option(SAMPLING, "Stop before this text; repeat for several.")] = None
    ignore_eos: Annotated[bool, option(SAMPLING, "Go on behind an end-of-sequence token.", "--ignore-eos")] = False
    device: Annotated[str, option(PLACE, "auto, cpu or cuda. auto: a GPU where there is one.")] = "auto"
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
    batch_size: Annotated[int, option(PLACE, "Prompts that share a pass.", parser=count_or_auto, metavar="auto|N")] = (
        "auto"  # type: ignore[assignment]  # typer parses the default too
    )
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
    max_context: Annotated[
        int | None,
        option(PLACE, "Tokens of a sequence, prompt included. Default: what the prompts need.", min=2),
    ] = None
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

    def check(self) -> None:
        """Refuse what cannot be meant. Raises typer.BadParameter, which ends with exit code 2."""
        if self.speculation not in SPECULATION:
            known = ", ".join(SPECULATION)
            raise typer.BadParameter(f"expected one of {known}, found {self.speculation!r}", param_hint="--speculation")
        if self.attention not in ATTENTION:
            known = ", ".join(ATTENTION)
            raise typer.BadParameter(f"expected one of {known}, found {self.attention!r}", param_hint="--attention")
        if self.device not in ("auto", "cpu", "cuda"):
            raise typer.BadParameter(f"expected auto, cpu or cuda, found {self.device!r}", param_hint="--device")

    def options(self) -> EngineOptions:
        """How to open the engine. Raises UserError for values that no engine takes."""
        return EngineOptions(
            target=self.target,
            draft=self.draft,
            dtype=self.dtype,
            device=self.device,
            device_memory=self.device_memory,
            host_memory=self.host_memory,
            speculation=self.speculation,
            num_draft_tokens=None if self.num_draft_tokens < 0 else self.num_draft_tokens,
            draft_depth=None if self.draft_depth < 0 else self.draft_depth,
            draft_ahead=self.draft_ahead,
            attention=self.attention,
            exact=self.exact,
            max_batch=None if self.batch_size < 0 else self.batch_size,
            num_groups=None if self.num_groups < 0 else self.num_groups,
            max_context=self.max_context,
            threads=self.threads,
            link_rate=self.link_rate,
        )

    def sampling(self) -> dict[str, Any]:
        """What was said of sampling; None where nothing was."""
        return {
            "max_new_tokens": self.max_new_tokens,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": self.top_k,
            "min_p": self.min_p,
            "repetition_penalty": self.repetition_penalty,
            "presence_penalty": self.presence_penalty,
            "frequency_penalty": self.frequency_penalty,
            "logprobs": self.logprobs,
            "seed": self.seed,
            "stop": tuple(self.stop or ()),
            "ignore_eos": self.ignore_eos,
        }

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


@dataclass(frozen=True, slots=True)
class VerifyFlags(GenerateFlags):
    """Whether to hold the text against plain decoding."""

    verify: Annotated[
        bool,
        option(
            OUTPUT,
            "Decode once more without speculation; say that the tokens are equal, or where they part and by how much "
            "(exit code 1).",
            "--verify",
        ),
    ] = False

    def check(self) -> None:
        """Without speculation there is nothing to verify. Raises typer.BadParameter."""
        GenerateFlags.check(self)
        off = self.speculation == "off" or self.num_draft_tokens == 0
        if self.verify and (off or (self.target is not None and self.draft is None)):
            found = "speculation is off" if off else "--target has no --draft"
            raise typer.BadParameter(f"nothing to verify: {found}", param_hint="--verify")


@dataclass(frozen=True, slots=True)
class TraceFlags(GenerateFlags):
    """What to record or read back besides."""

    recorded: Annotated[Path | None, typer.Argument(metavar="[FILE]", help="A trace to read back, with --summary.")] = (
        None
    )
    summary: Annotated[
        bool,
        option(
            TRACE,
            "Print utilisation by lane, overlap, the critical path and the longest stalls: of FILE, or of the run.",
            "--summary",
        ),
    ] = False
    output: Annotated[
        Path | None, option(TRACE, "The file to write; gzipped when it ends in .gz.", "--output", "-o")
    ] = None
    simulate: Annotated[
        Path | None,
        option(
            TRACE,
            "Run in virtual time on the machine of this JSON file, as aspec profile -o writes, without reading a weight.",
            "--simulate",
            metavar="FILE",
        ),
    ] = None
    compare: Annotated[
        bool,
        option(
            TRACE,
            "Write the run and its simulation side by side; without --simulate from the costs that were measured.",
            "--compare",
        ),
    ] = False
    max_spans: Annotated[
        int, option(TRACE, "Keep the last so many tasks; a million take 150 MB.", "--max-spans", min=1)
    ] = 1_000_000

    def check(self) -> None:
        """Either a trace to read back or a file to write. Raises typer.BadParameter."""
        GenerateFlags.check(self)
        if self.recorded is None and self.output is None:
            raise typer.BadParameter("give the file to write: -o run.json.gz", param_hint="--output")
        if self.recorded is not None and (self.output is not None or not self.summary):
            raise typer.BadParameter("FILE is read back with --summary; a new trace goes to -o FILE", param_hint="FILE")


@dataclass(frozen=True, slots=True)
class BenchFlags(GenerateFlags):
    """How often to measure."""

    rounds: Annotated[int, option(BENCH, "Runs; the table shows their median and spread.", "--rounds", min=1)] = 3


@dataclass(frozen=True, slots=True)
class ChatFlags(GenerateFlags):
    """Those that make sense in a conversation; what is no option here is settled."""

    target: Annotated[
        str | None,
        option(MODELS, "The big model, with a chat template: a folder or a hub id.", "--target", "--model"),
    ] = None
    max_new_tokens: Annotated[
        int, option(SAMPLING, "Tokens of an answer at most.", "--max-new-tokens", "-n", min=1)
    ] = 1024
    max_context: Annotated[
        int | None,
        option(PLACE, "Tokens of the whole conversation. Default: 4096, less where memory is short.", min=2),
    ] = None
    quiet: Annotated[bool, option(OUTPUT, "Nothing but answers and errors.", "--quiet", "-q")] = False
    prompt: list[str] | None = None
    file: list[Path] | None = None
    raw: bool = False
    as_json: bool = False
    no_dashboard: bool = True
    logprobs: int | None = None
    batch_size: int = 1
    num_groups: int = 1


class Checked(Protocol):
    """A record of flags, a dataclass."""

    __dataclass_fields__: ClassVar[dict[str, Field[Any]]]

    def check(self) -> None:
        """Refuse what cannot be meant. Raises typer.BadParameter."""
        ...


Flags = TypeVar("Flags", bound=Checked)


def takes(record: type[Flags]) -> Callable[[Callable[[Flags], None]], Callable[..., None]]:
    """Give a command the options of a flags record as its own; it receives the record, checked.

    A field that is no option keeps its default.
    """
    hints = get_type_hints(record, include_extras=True)
    keyword = inspect.Parameter.KEYWORD_ONLY
    parameters = [
        inspect.Parameter(f.name, keyword, default=f.default, annotation=hints[f.name])
        for f in fields(record)
        if get_origin(hints[f.name]) is Annotated
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

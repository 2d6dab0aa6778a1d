"""The flags of each command: a record that inherits shared flags and adds its own."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import typer

from aspec.cli.flags import (
    DashboardFlags,
    DebugFlags,
    EndFlags,
    EngineFlags,
    JsonFlags,
    LogprobFlags,
    MachineFlags,
    ModelFlags,
    QuietFlags,
    RowFlags,
    RunFlags,
    SamplingFlags,
    SystemFlags,
)
from aspec.cli.front.options import MODELS, OUTPUT, PLACE, SAMPLING, count_or_auto, option
from aspec.options import EngineOptions
from aspec.plan import Workload

TURN_TOKENS = 256  # of a message and of its answer, for which a chat is planned
TRACE, BENCH, WORK = "Trace", "Benchmark", "Workload"
ANSWER_TOKENS = 1024  # most tokens of an answer of a chat


@dataclass(frozen=True)
class GenerateFlags(LogprobFlags, EndFlags, RunFlags):
    """A run, and whether to compare its tokens with decoding without speculation."""

    words: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="PROMPT",
            help="A prompt, as with --prompt; several words are one prompt.",
            rich_help_panel=OUTPUT,
        ),
    ] = None
    verify: Annotated[
        bool,
        option(
            OUTPUT,
            "Decode again without speculation and compare the tokens; a difference is printed with its position and "
            "margin (exit code 1).",
            "--verify",
        ),
    ] = False

    def _words(self) -> list[str]:
        return [" ".join(self.words)] if self.words else []

    def check(self) -> None:
        """Refuse --verify without speculation. Raises typer.BadParameter."""
        super().check()
        if self.verify and (self.speculation == "off" or self.num_draft_tokens == 0):
            raise typer.BadParameter("nothing to verify: speculation is off", param_hint="--verify")


@dataclass(frozen=True)
class TraceFlags(LogprobFlags, EndFlags, RunFlags):
    """A run to record, or a recorded trace to summarise."""

    recorded: Annotated[
        Path | None,
        typer.Argument(metavar="FILE", help="A recorded trace to read; needs --summary.", rich_help_panel=TRACE),
    ] = None
    summary: Annotated[
        bool,
        option(
            TRACE,
            "Print the use of each lane, overlap, the critical path and the longest stalls, of FILE or of the run.",
            "--summary",
        ),
    ] = False
    output: Annotated[
        Path | None, option(TRACE, "The file to write; a name that ends in .gz is compressed.", "--output", "-o")
    ] = None
    simulate: Annotated[
        Path | None,
        option(
            TRACE,
            "Run in virtual time on the machine of this JSON file (aspec profile -o writes it); no weights are read.",
            "--simulate",
            metavar="FILE",
        ),
    ] = None
    compare: Annotated[
        bool,
        option(
            TRACE,
            "Write the run and its simulation into one trace; without --simulate, from the measured costs of the run.",
            "--compare",
        ),
    ] = False
    max_spans: Annotated[
        int, option(TRACE, "Number of tasks to keep, the last ones; a million tasks take 150 MB.", "--max-spans", min=1)
    ] = 1_000_000

    def check(self) -> None:
        """Require either a trace to read or a file to write. Raises typer.BadParameter."""
        super().check()
        if self.recorded is None and self.output is None:
            raise typer.BadParameter("give the file to write: -o run.json.gz", param_hint="--output")
        if self.recorded is not None and (self.output is not None or not self.summary):
            raise typer.BadParameter(
                "FILE is a trace to read and needs --summary; to write a new trace, give -o FILE", param_hint="FILE"
            )


@dataclass(frozen=True)
class BenchFlags(RunFlags):
    """A run, and how often to measure it; end-of-sequence tokens are ignored."""

    rounds: Annotated[
        int, option(BENCH, "Number of runs; the table shows their median, least and most.", "--rounds", min=1)
    ] = 3


@dataclass(frozen=True)
class ChatFlags(EngineFlags, EndFlags, SamplingFlags, DebugFlags, QuietFlags, SystemFlags, ModelFlags):
    """A conversation; one sequence at a time."""

    target: Annotated[
        str | None,
        option(
            MODELS,
            "The big model: a folder, a GGUF file or a hub id. It needs a chat template.",
            "--target",
            "--model",
            metavar="MODEL",
        ),
    ] = None
    max_new_tokens: Annotated[
        int | None,
        option(
            SAMPLING,
            f"Maximum number of tokens of an answer. Default: the checkpoint's value, otherwise {ANSWER_TOKENS}.",
            "--max-new-tokens",
            "-n",
            min=1,
        ),
    ] = None
    max_context: Annotated[
        int | None,
        option(
            PLACE,
            "Maximum tokens that the model sees. Default: 4096, less if memory is short.",
            min=2,
        ),
    ] = None
    quiet: Annotated[bool, option(OUTPUT, "Print only answers and errors.", "--quiet", "-q")] = False

    def options(self) -> EngineOptions:
        """The engine's options, for one row and turns of a usual length. Raises UserError for invalid values."""
        turn = Workload(1, TURN_TOKENS, TURN_TOKENS, sampled=self.temperature != 0.0)
        return replace(super().options(), max_batch=1, num_groups=1, workload=turn)


@dataclass(frozen=True)
class BatchFlags(RowFlags, EngineFlags, EndFlags, SamplingFlags, DebugFlags, DashboardFlags, QuietFlags, ModelFlags):
    """A file of rows to serve, and a file for their answers."""

    input: Annotated[
        Path | None,
        option(
            OUTPUT,
            "The requests: a file in OpenAI's batch format, one request per line; - is standard input.",
            "--input",
            "-i",
        ),
    ] = None
    output: Annotated[
        Path | None,
        option(
            OUTPUT,
            "The answers, one per line. A journal beside the file lets a stopped job continue. - is standard output, "
            "without a journal.",
            "--output",
            "-o",
        ),
    ] = None
    overwrite: Annotated[
        bool, option(OUTPUT, "Start anew if the output exists; its content is lost.", "--overwrite")
    ] = False
    strict: Annotated[
        bool,
        option(OUTPUT, "Refuse the whole file if a row cannot be served. Default: such rows get an error.", "--strict"),
    ] = False
    quiet: Annotated[bool, option(OUTPUT, "Print no progress and no summary.", "--quiet", "-q")] = False
    max_new_tokens: Annotated[
        int | None,
        option(
            SAMPLING,
            "Maximum new tokens of a row without max_tokens. Default: the checkpoint's value, otherwise 128.",
            "--max-new-tokens",
            "-n",
            min=0,
        ),
    ] = None
    seed: Annotated[
        int, option(SAMPLING, "A row without a seed derives its seed from this one and its custom_id.", "--seed")
    ] = 0
    max_batch: Annotated[
        int,
        option(
            PLACE,
            "Number of rows that share a pass. auto: aspec searches for the fastest plan of this job.",
            "--batch-size",
            parser=count_or_auto,
            metavar="auto|N",
        ),
    ] = "auto"  # type: ignore[assignment]  # typer parses the default too
    max_context: Annotated[
        int | None,
        option(
            PLACE,
            "Maximum tokens of a row, prompt included; longer rows get an error. Default: the longest row.",
            min=2,
        ),
    ] = None

    def check(self) -> None:
        """Require both files. Raises typer.BadParameter."""
        super().check()
        if self.input is None:
            raise typer.BadParameter("give the file of requests: -i in.jsonl", param_hint="--input")
        if self.output is None:
            raise typer.BadParameter("give the file to write: -o out.jsonl", param_hint="--output")


@dataclass(frozen=True)
class ProfileFlags(MachineFlags, DebugFlags, QuietFlags, JsonFlags, ModelFlags):
    """The models to measure this machine for, and the form of the result."""

    target: Annotated[
        str | None,
        option(
            MODELS,
            "The big model; its files are read. Default: the embedded demo pair.",
            "--target",
            "--model",
            metavar="MODEL",
        ),
    ] = None
    draft: Annotated[str | None, option(MODELS, "The small model.", "--draft", "--draft-model", metavar="MODEL")] = None
    as_json: Annotated[bool, option(OUTPUT, "JSON on stdout instead of a table.", "--json")] = False
    quiet: Annotated[bool, option(OUTPUT, "Print no progress.", "--quiet", "-q")] = False
    refresh: Annotated[
        bool, option(PLACE, "Measure again; otherwise aspec uses the figures in the user's cache.", "--refresh")
    ] = False
    output: Annotated[
        Path | None,
        option(OUTPUT, "Write the figures to this JSON file, to plan on another machine.", "--output", "-o"),
    ] = None

    def check(self) -> None:
        """A draft needs a target. Raises typer.BadParameter."""
        super().check()
        if self.draft is not None and self.target is None:
            raise typer.BadParameter("it was given without --target: give both or neither", param_hint="--draft")


@dataclass(frozen=True)
class PlanFlags(RowFlags, EngineFlags, DebugFlags, JsonFlags, ModelFlags):
    """The workload and the machine to plan for; no token is generated."""

    profile: Annotated[
        Path | None,
        option(
            PLACE,
            "The JSON file of another machine; aspec profile -o writes it there. Default: this machine, measured once.",
            "--profile",
            metavar="FILE",
        ),
    ] = None
    num_prompts: Annotated[int, option(WORK, "Number of prompts.", "--prompts", min=1)] = 1
    prompt_tokens: Annotated[
        int | None,
        option(WORK, "Tokens per prompt. Default: 256, or half of a smaller context.", "--prompt-tokens", min=1),
    ] = None
    new_tokens: Annotated[
        int | None,
        option(
            WORK, "Tokens to generate per prompt. Default: 128, or half of a smaller context.", "--new-tokens", min=2
        ),
    ] = None
    acceptance: Annotated[
        float | None,
        option(
            WORK,
            "Share of draft proposals that are accepted. Default: the value that aspec bench measured, or 0.8.",
            "--acceptance",
            min=0.0,
            max=1.0,
        ),
    ] = None
    quiet: Annotated[bool, option(OUTPUT, "Print no progress.", "--quiet", "-q")] = False
    temperature: Annotated[
        float | None,
        option(
            WORK,
            "0: greedy decoding. Sampling costs more per token and changes the share of accepted proposals. "
            "Default: the checkpoint's value.",
            "--temperature",
            min=0.0,
        ),
    ] = None

    def sampling(self) -> dict[str, float | None]:
        """The sampling flags; None for flags that were not given."""
        return {"temperature": self.temperature}


@dataclass(frozen=True)
class PrepareFlags(DebugFlags, QuietFlags):
    """The checkpoint to write anew, and where."""

    target: Annotated[
        str | None,
        option(MODELS, "The model: a folder or a hub id.", "--target", "--model", metavar="MODEL"),
    ] = None
    output: Annotated[
        Path | None,
        option(OUTPUT, "The folder of the new checkpoint: a new or an empty one.", "--output", "-o"),
    ] = None
    bits: Annotated[
        int | None,
        option(
            MODELS,
            "4 or 8: quantise the matrices of the layers; embeddings, head and norms stay. Default: all weights stay.",
            "--bits",
        ),
    ] = None
    group_size: Annotated[
        int | None,
        option(
            MODELS, "With --bits: the number of inputs that share a scale: 32, 64 or 128. Default: 32.", "--group-size"
        ),
    ] = None
    published: Annotated[
        bool,
        option(
            MODELS,
            "With --bits 4: in the form of compressed-tensors, which transformers reads, too. Default: the form in "
            "which a CPU multiplies such weights without decoding them.",
            "--published",
        ),
    ] = False
    verify: Annotated[
        bool,
        option(
            OUTPUT,
            "Run both checkpoints on a few tokens and compare their logits. The bytes are read back in any case.",
            "--verify",
        ),
    ] = False
    quiet: Annotated[bool, option(OUTPUT, "Print no progress.", "--quiet", "-q")] = False

    def check(self) -> None:
        """Require both places. Raises typer.BadParameter."""
        if self.target is None:
            raise typer.BadParameter("give the model to prepare: --target MODEL", param_hint="--target")
        if self.output is None:
            raise typer.BadParameter("give the folder to write: -o DIR", param_hint="--output")
        if self.bits not in (None, 4, 8):
            raise typer.BadParameter(f"expected 4 or 8, found {self.bits}", param_hint="--bits")
        if self.group_size not in (None, 32, 64, 128):
            raise typer.BadParameter(f"expected 32, 64 or 128, found {self.group_size}", param_hint="--group-size")
        if self.group_size is not None and self.bits is None:
            raise typer.BadParameter("it was given without --bits", param_hint="--group-size")
        if self.published and self.bits is None:
            raise typer.BadParameter("it was given without --bits", param_hint="--published")

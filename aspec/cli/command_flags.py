"""The flags of every command: a record that composes the shared ones, and adds its own."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import typer

from aspec.cli.flags import (
    MODELS,
    OUTPUT,
    PLACE,
    SAMPLING,
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
    count_or_auto,
    option,
)
from aspec.generation.defaults import TAKEN_FROM_CHECKPOINT
from aspec.options import EngineOptions

TRACE, BENCH, WORK = "Trace", "Benchmark", "The work"


@dataclass(frozen=True)
class GenerateFlags(LogprobFlags, EndFlags, RunFlags):
    """A run, and whether to hold its text against plain decoding."""

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
        super().check()
        off = self.speculation == "off" or self.num_draft_tokens == 0
        if self.verify and (off or (self.target is not None and self.draft is None)):
            found = "speculation is off" if off else "--target has no --draft"
            raise typer.BadParameter(f"nothing to verify: {found}", param_hint="--verify")


@dataclass(frozen=True)
class TraceFlags(LogprobFlags, EndFlags, RunFlags):
    """A run to record, or a trace to read back."""

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
            "Run in virtual time on the machine of this JSON file (aspec profile -o writes one): no weight is read.",
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
        super().check()
        if self.recorded is None and self.output is None:
            raise typer.BadParameter("give the file to write: -o run.json.gz", param_hint="--output")
        if self.recorded is not None and (self.output is not None or not self.summary):
            raise typer.BadParameter("FILE is read back with --summary; a new trace goes to -o FILE", param_hint="FILE")


@dataclass(frozen=True)
class BenchFlags(RunFlags):
    """A run, and how often to measure it; no text ends before its last token."""

    rounds: Annotated[int, option(BENCH, "Runs; the table shows their median and spread.", "--rounds", min=1)] = 3


@dataclass(frozen=True)
class ChatFlags(EngineFlags, EndFlags, SamplingFlags, DebugFlags, QuietFlags, SystemFlags, ModelFlags):
    """A conversation: one sequence at a time."""

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

    def options(self) -> EngineOptions:
        """How to open the engine. Raises UserError for values that no engine takes."""
        return replace(super().options(), max_batch=1, num_groups=1)


@dataclass(frozen=True)
class BatchFlags(RowFlags, EngineFlags, EndFlags, SamplingFlags, DebugFlags, DashboardFlags, QuietFlags, ModelFlags):
    """Which rows to serve, and where their answers go."""

    input: Annotated[
        Path | None, option(OUTPUT, "The requests: a file in OpenAI's batch format, one per line.", "--input", "-i")
    ] = None
    output: Annotated[
        Path | None,
        option(OUTPUT, "The answers, one per line; a journal beside it lets a job go on.", "--output", "-o"),
    ] = None
    overwrite: Annotated[
        bool, option(OUTPUT, "Start afresh where the output exists: what it holds is lost.", "--overwrite")
    ] = False
    quiet: Annotated[bool, option(OUTPUT, "No progress, no summary.", "--quiet", "-q")] = False
    max_new_tokens: Annotated[
        int, option(SAMPLING, "Tokens at most of a row that gives no max_tokens.", "--max-new-tokens", "-n", min=0)
    ] = 128
    seed: Annotated[
        int, option(SAMPLING, "Rows that give no seed derive theirs from it and their custom_id.", "--seed")
    ] = 0
    max_batch: Annotated[
        int,
        option(
            PLACE,
            "Rows that are served at once. auto: as the plan says that is found for this job.",
            "--batch-size",
            parser=count_or_auto,
            metavar="auto|N",
        ),
    ] = "auto"  # type: ignore[assignment]  # typer parses the default too
    max_context: Annotated[
        int | None,
        option(
            PLACE, "Tokens of a row, prompt included; longer ones become error rows. Default: what rows need.", min=2
        ),
    ] = None

    def check(self) -> None:
        """Both files must be named. Raises typer.BadParameter."""
        super().check()
        if self.input is None:
            raise typer.BadParameter("give the file of requests: -i in.jsonl", param_hint="--input")
        if self.output is None:
            raise typer.BadParameter("give the file to write: -o out.jsonl", param_hint="--output")


@dataclass(frozen=True)
class ProfileFlags(MachineFlags, DebugFlags, QuietFlags, JsonFlags, ModelFlags):
    """What to measure this machine for, and where the figures go."""

    target: Annotated[
        str | None,
        option(MODELS, "The big model: its files are read. Without it: the embedded demo's.", "--target", "--model"),
    ] = None
    draft: Annotated[str | None, option(MODELS, "The small model.", "--draft", "--draft-model")] = None
    as_json: Annotated[bool, option(OUTPUT, "JSON on stdout instead of a table.", "--json")] = False
    quiet: Annotated[bool, option(OUTPUT, "No progress.", "--quiet", "-q")] = False
    refresh: Annotated[
        bool, option(PLACE, "Measure again: the figures of this machine are kept in the user's cache.", "--refresh")
    ] = False
    output: Annotated[
        Path | None, option(OUTPUT, "Write the machine to this JSON file, to be read on another.", "--output", "-o")
    ] = None

    def check(self) -> None:
        """A draft serves one target. Raises typer.BadParameter."""
        super().check()
        if self.draft is not None and self.target is None:
            raise typer.BadParameter("was given without --target: name both or neither", param_hint="--draft")


@dataclass(frozen=True)
class PlanFlags(RowFlags, EngineFlags, DebugFlags, JsonFlags, ModelFlags):
    """What is to be done, and on which machine; nothing is generated."""

    profile: Annotated[
        Path | None,
        option(
            PLACE,
            "A machine that is not here, as a JSON file (aspec profile -o there writes it). Default: this "
            "machine, measured once.",
            "--profile",
            metavar="FILE",
        ),
    ] = None
    num_prompts: Annotated[int, option(WORK, "Prompts to serve.", "--prompts", min=1)] = 1
    prompt_tokens: Annotated[int, option(WORK, "Tokens of a prompt.", "--prompt-tokens", min=1)] = 256
    new_tokens: Annotated[int, option(WORK, "Tokens to generate for each.", "--new-tokens", min=2)] = 128
    acceptance: Annotated[
        float | None,
        option(
            WORK,
            "How often a proposal of the draft is accepted. Default: what aspec bench has seen of the pair, or 0.8.",
            "--acceptance",
            min=0.0,
            max=1.0,
        ),
    ] = None
    quiet: Annotated[bool, option(OUTPUT, "No progress.", "--quiet", "-q")] = False
    temperature: Annotated[
        float | None,
        option(
            WORK,
            "How tokens will be drawn, 0: greedily. With noise a draw costs more, and other proposals are accepted. "
            "Default: as the checkpoint says.",
            "--temperature",
            min=0.0,
        ),
    ] = None

    def sampling(self) -> dict[str, float | None]:
        """What was said of sampling; None where nothing was."""
        return dict.fromkeys(TAKEN_FROM_CHECKPOINT) | {"temperature": self.temperature}

"""The flags of each command: a record that inherits shared flags and adds its own."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import typer

from aspec.cli.flags.groups import (
    DashboardFlags,
    DebugFlags,
    EndFlags,
    EngineFlags,
    LogprobFlags,
    ModelFlags,
    QuietFlags,
    RowFlags,
    RunFlags,
    SamplingFlags,
    SystemFlags,
)
from aspec.cli.flags.options import MODELS, OUTPUT, PLACE, SAMPLING, count_or_auto, option, pool_of_workers
from aspec.errors import UserError, reason_of
from aspec.generation.grammar.grammar import Grammar
from aspec.options import EngineOptions
from aspec.plan import Workload

TURN_TOKENS = 256  # of a message and of its answer, for which a chat is planned
TRACE, BENCH = "Trace", "Benchmark"
ANSWER_TOKENS = 1024  # most tokens of an answer of a chat


@dataclass(frozen=True)
class FormFlags:
    """What the text must match."""

    json_schema: Annotated[
        Path | None,
        option(SAMPLING, "The text is JSON that matches the schema in this file.", "--json-schema", metavar="FILE"),
    ] = None
    grammar_file: Annotated[
        Path | None,
        option(SAMPLING, "The text matches the Lark grammar in this file.", "--grammar", metavar="FILE"),
    ] = None

    def grammar(self) -> Grammar | None:
        """The grammar of the flags; None if none is given. Raises UserError."""
        if self.json_schema is not None and self.grammar_file is not None:
            raise UserError("--json-schema and --grammar both say what the text must match: give one of them.")
        path = self.json_schema or self.grammar_file
        if path is None:
            return None
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{path} cannot be read ({reason_of(error)}): expected a text file in UTF-8.") from error
        return Grammar("json_schema" if self.json_schema is not None else "lark", text)


@dataclass(frozen=True)
class GenerateFlags(FormFlags, LogprobFlags, EndFlags, RunFlags):
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

    def sampling(self) -> dict[str, Any]:
        """The sampling flags as fields of ``SamplingParams``. Raises UserError if a file cannot be read."""
        return {**super().sampling(), "grammar": self.grammar()}

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
    workers: Annotated[
        str | None,
        option(
            PLACE,
            "Spread the rows over engines in processes of their own: N of this machine, which share its memory, cores "
            "and cards; or one per node or card of a Ray cluster (extra ray): auto for the cluster that this machine "
            "belongs to, or its address. Each plans for itself; sizes that you give hold for each. If a worker dies, "
            "others take its rows.",
            "--workers",
            parser=pool_of_workers,
            metavar="N|auto|ray://HOST:PORT",
        ),
    ] = None
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

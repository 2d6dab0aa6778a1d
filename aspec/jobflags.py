"""The flags of the commands around a job: the job itself, what a machine can do, what a plan would come to."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from aspec.flags import MODELS, OUTPUT, PLACE, SAMPLING, GenerateFlags, count_or_auto, option, rate

WORK = "The work"


@dataclass(frozen=True, slots=True)
class BatchFlags(GenerateFlags):
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
    batch_size: Annotated[
        int,
        option(
            PLACE,
            "Rows that are served at once. auto: as the plan says that is found for this job.",
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
    prompt: list[str] | None = None
    file: list[Path] | None = None
    raw: bool = False
    system: str | None = None
    as_json: bool = False
    logprobs: int | None = None

    def check(self) -> None:
        """Both files must be named. Raises typer.BadParameter."""
        GenerateFlags.check(self)
        if self.input is None:
            raise typer.BadParameter("give the file of requests: -i in.jsonl", param_hint="--input")
        if self.output is None:
            raise typer.BadParameter("give the file to write: -o out.jsonl", param_hint="--output")


@dataclass(frozen=True, slots=True)
class ProfileFlags:
    """What to measure this machine for, and where the figures go."""

    target: Annotated[
        str | None,
        option(MODELS, "The big model: its files are read. Without it: the embedded demo's.", "--target", "--model"),
    ] = None
    draft: Annotated[str | None, option(MODELS, "The small model.", "--draft", "--draft-model")] = None
    dtype: Annotated[str, option(MODELS, "auto, bfloat16, float16 or float32. auto: the checkpoint's own.")] = "auto"
    device: Annotated[str, option(PLACE, "auto, cpu or cuda. auto: a GPU where there is one.")] = "auto"
    threads: Annotated[int | None, option(PLACE, "Compute threads. Default: all cores but one.", min=1)] = None
    link_rate: Annotated[
        float | None,
        option(PLACE, "The disk lane's throttle, such as 1.0GB/s.", parser=rate, metavar="RATE"),
    ] = None
    refresh: Annotated[
        bool, option(PLACE, "Measure again: the figures of this machine are kept in the user's cache.", "--refresh")
    ] = False
    as_json: Annotated[bool, option(OUTPUT, "JSON on stdout instead of a table.", "--json")] = False
    output: Annotated[
        Path | None, option(OUTPUT, "Write the machine to this JSON file, to be read on another.", "--output", "-o")
    ] = None
    quiet: Annotated[bool, option(OUTPUT, "No progress.", "--quiet", "-q")] = False
    debug: Annotated[bool, option(OUTPUT, "Show tracebacks.", "--debug")] = False

    def check(self) -> None:
        """A draft serves one target. Raises typer.BadParameter."""
        if self.draft is not None and self.target is None:
            raise typer.BadParameter("was given without --target: name both or neither", param_hint="--draft")


@dataclass(frozen=True, slots=True)
class PlanFlags(GenerateFlags):
    """What is to be done, and on which machine; nothing is generated."""

    profile: Annotated[
        Path | None,
        option(
            PLACE,
            "A machine that is not here, as a JSON file (aspec profile -o writes one of this machine). Default: this "
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
    prompt: list[str] | None = None
    file: list[Path] | None = None
    raw: bool = False
    system: str | None = None
    no_dashboard: bool = True
    max_new_tokens: int = 128
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logprobs: int | None = None
    seed: int = 0
    stop: list[str] | None = None
    ignore_eos: bool = False

"""The flags of the commands that generate nothing: profile, plan, prepare."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from aspec.cli.flags.groups import (
    DebugFlags,
    EngineFlags,
    JsonFlags,
    MachineFlags,
    ModelFlags,
    QuietFlags,
    RowFlags,
)
from aspec.cli.flags.options import MODELS, OUTPUT, PLACE, option

WORK = "Workload"


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

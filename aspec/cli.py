"""The command line. Text goes to stdout, everything else to stderr; torch is imported inside the commands.

Exit codes: 0 done, 1 an error (one paragraph; the traceback with --debug), 2 usage, 130 Ctrl-C.
"""

import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from aspec.errors import AspecError
from aspec.options import EngineOptions
from aspec.progress import Console
from aspec.units import parse_bytes, parse_rate

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Run language models that do not fit in device memory: weights stream through a few buffers while a small "
    "draft model proposes tokens, and one pass of the big model verifies many of them.",
)

MODELS, SAMPLING, PLACE, OUTPUT = "Models", "Sampling", "Memory and speed", "Input and output"


@app.callback()
def root() -> None:
    """Keep ``generate`` a subcommand while it is the only one."""


def _bytes(text: str) -> int:
    try:
        return parse_bytes(text)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error


def _rate(text: str) -> float:
    try:
        return parse_rate(text)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error


def _count_or_auto(text: str) -> int:
    """A count, or -1 for auto."""
    if text == "auto":
        return -1
    if text.isdigit():
        return int(text)
    raise typer.BadParameter(f"expected auto or a number from 0 up, found {text!r}")


@app.command()
def generate(
    target: Annotated[
        str | None,
        typer.Option(
            "--target",
            "--model",
            help="The big model: a folder or a hub id. Without it: the embedded demo pair.",
            rich_help_panel=MODELS,
        ),
    ] = None,
    draft: Annotated[
        str | None,
        typer.Option(
            "--draft",
            "--draft-model",
            help="A small model with the same vocabulary that proposes tokens while the target's weights travel.",
            rich_help_panel=MODELS,
        ),
    ] = None,
    dtype: Annotated[
        str, typer.Option(help="auto, bfloat16 or float32. auto: the checkpoint's own.", rich_help_panel=MODELS)
    ] = "auto",
    prompt: Annotated[
        list[str] | None,
        typer.Option("--prompt", "-p", help="A prompt; repeat for several.", rich_help_panel=OUTPUT),
    ] = None,
    file: Annotated[
        list[Path] | None,
        typer.Option("--file", "-f", help="A file that holds a prompt; repeat for several.", rich_help_panel=OUTPUT),
    ] = None,
    raw: Annotated[
        bool, typer.Option("--raw", help="Give the prompt as it is: no chat template.", rich_help_panel=OUTPUT)
    ] = False,
    system: Annotated[
        str | None, typer.Option(help="A system message, for models with a chat template.", rich_help_panel=OUTPUT)
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="One JSON object per prompt on stdout.", rich_help_panel=OUTPUT)
    ] = False,
    quiet: Annotated[
        bool, typer.Option("--quiet", "-q", help="No progress, no summary.", rich_help_panel=OUTPUT)
    ] = False,
    max_new_tokens: Annotated[
        int, typer.Option("--max-new-tokens", "-n", min=0, help="Tokens to generate at most.", rich_help_panel=SAMPLING)
    ] = 128,
    temperature: Annotated[
        float | None,
        typer.Option(
            min=0.0, help="0 is greedy. Default: the checkpoint's generation_config.json.", rich_help_panel=SAMPLING
        ),
    ] = None,
    top_p: Annotated[float | None, typer.Option(help="Nucleus sampling, in (0, 1].", rich_help_panel=SAMPLING)] = None,
    top_k: Annotated[
        int | None, typer.Option(min=0, help="Keep the k likeliest; 0 is off.", rich_help_panel=SAMPLING)
    ] = None,
    min_p: Annotated[
        float | None, typer.Option(help="Keep tokens this likely relative to the best.", rich_help_panel=SAMPLING)
    ] = None,
    seed: Annotated[
        int,
        typer.Option(help="The same seed gives the same tokens, with or without a draft.", rich_help_panel=SAMPLING),
    ] = 0,
    stop: Annotated[
        list[str] | None, typer.Option(help="Stop before this text; repeat for several.", rich_help_panel=SAMPLING)
    ] = None,
    ignore_eos: Annotated[
        bool, typer.Option("--ignore-eos", help="Go on behind an end-of-sequence token.", rich_help_panel=SAMPLING)
    ] = False,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.", rich_help_panel=PLACE)] = "auto",
    device_memory: Annotated[
        int | None,
        typer.Option(
            parser=_bytes,
            metavar="SIZE",
            help="Budget for weights, KV, draft and activations, such as 8GiB. Default: 70 % of what is free.",
            rich_help_panel=PLACE,
        ),
    ] = None,
    num_draft_tokens: Annotated[
        int,
        typer.Option(
            parser=_count_or_auto,
            metavar="auto|N",
            help="Proposals per pass; auto follows measured cost, 0 switches speculation off.",
            rich_help_panel=PLACE,
        ),
    ] = "auto",  # type: ignore[assignment]  # typer parses the default too
    batch_size: Annotated[
        int,
        typer.Option(parser=_count_or_auto, metavar="auto|N", help="Prompts that share a pass.", rich_help_panel=PLACE),
    ] = "auto",  # type: ignore[assignment]  # typer parses the default too
    max_context: Annotated[
        int | None,
        typer.Option(
            min=2, help="Tokens of a sequence, prompt included. Default: what the prompts need.", rich_help_panel=PLACE
        ),
    ] = None,
    threads: Annotated[
        int | None, typer.Option(min=1, help="Compute threads. Default: all cores but one.", rich_help_panel=PLACE)
    ] = None,
    link_rate: Annotated[
        float | None,
        typer.Option(
            parser=_rate,
            metavar="RATE",
            help="Throttle the disk lane, such as 1.0GB/s: comparisons on a shared disk need a fixed rate.",
            rich_help_panel=PLACE,
        ),
    ] = None,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.", rich_help_panel=OUTPUT)] = False,
) -> None:
    """Generate text. Several prompts share every pass of the target's weights.

    Examples:

      aspec generate --prompt "def main():"

      aspec generate --target org/big --draft org/small --device-memory 8GiB --prompt "..." --temperature 0.6

      cat question.txt | aspec generate --target ./model --json
    """
    from aspec.api import run
    from aspec.generation import Request, generate_to_console, prepare

    prompts = _read_prompts(prompt or [], file or [])
    _check_device_name(device)
    options: dict[str, Any] = {
        "target": target,
        "draft": draft,
        "dtype": dtype,
        "device": device,
        "device_memory": device_memory,
        "num_draft_tokens": None if num_draft_tokens < 0 else num_draft_tokens,
        "max_batch": None if batch_size < 0 else batch_size,
        "max_context": max_context,
        "threads": threads,
        "link_rate": link_rate,
    }
    sampling = {
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "top_p": top_p,
        "top_k": top_k,
        "min_p": min_p,
        "seed": seed,
        "stop": tuple(stop or ()),
        "ignore_eos": ignore_eos,
    }
    console = Console(quiet=quiet)
    request = Request(prompts, raw, system, as_json)

    def work() -> None:
        run(partial(generate_to_console, prepare(request, EngineOptions(**options), sampling, console)))

    guarded(work, console, debug)


def _check_device_name(device: str) -> None:
    if device not in ("auto", "cpu", "cuda"):
        raise typer.BadParameter(f"expected auto, cpu or cuda, found {device!r}", param_hint="--device")


def _read_prompts(prompts: list[str], files: list[Path]) -> list[str]:
    """--prompt, then --file, then standard input where it is piped. Usage errors exit with 2."""
    texts = list(prompts)
    for path in files:
        try:
            texts.append(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise typer.BadParameter(f"cannot read {path}: {error}", param_hint="--file") from error
    if not texts and not sys.stdin.isatty():
        texts.append(sys.stdin.read())
    if not texts:
        raise typer.BadParameter("give a prompt: --prompt TEXT, --file PATH or standard input", param_hint="--prompt")
    return texts


def guarded(work: Callable[[], None], console: Console, debug: bool) -> None:
    """Run a command to its exit code: one paragraph for errors, 130 for Ctrl-C, nothing lost."""
    try:
        work()
    except KeyboardInterrupt:
        console.note("interrupted")
        _leave(130)
    except (AspecError, MemoryError) as error:
        if debug:
            raise
        console.error(str(error) or "out of memory")
        _leave(1)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        _leave(1)


def _leave(code: int) -> None:
    sys.stdout.flush()
    raise typer.Exit(code)


def main() -> None:
    """The console script."""
    app()

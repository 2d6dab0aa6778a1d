"""The commands and their exit codes. Results go to stdout, all else to stderr; commands import torch when they run.

Exit codes: 0 success, 1 an error (one paragraph; with --debug the traceback), 2 wrong usage, 130 Ctrl-C, 129 SIGHUP,
143 SIGTERM.
"""

import sys
from collections.abc import Callable, Sequence
from functools import partial
from importlib import import_module
from typing import Annotated

import typer

from aspec import __version__
from aspec.cli.flags.commands import (
    BatchFlags,
    BenchFlags,
    ChatFlags,
    GenerateFlags,
    TraceFlags,
)
from aspec.cli.flags.options import option, takes
from aspec.cli.flags.planning import PlanFlags, PrepareFlags, ProfileFlags
from aspec.cli.flags.serving import ServeFlags
from aspec.cli.front.help import HELP_PANEL, HelpCommand, HelpGroup
from aspec.cli.front.opening import find_mistakes, opening_line
from aspec.cli.front.stuck_main import StuckMain
from aspec.cli.interrupts import Interrupts
from aspec.errors import AspecError, reason_of
from aspec.observe.console import Console
from aspec.observe.library_warnings import held_back
from aspec.observe.terminal.standard_streams import prepare_streams

CommandFlags = (
    BatchFlags
    | BenchFlags
    | ChatFlags
    | GenerateFlags
    | PlanFlags
    | PrepareFlags
    | ProfileFlags
    | ServeFlags
    | TraceFlags
)


def print_version(value: bool) -> None:
    """The callback of ``--version``."""
    if value:
        print(f"aspec {__version__}")
        raise typer.Exit


app = typer.Typer(
    cls=HelpGroup,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.command(cls=HelpCommand)
@takes(GenerateFlags)
def generate(flags: GenerateFlags) -> None:
    """Generate text. Several prompts share every pass of the target's weights.

    Examples:

      aspec generate --prompt "def main():"

      aspec generate --target org/big --draft org/small --device-memory 8GiB --prompt "..." --temperature 0.6

      cat question.txt | aspec generate --target ./model --json

      aspec generate --target ./model --draft ./small --prompt "..." --verify
    """
    perform("aspec.cli.generate", "generate_on_console", flags, flags.prompts)


@app.command(cls=HelpCommand)
@takes(ChatFlags)
def chat(flags: ChatFlags) -> None:
    """Chat with a model in the terminal. Each turn prefills only its new tokens.

    Pasted lines are one message; \"\"\" begins and ends a message of several lines,
    and a backslash at the end continues a line. Commands begin with a slash:
    /set, /system, /show, /save, /load, /regen, /undo, /new; /help lists them.
    Ctrl-C stops an answer and keeps its text so far; Ctrl-D leaves, and so does
    Ctrl-C twice at an empty prompt. A full context drops the oldest turns. Of a
    pipe each line is a turn, as if it was typed; the exit code is 1 if one is
    refused. The model needs a chat template, as instruction-tuned models have.

    Examples:

      aspec chat --target org/big-instruct --draft org/small-instruct

      aspec chat --target ./model --system "Be brief." --temperature 0.7

      cat questions.txt | aspec chat --target ./model --quiet
    """
    perform("aspec.cli.chat.chat", "chat_on_console", flags)


@app.command(cls=HelpCommand)
@takes(TraceFlags)
def trace(flags: TraceFlags) -> None:
    """Record a run as a Chrome trace for ui.perfetto.dev and chrome://tracing, or summarise a recorded trace.

    Examples:

      aspec trace -o run.json.gz --prompt "def main():"

      aspec trace run.json.gz --summary

      aspec trace -o both.json --compare --target ./model --draft ./small --prompt "..."

      aspec trace -o gpu.json --simulate machine.json --target ./model --prompt "..."
    """
    if flags.recorded is None:
        perform("aspec.cli.trace", "record", flags, flags.prompts)
        return
    from aspec.cli.front.trace_summary import summarise_file

    guarded(partial(summarise_file, flags.recorded, flags.as_json), Console(quiet=flags.quiet), flags.debug)


@app.command(cls=HelpCommand)
@takes(BenchFlags)
def bench(flags: BenchFlags) -> None:
    """Measure this machine's limits and some runs; report which share of the limit the runs reach.

    On a CPU also the prices of exactness and of threads: the model's own layers run exactly and not, on one thread and
    on one per core, in turns. 1.30 means 1.3 times the seconds; below 1 it is faster.

    Examples:

      aspec bench

      aspec bench --target ./model --draft ./small --device-memory 8GiB -n 64 --json
    """
    perform("aspec.cli.bench", "bench_to_console", flags)


@app.command(cls=HelpCommand)
@takes(BatchFlags)
def batch(flags: BatchFlags) -> None:
    """Serve a file of requests. A finished row is never lost, even if the job is killed.

    Rows are in OpenAI's batch format, one JSON object per line:

      {"custom_id": "a", "method": "POST", "url": "/v1/completions",
       "body": {"prompt": "def main():", "max_tokens": 64}}

      {"custom_id": "b", "method": "POST", "url": "/v1/chat/completions",
       "body": {"messages": [{"role": "user", "content": "Why?"}]}}

    All rows are checked before the model is loaded. Rows that cannot be served
    are listed and become error rows; with --strict they refuse the file. Each
    answer is synced to the disk when it is complete; answers come in any order
    and carry the row's custom_id (null and the line's number if it has none).
    To continue a stopped job, run the same command again: aspec reads the
    journal beside the output (OUT.journal). The rows are the same as without
    the stop. Draft, memory, batch size and threads may change between the runs;
    the input, the model and the sampling must stay the same.

    Ctrl-C starts no new rows and finishes the rows in progress; a second Ctrl-C
    stops at once.

    With --workers the rows are answered by several engines, of this machine or
    of a Ray cluster. The journal stays here. A worker that dies or hangs loses
    no row, and the rows are those of one engine.

    Examples:

      aspec batch -i in.jsonl -o out.jsonl

      aspec batch -i in.jsonl -o out.jsonl --target org/big --draft org/small --device-memory 8GiB -n 512

      aspec batch -i in.jsonl -o out.jsonl --target ./model --temperature 0.7 --seed 1 --overwrite

      aspec batch -i in.jsonl -o out.jsonl --target org/big --workers ray://head:10001

      zcat in.jsonl.gz | aspec batch -i - -o - --target ./model > out.jsonl
    """
    perform("aspec.cli.batch", "batch_to_console", flags)


@app.command(cls=HelpCommand)
@takes(ServeFlags)
def serve(flags: ServeFlags) -> None:
    """Answer OpenAI's requests over HTTP. Clients stay connected however long a prompt takes.

    Paths: /v1/chat/completions, /v1/completions, /v1/responses, /v1/models,
    /health, /metrics, and a page to chat at /. A request joins the next pass.
    Streams get a comment every 10 s while there is nothing to say. A client that
    leaves frees its row; its prompt is kept while no other needs the row, so a
    retry does not read it again.

    Ctrl-C takes no new requests and finishes the answers that run.

    Examples:

      aspec serve --target org/big-instruct --draft org/small-instruct

      aspec serve --target ./model --host 0.0.0.0 --api-key KEY --max-batch 16

      curl 127.0.0.1:8000/v1/completions -d '{"prompt": "def main():"}'
    """
    perform("aspec.cli.serve", "serve_on_console", flags)


@app.command(cls=HelpCommand)
@takes(ProfileFlags)
def profile(flags: ProfileFlags) -> None:
    """Measure this machine once, and show the costs of a pair of models on it.

    Examples:

      aspec profile

      aspec profile --target ./model --draft ./small --json

      aspec profile --refresh -o machine.json
    """
    perform("aspec.cli.profile", "profile_to_console", flags)


@app.command(cls=HelpCommand)
@takes(PlanFlags)
def plan(flags: PlanFlags) -> None:
    """Find the fastest plan and explain it: placement, memory, speed, bottleneck.

    It reads only the headers of the checkpoints; a config.json alone is enough.
    The real scheduler runs each plan in virtual time, with the costs of this
    machine or of another machine.

    Examples:

      aspec plan --target ./model --draft ./small --device-memory 8GiB

      aspec plan --target ./model --prompts 512 --prompt-tokens 400 --new-tokens 128

      aspec plan --target org/big --profile rtx4090.json --json
    """
    perform("aspec.cli.plan", "plan_to_console", flags)


@app.command(cls=HelpCommand)
@takes(PrepareFlags)
def prepare(flags: PrepareFlags) -> None:
    """Write a checkpoint anew, laid out for streaming: a file for each layer, the tensors in the order of their use.

    The new folder is a checkpoint of safetensors like the old one, with its
    configuration and tokenizer. Every file is synced and read back. To continue
    a stopped command, run it again. Nothing of others is overwritten.

    Examples:

      aspec prepare --target ./model -o ./model-streaming

      aspec prepare --target org/big -o /fast-disk/big --verify

      aspec prepare --target ./model -o ./model-4bit --bits 4
    """
    perform("aspec.cli.prepare", "prepare_to_console", flags)


@app.callback()
def common(
    version: Annotated[
        bool,
        option(HELP_PANEL, "Print the version and exit.", "--version", is_eager=True, callback=print_version),
    ] = False,
) -> None:
    """Run language models that do not fit in device memory.

    Weights stream through a few buffers while a small draft model proposes tokens; one pass of the big model verifies
    many proposals.
    """


def perform(module: str, function: str, flags: CommandFlags, *read: Callable[[], object]) -> None:
    """Run a command's function with what ``read`` reads, and the console; its module imports torch, for seconds.

    Mistakes that need no torch are found before, and a first line tells that the command works.
    """
    console = Console(quiet=flags.quiet)

    def work() -> None:
        find_mistakes(flags)
        inputs = [one() for one in read]
        console.note(opening_line(flags))
        act = getattr(import_module(module), function)
        with held_back(console):
            act(flags, *inputs, console)

    guarded(work, console, flags.debug)


def guarded(work: Callable[[], None], console: Console, debug: bool) -> None:
    """Run a command and exit with its code.

    The codes: 1 and one paragraph for an error, 128 and the number of the signal that stopped the command.
    """
    with Interrupts.watching(console) as interrupts:
        try:
            work()
            sys.stdout.flush()
        except KeyboardInterrupt:
            console.note(interrupts.words)
            raise typer.Exit(interrupts.exit_code or 130) from None
        except (AspecError, MemoryError) as error:
            if debug:
                raise
            console.error(str(error) or "out of memory")
            raise typer.Exit(1) from None
        except Warning as error:
            if debug:
                raise
            console.error(
                f"a warning was turned into an error (python -W, PYTHONWARNINGS): {type(error).__name__}: {error}"
            )
            raise typer.Exit(1) from None
        except BrokenPipeError:
            raise typer.Exit(1) from None
        except OSError as error:  # a file or a disk that fails while it is read
            if debug:
                raise
            console.error(
                f"the system refused a file: {reason_of(error)}. Check the file, its disk and its permissions, and run "
                f"the command again (--debug shows where it happened)."
            )
            raise typer.Exit(1) from None


def main(args: Sequence[str] | None = None) -> None:
    """The console script. It prepares what all commands share: the standard streams and the signals."""
    prepare_streams()
    interrupts = Interrupts().install()
    try:
        with StuckMain(interrupts.end_now):
            app(args)
    except AspecError as error:  # of the help, of a prompt that is read
        Console().error(str(error))
        sys.exit(1)
    except SystemExit as end:
        if end.code and interrupts.exit_code is not None:  # a signal came before or after the command's own part
            sys.exit(interrupts.exit_code)
        raise

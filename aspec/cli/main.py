"""The commands and their exit codes. Results go to stdout, all else to stderr; commands import torch when they run.

Exit codes: 0 success, 1 an error (one paragraph; with --debug the traceback), 2 wrong usage, 130 Ctrl-C, 129 SIGHUP,
143 SIGTERM.
"""

import sys
from collections.abc import Callable, Sequence
from functools import partial

import typer

from aspec.cli.command_flags import (
    BatchFlags,
    BenchFlags,
    ChatFlags,
    GenerateFlags,
    PlanFlags,
    ProfileFlags,
    TraceFlags,
)
from aspec.cli.flags import takes
from aspec.cli.interrupts import Interrupts, run
from aspec.errors import AspecError
from aspec.observe.console import Console
from aspec.observe.library_warnings import held_back
from aspec.observe.terminal.standard_streams import prepare_streams

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Run language models that do not fit in device memory. Weights stream through a few buffers while a small "
    "draft model proposes tokens; one pass of the big model verifies many proposals.",
)


@app.command()
@takes(GenerateFlags)
def generate(flags: GenerateFlags) -> None:
    """Generate text. Several prompts share every pass of the target's weights.

    Examples:

      aspec generate --prompt "def main():"

      aspec generate --target org/big --draft org/small --device-memory 8GiB --prompt "..." --temperature 0.6

      cat question.txt | aspec generate --target ./model --json

      aspec generate --target ./model --draft ./small --prompt "..." --verify
    """
    from aspec.cli.generate import generate_to_console, prepare

    prompts = flags.prompts()
    console = Console(quiet=flags.quiet)
    guarded(
        lambda: run(partial(generate_to_console, prepare(flags, prompts, console), flags.verify)), console, flags.debug
    )


@app.command()
@takes(ChatFlags)
def chat(flags: ChatFlags) -> None:
    """Chat with a model in the terminal. Each turn prefills only its new tokens.

    Each line of standard input is a turn. /new starts a new conversation, /help
    lists the commands, /exit or Ctrl-D leaves. Ctrl-C stops an answer and keeps
    its text so far. The model needs a chat template, as instruction-tuned
    checkpoints have.

    Examples:

      aspec chat --target org/big-instruct --draft org/small-instruct

      aspec chat --target ./model --system "Be brief." --temperature 0.7

      cat questions.txt | aspec chat --target ./model --quiet
    """
    from aspec.cli.chat import chat_on_console

    console = Console(quiet=flags.quiet)
    guarded(lambda: chat_on_console(flags, console), console, flags.debug)


@app.command()
@takes(TraceFlags)
def trace(flags: TraceFlags) -> None:
    """Record a run as a Chrome trace for ui.perfetto.dev and chrome://tracing, or summarise a recorded trace.

    Examples:

      aspec trace -o run.json.gz --prompt "def main():"

      aspec trace run.json.gz --summary

      aspec trace -o both.json --compare --target ./model --draft ./small --prompt "..."

      aspec trace -o gpu.json --simulate machine.json --target ./model --prompt "..."
    """
    from aspec.cli.trace import record, summarise_file

    console = Console(quiet=flags.quiet)
    recorded = flags.recorded
    if recorded is not None:
        guarded(lambda: summarise_file(recorded, flags.as_json), console, flags.debug)
        return
    prompts = flags.prompts()
    guarded(lambda: record(flags, prompts, console), console, flags.debug)


@app.command()
@takes(BenchFlags)
def bench(flags: BenchFlags) -> None:
    """Measure this machine's limits and some runs; report which share of the limit the runs reach.

    Examples:

      aspec bench

      aspec bench --target ./model --draft ./small --device-memory 8GiB -n 64 --json
    """
    from aspec.cli.bench import bench_to_console

    console = Console(quiet=flags.quiet)
    guarded(lambda: bench_to_console(flags, console), console, flags.debug)


@app.command()
@takes(BatchFlags)
def batch(flags: BatchFlags) -> None:
    """Serve a file of requests. A finished row is never lost, even if the job is killed.

    Rows are in OpenAI's batch format, one JSON object per line:

      {"custom_id": "a", "method": "POST", "url": "/v1/completions",
       "body": {"prompt": "def main():", "max_tokens": 64}}

      {"custom_id": "b", "method": "POST", "url": "/v1/chat/completions",
       "body": {"messages": [{"role": "user", "content": "Why?"}]}}

    All rows are checked before the first is served. Each answer is synced to
    the disk when it is complete; answers come in any order and carry the row's
    custom_id. To continue a stopped job, run the same command again: aspec
    reads the journal beside the output (OUT.journal). The rows are the same as
    without the stop. Draft, memory, batch size and threads may change between
    the runs; the input, the model and the sampling must stay the same.

    Ctrl-C starts no new rows and finishes the rows in progress; a second Ctrl-C
    stops at once.

    Examples:

      aspec batch -i in.jsonl -o out.jsonl

      aspec batch -i in.jsonl -o out.jsonl --target org/big --draft org/small --device-memory 8GiB -n 512

      aspec batch -i in.jsonl -o out.jsonl --target ./model --temperature 0.7 --seed 1 --overwrite
    """
    from aspec.cli.batch import batch_to_console

    console = Console(quiet=flags.quiet)
    guarded(lambda: batch_to_console(flags, console), console, flags.debug)


@app.command()
@takes(ProfileFlags)
def profile(flags: ProfileFlags) -> None:
    """Measure this machine once, and show the costs of a pair of models on it.

    Examples:

      aspec profile

      aspec profile --target ./model --draft ./small --json

      aspec profile --refresh -o machine.json
    """
    from aspec.cli.profile import profile_to_console

    console = Console(quiet=flags.quiet)
    guarded(lambda: profile_to_console(flags, console), console, flags.debug)


@app.command()
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
    from aspec.cli.plan import plan_to_console

    console = Console(quiet=flags.quiet)
    guarded(lambda: plan_to_console(flags, console), console, flags.debug)


def guarded(work: Callable[[], None], console: Console, debug: bool) -> None:
    """Run a command and exit with its code; warnings come last.

    The codes: 1 and one paragraph for an error, 128 and the number of the signal that stopped the command.
    """
    with Interrupts.watching(console) as interrupts:
        try:
            with held_back(console):
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


def main(args: Sequence[str] | None = None) -> None:
    """The console script. It prepares what all commands share: the standard streams and the signals."""
    prepare_streams()
    interrupts = Interrupts().install()
    try:
        app(args)
    except AspecError as error:  # of the help, of a prompt that is read
        Console().error(str(error))
        sys.exit(1)
    except SystemExit as end:
        if end.code and interrupts.exit_code is not None:  # a signal came before or after the command's own part
            sys.exit(interrupts.exit_code)
        raise

"""What a command does before torch is there: it finds mistakes, prints a first line, and shows what is fetched."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec

from aspec.cli.flags.commands import BatchFlags, TraceFlags
from aspec.cli.flags.groups import MachineFlags, ModelFlags, SamplingFlags
from aspec.cli.flags.planning import PlanFlags, PrepareFlags
from aspec.cli.flags.serving import ServeFlags
from aspec.errors import UserError
from aspec.generation.params import SamplingParams
from aspec.io import hub
from aspec.io.fetching.fetch import LINE_S, Fetches, Words
from aspec.observe.console import Console
from aspec.options import NGRAM, NO_MODELS
from aspec.profiling.hardware import read_machine

REDRAW_S = 0.2  # between two states of the line on a terminal


def find_mistakes(flags: MachineFlags | PrepareFlags) -> None:
    """Raise the UserError of a value, a path or a small file that is wrong, before the seconds of importing torch."""
    if isinstance(flags, PrepareFlags):
        hub.check(str(flags.target), what="target")
        return
    if isinstance(flags, ServeFlags):
        find_server()
    if isinstance(flags, BatchFlags) and flags.workers is not None and not flags.workers.isdigit():
        find_ray()
    options = flags.options()
    if isinstance(flags, SamplingFlags):
        SamplingParams(**{name: value for name, value in flags.sampling().items() if value is not None})
    machine = flags.profile if isinstance(flags, PlanFlags) else None
    machine = flags.simulate if isinstance(flags, TraceFlags) else machine
    if machine is not None:
        read_machine(machine)
    if options.target is not None:
        hub.check(str(options.target), what="target")
    if options.draft not in (None, *NO_MODELS):
        hub.check(str(options.draft), what="draft")


def find_server() -> None:
    """Raise UserError if a library of the server is missing."""
    missing = [name for name in ("starlette", "uvicorn") if find_spec(name) is None]
    if missing:
        raise UserError(
            f"aspec serve needs {' and '.join(missing)}: expected the extra serve, found none. Install "
            f"them: pip install 'aspec[serve]'"
        )


def find_ray() -> None:
    """Raise UserError if Ray is missing."""
    if find_spec("ray") is None:
        raise UserError(
            "--workers with a Ray cluster needs Ray: expected the extra ray, found none. Install it here and on every "
            "node: pip install 'aspec[ray]'. Processes of this machine alone need no Ray: give their number, such as "
            "--workers 2."
        )


def opening_line(flags: ModelFlags | PrepareFlags) -> str:
    """The first line of a command that opens models."""
    if isinstance(flags, PrepareFlags):
        return f"preparing {flags.target} ..."
    target = "the embedded demo pair" if flags.target is None else flags.target
    draft = f" with the draft {flags.draft}" if flags.draft not in (None, NGRAM) else ""
    return f"opening {target}{draft} ..."


@contextmanager
def status_line(console: Console) -> Iterator[Callable[[str], None]]:
    """Shows the state of long work: on a terminal in one line that disappears, elsewhere in a line now and then."""
    live = console.stderr.is_terminal and not console.stderr.is_dumb_terminal
    next_s = 0.0

    def show(text: str) -> None:
        nonlocal next_s
        now_s = time.monotonic()
        if console.quiet or now_s < next_s:
            return
        if live:
            next_s = now_s + REDRAW_S
            console.stderr.file.write(f"\r\x1b[K{f'aspec: {text}'[: console.stderr.width - 1]}")
            console.stderr.file.flush()
        else:
            next_s = now_s + LINE_S
            console.note(text)

    try:
        yield show
    finally:
        if live and next_s:
            console.stderr.file.write("\r\x1b[K")
            console.stderr.file.flush()


@contextmanager
def fetching(console: Console) -> Iterator[Fetches]:
    """Fetches whose state is shown."""
    words = Words()
    with status_line(console) as show:
        yield Fetches(lambda stage, done, total: show(words(stage, done, total)))

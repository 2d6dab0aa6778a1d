"""What ``aspec chat`` does: each entry is a turn of a conversation or a command, and answers stream to stdout.

The loop runs only while the engine opens, answers and closes. It does not run at the prompt, so the main thread reads
the entry as usual: with editing, and Ctrl-C ends the read.
"""

from contextlib import AsyncExitStack

import typer

from aspec.cli.chat.answering import Answering
from aspec.cli.chat.commands import COMMANDS, execute
from aspec.cli.chat.conversation import check_system
from aspec.cli.chat.entry import Entry, Message, parse
from aspec.cli.chat.prefill import PrefillProgress
from aspec.cli.chat.reading import Reader, open_reader
from aspec.cli.chat.session import Session
from aspec.cli.command_flags import ANSWER_TOKENS, ChatFlags
from aspec.cli.front.opening import fetching
from aspec.cli.interrupts import loop_runner, present
from aspec.engine.engine import Engine, describe_plan
from aspec.errors import NumericError, PromptError, UserError
from aspec.generation.defaults import describe, sampling_params
from aspec.generation.params import SamplingParams
from aspec.generation.text.tokenizer import Tokenizer
from aspec.io.hub import known_as
from aspec.models.configuration.generation_defaults import generation_defaults
from aspec.observe.console import Console
from aspec.observe.dashboard import watch
from aspec.observe.monitor import Monitor
from aspec.planning.resolve import Resolved, resolve, revise


def chat_on_console(flags: ChatFlags, console: Console) -> None:
    """Answer entries until the input ends. Raises AspecError for unusable input or a failure of the machine.

    A refused entry costs only itself; if one came from a pipe or a file, the exit code is 1 at the end.
    """
    resolved, params = _prepare(flags, console)
    reader, progress = open_reader(COMMANDS), PrefillProgress()
    with loop_runner() as runner:
        stack = AsyncExitStack()
        engine = present().run(runner, _open(stack, resolved, progress, console))
        try:
            answering = Answering(runner, engine, progress, console, mark_pastes=reader.marks_pastes)
            all_went_well = _converse(Session(resolved, engine, answering, console, params, flags.system), reader)
        finally:
            with present().finishing():
                runner.run(stack.aclose())
    if not (all_went_well or reader.interactive):
        raise typer.Exit(1)


def _converse(session: Session, reader: Reader) -> bool:
    """Execute entries until the end; returns False if one was refused. Raises UserError if no entry can be read."""
    all_went_well = True
    while not session.leaving:
        try:
            entry = _read(reader, session.console)
        except PromptError as error:
            session.console.error(str(error))
            all_went_well = False
            continue
        if entry is None:
            break
        try:
            _execute(entry, session)
        except (UserError, NumericError) as error:  # of this entry only: the conversation goes on
            session.console.error(str(error))
            all_went_well = False
    return all_went_well


def _read(reader: Reader, console: Console) -> Entry | None:
    """The next entry. Raises KeyboardInterrupt for the second Ctrl-C in a row at an empty prompt."""
    try:
        return reader.read()
    except KeyboardInterrupt:
        if not reader.interactive:
            raise
    present().settle()
    console.note("press Ctrl-C again to leave, or Ctrl-D")
    return reader.read()


def _execute(entry: Entry, session: Session) -> None:
    try:
        entry.text.encode()
    except UnicodeEncodeError as error:
        raise PromptError(
            f"this entry is not valid Unicode at character {error.start}: expected UTF-8 text, found byte "
            f"0x{ord(entry.text[error.start]) & 0xFF:02x}. Convert the input to UTF-8."
        ) from error
    match parse(entry):
        case Message(text):
            if text.strip():
                session.answer(text)
        case call:
            try:
                execute(call, session)
            except KeyboardInterrupt:
                present().settle()
                session.note("stopped")


def _prepare(flags: ChatFlags, console: Console) -> tuple[Resolved, SamplingParams]:
    """Find the models, which may block for long (a download), and check what needs no weights. Raises UserError."""
    with fetching(console) as fetches:
        resolved = resolve(flags.options(), fetches)
    tokenizer = Tokenizer.load(resolved.tokenizer)
    if not tokenizer.has_chat_template:
        name = "the embedded demo pair" if resolved.options.target is None else str(known_as(resolved.target))
        raise UserError(
            f"{name} has no chat template: expected one in tokenizer_config.json or chat_template.jinja, found none. "
            f"Choose an instruction-tuned model with --target, or continue plain text with `aspec generate`."
        )
    check_system(flags.system, tokenizer.encode_chat)
    defaults, given = generation_defaults(resolved.target), flags.sampling()
    params = sampling_params(defaults, given, ANSWER_TOKENS)
    if asked_for := describe(defaults, given):
        console.note(asked_for)
    return resolved, params


async def _open(stack: AsyncExitStack, resolved: Resolved, progress: PrefillProgress, console: Console) -> Engine:
    """Open an engine, which closes with the stack."""
    monitor = Monitor(console.stops)
    with watch(monitor, console, dashboard=False):
        engine = await stack.enter_async_context(Engine(revise(resolved, progress=monitor.progress), [progress]))
    console.note(describe_plan(engine.plan))
    return engine

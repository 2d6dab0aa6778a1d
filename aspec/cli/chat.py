"""What ``aspec chat`` does: lines to turns of a conversation, answers streamed to stdout.

The loop runs while the engine opens, answers and closes. At the prompt it rests, so that a line is read on the main
thread as in any program: with line editing, and with a Ctrl-C that ends the read.
"""

import asyncio
import importlib.util
import io
import sys
from collections.abc import Callable
from contextlib import AsyncExitStack, aclosing, suppress
from dataclasses import dataclass

from aspec.api import loop_factory
from aspec.cli.command_flags import ChatFlags
from aspec.engine.engine import Engine, describe_plan
from aspec.errors import PromptError, UserError
from aspec.generation.defaults import sampling_params
from aspec.generation.params import SamplingParams
from aspec.generation.stats import Piece, RequestStats
from aspec.generation.tokenizer import Tokenizer
from aspec.models.model import generation_defaults
from aspec.observe.console import Console
from aspec.observe.dashboard import watch
from aspec.observe.monitor import Monitor
from aspec.planning.resolve import Resolved, resolve, revise

PROMPT = "> "
HELP = """\
/new     start afresh: all that was said is forgotten
/help    this list
/exit    leave; so does Ctrl-D
Ctrl-C   stop an answer and keep what was said of it; at the prompt drop the line, and leave where it is empty"""


class Conversation:
    """What was said so far, and its tokens; mutable, because every turn adds to it."""

    def __init__(self, tokenizer: Tokenizer, system: str | None = None) -> None:
        self._tokenizer = tokenizer
        self._system = [{"role": "system", "content": system}] if system else []
        self.restart()

    def restart(self) -> None:
        """Forget all but the system message."""
        self._messages = list(self._system)
        self._said: list[int] = []  # the tokens that the next prompt should begin with: their KV stands

    def prompt(self, line: str) -> list[int]:
        """All that was said, and a new line. Raises PromptError where the template refuses it."""
        return self._tokenizer.encode_chat([*self._messages, {"role": "user", "content": line}], self._said)

    def add(self, line: str, answer: str, said: list[int]) -> None:
        """A turn is over."""
        self._messages += [{"role": "user", "content": line}, {"role": "assistant", "content": answer}]
        self._said = said


@dataclass(frozen=True, slots=True)
class Chat:
    """A conversation with an open engine; ``runner`` has its loop, which runs while an answer is generated."""

    runner: asyncio.Runner
    engine: Engine
    conversation: Conversation
    params: SamplingParams
    console: Console

    def take(self, line: str) -> bool:
        """Do what a line says; False: leave. Raises AspecError where the machine fails."""
        match line.split():
            case []:
                pass
            case ["/exit"]:
                return False
            case ["/new"]:
                self.conversation.restart()
                self._remark("a new conversation")
            case ["/help"]:
                self.console.stderr.print(HELP, markup=False)
            case [word] if word.startswith("/"):
                self.console.error(f"{word} is no command: expected /new, /help, /exit or a message.")
            case _:
                try:
                    self._turn(line)
                except PromptError as error:
                    self.console.error(str(error))
        return True

    def _turn(self, line: str) -> None:
        """Raises PromptError where the line cannot be answered; then nothing was said."""
        prompt = self.conversation.prompt(line)
        if len(prompt) >= self.engine.max_context:
            raise PromptError(
                f"with this line the conversation has {len(prompt)} tokens; the context holds "
                f"{self.engine.max_context}, and at least one must stay free for the answer. Start afresh with /new, "
                f"say less, or begin with a larger --max-context."
            )
        pieces: list[Piece] = []
        self.runner.run(_answer(self.engine, prompt, self.params, pieces, self.console.write))
        self.console.write("\n")
        self.console.show_warnings()
        answer, said = "".join(piece.text for piece in pieces), [*prompt]
        said += [token for piece in pieces for token in piece.token_ids]
        stats = pieces[-1].stats if pieces else None
        if answer or stats:
            self.conversation.add(line, answer, said)
        full = "; the context is full: /new starts afresh" if len(said) >= self.engine.max_context else ""
        self._remark((footer(stats, pieces[-1].finish_reason) if stats else "stopped") + full)

    def _remark(self, text: str) -> None:
        """A dim line for whoever sits at a terminal."""
        if self.console.stderr.is_terminal:
            self.console.note(text)


def chat_on_console(flags: ChatFlags, console: Console) -> None:
    """Talk until the input ends. Raises AspecError where the input cannot be used or the machine fails."""
    resolved, tokenizer, params = _prepare(flags)
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")  # what is no UTF-8 is refused line by line
    with asyncio.Runner(loop_factory=loop_factory()) as runner:
        stack = AsyncExitStack()
        engine = runner.run(_open(stack, resolved, console))
        try:
            chat = Chat(runner, engine, Conversation(tokenizer, flags.system), params, console)
            while (line := read_line()) is not None and chat.take(line):
                pass
        finally:
            runner.run(stack.aclose())


def footer(stats: RequestStats, reason: str | None) -> str:
    """One line: how much was said, how fast, and what of the prompt was new."""
    words = [f"{stats.completion_tokens} tokens ({reason})"]
    if stats.tokens_per_s is not None:
        words.append(f"{stats.tokens_per_s:.2f} tokens/s")
    if stats.tokens_per_pass is not None:
        words.append(f"{stats.tokens_per_pass:.2f} tokens per pass")
    new = stats.prompt_tokens - stats.num_cached_tokens
    return ", ".join([*words, f"prompt: {new} tokens new, {stats.num_cached_tokens} reused"])


def read_line() -> str | None:
    """The next line; None at the end of the input. A terminal is asked for it."""
    if sys.stdin.isatty() and sys.stdout.isatty():
        return _ask()
    if sys.stdin.isatty():  # answers go elsewhere, the prompt must not follow them
        sys.stderr.write(PROMPT)
        sys.stderr.flush()
    line = sys.stdin.readline()
    return line.rstrip("\r\n") if line else None


def _ask() -> str | None:
    """A line from a terminal, with editing; Ctrl-C drops what was typed, and leaves where nothing was."""
    editor = importlib.import_module("readline") if importlib.util.find_spec("readline") else None  # input() uses it
    while True:
        try:
            return input(PROMPT)
        except EOFError:
            sys.stdout.write("\n")
            return None
        except KeyboardInterrupt:
            sys.stdout.write("\n")
            if editor is None or not editor.get_line_buffer():
                raise


def _prepare(flags: ChatFlags) -> tuple[Resolved, Tokenizer, SamplingParams]:
    """Everything that may block for long (a download) or refuse, before the loop starts. Raises UserError."""
    resolved = resolve(flags.options())
    tokenizer = Tokenizer.load(resolved.target)
    if not tokenizer.has_chat_template:
        name = "the embedded demo pair" if resolved.options.target is None else str(resolved.target)
        raise UserError(
            f"{name} has no chat template: expected one in tokenizer_config.json or chat_template.jinja, found none. "
            f"Choose an instruction-tuned model with --target, or continue plain text with `aspec generate`."
        )
    return resolved, tokenizer, sampling_params(generation_defaults(resolved.target), flags.sampling())


async def _open(stack: AsyncExitStack, resolved: Resolved, console: Console) -> Engine:
    """The engine, which closes with the stack."""
    monitor = Monitor()
    with watch(monitor, console, dashboard=False):
        engine = await stack.enter_async_context(Engine(revise(resolved, progress=monitor.progress)))
    console.note(describe_plan(engine.plan))
    return engine


async def _answer(
    engine: Engine, prompt: list[int], params: SamplingParams, pieces: list[Piece], write: Callable[[str], None]
) -> None:
    """One answer, written as it arrives; where Ctrl-C stops it, the last of the pieces has no finish reason."""
    with suppress(asyncio.CancelledError):  # the answer ends, the conversation goes on
        async with aclosing(engine.stream(prompt, params)) as stream:
            async for piece in stream:
                pieces.append(piece)
                write(piece.text)

"""What ``aspec chat`` does: each input line is a turn of a conversation, and answers stream to stdout.

The loop runs only while the engine opens, answers and closes. It does not run at the prompt, so the main thread reads
the line as usual: with line editing, and Ctrl-C ends the read.
"""

import asyncio
import importlib.util
import io
import sys
from collections.abc import Callable
from contextlib import AsyncExitStack, aclosing, suppress
from dataclasses import dataclass

from aspec.cli.command_flags import ChatFlags
from aspec.cli.interrupts import loop_runner, present
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
/new     start a new conversation and forget the old one
/help    show this list
/exit    leave; Ctrl-D leaves, too
Ctrl-C   stop an answer and keep its text so far; at the prompt, drop the line, or leave if the line is empty"""


class Conversation:
    """The messages so far and their tokens; mutable, because every turn adds to them."""

    def __init__(self, tokenizer: Tokenizer, system: str | None = None) -> None:
        self._tokenizer = tokenizer
        self._system = [{"role": "system", "content": system}] if system else []
        self.restart()

    def restart(self) -> None:
        """Forget all messages except the system message."""
        self._messages = list(self._system)
        self._tokens: list[int] = []  # the next prompt should begin with these tokens: their KV is cached

    def prompt(self, line: str) -> list[int]:
        """The tokens of all messages and a new line. Raises PromptError if the chat template refuses them."""
        return self._tokenizer.encode_chat([*self._messages, {"role": "user", "content": line}], self._tokens)

    def add(self, line: str, answer: str, tokens: list[int]) -> None:
        """Add a finished turn; ``tokens``: its prompt and its answer."""
        self._messages += [{"role": "user", "content": line}, {"role": "assistant", "content": answer}]
        self._tokens = tokens


@dataclass(frozen=True, slots=True)
class Chat:
    """A conversation with an open engine; ``runner`` owns the engine's loop, which runs during an answer."""

    runner: asyncio.Runner
    engine: Engine
    conversation: Conversation
    params: SamplingParams
    console: Console

    def execute(self, line: str) -> bool:
        """Execute a line, a command or a message; False: leave. Raises AspecError if the machine fails."""
        match line.split():
            case []:
                pass
            case ["/exit"]:
                return False
            case ["/new"]:
                self.conversation.restart()
                self._note_on_terminal("a new conversation")
            case ["/help"]:
                self.console.stderr.print(HELP, markup=False)
            case [word] if word.startswith("/"):
                self.console.error(f"{word} is not a command: expected /new, /help, /exit or a message.")
            case _:
                try:
                    self._turn(line)
                except PromptError as error:
                    self.console.error(str(error))
        return True

    def _turn(self, line: str) -> None:
        """Answer a message. Raises PromptError if that is impossible; the conversation is then unchanged."""
        prompt = self.conversation.prompt(line)
        if len(prompt) >= self.engine.max_context:
            raise PromptError(
                f"with this line the conversation has {len(prompt)} tokens; the context holds "
                f"{self.engine.max_context}, and at least one must stay free for the answer. Begin a new "
                f"conversation with /new, write a shorter message, or restart with a larger --max-context."
            )
        pieces: list[Piece] = []
        present().run(self.runner, _answer(self.engine, prompt, self.params, pieces, self.console.write))
        self.console.write("\n")
        self.console.show_warnings()
        answer, tokens = "".join(piece.text for piece in pieces), [*prompt]
        tokens += [token for piece in pieces for token in piece.token_ids]
        stats = pieces[-1].stats if pieces else None
        if answer or stats:
            self.conversation.add(line, answer, tokens)
        full = "; the context is full: /new starts a new conversation" if len(tokens) >= self.engine.max_context else ""
        self._note_on_terminal((footer(stats, pieces[-1].finish_reason) if stats else "stopped") + full)

    def _note_on_terminal(self, text: str) -> None:
        """Print a dim line, on a terminal only."""
        if self.console.stderr.is_terminal:
            self.console.note(text)


def chat_on_console(flags: ChatFlags, console: Console) -> None:
    """Answer lines until the input ends. Raises AspecError for unusable input or a failure of the machine."""
    resolved, tokenizer, params = _prepare(flags)
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")  # a line that is not UTF-8 is refused later, alone
    with loop_runner() as runner:
        stack = AsyncExitStack()
        engine = present().run(runner, _open(stack, resolved, console))
        try:
            chat = Chat(runner, engine, Conversation(tokenizer, flags.system), params, console)
            while (line := read_line()) is not None and chat.execute(line):
                pass
        finally:
            with present().finishing():
                runner.run(stack.aclose())


def footer(stats: RequestStats, reason: str | None) -> str:
    """One line: tokens of the answer, speed, and how many prompt tokens were new."""
    words = [f"{stats.completion_tokens} tokens ({reason})"]
    if stats.tokens_per_s is not None:
        words.append(f"{stats.tokens_per_s:.2f} tokens/s")
    if stats.tokens_per_pass is not None:
        words.append(f"{stats.tokens_per_pass:.2f} tokens per pass")
    new = stats.prompt_tokens - stats.num_cached_tokens
    return ", ".join([*words, f"prompt: {new} tokens new, {stats.num_cached_tokens} reused"])


def read_line() -> str | None:
    """Read the next line; None at the end of the input. On a terminal, print a prompt first."""
    if sys.stdin.isatty() and sys.stdout.isatty():
        return _ask()
    if sys.stdin.isatty():  # stdout is not a terminal: print the prompt to stderr, apart from the answers
        sys.stderr.write(PROMPT)
        sys.stderr.flush()
    line = sys.stdin.readline()
    return line.rstrip("\r\n") if line else None


def _ask() -> str | None:
    """Read a line from a terminal, with editing. Ctrl-C drops a typed line; on an empty line it leaves."""
    editor = (
        importlib.import_module("readline") if importlib.util.find_spec("readline") else None
    )  # input() uses readline once it is imported
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
            present().settle()


def _prepare(flags: ChatFlags) -> tuple[Resolved, Tokenizer, SamplingParams]:
    """Find the models, which may block for long (a download), before the loop starts. Raises UserError."""
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
    """Open an engine, which closes with the stack."""
    monitor = Monitor(console.stops)
    with watch(monitor, console, dashboard=False):
        engine = await stack.enter_async_context(Engine(revise(resolved, progress=monitor.progress)))
    console.note(describe_plan(engine.plan))
    return engine


async def _answer(
    engine: Engine, prompt: list[int], params: SamplingParams, pieces: list[Piece], write: Callable[[str], None]
) -> None:
    """Write an answer as it arrives. If Ctrl-C stops it, the last piece has no finish reason."""
    with suppress(asyncio.CancelledError):  # the answer ends, the conversation continues
        async with aclosing(engine.stream(prompt, params)) as stream:
            async for piece in stream:
                pieces.append(piece)
                write(piece.text)

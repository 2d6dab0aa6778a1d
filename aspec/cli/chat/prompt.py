"""Entries edited on a terminal by prompt_toolkit: history across sessions, pastes of many lines, Ctrl-Z."""

import logging
import os
import re
from collections.abc import Iterable
from pathlib import Path

from prompt_toolkit import PromptSession
from prompt_toolkit.buffer import Buffer
from prompt_toolkit.completion import WordCompleter
from prompt_toolkit.document import Document
from prompt_toolkit.filters import has_focus
from prompt_toolkit.history import FileHistory
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
from prompt_toolkit.keys import Keys
from prompt_toolkit.output import create_output
from prompt_toolkit.shortcuts import CompleteStyle

from aspec.cli.chat.entry import MORE, PROMPT, Entry, continued
from aspec.cli.interrupts import restore_terminal_modes, terminal_modes

LONGEST_KEPT = 100_000  # characters of an entry in the file of the history


class PromptReader:
    """Reads entries; mutable, because the session keeps the history and the state of the line."""

    interactive = marks_pastes = True

    def __init__(self, commands: Iterable[str]) -> None:
        """The Tab key completes ``commands``."""
        self._is_pasted = False  # the entry began as a paste of several lines
        logging.getLogger(Buffer.__module__).setLevel(logging.CRITICAL)  # a signal amid the history is no error
        output = create_output()
        if hasattr(output, "enable_cpr"):
            output.enable_cpr = False  # an answer of the terminal would mix with keys that were typed early
        self._session: PromptSession[str] = PromptSession(
            PROMPT,
            prompt_continuation=lambda width, line, is_wrapped: " " * width if is_wrapped else MORE,
            history=History(history_file()),
            key_bindings=self._bindings(),
            completer=WordCompleter(list(commands), pattern=re.compile(r"\S+")),
            complete_while_typing=False,
            complete_style=CompleteStyle.READLINE_LIKE,
            reserve_space_for_menu=0,
            enable_suspend=True,
            output=output,
        )
        self._session.default_buffer.on_text_changed += self._forget_paste

    def read(self) -> Entry | None:
        """The next entry. Ctrl-C drops what is typed; at an empty prompt it raises KeyboardInterrupt."""
        self._is_pasted = False
        modes = terminal_modes()
        try:
            text = self._session.prompt(set_exception_handler=False)  # a signal's exception is told by the command
        except EOFError:
            return None
        except BaseException:  # a signal amid the first drawing or the last: the prompt leaves its marks and modes
            self._session.app.renderer.reset()
            restore_terminal_modes(modes)
            raise
        return Entry(text, verbatim=self._is_pasted)

    def _forget_paste(self, buffer: Buffer) -> None:
        self._is_pasted &= bool(buffer.text)

    def _bindings(self) -> KeyBindings:
        bindings = KeyBindings()
        typing = has_focus("DEFAULT_BUFFER")  # not the search in the history

        @bindings.add("enter", filter=typing)
        def _(event: KeyPressEvent) -> None:
            buffer = event.current_buffer
            begun = None if self._is_pasted else continued(buffer.text)
            if begun is None:
                buffer.validate_and_handle()
            else:
                buffer.document = Document(begun)

        @bindings.add("escape", "enter", filter=typing)
        def _(event: KeyPressEvent) -> None:
            event.current_buffer.newline(copy_margin=False)

        @bindings.add("c-c", filter=typing)
        @bindings.add("<sigint>", filter=typing)
        def _(event: KeyPressEvent) -> None:
            if event.current_buffer.text:
                event.app.exit(result="", style="class:aborting")
            else:
                event.app.exit(exception=KeyboardInterrupt, style="class:aborting")

        @bindings.add(Keys.BracketedPaste, filter=typing)
        def _(event: KeyPressEvent) -> None:
            buffer = event.current_buffer
            text = event.data.replace("\r\n", "\n").replace("\r", "\n")
            is_first = not buffer.text
            buffer.insert_text(text.removesuffix("\n") if is_first else text)
            self._is_pasted |= is_first and "\n" in buffer.text

        return bindings


class History(FileHistory):
    """The entries of all sessions, in a file for the user alone. A file that cannot be used costs only the history."""

    def load_history_strings(self) -> Iterable[str]:
        """The entries, the newest first."""
        try:
            return list(super().load_history_strings())
        except OSError:
            return []

    def store_string(self, string: str) -> None:
        """Append an entry."""
        if len(string) <= LONGEST_KEPT:
            try:
                path = Path(os.fsdecode(self.filename))
                path.parent.mkdir(parents=True, exist_ok=True)
                path.touch(mode=0o600)
                super().store_string(string)
            except OSError:
                return


def history_file() -> Path:
    """The file of the history, in the user's state folder (XDG Base Directory Specification)."""
    base = os.environ.get("XDG_STATE_HOME", "")
    return (Path(base) if os.path.isabs(base) else Path.home() / ".local" / "state") / "aspec" / "chat_history"

"""The commands of a chat: one row each, with its help. A new command is a new row of ``COMMANDS``."""

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from aspec.cli.chat import settings
from aspec.cli.chat.conversation import Conversation, check_system
from aspec.cli.chat.entry import Call, unquoted
from aspec.cli.chat.saved_talk import SavedTalk, load, save
from aspec.cli.chat.session import Session
from aspec.cli.chat.wrapping import visible
from aspec.engine.engine import describe_plan
from aspec.errors import PromptError, shown

SETTING = re.compile(r"([\w-]+)(?:\s*=\s*|\s+|$)(.*)", re.DOTALL)
KEYS = """\
Ctrl-C   stop an answer and keep its text so far; at the prompt, drop the line;
         twice at an empty prompt, leave
Ctrl-D   leave, at an empty prompt
Up       earlier entries, also of earlier chats
\"\"\"      begins and ends a message of several lines; a backslash at the end of
         a line and Alt-Enter continue it; pasted lines are one message
//NAME   a message that begins with a slash, where /NAME looks like a command"""


@dataclass(frozen=True, slots=True)
class Command:
    """One row: what a command does with the text after its name."""

    run: Callable[[Session, str], None]
    help: str
    argument: str = ""  # as the help names it; empty: the command takes none, in brackets: it may be left out


def execute(call: Call, session: Session) -> None:
    """Execute a command. Raises UserError if it is unknown or cannot do what it is asked."""
    command = COMMANDS.get(call.name)
    if command is None:
        raise PromptError(
            f"{call.name:.60} is not a command{settings.did_you_mean(call.name, COMMANDS)}: /help lists them. For a "
            f"message that begins so, write two slashes."
        )
    if call.argument and not command.argument:
        raise PromptError(
            f"{call.name} takes nothing after its name, found {call.argument!r:.60}. For a message that begins so, "
            f"write two slashes."
        )
    if not call.argument and command.argument and not command.argument.startswith("["):
        raise PromptError(f"{call.name} needs {command.argument} to {command.help}.")
    command.run(session, call.argument)


def _show_help(session: Session, _: str) -> None:
    rows = [(f"{name} {command.argument}", command.help) for name, command in COMMANDS.items()]
    width = max(len(usage) for usage, _ in rows)
    _print(session, "\n".join(f"{usage:{width}}  {help}" for usage, help in rows) + f"\n\n{KEYS}")


def _set(session: Session, argument: str) -> None:
    given = SETTING.fullmatch(argument)
    if given is None:
        _print(session, settings.listed(session.params))
        return
    name, text = given[1], unquoted(given[2].strip())
    if name.lower() == "system":
        _set_system(session, text)
        return
    name = settings.known_name(name)
    if not text:
        _print(session, f"{name} {settings.shown(getattr(session.params, name))}")
        return
    session.params = settings.changed(session.params, name, text, session.start_params)
    session.note(f"{name} is {settings.shown(getattr(session.params, name))}")


def _set_system(session: Session, text: str) -> None:
    if not text:
        _print(session, session.talk.system or "there is no system message")
        return
    system = None if text == '""' else text
    check_system(system, session.encode)
    session.talk = replace(session.talk, system=system)
    session.note("the system message is set for the whole conversation" if system else "there is no system message now")


def _show(session: Session, _: str) -> None:
    talk = session.talk
    turns = f"{len(talk.turns)}"
    if talk.num_left_out:
        turns += f", the oldest {talk.num_left_out} of them dropped from the context"
    if talk.unanswered is not None:
        turns += ", and a message without an answer"
    used = session.num_used
    rows = {
        "model": session.model,
        "draft": session.draft,
        "plan": describe_plan(session.engine.plan),
        "sampling": settings.described(session.params),
        "context": f"{'unknown' if used is None else used} of {session.engine.max_context} tokens",
        "turns": turns,
        "system": talk.system or "none",
    }
    _print(session, "\n".join(f"{name:10}{text}" for name, text in rows.items()))


def _save(session: Session, argument: str) -> None:
    _write(session, argument, overwrite=False)


def _save_over(session: Session, argument: str) -> None:
    _write(session, argument, overwrite=True)


def _write(session: Session, argument: str, *, overwrite: bool) -> None:
    path = _path(argument)
    save(path, SavedTalk(session.talk, settings.as_object(session.params), session.model), overwrite=overwrite)
    session.note(f"{_count(session.talk)} saved in {path}")


def _load(session: Session, argument: str) -> None:
    path = _path(argument)
    saved = load(path)
    check_system(saved.talk.system, session.encode)
    params = settings.from_object(session.params, saved.settings)
    session.talk, session.params = saved.talk, params
    session.note(f"{_count(saved.talk)} loaded from {path}")
    if saved.model is not None and saved.model != session.model:
        session.note(f"it was with the model {shown(saved.model)}; {session.model} continues it")


def _regen(session: Session, _: str) -> None:
    session.answer_again()


def _undo(session: Session, _: str) -> None:
    text = session.talk.last_user
    if text is None:
        raise PromptError("there is no turn to drop.")
    session.talk = session.talk.without_last()
    session.note(
        f"dropped the turn that begins with {' '.join(visible(text).split())[:60]!r}; {_count(session.talk)} left"
    )


def _new(session: Session, _: str) -> None:
    session.talk = Conversation(session.talk.system)
    session.note("a new conversation")


def _leave(session: Session, _: str) -> None:
    session.leaving = True


COMMANDS = {
    "/set": Command(_set, "change a sampling parameter, or system; alone, list all", "[NAME VALUE]"),
    "/system": Command(_set_system, 'set the system message; "" removes it; alone, show it', "[TEXT]"),
    "/show": Command(_show, "show model, draft, plan, sampling, use of the context, turns"),
    "/save": Command(_save, "write the conversation and the settings into a new file", "FILE"),
    "/save!": Command(_save_over, "the same, and replace the file if it exists", "FILE"),
    "/load": Command(_load, "continue the conversation of a file, with its settings", "FILE"),
    "/regen": Command(_regen, "answer the last message again, with another seed"),
    "/undo": Command(_undo, "drop the last message and its answer"),
    "/new": Command(_new, "a new conversation; system message and settings stay"),
    "/clear": Command(_new, "the same"),
    "/help": Command(_show_help, "show this list"),
    "/?": Command(_show_help, "the same"),
    "/bye": Command(_leave, "leave"),
    "/exit": Command(_leave, "the same"),
}


def _print(session: Session, text: str) -> None:
    """Print to stderr, also when quiet: stdout is for answers only."""
    session.console.stderr.print(visible(text), markup=False, emoji=False)


def _path(argument: str) -> Path:
    quoted = len(argument) > 1 and argument[0] == argument[-1] and argument[0] in "'\""
    return Path(argument[1:-1] if quoted else argument).expanduser()


def _count(talk: Conversation) -> str:
    return "1 turn" if len(talk.turns) == 1 else f"{len(talk.turns)} turns"

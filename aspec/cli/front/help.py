"""The help of the command line: names, metavars and sentences, in the width of the terminal.

``--help`` leaves the switches of ``SECONDARY`` to ``--help-all``. A name is never cut: where it is longer than its
column, or the terminal is narrow, its sentence begins on the next line.
"""

import re
import shutil
import textwrap
from collections.abc import Iterator
from typing import Any

import rich.console
import typer
from rich.text import Text
from typer.core import TyperCommand, TyperGroup

HELP_ALL = "--help-all"
SECONDARY = {
    *("--dtype", "--host-memory", "--link-rate", "--draft-depth", "--draft-ahead", "--attention", "--groups"),
    *("--experts", "--prefetch-experts", "--products"),
    *("--min-p", "--repetition-penalty", "--presence-penalty", "--frequency-penalty", "--logprobs", "--ignore-eos"),
    *("--max-spans", "--debug", "--json-schema", "--grammar"),
}
"""Switches that few runs need."""
HELP_PANEL = "Help"
MAX_WIDTH, LEFT_WIDTH, NARROW = 100, 28, 64  # columns: of the page, of names; below it, sentences are under names
QUOTED = re.compile(r'"[^"]*"')
BOLD, CYAN = "bold", "bold cyan"


class HelpCommand(TyperCommand):
    """A command that prints the help of this module."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Print the help."""
        _print(_command_page(ctx, everything=False))


class HelpGroup(TyperGroup):
    """A group of commands that prints the help of this module."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Print the help."""
        rows = [(name, _first_sentence(command.help or "")) for name, command in self.commands.items()]
        _print([*_head(ctx), *_section("Commands", rows), *_options(ctx, everything=True)])


def show_all(ctx: typer.Context, value: bool) -> None:
    """The callback of ``--help-all``."""
    if value:
        _print(_command_page(ctx, everything=True))
        raise typer.Exit


def _print(lines: list[Text]) -> None:
    console = rich.console.Console(highlight=False, soft_wrap=True)
    for line in lines:
        console.print(line)


def _width() -> int:
    return max(20, min(MAX_WIDTH, shutil.get_terminal_size().columns))


def _command_page(ctx: Any, *, everything: bool) -> list[Text]:
    return [*_head(ctx), *_options(ctx, everything=everything)]


def _head(ctx: Any) -> Iterator[Text]:
    """The usage, and what the command does."""
    pieces = ctx.command.collect_usage_pieces(ctx)
    yield Text(f"Usage: {' '.join([ctx.command_path, *pieces])}", style=BOLD)
    for paragraph in (ctx.command.help or "").split("\n\n"):
        yield Text()
        if paragraph.startswith(" "):
            yield from map(Text, _wrap_code(paragraph))
        else:
            yield from map(Text, textwrap.wrap(paragraph, _width(), break_long_words=False, break_on_hyphens=False))


def _wrap_code(paragraph: str) -> Iterator[str]:
    """Lines of a command or of JSON; a long command goes on after a backslash."""
    for line in paragraph.splitlines():
        indent = " " * (len(line) - len(line.lstrip()))
        parts = [line]
        if "{" not in line:
            whole = QUOTED.sub(lambda text: text[0].replace(" ", "\0"), line.strip())
            parts = textwrap.wrap(
                whole,
                _width() - 2,
                initial_indent=indent,
                subsequent_indent=indent + "    ",
                break_long_words=False,
                break_on_hyphens=False,
            )
        yield from (part.replace("\0", " ") + " \\" for part in parts[:-1])
        yield parts[-1].replace("\0", " ")


def _options(ctx: Any, *, everything: bool) -> Iterator[Text]:
    """The options by panel."""
    panels: dict[str, list[tuple[str, str]]] = {}
    folded = 0
    for param in sorted(ctx.command.get_params(ctx), key=lambda param: param.param_type_name):  # arguments first
        names = [*param.opts, *param.secondary_opts] if param.param_type_name == "option" else []
        if param.hidden or (names == [] and not getattr(param, "help", None)):
            continue
        if not everything and SECONDARY.intersection(names):
            folded += 1
            continue
        panel = getattr(param, "rich_help_panel", None) or HELP_PANEL
        panels.setdefault(panel, []).append((_spell(param, names), _sentence(param)))
    rows = panels.pop(HELP_PANEL, [])
    if not everything and not folded:
        rows = [row for row in rows if row[0] != HELP_ALL]
    rows = [(name, f"{text[:-1]}; {folded} more." if name == HELP_ALL and folded else text) for name, text in rows]
    for panel, found in [*panels.items(), (HELP_PANEL, rows)]:
        yield from _section(panel, found)


def _spell(param: Any, names: list[str]) -> str:
    """The names of an option and what follows them; the metavar of an argument."""
    short = sorted(name for name in names if not name.startswith("--"))
    words = ", ".join([*short, *(name for name in names if name.startswith("--"))])
    return " ".join(filter(None, [words, param.metavar]))


def _sentence(param: Any) -> str:
    text = str(param.help or "")
    if isinstance(param.default, int) and not isinstance(param.default, bool):
        return f"{text} Default: {param.default}."
    return text


def _section(title: str, rows: list[tuple[str, str]]) -> Iterator[Text]:
    """A title, and names with their sentences."""
    if not rows:
        return
    width = _width()
    narrow = width < NARROW
    left = 6 if narrow else 4 + min(LEFT_WIDTH, max(len(name) for name, _ in rows))
    yield Text()
    yield Text(title, style=BOLD)
    for name, text in rows:
        lines = textwrap.wrap(text, width - left, break_on_hyphens=False)
        line = Text(f"  {name}", style=CYAN)
        if not narrow and len(name) + 4 <= left and lines:
            line.pad_right(left - len(line))
            line = Text.assemble(line, lines.pop(0))
        yield line
        yield from (Text(" " * left + more) for more in lines)


def _first_sentence(text: str) -> str:
    line = " ".join(text.split("\n\n")[0].split())
    return line.partition(". ")[0].rstrip(".") + "."

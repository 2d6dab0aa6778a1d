"""How a record of flags becomes the options of a command: parsers of values, ``option`` and ``takes``."""

import inspect
from collections.abc import Callable
from dataclasses import Field, fields
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, ClassVar, Protocol, TypeVar, get_args, get_type_hints

import typer

from aspec.cli.front.help import HELP_ALL, HELP_PANEL, show_all
from aspec.units import parse_bytes, parse_rate

SMALLEST_BARE = 1 << 20  # bytes; no model fits into less
AUTO = -1  # a count that the planner chooses
MODELS, SAMPLING, PLACE, OUTPUT = "Models", "Sampling", "Memory and speed", "Input and output"


def size(text: str) -> int:
    """Parse a number of bytes such as 8GiB. Raises typer.BadParameter, also for a few bytes: their unit is missing."""
    try:
        nbytes = parse_bytes(text)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    if nbytes < SMALLEST_BARE and text.strip().isdigit():
        raise typer.BadParameter(
            f"expected a size with a unit such as 512MiB, found {text!r}, which is {nbytes} bytes; did you mean "
            f"{text.strip()}MiB or {text.strip()}GiB?"
        )
    return nbytes


def rate(text: str) -> float:
    """Parse bytes per second such as 1.0GB/s. Raises typer.BadParameter."""
    try:
        return parse_rate(text)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error


def count_or_auto(text: str) -> int:
    """Parse a count of at least 0; ``auto`` is AUTO. Raises typer.BadParameter."""
    if text == "auto":
        return AUTO
    if text.isdigit():
        return int(text)
    raise typer.BadParameter(f"expected auto or a whole number of at least 0, found {text!r}")


def pool_of_workers(text: str) -> str:
    """Check a number of processes, ``auto`` or the address of a Ray cluster. Raises typer.BadParameter."""
    if text == "auto" or text.startswith("ray://") or (text.isascii() and text.isdigit() and int(text) > 0):
        return text
    raise typer.BadParameter(
        f"expected a number of processes of at least 1, auto for the Ray cluster of this machine, or ray://HOST:10001, "
        f"found {text!r}"
    )


METAVARS = {int: "N", float: "X", str: "TEXT", Path: "PATH"}
"""What stands for a value in the help, where an option names nothing better."""


def option(panel: str, help: str, *names: str, **rest: Any) -> Any:
    """An option of a command; ``panel`` is its heading in the help."""
    return typer.Option(*names, help=help, rich_help_panel=panel, **rest)


class Checked(Protocol):
    """A dataclass of flags."""

    __dataclass_fields__: ClassVar[dict[str, Field[Any]]]

    def check(self) -> None:
        """Refuse invalid flags. Raises typer.BadParameter."""
        ...


Flags = TypeVar("Flags", bound=Checked)
HelpAll = Annotated[bool, option(HELP_PANEL, "Show all switches.", HELP_ALL, is_eager=True, callback=show_all)]


def takes(record: type[Flags]) -> Callable[[Callable[[Flags], None]], Callable[..., None]]:
    """Turn the fields of a flags record into options of a command, which receives the checked record."""
    hints = get_type_hints(record, include_extras=True)
    keyword = inspect.Parameter.KEYWORD_ONLY
    parameters = [
        inspect.Parameter(f.name, keyword, default=f.default, annotation=_with_metavar(hints[f.name]))
        for f in fields(record)
    ]
    parameters.append(inspect.Parameter("help_all", keyword, default=False, annotation=HelpAll))

    def wrap(command: Callable[[Flags], None]) -> Callable[..., None]:
        def call(*, help_all: bool, **values: Any) -> None:
            flags = record(**values)
            flags.check()
            command(flags)

        call.__name__, call.__doc__ = command.__name__, command.__doc__
        call.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]  # typer reads it
        call.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        return call

    return wrap


def _with_metavar(hint: Any) -> Any:
    """An option's annotation, with the metavar of its type unless it has one."""
    kind, info = get_args(hint)
    while inner := [kind for kind in get_args(kind) if kind is not NoneType]:  # str | None, list[Path]
        (kind,) = inner
    if kind is not bool and info.metavar is None:
        info.metavar = METAVARS[kind]
    return hint

"""JSON from untrusted files: any bytes become a value, or an error of one sentence."""

import json
from collections import Counter
from pathlib import Path
from typing import Any, NoReturn

from aspec.errors import UserError

MAX_DIGITS = 300  # of a whole number: a longer one does not fit a float, and readers compute with floats


class NotJson(ValueError):
    """The bytes are not the expected JSON; the text gives the reason and begins in lower case."""


class DuplicateMember(NotJson):
    """An object has two members of the same name; Python's json would keep the last one."""

    def __init__(self, name: str) -> None:
        super().__init__(f"{name} is there twice in one object")
        self.name = name


def parse_json(data: bytes, *, unique: bool = False, constants: bool = False) -> Any:
    """The JSON value of ``data``. Raises NotJson, and nothing else, for any bytes.

    ``unique``: refuse two members of the same name. ``constants``: NaN and Infinity are numbers, as Python writes them.
    """
    try:
        return json.loads(
            data.decode("utf-8"),
            object_pairs_hook=_unique if unique else None,
            parse_constant=None if constants else _refuse_constant,
            parse_int=_whole,
        )
    except NotJson:
        raise
    except UnicodeDecodeError as error:
        raise NotJson(f"expected UTF-8, found byte 0x{data[error.start]:02x} at {error.start}") from error
    except RecursionError as error:
        raise NotJson("expected JSON (it is nested too deeply)") from error
    except ValueError as error:
        raise NotJson(f"expected JSON ({error})") from error


def read_json(path: Path, what: str, *, error: type[UserError] = UserError, constants: bool = False) -> Any:
    """A file's JSON value. Raises ``error`` in one paragraph; ``what`` names the expected file, such as "a profile"."""
    try:
        data = path.read_bytes()
    except OSError as failure:
        reason = failure.strerror or failure
        raise error(f"{path} cannot be read: expected {what}, found: {reason}. Check the path.") from failure
    try:
        return parse_json(data, constants=constants)
    except NotJson as failure:
        raise error(f"{path} is not {what}: {failure}. Correct the file or fetch it again.") from failure


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        ((name, _),) = Counter(name for name, _ in pairs).most_common(1)
        raise DuplicateMember(name)
    return made


def _whole(digits: str) -> int:
    if len(digits) > MAX_DIGITS:
        raise NotJson(f"expected JSON (a number has {len(digits)} digits, {MAX_DIGITS} at most are understood)")
    return int(digits)


def _refuse_constant(name: str) -> NoReturn:
    raise NotJson(f"expected JSON, which has no {name}")

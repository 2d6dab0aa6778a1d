"""JSON from untrusted files: any bytes become a value, or an error of one sentence."""

import contextlib
import errno
import json
import os
import stat
import tempfile
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NoReturn, TypeVar, cast

from aspec.errors import UserError, shown

T = TypeVar("T")
KINDS: Mapping[type, str] = MappingProxyType(
    {int: "a whole number", float: "a number", str: "a text", dict: "an object"}
)
LARGEST = 1e20
MAX_FILE_BYTES = 1 << 30  # of a file that is read as a whole
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
    except json.JSONDecodeError as error:
        raise NotJson(f"expected JSON ({error.msg.removesuffix(' at')} {_place(error)})") from error
    except ValueError as error:
        raise NotJson(f"expected JSON ({error})") from error


def _place(error: json.JSONDecodeError) -> str:
    """The place of a fault: a line and a column, in a text of one line a character."""
    text = error.doc.rstrip()
    if error.pos >= len(text):
        return "at its end"
    return f"at line {error.lineno} column {error.colno}" if "\n" in text else f"at character {error.pos + 1}"


def read_json(path: Path, what: str, *, error: type[UserError] = UserError, constants: bool = False) -> Any:
    """A file's JSON value. Raises ``error`` in one paragraph; ``what`` names the expected file, such as "a profile"."""
    try:
        data = read_regular(path)
    except OSError as failure:
        reason = failure.strerror or failure
        raise error(f"{path} cannot be read: expected {what}, found: {reason}. Check the path.") from failure
    try:
        return parse_json(data, constants=constants)
    except NotJson as failure:
        raise error(f"{path} is not {what}: {failure}. Correct the file or fetch it again.") from failure


def member(values: Any, name: str, kind: type[T], missing: T | None = None) -> T:
    """A member of a JSON object. Raises NotJson if it has another type than ``kind``; absent, it is ``missing``.

    A whole number serves as a float; numbers are at most ``LARGEST``, so that sums of them stay numbers.
    """
    if not isinstance(values, dict):
        raise NotJson(f"expected an object with {name}, found {shown(values)}")
    value = values.get(name, missing)
    expected = (int, float) if kind is float else kind
    fits = isinstance(value, expected) and not isinstance(value, bool)
    if not fits or (isinstance(value, int | float) and abs(value) > LARGEST):
        raise NotJson(f"expected {name} to be {KINDS[kind]}, found {shown(value)}")
    return cast(T, value)


def read_regular(path: Path) -> bytes:
    """The bytes of a regular file. Raises OSError for anything else, at once: a pipe would wait, a device never end."""
    file = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0))
    with open(file, "rb") as stream:
        status = os.fstat(file)
        if not stat.S_ISREG(status.st_mode):
            raise OSError(errno.EINVAL, "it is not a regular file", str(path))
        if status.st_size > MAX_FILE_BYTES:
            raise OSError(errno.EFBIG, f"{status.st_size} bytes, more than {MAX_FILE_BYTES}", str(path))
        return stream.read()


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


def read_record(file: Path) -> Mapping[str, Any]:
    """The JSON object of a file that aspec wrote; empty if the file is missing or holds no JSON object."""
    with contextlib.suppress(UserError):
        values = read_json(file, "a record of the cache")
        if isinstance(values, dict):
            return values
    return {}


def replace_json(file: Path, values: Mapping[str, Any]) -> None:
    """Replace a file as a whole: other processes read the old or the new one. An OSError is ignored."""
    with contextlib.suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=file.parent, prefix=f".{file.stem}-")
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as stream:
                json.dump(values, stream, indent=1)
            os.replace(temporary, file)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise

"""Seeded damage to files: bytes, JSON values and whole files, as bugs, disks, downloads and attackers leave them."""

import copy
import json
import os
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

DEEP = "[" * 3000 + "]" * 3000
RAW = "\0raw:"  # a text that begins so is written into the JSON without quotes
VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2, 3, 4, 0.5, -0.0, 1e308, "", " ", "0", "x", "null", [], {}, [[]], [{}], {"": 0}),
    *(1 << 31, 1 << 34, 1 << 53, (1 << 63) - 1, 1 << 63, 1 << 64, -(1 << 63), 10**9, 10**18, 10**308),
    *("\x1b[2J\x1b]0;x\x07", "\0", "\ud800", "\u202e", "../../../etc/passwd", "/etc/passwd", "a" * 100_000, "é" * 99),
    *([0] * 2000, {"a": {"b": {"c": [1, 2, {"d": None}]}}}, ["a", 1, None], "{{ 1 }}", "{% for x in y %}", "%s%n{0}"),
    *(f"{RAW}NaN", f"{RAW}Infinity", f"{RAW}1e999", f"{RAW}{'9' * 5000}", f"{RAW}{DEEP}", f'{RAW}{{"a":1,"a":2}}'),
)
BYTES = (
    b"\0",
    b"\xff",
    b"\xef\xbb\xbf",
    b'"',
    b"\\",
    b"{",
    b"[",
    b"]",
    b"}",
    b",",
    b":",
    b"\n",
    b"\r",
    b"-",
    b"9" * 40,
)


def damaged_bytes(dice: Random, data: bytes) -> bytes:
    """One to four edits of bytes: flipped, cut, repeated, moved, inserted."""
    out = bytearray(data)
    for _ in range(dice.randint(1, 4)):
        at = dice.randrange(len(out) + 1)
        size = dice.choice((1, 1, 2, 8, 64, 1024))
        match dice.randrange(7):
            case 0 if at < len(out):
                out[at] ^= 1 << dice.randrange(8)
            case 1:
                del out[at:]
            case 2:
                del out[at : at + size]
            case 3:
                out[at:at] = out[at : at + size]
            case 4:
                start = dice.randrange(len(out) + 1)
                out[at:at] = out[start : start + size]
            case 5:
                out[at:at] = dice.choice(BYTES)
            case _:
                out[at : at + size] = dice.randbytes(size)
    return bytes(out)


def damaged_json(dice: Random, value: Any) -> bytes:
    """One to three edits of members and elements of a JSON value, in text that Python's json would write."""
    holder = {"": json.loads(json.dumps(value))}
    for _ in range(dice.randint(1, 3)):
        parent, key = dice.choice(list(_places(holder)))
        match dice.randrange(8):
            case 0 if parent is not holder:
                del parent[key]
            case 1 if isinstance(parent, dict):
                parent[str(value_of(dice))[:200]] = parent[key]
            case 2:
                other, place = dice.choice(list(_places(holder)))
                parent[key] = json.loads(json.dumps(other[place]))
            case 3 if isinstance(parent[key], int | float) and abs(parent[key]) < 1e300:
                parent[key] = dice.choice((parent[key] + 1, -parent[key], parent[key] * 2, float(parent[key]) / 3))
            case 4 if isinstance(parent, list):
                parent.insert(dice.randrange(len(parent) + 1), value_of(dice))
            case _:
                parent[key] = value_of(dice)
    return _written(holder[""])


def value_of(dice: Random) -> Any:
    """A hostile value, a new one each time."""
    return copy.deepcopy(dice.choice(VALUES))


def _places(value: Any) -> Any:
    """Every (container, key) of a JSON value."""
    for key in list(value) if isinstance(value, dict) else range(len(value)):
        yield value, key
        if isinstance(value[key], dict | list):
            yield from _places(value[key])


def _written(value: Any) -> bytes:
    text = json.dumps(value)
    mark = json.dumps(RAW)[1:-1]
    while (start := text.find(f'"{mark}')) >= 0:
        end = text.index('"', start + 1)
        while text[end - 1] == "\\":
            end = text.index('"', end + 1)
        text = text[:start] + text[start + 1 + len(mark) : end].replace('\\"', '"') + text[end + 1 :]
    return text.encode()


def damaged_encoding(dice: Random, data: bytes) -> bytes:
    """The same text in another encoding, or nothing of it."""
    text = data.decode("utf-8", errors="replace")
    choices: tuple[Callable[[], bytes], ...] = (
        lambda: b"",
        lambda: b"\xef\xbb\xbf" + data,
        lambda: text.encode("utf-16"),
        lambda: text.encode("utf-32"),
        lambda: b" \n\t" * 1000,
        lambda: b"\0" * 4096,
        lambda: data + data,
        lambda: data[: len(data) // 2],
        lambda: DEEP.encode(),
        lambda: b'{"a":' * 20_000,
        lambda: b"null",
        lambda: b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n",
    )
    return dice.choice(choices)()


def replaced_file(dice: Random, path: Path) -> None:
    """Something else in the place of a file."""
    path.unlink()
    match dice.randrange(7):
        case 0:
            os.mkfifo(path)
        case 1:
            path.mkdir()
        case 2:
            path.symlink_to(path)
        case 3:
            path.symlink_to("/dev/zero")
        case 4:
            path.symlink_to("/dev/null")
        case 5:
            path.symlink_to(path.with_name("no such file"))
        case _:
            pass  # it is missing


def damage(dice: Random, path: Path, *, is_json: bool = True) -> None:
    """Damage a file in one of the ways there are."""
    kind, data = dice.random(), path.read_bytes()
    if kind < 0.04:
        replaced_file(dice, path)
    elif kind < 0.12:
        path.write_bytes(damaged_encoding(dice, data))
    elif kind < 0.45 or not is_json:
        path.write_bytes(damaged_bytes(dice, data))
    else:
        path.write_bytes(damaged_json(dice, json.loads(data)))

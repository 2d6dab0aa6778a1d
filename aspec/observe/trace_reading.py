"""Reads a trace file back that ``chrome_trace`` wrote."""

import errno
import gzip
import io
import re
import zlib
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from aspec.errors import UserError, shown
from aspec.io.json_file import MAX_FILE_BYTES, NotJson, member, parse_json, read_regular
from aspec.observe.chrome_trace import COMMIT, LOADS, NODES, ROUNDS, TEXT_FACTS
from aspec.observe.timeline import LANES, Round, Slice, Timeline


def read_trace(path: Path) -> dict[str, Timeline]:
    """The timelines, by process, of a file that ``write_trace`` wrote. Raises UserError for any other file."""
    try:
        packed = read_regular(path)
        data = parse_json(_unpacked(packed) if path.suffix == ".gz" else packed)
    except (gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise UserError(f"{path}: not a trace: expected a gzip file, found {error}.") from error
    except OSError as error:
        raise UserError(f"{path}: the trace cannot be read: {error.strerror or error}.") from error
    except NotJson as error:
        raise UserError(f"{path}: not a trace in Chrome's form: {error}.") from error
    if not isinstance(data, dict) or not isinstance(data.get("traceEvents"), list):
        found = f"an object with {shown(list(data))}" if isinstance(data, dict) else shown(data)
        raise UserError(
            f"{path}: not a trace in Chrome's form: expected a JSON object with a list traceEvents, found {found}."
        )
    try:
        timelines = _timelines(data)
    except NotJson as error:
        raise UserError(f"{path}: not a trace of aspec: {error}. Record it again.") from error
    if not timelines:
        raise UserError(f"{path}: not a trace of aspec: it has none of the lanes {', '.join(LANES)}.")
    return timelines


def _unpacked(packed: bytes) -> bytes:
    with gzip.GzipFile(fileobj=io.BytesIO(packed)) as file:
        data = file.read(MAX_FILE_BYTES + 1)
    if len(data) > MAX_FILE_BYTES:
        raise OSError(errno.EFBIG, f"it unpacks to more than {MAX_FILE_BYTES} bytes")
    return data


def _timelines(data: Mapping[str, Any]) -> dict[str, Timeline]:
    processes: dict[int, str] = {}
    titles: dict[tuple[int, int], str] = {}
    slices: dict[int, list[Slice]] = defaultdict(list)
    rounds: dict[int, list[Round]] = defaultdict(list)
    for number, event in enumerate(data["traceEvents"]):
        try:
            pid, kind = member(event, "pid", int), member(event, "ph", str)
            if kind == "M" and event.get("name") == "process_name":
                processes[pid] = member(member(event, "args", dict), "name", str)
            elif kind == "M" and event.get("name") == "thread_name":
                title = member(member(event, "args", dict), "name", str)
                titles[pid, member(event, "tid", int)] = title.partition(" ")[0]
            elif kind == "X":
                lane = titles.get((pid, member(event, "tid", int)))
                if lane == ROUNDS:
                    rounds[pid].append(_round(event))
                elif lane in LANES and event.get("name") not in (NODES, COMMIT):
                    slices[pid].append(_slice(event, lane, unnamed=-2 - len(slices[pid])))
        except NotJson as error:
            raise NotJson(f"event {number}: {error}") from error
    facts = data.get("otherData")
    return {
        name: Timeline(tuple(slices[pid]), tuple(rounds[pid]), _facts(facts, name))
        for pid, name in processes.items()
        if slices[pid]
    }


def _facts(facts: Any, name: str) -> dict[str, str | int | float]:
    """The facts of a process: names of models and versions are texts, all others numbers."""
    own = facts.get(name) if isinstance(facts, dict) else None
    texts = {key: str(value) for key, value in own.items() if key in TEXT_FACTS} if isinstance(own, dict) else {}
    numbers = {key: member(own, key, float) for key in own if key not in TEXT_FACTS} if isinstance(own, dict) else {}
    return {**numbers, **texts}


def _slice(event: Mapping[str, Any], lane: str, unnamed: int) -> Slice:
    args, name = member(event, "args", dict), member(event, "name", str)
    part = name.split()[-1] if name.startswith(LOADS) else "-1"
    if not re.fullmatch(r"-?[0-9]{1,9}", part):
        raise NotJson(f"expected a load to end in the number of its part, found {shown(name)}")
    start_s, stop_s = _extent(event)
    return Slice(
        id=member(args, "id", int, unnamed),
        lane=lane,
        name=name,
        start_s=start_s,
        stop_s=stop_s,
        round=member(args, "round", int, -1),
        layer=member(args, "layer", int, -1),
        part=int(part),
        tokens=member(args, "tokens", int, 0),
        nbytes=round(member(args, "MB", float, 0) * 1e6),
        cause=member(args, "after", int, -1),
        states_s=member(args, "states_us", float, 0) / 1e6,
    )


def _extent(event: Mapping[str, Any]) -> tuple[float, float]:
    start, duration = member(event, "ts", float), member(event, "dur", float)
    if duration < 0:
        raise NotJson(f"expected dur to be 0 or more, found {duration}")
    return start / 1e6, (start + duration) / 1e6


def _round(event: Mapping[str, Any]) -> Round:
    args, (start_s, stop_s) = member(event, "args", dict), _extent(event)
    number, *counts = (member(args, name, int) for name in ("round", "proposed", "accepted", "tokens"))
    return Round(number, start_s, stop_s, *counts)

"""Fuzzed files of runs: machines, traces, records of the cache, batch files, journals, and what each must equal."""

import json
import shutil
import zlib
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from random import Random
from typing import Any

from fuzz_compare import expect
from mutations import damage, damaged_json

from aspec.errors import PromptError
from aspec.observe.chrome_trace import write_trace
from aspec.observe.summary import summarise
from aspec.observe.timeline import DISK, TARGET, Round, Slice, Timeline
from aspec.observe.trace_reading import read_trace
from aspec.profiling.hardware import read_machine
from aspec.profiling.profile_cache import AcceptanceStats, known_acceptance, remember_acceptance
from aspec.serving.batch_input import BatchFile, BatchRow
from aspec.serving.batch_output import OutputRow, open_output

MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi, ünï 日本"}]


def make_files(root: Path) -> None:
    """A trace, a machine, a batch file."""
    slices = [
        Slice(n, (DISK, TARGET)[n % 2], (f"read {n}", f"layer {n}")[n % 2], n * 1e-3, n * 1e-3 + 9e-4, 0, n)
        for n in range(8)
    ]
    rounds = [Round(0, 0.0, 4e-3, 3, 2, 3), Round(1, 4e-3, 8e-3, 3, 1, 2)]
    write_trace(root / "trace.json", {"aspec": Timeline(tuple(slices), tuple(rounds), {"slots": 2})})
    rates = {"disk_bytes_per_s": 7e9, "h2d_bytes_per_s": 2.5e10, "device_memory": "24GiB", "host_memory": 1 << 37}
    device = {"flop_per_s": {"bfloat16": 1.6e14}, "memory_bytes_per_s": 1e12}
    tasks = {"layer_s": 1e-3, "layer_token_s": 1e-6, "draft_s": 2e-3, "acceptance": 0.8}
    (root / "machine.json").write_text(json.dumps({**rates, "device": device, "tasks": tasks}))
    (root / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows()))


def rows() -> list[dict[str, Any]]:
    """Rows of a batch file."""
    chat = {"messages": MESSAGES, "max_tokens": 4, "temperature": 0.5, "top_p": 0.9, "seed": 3, "logprobs": True}
    text = {"prompt": "Hello", "max_tokens": 4, "stop": ["a", "b"], "ignore_eos": True, "top_k": 5, "logprobs": 2}
    ids = {"prompt": [1, 2, 3], "max_completion_tokens": 4, "presence_penalty": 0.5, "model": "m", "n": 1}
    bodies = [("/v1/chat/completions", chat), ("/v1/completions", text), ("/v1/completions", ids)]
    return [
        {"custom_id": f"row {n}", "method": "POST", "url": url, "body": body} for n, (url, body) in enumerate(bodies)
    ]


def single_file(name: str) -> Callable[[Random, Path, Path], None]:
    """A case of one damaged JSON file."""

    def case(dice: Random, sources: Path, folder: Path) -> None:
        shutil.copy(sources / name, folder / name)
        damage(dice, folder / name)

    return case


# -- files of runs -------------------------------------------------------------------------------------------------


def read_profile(folder: Path) -> None:
    """A machine that is read, written and read again is the same."""
    machine = read_machine(folder / "machine.json")
    (folder / "again.json").write_text(json.dumps(machine.as_object()))
    expect(read_machine(folder / "again.json"), machine, "written and read again")


def read_a_trace(folder: Path) -> None:
    """An accepted trace can be summarised."""
    for timeline in read_trace(folder / "trace.json").values():
        json.dumps(summarise(timeline).as_dict())
        list(summarise(timeline).lines())


def cache_case(dice: Random, sources: Path, folder: Path) -> None:
    """A damaged record of a pair in the cache of profiles."""
    remember_acceptance(folder, sources, 0.7, proposals=50, cache=folder / "cache")
    (path,) = (folder / "cache").iterdir()
    (folder / "place").write_text(f"{path}\n{sources}")
    damage(dice, path)


def read_cache(folder: Path) -> None:
    """A damaged record is as good as none; a rate is a rate."""
    sources = Path((folder / "place").read_text().splitlines()[1])
    known = known_acceptance(folder, sources, cache=folder / "cache")
    fine = 0.0 <= known.acceptance <= 1.0 and 0.0 <= known.spread <= 1.0 and 0.0 <= known.proposals < float("inf")
    expect(fine, True, f"a rate of {known}")
    merged = remember_acceptance(folder, sources, 0.5, proposals=10, cache=folder / "cache")
    expect(isinstance(merged, AcceptanceStats), True, "merged")


# -- batches -------------------------------------------------------------------------------------------------------


def batch_case(dice: Random, sources: Path, folder: Path) -> None:
    """One row is damaged as JSON, or the file as bytes."""
    path = folder / "rows.jsonl"
    shutil.copy(sources / "rows.jsonl", path)
    if dice.random() < 0.3:
        damage(dice, path, is_json=False)
        if path.is_fifo():
            path.unlink()  # a batch reads a pipe, as long as it is open
        return
    lines = path.read_bytes().splitlines()
    at = dice.randrange(len(lines))
    lines[at] = damaged_json(dice, json.loads(lines[at]))
    path.write_bytes(dice.choice((b"\n", b"\n", b"\n", b"\r\n", b"\n\n")).join(lines) + dice.choice((b"\n", b"")))


def read_batch(folder: Path) -> None:
    """Every accepted row is the one that Python's json reads."""
    found: list[BatchRow] = []
    with BatchFile(folder / "rows.jsonl") as rows_file:
        rows_file.scan(found.append)
    if not found:
        raise PromptError("no row can be served")
    theirs: dict[str, Any] = {}
    for line in (folder / "rows.jsonl").read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n"):
        with suppress(ValueError, RecursionError, KeyError, TypeError, AttributeError):
            row = json.loads(line)
            theirs.setdefault(row["custom_id"], row["body"])
    for own in found:
        body = theirs.get(own.custom_id)
        expect(isinstance(body, dict), True, "a row that json reads")
        if isinstance(own.request.prompt, str):
            expect(own.request.prompt, body["prompt"], "prompt")
        for name in ("temperature", "top_p", "top_k", "seed", "ignore_eos"):
            expect(own.request.sampling.get(name), body.get(name), name)


TIES = {"input": "sha256 1", "seed": 0}
LINES = [OutputRow(f"row {n}", json.dumps({"custom_id": n, "text": "x" * n * 7}).encode() + b"\n") for n in range(6)]


def journal_case(dice: Random, _: Path, folder: Path) -> None:
    """An output of some rows, one of its two files damaged; a damaged record may carry a right checksum."""
    path, journal = folder / "out.jsonl", folder / "out.jsonl.journal"
    output, _found = open_output(path, TIES, 7)
    with output:
        output.append(LINES[:3])
        output.append(LINES[3 : dice.choice((4, 6))])
    victim = dice.choice((path, journal, journal))
    if victim is path or dice.random() < 0.4:
        damage(dice, victim, is_json=False)
        return
    lines = victim.read_bytes().splitlines(keepends=True)
    at = dice.randrange(len(lines))
    content = json.loads(lines[at][9:])
    text = damaged_json(dice, content)
    with suppress(ValueError, RecursionError, TypeError, AttributeError, KeyError):  # the header has no id
        damaged = json.loads(text)
        text = json.dumps(
            {**damaged, "id": content["id"]} if isinstance(damaged["id"], str | int) else damaged
        ).encode()
    lines[at] = b"%08x %s\n" % (zlib.crc32(text), text)
    victim.write_bytes(b"".join(lines))


def read_journal(folder: Path) -> None:
    """The rows that are found are whole, and writing the others makes the file of an undisturbed run."""
    path = folder / "out.jsonl"
    output, found = open_output(path, TIES, 7)
    with output:
        kept = path.read_bytes()
        whole = [row.line for row in LINES if row.id in found.done]
        expect(sorted(kept.splitlines(keepends=True)), sorted(whole), "kept rows")
        output.append([row for row in LINES if row.id not in found.done])
    expect(sorted(path.read_bytes().splitlines(keepends=True)), sorted(row.line for row in LINES), "all rows")

"""An output that loses no row: whatever is torn, cut, killed, full or changed."""

import errno
import json
import os
import random
import shutil
import subprocess
import sys
import zlib

import pytest

from aspec.errors import UserError, WriteError
from aspec.serving.batch_journal import journal_of, seal, unseal
from aspec.serving.batch_output import OutputRow, open_output

TIES = {"input": "sha256 1234", "seed": 0, "stop": ["a"]}


def make_rows(count):
    """Lines of many lengths, one in three of them an error."""
    noise = random.Random(3)
    return [
        OutputRow(
            f"row {i} é", json.dumps({"custom_id": i, "text": "x" * noise.randrange(60)}).encode() + b"\n", i % 3 == 0
        )
        for i in range(count)
    ]


def begin(path, created=7, ties=TIES, **options):
    return open_output(path, ties, created, **options)


def write(path, rows, together=3):
    """Whatever is missing, in groups; what was found."""
    output, found = begin(path)
    with output:
        missing = [row for row in rows if row.id not in found.done]
        for start in range(0, len(missing), together):
            output.append(missing[start : start + together])
    return found


def is_whole(path, rows):
    return path.read_bytes() == b"".join(row.line for row in rows)


def test_rows_are_found_again_with_what_was_said_of_them(tmp_path):
    rows, path = make_rows(10), tmp_path / "out.jsonl"
    assert write(path, rows[:4]).done == frozenset()
    found = write(path, rows)
    assert found.done == {row.id for row in rows[:4]}
    assert (found.num_failed, found.cut_bytes) == (2, 0)
    assert is_whole(path, rows)
    with begin(path, created=99)[0] as output:
        assert output.created == 7, "the job began when it began"


def borders(rows):
    ends = [0]
    for row in rows:
        ends.append(ends[-1] + len(row.line))
    return ends


def test_a_cut_at_any_byte_of_either_file_costs_the_rows_behind_it_only(tmp_path):
    rows, whole = make_rows(9), tmp_path / "whole.jsonl"
    write(whole, rows)
    journal = journal_of(whole).read_bytes()
    header = len(seal({"aspec": "batch journal", "format": 1, "created": 7, "ties": TIES}))
    records = [header + end for end in borders([OutputRow("", line + b"\n") for line in journal[header:].splitlines()])]
    ends = borders(rows)
    cuts = [(size, len(journal)) for size in range(ends[-4], ends[-1] + 1)]
    cuts += [(ends[-1], size) for size in range(records[-4], len(journal) + 1)]
    noise = random.Random(1)
    cuts += [(noise.randint(ends[-4], ends[-1]), noise.randint(records[-4], len(journal))) for _ in range(100)]
    cuts += [(0, len(journal)), (ends[-1], header), (0, header)]
    for output_size, journal_size in cuts:
        path = tmp_path / "out.jsonl"
        shutil.copy(whole, path)
        shutil.copy(journal_of(whole), journal_of(path))
        os.truncate(path, output_size)
        os.truncate(journal_of(path), journal_size)
        found = write(path, rows)
        kept = min(sum(end <= output_size for end in ends), sum(end <= journal_size for end in records)) - 1
        assert found.done == {row.id for row in rows[:kept]}, (output_size, journal_size)
        assert is_whole(path, rows), (output_size, journal_size)


def test_a_torn_header_is_written_again_only_where_there_is_nothing_to_lose(tmp_path):
    rows, path = make_rows(3), tmp_path / "out.jsonl"
    write(path, rows)
    os.truncate(journal_of(path), 20)
    with pytest.raises(UserError, match="has no journal"):
        begin(path)
    assert is_whole(path, rows)
    os.truncate(path, 0)
    write(path, rows)
    assert is_whole(path, rows)


CHANGES = {
    "moved away": lambda path: os.rename(path, path.with_suffix(".old")),
    "removed": lambda path: (shutil.copy(path, path.with_suffix(".old")), path.unlink()),
    "replaced by a copy": lambda path: (
        os.rename(path, path.with_suffix(".old")),
        shutil.copy(path.with_suffix(".old"), path),
    ),
    "replaced by nothing": lambda path: (os.rename(path, path.with_suffix(".old")), path.touch()),
    "cut": lambda path: (shutil.copy(path, path.with_suffix(".old")), os.truncate(path, path.stat().st_size - 1)),
    "emptied": lambda path: (shutil.copy(path, path.with_suffix(".old")), os.truncate(path, 0)),
    "longer": lambda path: (shutil.copy(path, path.with_suffix(".old")), path.open("ab").write(b"mine\n")),
}  # what another process does to a file; its bytes are kept beside it


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("which", ["output", "journal"])
def test_a_file_that_another_process_changes_is_one_error_and_costs_no_row(tmp_path, which, change):
    rows, path = make_rows(9), tmp_path / "out.jsonl"
    changed = path if which == "output" else journal_of(path)
    output, _ = begin(path)
    with output:
        output.append(rows[:4])
        output.verify()
        CHANGES[change](changed)
        for call in (lambda: output.append(rows[4:6]), output.verify, output.check, lambda: output.append(rows[6:])):
            with pytest.raises(WriteError, match=rf"{changed} was .* run the same command again"):
                call()
    os.replace(changed.with_suffix(".old"), changed)
    assert write(path, rows).done == {row.id for row in rows[:4]}
    assert is_whole(path, rows)


def test_a_folder_that_is_moved_and_a_link_that_is_turned_are_seen(tmp_path):
    rows, folder, link = make_rows(4), tmp_path / "folder", tmp_path / "link.jsonl"
    folder.mkdir()
    link.symlink_to(folder / "out.jsonl")
    with begin(link)[0] as output:
        output.append(rows[:1])
        link.unlink()
        link.symlink_to(tmp_path / "other.jsonl")
        with pytest.raises(WriteError, match=r"link\.jsonl was removed or moved away"):
            output.append(rows[1:2])
    with begin(folder / "out.jsonl")[0] as output:
        folder.rename(tmp_path / "moved")
        with pytest.raises(WriteError, match="was removed or moved away"):
            output.append(rows[1:2])
    assert write(tmp_path / "moved" / "out.jsonl", rows).done == {rows[0].id}


@pytest.mark.parametrize("which", ["output", "journal"])
def test_bytes_that_are_changed_in_place_are_seen_at_the_end(tmp_path, which):
    rows, path = make_rows(5), tmp_path / "out.jsonl"
    with begin(path)[0] as output:
        output.append(rows)
        with (path if which == "output" else journal_of(path)).open("r+b") as file:
            file.seek(-9, os.SEEK_END)
            file.write(b"#")
        with pytest.raises((UserError, WriteError), match="was changed"):
            output.verify()


HOSTILE_RECORDS = (
    {},
    {"id": None, "end": 1, "crc": 1, "failed": False},
    {"id": "a", "end": "1", "crc": 1, "failed": False},
    {"id": "a", "end": 1, "crc": 1.5, "failed": False},
    {"id": "a", "end": 1, "crc": 1, "failed": 0},
    {"id": ["a"], "end": 1, "crc": 1, "failed": False},
    {"id": "a", "end": 10**200, "crc": 1, "failed": False},
)


@pytest.mark.parametrize("content", [*HOSTILE_RECORDS, "[1]", "[" * 100_000, "{"])
def test_a_sealed_line_that_is_no_record_ends_the_journal(tmp_path, content):
    rows, path = make_rows(5), tmp_path / "out.jsonl"
    write(path, rows[:2])
    text = (json.dumps(content) if isinstance(content, dict) else content).encode()
    with journal_of(path).open("ab") as file:
        file.write(b"%08x %s\n" % (zlib.crc32(text), text))
    assert write(path, rows).done == {row.id for row in rows[:2]}
    assert is_whole(path, rows)


def test_a_record_that_ends_before_it_begins_is_refused(tmp_path):
    rows, path = make_rows(3), tmp_path / "out.jsonl"
    write(path, rows)
    with journal_of(path).open("ab") as file:
        file.write(seal({"id": "a", "end": -5, "crc": 0, "failed": False}))
    with pytest.raises(UserError, match="was changed"):
        begin(path)


class Crash(BaseException):
    """The machine stops."""


class Power:
    """Stops the machine at the n-th call that changes a file; a write is then done in part."""

    def __init__(self, monkeypatch, calls, noise):
        self.left, self.noise = calls, noise
        for name in ("pwrite", "ftruncate", "fsync", "open"):
            monkeypatch.setattr(os, name, self.guard(name, getattr(os, name)))

    def guard(self, name, real):
        def call(*args, **kwargs):
            self.left -= 1
            if self.left < 0:
                if name == "pwrite" and self.left == -1:
                    real(args[0], args[1][: self.noise.randrange(len(args[1]) + 1)], args[2])
                raise Crash
            return real(*args, **kwargs)

        return call


def test_a_crash_at_any_call_loses_doubles_and_halves_nothing(tmp_path, monkeypatch):
    rows, noise = make_rows(6), random.Random(2)
    for calls in range(100):
        path = tmp_path / f"{calls}.jsonl"
        promised = set()
        with monkeypatch.context() as patch:
            power, output = Power(patch, calls, noise), None
            try:
                output, _ = begin(path)
                for start in range(0, 6, 2):
                    output.append(rows[start : start + 2])
                    promised |= {row.id for row in rows[start : start + 2]}
            except Crash:
                pass
        if output is not None:
            output.close()  # as the end of a process does
        found = write(path, rows)
        assert promised <= found.done, "what append returned for is there"
        assert is_whole(path, rows)
        if power.left >= 0:
            assert calls > 12
            return
    raise AssertionError("the machine never survived")


def test_bytes_that_were_changed_are_refused_and_kept(tmp_path):
    rows, path = make_rows(5), tmp_path / "out.jsonl"
    write(path, rows)
    content = bytearray(path.read_bytes())
    content[borders(rows)[2] + 3] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"row 2 é.*truncate -s"):
        begin(path)
    assert path.read_bytes() == content
    os.truncate(path, borders(rows)[2])
    write(path, rows)
    assert is_whole(path, rows)


def test_another_job_is_refused_and_told_what_differs(tmp_path):
    rows, path = make_rows(3), tmp_path / "out.jsonl"
    write(path, rows)
    with pytest.raises(UserError) as error:
        begin(path, ties={**TIES, "seed": 1, "target": "x"})
    assert 'seed was 0, is 1; target was null, is "x"' in str(error.value)
    assert "--overwrite" in str(error.value)
    assert "stop" not in str(error.value)
    assert is_whole(path, rows)
    output, found = begin(path, created=8, ties={**TIES, "seed": 1}, overwrite=True)
    with output:
        assert (found.done, output.created, path.stat().st_size) == (frozenset(), 8, 0)


def test_another_format_is_refused(tmp_path):
    path = tmp_path / "out.jsonl"
    for more in ({"format": 2}, {}, {"format": 1}, {"format": 1, "ties": {}}, {"format": 1, "ties": [], "created": 1}):
        journal_of(path).write_bytes(seal({"aspec": "batch journal", **more}))
        with pytest.raises(UserError, match="another version"):
            begin(path)


def test_an_output_without_a_journal_is_refused_and_left_alone(tmp_path):
    path = tmp_path / "out.jsonl"
    path.write_text("mine\n")
    with pytest.raises(UserError, match="has no journal"):
        begin(path)
    assert os.listdir(tmp_path) == ["out.jsonl"]
    assert path.read_text() == "mine\n"
    begin(path, overwrite=True)[0].close()
    assert path.read_bytes() == b""


def test_what_is_no_regular_file_is_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path):
        with pytest.raises(UserError, match="not a regular file"):
            begin(path, overwrite=True)
    with pytest.raises(WriteError, match="cannot be written"):
        begin(tmp_path / "no" / "such" / "folder")


def test_a_link_to_the_output_is_the_output(tmp_path):
    rows, path = make_rows(3), tmp_path / "folder" / "out.jsonl"
    path.parent.mkdir()
    (tmp_path / "link.jsonl").symlink_to(path)
    write(tmp_path / "link.jsonl", rows[:2])
    write(path, rows)
    assert is_whole(path, rows)
    assert sorted(os.listdir(tmp_path)) == ["folder", "link.jsonl"]


def test_a_second_writer_is_refused(tmp_path):
    path = tmp_path / "out.jsonl"
    output, _ = begin(path)
    with output:
        for overwrite in (False, True):
            with pytest.raises(UserError, match="in use by another process"):
                begin(path, overwrite=overwrite)
        os.link(path, tmp_path / "other.jsonl")  # the same file by another name has another journal
        with pytest.raises(UserError, match="in use by another process"):
            begin(tmp_path / "other.jsonl", overwrite=True)
    write(path, make_rows(2))


FULL = """
import json, resource, sys
from pathlib import Path
from tests.test_journal import begin, make_rows
from aspec.errors import WriteError
path, limit = Path(sys.argv[1]), int(sys.argv[2])
rows = make_rows(30)
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
promised, error = [], None
try:
    output, found = begin(path)
    for start in range(0, 30, 2):
        output.append(rows[start:start + 2])
        promised += [row.id for row in rows[start:start + 2]]
except WriteError as problem:
    error = str(problem)
    try:
        output.append(rows[-1:])
    except WriteError as again:
        assert str(again) == error
    except NameError:
        pass
print(json.dumps([promised, error]))
"""


def test_a_full_disk_is_one_error_and_costs_nothing(tmp_path):
    """The limit on a file's size stands for the disk's end: a write is cut short, the next one fails."""
    rows = make_rows(30)
    for limit in (0, 100, 700, 1000, 1777):
        path = tmp_path / f"{limit}.jsonl"
        done = subprocess.run(
            [sys.executable, "-c", FULL, path, str(limit)], capture_output=True, text=True, check=True
        )
        promised, error = json.loads(done.stdout)
        assert "cannot grow" in error
        assert "Free some space" in error
        assert path.stat().st_size == borders(rows)[len(promised)] if path.exists() else not promised
        assert write(path, rows).done == set(promised)
        assert is_whole(path, rows)
    assert promised, "the last limit leaves room for rows"


def test_other_failures_say_what_failed(tmp_path, monkeypatch):
    output, _ = begin(tmp_path / "out.jsonl")

    def fail(*_):
        raise OSError(errno.EIO, "Input/output error")

    with output, monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail)
        with pytest.raises(WriteError, match="Input/output error"):
            output.append(make_rows(1))
    assert begin(tmp_path / "out.jsonl")[1].done == frozenset()


def test_a_seal_is_its_content_s():
    line = seal({"a": "é"})
    assert unseal(line) == {"a": "é"}
    assert line.startswith(b"%08x " % zlib.crc32(line[9:-1]))
    for torn in (b"", b"\n", line[:-1], line[1:], line.replace(b"a", b"b")):
        assert unseal(torn) is None

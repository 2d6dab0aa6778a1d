"""Every reader of JSON meets the same hostile files, and refuses each in one paragraph of its own kind."""

import contextlib
import gzip
import json
import struct

import pytest

from aspec.errors import CheckpointError, PromptError, UserError
from aspec.io.checkpoint import INDEX, SINGLE, Checkpoint, read_header
from aspec.io.json_file import DuplicateMember, NotJson, parse_json, read_json
from aspec.models.configuration.generation_defaults import end_ids, generation_defaults
from aspec.models.skeleton import load_config
from aspec.observe.chrome_trace import read_trace
from aspec.profiling.hardware import read_machine
from aspec.profiling.profile_cache import AcceptanceStats, known_acceptance, remember_acceptance
from aspec.serving.openai_requests import parse_json as parse_request_json

DEEP = 100_000
MANY = 200_000  # members of an object: checks that are quadratic would take hours

HOSTILE = {
    "empty": b"",
    "cut": b'{"a": [1',
    "deep lists": b"[" * DEEP,
    "deep lists that end": b"[" * DEEP + b"]" * DEEP,
    "deep objects": b'{"model_type": ' * DEEP,
    "deep inside": b'{"model_type": ' + b"[" * 900 + b"]" * 900 + b"}",
    "a huge number": b'{"disk_bytes_per_s": ' + b"9" * 5000 + b"}",
    "a number beyond floats": b'{"disk_bytes_per_s": ' + b"9" * 400 + b"}",
    "no UTF-8": b'{"model_type": "\xff\xfe"}',
    "UTF-16": '{"model_type": "llama"}'.encode("utf-16"),
    "NaN": b'{"disk_bytes_per_s": NaN}',
    "too large a fraction": b'{"disk_bytes_per_s": 1e999}',
    "a list": b"[1, 2]",
    "a text": b'"text"',
    "null": b"null",
    "zeros": b"\0" * 100,
}


def index(path):
    path.replace(path.parent / INDEX)
    return Checkpoint.open(path.parent)


def header(path):
    data = path.read_bytes()
    (path.parent / SINGLE).write_bytes(struct.pack("<Q", len(data)) + data)
    return Checkpoint.open(path.parent)


def config(path):
    path.replace(path.parent / "config.json")
    return load_config(path.parent)


def generation(path):
    path.replace(path.parent / "generation_config.json")
    return generation_defaults(path.parent)


def zipped(path):
    (path.parent / "trace.json.gz").write_bytes(gzip.compress(path.read_bytes()))
    return read_trace(path.parent / "trace.json.gz")


READERS = {
    "index": (index, CheckpointError),
    "header": (header, CheckpointError),
    "config": (config, CheckpointError),
    "generation": (generation, CheckpointError),
    "hardware": (read_machine, UserError),
    "trace": (read_trace, UserError),
    "trace.gz": (zipped, UserError),
}
FINE = {"generation": {"a huge number", "a number beyond floats", "NaN", "too large a fraction", "deep inside"}}


@pytest.mark.parametrize("content", HOSTILE)
@pytest.mark.parametrize("reader", READERS)
def test_every_reader_refuses_every_hostile_file_in_one_paragraph(tmp_path, reader, content):
    read, kind = READERS[reader]
    path = tmp_path / "given.json"
    path.write_bytes(HOSTILE[content])
    if content in FINE.get(reader, ()):
        with contextlib.suppress(kind):
            read(path)
        return
    with pytest.raises(kind) as error:
        read(path)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 2000, "a message is read by people, whatever the file holds"
    assert str(tmp_path) in str(error.value)


@pytest.mark.parametrize("reader", ["hardware", "trace"])
@pytest.mark.parametrize("kind", ["nothing", "folder", "loop", "not readable"])
def test_a_file_that_the_system_refuses_is_named(tmp_path, reader, kind):
    path = tmp_path / "given.json"
    if kind == "folder":
        path.mkdir()
    elif kind == "loop":
        path.symlink_to(path)
    elif kind == "not readable":
        path.symlink_to("/proc/self/mem")  # which refuses even root
    with pytest.raises(UserError, match=r"given\.json.* cannot be read") as error:
        READERS[reader][0](path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["config.json", INDEX, SINGLE])
def test_a_checkpoint_that_the_system_refuses_is_named(tmp_path, name):
    (tmp_path / name).symlink_to("/proc/self/mem")
    with pytest.raises(CheckpointError, match=name):
        load_config(tmp_path) if name == "config.json" else Checkpoint.open(tmp_path)


@pytest.mark.parametrize("file", ["x" * 5000, "a\0b", "../elsewhere", "\ud800"])
def test_an_index_of_names_that_are_no_files_is_refused(tmp_path, file):
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"a": file}}))
    with pytest.raises(CheckpointError, match="1 missing"):
        Checkpoint.open(tmp_path)


@pytest.mark.parametrize("file", [3, None, ["a"], {"a": 1}])
def test_an_index_of_what_is_no_name_is_refused(tmp_path, file):
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"a": file}}))
    with pytest.raises(CheckpointError, match="not an index of shards"):
        Checkpoint.open(tmp_path)


@pytest.mark.parametrize("content", HOSTILE)
def test_a_damaged_cache_is_as_good_as_none(tmp_path, content, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    remember_acceptance(tmp_path / "target", tmp_path / "draft", 0.5, 0.1, proposals=9, sampled=False)
    files = list(tmp_path.rglob("pair-*.json"))
    assert files, "the cache is in this folder"
    for file in files:
        file.write_bytes(HOSTILE[content])
    assert known_acceptance(tmp_path / "target", tmp_path / "draft") == AcceptanceStats()


@pytest.mark.parametrize("ends", ["two", [1, "two"], [[1]], 1.5, {"a": 1}])
def test_ends_that_are_no_tokens_are_refused(tmp_path, ends):
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
    with pytest.raises(CheckpointError, match="eos_token_id"):
        end_ids(tmp_path, None)


def many_members():
    return ", ".join(f'"tensor {n}": 0' for n in range(MANY)) + f', "tensor {MANY - 1}": 0'


def test_a_name_that_is_there_twice_among_many_is_found_in_one_walk(tmp_path):
    text = f"{{{many_members()}}}".encode()
    (tmp_path / SINGLE).write_bytes(struct.pack("<Q", len(text)) + text)
    with pytest.raises(CheckpointError, match=f"tensor tensor {MANY - 1} is stored twice"):
        read_header(tmp_path / SINGLE)
    with pytest.raises(PromptError, match=f"tensor {MANY - 1} is there twice"):
        parse_request_json(text)


def test_what_is_fine_is_read(tmp_path):
    assert parse_json('{"a": [1, -2, 3.5, "ä", null, true]}'.encode()) == {"a": [1, -2, 3.5, "ä", None, True]}
    assert parse_json(b'{"a": 1, "a": 2}') == {"a": 2}
    assert parse_json(b'{"a": -Infinity}', constants=True) == {"a": float("-inf")}
    assert parse_json(b"9" * 300) == int("9" * 300)
    with pytest.raises(DuplicateMember) as error:
        parse_json(b'[{"a": {"b": 1, "c": 0, "b": 2}}]', unique=True)
    assert error.value.name == "b"
    with pytest.raises(NotJson, match="301 digits"):
        parse_json(b"9" * 301)
    (tmp_path / "a.json").write_text("[1]")
    assert read_json(tmp_path / "a.json", "a list") == [1]

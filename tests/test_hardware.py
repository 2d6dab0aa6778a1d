"""Machine profiles: JSON both ways, refusals that name the field, what is kept from run to run and what is not."""

import json
import multiprocessing
import os
import time
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from typer.testing import CliRunner

from aspec.cli.main import app
from aspec.errors import UserError
from aspec.io.json_file import read_record, replace_json
from aspec.options import DEMO
from aspec.profiling import profile_cache as kept
from aspec.profiling.cpu_profiler import files_of, measure_processor
from aspec.profiling.hardware import AttentionRates, Hardware, Processor, TaskSeconds, hardware_from, read_machine
from aspec.profiling.roofline import ACCEPTANCE, SPREAD
from aspec.tasks.cost_model import expected_tokens
from tests import tiny
from tests.fork_server import Command

CARD = {
    "name": "a card",
    "disk_bytes_per_s": 7e9,
    "h2d_bytes_per_s": 25e9,
    "device_memory": "24GiB",
    "host_memory": 64 << 30,
    "device": {"flop_per_s": {"bfloat16": 1.6e14}, "memory_bytes_per_s": 1e12},
    "cpu": {"flop_per_s": {"float32": 5e11}, "memory_bytes_per_s": 5e10},
}
FULL = Hardware(
    "full",
    1e9,
    2e10,
    1e10,
    1 << 30,
    1 << 31,
    1.1,
    3,
    Processor(
        {"bfloat16": 1e12, "float32": 2e11},
        weight_s={"bfloat16": ((1, 1e-10), (64, 2e-10))},
        exact_layer_s=1e-3,
        attention=AttentionRates(1e-6, 2e-6, 3e-10, 4e-9, 5e-11, 6e-9),
    ),
    Processor(memory_bytes_per_s=1e12),
    TaskSeconds(layer_s=1e-3, knee_tokens=8, acceptance=0.7, seed=3),
)


@pytest.mark.parametrize("hardware", [Hardware(name="x"), FULL])
def test_a_machine_comes_back_from_its_json(hardware, tmp_path):
    path = tmp_path / "machine.json"
    path.write_text(json.dumps(hardware.as_object()))
    assert read_machine(path) == hardware


def test_what_a_hand_leaves_out_is_derived():
    card = hardware_from(CARD, "card.json")
    assert card.processor is card.device
    assert card.device_memory == 24 << 30
    assert card.device.copy_rate == card.device.memory_bytes_per_s / 2
    assert card.device.flops("float32") == 8e13  # half of bfloat16's
    assert card.cpu.flops("bfloat16") == 5e11  # no worse than what is known
    host = hardware_from({"name": "host", "h2d_bytes_per_s": None}, "host.json")
    assert host.processor is host.cpu


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ([], "expected a JSON object with some of name"),
        ({}, "expected a JSON object"),
        ({"speed": 1}, "unknown field 'speed', expected some of name, disk_bytes_per_s"),
        ({"cpu": {"flops": 1}}, "unknown field 'cpu.flops', expected some of flop_per_s"),
        ({"cpu": 5}, "expected cpu with some of"),
        ({"disk_bytes_per_s": "fast"}, "disk_bytes_per_s must be a number above 0, found 'fast'"),
        ({"disk_bytes_per_s": True}, "disk_bytes_per_s must be a number above 0, found True"),
        ({"disk_bytes_per_s": 0}, "disk_bytes_per_s must be above 0"),
        ({"disk_bytes_per_s": None}, "disk_bytes_per_s must be a number"),
        ({"cpu": {"layer_s": -1}}, "cpu.layer_s must be a number from 0 up, found -1"),
        ({"cpu": {"flop_per_s": {"int3": 1e9}}}, "cpu.flop_per_s must be an object with some of bfloat16, float32"),
        ({"cpu": {"flop_per_s": {"float32": "x"}}}, "cpu.flop_per_s.float32 must be a number above 0"),
        ({"cpu": {"weight_s": {"float32": {"many": 1}}}}, "cpu.weight_s.float32 must be an object of row counts"),
        ({"device_memory": "24 apples"}, "device_memory: expected a size such as"),
        ({"name": 5}, "name must be a text, found 5"),
        ({"h2d_bytes_per_s": 1e9}, "needs a device"),
    ],
)
def test_a_bad_machine_is_refused_in_one_paragraph_that_names_the_field(tmp_path, values, words):
    path = tmp_path / "machine.json"
    path.write_text(json.dumps(values))
    with pytest.raises(UserError) as refused:
        read_machine(path)
    assert words in str(refused.value)
    assert str(path) in str(refused.value)
    assert "\n" not in str(refused.value)


def test_no_file_and_no_json_are_refused(tmp_path):
    with pytest.raises(UserError, match="cannot be read"):
        read_machine(tmp_path / "none.json")
    (tmp_path / "text.json").write_text("fast")
    with pytest.raises(UserError, match="is not a machine profile: expected JSON"):
        read_machine(tmp_path / "text.json")


# -- the cache -----------------------------------------------------------------------------------------------


class Measurements:
    """Stands in for the measuring: counts, and returns what can be told apart."""

    def __init__(self):
        self.machines = self.disks = 0

    def processor(self, dtype, threads):
        self.machines += 1
        return Processor(layer_s=1e-3 * self.machines)

    def disk(self, folder):
        self.disks += 1
        return 1e9 * self.disks


@pytest.fixture
def measured(monkeypatch):
    counter = Measurements()
    monkeypatch.setattr(kept, "measure_processor", counter.processor)
    monkeypatch.setattr(kept, "measure_disk", counter.disk)
    monkeypatch.setattr(kept, "measure_read_contention", lambda *_: 1.02)
    return counter


def profile(cache, **changes):
    return kept.machine_profile(DEMO / "target", **{"dtype": torch.bfloat16, "threads": 1, "cache": cache, **changes})


def test_a_machine_is_measured_once_and_by_threads_and_dtype(measured, tmp_path):
    first = profile(tmp_path)
    assert profile(tmp_path) == first
    assert (measured.machines, measured.disks) == (1, 1)
    assert first.read_contention == 1.02
    assert profile(tmp_path, threads=2).threads == 2
    profile(tmp_path, dtype=torch.float32)
    assert (measured.machines, measured.disks) == (3, 1)
    assert profile(tmp_path, refresh=True).cpu.layer_s == 4e-3
    assert measured.disks == 2
    assert profile(tmp_path, link_rate=5e8).disk_bytes_per_s == 5e8
    assert profile(tmp_path, link_rate=5e12).disk_bytes_per_s == 2e9


def test_a_disk_is_measured_again_after_an_hour(measured, tmp_path):
    assert profile(tmp_path).disk_bytes_per_s == 1e9
    (file,) = tmp_path.glob("disk-*.json")
    for shift, rate in ((-3500, 1e9), (-3700, 2e9), (+3700, 3e9)):  # the last: a clock that was set back
        values = json.loads(file.read_text())
        file.write_text(json.dumps({**values, "measured_at": time.time() + shift}))
        assert profile(tmp_path).disk_bytes_per_s == rate
    assert measured.machines == 1


@pytest.mark.parametrize("text", ["", "{", "[]", '{"hardware": {"cpu": 3}}', '{"hardware": {"speed": 1}}', "\udcff"])
def test_a_damaged_file_is_as_good_as_none(measured, tmp_path, text):
    first = profile(tmp_path)
    for file in tmp_path.iterdir():
        file.write_bytes(text.encode("utf-8", "surrogateescape"))
    again = profile(tmp_path)
    assert (measured.machines, measured.disks) == (2, 2)
    assert again == replace(first, cpu=Processor(layer_s=2e-3), disk_bytes_per_s=2e9)
    assert profile(tmp_path) == again


def test_a_cache_that_cannot_be_written_is_no_error(measured, tmp_path):
    (tmp_path / "file").write_text("")
    assert profile(tmp_path / "file" / "cache").threads == 1
    assert profile(tmp_path / "file" / "cache").cpu.layer_s == 2e-3


def _write_often(folder, value):
    for _ in range(300):
        replace_json(Path(folder) / "one.json", {"value": [value] * 200})


def test_who_reads_while_others_write_reads_one_of_theirs(tmp_path):
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=_write_often, args=(str(tmp_path), value)) for value in (1, 2)]
    for writer in writers:
        writer.start()
    seen = set()
    while any(writer.is_alive() for writer in writers):
        if found := read_record(tmp_path / "one.json"):
            assert found["value"] in ([1] * 200, [2] * 200)
            seen.add(found["value"][0])
    for writer in writers:
        writer.join()
        assert writer.exitcode == 0
    assert seen
    assert os.listdir(tmp_path) == ["one.json"]  # no temporary file is left


def test_acceptance_is_known_by_pair_and_weighed_by_evidence(tmp_path):
    target, draft = tmp_path / "target", tmp_path / "draft"
    known = kept.known_acceptance(target, draft, cache=tmp_path)
    assert (known.acceptance, known.spread, known.proposals) == (ACCEPTANCE, SPREAD, 0)
    kept.remember_acceptance(target, draft, 0.6, 0.4, proposals=100, cache=tmp_path)
    assert kept.known_acceptance(target, draft, cache=tmp_path) == kept.AcceptanceStats(
        pytest.approx(0.6), pytest.approx(0.4), 100
    )
    kept.remember_acceptance(target, draft, 0.9, 0.4, proposals=50, cache=tmp_path)
    assert kept.known_acceptance(target, draft, cache=tmp_path).acceptance == pytest.approx(0.7)
    kept.remember_acceptance(target, draft, 0.1, proposals=0, cache=tmp_path)
    assert kept.known_acceptance(target, draft, cache=tmp_path).acceptance == pytest.approx(0.7)
    assert kept.known_acceptance(draft, target, cache=tmp_path).proposals == 0
    assert kept.known_acceptance(target, draft, sampled=True, cache=tmp_path).proposals == 0
    (file,) = tmp_path.glob("pair-*.json")
    file.write_text(json.dumps({"acceptance": 7, "spread": 0.5, "proposals": 3}))
    assert kept.known_acceptance(target, draft, cache=tmp_path) == kept.AcceptanceStats()


def test_where_the_cache_is(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert kept.cache_folder() == tmp_path / "aspec"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")  # the specification says: ignore it
    assert kept.cache_folder() == Path.home() / ".cache" / "aspec"


def test_bench_remembers_how_often_proposals_were_accepted(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    target = tiny.build(tmp_path / "target", "llama")
    draft = tiny.noisy_copy(target, tmp_path / "draft", 0.1)
    words = ["bench", "--target", target, "--draft", draft, "--speculation", "chain", "--rounds", 1]
    words += [
        "--device-memory",
        "2250KiB",
        "--threads",
        1,
        "-p",
        "hello",
        "-n",
        40,
        "--draft-budget",
        3,
        "--json",
        "-q",
    ]
    result = CliRunner().invoke(app, list(map(str, words)))
    assert result.exit_code == 0, result.output
    run = json.loads(result.stdout)["runs"][0]
    known = kept.known_acceptance(target, draft, sampled=False)
    assert known.proposals == run["rounds"]
    assert expected_tokens(known.acceptance, 3) == pytest.approx(run["tokens_per_pass"], rel=0.25)
    assert json.loads(result.stdout)["hardware"]["tasks"]["draft_s"] > 0


# -- measuring -----------------------------------------------------------------------------------------------


def test_all_bytes_of_the_files_are_read_from_a_random_place_on(tmp_path):
    for name, size in (("a", 5 << 20), ("b", 3 << 20)):
        (tmp_path / f"{name}.safetensors").write_bytes(bytes(size))
    for _ in range(20):
        segments = files_of(tmp_path)
        covered = {"a": set(), "b": set()}
        for segment in segments:
            pages = range(segment.offset // 4096, (segment.offset + segment.nbytes) // 4096)
            covered[Path(segment.file).stem] |= set(pages)
        assert sum(segment.nbytes for segment in segments) == 8 << 20
        assert {name: len(pages) for name, pages in covered.items()} == {"a": 1280, "b": 768}
    assert files_of(tmp_path / "none") == []


def test_what_is_measured_is_positive_and_threads_are_as_before():
    before = torch.get_num_threads()
    measured = measure_processor(torch.float32, 1)
    assert torch.get_num_threads() == before
    for field in fields(Processor):
        if field.name not in ("attention", "exact_attention") and not field.name.endswith("weight_s"):
            assert getattr(measured, field.name) is not None, field.name
    for tables in (measured.weight_s, measured.exact_weight_s, measured.cached_weight_s):
        assert all(seconds > 0 for _, seconds in tables["float32"])
    assert measured.attention.kv_byte_s > 0
    assert measured.exact_attention.own_score_s > 0
    assert measured.exact_layer_s > measured.layer_s > 0


def test_the_command_measures_prints_and_remembers(tmp_path):

    def run(*more):
        process = Command(["profile", "--threads", "1", *more], XDG_CACHE_HOME=str(tmp_path))
        stdout, stderr = (said.decode() for said in process.communicate())
        return SimpleNamespace(returncode=process.returncode, stdout=stdout, stderr=stderr)

    first = run("-o", str(tmp_path / "machine.json"))
    assert first.returncode == 0, first.stderr
    for words in ("disk, direct reads", "memory copy", "1 GB of weights, 64 rows", "one step", "a guess"):
        assert words in first.stdout
    written = read_machine(tmp_path / "machine.json")
    assert written.disk_bytes_per_s > 0
    assert written.threads == 1
    files = {file.name: file.read_bytes() for file in (tmp_path / "aspec").iterdir()}
    assert {name.split("-")[0] for name in files} == {"machine", "disk", "rows"}
    again = json.loads(run("--json", "-q").stdout)
    assert hardware_from(again["hardware"], "") == written  # from the cache
    assert {file.name: file.read_bytes() for file in (tmp_path / "aspec").iterdir()} == files
    assert 0 < again["target"]["layer_s"]["1"] < again["target"]["layer_s"]["256"]
    assert again["draft"]["step_s"] > 0
    refused = run("-o", str(tmp_path / "none" / "machine.json"))
    assert refused.returncode == 1
    assert "cannot be written" in refused.stderr
    assert run("--draft", "x").returncode == 2

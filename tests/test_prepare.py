"""A prepared checkpoint: the same weights, one range of a file for every layer; whole or absent, whatever happens."""

import itertools
import json
import os
import re
import resource
import signal
import sys

import pytest
import torch
from typer.testing import CliRunner

from aspec.cli.main import app
from aspec.errors import CheckpointError, UserError, WriteError
from aspec.io.checkpoint import Checkpoint
from aspec.models.model import Model
from aspec.models.weights.parts import PAGE
from aspec.preparing import prepare as preparing
from aspec.preparing.journal import JOURNAL
from aspec.preparing.logits import LogitReader
from aspec.preparing.prepare import design, prepare
from tests import tiny

ROW = [5, 9, 33, 7, 120, 64, 3, 3, 201, 17]
WHOLE = 1 << 40  # bytes of a part: a layer is one


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Builds a family's checkpoint once."""
    root, built = tmp_path_factory.mktemp("sources"), {}

    def get(family):
        if family not in built:
            built[family] = tiny.build(root / family, family, shards=3)
            (built[family] / "chat_template.jinja").write_text("{{ messages }}")
        return built[family]

    return get


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def stored(checkpoint):
    """By name, the shape, dtype and bytes of every tensor."""
    found = {}
    for ref in checkpoint.tensors.values():
        with open(ref.file, "rb") as file:
            file.seek(ref.offset)
            found[ref.name] = ref.shape, ref.dtype, file.read(ref.nbytes)
    return found


@pytest.mark.parametrize("family", ["llama_tied", "deepseek_v3"])
def test_a_prepared_checkpoint_is_the_same_model(source, tmp_path, family):
    folder, out = source(family), tmp_path / "out"
    prepare(design(folder), out)
    before, after = Checkpoint.open(folder), Checkpoint.open(out)
    assert stored(after) == stored(before)
    (expected,), (found,) = LogitReader(folder).once([ROW]), LogitReader(out).once([ROW])
    assert torch.allclose(found, expected, rtol=0, atol=1e-5), "products may depend on where their weights begin"
    ids = torch.tensor([ROW])
    assert torch.equal(tiny.reference(out)(ids).logits, tiny.reference(folder)(ids).logits)
    for name in ("config.json", "tokenizer.json", "chat_template.jinja"):
        assert (out / name).read_bytes() == (folder / name).read_bytes()


def test_a_layer_is_one_aligned_range(source, tmp_path):
    prepare(design(source("llama")), tmp_path / "out")
    for part in Model(tmp_path / "out").parts(WHOLE):
        (segment,) = part.segments
        assert segment.offset % PAGE == 0
        assert segment.nbytes == part.nbytes


def test_the_matrices_of_an_expert_are_neighbours(source, tmp_path):
    prepare(design(source("mixtral")), tmp_path / "out")
    refs = sorted(Checkpoint.open(tmp_path / "out").tensors.values(), key=lambda ref: (ref.file, ref.offset))
    experts = [ref.name.split("experts.")[1] for ref in refs if "layers.2.block_sparse_moe.experts" in ref.name]
    assert experts == [f"{expert}.{matrix}.weight" for expert in range(4) for matrix in ("w1", "w3", "w2")]
    (part,) = (part for part in Model(tmp_path / "out").parts(WHOLE) if part.layer == 2)
    ranges = [segment for segment in part.segments if segment.file == part.segments[0].file]
    assert len(ranges) == 2 * 4 + 1, "gate and up of an expert are read at once, then its down; the rest at once"


@pytest.mark.parametrize("fails_at", [0, 3, 6])
def test_a_stopped_preparation_continues_and_ends_with_the_same_bytes(source, tmp_path, fails_at):
    made, calls = design(source("llama")), itertools.count()

    def stop(*_):
        if next(calls) == fails_at:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare(made, tmp_path / "stopped", stop)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        Model(tmp_path / "stopped")
    assert not list((tmp_path / "stopped").glob("*.partial"))
    kept = prepare(made, tmp_path / "stopped").num_kept
    prepare(made, tmp_path / "whole")
    assert contents(tmp_path / "stopped") == contents(tmp_path / "whole")
    assert kept > 0 or fails_at == 0


def test_a_damaged_shard_is_written_again(source, tmp_path):
    made, out = design(source("llama")), tmp_path / "out"
    prepare(made, out)
    before = contents(out)
    with (out / made.shards[2].name).open("r+b") as file:
        file.seek(PAGE + 7)
        file.write(b"x")
    assert prepare(made, out).num_kept == len(made.shards) - 1
    assert contents(out) == before


def test_what_belongs_to_others_is_never_touched(source, tmp_path):
    made = design(source("llama"))
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match=r"is not empty: .*notes\.txt.*another -o"):
        prepare(made, tmp_path)
    with pytest.raises(UserError, match="is a file"):
        prepare(made, tmp_path / "notes.txt")
    assert contents(tmp_path) == {"notes.txt": b"mine"}
    prepare(made, tmp_path / "out")
    before = contents(tmp_path / "out")
    with pytest.raises(UserError, match=r"another command: .* source"):
        prepare(design(source("llama_tied")), tmp_path / "out")
    assert contents(tmp_path / "out") == before


def test_a_disk_that_gets_full_is_one_paragraph(source, tmp_path):
    made, out = design(source("llama")), tmp_path / "out"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))  # no shard of a layer is that small
    try:
        with pytest.raises(WriteError, match=r"cannot be written: File too large\. .* it continues") as caught:
            prepare(made, out)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "\n" not in str(caught.value)
    assert [path.name for path in out.iterdir()] == [JOURNAL]
    assert prepare(made, out).num_kept == 0


def test_space_is_checked_before_anything_is_written(source, tmp_path, monkeypatch):
    monkeypatch.setattr(preparing.shutil, "disk_usage", lambda _: os.statvfs_result)
    monkeypatch.setattr(os.statvfs_result, "free", 1000, raising=False)
    with pytest.raises(WriteError, match=r"too little space: .* are left to write, 1000 B are free"):
        prepare(design(source("llama")), tmp_path / "out")


def test_the_command_prepares_and_verifies(source, tmp_path):
    command = ["prepare", "--target", str(source("mixtral")), "-o", str(tmp_path / "o")]
    run = CliRunner().invoke(app, [*command, "--verify"])
    assert run.exit_code == 0, run.stderr
    assert "written and read back" in run.stderr
    assert re.search("verified: the logits of 32 tokens (equal|are) the source's", run.stderr)
    again = CliRunner().invoke(app, command)
    assert "5 of them found finished" in again.stderr


def kill_after(events, made, out):
    """Run a preparation in a child that is killed at one of its calls to the system; returns whether it was."""
    child = os.fork()
    if child == 0:
        left = itertools.count(events, -1)

        def count(event, _):
            if event in ("open", "os.rename", "os.remove", "os.listdir", "os.mkdir") and next(left) == 0:
                os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(count)
        prepare(made, out)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


@pytest.mark.slow
def test_killed_at_any_instant_it_resumes_and_ends_with_the_same_bytes(source, tmp_path):
    made = design(source("mixtral"))
    prepare(made, tmp_path / "whole")
    wanted, out = contents(tmp_path / "whole"), tmp_path / "out"
    kills = 0
    while kill_after(2 * kills, made, out):  # each run goes on a little further than the one before it
        kills += 1
        assert not (out / "config.json").exists() or contents(out) == wanted
    assert kills >= 20
    assert contents(out) == wanted
    assert json.loads((out / JOURNAL).read_text())["quantization"] is None

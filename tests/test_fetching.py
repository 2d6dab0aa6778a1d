"""What comes from a hub for a plan (headers only) and for a run (everything), and how a fetch ends before its end."""

import asyncio
import glob
import json
import signal
import struct
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
from typer.testing import CliRunner

import aspec
from aspec.cli.main import app
from aspec.errors import CheckpointError
from aspec.io.checkpoint import Checkpoint
from aspec.io.fetching import headers
from aspec.io.fetching.fetch import Fetches, Wanted
from aspec.io.fetching.files import SIZES
from aspec.io.hub import resolve
from tests import fake_hub, tiny
from tests.compat import few
from tests.fake_hub import surroundings, url
from tests.fork_server import Command, wait_until
from tests.test_explain import MACHINE

SIZES_OF_LAYERS = dict(hidden_size=256, intermediate_size=1024)  # 16 MB of weights: many times what may be served
SERVED_BYTES = 3 << 20  # at most, of a folder of 16 MB: a first piece of each shard, and what a socket buffers


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The same model in one file, and in three with an index."""
    root = tmp_path_factory.mktemp("models")
    single = tiny.build(root / "single", "llama", sizes=SIZES_OF_LAYERS, shards=1)
    return {"single": single, "sharded": tiny.build(root / "sharded", "llama", sizes=SIZES_OF_LAYERS, shards=3)}


@pytest.fixture
def hub(tmp_path, monkeypatch, folders):
    """A hub with both models, which this process and those that it starts ask; nothing is cached yet."""
    with fake_hub.serve() as server:
        for name, value in surroundings(tmp_path, url(server)).items():
            if name.startswith(("HF_", "XDG_")):
                monkeypatch.setenv(name, value)
        for name, folder in folders.items():
            server.repositories[f"org/{name}"] = {file.name: file.read_bytes() for file in folder.iterdir()}
        yield server


def invoke(*args):
    return CliRunner().invoke(app, [str(arg) for arg in args])


def plan(model, machine, *more):
    """The plans for a model on another machine."""
    made = invoke("plan", "--target", model, "--profile", machine, "--json", *more)
    assert made.exit_code == 0, made.output
    return json.loads(made.stdout)


@pytest.fixture(scope="module")
def machine(tmp_path_factory):
    path = tmp_path_factory.mktemp("machine") / "machine.json"
    path.write_text(json.dumps(MACHINE))
    return path


def weights_below(folder: Path) -> int:
    """Bytes of all files below a folder."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file() and not file.is_symlink())


@pytest.mark.parametrize("layout", ["single", "sharded"])
def test_a_plan_of_a_model_on_the_hub_fetches_headers_only(hub, tmp_path, folders, machine, layout):
    assert plan(f"org/{layout}", machine) == plan(folders[layout], machine)
    assert hub.served < SERVED_BYTES
    assert weights_below(tmp_path) < SERVED_BYTES
    served, requests = hub.served, len(hub.seen)
    hub.server_close()  # a second plan needs no hub
    assert plan(f"org/{layout}", machine) == plan(folders[layout], machine)
    assert (hub.served, len(hub.seen)) == (served, requests)


def test_a_server_that_ignores_ranges_is_left_after_the_header(hub, folders, machine):
    hub.knows_ranges, hub.pause_s = False, 1e-3
    assert plan("org/single", machine) == plan(folders["single"], machine)
    assert hub.served < SERVED_BYTES * 2


@pytest.mark.parametrize("knows_ranges", [True, False])
def test_a_header_longer_than_the_first_piece_is_whole(hub, tmp_path, folders, monkeypatch, knows_ranges):
    hub.knows_ranges = knows_ranges
    from huggingface_hub import DryRunFileInfo, hf_hub_url

    whole = (folders["single"] / "model.safetensors").read_bytes()
    (length,) = struct.unpack("<Q", whole[:8])
    monkeypatch.setattr(headers, "FIRST_BYTES", 100)
    address = hf_hub_url("org/single", "model.safetensors", revision=fake_hub.COMMIT, endpoint=url(hub))
    monkeypatch.setattr(headers, "hf_hub_url", lambda *_, **__: address)
    shard = DryRunFileInfo(fake_hub.COMMIT, len(whole), "model.safetensors", str(tmp_path / "none"), False, True)
    headers.fetch_headers("org/single", [shard], folders["single"], tmp_path / "made", lambda _: None)
    assert (tmp_path / "made" / "model.safetensors").read_bytes() == whole[: 8 + length]
    found = Checkpoint.open(tmp_path / "made")
    assert found.tensors.keys() == Checkpoint.open(folders["single"]).tensors.keys()
    assert found.nbytes == Checkpoint.open(folders["single"]).nbytes


@pytest.mark.slow
def test_a_cached_model_serves_a_plan(hub, tmp_path, folders, machine):
    whole = resolve("org/sharded")
    served = hub.served
    assert resolve("org/sharded", weights=False) == whole
    assert plan("org/sharded", machine) == plan(folders["sharded"], machine)
    assert hub.served - served < 1 << 16  # answers about the repository
    shard = sorted(whole.glob("*.safetensors"))[1]
    shard.resolve().unlink()
    shard.unlink()  # in part: the header that is missing is fetched
    assert resolve("org/sharded", weights=False) != whole
    assert plan("org/sharded", machine) == plan(folders["sharded"], machine)


def test_headers_alone_are_no_model_to_run(hub):
    folder = resolve("org/single", weights=False)
    assert (folder / SIZES).is_file()
    made = invoke("generate", "--target", folder, "-p", "hello", "-n", "2", "-q")
    assert made.exit_code == 1
    assert "truncated" in made.stderr
    assert resolve("org/single") != folder


@pytest.mark.parametrize("command", few(["profile", "trace"], 1))
def test_other_commands_that_read_headers_fetch_no_weights(hub, tmp_path, machine, monkeypatch, command):
    monkeypatch.setattr("aspec.cli.profile.machine_profile", lambda *_, **__: aspec_machine())
    more = {
        "profile": ["--json"],
        "trace": ["-p", "hello", "-n", "4", "-o", tmp_path / "t.json", "--simulate", machine],
    }
    made = invoke(command, "--target", "org/single", *more[command])
    assert made.exit_code == 0, made.output
    assert hub.served < SERVED_BYTES


def aspec_machine():
    from aspec.profiling.hardware import hardware_from

    return hardware_from(MACHINE, "machine")


def test_a_shard_that_is_none_is_named(hub):
    hub.repositories["org/bad"] = dict(
        hub.repositories["org/single"], **{"model.safetensors": b"version https://git-lfs"}
    )
    with pytest.raises(CheckpointError, match=r"target 'org/bad' cannot be read: model.safetensors is truncated or no"):
        resolve("org/bad", what="target", weights=False)


def test_a_cut_shard_is_found_by_its_size(hub, machine):
    files = hub.repositories["org/single"]
    hub.repositories["org/cut"] = {**files, "model.safetensors": files["model.safetensors"][:-9]}
    made = invoke("plan", "--target", "org/cut", "--profile", machine)
    assert made.exit_code == 1
    assert "model.safetensors is truncated: the header promises" in made.stderr


def test_a_revision_is_part_of_the_name(hub):
    assert resolve(f"org/single@{fake_hub.COMMIT}", weights=False) == resolve("org/single@main", weights=False)
    assert any("/revision/main" in path for path, _ in hub.seen)
    with pytest.raises(CheckpointError, match=r"'org/single@no-such-revision' has no such revision"):
        resolve("org/single@no-such-revision")


def test_a_model_that_does_not_fit_on_the_disk_is_refused_before_its_first_byte(hub):
    hub.claimed_bytes = 1 << 60
    with pytest.raises(CheckpointError, match=r"does not fit on the disk .* expected [0-9]+ GiB .* Free some space"):
        resolve("org/single")
    assert hub.served < 1 << 16


# -- the end of a fetch ----------------------------------------------------------------------------------------

SLOW_S = 0.5  # after each 64 KiB: a shard of 4 MB takes half a minute, the model in one file two minutes


def half_files(home: Path) -> list[str]:
    return glob.glob(f"{home}/hub/*/blobs/*.incomplete")  # in contrast to rglob, it bears folders that come and go


def whole_shards(home: Path) -> list[str]:
    return glob.glob(f"{home}/hub/*/snapshots/*/*.safetensors")


@pytest.mark.parametrize("quiet", [False, True])
def test_ctrl_c_ends_a_download_and_the_next_run_continues(hub, tmp_path, quiet):
    hub.slow_files = {"model-00002-of-00004.safetensors"}
    hub.pause_s = SLOW_S
    command = ["generate", "--target", "org/sharded", "-p", "hello", "-n", "1", *(["-q"] if quiet else [])]
    started = Command(command, **surroundings(tmp_path, url(hub)))
    wait_until(lambda: half_files(tmp_path) and len(whole_shards(tmp_path)) == 3)
    started.send_signal(signal.SIGINT)
    begun = time.monotonic()
    _, said = started.communicate()
    assert time.monotonic() - begun < 30, "not the minute of the download"
    assert started.returncode == 130
    assert b"Traceback" not in said
    assert said.endswith(b"interrupted\n") or quiet
    assert not quiet or said == b""
    assert not half_files(tmp_path)
    hub.pause.set()
    served = hub.served
    resolve("org/sharded")
    assert hub.served - served < 5 << 20, "the whole files were kept"


async def test_a_cancelled_opening_ends_its_download(hub, tmp_path):
    hub.slow_files, hub.pause_s = {"model.safetensors"}, SLOW_S
    opening = asyncio.create_task(aspec.open_engine(target="org/single", threads=1).__aenter__())
    while not half_files(tmp_path):
        await asyncio.sleep(0.01)
    opening.cancel()
    with pytest.raises(asyncio.CancelledError):
        await opening
    assert not half_files(tmp_path)
    assert hub.served < 8 << 20


def test_a_download_ends_with_a_process_that_is_killed(hub, tmp_path):
    hub.slow_files, hub.pause_s = {"model.safetensors"}, SLOW_S
    code = "from aspec.io.hub import resolve; resolve('org/single')"
    started = subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path, env=surroundings(tmp_path, url(hub)))
    wait_until(lambda: half_files(tmp_path))
    started.kill()
    started.wait()
    wait_until(lambda: not half_files(tmp_path))


# -- warnings --------------------------------------------------------------------------------------------------


def events(*lines):
    """Fetches whose process says these lines."""
    fetches = Fetches()
    for line in lines:
        fetches._take(line)


def test_a_warning_of_the_library_keeps_its_category_and_is_no_failure_of_the_download():
    warning = {"event": "warning", "category": "FutureWarning", "text": "a name is going"}
    with pytest.warns(FutureWarning, match="a name is going"):
        events(dict(warning))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(FutureWarning, match="a name is going"):
            events(dict(warning))


def test_warnings_that_are_errors_do_not_end_a_fetch(hub, tmp_path):
    environment = surroundings(tmp_path, url(hub), PYTHONWARNINGS="error")
    code = "from aspec.io.hub import resolve; print(resolve('org/single', weights=False))"
    made = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, cwd=tmp_path)
    assert made.returncode == 0, made.stderr


def test_a_process_that_cannot_fetch_says_why(hub, monkeypatch):
    monkeypatch.setattr("aspec.io.fetching.fetch.CHILD", "raise SystemExit('no such library')")
    with pytest.raises(CheckpointError, match=r"has ended \(no such library\)"):
        Fetches().fetch(Wanted("org/single"), weights=True)

"""``--target org/name:Q4_K_M``: the GGUF files of one quantisation from a hub, or for a plan their headers alone."""

import json

import pytest
from typer.testing import CliRunner

from aspec.cli.main import app
from aspec.errors import CheckpointError
from aspec.io.hub import find, resolve
from aspec.models.formats.gguf.folder import folder_of
from tests import fake_hub
from tests.compat import few
from tests.fake_hub import surroundings, url
from tests.gguf_files import PAIRS, TEXT, U32, builds_tokenizers, file_bytes, small_tensors
from tests.test_explain import MACHINE

SERVED_BYTES = 10 << 20  # at most, of a model of 32 MB whose header has 3 MB
LONG = ("general.description", TEXT, "x" * (3 << 20))  # the header takes several requests
ROPE = ("rope_freqs.weight", (4,), 0, b"".join(map(bytes.fromhex, ("0000803f", "0000803f", "00000040", "00000041"))))


def whole(padding):
    """A model whose configuration needs the bytes of its last tensor."""
    return file_bytes([*PAIRS, LONG], [*small_tensors(), ROPE]) + bytes(padding)


def halves():
    """The same in two files; the second one is the larger one."""
    split = [("split.no", U32, 0), ("split.count", U32, 2), ("split.tensors.count", U32, len(small_tensors()) + 1)]
    one = file_bytes([*PAIRS, LONG, *split], small_tensors())
    other = file_bytes([("split.no", U32, 1), *split[1:]], [ROPE])
    return {"Q6_K/tiny-Q6_K-00001-of-00002.gguf": one, "Q6_K/tiny-Q6_K-00002-of-00002.gguf": other + bytes(32 << 20)}


PLANNED = [("q8_0", "tiny-Q8_0.gguf"), ("Q6_K", "Q6_K/tiny-Q6_K-00001-of-00002.gguf")]
FILES = {"README.md": b"#", "tiny-Q8_0.gguf": whole(32 << 20), "tiny-Q4_0.gguf": whole(0), **halves()}


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub with three quantisations of a model, which this process and those that it starts ask."""
    with fake_hub.serve() as server:
        for name, value in surroundings(tmp_path, url(server)).items():
            if name.startswith(("HF_", "XDG_")):
                monkeypatch.setenv(name, value)
        server.repositories["org/tiny"] = FILES
        yield server


@pytest.fixture
def machine(tmp_path):
    path = tmp_path / "machine.json"
    path.write_text(json.dumps(MACHINE))
    return path


def run(*args):
    return CliRunner().invoke(app, list(map(str, args)))


def plan(model, machine):
    made = run("plan", "--target", model, "--profile", machine, "--json")
    assert made.exit_code == 0, made.output
    return json.loads(made.stdout)


@pytest.fixture
def local(tmp_path):
    for name in FILES:
        (tmp_path / "local" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "local" / name).write_bytes(FILES[name])
    return tmp_path / "local"


@builds_tokenizers
@pytest.mark.parametrize("planned", few(PLANNED, 1))
def test_a_plan_fetches_headers_only(hub, local, machine, monkeypatch, planned):
    """And the bytes of tensors that are a part of the configuration."""
    name, file = planned
    expected = plan(local / file, machine)
    assert plan(f"org/tiny:{name}", machine) == expected
    assert hub.served < SERVED_BYTES
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    served = hub.served
    assert plan(f"org/tiny:{name}", machine) == expected
    assert hub.served == served
    headers = resolve(f"org/tiny:{name}", weights=False)
    config = json.loads((folder_of(headers) / "config.json").read_text())
    assert config == json.loads((folder_of(local / file) / "config.json").read_text())
    assert config["rope_parameters"]["long_factor"] == [1.0, 1.0, 2.0, 8.0]


@pytest.mark.slow
@builds_tokenizers
def test_a_run_fetches_the_files_of_one_quantisation(hub, local, monkeypatch):
    words = ["--raw", "-p", "abc", "-n", 4, "--dtype", "float32", "--threads", 1, "--json", "--temperature", 0]
    one = run("generate", "--target", local / "tiny-Q4_0.gguf", *words)
    other = run("generate", "--target", "org/tiny:Q4_0@main", *words)
    assert one.exit_code == other.exit_code == 0, one.output + other.output
    assert json.loads(one.stdout)["token_ids"] == json.loads(other.stdout)["token_ids"]
    assert "fetched 0 B of " in other.stderr
    found = resolve("org/tiny:Q4_0")
    assert found.name == "tiny-Q4_0.gguf"
    assert [path.name for path in found.parent.iterdir()] == ["tiny-Q4_0.gguf"]
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert resolve("org/tiny:Q4_0") == found
    with pytest.raises(CheckpointError, match=r"'org/tiny:Q8_0' is not a local folder, is not .* in the local hub"):
        resolve("org/tiny:Q8_0")
    with pytest.raises(
        CheckpointError, match=r"'org/tiny' has GGUF files .* such as org/tiny:Q4_0; found Q4_0\. Choose"
    ):
        resolve("org/tiny")


REFUSED = [
    ("org/tiny", r"has GGUF files and no safetensors: .* org/tiny:Q4_0; found Q4_0, Q6_K, Q8_0\. Choose one", True),
    ("org/tiny:Q2_K", r"has no GGUF file of the quantisation Q2_K: found Q4_0, Q6_K, Q8_0\. Choose one", True),
    ("org/tiny", r"has GGUF files and no safetensors", False),
    ("org/good:Q2_K", r"has no GGUF file of the quantisation Q2_K: found model\. Choose", True),
    ("org/tiny:Q8_0@no-such-revision", r"Q8_0@no-such-revision' has no such revision", True),
    ("org/missing:Q8_0", r"is neither a local folder nor a model on the hub", True),
    ("org/broken:Q8_0", r"broken-Q8_0.gguf: expected a GGUF file", False),
]


@pytest.mark.parametrize("refused", few(REFUSED, 2))
def test_what_is_not_there_is_one_paragraph(hub, refused):
    name, expected, weights = refused
    hub.repositories["org/broken"] = {"broken-Q8_0.gguf": b"GGML" + bytes(100)}
    with pytest.raises(CheckpointError, match=expected) as error:
        resolve(name, what="target", weights=weights)
    assert "\n" not in str(error.value)
    assert str(error.value).startswith(f"target '{name}' ")


@pytest.mark.parametrize("name", ["org/x:", "org/x:a:b", "org/x:a/b", "org/x@main:Q8_0", "x:Q8_0", "org/x:-Q8_0"])
def test_what_is_no_hub_id_is_refused_without_a_request(name):
    with pytest.raises(CheckpointError, match=r"was not found: .* org/name:Q4_K_M for a GGUF file"):
        find(name, what="draft")

"""Small files of a model folder that are wrong: errors blame the right file, give the whole reason, cost nothing."""

import contextlib
import importlib.util
import json
import os
import resource
import shutil
import struct

import pytest
from typer.testing import CliRunner

import aspec
from aspec.cli.main import app
from aspec.errors import (
    MOST_CHARACTERS,
    AspecError,
    CheckpointError,
    UnsupportedModelError,
    UserError,
    printable,
    shown,
)
from aspec.generation.text import vocabulary_files
from aspec.generation.text.tokenizer import Tokenizer
from aspec.io.checkpoint import SINGLE, Checkpoint, read_header
from aspec.io.json_file import read_json
from aspec.models.configuration.config_sizes import MAX_TABLE_BYTES
from aspec.models.model import Model
from aspec.models.skeleton import load_config
from aspec.observe.chrome_trace import read_trace
from aspec.observe.console import Console
from aspec.profiling.hardware import read_machine
from tests import tiny

ESCAPES = "\x1b[2J\x1b]0;title\x07\r\x9b31m\u202e\udc80"


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return tiny.build(tmp_path_factory.mktemp("files") / "model", "llama", shards=1)


@pytest.fixture
def folder(source, tmp_path):
    """A copy that a test may spoil; its weights are linked."""
    for path in source.iterdir():
        if path.suffix == ".safetensors":
            os.link(path, tmp_path / path.name)
        else:
            shutil.copy(path, tmp_path)
    return tmp_path


@contextlib.contextmanager
def little_memory(nbytes=256 << 20):
    """The address space may grow by ``nbytes``: what an absurd size would take fails at once."""
    with open("/proc/self/statm") as file:
        now = int(file.read().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (now + nbytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


# -- the right reason ----------------------------------------------------------------------------------------------


@pytest.mark.compat
@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"num_hidden_layers": "four"}, "num_hidden_layers.*expected int, got str"),
        ({"hidden_size": None}, "hidden_size.*expected int, got NoneType"),
        ({"num_attention_heads": 7}, "hidden size.* heads"),
        ({"model_type": "no_such_type"}, "no_such_type is not supported"),
        ({"rope_parameters": {"rope_type": "unheard"}}, "rotary positions of type unheard"),
    ],
)
def test_a_bad_config_is_blamed_itself_and_the_reason_is_whole(folder, changes, reason):
    """The tokenizer's loader reads config.json too; its error is not the tokenizer's, wherever it is met first."""
    tiny.edit_config(folder, **changes)
    with pytest.raises(AspecError, match=rf"(?s)config\.json: .*{reason}") as by_tokenizer:
        Tokenizer.load(folder)
    assert "tokenizer" not in str(by_tokenizer.value)
    with pytest.raises(AspecError, match=reason) as by_api:
        aspec.generate("Hi", target=folder)
    assert str(by_api.value) == str(by_tokenizer.value)


@pytest.mark.parametrize(
    ("content", "packages"),
    [
        (b"\x0a\x0e\x0a\x05<unk>\x15\0\0\0\0\x18\x02", ["sentencepiece", "protobuf"]),
        (b"IQ== 0\nIg== 1\n", ["tiktoken"]),
        (b"", ["sentencepiece", "protobuf"]),
        (b"IQ== zero\n", ["sentencepiece", "protobuf"]),
    ],
)
def test_a_vocabulary_alone_names_the_packages_that_read_it(folder, monkeypatch, content, packages):
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.model").write_bytes(content)
    found = importlib.util.find_spec
    hidden = ("sentencepiece", "google.protobuf", "tiktoken")
    monkeypatch.setattr(vocabulary_files, "find_spec", lambda name: None if name in hidden else found(name))
    with pytest.raises(CheckpointError, match=rf"pip install {' '.join(packages)}`"):
        Tokenizer.load(folder)
    monkeypatch.setattr(vocabulary_files, "find_spec", lambda name: None if name == "google.protobuf" else name)
    with pytest.raises(CheckpointError) as error:
        Tokenizer.load(folder)
    assert ("pip install protobuf`" in str(error.value)) == ("protobuf" in packages), "only what is missing is named"


# -- absurd sizes --------------------------------------------------------------------------------------------------

ABSURD = [
    {"num_hidden_layers": 10**9},
    {"num_hidden_layers": 900},
    {"num_hidden_layers": -(10**9)},
    {"num_hidden_layers": 1e9},
    {"num_labels": 1 << 31},
    {"num_attention_heads": 1 << 40},
    {"head_dim": 1 << 34},
    {"head_dim": 1 << 50},
    {"vocab_size": 1 << 40},
    {"vocab_size": 1 << 62},
    {"vocab_size": -1},
    {"vocab_size": 10**300},
    {"hidden_size": 1 << 50},
    {"intermediate_size": 1 << 61},
    {"hidden_size": 0},
    {"num_key_value_heads": 0},
    {"head_dim": 1e30},
    {"hidden_size": [64]},
    {"rope_parameters": {"rope_type": "yarn", "factor": "4"}},
]


@pytest.mark.parametrize("changes", ABSURD, ids=json.dumps)
def test_absurd_sizes_are_refused_before_anything_of_their_size_is_made(folder, changes):
    tiny.edit_config(folder, **changes)
    with little_memory(), pytest.raises((CheckpointError, UnsupportedModelError)) as error:
        Model(folder)
    assert len(str(error.value)) < 1500


@pytest.mark.parametrize("changes", [{"num_hidden_layers": 10**9}, {"num_labels": 1 << 31}, {"head_dim": 1 << 34}])
def test_a_bare_configuration_has_bounds_of_its_own(folder, changes):
    (folder / SINGLE).unlink()
    tiny.edit_config(folder, **changes)
    with little_memory(), pytest.raises(CheckpointError):
        Model(folder, outlined=True)


def test_the_largest_models_are_within_the_bounds(tmp_path):
    """126 layers, 384 experts, a context of 10 million tokens, a vocabulary of 256k."""
    sizes = {"num_hidden_layers": 126, "num_experts": 384, "max_position_embeddings": 10_485_760, "vocab_size": 262_400}
    config = tiny.FAMILIES["qwen3_moe"]().to_dict() | sizes
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert load_config(tmp_path).num_hidden_layers == 126
    assert MAX_TABLE_BYTES > 10_485_760 * 64


# -- names and messages --------------------------------------------------------------------------------------------


def write_header(path, entries, nbytes=0):
    data = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    path.write_bytes(struct.pack("<Q", len(data)) + data + bytes(nbytes))


def entry(begin=0, end=4, shape=(1,), dtype="F32"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


@pytest.mark.parametrize("name", ["n" * 5_000_000, ESCAPES, f"{ESCAPES}\n" * 1000, "\n".join("lines")])
@pytest.mark.parametrize("fault", ["overlap", "dtype", "twice", "shape", "gap"])
def test_names_of_tensors_are_bounded_and_escaped_in_messages(tmp_path, name, fault):
    entries = {
        "overlap": {"a": entry(), name: entry()},
        "dtype": {name: entry(dtype=name)},
        "shape": {name: entry(shape=[-1, name])},
        "gap": {name: entry(4, 8)},
        "twice": f"{{{json.dumps(name)}: {json.dumps(entry())}, {json.dumps(name)}: 1}}".encode(),
    }
    write_header(tmp_path / SINGLE, entries[fault], 8)
    with pytest.raises(CheckpointError) as error:
        read_header(tmp_path / SINGLE)
    text = str(error.value)
    assert len(text) < 2000
    assert text.isprintable()


def test_sixty_thousand_names_with_one_of_them_twice(tmp_path):
    entries = ", ".join(f'"layers.{number % 59_999}.weight": {json.dumps(entry())}' for number in range(60_000))
    write_header(tmp_path / SINGLE, f"{{{entries}}}".encode())
    with pytest.raises(CheckpointError, match=r"tensor layers\.0\.weight is stored twice"):
        Checkpoint.open(tmp_path)


@pytest.mark.parametrize("shape", [[10**200] * 5000, [1 << 62] * 64, [1 << 62, 4, 0], [1] * 1000, [1 << 63]])
def test_shapes_beyond_any_tensor(tmp_path, shape):
    """Their product has a million digits, which no message may print."""
    write_header(tmp_path / SINGLE, {"a": entry(shape=shape)}, 4)
    with pytest.raises(CheckpointError, match="tensor a: expected"):
        read_header(tmp_path / SINGLE)


def test_every_error_is_fit_for_a_terminal():
    error = UserError(f"the file {ESCAPES} is wrong\n  line 2: {'x' * 10**6}")
    text = str(error)
    assert len(text) < MOST_CHARACTERS
    assert "\x1b" not in text
    assert r"\x1b[2J" in text
    assert "\n  line 2" in text
    assert str(UserError("Größe: 日本語 👋 is fine")) == "Größe: 日本語 👋 is fine"
    assert printable("a" * 100, most=20) == "aaaaaaaaaa ... (100 characters) ... aaaaa"
    assert shown(["x" * 500] * 500).isprintable()
    assert shown("two\nlines") == r"two\nlines"


def test_the_console_escapes_what_is_no_error_of_ours(capsys):
    console = Console()
    console.error(ESCAPES)
    console.note(ESCAPES)
    console.warn(ESCAPES)
    console.show_warnings()
    err = capsys.readouterr().err
    assert not set(err) & set("\x1b\x07\r\x9b\u202e")
    assert err.count(r"\x1b]0;title") == 3


# -- no regular file in the place of one -----------------------------------------------------------------------------


@pytest.mark.parametrize("reader", [read_machine, read_trace, lambda path: read_json(path, "JSON")])
def test_a_pipe_a_device_or_a_folder_is_refused_at_once(tmp_path, reader):
    """Opening a pipe would wait for a writer, reading /dev/zero would never end."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for path in (tmp_path / "pipe", "/dev/zero", "/dev/null", tmp_path / "folder", tmp_path / "loop", tmp_path / "no"):
        with pytest.raises(UserError, match="cannot be read"):
            reader(tmp_path / path)


@pytest.mark.parametrize("name", ["config.json", SINGLE, "tokenizer.json", "generation_config.json"])
@pytest.mark.parametrize("kind", ["pipe", "folder", "loop"])
def test_a_model_folder_with_something_else_in_the_place_of_a_file(folder, name, kind):
    path = folder / name
    path.unlink()
    {"pipe": os.mkfifo, "folder": os.mkdir, "loop": lambda path: os.symlink(path, path)}[kind](path)
    try:
        Model(folder)
        Tokenizer.load(folder)
    except AspecError:
        assert name != "generation_config.json" or kind != "pipe"


def test_a_prompt_from_a_device_ends_and_its_name_is_escaped(tmp_path):
    for path, reason in (("/dev/zero", "more than"), (tmp_path / ESCAPES.replace("\0", ""), "cannot read")):
        result = CliRunner().invoke(app, ["generate", "--file", str(path).encode(errors="replace").decode()])
        assert result.exit_code == 2
        assert reason in " ".join(result.output.replace("│", " ").split())
        assert "\x1b]0" not in result.output


def test_a_file_that_fails_while_it_is_read_is_one_paragraph(source, tmp_path):
    """/proc/self/mem is a regular file, and its first byte cannot be read."""
    command = ["batch", "-i", "/proc/self/mem", "-o", str(tmp_path / "out.jsonl"), "--target", str(source)]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 1
    assert "Input/output error" in result.output
    assert "Traceback" not in result.output


def test_a_dtype_that_is_no_type_is_refused(folder):
    tiny.edit_config(folder, dtype=5)
    with pytest.raises(CheckpointError, match="expected dtype to be the name of a type, such as bfloat16, found 5"):
        load_config(folder)

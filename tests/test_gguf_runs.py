"""``--target model.gguf`` from the command line to tokens: those of transformers on the dequantised weights."""

import json
import os
import shutil

import pytest
import torch
from typer.testing import CliRunner

import aspec
from aspec.cli.main import app
from aspec.engine.engine import open_engine
from aspec.errors import CheckpointError, ReadError, UserError
from aspec.generation.params import SamplingParams
from aspec.io.hub import SOURCE, find
from aspec.models.formats.gguf.folder import folder_of
from aspec.preparing.identity import fingerprint
from aspec.profiling.profile_cache import known_acceptance, remember_acceptance
from tests.gguf_files import builds_tokenizers

gguf = pytest.importorskip("gguf", reason="gguf-py is not installed")
from gguf import GGMLQuantizationType as Type  # noqa: E402 - after the check that it is there

from tests.gguf_models import tiny_model, write_model  # noqa: E402
from tests.test_gguf_models import built  # noqa: E402

pytestmark = builds_tokenizers
PROMPT = list(range(20, 40))
PARAMS = SamplingParams(max_new_tokens=24, ignore_eos=True)
KINDS = {"llama": Type.Q8_0, "mixtral": Type.Q4_0, "qwen3": Type.F16, "gpt-oss": Type.Q8_0}
STREAMED = {"resident_memory": 0}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A packed GGUF file of several families by name, and a copy of the llama with other weights, as a draft."""
    root = tmp_path_factory.mktemp("gguf")
    found = {}
    for name, kind in KINDS.items():
        (root / name).mkdir()
        found[name] = write_model(root / name / f"{name}-{kind.name}.gguf", name, tiny_model(name), kind)
    model = tiny_model("llama")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.005)
    found["draft"] = write_model(root / "draft.gguf", "llama", model, Type.Q4_1)
    return found


@pytest.fixture(scope="module")
def plain(files, tmp_path_factory):
    """The llama's dequantised weights as safetensors, with the same tokenizer."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        folder = shutil.copytree(folder_of(files["llama"]), tmp_path_factory.mktemp("plain") / "model")
    (folder / SOURCE).unlink()
    built(files["llama"]).save_pretrained(folder)
    return folder


def greedy(path):
    """The tokens of transformers' own generate with the weights of a file."""
    model = built(path)
    model.generation_config.eos_token_id = None
    found = model.generate(torch.tensor([PROMPT]), max_new_tokens=24, do_sample=False, pad_token_id=0)
    return found[0, len(PROMPT) :].tolist()


async def tokens_of(target, **options):
    options = {"max_context": 64, "device_memory": 24 << 20, "threads": 1, "dtype": "float32", **options}
    async with open_engine(target=target, **options) as engine:
        return [token async for piece in engine.stream(PROMPT, PARAMS) for token in piece.token_ids]


def run(*args):
    return CliRunner().invoke(app, list(map(str, args)))


def spoil(path):
    """Write other weights into a file, in place, and of the same size."""
    data = path.read_bytes()
    path.write_bytes(data[:-4096] + bytes(4096))


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("memory", [STREAMED, {}], ids=["streamed", "resident"])
async def test_tokens_are_transformers_own_on_the_dequantised_weights(files, name, memory):
    assert await tokens_of(files[name], **memory) == greedy(files[name])


@pytest.mark.parametrize("target", ["gguf", "safetensors"])
@pytest.mark.parametrize("draft", ["gguf", "safetensors"])
async def test_target_and_draft_may_be_stored_in_either_form(files, plain, target, draft):
    pair = {"gguf": files["llama"], "safetensors": plain}[target], {"gguf": files["draft"], "safetensors": plain}[draft]
    assert await tokens_of(pair[0], draft=pair[1], num_draft_tokens=4, **STREAMED) == greedy(files["llama"])


def test_a_file_and_the_folder_around_it_are_the_same_model(files, tmp_path):
    """The command line; what it prints names the file, not the folder in the cache."""
    more = ["--raw", "-p", "t5t6", "-n", 8, "--dtype", "float32", "--threads", 1, "--json", "--max-context", 600]
    one, other = (run("generate", "--target", target, *more) for target in (files["llama"], files["llama"].parent))
    assert one.exit_code == other.exit_code == 0, one.output + other.output
    assert f"the 256 tokens that {files['llama']} was made for" in one.stderr
    assert "aspec/gguf" not in one.output + other.output
    assert json.loads(one.stdout)["token_ids"] == json.loads(other.stdout)["token_ids"]


@pytest.mark.parametrize("command", ["plan", "profile", "verify", "trace", "batch"])
def test_every_command_takes_a_file(files, tmp_path, command):
    row = {"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": {"prompt": "t5t6", "max_tokens": 2}}
    (tmp_path / "in.jsonl").write_text(json.dumps(row) + "\n")
    words = {
        "plan": ["plan"],
        "profile": ["profile"],
        "verify": ["generate", "--verify", "--raw", "-p", "t5t6", "-n", 2],
        "trace": ["trace", "--raw", "-p", "t5t6", "-n", 2, "-o", tmp_path / "trace.json"],
        "batch": ["batch", "-i", tmp_path / "in.jsonl", "-o", tmp_path / "out.jsonl"],
    }[command]
    made = run(*words, "--target", files["llama"], "--draft", files["draft"], "--threads", 1)
    assert made.exit_code == 0, made.output
    assert "aspec/gguf" not in made.output
    for file in tmp_path.glob("*"):
        assert b"aspec/gguf" not in file.read_bytes()


def test_a_file_of_another_place_is_the_same_model_and_a_changed_one_is_not(files, tmp_path):
    """A batch goes on with a moved file, and refuses a changed one; how often a draft is accepted belongs to a path."""
    first = shutil.copy(files["llama"], tmp_path / "a.gguf")
    before = fingerprint(folder_of(first))
    remember_acceptance(folder_of(first), folder_of(files["draft"]), 0.5, proposals=100, cache=tmp_path)
    os.utime(first, ns=(0, 10**18))
    assert fingerprint(folder_of(first)) == before
    assert known_acceptance(folder_of(first), folder_of(files["draft"]), cache=tmp_path).acceptance == 0.5
    (tmp_path / "other").mkdir()
    assert fingerprint(folder_of(shutil.copy(first, tmp_path / "other" / "a.gguf"))) == before
    spoil(first)
    assert fingerprint(folder_of(first)) != before


async def test_a_file_that_changes_under_a_stream_ends_it(files, tmp_path):
    path = shutil.copy(files["llama"], tmp_path / "a.gguf")
    os.utime(path, ns=(0, 10**18))
    found = []

    async def under_change():
        async with open_engine(target=path, device_memory=24 << 20, max_context=64, threads=1, **STREAMED) as engine:
            async for piece in engine.stream(PROMPT, PARAMS):
                if not found:
                    spoil(path)
                found.extend(piece.token_ids)

    with pytest.raises(ReadError, match=r"a\.gguf.* since aspec read its header"):
        await under_change()
    assert 0 < len(found) < 24


def test_an_adapter_changes_the_weights_of_a_file(files, plain, tmp_path):
    from tests.test_lora import config_of, write

    adapter = write(tmp_path / "adapter", plain, config_of())
    options = dict(adapter=adapter, max_context=64, threads=1, device_memory=24 << 20, dtype="float32")
    options |= dict(prompts=[PROMPT], max_new_tokens=16, ignore_eos=True)
    expected = aspec.generate(target=plain, **options)
    assert aspec.generate(target=files["llama"], **options)[0].token_ids == expected[0].token_ids
    with pytest.raises(UserError, match=r"adapter .*draft\.gguf. is a GGUF file: expected a folder"):
        aspec.generate(target=files["llama"], **{**options, "adapter": files["draft"]})


# -- which file -------------------------------------------------------------------------------------------------------


def test_a_folder_stands_for_its_only_model(files, tmp_path):
    (tmp_path / "mmproj-F16.gguf").touch()
    (tmp_path / "README.md").touch()
    (tmp_path / "a-Q8_0.gguf").touch()
    assert find(str(tmp_path)) == tmp_path / "a-Q8_0.gguf"
    (tmp_path / "a-Q8_0.gguf").unlink()
    for number in (2, 1):
        (tmp_path / f"a-Q8_0-0000{number}-of-00002.gguf").touch()
    assert find(str(tmp_path)) == tmp_path / "a-Q8_0-00001-of-00002.gguf"
    (tmp_path / "b-Q4_0.gguf").touch()
    with pytest.raises(CheckpointError, match=r"holds 2 GGUF models: .* a-Q8_0-00001-of-00002.gguf, b-Q4_0.gguf. Give"):
        find(str(tmp_path), what="target")
    (tmp_path / "model.safetensors").touch()
    assert find(str(tmp_path)) == tmp_path


def test_a_file_of_a_store_is_known_by_its_first_bytes(files, tmp_path):
    """Ollama keeps models under their digests."""
    blob = tmp_path / "sha256-0123"
    shutil.copy(files["llama"], blob)
    assert find(str(blob)) == blob
    assert folder_of(blob).is_dir()


def cut(path):
    path.write_bytes(path.read_bytes()[:-100])


def missing_half(path):
    path.rename(path.with_name("a-00001-of-00002.gguf"))


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (cut, r"a\.gguf is truncated: tensor"),
        (lambda path: path.write_bytes(b""), r"a\.gguf.* expected a GGUF file, found"),
        (lambda path: path.write_bytes(b"GGML" + bytes(100)), r"a\.gguf: expected a GGUF file, found"),
        (missing_half, r"is one of 2 files of a model: .*1 missing: a-00002-of-00002\.gguf"),
    ],
)
def test_a_damaged_file_is_one_paragraph_with_its_name(files, tmp_path, damage, expected):
    path = shutil.copy(files["llama"], tmp_path / "a.gguf")
    damage(path)
    made = run("generate", "--target", next(tmp_path.iterdir()), "-p", "t5")
    assert made.exit_code == 1
    assert len(made.stderr.strip().split("\n\n")) == 1
    with pytest.raises(UserError, match=expected):
        raise UserError(" ".join(made.stderr.split()))

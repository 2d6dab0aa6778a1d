"""The command line: what it prints where, and how it ends."""

import json
import os
import shutil
import signal

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner

from aspec.cli.main import app
from aspec.generation.text.tokenizer import REPLACEMENT, Tokenizer
from tests import tiny
from tests.fork_server import Command

SMALL = ["--device-memory", "4MiB", "--threads", "1"]


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    target = tiny.build(tmp_path_factory.mktemp("cli") / "target", "llama")
    return target, tiny.noisy_copy(target, target.parent / "draft", 0.1)


@pytest.fixture
def copy(pair, tmp_path):
    return shutil.copytree(pair[0], tmp_path / "copy")


def run(*args, stdin=None):
    return CliRunner().invoke(app, ["generate", *map(str, args)], input=stdin)


def objects(result):
    assert result.exit_code == 0, result.output
    return [json.loads(line) for line in result.stdout.splitlines()]


def test_json_holds_what_it_promises(pair):
    made = run("--target", pair[0], "--draft", pair[1], "-p", "hello", "-p", "there you", "-n", 12, "--json", *SMALL)
    first, second = objects(made)
    for entry, prompt in ((first, "hello"), (second, "there you")):
        assert entry["usage"] == {"prompt_tokens": len(prompt), "completion_tokens": len(entry["token_ids"])}
        assert entry["finish_reason"] in ("stop", "length")
        stats = entry["stats"]
        assert stats["num_cached_tokens"] == 0
        assert stats["tokens_per_pass"] == (len(entry["token_ids"]) - 1) / stats["passes"]
        assert {
            "acceptance_rate",
            "prefill_s",
            "decode_s",
            "tokens_per_s",
            "streamed_bytes",
            "stream_bytes_per_s",
        } <= set(stats)
        assert {"ceiling_tokens_per_s", "ceiling_fraction", "peak_rss_bytes"} <= set(stats)
    assert "tokens/s" in made.stderr


def test_logprobs_hold_the_text_of_their_tokens(pair):
    made = objects(run("--target", pair[0], "-p", "hello", "-n", 4, "--json", "--logprobs", 2, *SMALL))[0]
    tokenizer = Tokenizer.load(pair[0])
    assert [one["token"] for one in made["logprobs"]] == made["token_ids"]
    for one in made["logprobs"]:
        assert len(one["top"]) == 2
        assert all(entry["text"] == tokenizer.spell([entry["token"]]) for entry in (one, *one["top"]))


def test_a_special_token_is_a_stop_string(copy):
    """Alone and beside other text; it is no text itself."""
    asked = ["--target", copy, "-p", "hello", "-n", 12, "--json", "--ignore-eos", *SMALL]
    tokens = objects(run(*asked))[0]["token_ids"]
    inner = PreTrainedTokenizerFast.from_pretrained(copy)
    spelled = Tokenizer.load(copy).spell
    at = next(at for at in range(1, 12) if tokens[at] not in tokens[:at] and spelled([tokens[at - 1]]) != REPLACEMENT)
    special = inner.convert_ids_to_tokens(tokens[at])
    inner.add_special_tokens({"additional_special_tokens": [special]})
    inner.save_pretrained(copy)
    beside = spelled([tokens[at - 1]]) + special
    for stop, text in ((special, spelled(tokens[:at])), (beside, spelled(tokens[: at - 1]))):
        made = objects(run(*asked, "--stop", stop))[0]
        assert (made["finish_reason"], made["token_ids"]) == ("stop", tokens[: at + 1])
        assert made["text"] == text


def test_a_byte_order_mark_is_no_text(pair, tmp_path):
    plain = objects(run("--target", pair[0], "-p", "hello", "-n", 4, "--json", *SMALL))[0]
    (tmp_path / "prompt.txt").write_bytes(b"\xef\xbb\xbfhello")
    from_file = objects(run("--target", pair[0], "-f", tmp_path / "prompt.txt", "-n", 4, "--json", *SMALL))[0]
    from_stdin = objects(run("--target", pair[0], "-n", 4, "--json", *SMALL, stdin="\ufeffhello"))[0]
    assert plain["usage"] == from_file["usage"] == from_stdin["usage"]
    assert plain["token_ids"] == from_file["token_ids"] == from_stdin["token_ids"]


def test_text_goes_to_stdout_and_everything_else_to_stderr(pair, tmp_path):
    from_flag = run("--target", pair[0], "-p", "hello", "-n", 12, *SMALL)
    (tmp_path / "prompt.txt").write_text("hello")
    from_file = run("--target", pair[0], "-f", tmp_path / "prompt.txt", "-n", 12, *SMALL)
    from_stdin = run("--target", pair[0], "-n", 12, "--quiet", *SMALL, stdin="hello")
    assert from_flag.stdout == from_file.stdout == from_stdin.stdout
    assert from_stdin.stderr == ""
    assert "aspec:" in from_flag.stderr
    assert "aspec:" not in from_flag.stdout


@pytest.mark.parametrize("temperature", ["0", "0.9"])
def test_the_same_seed_gives_the_same_text_with_any_draft(pair, temperature):
    common = ["--target", pair[0], "-p", "hello", "-n", 16, "--temperature", temperature, "--seed", 7, "-q", *SMALL]
    plain = run(*common, "--num-draft-tokens", 0)
    for chain in ("auto", "1", "6"):
        assert run(*common, "--draft", pair[1], "--num-draft-tokens", chain).stdout == plain.stdout


def test_sampling_defaults_come_from_the_checkpoint(copy):
    (copy / "generation_config.json").write_text(json.dumps({"do_sample": True, "temperature": 3.0, "top_k": 50}))
    sampled = run("--target", copy, "-p", "hello", "-n", 16, "-q", *SMALL).stdout
    assert (
        sampled
        == run("--target", copy, "-p", "hello", "-n", 16, "-q", "--temperature", 3, "--top-k", 50, *SMALL).stdout
    )
    assert sampled != run("--target", copy, "-p", "hello", "-n", 16, "-q", "--temperature", 0, *SMALL).stdout


def test_a_chat_template_is_applied_unless_raw(copy):
    (copy / "chat_template.jinja").write_text("<{% for m in messages %}{{ m.content }}{% endfor %}>")
    chat = objects(run("--target", copy, "-p", "hello", "-n", 2, "--json", *SMALL))[0]
    raw = objects(run("--target", copy, "-p", "hello", "-n", 2, "--json", "--raw", *SMALL))[0]
    assert (chat["usage"]["prompt_tokens"], raw["usage"]["prompt_tokens"]) == (7, 5)


def poison(folder):
    for shard in folder.glob("*.safetensors"):
        tensors = load_file(shard)
        if "lm_head.weight" in tensors:
            tensors["lm_head.weight"][5] = torch.nan
            save_file(tensors, shard, metadata={"format": "pt"})


def swap_tokens(folder):
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    vocab = content["model"]["vocab"]
    a, b = (next(token for token, i in vocab.items() if i == n) for n in (40, 41))
    vocab[a], vocab[b] = 41, 40
    path.write_text(json.dumps(content))


def truncate(folder):
    shard = sorted(folder.glob("*.safetensors"))[0]
    os.truncate(shard, shard.stat().st_size - 9)


BAD = {
    "missing path": (lambda d: shutil.rmtree(d), [], "was not found"),
    "no shards": (lambda d: [f.unlink() for f in d.glob("*.safetensors*")], [], "no shards"),
    "truncated shard": (truncate, [], "truncated"),
    "unknown architecture": (lambda d: tiny.edit_config(d, model_type="later"), [], "not known"),
    "quantised": (lambda d: tiny.edit_config(d, quantization_config={"quant_method": "aqlm"}), [], "quantised"),
    "no tokenizer": (lambda d: [f.unlink() for f in d.glob("tokenizer*")], [], "tokenizer"),
    "budget": (lambda d: None, ["--device-memory", "300KiB"], "at least"),
    "context": (lambda d: None, ["--max-context", "4"], "--max-context"),
    "nan": (poison, [], "finite"),
    "cuda": (lambda d: None, ["--device", "cuda"], "--device cpu"),
    "top_p": (lambda d: None, ["--top-p", "3"], "top_p"),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_input_is_one_paragraph_and_exit_1(copy, kind):
    damage, flags, expected = BAD[kind]
    damage(copy)
    result = run("--target", copy, "-p", "hello", "-n", 4, "-q", *SMALL, *flags)
    assert result.exit_code == 1, result.output
    assert result.stdout == ""
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1, result.stderr
    assert expected in result.stderr
    assert "Traceback" not in result.output


def test_another_vocabulary_is_refused_with_the_first_difference(pair, copy):
    swap_tokens(copy)
    result = run("--target", pair[0], "--draft", copy, "-p", "hello", "-q", *SMALL)
    assert result.exit_code == 1
    assert "40" in result.stderr
    assert result.stderr.count("\n") == 1


def test_an_empty_prompt_is_refused(pair):
    for args, stdin in ((["-p", ""], None), ([], "")):
        result = run("--target", pair[0], *args, stdin=stdin)
        assert result.exit_code == 1
        assert "empty" in result.stderr


@pytest.mark.parametrize(
    "flags",
    [["--bogus"], ["--link-rate", "fast"], ["--device-memory", "0"], ["--file", "/nowhere"], ["--device", "tpu"]],
)
def test_usage_errors_exit_with_2(flags):
    assert run("-p", "x", *flags).exit_code == 2


def test_help_teaches():
    text = run("--help").stdout
    for word in (
        "--target",
        "--draft",
        "--device-memory",
        "--draft-budget",
        "--speculation",
        "--exact",
        "--verify",
        "--help-all",
        "Examples",
    ):
        assert word in text


def test_debug_shows_where(copy):
    truncate(copy)
    assert run("--target", copy, "-p", "x", "--debug").exception.__class__.__name__ == "CheckpointError"


def test_ctrl_c_ends_with_130_and_keeps_the_text(pair):
    args = ["--target", pair[0], "-p", "hello", "-n", "200", "--ignore-eos", "--link-rate", "3MB/s"]
    process = Command(["generate", *args, "--device-memory", "2MiB"])
    first = os.read(process.stdout.fileno(), 4096)
    process.send_signal(signal.SIGINT)
    rest, errors = process.communicate()
    assert process.returncode == 130, errors.decode()
    assert first
    assert len(first + rest) < 200, "far fewer tokens than were asked for"
    assert b"Traceback" not in errors
    assert b"interrupted" in errors

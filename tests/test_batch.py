"""Batch jobs: every row's answer is its own whatever runs beside it, and none is lost whatever ends the job."""

import asyncio
import json
import os
import random
import re
import shutil
import signal
import time

import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from aspec.api import collect, run
from aspec.cli.main import app
from aspec.engine.engine import open_engine
from aspec.generation.params import SamplingParams
from aspec.generation.sampler import derive_seed
from aspec.generation.text.tokenizer import Tokenizer
from aspec.observe.batch_progress import BatchProgress, batch_line, duration
from aspec.observe.snapshot import Snapshot
from aspec.options import DEMO
from aspec.plan import Workload
from aspec.serving.batch_check import RowCheck
from aspec.serving.batch_input import BatchFile, parse_row
from aspec.serving.batch_journal import journal_of
from aspec.serving.batch_writer import digest_of
from aspec.serving.dispatch import WINDOW, PreparedRequest, serve
from aspec.serving.openai_requests import Request
from aspec.serving.request_fields import CHAT, COMPLETION
from tests import tiny
from tests.compat import few
from tests.fork_server import Command, wait_until

SMALL = ["--device-memory", "4MiB", "--threads", "1", "-n", "12"]
TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>"


def made_pair(folder, family):
    target = tiny.build(folder / "target", family, varied=True)
    (target / "chat_template.jinja").write_text(TEMPLATE)
    return target, tiny.noisy_copy(target, folder / "draft", 0.1)


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return made_pair(tmp_path_factory.mktemp("batch"), "llama")


def make_rows(count, longest=16):
    """Rows of every kind, as JSON objects."""
    noise = random.Random(5)
    rows = []
    for i in range(count):
        body = {"max_tokens": noise.randint(1, longest)}
        body |= noise.choice([{}, {"temperature": 0.9}, {"temperature": 0.7, "top_p": 0.9, "seed": i}, {"top_k": 5}])
        body |= noise.choice([{}, {}, {"presence_penalty": 0.5}, {"repetition_penalty": 1.2}, {"ignore_eos": True}])
        body |= noise.choice([{}, {}, {"stop": ["e", "aa"]}, {"model": f"model {i}"}])
        text = "shared words " + "".join(noise.choice("abcdef \n") for _ in range(noise.randint(1, 20)))
        if i % 3:
            body |= {"prompt": text if i % 6 else list(text.encode())}
            body |= noise.choice([{}, {"logprobs": 2}])
        else:
            body |= {"messages": [{"role": "user", "content": text}]}
            body |= noise.choice([{}, {"logprobs": True, "top_logprobs": 1}])
        url = COMPLETION if i % 3 else CHAT
        rows.append({"custom_id": f"row-{i}", "method": "POST", "url": url, "body": body})
    return rows


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def command(pair, source, output, *flags):
    models = ["--target", str(pair[0])] + (["--draft", str(pair[1])] if len(pair) > 1 else [])
    return ["batch", "-i", str(source), "-o", str(output), *models, *SMALL, *map(str, flags)]


def batch(pair, source, output, *flags):
    return CliRunner().invoke(app, command(pair, source, output, *flags))


def answers(output):
    lines = output.read_bytes().splitlines()
    found = {json.loads(line)["custom_id"]: json.loads(line) for line in lines}
    assert len(found) == len(lines), "no row is there twice"
    return found


def timeless(output):
    """The answers of a job, whenever it began."""
    found = answers(output)
    for answer in found.values():
        assert answer["response"]["body"].pop("created") > 1_700_000_000
    return found


def begun_like(undisturbed, output):
    """Begin a job at the very moment another one began: only then can their rows be the same, byte for byte."""
    header = journal_of(undisturbed).read_bytes().splitlines(keepends=True)[0]
    journal_of(output).write_bytes(header)


def same_rows(undisturbed, output):
    return sorted(undisturbed.read_bytes().splitlines()) == sorted(output.read_bytes().splitlines())


# -- what is answered ------------------------------------------------------------------------------------------


def test_every_answer_is_that_of_its_request_alone(pair, tmp_path):
    rows = make_rows(24)
    result = batch(pair, write(tmp_path / "in.jsonl", rows), tmp_path / "out.jsonl", "--seed", 3, "--top-k", 40)
    assert result.exit_code == 0, result.output
    found = answers(tmp_path / "out.jsonl")
    assert found.keys() == {row["custom_id"] for row in rows}

    async def alone():
        async with open_engine(target=pair[0], device_memory=4 << 20, max_batch=1, threads=1) as engine:
            for row in rows:
                request = parse_row(json.dumps(row).encode()).request
                seed = derive_seed(3, int(digest_of(row["custom_id"]), 16))
                params = request.params(SamplingParams(top_k=40, max_new_tokens=12), seed)
                prompt = [dict(message) for message in request.prompt] if request.is_chat else request.prompt
                yield row, request, await collect(engine, prompt, params)

    async def check():
        async for row, request, expected in alone():
            answer = found[row["custom_id"]]
            assert answer["error"] is None
            assert answer["response"]["status_code"] == 200
            body = answer["response"]["body"]
            (choice,) = body["choices"]
            text = choice["message"]["content"] if request.is_chat else choice["text"]
            assert (text, choice["finish_reason"]) == (expected.text, expected.finish_reason)
            assert body["usage"]["completion_tokens"] == len(expected.token_ids)
            assert body["model"] == row["body"].get("model", str(pair[0]))
            if request.sampling.get("logprobs") is None:
                assert choice["logprobs"] is None
            elif request.is_chat:
                got = [entry["logprob"] for entry in choice["logprobs"]["content"]]
                assert got == [one.logprob for one in expected.logprobs]
            else:
                assert choice["logprobs"]["token_logprobs"] == [one.logprob for one in expected.logprobs]

    run(check)


def test_neither_order_nor_company_nor_draft_changes_a_row(pair, tmp_path):
    rows = make_rows(12)
    write(tmp_path / "in.jsonl", rows)
    write(tmp_path / "turned.jsonl", rows[::-1])
    assert batch(pair, tmp_path / "in.jsonl", tmp_path / "out.jsonl").exit_code == 0
    found = timeless(tmp_path / "out.jsonl")
    for flags in (["--batch-size", 3], ["--speculation", "off", "--batch-size", 1], ["--num-draft-tokens", 3]):
        assert batch(pair, tmp_path / "turned.jsonl", tmp_path / "other.jsonl", "--overwrite", *flags).exit_code == 0
        assert timeless(tmp_path / "other.jsonl") == found


def test_rows_that_do_not_fit_are_error_rows(pair, tmp_path):
    rows = [
        {"custom_id": "fits", "method": "POST", "url": COMPLETION, "body": {"prompt": "a" * 20, "max_tokens": 12}},
        {"custom_id": "cut", "method": "POST", "url": COMPLETION, "body": {"prompt": "a" * 25, "ignore_eos": True}},
        {"custom_id": "long", "method": "POST", "url": COMPLETION, "body": {"prompt": "a" * 40, "max_tokens": 1}},
        {"custom_id": "many", "method": "POST", "url": COMPLETION, "body": {"prompt": "a" * 20, "max_tokens": 13}},
        {"custom_id": "none", "method": "POST", "url": COMPLETION, "body": {"prompt": "a" * 31, "max_tokens": 0}},
        {"custom_id": "token", "method": "POST", "url": COMPLETION, "body": {"prompt": [999], "max_tokens": 1}},
    ]
    result = batch(pair, write(tmp_path / "in.jsonl", rows), tmp_path / "out.jsonl", "--max-context", 32)
    assert result.exit_code == 0, result.output
    assert "6 of 6 rows are in" in result.stderr
    assert "3 of them errors" in result.stderr
    found = answers(tmp_path / "out.jsonl")
    assert found["fits"]["error"] is None
    assert found["none"]["response"]["body"]["usage"]["completion_tokens"] == 0
    cut = found["cut"]["response"]["body"]
    assert (cut["usage"]["completion_tokens"], cut["choices"][0]["finish_reason"]) == (7, "length")
    for name, code in (("long", "context_length_exceeded"), ("many", "context_length_exceeded")):
        assert found[name]["response"] is None
        assert found[name]["error"]["code"] == code
        assert "holds 32" in found[name]["error"]["message"]
    assert found["token"]["error"]["code"] == "invalid_prompt"
    again = batch(pair, tmp_path / "in.jsonl", tmp_path / "out.jsonl", "--max-context", 32)
    assert "3 of them errors" in again.stderr


def test_rows_that_cannot_be_drawn_are_error_rows(pair, tmp_path):
    """One holds a token whose embedding is not a number, one forbids every token, one names an unknown token."""
    target = tmp_path / "target"
    model = AutoModelForCausalLM.from_pretrained(pair[0])
    with torch.no_grad():
        model.model.embed_tokens.weight[77] = float("nan")
    model.save_pretrained(target)
    tiny.save_tokenizer(target)
    bodies = {f"fine {i}": {"prompt": [3 + i, 9], "logit_bias": {"40": -100}, "min_tokens": 2} for i in range(6)}
    bodies |= {"damaged": {"prompt": [5, 77, 6]}, "forbidden": {"prompt": [5], "suppress_tokens": list(range(256))}}
    bodies["unknown"] = {"prompt": [5], "logit_bias": {"999": 1}}
    names = sorted(bodies)
    rows = [
        {"custom_id": n, "method": "POST", "url": COMPLETION, "body": {**bodies[n], "max_tokens": 4}} for n in names
    ]
    source = write(tmp_path / "in.jsonl", rows)
    result = batch((target, pair[1]), source, tmp_path / "out.jsonl")
    assert result.exit_code == 0, result.output
    assert "9 of 9 rows are in" in result.stderr
    found = answers(tmp_path / "out.jsonl")
    errors = {name: answer["error"] for name, answer in found.items() if answer["error"]}
    assert {name: error["code"] for name, error in errors.items()} == {
        "damaged": "numeric_error",
        "forbidden": "invalid_prompt",
        "unknown": "invalid_prompt",
    }
    assert "rule every token out" in errors["forbidden"]["message"]
    assert "logit_bias names token 999" in errors["unknown"]["message"]


def test_a_budget_for_few_rows_takes_few_at_once(pair, tmp_path):
    write(tmp_path / "in.jsonl", make_rows(40))
    result = batch(pair, tmp_path / "in.jsonl", tmp_path / "out.jsonl", "--device-memory", "2300KiB")
    assert result.exit_code == 0, result.output
    shared = int(re.search(r"(\d+) rows", result.stderr)[1])
    assert 1 <= shared < 40
    fixed = batch(pair, tmp_path / "in.jsonl", tmp_path / "o.jsonl", "--device-memory", "2300KiB", "--batch-size", 40)
    assert fixed.exit_code == 1
    assert "budget" in fixed.stderr
    assert "The context follows the longest row" in fixed.stderr


def test_prompts_that_begin_alike_are_prefilled_once_per_row(pair):
    """A window that is larger than the rows leaves the choice of the row to follow until one is free."""

    async def main():
        async with open_engine(target=pair[0], device_memory=4 << 20, max_batch=3, max_context=96) as engine:
            reused, most, now = [], 0, 0

            def ask():
                nonlocal most, now
                for i in range(30):
                    now += 1
                    most = max(most, now)
                    text = "the same long beginning of every prompt " + str(i)
                    tokens = engine.tokenizer.encode(text)
                    params = SamplingParams(max_new_tokens=2 + i % 5, ignore_eos=True)
                    yield PreparedRequest(str(i), Request(COMPLETION, text, {}), tokens, params)

            async def hear(_, results):
                nonlocal now
                now -= 1
                (result,) = results
                reused.append(result.stats.num_cached_tokens)

            await serve(engine, ask(), hear, asyncio.Event())
            assert most <= WINDOW * engine.plan.num_rows
            return reused

    reused = run(main)
    assert len(reused) == 30
    assert sum(count >= 39 for count in reused) >= 24


# -- what is refused -------------------------------------------------------------------------------------------


def refused(pair, tmp_path, output="out.jsonl", *flags, source="in.jsonl"):
    before = sorted(os.listdir(tmp_path))
    result = batch(pair, tmp_path / source, tmp_path / output, *flags)
    assert result.exit_code == 1, result.output
    assert "rows share a pass" not in result.stderr
    assert sorted(os.listdir(tmp_path)) == before, "nothing was made"
    return result.stderr


def test_the_input_is_never_the_output(pair, tmp_path):
    source = write(tmp_path / "in.jsonl", make_rows(2))
    content = source.read_bytes()
    (tmp_path / "soft.jsonl").symlink_to(source)
    os.link(source, tmp_path / "hard.jsonl")
    for name in ("in.jsonl", "soft.jsonl", "hard.jsonl"):
        assert "is the input" in refused(pair, tmp_path, name, "--overwrite")
    write(tmp_path / "out.jsonl.journal", make_rows(2))
    assert "is the input" in refused(pair, tmp_path, source="out.jsonl.journal")
    with source.open("rb") as file:
        process = Command(command(pair, "-", source, "--overwrite"), stdin=file.fileno())
    assert b"is the input" in process.communicate()[1]
    assert source.read_bytes() == content


def test_what_cannot_be_read_or_written_is_refused_before_anything_else(pair, tmp_path):
    (tmp_path / "empty.jsonl").touch()
    assert "is empty" in refused(pair, tmp_path, source="empty.jsonl")
    assert "cannot be read" in refused(pair, tmp_path, source="nowhere.jsonl")
    write(tmp_path / "in.jsonl", make_rows(2))
    assert "does not exist" in refused(pair, tmp_path, "no/folder/out.jsonl")
    assert "is a folder" in refused(pair, tmp_path, "")
    (tmp_path / "mine.jsonl").write_text("mine")
    assert "has no journal" in refused(pair, tmp_path, "mine.jsonl")
    assert (tmp_path / "mine.jsonl").read_text() == "mine"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_may_not_be_written_is_refused(pair, tmp_path):
    write(tmp_path / "in.jsonl", make_rows(2))
    (tmp_path / "folder").mkdir(mode=0o500)
    assert "is not writable" in refused(pair, tmp_path, "folder/out.jsonl")


def test_all_rows_are_checked_before_any_is_served(pair, tmp_path):
    rows = make_rows(9)
    rows[2]["body"]["n"] = 0
    rows[4]["custom_id"] = "row-1"
    rows[6] = {**rows[1], "custom_id": "long", "body": {"prompt": "a" * 300}}
    rows[8] = {**rows[1], "custom_id": "surrogate", "body": {"prompt": "\ud800"}}
    source, output = write(tmp_path / "in.jsonl", rows), tmp_path / "out.jsonl"
    problems = {3: "n must be a whole", 5: '"row-1" is already', 7: "context holds 256", 9: "not valid Unicode"}

    def listed(told):
        assert "4 rows of 9 cannot be served" in told
        lines = told.splitlines()
        for number, words in problems.items():
            assert any(line.startswith(f"  line {number}: ") and words in line for line in lines)

    told = refused(pair, tmp_path, "out.jsonl", "--strict")
    assert "no row was served" in told
    listed(told)
    result = batch(pair, source, output)
    assert result.exit_code == 0, result.output
    listed(result.stderr)
    lines = [json.loads(line) for line in output.read_bytes().splitlines()]
    assert [line["custom_id"] for line in lines[:4]] == ["row-2", None, "long", "surrogate"], "before any work"
    for line, (number, words) in zip(lines, problems.items(), strict=False):
        assert line["response"] is None
        assert line["error"].keys() >= {"message", "type", "param", "code"}
        assert line["error"]["type"] == "invalid_request_error"
        assert words in line["error"]["message"]
        assert line["error"].get("line", number) == number
    assert sorted(line["custom_id"] for line in lines[4:]) == ["row-0", "row-1", "row-3", "row-5", "row-7"]
    assert all(line["error"] is None for line in lines[4:])
    again = batch(pair, source, output)
    assert "holds 9 of 9 rows" in again.stderr
    assert len(output.read_bytes().splitlines()) == 9


def test_a_file_without_a_row_that_can_be_served_is_refused(pair, tmp_path):
    rows = make_rows(3)
    for row in rows:
        row["body"]["response_format"] = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"enum": []}}}
    write(tmp_path / "in.jsonl", rows)
    told = refused(pair, tmp_path)
    assert "3 rows of 3 cannot be served, so no row was served. Correct the file and run again:\n  line 1: " in told
    assert "the JSON schema cannot be used" in told


@pytest.mark.slow
def test_rows_are_held_to_their_forms_and_a_form_that_cannot_be_met_is_an_error_row(tmp_path):
    schemas = [{"enum": ["é", [1, {"a": None}]]}, {"type": "integer", "minimum": 10, "maximum": 12}, {"enum": []}]
    forms = [{"type": "json_schema", "json_schema": {"name": "x", "schema": schema}} for schema in schemas]
    bodies = [{"prompt": "a = ", "max_tokens": 40, "temperature": 1, "response_format": form} for form in forms]
    bodies.append({"prompt": "a = ", "max_tokens": 40, "guided_choice": ["one", "two"]})
    rows = [
        {"custom_id": f"{number}", "method": "POST", "url": COMPLETION, "body": body}
        for number, body in enumerate(bodies)
    ]
    source, demo = write(tmp_path / "in.jsonl", rows), (DEMO / "target", DEMO / "draft")
    found = []
    for method in ("off", "auto"):
        result = CliRunner().invoke(
            app, ["batch", "-i", str(source), "-o", str(tmp_path / method), "--target", str(demo[0]), "--draft",
                  str(demo[1]), "--speculation", method, "--exact"]
        )  # fmt: skip
        assert result.exit_code == 0, result.output
        made = answers(tmp_path / method)
        assert "Unsatisfiable" in made.pop("2")["error"]["message"]
        found.append({number: one["response"]["body"]["choices"][0]["text"] for number, one in made.items()})
    assert found[0] == found[1]
    assert json.loads(found[0]["0"]) in schemas[0]["enum"]
    assert 10 <= json.loads(found[0]["1"]) <= 12
    assert found[0]["3"] in ("one", "two")


@pytest.mark.parametrize("context", [256, None])
def test_a_row_that_asks_for_more_than_the_context_is_an_error_row_and_moves_no_plan(pair, tmp_path, context):
    rows = [
        {"custom_id": f"{wanted}", "method": "POST", "url": COMPLETION, "body": {"prompt": "a", "max_tokens": wanted}}
        for wanted in (3, 2_000_000, 10**12, 10**200)
    ]
    with BatchFile(write(tmp_path / "in.jsonl", rows)) as file:
        check = RowCheck(Tokenizer.load(pair[0]), SamplingParams(max_new_tokens=10**15), context)
        file.scan(check)
        assert list(file.refused) == [1, 2, 3]
        assert {refusal.code for refusal in file.refused.values()} == {"context_length_exceeded"}
        assert (check.longest, check.workload()) == (4, Workload(1, 1, 3))


def test_a_template_s_variables_reach_it(pair, tmp_path):
    target = shutil.copytree(pair[0], tmp_path / "thinking")
    (target / "chat_template.jinja").write_text(TEMPLATE + "{% if enable_thinking is false %}<no>{% endif %}")
    body = {"messages": [{"role": "user", "content": "a"}], "max_tokens": 2}
    rows = [
        {"custom_id": f"{i}", "method": "POST", "url": CHAT, "body": {**body, "chat_template_kwargs": variables}}
        for i, variables in enumerate([{}, {"enable_thinking": False}, {"thinking": 1}, {"tokenize": True}])
    ]
    result = batch((target,), write(tmp_path / "in.jsonl", rows), tmp_path / "out.jsonl")
    found = answers(tmp_path / "out.jsonl")
    counts = [found[f"{i}"]["response"]["body"]["usage"]["prompt_tokens"] for i in range(3)]
    assert counts[1] == counts[0] + len("<no>")
    assert counts[2] == counts[0]
    assert 'the chat template does not use "thinking"' in result.stderr
    assert "tokenize cannot be given" in found["3"]["error"]["message"]


def test_rows_that_name_another_model_are_told_which_one_serves_them(pair, tmp_path):
    rows = make_rows(3)
    for row, name in zip(rows, ("gpt-4o", "gpt-4o", pair[0].name), strict=True):
        row["body"]["model"] = name
    result = batch(pair, write(tmp_path / "in.jsonl", rows), tmp_path / "out.jsonl")
    assert f'rows name "gpt-4o" as their model; {pair[0]} serves them all' in result.stderr


def test_n_choices_are_those_of_n_seeds(pair, tmp_path):
    body = {"prompt": "ab", "max_tokens": 9, "temperature": 1.5, "ignore_eos": True}
    rows = [
        {"custom_id": "three", "method": "POST", "url": COMPLETION, "body": {**body, "n": 3, "seed": 5}},
        {"custom_id": "one", "method": "POST", "url": COMPLETION, "body": {**body, "seed": 5}},
        {"custom_id": "second", "method": "POST", "url": COMPLETION, "body": {**body, "seed": derive_seed(5, 1)}},
    ]
    assert batch(pair, write(tmp_path / "in.jsonl", rows), tmp_path / "out.jsonl").exit_code == 0
    found = {name: answer["response"]["body"] for name, answer in answers(tmp_path / "out.jsonl").items()}
    texts = [choice["text"] for choice in found["three"]["choices"]]
    assert [choice["index"] for choice in found["three"]["choices"]] == [0, 1, 2]
    assert len(set(texts)) == 3
    assert texts[:2] == [found["one"]["choices"][0]["text"], found["second"]["choices"][0]["text"]]
    assert found["three"]["usage"] == {"prompt_tokens": 2, "completion_tokens": 27, "total_tokens": 29}


def test_rows_and_answers_may_pass_through_pipes(pair, tmp_path):
    rows = make_rows(6)
    source, output = write(tmp_path / "in.jsonl", rows), tmp_path / "out.jsonl"
    assert batch(pair, source, output).exit_code == 0
    result = CliRunner().invoke(app, command(pair, "-", "-"), input=source.read_bytes())
    assert result.exit_code == 0, result.output
    assert "without a journal" in result.stderr
    (tmp_path / "piped.jsonl").write_text(result.stdout)
    assert timeless(tmp_path / "piped.jsonl") == timeless(output)
    again = CliRunner().invoke(app, command(pair, "-", output), input=source.read_bytes())
    assert "holds 6 of 6 rows" in again.stderr, "an input is known by its content"
    assert sorted(os.listdir(tmp_path)) == ["in.jsonl", "out.jsonl", "out.jsonl.journal", "piped.jsonl"]


def test_chats_need_a_template(pair, tmp_path):
    shutil.copytree(pair[0], tmp_path / "plain")
    (tmp_path / "plain" / "chat_template.jinja").unlink()
    write(tmp_path / "in.jsonl", make_rows(3))
    told = refused((tmp_path / "plain",), tmp_path, "out.jsonl", "--strict")
    assert "one row of 3 cannot be served, so no row was served" in told
    assert "or leave out --strict: they become error rows then:\n  line 1: " in told
    assert "has no chat template" in told


def test_usage_errors_exit_with_2(pair, tmp_path):
    for args in (["-i", "in"], ["-o", "out"], ["-i", "in", "-o", "out", "--prompt", "x"], ["-i", "i", "--bogus"]):
        assert CliRunner().invoke(app, ["batch", *args]).exit_code == 2


def test_help_teaches():
    text = CliRunner().invoke(app, ["batch", "--help"]).stdout
    for word in ("--input", "--output", "--overwrite", "custom_id", "journal", "Ctrl-C", "Examples"):
        assert word in text
    assert "--prompt" not in text


def test_another_job_is_refused_but_not_another_draft(pair, tmp_path):
    rows = make_rows(6)
    rows[5]["body"] = {"prompt": "any seed says something else", "temperature": 2.0, "max_tokens": 16}
    source, output = write(tmp_path / "in.jsonl", rows), tmp_path / "out.jsonl"
    assert batch(pair, source, output).exit_code == 0
    content = output.read_bytes()
    other = shutil.copytree(pair[0], tmp_path / "other")
    tiny.edit_config(other, rms_norm_eps=1e-3)
    for flags, told in ((["--seed", 1], "seed was 0, is 1"), (["--temperature", 1], "temperature was 0.0, is 1.0")):
        assert told in refused(pair, tmp_path, "out.jsonl", *flags)
    assert "target was" in refused((other,), tmp_path)
    write(source, rows[:5])
    assert "input was" in refused(pair, tmp_path)
    assert output.read_bytes() == content
    write(source, rows)
    again = batch(pair[:1], source, output, "--batch-size", 1)
    assert again.exit_code == 0
    assert "holds 6 of 6 rows" in again.stderr
    assert "rows share a pass" not in again.stderr, "nothing is loaded where nothing is left"
    assert batch(pair, source, output, "--seed", 1, "--overwrite").exit_code == 0
    assert output.read_bytes() != content


# -- what ends a job -------------------------------------------------------------------------------------------


def num_rows_in(output):
    return output.read_bytes().count(b"\n") if output.exists() else 0


def kill_again_and_again(server, args, output, total, kills):
    """Kill a job at random moments of its work, begin it again each time; how often it had made headway."""
    noise, fruitful = random.Random(11), 0
    for left in range(kills, 0, -1):
        before = num_rows_in(output)
        wanted = before + noise.randint(0, (total - before) // (left + 1))
        pid = server.start(args, output.with_suffix(".log"))
        wait_until(lambda wanted=wanted: num_rows_in(output) >= wanted)
        time.sleep(noise.uniform(0, 0.1))
        os.kill(pid, signal.SIGKILL)
        assert server.wait(pid) == -signal.SIGKILL, output.with_suffix(".log").read_text()
        fruitful += num_rows_in(output) > before
    return fruitful


def crash(server, pair, tmp_path, count, kills):
    source, quiet, output = (
        write(tmp_path / "in.jsonl", make_rows(count)),
        tmp_path / "quiet.jsonl",
        tmp_path / "o.jsonl",
    )
    flags = ["--batch-size", 6]
    assert server.wait(server.start(command(pair, source, quiet, *flags), tmp_path / "quiet.log")) == 0
    begun_like(quiet, output)
    args = command(pair, source, output, *flags, "--link-rate", "8MB/s")
    fruitful = kill_again_and_again(server, args, output, count, kills)
    assert server.wait(server.start(args, tmp_path / "last.log")) == 0, (tmp_path / "last.log").read_text()
    assert same_rows(quiet, output)
    assert len(answers(output)) == count
    assert fruitful >= kills // 2, "the kills fell into the work"


def test_a_job_that_is_killed_loses_doubles_and_halves_no_row(server, pair, tmp_path):
    crash(server, pair, tmp_path, 40, 4)


@pytest.mark.slow
def test_a_job_that_is_killed_40_times_ends_with_the_rows_of_one_that_nothing_disturbed(server, pair, tmp_path):
    crash(server, pair, tmp_path, 200, 40)


@pytest.mark.slow
def test_a_job_of_a_recurrent_model_that_is_killed_loses_doubles_and_halves_no_row(server, tmp_path):
    crash(server, made_pair(tmp_path, "qwen3_next"), tmp_path, 40, 4)


def test_ctrl_c_finishes_what_is_under_way_and_the_rest_comes_later(pair, tmp_path):
    source, quiet, output = write(tmp_path / "in.jsonl", make_rows(30)), tmp_path / "quiet.jsonl", tmp_path / "o.jsonl"
    assert batch(pair, source, quiet).exit_code == 0
    begun_like(quiet, output)
    args = command(pair, source, output, "--batch-size", 3, "--link-rate", "6MB/s")
    process = Command(args)
    wait_until(lambda: num_rows_in(output) > 3)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate()
    assert process.returncode == 130, errors.decode()
    assert b"no new rows" in errors
    assert b"run the same command again" in errors
    assert b"Traceback" not in errors
    assert 3 < num_rows_in(output) < 30
    assert batch(pair, source, output).exit_code == 0
    assert same_rows(quiet, output)


@pytest.mark.parametrize(
    "signals", few([[signal.SIGINT, signal.SIGINT], [signal.SIGTERM]], 1), ids=["twice", "SIGTERM"]
)
def test_a_job_that_is_stopped_at_once_loses_no_row(server, pair, tmp_path, signals):
    rows = make_rows(30)
    for row in rows[8:]:
        row["body"] |= {"max_tokens": 100, "ignore_eos": True}
        row["body"].pop("stop", None)
    source, output = write(tmp_path / "in.jsonl", rows), tmp_path / "out.jsonl"
    args = command(pair, source, output, "--batch-size", 3, "--link-rate", "4MB/s", "--speculation", "off")
    pid = server.start(args, tmp_path / "log")
    wait_until(lambda: num_rows_in(output) >= 6)
    for number in signals:
        os.kill(pid, number)
        wait_until(lambda number=number: number != signal.SIGINT or "no new rows" in (tmp_path / "log").read_text())
    assert server.wait(pid) == 128 + signals[-1], (tmp_path / "log").read_text()
    assert "Traceback" not in (tmp_path / "log").read_text()
    assert 6 <= num_rows_in(output) < 12, "those under way, of 100 tokens each, were not waited for"
    assert batch(pair, source, output).exit_code == 0
    assert answers(output).keys() == {row["custom_id"] for row in rows}


def test_a_full_disk_is_one_error_and_a_resume_completes(server, pair, tmp_path):
    source, quiet, output = write(tmp_path / "in.jsonl", make_rows(30)), tmp_path / "quiet.jsonl", tmp_path / "o.jsonl"
    assert batch(pair, source, quiet).exit_code == 0
    begun_like(quiet, output)
    args = command(pair, source, output)
    for limit in (3000, 9000):
        log = tmp_path / f"{limit}.log"
        assert server.wait(server.start(args, log, largest_file=limit)) == 1
        assert log.read_text().count("error:") == 1
        assert "cannot grow" in log.read_text()
        assert "Traceback" not in log.read_text()
        assert 0 < output.stat().st_size <= limit
        assert output.read_bytes().endswith(b"\n")
    assert server.wait(server.start(args, tmp_path / "log")) == 0
    assert same_rows(quiet, output)


@pytest.mark.parametrize("what", few(["output", "journal", "input"], 1))
def test_a_file_that_is_moved_away_or_rewritten_under_a_job_ends_it_and_a_resume_completes(pair, tmp_path, what):
    """Restored and continued, the job ends with the rows of one that nothing disturbed."""
    source, quiet, output = write(tmp_path / "in.jsonl", make_rows(30)), tmp_path / "quiet.jsonl", tmp_path / "o.jsonl"
    assert batch(pair, source, quiet).exit_code == 0
    begun_like(quiet, output)
    process = Command(command(pair, source, output, "--batch-size", 3, "--link-rate", "6MB/s"))
    wait_until(lambda: num_rows_in(output) > 3)
    kept = tmp_path / "kept"
    if what == "input":
        kept.write_bytes(source.read_bytes())
        write(source, make_rows(30)[::-1])
    else:
        os.rename(output if what == "output" else journal_of(output), kept)
    _, errors = process.communicate()
    assert process.returncode == 1, errors.decode()
    assert errors.count(b"error:") == 1
    assert b"Traceback" not in errors
    assert (b"was changed while" if what == "input" else b"was removed or moved away") in errors
    os.rename(kept, {"output": output, "journal": journal_of(output), "input": source}[what])
    assert 3 < num_rows_in(output) < 30
    assert batch(pair, source, output).exit_code == 0
    assert same_rows(quiet, output)


def test_a_stderr_that_cannot_be_written_ends_no_job(pair, tmp_path):
    """Progress is worth less than answers."""
    source, output = write(tmp_path / "in.jsonl", make_rows(6)), tmp_path / "out.jsonl"
    with open("/dev/full", "w") as full:
        process = Command(command(pair, source, output), stderr=full.fileno())
        assert process.wait() == 0
    assert len(answers(output)) == 6


def test_a_stdout_that_cannot_be_written_is_one_error(pair, tmp_path):
    source = write(tmp_path / "in.jsonl", make_rows(6))
    with open("/dev/full", "w") as full:
        process = Command(command(pair, source, "-"), stdout=full.fileno())
        _, errors = process.communicate()
    assert process.returncode == 1
    assert errors.count(b"error:") == 1
    assert b"standard output cannot be written" in errors
    process = Command(command(pair, source, "-", "--link-rate", "1MB/s"))
    process.stdout.close()
    errors = process.stderr.read()
    assert process.wait() == 1
    assert b"Traceback" not in errors
    assert b"error:" not in errors, "the reader has gone, as head does: that is no error of the job"


def test_a_row_whose_logits_are_no_numbers_is_an_error_row_and_spoils_no_other(pair, tmp_path):
    target = shutil.copytree(pair[0], tmp_path / "poisoned")
    (shard,) = [path for path in target.glob("*.safetensors") if "model.embed_tokens.weight" in load_file(path)]
    tensors = load_file(shard)
    tensors["model.embed_tokens.weight"][122] = float("nan")
    save_file(tensors, shard, {"format": "pt"})
    rows = make_rows(24)
    for row in rows[::6]:
        row["url"], row["body"] = COMPLETION, {"prompt": [97, 98, 122], "max_tokens": 8}
    source = write(tmp_path / "in.jsonl", rows)
    for output, models in ((tmp_path / "clean.jsonl", pair), (tmp_path / "out.jsonl", (target, pair[1]))):
        assert batch(models, source, output, "--batch-size", 3).exit_code == 0
    clean, found = (answers(tmp_path / name) for name in ("clean.jsonl", "out.jsonl"))
    failed = {name for name, answer in found.items() if answer["error"]}
    assert failed >= {f"row-{i}" for i in range(0, 24, 6)}
    assert len(failed) <= 6, "another row fails only if it draws that token itself"
    assert {found[name]["error"]["code"] for name in failed} == {"numeric_error"}
    for name, answer in found.items():
        if answer["error"] is None:
            choices = answer["response"]["body"]["choices"], clean[name]["response"]["body"]["choices"]
            assert choices[0] == choices[1]


def test_no_weight_is_read_before_all_rows_are_checked(pair, tmp_path, monkeypatch):
    def opened(*_, **__):
        raise AssertionError("the engine opened")

    monkeypatch.setattr("aspec.cli.batch.Engine", opened)
    rows = make_rows(3)
    rows[2]["body"]["max_tokens"] = 10**9
    write(tmp_path / "in.jsonl", rows)
    assert "line 3: " in refused(pair, tmp_path, "out.jsonl", "--strict")


def test_a_second_process_on_the_same_output_is_refused(server, pair, tmp_path):
    source, output = write(tmp_path / "in.jsonl", make_rows(30)), tmp_path / "out.jsonl"
    pid = server.start(command(pair, source, output, "--link-rate", "1MB/s"), tmp_path / "log")
    wait_until(output.exists)
    for flags in ([], ["--overwrite"]):
        result = batch(pair, source, output, *flags)
        assert result.exit_code == 1
        assert "in use by another process" in result.stderr
    os.kill(pid, signal.SIGKILL)
    assert server.wait(pid) == -signal.SIGKILL


def test_a_failing_target_ends_the_job_and_keeps_its_rows(pair, tmp_path):
    """A shard that is cut while it is read is the machine's failure, not a row's."""
    broken = shutil.copytree(pair[0], tmp_path / "broken")
    source, output = write(tmp_path / "in.jsonl", make_rows(30)), tmp_path / "out.jsonl"
    args = command((broken,), source, output, "--batch-size", 2, "--link-rate", "4MB/s", "--device-memory", "1MiB")
    process = Command(args)
    wait_until(lambda: num_rows_in(output) > 3)
    shards = {shard: shard.read_bytes() for shard in broken.glob("*.safetensors")}
    for shard in shards:
        os.truncate(shard, 4096)
    _, errors = process.communicate()
    assert process.returncode == 1, errors.decode()
    assert errors.count(b"error:") == 1
    kept = answers(output)
    for shard, content in shards.items():
        shard.write_bytes(content)
    assert batch((broken,), source, output).exit_code == 0
    assert len(answers(output)) == 30
    assert {name: answers(output)[name] for name in kept} == kept


# -- how it goes -----------------------------------------------------------------------------------------------


def test_a_line_tells_how_far_it_is_and_how_long_it_takes():
    tally = BatchProgress(100, done=20, begun_s=10.0)
    snapshot = Snapshot(now_s=20.0, stage="decode", tokens=300, tokens_per_s=31.5)
    assert "20 of 100 rows, 300 tokens, 31.50 tokens/s, time left not known yet" in batch_line(tally, snapshot)
    tally.keep(10, 2)
    assert "30 of 100 rows (2 errors)" in batch_line(tally, snapshot)
    assert " 70 s left" in batch_line(tally, snapshot)
    tally.refuse(35)
    assert "65 of 100 rows (37 errors)" in batch_line(tally, snapshot)
    assert " 35 s left" in batch_line(tally, snapshot), "rows without work say nothing of the speed"
    assert batch_line(tally, Snapshot(now_s=1.0, stage="load", done=1 << 20, total=2 << 20)).startswith(
        "load: 1.00 MiB"
    )


def test_durations():
    assert [duration(s) for s in (0.4, 99, 100, 5900, 11_100)] == ["0 s", "99 s", "2 min", "98 min", "3 h 05 min"]


def test_quiet_is_quiet(pair, tmp_path):
    result = batch(pair, write(tmp_path / "in.jsonl", make_rows(3)), tmp_path / "out.jsonl", "-q")
    assert (result.exit_code, result.stdout, result.stderr) == (0, "", "")


@pytest.mark.slow
def test_memory_stays_flat_over_thousands_of_rows(server, pair, tmp_path):
    source, output = write(tmp_path / "in.jsonl", make_rows(2000, longest=8)), tmp_path / "out.jsonl"
    args = command(pair, source, output, "--batch-size", 16, "--max-context", 64, "--device-memory", "12MiB")
    pid = server.start(args, tmp_path / "log")
    process, sizes = psutil.Process(pid), {}
    for wanted in (500, 1000, 1500, 1950):
        wait_until(lambda wanted=wanted: num_rows_in(output) >= wanted or not process.memory_info().rss, 600)
        sizes[wanted] = process.memory_info().rss
    assert server.wait(pid) == 0
    print("resident bytes after so many rows:", sizes)
    assert num_rows_in(output) == 2000
    assert max(sizes.values()) < 1.02 * sizes[500], sizes

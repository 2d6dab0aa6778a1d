"""Messages and text of a command: what goes where, and that neither breaks the other's lines."""

import io
import os
from contextlib import contextmanager, redirect_stderr, redirect_stdout

import pytest

from aspec.api import Result
from aspec.cli.generate import Outcome, summarise
from aspec.generation.stats import RequestStats
from aspec.observe.console import Console
from tests.simulate import make_plan


@contextmanager
def streams(out, err=None):
    """Standard output and error on one file or on two, until the block ends."""
    with (
        open(out, "a", encoding="utf-8") as one,
        open(err or out, "a", encoding="utf-8") as other,
        redirect_stdout(one),
        redirect_stderr(other),
    ):
        yield


def say_all(console):
    console.progress("load: 1 of 2")
    console.write("a sentence that")
    console.progress("decode: 3 tokens")
    console.write(" goes on\nin a second line")
    console.progress("decode: 4 tokens")
    console.note("the summary")
    console.progress("verifying")


def test_no_progress_within_text_that_goes_to_the_same_file(tmp_path):
    with streams(tmp_path / "both"):
        say_all(Console())
    assert (tmp_path / "both").read_text() == (
        "aspec: load: 1 of 2\na sentence that goes on\nin a second line\naspec: the summary\naspec: verifying\n"
    )


def test_progress_goes_on_where_the_text_goes_elsewhere(tmp_path):
    with streams(tmp_path / "out", tmp_path / "err"):
        say_all(Console())
    assert (tmp_path / "out").read_text() == "a sentence that goes on\nin a second line"
    assert (tmp_path / "err").read_text().count("decode: ") == 2


@pytest.mark.parametrize("ended", ["", "\n"])
def test_an_error_and_a_warning_begin_their_own_lines(tmp_path, ended):
    with streams(tmp_path / "both"):
        console = Console()
        console.write("half a line" + ended)
        console.error("the disk failed")
        console.write("more" + ended)
        console.warn("old")
        console.show_warnings()
    assert (tmp_path / "both").read_text() == "half a line\nerror: the disk failed\nmore\nwarning: old\n"


def test_a_pipe_and_its_double_are_one_file():
    reads, writes = os.pipe()
    with streams(writes, os.dup(writes)):
        say_all(Console())
    with os.fdopen(reads, "rb") as pipe:
        assert b"decode" not in pipe.read()


def test_streams_that_are_no_files_share_nothing():
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()) as said:
        say_all(Console())
    assert said.getvalue().count("decode: ") == 2


def result(tokens, arrived_s, prefill_s, decode_s, reason="length"):
    stats = RequestStats(3, arrived_s, prefill_s=prefill_s, decode_s=decode_s, completion_tokens=tokens, passes=5)
    stats.proposed, stats.accepted = 20, 10
    return Result("", (), reason, stats)


def test_many_prompts_have_one_summary_with_their_common_speed():
    results = [result(121, 0.0, 1.0, 10.0) for _ in range(11)] + [result(21, 0.0, 1.0, 2.0, "stop")]
    said = summarise(Outcome(results, make_plan(), (None, None)))
    assert said == (
        "12 prompts: 1352 tokens (11 length, 1 stop), prefill 1.00 s, 134.00 tokens/s together, "
        "22.33 tokens of a row per pass, 50% of proposals accepted"
    )


def test_one_prompt_has_its_own_summary():
    said = summarise(Outcome([result(21, 5.0, 1.0, 10.0)], make_plan(), (2e9, None)))
    assert said == (
        "21 tokens (length), prefill 1.00 s, 2.00 tokens/s, 4.00 tokens per pass, 50% of proposals accepted, "
        "raw link 2.00 GB/s"
    )


def test_no_tokens_have_no_speed():
    said = summarise(Outcome([result(0, 5.0, 1.0, 0.0)], make_plan(), (None, None)))
    assert "tokens/s" not in said
    assert "per pass" not in said

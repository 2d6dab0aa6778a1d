"""What each command takes: every field of its record is an option, and an option that would do nothing is none."""

from dataclasses import fields
from typing import Annotated, get_origin, get_type_hints

import pytest
import typer
from typer.testing import CliRunner

from aspec.cli import command_flags
from aspec.cli.front.serve_flags import ServeFlags
from aspec.cli.main import app

RECORDS = {
    "generate": command_flags.GenerateFlags,
    "trace": command_flags.TraceFlags,
    "bench": command_flags.BenchFlags,
    "chat": command_flags.ChatFlags,
    "batch": command_flags.BatchFlags,
    "serve": ServeFlags,
    "profile": command_flags.ProfileFlags,
    "plan": command_flags.PlanFlags,
}
DRAWS = {"--max-new-tokens", "--temperature", "--top-p", "--top-k", "--min-p", "--repetition-penalty"}
DRAWS |= {"--presence-penalty", "--frequency-penalty", "--seed", "--stop"}
ENGINE = {"--device-memory", "--host-memory", "--speculation", "--draft-budget", "--draft-depth", "--draft-ahead"}
ENGINE |= {"--attention", "--exact", "--max-context"}
ROWS = {"--batch-size", "--groups"}
RUN = DRAWS | ENGINE | ROWS | {"--prompt", "--file", "--raw", "--system", "--json", "--quiet", "--no-dashboard"}
ALL = {"--target", "--draft", "--dtype", "--device", "--threads", "--link-rate", "--debug"}
TAKEN = {
    "generate": RUN | {"--verify", "--logprobs", "--ignore-eos"},
    "trace": RUN | {"--simulate", "--summary", "--compare", "--max-spans", "--output", "--logprobs", "--ignore-eos"},
    "bench": RUN | {"--rounds"},
    "chat": DRAWS | ENGINE | {"--system", "--ignore-eos", "--quiet"},
    "batch": DRAWS
    | ENGINE
    | ROWS
    | {"--input", "--output", "--overwrite", "--ignore-eos", "--quiet", "--no-dashboard"},
    "serve": DRAWS | ENGINE | ROWS | {"--host", "--port", "--api-key", "--no-auth", "--max-queue", "--quiet"},
    "profile": {"--refresh", "--output", "--json", "--quiet"},
    "plan": ENGINE
    | ROWS
    | {
        "--profile",
        "--prompts",
        "--prompt-tokens",
        "--new-tokens",
        "--acceptance",
        "--json",
        "--temperature",
        "--quiet",
    },
}
EVERY = set().union(*TAKEN.values())


@pytest.mark.parametrize("command", TAKEN)
def test_a_command_takes_what_does_something_and_nothing_else(command):
    taken = {name for param in typer.main.get_command(app).commands[command].params for name in param.opts}
    assert taken >= ALL | TAKEN[command]
    assert not taken & (EVERY - TAKEN[command])


@pytest.mark.parametrize("command", RECORDS)
def test_every_field_of_a_record_is_an_option(command):
    hints = get_type_hints(RECORDS[command], include_extras=True)
    assert all(get_origin(hints[field.name]) is Annotated for field in fields(RECORDS[command]))


@pytest.mark.parametrize(
    ("words", "option"),
    [
        (["bench", "--ignore-eos"], "--ignore-eos"),
        (["profile", "--device", "gpu"], "--device"),
        (["generate", "-p", "x", "--attention", "gpu"], "--attention"),
        (["batch", "--input", "x"], "--output"),
        (["chat", "--speculation", "much"], "--speculation"),
    ],
)
def test_what_cannot_be_meant_is_a_usage_error(words, option):
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 2
    assert option in result.output

"""A fixed slice of tools/fuzz.py: some damaged files of every kind, in this process."""

import importlib
import sys
from pathlib import Path
from random import Random

import pytest

TOOLS = Path(__file__).resolve().parent.parent / "tools"
CASES = {"engine": 12, "template": 25, "config": 30}  # the slower ones
OTHERS = 50


@pytest.fixture(scope="module")
def kinds():
    sys.path.insert(0, str(TOOLS))
    yield importlib.import_module("fuzz_kinds")
    sys.path.remove(str(TOOLS))


@pytest.fixture(scope="module")
def sources(kinds, tmp_path_factory):
    root = tmp_path_factory.mktemp("sources")
    kinds.make_sources(root)
    return root


KINDS = (
    "checkpoint",
    "index",
    "adapter",
    "config",
    "engine",
    "generation",
    "tokenizer",
    "tokenizer config",
    "template",
)
KINDS += ("batch", "journal", "profile", "trace", "cache")


def test_every_kind_is_here(kinds):
    assert set(KINDS) == set(kinds.KINDS)


@pytest.mark.parametrize("kind", KINDS)
def test_damaged_files_are_read_rightly_or_refused_in_a_paragraph(kinds, sources, tmp_path, kind):
    outcomes = []
    for number in range(CASES.get(kind, OTHERS)):
        folder = tmp_path / str(number)
        folder.mkdir()
        verdict = kinds.run_case(kind, Random(f"0/{kind}/{number}"), sources, folder, lambda: iter(()))
        assert verdict.outcome not in kinds.FAULTS, (number, verdict)
        outcomes.append(verdict.outcome)
    assert kind == "cache" or "refused" in outcomes, "the damage is worth reading"


class Undamaged(Random):
    """Chooses damage that the test has taken away."""

    def random(self):
        return 0.5


@pytest.mark.parametrize("kind", KINDS)
def test_undamaged_files_are_accepted(kinds, sources, tmp_path, monkeypatch, kind):
    """So a refusal is the damage's, and a comparison with the format's own reader has run."""
    for module in (kinds.fuzz_models, kinds.fuzz_files):
        monkeypatch.setattr(module, "damage", lambda *_, **__: None)
        monkeypatch.setattr(module, "damaged_json", lambda _, value: kinds.fuzz_files.json.dumps(value).encode())
    monkeypatch.setattr(kinds.fuzz_models, "damaged_bytes", lambda _, data: data)
    assert kinds.run_case(kind, Undamaged(3), sources, tmp_path, lambda: iter(())).outcome == "accepted"


@pytest.mark.parametrize(("reader", "fault"), [("nothing is read", "wrong"), ("another error", "traceback")])
def test_the_fuzzer_sees_faults(kinds, sources, tmp_path, monkeypatch, reader, fault):
    """A reader that takes everything, and one that fails: what the fuzzer would say of them."""

    def read(folder):
        if fault == "traceback":
            raise KeyError(reader)
        raise kinds.WrongAcceptanceError(reader)

    case = kinds.KINDS["config"].case
    monkeypatch.setattr(kinds, "KINDS", {"config": kinds.Kind(case, read)})
    verdict = kinds.run_case("config", Random(1), sources, tmp_path, lambda: iter(()))
    assert verdict.outcome == fault
    assert reader in verdict.reason
    (tmp_path / "again").mkdir()
    opened = iter([iter(()), iter(["/etc/passwd"])])
    outside = kinds.run_case("config", Random(1), sources, tmp_path / "again", lambda: next(opened))
    assert outside == kinds.Verdict("outside", "/etc/passwd")

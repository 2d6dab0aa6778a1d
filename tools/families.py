"""Which families does aspec run? Every type of transformers that makes text, tiny, against transformers' ``generate``.

A tiny checkpoint of each type runs with all layers streamed: without a draft, with chains and with trees of a noisy
copy of itself. Greedy tokens in fp32 must be those of ``generate(use_cache=False)``. Each type runs in a process of its
own, which may fail or hang alone. Results are kept as they come, so the same command goes on where it was stopped.

    python tools/families.py                     # all types: about 15 minutes on 2 cores
    python tools/families.py llama gemma3        # some, again
    python tools/families.py --table             # the table of the README, from the results
"""

import argparse
import asyncio
import json
import os
import re
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # read when libraries are imported; an importer keeps its own
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import aspec  # noqa: I001  # before torch
import torch
from tools.family_configs import ROWS, all_types, tiny_config
from transformers.initialization import no_init_weights

from aspec.engine.engine import open_engine
from aspec.generation.params import SamplingParams
from aspec.models.families import family_of
from aspec.models.hf_compat import auto_class, conversion_rules
from aspec.models.probing.layers import examine
from aspec.models.skeleton import load_config
from tests import tiny

RESULTS = Path(__file__).with_name("families.tsv")
NEW, LENGTHS = 16, (20, 37, 11)  # prompts longer than every window, and than a prefill item
SIGMAS = (0.07, 0.02, 0.2)  # noise of the draft, until it is accepted sometimes
MOST_PARAMETERS = 60_000_000
LIMIT_S = 120.0
FAILS = "its own forward fails"  # a refusal of the probe
COLUMNS = ("type", "mapping", "verdict", "reason")
VERDICTS = ("equal", "differs", "failed", "refused", "no reference", "not built")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("types", nargs="*", help="types to run again; default: all that have no result")
    parser.add_argument("--results", type=Path, default=RESULTS, help="the file of results (default: %(default)s)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="types at a time (default: %(default)s)")
    parser.add_argument("--seconds", type=float, help="start no type after so many seconds")
    parser.add_argument("--table", action="store_true", help="print the table of the README and stop")
    args = parser.parse_args()
    if args.table:
        print(table(read(args.results)))
        return 0
    done = read(args.results)
    wanted = args.types or [name for name in (*all_types(), *_variants()) if name not in done]
    if unknown := [name for name in wanted if name.partition(":")[0] not in all_types()]:
        parser.error(f"not a type of transformers that makes text: {', '.join(unknown)}")
    for name, row in measured(wanted, args.jobs, args.seconds):
        done[name] = row
        write(args.results, done)
    counts = Counter(row["verdict"] for row in done.values())
    print(", ".join(f"{counts[verdict]} {verdict}" for verdict in VERDICTS if counts[verdict]), flush=True)
    return 1 if counts["differs"] or counts["failed"] else 0


def _variants() -> list[str]:
    return [name for name in ROWS if ":" in name and name.partition(":")[0] in all_types()]


# -- results -------------------------------------------------------------------------------------------------


def read(path: Path) -> dict[str, dict[str, str]]:
    """The results of a file by type; none if there is no file."""
    if not path.is_file():
        return {}
    header, *lines = path.read_text().splitlines()
    assert tuple(header.split("\t")) == COLUMNS, f"{path} has other columns than {COLUMNS}"
    return {line.partition("\t")[0]: dict(zip(COLUMNS, line.split("\t"), strict=True)) for line in lines}


def write(path: Path, results: Mapping[str, Mapping[str, str]]) -> None:
    """Replace the file of results at once."""
    rows = ["\t".join(row[column] for column in COLUMNS) for _, row in sorted(results.items())]
    beside = path.with_suffix(".new")
    beside.write_text("\n".join(["\t".join(COLUMNS), *rows]) + "\n")
    beside.replace(path)


WORDS = {
    "equal": "run, all tokens equal",
    "differs": "other tokens",
    "failed": "fail",
    "refused": "refused",
    "no reference": "transformers itself does not run them on text alone",
    "not built": "not tried: no tiny configuration was found",
}
"""A verdict in the words of the README."""


def table(results: Mapping[str, Mapping[str, str]]) -> str:
    """The README's table: the types that run, and those that do not, by reason."""
    groups: dict[tuple[int, str], list[str]] = defaultdict(list)
    for row in results.values():
        verdict, words = row["verdict"], WORDS[row["verdict"]]
        if verdict == "refused":
            words += f": {row['reason'].partition(' (')[0]}"
        elif verdict == "equal" and row["mapping"] == "image-text":
            words += ", beside towers for images"
        if ":" not in row["type"]:
            groups[VERDICTS.index(verdict), words].append(row["type"])
    ordered = sorted(groups.items(), key=lambda own: (own[0][0], -len(own[1]), own[0][1]))
    lines = [f"| {words} | {len(names)} | {', '.join(sorted(names))} |" for (_, words), names in ordered]
    return "\n".join(["| | number | types |", "|---|---|---|", *lines])


# -- runs ----------------------------------------------------------------------------------------------------


def measured(names: Sequence[str], jobs: int, limit_s: float | None) -> Iterator[tuple[str, dict[str, str]]]:
    """Run types in processes of their own, some at a time; yields each with its row and says how far it is."""
    begun, waiting, running = time.monotonic(), list(names), {}
    _warm_up()
    with tempfile.TemporaryDirectory() as folder:
        while waiting or running:
            late = limit_s is not None and time.monotonic() - begun > limit_s
            while waiting and not late and len(running) < jobs:
                name = waiting.pop(0)
                running[_fork(name, Path(folder))] = name, time.monotonic()
            if not running:
                return
            for pid, name, seconds in list(_ended(running)):
                del running[pid]
                row = _row(name, Path(folder) / f"{name}.json")
                count = len(names) - len(waiting) - len(running)
                took = time.monotonic() - begun
                reason = row["reason"][:110]
                print(
                    f"{count}/{len(names)} {took:.0f} s  {name}: {row['verdict']} ({seconds:.1f} s) {reason}",
                    flush=True,
                )
                yield name, row
            time.sleep(0.02)


def _warm_up() -> None:
    """Compute once, before processes are forked, what every type needs: it takes transformers a second."""
    config = tiny_config("llama")
    with torch.device("meta"), no_init_weights():
        conversion_rules(auto_class(config).from_config(config))


def _fork(name: str, folder: Path) -> int:
    pid = os.fork()
    if pid:
        return pid
    try:
        null = os.open(os.devnull, os.O_WRONLY)
        for stream in (1, 2):
            os.dup2(null, stream)
        torch.set_num_threads(1)
        verdict, reason = outcome(name, folder)
        (folder / f"{name}.json").write_text(json.dumps([verdict, reason]))
    finally:
        os._exit(0)


def _ended(running: Mapping[int, tuple[str, float]]) -> Iterator[tuple[int, str, float]]:
    """Processes that have ended, those that took too long included: they are ended here."""
    for pid, (name, begun) in running.items():
        seconds = time.monotonic() - begun
        if seconds > LIMIT_S:
            os.kill(pid, signal.SIGKILL)
        if os.waitpid(pid, os.WNOHANG if seconds <= LIMIT_S else 0)[0]:
            yield pid, name, seconds


def _row(name: str, path: Path) -> dict[str, str]:
    verdict, reason = json.loads(path.read_text()) if path.is_file() else ("failed", "its process ended or hung")
    return dict(zip(COLUMNS, (name, all_types()[name.partition(":")[0]], verdict, reason), strict=True))


class Stop(Exception):
    """Not an error: the verdict is known."""

    def __init__(self, verdict: str, reason: str) -> None:
        super().__init__(verdict, reason)
        self.verdict, self.reason = verdict, " ".join(reason.split())


def outcome(name: str, folder: Path) -> tuple[str, str]:
    """The verdict of a type and its reason, in this process; ``folder`` takes its checkpoints."""
    try:
        return "equal", verify(name, folder / name.replace(":", "-"))
    except Stop as stop:
        return stop.verdict, stop.reason
    except BaseException as error:
        return "failed", _said(error)


def verify(name: str, folder: Path) -> str:
    """Run a type; returns in words what was equal. Raises Stop with the verdict and its reason otherwise."""
    config = _or_not_built(tiny_config, name)
    _or_not_built(config.save_pretrained, folder)
    try:
        loaded = load_config(folder)
        auto = auto_class(config)
        count = _or_not_built(_parameters, auto, config)
        examine(loaded, torch.float32)
    except aspec.UserError as error:
        if FAILS in str(error):  # transformers may fail as well
            build(auto, config, folder)
            _generated(_reference(auto, folder), _prompts(config))
        raise Stop("refused", _reason(str(error), folder, config.model_type)) from error
    _or_not_built(build, auto, config, folder, -(-count * 4 // 3))
    return _compare(auto_class(config, text_class=family_of(config.model_type).text_class), folder)


def _or_not_built(make: Callable[..., Any], *args: Any) -> Any:
    """What ``make`` makes. Raises Stop if it fails: no verdict on aspec."""
    try:
        return make(*args)
    except Exception as error:
        raise Stop("not built", _said(error)) from error


def _parameters(auto: Any, config: Any) -> int:
    """The number of parameters of a tiny model."""
    with torch.device("meta"), no_init_weights():
        count = sum(parameter.numel() for parameter in auto.from_config(config).parameters())
    if count > MOST_PARAMETERS:
        raise ValueError(f"its tiny configuration has {count / 1e6:.0f} million parameters")
    return count


def build(auto: Any, config: Any, folder: Path, shard_bytes: int = 1 << 30) -> None:
    """A tiny checkpoint with weights that give varied tokens."""
    torch.manual_seed(0)
    model = tiny.randomise(auto.from_config(config), 0, varied=True).float().eval()
    model.generation_config.do_sample = False
    model.save_pretrained(folder, max_shard_size=shard_bytes)
    tiny.save_tokenizer(folder, _vocab(config))


def _vocab(config: Any) -> int:
    return int(config.get_text_config().vocab_size)


def _compare(auto: Any, folder: Path) -> str:
    """What ``verify`` returns or raises for a checkpoint that was built."""
    model = _reference(auto, folder)
    prompts = _prompts(model.config)
    wanted = _generated(model, prompts)
    found, _ = run(folder, None, "off", prompts, None)
    _check(found, wanted, "without a draft")
    accepted = 0.0
    for sigma in SIGMAS:
        draft = _noisy(auto, folder, folder.with_name(f"{folder.name}-draft"), sigma)
        found, accepted = run(folder, draft, "chain", prompts, 4)
        _check(found, wanted, "with chains")
        if 0.2 <= accepted <= 0.95:
            break
    found, in_trees = run(folder, draft, "tree", prompts, 9)
    _check(found, wanted, "with trees")
    return f"off, chains ({accepted:.2f} accepted) and trees ({in_trees:.2f})"


def _reference(auto: Any, folder: Path) -> Any:
    """transformers' own model with aligned parameters: mapped ones are unaligned, which changes last bits."""
    model = auto.from_pretrained(folder, dtype=torch.float32, experts_implementation="eager").eval()
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    return model


def _prompts(config: Any) -> list[list[int]]:
    generator = torch.Generator().manual_seed(5)
    most = min(200, _vocab(config))
    return [torch.randint(3, most, (count,), generator=generator).tolist() for count in LENGTHS]


def _generated(model: Any, prompts: Sequence[Sequence[int]]) -> list[list[int]]:
    """What transformers generates without a cache; with one, where it cannot do without."""
    options = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    for cached in (False, True):
        try:
            tokens = [model.generate(torch.tensor([prompt]), use_cache=cached, **options) for prompt in prompts]
        except Exception as error:
            failed = error
            continue
        return [made[0, len(prompt) :].tolist() for made, prompt in zip(tokens, prompts, strict=True)]
    raise Stop("no reference", f"transformers itself fails on text alone ({_said(failed)})") from failed


def _noisy(auto: Any, source: Path, folder: Path, sigma: float) -> Path:
    """A draft: the target with relative noise on every matrix."""
    model = auto.from_pretrained(source, dtype=torch.float32)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * sigma * parameter.std())
    model.save_pretrained(folder)
    tiny.save_tokenizer(folder, _vocab(model.config))
    return folder


def run(
    target: Path, draft: Path | None, speculation: str, prompts: Iterable[list[int]], count: int | None, **options: Any
) -> tuple[list[list[int]], float]:
    """The tokens of every prompt, all layers streamed, and the share of proposals that was accepted.

    ``options``: further fields of ``EngineOptions``.
    """

    async def one(engine: Any, prompt: list[int]) -> tuple[list[int], Any]:
        tokens: list[int] = []
        async for piece in engine.stream(prompt, SamplingParams(max_new_tokens=NEW, ignore_eos=True)):
            tokens += piece.token_ids
            stats = piece.stats
        return tokens, stats

    async def all_of_them() -> list[tuple[list[int], Any]]:
        async with open_engine(
            target=target, draft=draft, speculation=speculation, num_draft_tokens=count, max_batch=len(LENGTHS),
            max_context=80, prefill_tokens=16, resident_memory=0, threads=1, **options,
        ) as engine:  # fmt: skip
            assert len(engine.plan.streamed) == len(engine.plan.parts), "all layers stream"
            return await asyncio.gather(*(one(engine, prompt) for prompt in prompts))

    results = asyncio.run(all_of_them())
    proposed = sum(stats.proposed for _, stats in results)
    return [tokens for tokens, _ in results], sum(stats.accepted for _, stats in results) / max(1, proposed)


def _check(found: Sequence[Sequence[int]], wanted: Sequence[Sequence[int]], how: str) -> None:
    for number, (own, other) in enumerate(zip(found, wanted, strict=True)):
        if own != other:
            at = next((i for i, pair in enumerate(zip(own, other, strict=False)) if pair[0] != pair[1]), len(own))
            raise Stop("differs", f"{how}, prompt {number}: token {at} is another one")


def _reason(message: str, folder: Path, model_type: str) -> str:
    """A refusal without the names of its file and of the type, so that equal ones can be counted."""
    for start in (f"{folder / 'config.json'}: ", f"{folder}: ", f"{model_type}: "):
        message = message.removeprefix(start)
    return re.sub(r"^\S+ is not supported: ", "", message).replace(str(folder), "MODEL").rstrip(".")


def _said(error: BaseException) -> str:
    inner = error.exceptions[0] if isinstance(error, BaseExceptionGroup) else error
    at = traceback.extract_tb(inner.__traceback__)[-1]
    text = " ".join(str(inner).split())[:300]
    return f"{type(inner).__name__}: {text} ({Path(at.filename).name}:{at.lineno})"


if __name__ == "__main__":
    sys.exit(main())

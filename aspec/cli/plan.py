"""What ``aspec plan`` does: search for a plan with the headers of the checkpoints alone, and explain it."""

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from aspec.backends.registry import HOST
from aspec.cli.command_flags import PlanFlags
from aspec.cli.front.opening import fetching
from aspec.errors import UserError
from aspec.generation.defaults import sampling_params
from aspec.io.checkpoint import has_weights
from aspec.io.fetching.fetch import Fetches
from aspec.io.memory import no_collections
from aspec.models.configuration.compute_dtype import dtype_name
from aspec.models.configuration.generation_defaults import generation_defaults
from aspec.observe.console import Console
from aspec.plan import Plan, Tier, Workload
from aspec.planning.fit import fit, most_context
from aspec.planning.footprint import Models, read_models
from aspec.planning.forecast import decode_seconds
from aspec.planning.memory_check import check_memory
from aspec.planning.resolve import resolve
from aspec.planning.search import GUESS_MARGIN, Candidate, Search
from aspec.planning.workload import (
    CostBasis,
    best_plans,
    elsewhere,
    measured_basis,
    pricing,
    unpacked,
)
from aspec.profiling.hardware import Hardware, read_machine
from aspec.profiling.profile_cache import AcceptanceStats
from aspec.units import format_bytes, format_rate

USUAL_TOKENS = 256, 128  # of a prompt, and of the text after it
MOST_METHODS = 2  # of packing that are named
RUNNERS_UP = 5  # most other plans that are listed


@dataclass(frozen=True, slots=True)
class PlanExplanation:
    """A search and its input: models, costs and workload."""

    models: Models
    basis: CostBasis
    work: Workload
    search: Search
    acceptance_from: str  # its source, in words
    decode_s: float = 0.0  # of decoding weights in one pass; 0 if they are not packed
    unpacked: Candidate | None = None  # the same model with plain weights; None if it does not fit, or is this one


def plan_to_console(flags: PlanFlags, console: Console) -> None:
    """Search and print. Raises AspecError."""

    def progress(num_tried: int) -> None:
        if num_tried.bit_count() == 1:  # a line each time the number has doubled
            console.note(f"{_count(num_tried, 'plan')} tried")

    with fetching(console) as fetches, no_collections():  # each would visit the million objects of a large checkpoint
        explained = explain(flags, progress, fetches)
    for remark in explained.models.remarks:
        console.warn(remark)
    if flags.as_json:
        print(json.dumps(as_object(explained)))
        return
    for line in lines(explained):
        print(line)


def explain(
    flags: PlanFlags, progress: Callable[[int], None] = lambda _: None, fetches: Fetches | None = None
) -> PlanExplanation:
    """Search plans for the flags; ``progress`` receives the number of tried plans. Raises AspecError."""
    hardware = None if flags.profile is None else _read_rates(flags.profile)
    options = (
        flags.options() if hardware is None else replace(flags.options(), device=HOST)
    )  # independent of this machine's devices
    resolved = resolve(options, fetches, weights=False)
    sampled = sampling_params(generation_defaults(resolved.target), flags.sampling()).temperature > 0.0
    half = min(flags.max_context or USUAL_TOKENS[0] * 2, most_context(resolved) or USUAL_TOKENS[0] * 2) // 2
    prompt, new = (max(2, min(tokens, half)) for tokens in USUAL_TOKENS)
    work = Workload(flags.num_prompts, flags.prompt_tokens or prompt, flags.new_tokens or new, sampled=sampled)
    resolved = fit(resolved, work, work.prompt_tokens, work.new_tokens)
    resolved = resolved if hardware is None else elsewhere(resolved, hardware)
    models = read_models(resolved, outlined=True)
    basis = measured_basis(models) if hardware is None else CostBasis(hardware, AcceptanceStats())
    source = "measured" if basis.known.proposals else "a guess; aspec bench measures it"
    if flags.acceptance is not None:
        given = replace(basis.known, acceptance=flags.acceptance, proposals=max(1.0, basis.known.proposals))
        basis, source = replace(basis, known=given), "given"
    search = best_plans(models, basis, progress)
    if hardware is None:
        check_memory(search.best.plan, resolved)
    explained = PlanExplanation(models, basis, work, search, source)
    if not models.target.methods:
        return explained
    best = search.best
    costs = pricing(models, basis, exact=best.plan.request.exact, sampled=work.sampled)(best.plan)
    return replace(explained, decode_s=decode_seconds(best.plan, costs), unpacked=unpacked(models, best, basis, work))


def _read_rates(path: Path) -> Hardware:
    """Read a machine file and require its rates, so that it serves any models. Raises UserError."""
    hardware = read_machine(path)
    if hardware.missing_rates:
        raise UserError(
            f"{path}: its tasks hold the seconds of one pair of models, for aspec trace --simulate. A plan needs the "
            f"rates of the machine: expected {' and '.join(hardware.missing_rates)}, found neither."
        )
    return hardware


# -- the output --------------------------------------------------------------------------------------------


def lines(explained: PlanExplanation) -> Iterator[str]:
    """The explanation as lines of text."""
    models, work, best = explained.models, explained.work, explained.search.best
    yield f"{explained.basis.hardware.name or 'this machine'}: {_machine_line(explained)}"
    layers = models.target.num_layers
    nbytes = sum(part.nbytes for part in models.parts)
    source = "" if has_weights(models.target.folder) else ", from its configuration alone"
    adapter = f", with the adapter {models.resolved.adapter}" if models.resolved.adapter is not None else ""
    methods = models.target.methods
    packed = " and ".join(methods[:MOST_METHODS]) + (", ..." if len(methods) > MOST_METHODS else "")
    kind = f"{packed}, computed in {dtype_name(models.target.dtype)}" if packed else models.target.dtypes
    yield f"target: {layers} layers, {format_bytes(nbytes)}, {kind}{source}{adapter}"
    if unread := models.target.unread_bytes:
        yield f"not read: {format_bytes(unread)}, which text does not use, such as parts for images"
    prompts = _count(work.num_prompts, "prompt")
    how = ", sampled" if work.sampled else ""
    yield f"work: {prompts} of {_count(work.prompt_tokens, 'token')}, {_count(work.new_tokens, 'new token')} each{how}"
    yield ""
    yield f"the plan: {best.plan.shape}"
    yield from (f"  {line}" for line in placement(best.plan))
    yield f"  predicted: {outlook(best, work)}"
    yield f"  bottleneck: {best.forecast.bottleneck}"
    if methods:
        yield from (f"  {line}" for line in packed_lines(explained))
    if best.plan.exactness:
        yield f"  {best.plan.exactness}"
    others = list(runners_up(explained))[:RUNNERS_UP]
    if others:
        yield ""
        yield "other plans"
        width = max(len(shape) for shape, _ in others)
        yield from (f"  {shape:{width}}  {forecast}" for shape, forecast in others)
    yield ""
    search = explained.search
    if min(candidate.forecast.job_s for candidate in search.found) < best.forecast.job_s:
        yield (
            f"another form of proposals is taken only where it is {GUESS_MARGIN:g} times as fast, because the "
            f"acceptance is a guess"
        )
    yield (
        f"{_count(len(search.found), 'plan')} ran in virtual time, {search.num_pruned} cannot be faster, "
        f"{search.num_too_large} do not fit"
    )


def packed_lines(explained: PlanExplanation) -> Iterator[str]:
    """What decoding takes, and what the same model with plain weights would do."""
    models, best, other = explained.models, explained.search.best, explained.unpacked
    if explained.decode_s:
        when = "beside its products" if best.plan.num_scratch > 1 else "in turn with its products"
        yield f"decoding: {_time(explained.decode_s)} of a pass of {_time(_pass_s(best))}, {when}"
    plain = f"in {dtype_name(models.target.dtype)}: {format_bytes(sum(part.made_bytes for part in models.parts))}"
    if other is None:
        yield f"{plain}, which does not fit this memory"
        return
    ratio = other.forecast.job_s / best.forecast.job_s
    yield f"{plain}, {other.forecast.tokens_per_s:.4g} tokens/s, {ratio:.1f} times the time in all"


def _pass_s(candidate: Candidate) -> float:
    """Seconds of a pass of one group of rows."""
    forecast = candidate.forecast
    rows = candidate.plan.num_rows / candidate.plan.num_groups
    return rows * forecast.tokens_per_pass / forecast.tokens_per_s if forecast.tokens_per_s else 0.0


def _machine_line(explained: PlanExplanation) -> str:
    hardware, known = explained.basis.hardware, explained.basis.known
    link = hardware.h2d_bytes_per_s
    words = [f"disk {format_rate(hardware.disk_bytes_per_s)}"]
    words += [f"link {format_rate(link)}"] if link else []
    words.append(f"budget {format_bytes(explained.models.resolved.budget_bytes)}")
    if explained.models.draft is not None:
        words.append(f"acceptance {known.acceptance:.2f} ({explained.acceptance_from})")
    return ", ".join(words)


def placement(plan: Plan) -> Iterator[str]:
    """The placement of the weights, and the memory that the plan uses."""
    for tier, words in (
        (Tier.DEVICE, "stay resident"),
        (Tier.HOST, "stream from host memory"),
        (Tier.DISK, "stream from disk"),
    ):
        own = [part for part in plan.parts if part.tier is tier]
        if own:
            layers = _count(len({part.layer for part in own}), "layer")
            nbytes = format_bytes(sum(part.nbytes for part in own))
            yield f"{nbytes} in {_count(len(own), 'part')} of {layers} {words}"
    yield f"device memory: {plan.describe()}"
    if plan.describe_host():
        yield f"host memory: {plan.describe_host()}"


def outlook(candidate: Candidate, work: Workload) -> str:
    """The predicted speed and times in one line."""
    forecast = candidate.forecast
    words = [f"{forecast.tokens_per_s:.4g} tokens/s", f"{forecast.tokens_per_pass:.2f} tokens of a row per pass"]
    prompts = min(work.num_prompts, candidate.plan.num_rows)
    words.append(f"{_time(forecast.prefill_s)} to prefill {prompts}")
    return ", ".join([*words, f"{_time(forecast.job_s)} in all"])


def _count(number: int, word: str) -> str:
    return f"{number} {word}" + "s" * (number != 1)


def _time(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def runners_up(explained: PlanExplanation) -> Iterator[tuple[str, str]]:
    """Plans of other shapes, each with its forecast: first the simulated plans, then the pruned ones."""
    search = explained.search
    seen = {_shape(search.best.plan)}
    for candidate in search.found:
        if _shape(candidate.plan) not in seen:
            seen.add(_shape(candidate.plan))
            yield candidate.plan.shape, f"{outlook(candidate, explained.work)}; {candidate.forecast.bottleneck}"
    for least_s, plan in search.pruned:
        if _shape(plan) not in seen:
            seen.add(_shape(plan))
            yield plan.shape, f"at least {_time(least_s)} in all, not run"


def _shape(plan: Plan) -> tuple[object, ...]:
    """The shape of a plan, without its slots and limits."""
    return plan.num_rows, plan.num_groups, plan.speculation, plan.max_draft_tokens > 0, plan.attention_resource


def _unpacked_object(explained: PlanExplanation) -> dict[str, Any] | None:
    """The same model with plain weights; None if this one has plain weights."""
    models, other = explained.models, explained.unpacked
    if not models.target.methods:
        return None
    nbytes = sum(part.made_bytes for part in models.parts)
    if other is None:
        return {"target_bytes": nbytes, "forecast": None}
    return {
        "target_bytes": nbytes,
        "streamed_bytes": other.plan.streamed_bytes,
        "pass_s": _pass_s(other),
        "forecast": asdict(other.forecast),
    }


def as_object(explained: PlanExplanation) -> dict[str, Any]:
    """The JSON object, in bytes and seconds."""
    search = explained.search
    return {
        "work": asdict(explained.work),
        "hardware": explained.basis.hardware.as_object(),
        "acceptance": explained.basis.known.acceptance,
        "budget_bytes": explained.models.resolved.budget_bytes,
        "dtype": dtype_name(explained.models.target.dtype),
        "methods": list(explained.models.target.methods),
        "decode_s": explained.decode_s,
        "pass_s": _pass_s(search.best),
        "unpacked": _unpacked_object(explained),
        "target_bytes": sum(part.nbytes for part in explained.models.parts),
        "unread_bytes": explained.models.target.unread_bytes,
        "plans": [one.plan.as_dict() | {"forecast": asdict(one.forecast)} for one in search.found],
        "not_run": [plan.as_dict() | {"least_s": least_s} for least_s, plan in search.pruned],
        "too_large": search.num_too_large,
        "pruned": search.num_pruned,
        "remarks": list(explained.models.remarks),
    }

"""What `aspec plan` does: searches a plan from headers alone, and explains it."""

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from aspec.backends.registry import HOST
from aspec.cli.command_flags import PlanFlags
from aspec.errors import UserError
from aspec.generation.defaults import sampling_params
from aspec.io.checkpoint import has_weights
from aspec.models.model import generation_defaults
from aspec.observe.console import Console
from aspec.plan import Plan, Tier, Workload
from aspec.planning.footprint import Models, read_models, request_for
from aspec.planning.resolve import resolve, revise
from aspec.planning.search import Candidate, Search
from aspec.planning.workload import CostBasis, elsewhere, measured_basis, on_machine, plan_workload
from aspec.profiling.hardware import Hardware, read_machine
from aspec.profiling.profile_cache import AcceptanceStats
from aspec.units import format_bytes, format_rate

RUNNERS_UP = 5


@dataclass(frozen=True, slots=True)
class Explained:
    """A search and what it was about."""

    models: Models
    basis: CostBasis
    work: Workload
    search: Search


def plan_to_console(flags: PlanFlags, console: Console) -> None:
    """Search and print. Raises AspecError."""

    def progress(num_tried: int) -> None:
        if num_tried.bit_count() == 1:  # a line each time the number has doubled
            console.note(f"{_count(num_tried, 'plan')} tried")

    explained = explain(flags, progress)
    if flags.as_json:
        print(json.dumps(as_object(explained)))
        return
    for line in lines(explained):
        print(line)


def explain(flags: PlanFlags, progress: Callable[[int], None] = lambda _: None) -> Explained:
    """The plans for what the flags describe; ``progress`` hears how many were tried. Raises AspecError."""
    hardware = None if flags.profile is None else _read_rates(flags.profile)
    options = flags.options() if hardware is None else replace(flags.options(), device=HOST)  # whatever device is here
    resolved = resolve(options)
    sampled = sampling_params(generation_defaults(resolved.target), flags.sampling()).temperature > 0.0
    work = Workload(flags.num_prompts, flags.prompt_tokens, flags.new_tokens, sampled=sampled)
    context = flags.max_context or work.prompt_tokens + work.new_tokens
    resolved = revise(resolved, workload=work, max_context=context)
    if hardware is None:
        models = read_models(resolved, outlined=True)
        basis = measured_basis(models)
        models = replace(models, resolved=on_machine(models.resolved, basis.hardware))
    else:
        models = read_models(elsewhere(resolved, hardware), outlined=True)
        basis = CostBasis(hardware, AcceptanceStats())
    if flags.acceptance is not None:
        basis = replace(basis, known=replace(basis.known, acceptance=flags.acceptance))
    return Explained(models, basis, work, plan_workload(models, request_for(models), basis, progress))


def _read_rates(path: Path) -> Hardware:
    """A machine that any models can be planned for. Raises UserError."""
    hardware = read_machine(path)
    if hardware.missing_rates:
        raise UserError(
            f"{path}: its tasks hold the seconds of one pair of models, for aspec trace --simulate; a plan needs the "
            f"rates of the machine: expected {' and '.join(hardware.missing_rates)} besides, found neither."
        )
    return hardware


# -- what is said --------------------------------------------------------------------------------------------


def lines(explained: Explained) -> Iterator[str]:
    """For people."""
    models, work, best = explained.models, explained.work, explained.search.best
    yield f"{explained.basis.hardware.name or 'this machine'}: {_machine(explained)}"
    layers = models.target.num_layers
    nbytes = sum(part.nbytes for part in models.parts)
    source = "" if has_weights(models.target.folder) else ", from its configuration alone"
    yield f"target: {layers} layers, {format_bytes(nbytes)}{source}"
    prompts = _count(work.num_prompts, "prompt")
    how = ", sampled" if work.sampled else ""
    yield f"work: {prompts} of {_count(work.prompt_tokens, 'token')}, {_count(work.new_tokens, 'new token')} each{how}"
    yield ""
    yield f"the plan: {best.plan.shape}"
    yield from (f"  {line}" for line in placement(best.plan))
    yield f"  predicted: {outlook(best, work)}"
    yield f"  bottleneck: {best.forecast.bottleneck}"
    others = list(runners_up(explained))[:RUNNERS_UP]
    if others:
        yield ""
        yield "behind it"
        width = max(len(words) for words, _ in others)
        yield from (f"  {words:{width}}  {said}" for words, said in others)
    yield ""
    search = explained.search
    yield (
        f"{_count(len(search.found), 'plan')} ran in virtual time, {search.num_pruned} could not have been better, "
        f"{search.num_too_large} do not fit"
    )


def _machine(explained: Explained) -> str:
    hardware, known = explained.basis.hardware, explained.basis.known
    link = hardware.h2d_bytes_per_s
    words = [f"disk {format_rate(hardware.disk_bytes_per_s)}"]
    words += [f"link {format_rate(link)}"] if link else []
    words.append(f"budget {format_bytes(explained.models.resolved.budget_bytes)}")
    if explained.models.draft is not None:
        said = "measured" if known.proposals else "a guess, which aspec bench mends"
        words.append(f"acceptance {known.acceptance:.2f} ({said})")
    return ", ".join(words)


def placement(plan: Plan) -> Iterator[str]:
    """Where the weights are, and what is held."""
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


def outlook(found: Candidate, work: Workload) -> str:
    """What is predicted."""
    forecast = found.forecast
    words = [f"{forecast.tokens_per_s:.4g} tokens/s", f"{forecast.tokens_per_pass:.2f} tokens of a row per pass"]
    prompts = min(work.num_prompts, found.plan.num_rows)
    words.append(f"{_time(forecast.prefill_s)} to prefill {prompts}")
    return ", ".join([*words, f"{_time(forecast.job_s)} in all"])


def _count(number: int, word: str) -> str:
    return f"{number} {word}" + "s" * (number != 1)


def _time(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def runners_up(explained: Explained) -> Iterator[tuple[str, str]]:
    """Plans of other shapes, and what is said of them: those that ran, then those that could not have been better."""
    search = explained.search
    seen = {_kind(search.best.plan)}
    for found in search.found:
        if _kind(found.plan) not in seen:
            seen.add(_kind(found.plan))
            yield found.plan.shape, f"{outlook(found, explained.work)}; {found.forecast.bottleneck}"
    for least_s, plan in search.pruned:
        if _kind(plan) not in seen:
            seen.add(_kind(plan))
            yield plan.shape, f"at least {_time(least_s)} in all, not run"


def _kind(plan: Plan) -> tuple[object, ...]:
    """What tells plans apart but for slots and caps."""
    return plan.num_rows, plan.num_groups, plan.speculation, plan.max_draft_tokens > 0, plan.attention_resource


def as_object(explained: Explained) -> dict[str, Any]:
    """The JSON object; bytes, seconds."""
    search = explained.search
    return {
        "work": asdict(explained.work),
        "hardware": explained.basis.hardware.as_object(),
        "acceptance": explained.basis.known.acceptance,
        "budget_bytes": explained.models.resolved.budget_bytes,
        "target_bytes": sum(part.nbytes for part in explained.models.parts),
        "plans": [_plan_object(found.plan) | {"forecast": asdict(found.forecast)} for found in search.found],
        "not_run": [_plan_object(plan) | {"least_s": least_s} for least_s, plan in search.pruned],
        "too_large": search.num_too_large,
        "pruned": search.num_pruned,
    }


def _plan_object(plan: Plan) -> dict[str, Any]:
    return {
        "rows": plan.num_rows,
        "groups": plan.num_groups,
        "speculation": str(plan.speculation) if plan.max_draft_tokens else "off",
        "most_draft_tokens": plan.max_draft_tokens,
        "attention": plan.attention_resource,
        "micro_batches": plan.micro_batches,
        "slots": plan.num_slots,
        "slot_bytes": plan.slot_bytes,
        "streamed_bytes": plan.streamed_bytes,
        "bytes_by_tier": {str(tier): sum(part.nbytes for part in plan.parts if part.tier is tier) for tier in Tier},
        "device_bytes": dict(plan.arithmetic),
        "host_bytes": dict(plan.host_arithmetic),
    }

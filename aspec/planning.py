"""The plan for a known amount of work: the search, fed with this machine's costs and the models' shapes."""

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cache

from aspec.cache import Known, known_acceptance, machine_profile
from aspec.devices import kind_of
from aspec.errors import UnsupportedModelError
from aspec.forecast import Forecaster
from aspec.hardware import Hardware
from aspec.io.sim import Profile
from aspec.model import Model
from aspec.needs import MAX_CHAIN, MAX_TREE, MICRO_BATCHES, NGRAM, Models, folders, is_off
from aspec.options import EngineOptions
from aspec.plan import Plan, Speculation, Workload
from aspec.planner import Wishes
from aspec.prices import prices
from aspec.search import CAPS, GROUPS, SLOTS, Open, Search, rows_for, search
from aspec.shapes import shape_of
from aspec.tasks.task import COMPUTE, CPU

PREFILLS = (256, 128, 64)  # smaller prefill items, where memory is short


@dataclass(frozen=True, slots=True)
class Machine:
    """Where the work is to be done, and how often the pair's proposals are accepted."""

    hardware: Hardware
    known: Known


def this_machine(options: EngineOptions, models: Models) -> Machine:
    """The one at hand, from the cache or measured now, which takes some seconds."""
    target, draft = folders(options)
    hardware = machine_profile(
        target, models.target.dtype, options.threads, kind=kind_of(options.device), link_rate=options.link_rate
    )
    sampled = options.workload is not None and options.workload.sampled
    return Machine(hardware, Known() if draft is None else known_acceptance(target, draft, sampled=sampled))


def plan_workload(
    options: EngineOptions,
    models: Models,
    wishes: Wishes,
    machine: Machine | None = None,
    progress: Callable[[int], None] = lambda _: None,
) -> Search:
    """Search what the options leave open. Raises BudgetError where nothing fits."""
    work = options.workload
    assert work is not None, "without a workload there is nothing to search for"
    machine = machine or this_machine(options, models)
    forecaster = forecast_for(options, models, wishes, machine, work)
    left_open = left_open_by(options, models, machine.hardware, work)
    return search(wishes, left_open, models.needs, forecaster.least_s, forecaster, progress)


def forecast_for(
    options: EngineOptions, models: Models, wishes: Wishes, machine: Machine, work: Workload
) -> Forecaster:
    """What runs a plan in virtual time, on what the work costs on the machine under that plan."""
    target, draft = shape_of(models.target), None if models.draft is None else shape_of(models.draft)

    @cache
    def priced(tree: bool, cpu_attention: bool) -> Profile:
        return prices(
            target,
            draft,
            machine.hardware,
            exact=wishes.exact,
            sampled=work.sampled,
            tree=tree,
            cpu_attention=cpu_attention,
            acceptance=machine.known.acceptance,
            spread=machine.known.spread,
        )

    def profile_of(plan: Plan) -> Profile:
        return priced(plan.proposes_trees, plan.attention_resource == CPU)

    return Forecaster(profile_of, work)


def left_open_by(options: EngineOptions, models: Models, hardware: Hardware, work: Workload) -> Open:
    """What nobody has fixed."""
    rows = rows_for(work.num_prompts) if options.max_batch is None else (min(options.max_batch, work.num_prompts),)
    both = hardware.h2d_bytes_per_s is not None and _attends_apart(models.target)
    places = {"device": (COMPUTE,), "cpu": (CPU,), "auto": (COMPUTE, CPU) if both else (COMPUTE,)}
    return Open(
        rows=rows,
        groups=GROUPS if options.num_groups is None else (options.num_groups,),
        speculations=_speculations(options, models),
        attention=places[options.attention],
        micro_batches=MICRO_BATCHES,
        caps=CAPS if options.num_draft_tokens is None else (),
        slots=SLOTS,
        prefills=PREFILLS if options.prefill_tokens is None else (),
    )


def _attends_apart(model: Model) -> bool:
    """Whether its layers can attend beside KV in host memory."""
    with suppress(UnsupportedModelError):
        return bool(model.offload.kept)
    return False


def _speculations(options: EngineOptions, models: Models) -> tuple[tuple[Speculation | None, int], ...]:
    fixed = options.num_draft_tokens
    chain = Speculation.CHAIN, MAX_CHAIN if fixed is None else fixed
    tree = Speculation.TREE, MAX_TREE if fixed is None else fixed
    if is_off(options) or (models.draft is None and options.draft != NGRAM):
        return ((None, 0),)
    off: tuple[tuple[Speculation | None, int], ...] = ((None, 0),) if fixed is None else ()  # a number is a wish
    if options.draft == NGRAM:
        return (*off, tree)  # a lookup's chain is a tree of one branch
    if options.speculation == "auto":
        return (*off, chain, tree)
    return (chain,) if options.speculation == "chain" else (tree,)


def on_machine(wishes: Wishes, hardware: Hardware, host_bytes: int | None) -> Wishes:
    """The wishes for a device behind a link, where the machine is one."""
    if hardware.h2d_bytes_per_s is None:
        return replace(wishes, host_bytes=None)
    return replace(wishes, host_bytes=hardware.host_memory if host_bytes is None else host_bytes)

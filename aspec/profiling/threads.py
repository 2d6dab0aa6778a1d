"""How many compute threads serve which kind of work: measured costs decide, with one thread and with one per core.

The last bits of a product differ between numbers of threads. So the numbers depend on the machine, the models and
``exact`` alone, never on memory, prompts or proposals; and in exact mode one number serves all work of the target.
"""

import time
from collections.abc import Mapping, Sequence
from functools import cache
from math import prod

import torch

from aspec.profiling.cost_tables import CostTable, ModelCost
from aspec.profiling.hardware import Hardware
from aspec.profiling.model_shape import ModelShape
from aspec.profiling.roofline import prices
from aspec.tasks.task import WorkItem
from aspec.threads import Threads, asked_threads, num_cores

GAIN = 0.85  # a thread per core is taken where it needs at most this share of one thread's seconds
CONTEXT = 256  # keys before the tokens of a pass
ROW, VERIFIED, PROMPT = 1, 16, 256  # tokens of the passes that are compared: one row, its proposals, a prompt
PAUSES, PAUSE_S, BUSY_SHARE = 8, 2e-3, 0.25  # of the probe of waiting threads
PROBE_ENTRIES = 1 << 20  # of a tensor whose sum takes all threads


def thread_counts(given: int | None, *, on_device: bool = False) -> tuple[int, ...]:
    """The numbers of threads to compare, ascending; a single one if the user or the process has settled it.

    Threads that wait in a loop leave a core to the disk threads and the event loop.
    """
    asked, cores = asked_threads(given), num_cores()
    if asked is not None:
        return (asked,)
    if on_device or cores == 1 or idle_threads_loop():
        return (max(1, cores - 1),)
    return 1, cores


@cache
def idle_threads_loop() -> bool:
    """Whether idle compute threads keep their cores busy in this process: measured once, in about 20 ms.

    That depends on variables which the runtime has read long ago, and on the runtime.
    """
    before, entries = torch.get_num_threads(), torch.ones(PROBE_ENTRIES)
    torch.set_num_threads(max(2, num_cores()))
    try:
        busy_s = sorted(_busy_s(entries) for _ in range(PAUSES))
        return busy_s[-2] > BUSY_SHARE * PAUSE_S  # beside other work a looping thread often gets no core
    finally:
        torch.set_num_threads(before)


def _busy_s(entries: torch.Tensor) -> float:
    """Seconds that the process computes while this thread sleeps, right after all its threads had work."""
    entries.sum()
    start_s = time.process_time()
    time.sleep(PAUSE_S)
    return time.process_time() - start_s


def choose_threads(
    machines: Mapping[int, Hardware], target: ModelShape, draft: ModelShape | None, *, exact: bool
) -> Threads:
    """The number of threads for each kind of work; ``machines``: this machine, measured with each number."""
    if len(machines) == 1:
        return Threads.all(*machines)
    tables = {number: _table(target, draft, machine, exact=exact) for number, machine in machines.items()}
    target_costs = {number: table.target for number, table in tables.items()}
    small = {number: table.draft for number, table in tables.items() if table.draft is not None}
    if exact:
        decode = prefill = fastest(target_costs, (ROW, VERIFIED, PROMPT))
    else:
        decode, prefill = fastest(target_costs, (ROW, VERIFIED)), fastest(target_costs, (PROMPT,))
    return Threads(decode, prefill, fastest(small, (ROW,)) if small else decode, max(machines))


def fastest(costs: Mapping[int, ModelCost], passes: Sequence[int]) -> int:
    """The number of threads whose passes of so many tokens take the least share of the seconds of the least number."""
    least = min(costs)
    base_s = [_pass_s(costs[least], tokens) for tokens in passes]
    shares = {
        number: prod(_pass_s(cost, tokens) / own for tokens, own in zip(passes, base_s, strict=True))
        ** (1 / len(passes))
        for number, cost in costs.items()
    }
    best = min(shares, key=lambda number: shares[number])
    return best if shares[best] <= GAIN else least


def _table(target: ModelShape, draft: ModelShape | None, machine: Hardware, *, exact: bool) -> CostTable:
    table = prices(target, draft, machine, exact=exact).cost_table
    assert table is not None
    return table


def _pass_s(cost: ModelCost, tokens: int) -> float:
    item = WorkItem(0, (0,), (CONTEXT,), (tokens,))
    return cost.layer_seconds(item) + cost.head_seconds(min(tokens, VERIFIED), 0)

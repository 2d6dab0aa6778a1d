"""What a task costs the loop: the scheduler's own share, and scheduler, graph, executor and simulated machine together.

    python tools/bench_scheduler.py --rows 64

A job is served in virtual time, so that nothing but Python runs; the best of a few runs counts.
"""

import argparse
import sys
import time
from collections.abc import Sequence

from aspec.plan import Plan, PlannedPart, PlanRequest, Speculation
from aspec.planning.sim_backend import HOST_RESOURCES, SimBackend, SimCosts
from aspec.planning.virtual_time import VirtualTimeLoop
from aspec.tasks.executor import Executor
from aspec.tasks.scheduler import Scheduler
from aspec.tasks.task import Event, RequestAdded, Shutdown, Task

LAYERS, PARTS, SLOTS, PART_BYTES = 22, 4, 9, 20_000_000  # as a 2 GB checkpoint under 512 MiB


class Timed:
    """The scheduler, and the seconds it takes."""

    def __init__(self, scheduler: Scheduler) -> None:
        self.scheduler, self.seconds, self.tasks = scheduler, 0.0, 0

    @property
    def done(self) -> bool:
        """As the scheduler says."""
        return self.scheduler.done

    @property
    def idle(self) -> bool:
        """As the scheduler says."""
        return self.scheduler.idle

    def handle(self, events: Sequence[Event]) -> list[Task]:
        """As the scheduler answers."""
        start = time.perf_counter()
        tasks = self.scheduler.handle(events)
        self.seconds += time.perf_counter() - start
        self.tasks += len(tasks)
        return tasks


def run(rows: int, groups: int, speculation: Speculation, most: int, tokens: int) -> tuple[float, float, int]:
    """Seconds per task of the scheduler and of everything, and how many tasks there were."""
    parts = tuple(PlannedPart(i, i // PARTS, PART_BYTES, PART_BYTES) for i in range(LAYERS * PARTS))
    shape = PlanRequest(num_rows=rows, num_groups=groups, speculation=speculation, max_draft_tokens=most)
    policy = Timed(Scheduler(Plan(parts, LAYERS, SLOTS, PART_BYTES, shape)))

    async def main() -> None:
        backend = SimBackend(SimCosts(disk_bytes_per_s=1e9, layer_s=0.02, layer_token_s=1e-4), HOST_RESOURCES)
        executor = Executor(policy, backend)
        for sequence in range(rows):
            executor.post(RequestAdded(sequence, 40, tokens))
        executor.post(Shutdown())
        await executor.run()
        await backend.close()

    loop = VirtualTimeLoop()
    start = time.perf_counter()
    loop.run_until_complete(main())
    seconds = time.perf_counter() - start
    loop.close()
    return policy.seconds / policy.tasks, seconds / policy.tasks, policy.tasks


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    cases = {
        "no speculation": (Speculation.CHAIN, 0),
        "chains": (Speculation.CHAIN, 8),
        "trees": (Speculation.TREE, 32),
    }
    print(f"{options.rows} sequences of {options.tokens} tokens; us per task")
    for name, (speculation, most) in cases.items():
        for groups in (1, 2):
            runs = [run(options.rows, groups, speculation, most, options.tokens) for _ in range(options.repeats)]
            own, whole, tasks = min(runs)
            print(
                f"{name:16} {groups} groups: scheduler {1e6 * own:6.1f}, with graph and executor {1e6 * whole:6.1f}, "
                f"{tasks} tasks"
            )
    return 0


if __name__ == "__main__":
    sys.exit(main())

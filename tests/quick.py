"""What commands measure beside their work, in tests they measure for a moment: no test needs it to be exact.

For this process and for those of the fork server. Both freeze what they have imported, once and for all, so an engine
that opens does not: to ask whether anything is frozen takes as long as a collection.
"""

import fcntl
import os
import pickle
from pathlib import Path

from aspec.cli import bench, generate
from aspec.engine import engine
from aspec.profiling import ceilings, cpu_profiler, device_profiler, layer_ratios, profile_cache, stopwatch

SHARED = "ASPEC_TESTS_SHARED"
"""Environment variable: a folder of all processes of a run of tests."""


def processor(dtype, threads, measure=cpu_profiler.measure_processor):
    """What ``measure_processor`` has found in this run of tests: one process measures, the others wait and read."""
    file = Path(os.environ[SHARED]) / f"{dtype}-{threads}"
    with open(file, "ab+") as kept:
        fcntl.flock(kept, fcntl.LOCK_EX)
        kept.seek(0)
        if not (known := kept.read()):
            known = pickle.dumps(measure(dtype, threads))
            kept.write(known)
    return pickle.loads(known)


SHORT = [
    (generate, "PROBE_S", 0.02),
    (bench, "PROBE_S", 0.02),
    (layer_ratios, "ROUNDS", 1),
    (ceilings, "SHORTEST_S", 1e-3),
    (ceilings, "COPY_BYTES", 8 << 20),
    (ceilings, "MATMUL_SIZE", 256),
    (cpu_profiler, "ROUNDS", 1),
    (cpu_profiler, "ROWS", (1, 16, 64)),
    (cpu_profiler, "ARENA_BYTES", 16 << 20),
    (cpu_profiler, "READ_S", 0.02),
    (profile_cache, "measure_processor", processor),
    (stopwatch.seconds_of, "__defaults__", (2, 5e-4)),
    (stopwatch, "COLD_CALLS", 2),
    (device_profiler, "ROWS", (1, 8, 64)),  # a card's sizes take a processor minutes
    (device_profiler, "MATRIX_BYTES", 1 << 20),
    (device_profiler, "REPEATS", 1),
    (device_profiler, "CALLS", 2),
    (device_profiler, "LINK_S", 0.01),
    (engine, "freeze", lambda: lambda: None),
]
"""Where, what, and its value in tests."""

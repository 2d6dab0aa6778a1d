"""The best rate of a plan's links at this moment, with which its weight stream is compared."""

from aspec.backends.device import copy_rate
from aspec.engine.allocate import EngineMemory
from aspec.io.disk_probe import probe_rate
from aspec.plan import Tier

MOST_EXPERTS = 256  # whose bytes are read, where only experts are


def raw_link_rate(assembly: EngineMemory, seconds: float, limit_bytes_per_s: float | None = None) -> float | None:
    """The best rate of the weight stream, bytes per second, over the slower of disk and link; None if nothing streams.

    Reads the streamed parts in the way of the disk lane, and copies the same buffers as the device's lane. Blocks for
    ``seconds`` per link; no task may run meanwhile.
    """
    plan, experts = assembly.plan, assembly.experts
    if not plan.streamed and plan.experts is not None and experts is not None:
        shape = plan.experts.shape
        some = [(layer, expert) for layer in shape.layers for expert in range(shape.num_experts[layer])][:MOST_EXPERTS]
        read_first = [segment for layer, expert in some for segment in experts.part(layer, expert).segments]
        return probe_rate(read_first, seconds, rate_bytes_per_s=limit_bytes_per_s)
    if not plan.streamed:
        return None
    read = [planned for planned in plan.streamed if assembly.device is None or planned.tier is Tier.DISK]
    segments = [segment for planned in read for segment in assembly.parts[planned.index].segments]
    pass_s = 0.0
    if segments:
        rate = probe_rate(segments, seconds, rate_bytes_per_s=limit_bytes_per_s)
        pass_s = sum(planned.nbytes for planned in read) / rate
    if assembly.device is not None:
        pass_s = max(pass_s, plan.streamed_bytes / copy_rate(assembly.device, assembly.buffers, seconds))
    return plan.streamed_bytes / pass_s

"""The cache of measurements between runs: machines, disks, acceptance of a pair of models.

Each machine, disk or pair has one small JSON file, which is replaced as a whole: other processes read either the old or
the new file. An unreadable file counts as missing. If a file cannot be written, the next run measures again.
"""

import contextlib
import hashlib
import math
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from aspec.backends.registry import Kind
from aspec.errors import UserError
from aspec.io.host_info import HostInfo, host_info
from aspec.io.hub import known_as
from aspec.io.json_file import read_record, replace_json
from aspec.models.formats.packed import PackedWeight
from aspec.models.model import Model
from aspec.options import MEASURE, Progress, cache_folder
from aspec.profiling.cpu_profiler import measure_disk, measure_processor, measure_read_contention, memory_bytes
from aspec.profiling.decode_profiler import INT4_ROWS, int4_sizes, measure_decoding, measure_int4, measured_weights
from aspec.profiling.device_profiler import measure_device
from aspec.profiling.hardware import Hardware, Table, hardware_from
from aspec.profiling.roofline import ACCEPTANCE, SPREAD
from aspec.profiling.threads import idle_threads_loop

VERSION = 6  # of machine files: their format, and what they measure
DISK_AGE_S = 3600.0  # a disk is measured again after this time: the rates of shared disks change
MOST_DOUBT = 1.5  # times; a kept price of decoding that is further from what a run took is not believed
LEAST_DOUBT_S = 1.0  # of decoding in a run, from which on it says more than a measurement
MAX_EVIDENCE = 2000.0  # largest weight of earlier runs beside the latest run, in proposals


@dataclass(frozen=True, slots=True)
class AcceptanceStats:
    """How often the target of a pair accepted proposals, and the number of proposals seen; 0: a default guess."""

    acceptance: float = ACCEPTANCE
    spread: float = SPREAD
    proposals: float = 0.0


def machine_profile(
    folder: Path,
    dtype: torch.dtype,
    threads: int,
    *,
    kind: Kind | None = None,
    link_rate: float | None = None,
    refresh: bool = False,
    cache: Path | None = None,
    tell: Progress | None = None,
) -> Hardware:
    """This machine, with the disk that holds ``folder``: from the cache, or measured now, which takes some seconds.

    ``threads``: compute threads. ``kind``: the device that runs the layers. ``link_rate``: limit on the disk lane in
    bytes per second. ``tell`` is told MEASURE before the machine is measured. Blocking: call it in a thread.
    """
    cache = cache or cache_folder()
    machine = replace(host_info(), threads=threads)
    if kind is not None:
        machine = replace(machine, cpu=f"{kind.name()} beside {machine.cpu}")
    hardware = None if refresh else _known_machine(cache, machine, dtype)
    if hardware is None:
        if tell is not None:
            tell(MEASURE, 0, 0)
        hardware = _measure(machine, dtype, folder)
        if kind is not None:
            hardware = _measure_device(kind, dtype, hardware)
        replace_json(_machine_file(cache, machine, dtype), {"hardware": hardware.as_object()})
    rate = disk_rate(folder, refresh=refresh, cache=cache)
    rate = hardware.disk_bytes_per_s if rate is None else rate
    return replace(hardware, disk_bytes_per_s=rate if link_rate is None else min(rate, link_rate))


def disk_rate(folder: Path, *, refresh: bool = False, cache: Path | None = None) -> float | None:
    """Bytes per second of a model's disk, measured within the last hour or now; None if its files are too small."""
    file = (cache or cache_folder()) / f"disk-{known_as(folder).stat().st_dev:x}.json"
    if not refresh:
        found = read_record(file)
        age_s = time.time() - _number(found, "measured_at", 0.0)
        if 0.0 <= age_s < DISK_AGE_S and (rate := _number(found, "bytes_per_s", 0.0)) > 0.0:
            return rate
    measured = measure_disk(folder)
    if measured is not None:
        replace_json(file, {"bytes_per_s": measured, "measured_at": time.time()})
    return measured


def decoding_profile(
    model: Model, threads: int = 1, *, refresh: bool = False, cache: Path | None = None
) -> Mapping[str, float]:
    """Seconds of one thread per decoded weight, by method of a checkpoint: from the cache, or measured now.

    ``threads``: that decode at the same time.
    """
    found: dict[str, float] = {}
    for method, weight in measured_weights(model).items():
        file = _decode_file(cache or cache_folder(), model, method, weight, threads)
        known = 0.0 if refresh else _number(read_record(file), "weight_s", 0.0)
        if known <= 0.0:
            known = measure_decoding(weight, model.dtype, threads)
            replace_json(file, {"weight_s": known, "method": method, "shape": list(weight.shape), "threads": threads})
        found[method] = known
    return found


def int4_profile(
    model: Model, threads: int, *, exact: bool, refresh: bool = False, cache: Path | None = None
) -> Mapping[str, Table]:
    """Seconds per weight of products with weights of 4 bits, by dtype and rows; empty if the model has none."""
    sizes = int4_sizes(model)
    if sizes is None:
        return {}
    words = (*asdict(host_info()).values(), *asdict(sizes).values(), torch.__version__, threads, exact)
    file = (cache or cache_folder()) / f"int4-{_digest(*words)}.json"
    found = {} if refresh else read_record(file)
    known = tuple((rows, _number(found, str(rows), 0.0)) for rows in INT4_ROWS)
    if min(seconds for _, seconds in known) <= 0.0:
        known = measure_int4(sizes, threads, exact=exact)
        replace_json(file, {str(rows): seconds for rows, seconds in known})
    return {"bfloat16": known}


def doubt_decoding(
    model: Model, threads: int, made: Mapping[int, tuple[int, float]], *, cache: Path | None = None
) -> None:
    """Drop the kept prices of ``decoding_profile`` that a whole run contradicts, so that the next one measures anew.

    ``made``: by layer, the bytes that the run has decoded, and the seconds of one thread for them.
    """
    weights = measured_weights(model).items()
    files = {method: _decode_file(cache or cache_folder(), model, method, own, threads) for method, own in weights}
    prices = {method: _number(read_record(file), "weight_s", 0.0) for method, file in files.items()}
    expected_s = found_s = 0.0
    for layer, (nbytes, seconds) in made.items():
        counts = [(weight.method, math.prod(weight.shape)) for weight in model.packed.get(layer, ())]
        if counts and all(prices.get(method, 0.0) > 0.0 for method, _ in counts):
            weight_s = sum(prices[method] * count for method, count in counts) / sum(count for _, count in counts)
            expected_s += nbytes / model.dtype.itemsize * weight_s
            found_s += seconds
    if found_s < LEAST_DOUBT_S or 1 / MOST_DOUBT <= expected_s / found_s <= MOST_DOUBT:
        return
    for file in files.values():
        with contextlib.suppress(OSError):  # then the next run plans with the same price
            file.unlink()


def known_acceptance(target: Path, draft: Path, *, sampled: bool = False, cache: Path | None = None) -> AcceptanceStats:
    """The statistics of earlier runs of a pair; the default guess if there were none."""
    found = read_record(_pair_file(cache or cache_folder(), target, draft, sampled))
    values = [_number(found, name, -1.0) for name in ("acceptance", "spread", "proposals")]
    if min(values) < 0.0 or max(values[:2]) > 1.0:
        return AcceptanceStats()
    return AcceptanceStats(*values)


def remember_acceptance(
    target: Path,
    draft: Path,
    acceptance: float,
    spread: float = SPREAD,
    *,
    proposals: float,
    sampled: bool = False,
    cache: Path | None = None,
) -> AcceptanceStats:
    """Merge a run's result into the statistics, weighted by its number of ``proposals``; return the statistics."""
    cache = cache or cache_folder()
    before = known_acceptance(target, draft, sampled=sampled, cache=cache)
    if proposals <= 0:
        return before
    earlier = min(before.proposals, MAX_EVIDENCE)
    share = proposals / (earlier + proposals)
    known = AcceptanceStats(
        acceptance=before.acceptance + share * (acceptance - before.acceptance),
        spread=before.spread + share * (spread - before.spread),
        proposals=earlier + proposals,
    )
    names = {"target": str(known_as(target).resolve()), "draft": str(known_as(draft).resolve()), "sampled": sampled}
    replace_json(_pair_file(cache, target, draft, sampled), {**asdict(known), **names})
    return known


# -- measurements and files ----------------------------------------------------------------------------------


def _measure(machine: HostInfo, dtype: torch.dtype, folder: Path) -> Hardware:
    measured = Hardware(
        name=machine.cpu,
        host_memory=memory_bytes(),
        threads=machine.threads,
        cpu=measure_processor(dtype, machine.threads),
    )
    contention = measure_read_contention(folder, dtype, machine.threads)
    return measured if contention is None else replace(measured, read_contention=contention)


def _measure_device(kind: Kind, dtype: torch.dtype, host: Hardware) -> Hardware:
    device = kind.open()
    try:
        return measure_device(device, dtype, host, kind.free_bytes())
    finally:
        device.free()


def _known_machine(cache: Path, machine: HostInfo, dtype: torch.dtype) -> Hardware | None:
    file = _machine_file(cache, machine, dtype)
    with contextlib.suppress(UserError):
        return hardware_from(read_record(file).get("hardware"), str(file))
    return None


def _machine_file(cache: Path, machine: HostInfo, dtype: torch.dtype) -> Path:
    loops = machine.threads > 1 and idle_threads_loop()  # the same product then takes other seconds
    return cache / f"machine-{_digest(*asdict(machine).values(), loops, dtype, VERSION)}.json"


def _decode_file(cache: Path, model: Model, method: str, weight: PackedWeight, threads: int) -> Path:
    words = (*asdict(host_info()).values(), method, weight.shape, model.dtype, torch.__version__, threads)
    return cache / f"decode-{_digest(*words)}.json"


def _pair_file(cache: Path, target: Path, draft: Path, sampled: bool) -> Path:
    return cache / f"pair-{_digest(known_as(target).resolve(), known_as(draft).resolve(), sampled)}.json"


def _digest(*words: object) -> str:
    return hashlib.sha256("\n".join(map(str, words)).encode()).hexdigest()[:16]


def _number(values: Mapping[str, Any], name: str, missing: float) -> float:
    value = values.get(name)
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < float("inf")
    return float(value) if is_number else missing  # type: ignore[arg-type]  # a number

"""A machine as a record: its links, processors and memories. It is read from JSON and written to JSON.

For hardware that is not at hand, a file written by hand needs few fields: the rates of the links, operations per second
and memory bytes per second. Measured tables of products and of attention predict better, and are used if present. For
simulations of one pair of models, ``tasks`` may hold the seconds of their tasks instead of such rates.
"""

import reprlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

from aspec.errors import UserError
from aspec.io.json_file import read_json
from aspec.units import parse_bytes

Table = tuple[tuple[int, float], ...]
"""(rows, seconds), in ascending order of rows."""

Record = TypeVar("Record")

DTYPES = ("bfloat16", "float32")
SOFTMAX_PASSES = 8  # of attention over its fp32 scores: scale, mask, softmax, cast


class _FieldError(Exception):
    """A value that a field does not take. It becomes a UserError with the file's name."""


def _number(value: object, name: str, *, zero: bool) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < float("inf"):
        raise _FieldError(f"{name} must be a number {'from 0 up' if zero else 'above 0'}, found {reprlib.repr(value)}")
    if value == 0 and not zero:
        raise _FieldError(f"{name} must be above 0: a rate of 0 never moves a byte")
    return float(value)


def _rate(value: object, name: str) -> float:
    return _number(value, name, zero=False)


def _seconds(value: object, name: str) -> float:
    return _number(value, name, zero=True)


def _size(value: object, name: str) -> int:
    """Bytes, from a number or a text such as '8GiB'."""
    if isinstance(value, str):
        try:
            return parse_bytes(value)
        except ValueError as error:
            raise _FieldError(f"{name}: {error}") from error
    return int(_number(value, name, zero=True))


def _count(value: object, name: str) -> int:
    return int(_number(value, name, zero=True))


def _share(value: object, name: str) -> float:
    share = _number(value, name, zero=True)
    if share > 1:
        raise _FieldError(f"{name} must be a number from 0 to 1, found {value!r}")
    return share


def _text(value: object, name: str) -> str:
    if not isinstance(value, str):
        raise _FieldError(f"{name} must be a text, found {reprlib.repr(value)}")
    return value


def _by_dtype(value: object, name: str) -> Mapping[str, float]:
    return MappingProxyType({key: _rate(own, f"{name}.{key}") for key, own in _entries(value, name)})


def _by_method(value: object, name: str) -> Mapping[str, float]:
    """Seconds of decoding one weight, by method such as "GPTQ, 4 bits, groups of 128"."""
    if not isinstance(value, dict):
        raise _FieldError(f"{name} must be an object of methods and seconds, found {reprlib.repr(value)}")
    return MappingProxyType({str(key): _seconds(own, f"{name}.{key}") for key, own in value.items()})


def _tables(value: object, name: str) -> Mapping[str, Table]:
    return MappingProxyType({key: _table(own, f"{name}.{key}") for key, own in _entries(value, name)})


def _entries(value: object, name: str) -> list[tuple[str, Any]]:
    if not isinstance(value, dict) or not value.keys() <= set(DTYPES):
        raise _FieldError(f"{name} must be an object with some of {', '.join(DTYPES)}, found {reprlib.repr(value)}")
    return list(value.items())


def _table(value: object, name: str) -> Table:
    if not isinstance(value, dict) or not value or not all(key.isdigit() and int(key) for key in value):
        raise _FieldError(f"{name} must be an object of row counts and seconds, found {reprlib.repr(value)}")
    return tuple(sorted((int(key), _rate(own, f"{name}.{key}")) for key, own in value.items()))


def _attention(value: object, name: str) -> "AttentionRates":
    return _record(AttentionRates, value, name)


def _processor(value: object, name: str) -> "Processor":
    return _record(Processor, value, name)


def _tasks(value: object, name: str) -> "TaskSeconds":
    return _record(TaskSeconds, value, name)


Reader = Mapping[str, Callable[[object, str], object]]
"""Metadata of a field: the function that reads it. If the default is None, null is accepted too."""

RATE: Reader = {"kind": _rate}
SECONDS: Reader = {"kind": _seconds}
SIZE: Reader = {"kind": _size}
COUNT: Reader = {"kind": _count}
SHARE: Reader = {"kind": _share}
BY_DTYPE: Reader = {"kind": _by_dtype}
TABLES: Reader = {"kind": _tables}


def _nothing() -> Mapping[str, Any]:
    return MappingProxyType({})


@dataclass(frozen=True, slots=True)
class AttentionRates:
    """Seconds of attention in one layer for one item."""

    call_s: float = field(default=0.0, metadata=SECONDS)
    row_s: float = field(default=0.0, metadata=SECONDS)
    kv_byte_s: float = field(default=0.0, metadata=SECONDS)  # per byte of a row's keys and values
    score_s: float = field(default=0.0, metadata=SECONDS)  # per query token, key and head
    width_s: float = field(default=0.0, metadata=SECONDS)  # further seconds, per element of a head's width
    own_score_s: float = field(default=0.0, metadata=SECONDS)  # per query token of a tree, key of its path and KV head


@dataclass(frozen=True, slots=True)
class Processor:
    """A CPU or a device. Tables hold seconds per byte of weights by the rows of a product."""

    flop_per_s: Mapping[str, float] = field(default_factory=_nothing, metadata=BY_DTYPE)  # by dtype; empty: 1e11
    memory_bytes_per_s: float = field(default=20e9, metadata=RATE)
    copy_bytes_per_s: float | None = field(default=None, metadata=RATE)  # None: half of memory_bytes_per_s
    cache_bytes: int = field(default=0, metadata=SIZE)  # weights that stay in a cache between passes
    last_cache_bytes: int = field(default=0, metadata=SIZE)  # a model that fits leaves the interpreter's data there
    task_s: float = field(default=3e-5, metadata=SECONDS)  # fixed seconds of every task
    handover_s: float = field(default=0.0, metadata=SECONDS)  # of the loop, from a task's end to what waits for it
    layer_s: float = field(default=3e-4, metadata=SECONDS)  # fixed seconds of a layer: the interpreter
    exact_layer_s: float | None = field(default=None, metadata=SECONDS)  # None: as layer_s
    routed_s: float = field(default=0.0, metadata=SECONDS)  # beside layer_s, if a layer's experts are read on demand
    experts_s: float = field(default=0.0, metadata=SECONDS)  # fixed seconds of computing some of them
    expert_s: float = field(default=0.0, metadata=SECONDS)  # of each expert, beside its products
    product_s: float = field(default=5e-6, metadata=SECONDS)  # fixed seconds of a product
    element_s: float | None = field(default=None, metadata=SECONDS)  # elementwise work per output of a layer's products
    cached_share: float = field(default=1.0, metadata=SECONDS)  # factor on overheads, if the last cache holds the model
    frame_s: float = field(default=1e-4, metadata=SECONDS)  # before the first layer, and again after the last one
    frame_layer_s: float = field(default=1e-5, metadata=SECONDS)  # further seconds of both, per layer of the model
    mask_pair_s: float = field(default=0.0, metadata=SECONDS)  # per query token and key
    greedy_s: float | None = field(default=None, metadata=SECONDS)  # per vocabulary entry of a greedy draw
    sampled_s: float | None = field(default=None, metadata=SECONDS)  # per vocabulary entry of a draw with noise
    offer_s: float | None = field(default=None, metadata=SECONDS)  # per vocabulary entry of a node, for its children
    sampled_offer_s: float | None = field(default=None, metadata=SECONDS)
    accept_row_s: float = field(default=3e-5, metadata=SECONDS)
    gather_s: float = field(default=2e-5, metadata=SECONDS)  # moving a tree's accepted path, per layer and row
    node_s: float = field(default=5e-5, metadata=SECONDS)  # per node of a tree whose children are offered
    tree_row_s: float = field(default=5e-4, metadata=SECONDS)  # per row's tree, in every pass that verifies it
    weight_s: Mapping[str, Table] = field(default_factory=_nothing, metadata=TABLES)
    exact_weight_s: Mapping[str, Table] = field(default_factory=_nothing, metadata=TABLES)  # in exact steps
    cached_weight_s: Mapping[str, Table] = field(default_factory=_nothing, metadata=TABLES)  # weights in a cache
    decode_weight_s: Mapping[str, float] = field(default_factory=_nothing, metadata={"kind": _by_method})
    int4_weight_s: Mapping[str, Table] = field(default_factory=_nothing, metadata=TABLES)  # per weight of 4 bits
    exact_int4_weight_s: Mapping[str, Table] = field(default_factory=_nothing, metadata=TABLES)  # in exact steps
    attention: AttentionRates | None = field(default=None, metadata={"kind": _attention})
    exact_attention: AttentionRates | None = field(default=None, metadata={"kind": _attention})

    def flops(self, dtype: str) -> float:
        """Floating-point operations per second. Unknown: float32 has half of bfloat16's, bfloat16 has float32's."""
        known = self.flop_per_s or {"bfloat16": 1e11}
        halved = 0.5 if dtype == "float32" and dtype not in known else 1.0
        return known.get(dtype) or halved * max(known.values())

    @property
    def copy_rate(self) -> float:
        """Bytes per second of copying inside the processor's memory."""
        return self.copy_bytes_per_s or self.memory_bytes_per_s / 2

    def passes_s(self, elements: float, itemsize: int = 4) -> float:
        """Seconds of moving so many elements through memory; ``itemsize``: bytes of an element."""
        return elements * itemsize / self.memory_bytes_per_s


@dataclass(frozen=True, slots=True)
class TaskSeconds:
    """Seconds of the tasks of one pair of models on a machine, and the chances of their proposals."""

    layer_s: float = field(default=5e-3, metadata=SECONDS)  # one layer, with at most knee_tokens tokens
    layer_token_s: float = field(default=1e-4, metadata=SECONDS)  # further seconds per token above the knee
    knee_tokens: int = field(default=0, metadata=COUNT)  # tokens that add no seconds to a layer
    draft_s: float = field(default=3e-3, metadata=SECONDS)  # one draft step
    draft_token_s: float = field(default=2e-5, metadata=SECONDS)  # further seconds per prompt token
    decode_s: float = field(default=1e-3, metadata=SECONDS)  # decoding one part of a layer, where weights need it
    head_s: float = field(default=2e-3, metadata=SECONDS)
    embed_s: float = field(default=2e-4, metadata=SECONDS)
    accept_s: float = field(default=1e-4, metadata=SECONDS)
    acceptance: float = field(default=0.8, metadata=SHARE)  # chance that a proposal is accepted
    spread: float = field(default=0.25, metadata=SHARE)  # the same of the next best, if those before were not
    end_probability: float = field(default=0.0, metadata=SHARE)  # chance that a committed token ends its sequence
    seed: int = field(default=0, metadata=COUNT)  # of all random decisions


@dataclass(frozen=True, slots=True)
class Hardware:
    """A machine: its links, its CPU and its device."""

    name: str = field(default="a machine", metadata={"kind": _text})
    disk_bytes_per_s: float = field(default=2e9, metadata=RATE)
    h2d_bytes_per_s: float | None = field(default=None, metadata=RATE)  # None: the device is the host's own memory
    d2h_bytes_per_s: float | None = field(default=None, metadata=RATE)  # None: as h2d_bytes_per_s
    device_memory: int | None = field(default=None, metadata=SIZE)  # bytes; None: the host's memory
    host_memory: int | None = field(default=None, metadata=SIZE)  # bytes
    read_contention: float = field(default=1.05, metadata=RATE)  # factor on CPU seconds while the disk reads
    threads: int = field(default=0, metadata=SIZE)  # compute threads of the measurement; 0: not measured
    cpu: Processor = field(default=Processor(), metadata={"kind": _processor})
    device: Processor | None = field(default=None, metadata={"kind": _processor})  # None: the CPU
    tasks: TaskSeconds | None = field(default=None, metadata={"kind": _tasks})  # simulations prefer them to all rates

    def __post_init__(self) -> None:
        if self.h2d_bytes_per_s is not None and self.device is None and self.tasks is None:
            raise UserError(
                "a machine with h2d_bytes_per_s needs a device: an object with flop_per_s and memory_bytes_per_s."
            )

    @property
    def processor(self) -> Processor:
        """The processor that runs the layers."""
        return self.cpu if self.device is None else self.device

    @property
    def missing_rates(self) -> tuple[str, ...]:
        """The fields that pricing needs and that are missing, because the machine has only ``tasks``."""
        name, processor = ("cpu", self.cpu) if self.h2d_bytes_per_s is None else ("device", self.device)
        known = self.tasks is None or processor not in (None, Processor())
        return () if known else (f"{name}.flop_per_s", f"{name}.memory_bytes_per_s")

    def as_object(self) -> dict[str, Any]:
        """The JSON object that ``read_machine`` takes, without the fields that have their defaults."""
        return _object(self)


def read_machine(path: Path) -> Hardware:
    """A machine from a JSON file, or from ``hardware`` in the JSON output of ``bench``, ``profile`` and ``plan``.

    Raises UserError, with a message of one paragraph that names the field.
    """
    values = read_json(path, "a machine profile")
    return hardware_from(values["hardware"] if isinstance(values, dict) and "hardware" in values else values, str(path))


def hardware_from(values: object, source: str) -> Hardware:
    """A machine from a JSON object; ``source`` names its file in errors. Raises UserError."""
    try:
        return _record(Hardware, values, "")
    except _FieldError as error:
        raise UserError(f"{source}: not a machine profile: {error}.") from error
    except UserError as error:
        raise UserError(f"{source}: {error}") from error


def _record(kind: type[Record], values: object, name: str) -> Record:
    known = {f.name: f for f in fields(kind)}  # type: ignore[arg-type]  # a dataclass
    within = f"{name}." if name else ""
    if not isinstance(values, dict) or (not values and not name):
        raise _FieldError(
            f"expected {name or 'a JSON object'} with some of {', '.join(known)}, found {reprlib.repr(values)}"
        )
    unknown = next((key for key in values if key not in known), None)
    if unknown is not None:
        place = " (of tasks)" if not name and unknown in TaskSeconds.__slots__ else ""
        raise _FieldError(f"unknown field {within + str(unknown)!r}{place}, expected some of {', '.join(known)}")
    return kind(
        **{
            key: None
            if value is None and known[key].default is None
            else known[key].metadata["kind"](value, within + key)
            for key, value in values.items()
        }
    )


def _object(record: Any) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for own in fields(record):
        value = getattr(record, own.name)
        if value == own.default or value == {}:
            continue
        if isinstance(value, Mapping):
            value = {key: dict(row) if isinstance(row, tuple) else row for key, row in value.items()}
        values[own.name] = _object(value) if hasattr(value, "__dataclass_fields__") else value
    return values

"""A machine as a record: what its links, its processors and its memories do. JSON both ways, writable by hand.

Only a few fields matter for hardware that is not at hand: rates of the links, operations and memory bytes per second.
What was measured besides, tables of products and of attention, predicts better and is used where it is there. For
simulations of one pair of models, ``tasks`` may hold the seconds that their tasks take, in place of such rates.
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
"""Seconds by rows, ascending."""

Record = TypeVar("Record")

DTYPES = ("bfloat16", "float32")
SOFTMAX_PASSES = 8  # over fp32 scores, of attention: scale, mask, softmax, cast


class _Misfit(Exception):
    """What is wrong with a value, in the words of the field: becomes one paragraph with the file's name."""


def _number(value: object, name: str, *, zero: bool) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < float("inf"):
        raise _Misfit(f"{name} must be a number {'from 0 up' if zero else 'above 0'}, found {reprlib.repr(value)}")
    if value == 0 and not zero:
        raise _Misfit(f"{name} must be above 0: nothing would ever arrive")
    return float(value)


def _rate(value: object, name: str) -> float:
    return _number(value, name, zero=False)


def _seconds(value: object, name: str) -> float:
    return _number(value, name, zero=True)


def _size(value: object, name: str) -> int:
    """Bytes, as a number or as people write them."""
    if isinstance(value, str):
        try:
            return parse_bytes(value)
        except ValueError as error:
            raise _Misfit(f"{name}: {error}") from error
    return int(_number(value, name, zero=True))


def _count(value: object, name: str) -> int:
    return int(_number(value, name, zero=True))


def _share(value: object, name: str) -> float:
    share = _number(value, name, zero=True)
    if share > 1:
        raise _Misfit(f"{name} must be a number from 0 to 1, found {value!r}")
    return share


def _text(value: object, name: str) -> str:
    if not isinstance(value, str):
        raise _Misfit(f"{name} must be a text, found {reprlib.repr(value)}")
    return value


def _by_dtype(value: object, name: str) -> Mapping[str, float]:
    return MappingProxyType({key: _rate(own, f"{name}.{key}") for key, own in _entries(value, name)})


def _tables(value: object, name: str) -> Mapping[str, Table]:
    return MappingProxyType({key: _table(own, f"{name}.{key}") for key, own in _entries(value, name)})


def _entries(value: object, name: str) -> list[tuple[str, Any]]:
    if not isinstance(value, dict) or not value.keys() <= set(DTYPES):
        raise _Misfit(f"{name} must be an object with some of {', '.join(DTYPES)}, found {reprlib.repr(value)}")
    return list(value.items())


def _table(value: object, name: str) -> Table:
    if not isinstance(value, dict) or not value or not all(key.isdigit() and int(key) for key in value):
        raise _Misfit(f"{name} must be an object of row counts and seconds, found {reprlib.repr(value)}")
    return tuple(sorted((int(key), _rate(own, f"{name}.{key}")) for key, own in value.items()))


def _attention(value: object, name: str) -> "AttentionRates":
    return _record(AttentionRates, value, name)


def _processor(value: object, name: str) -> "Processor":
    return _record(Processor, value, name)


def _tasks(value: object, name: str) -> "TaskSeconds":
    return _record(TaskSeconds, value, name)


Reader = Mapping[str, Callable[[object, str], object]]
"""How a field is read, as its metadata; null means its default where that is None."""

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
    """Seconds of attention, of one layer and one item."""

    call_s: float = field(default=0.0, metadata=SECONDS)
    row_s: float = field(default=0.0, metadata=SECONDS)
    kv_byte_s: float = field(default=0.0, metadata=SECONDS)  # per byte of a row's keys and values
    score_s: float = field(default=0.0, metadata=SECONDS)  # per query token, key and head
    width_s: float = field(default=0.0, metadata=SECONDS)  # the same, per element of a head's width
    own_score_s: float = field(default=0.0, metadata=SECONDS)  # per query of a tree, key of its path and key head


@dataclass(frozen=True, slots=True)
class Processor:
    """What computes. Tables hold seconds per byte of weights by the rows of a product."""

    flop_per_s: Mapping[str, float] = field(default_factory=_nothing, metadata=BY_DTYPE)  # by dtype; none given: 1e11
    memory_bytes_per_s: float = field(default=20e9, metadata=RATE)
    copy_bytes_per_s: float | None = field(default=None, metadata=RATE)  # None: half of reading
    cache_bytes: int = field(default=0, metadata=SIZE)  # of weights that stay in a cache from pass to pass
    task_s: float = field(default=3e-5, metadata=SECONDS)  # of any task, what the lane itself takes
    layer_s: float = field(default=3e-4, metadata=SECONDS)  # of a layer, however small: the interpreter
    exact_layer_s: float | None = field(default=None, metadata=SECONDS)  # None: the same
    product_s: float = field(default=5e-6, metadata=SECONDS)  # of a product, however small
    element_s: float | None = field(default=None, metadata=SECONDS)  # elementwise, per output of a layer's products
    cached_share: float = field(default=1.0, metadata=SECONDS)  # of overheads, for a model that a cache holds
    frame_s: float = field(default=1e-4, metadata=SECONDS)  # before the first layer, and again behind the last one
    frame_layer_s: float = field(default=1e-5, metadata=SECONDS)  # and per layer of the model
    mask_pair_s: float = field(default=0.0, metadata=SECONDS)  # per query token and key
    greedy_s: float | None = field(default=None, metadata=SECONDS)  # per vocabulary entry of a draw
    sampled_s: float | None = field(default=None, metadata=SECONDS)
    offer_s: float | None = field(default=None, metadata=SECONDS)  # the same of a tree's node, for its children
    sampled_offer_s: float | None = field(default=None, metadata=SECONDS)
    accept_row_s: float = field(default=3e-5, metadata=SECONDS)
    gather_s: float = field(default=2e-5, metadata=SECONDS)  # of moving a tree's accepted path, per layer and row
    node_s: float = field(default=5e-5, metadata=SECONDS)  # of a node of a tree, when its children are offered
    tree_row_s: float = field(default=5e-4, metadata=SECONDS)  # of a row's tree, in every pass that verifies it
    weight_s: Mapping[str, Table] = field(default_factory=_nothing, metadata=TABLES)
    block_weight_s: Mapping[str, Table] = field(default_factory=_nothing, metadata=TABLES)  # exact, in blocks
    cached_weight_s: Mapping[str, Table] = field(default_factory=_nothing, metadata=TABLES)  # held by a cache
    attention: AttentionRates | None = field(default=None, metadata={"kind": _attention})
    exact_attention: AttentionRates | None = field(default=None, metadata={"kind": _attention})

    def flops(self, dtype: str) -> float:
        """Floating-point operations per second; without float32 half of bfloat16's, without that the other's."""
        known = self.flop_per_s or {"bfloat16": 1e11}
        halved = 0.5 if dtype == "float32" and dtype not in known else 1.0
        return known.get(dtype) or halved * max(known.values())

    @property
    def copy_rate(self) -> float:
        """Bytes per second of copying inside its memory."""
        return self.copy_bytes_per_s or self.memory_bytes_per_s / 2

    def passes_s(self, elements: float, itemsize: int = 4) -> float:
        """Seconds per element of reading and writing so many."""
        return elements * itemsize / self.memory_bytes_per_s


@dataclass(frozen=True, slots=True)
class TaskSeconds:
    """What the tasks of one pair of models take on a machine, whatever their shapes, and what comes of proposals."""

    layer_s: float = field(default=5e-3, metadata=SECONDS)  # one layer, any number of tokens below the knee
    layer_token_s: float = field(default=1e-4, metadata=SECONDS)  # and per token
    knee_tokens: int = field(default=0, metadata=COUNT)  # tokens that a layer takes for nothing
    draft_s: float = field(default=3e-3, metadata=SECONDS)  # one draft step
    draft_token_s: float = field(default=2e-5, metadata=SECONDS)  # and per token (prompts)
    head_s: float = field(default=2e-3, metadata=SECONDS)
    embed_s: float = field(default=2e-4, metadata=SECONDS)
    accept_s: float = field(default=1e-4, metadata=SECONDS)
    acceptance: float = field(default=0.8, metadata=SHARE)  # chance that a proposal is accepted
    spread: float = field(default=0.25, metadata=SHARE)  # that the next best is, once those before it were not
    end_probability: float = field(default=0.0, metadata=SHARE)  # that a committed token ends its sequence
    seed: int = field(default=0, metadata=COUNT)  # of all that chance decides


@dataclass(frozen=True, slots=True)
class Hardware:
    """A machine: its links, and what computes on either end."""

    name: str = field(default="a machine", metadata={"kind": _text})
    disk_bytes_per_s: float = field(default=2e9, metadata=RATE)
    h2d_bytes_per_s: float | None = field(default=None, metadata=RATE)  # None: the device is the host's own memory
    d2h_bytes_per_s: float | None = field(default=None, metadata=RATE)  # None: as h2d
    device_memory: int | None = field(default=None, metadata=SIZE)  # bytes; None: the host's
    host_memory: int | None = field(default=None, metadata=SIZE)
    read_contention: float = field(default=1.05, metadata=RATE)  # factor of CPU work while the disk lane reads
    threads: int = field(default=0, metadata=SIZE)  # that were measured; 0: none were
    cpu: Processor = field(default=Processor(), metadata={"kind": _processor})
    device: Processor | None = field(default=None, metadata={"kind": _processor})  # None: the CPU
    tasks: TaskSeconds | None = field(default=None, metadata={"kind": _tasks})  # in simulations, before all rates

    def __post_init__(self) -> None:
        if self.h2d_bytes_per_s is not None and self.device is None and self.tasks is None:
            raise UserError(
                "a machine with h2d_bytes_per_s needs a device: an object with flop_per_s and memory_bytes_per_s."
            )

    @property
    def processor(self) -> Processor:
        """What the layers run on."""
        return self.cpu if self.device is None else self.device

    @property
    def missing_rates(self) -> tuple[str, ...]:
        """The fields without which ``tasks`` say all that is known of what computes: no other model can be priced."""
        name, processor = ("cpu", self.cpu) if self.h2d_bytes_per_s is None else ("device", self.device)
        known = self.tasks is None or processor not in (None, Processor())
        return () if known else (f"{name}.flop_per_s", f"{name}.memory_bytes_per_s")

    def as_object(self) -> dict[str, Any]:
        """The JSON object that ``read_machine`` takes; what is at its default is left out."""
        return _object(self)


def read_machine(path: Path) -> Hardware:
    """A machine from a JSON file, or from the ``hardware`` of what ``bench``, ``profile`` and ``plan`` print.

    Raises UserError, in one paragraph that names the field.
    """
    values = read_json(path, "a machine profile")
    return hardware_from(values["hardware"] if isinstance(values, dict) and "hardware" in values else values, str(path))


def hardware_from(values: object, source: str) -> Hardware:
    """A machine from a JSON object that ``source`` held. Raises UserError."""
    try:
        return _record(Hardware, values, "")
    except _Misfit as error:
        raise UserError(f"{source}: not a machine profile: {error}.") from error
    except UserError as error:
        raise UserError(f"{source}: {error}") from error


def _record(kind: type[Record], values: object, name: str) -> Record:
    known = {f.name: f for f in fields(kind)}  # type: ignore[arg-type]  # a dataclass
    within = f"{name}." if name else ""
    if not isinstance(values, dict) or (not values and not name):
        raise _Misfit(
            f"expected {name or 'a JSON object'} with some of {', '.join(known)}, found {reprlib.repr(values)}"
        )
    unknown = next((key for key in values if key not in known), None)
    if unknown is not None:
        place = " (of tasks)" if not name and unknown in TaskSeconds.__slots__ else ""
        raise _Misfit(f"unknown field {within + str(unknown)!r}{place}, expected some of {', '.join(known)}")
    return kind(
        **{
            key: None
            if value is None and known[key].default is None
            else known[key].metadata["kind"](value, within + key)
            for key, value in values.items()
        }
    )


def _object(record: Any) -> dict[str, Any]:
    made: dict[str, Any] = {}
    for own in fields(record):
        value = getattr(record, own.name)
        if value == own.default or value == {}:
            continue
        if isinstance(value, Mapping):
            value = {key: dict(row) if isinstance(row, tuple) else row for key, row in value.items()}
        made[own.name] = _object(value) if hasattr(value, "__dataclass_fields__") else value
    return made

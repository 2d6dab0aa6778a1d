"""The preparation of a checkpoint: the same weights in streaming order, shard by shard, resumable, read back."""

import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aspec.errors import WriteError
from aspec.io.checkpoint import INDEX
from aspec.io.hub import CONFIG
from aspec.preparing.identity import fingerprint
from aspec.preparing.journal import Journal, check_folder, open_journal
from aspec.preparing.order import Shard, in_streaming_order
from aspec.preparing.pieces import CHUNK_BYTES, Reader
from aspec.preparing.quantising import Quantiser, quantiser
from aspec.preparing.shard_file import header, write_file, write_shard
from aspec.preparing.source import Source, files_beside, open_source
from aspec.units import format_bytes

SPARE_BYTES = 1 << 20  # of the index, the journal and the file system's own records

Told = Callable[[int, int], None]
"""Called with the bytes that are finished and those of all shards."""


@dataclass(frozen=True, slots=True)
class Design:
    """What a preparation will write; no weight has been read."""

    source: Source
    shards: tuple[Shard, ...]
    config: Mapping[str, object]  # of its config.json
    quantiser: Quantiser | None  # None: the weights stay as they are
    ties: Mapping[str, Any]  # what its bytes depend on

    @property
    def nbytes(self) -> int:
        """Bytes of all shards, without their headers."""
        return sum(shard.nbytes for shard in self.shards)


@dataclass(frozen=True, slots=True)
class Prepared:
    """A finished checkpoint."""

    folder: Path
    nbytes: int  # of its tensors
    num_shards: int
    num_kept: int  # shards that an earlier, stopped command had finished


def design(folder: Path, bits: int | None = None, group: int | None = None, *, published: bool = False) -> Design:
    """The checkpoint in ``folder`` in streaming order; ``bits``: of its quantised weights, None: as they are stored.

    ``group``: inputs that share a scale. ``published``: 4 bits in a form that other programs read, too. Raises
    UserError if aspec cannot run it, or cannot quantise it.
    """
    source = open_source(folder)
    chosen = None if bits is None else quantiser(source, bits, group, published=published)
    shards = in_streaming_order(source.checkpoint, source.tensors, source.layers, chosen)
    config = source.config if chosen is None else chosen.config()
    ties = {"source": fingerprint(folder), "quantization": config.get("quantization_config")}
    return Design(source, tuple(shards), config, chosen, ties)


def prepare(made: Design, output: Path, told: Told = lambda *_: None) -> Prepared:
    """Write a checkpoint into a folder, or finish it there. Blocks.

    Raises UserError if the folder holds other files, WriteError if the disk is full or fails; finished shards stay, and
    the folder becomes a checkpoint with its last file. A stopped call may be repeated.
    """
    check_folder(output, made.ties)
    with open_journal(output, made.ties) as journal:
        left, done = [], 0
        for shard in made.shards:
            if journal.is_finished(output / shard.name):
                done += shard.nbytes
            else:
                (output / shard.name).unlink(missing_ok=True)
                left.append(shard)
        _check_space(output, left, files_beside(made.source.folder))
        _write_shards(left, output, made, journal, lambda nbytes: told(done + nbytes, made.nbytes))
        _write_others(output, made)
    return Prepared(output, made.nbytes, len(made.shards), len(made.shards) - len(left))


def _write_shards(
    shards: Iterable[Shard], output: Path, made: Design, journal: Journal, told: Callable[[int], None]
) -> None:
    done = 0

    def add(nbytes: int) -> None:
        nonlocal done
        done += nbytes
        told(done)

    reader = Reader(made.source.checkpoint.files)
    try:
        for shard in shards:
            journal.record(output / shard.name, write_shard(output, shard, reader, add))
    finally:
        reader.close()


def _write_others(output: Path, made: Design) -> None:
    """The files beside the weights, config.json last."""
    names = {placed.tensor.name: shard.name for shard in made.shards for placed in shard.tensors}
    index = {"metadata": {"total_size": made.nbytes}, "weight_map": dict(sorted(names.items()))}
    for path in files_beside(made.source.folder):
        if path.name != CONFIG:
            write_file(output / path.name, _chunks(path))
    write_file(output / INDEX, iter([_as_json(index)]))
    if made.config == made.source.config:
        write_file(output / CONFIG, _chunks(made.source.folder / CONFIG))
    else:
        write_file(output / CONFIG, iter([_as_json(made.config)]))


def _as_json(values: Mapping[str, object]) -> bytes:
    return json.dumps(values, indent=2).encode() + b"\n"


def _chunks(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while data := file.read(CHUNK_BYTES):
            yield data


def _check_space(output: Path, shards: Iterable[Shard], others: Iterable[Path]) -> None:
    """Raise WriteError if the disk has too little space for what is left to write."""
    need = sum(len(header([placed.tensor for placed in shard.tensors])) + shard.nbytes for shard in shards)
    need += sum(os.stat(path).st_size for path in others) + SPARE_BYTES
    free = shutil.disk_usage(output).free
    if need > free:
        raise WriteError(
            f"{output} has too little space: {format_bytes(need)} are left to write, {format_bytes(free)} are free. "
            f"Free {format_bytes(need - free)}, or take a folder on another disk."
        )

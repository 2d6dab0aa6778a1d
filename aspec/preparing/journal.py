"""Which files of a new checkpoint are finished: a journal in its folder, so that a stopped command can continue.

Rules. A folder that holds other files and no journal is never written to. The journal names what the checkpoint
depends on; it is on the disk before the first shard. A shard is recorded once it is whole on the disk under its name.
config.json is the last file: without it the folder is no checkpoint. The journal holds no time, so that a stopped and
continued command ends with the same bytes as one that was not stopped.
"""

import fcntl
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from aspec.errors import UserError
from aspec.io.json_file import read_record
from aspec.preparing.shard_file import PARTIAL, Written, checksum_of, write_error, write_file

JOURNAL = "aspec-prepare.json"
VERSION = 1
IN_EVERY_DISK = {"lost+found"}  # at the top of a file system


class Journal:
    """The finished shards of a folder; mutable, because their number grows."""

    def __init__(self, folder: Path, ties: Mapping[str, Any]) -> None:
        self._file, self._ties = folder / JOURNAL, dict(ties)
        found = read_record(self._file).get("files")
        self._files: dict[str, Written] = {}  # by name
        for name, values in found.items() if isinstance(found, dict) else ():
            if isinstance(values, list) and len(values) == 2:
                self._files[name] = Written(*values)

    def is_finished(self, path: Path) -> bool:
        """Whether a shard was recorded and still has the same bytes, all of which are read."""
        own = self._files.get(path.name)
        return own is not None and path.is_file() and checksum_of(path) == own

    def record(self, path: Path, written: Written) -> None:
        """Record a shard. Raises WriteError."""
        self._files[path.name] = written
        self.save()

    def save(self) -> None:
        """Write the journal. Raises WriteError."""
        files = {name: [own.nbytes, own.checksum] for name, own in sorted(self._files.items())}
        values = {"version": VERSION, **self._ties, "files": files}
        write_file(self._file, iter([json.dumps(values, indent=1).encode()]))


def check_folder(folder: Path, ties: Mapping[str, Any]) -> None:
    """Raise UserError if a folder holds anything but a checkpoint that was begun with the same ties."""
    if not os.path.lexists(folder):
        return
    if not folder.is_dir():
        raise UserError(f"{folder} is a file: expected a new or an empty folder for the checkpoint. Give another -o.")
    found = sorted({path.name for path in folder.iterdir()} - IN_EVERY_DISK)
    if not found or found == [JOURNAL + PARTIAL]:
        return
    if JOURNAL not in found:
        raise UserError(
            f"{folder} is not empty: expected a new or an empty folder, found {', '.join(found[:3])}"
            f"{', ...' if len(found) > 3 else ''} and no {JOURNAL}, which a checkpoint of this command has. No file of "
            f"others is overwritten: give another -o."
        )
    known = read_record(folder / JOURNAL)
    if other := next((key for key, value in {"version": VERSION, **ties}.items() if known.get(key) != value), None):
        raise UserError(
            f"{folder} holds a checkpoint of another command: its {JOURNAL} has {other} = {known.get(other)!r:.80}, "
            f"this command has {ties.get(other)!r:.80}. Give another -o, or remove the folder to start anew."
        )


@contextmanager
def open_journal(folder: Path, ties: Mapping[str, Any]) -> Iterator[Journal]:
    """The journal of a folder that no other process writes to meanwhile; both are made if they are missing.

    Raises UserError if the folder cannot be used, WriteError if it cannot be written.
    """
    check_folder(folder, ties)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = os.open(folder, os.O_RDONLY)
    except OSError as error:
        raise write_error(folder, error) from error
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(
                f"{folder} is in use by another process that prepares a checkpoint in it. Wait for it, or give "
                f"another -o."
            ) from error
        check_folder(folder, ties)  # what another process has left until now
        for torn in folder.glob(f"*{PARTIAL}"):
            torn.unlink()
        journal = Journal(folder, ties)
        journal.save()
        yield journal
    finally:
        os.close(lock)

"""Answers on standard output, as they come. A pipe cannot be read back, so there is no journal: nothing continues."""

import sys
from collections.abc import Sequence

from aspec.errors import UserError, WriteError
from aspec.serving.batch_output import OutputRow


class PipeOutput:
    """Standard output in place of a file; mutable, because the first error stays."""

    path = "standard output"

    def __init__(self, created: int) -> None:
        """Raises UserError if standard output is closed."""
        if sys.stdout is None:
            raise UserError("standard output is closed, but -o - writes to it. Give -o a file.")
        self.created = created  # when the job began, seconds since the epoch
        self._broken: BaseException | None = None  # the first error; later writes raise it again

    def append(self, rows: Sequence[OutputRow]) -> None:
        """Write rows. Raises BrokenPipeError if the reader has gone, otherwise WriteError."""
        if self._broken is not None:
            raise self._broken
        try:
            sys.stdout.buffer.write(b"".join(row.line for row in rows))
            sys.stdout.buffer.flush()
        except BrokenPipeError as error:
            self._broken = error
            raise
        except OSError as error:
            self._broken = WriteError(
                f"standard output cannot be written: {error.strerror or error}. Run again with -o FILE: a journal "
                f"beside the file lets a stopped job continue."
            )
            raise self._broken from error

    def verify(self) -> None:
        """A pipe cannot be read back."""

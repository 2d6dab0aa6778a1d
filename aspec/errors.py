"""The errors that aspec raises (the user's input, a bug of aspec, a closed engine, a failed device), and their texts.

AspecError
├── UserError            the input cannot be used; the message gives the problem, expected, found, remedy (exit 1)
│   ├── CheckpointError      a model folder or a shard is missing, damaged or contradicts itself
│   ├── UnsupportedModelError   the architecture or a config key is not supported
│   ├── VocabularyError      draft and target do not share a vocabulary
│   ├── BudgetError          the memory budget cannot hold the smallest plan
│   └── PromptError          the prompt is empty, too long, or the sampling parameters contradict
├── InternalError        aspec broke its own rule (a stale slot, a schedule that cannot finish)
│   ├── GraphError           a task reads content that its buffer does not hold, or a write is emitted too early
│   └── DeadlockError        no task runs and no task can become ready
├── ClosedError          the engine was closed before a stream was opened, or while it was open
└── DeviceError          a device, disk or numeric failure while running
    ├── ReadError            the disk returned an error or too few bytes
    ├── WriteError           the output cannot be written: the disk is full, is not writable or fails
    ├── NumericError         the logits of one sequence are not numbers
    │   └── NoTokenError         its sampling parameters rule every token out
    └── DivergenceError      the target drew other tokens with a draft than without one
"""

import reprlib

MOST_CHARACTERS = 50_000  # of a message: thousands of problems of a batch file
MOST_REASON = 600  # of a library's error inside a message
MOST_SHOWN = 200  # of a name or a value inside a message


class AspecError(Exception):
    """The root of every error that aspec raises on purpose. Its text is fit for a terminal (``printable``)."""

    def __init__(self, *args: object) -> None:
        super().__init__(*(printable(value) if isinstance(value, str) else value for value in args))


class UserError(AspecError):
    """The input cannot be used as it is; the message names the change that helps."""


class CheckpointError(UserError):
    """A model folder, an index or a shard is missing, damaged or contradicts itself."""


class UnsupportedModelError(UserError):
    """The architecture, or a key of its configuration, is not supported."""


class VocabularyError(UserError):
    """Draft and target do not share a vocabulary, or a tokenizer does not fit its model."""


class BudgetError(UserError):
    """The memory budget cannot hold even the smallest plan."""


class PromptError(UserError):
    """A prompt or its sampling parameters cannot be served."""


class InternalError(AspecError):
    """aspec broke its own rule: a bug of aspec, never the user's fault."""


class GraphError(InternalError):
    """A task contradicts the contents of its buffers."""


class DeadlockError(InternalError):
    """No task is running and no task can become ready."""


class ClosedError(AspecError):
    """The engine was closed, or its run was cancelled, before a stream had ended."""


class DeviceError(AspecError):
    """A device, a disk or the arithmetic failed during a run."""


class ReadError(DeviceError):
    """The disk returned an error or fewer bytes than the index states."""


class WriteError(DeviceError):
    """The output cannot be written: the disk is full, is not writable, or fails."""


class NumericError(DeviceError):
    """The logits of a sequence are not numbers."""


class NoTokenError(NumericError):
    """The sampling parameters of a sequence rule every token out at a position."""


class DivergenceError(DeviceError):
    """Speculation gave other tokens than decoding without it: passes of another size rounded differently."""


def first_error(error: BaseException) -> BaseException:
    """The first error of a task group: all later errors there are consequences of it."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


def printable(text: str, most: int = MOST_CHARACTERS) -> str:
    """``text`` for a terminal: its control characters are escaped, and the middle of a long text is left out.

    Names from files may hold anything: escape sequences that repaint the screen, or megabytes.
    """
    if len(text) > most:
        text = f"{text[: most // 2]} ... ({len(text)} characters) ... {text[-(most // 4) :]}"
    return "".join(map(_escaped, text)) if not text.isprintable() else text


def shown(value: object) -> str:
    """A name or value from a file, for use in a message: bounded and on one line; a text without quotes."""
    text = value if isinstance(value, str) else reprlib.repr(value)
    return printable(text, MOST_SHOWN).replace("\n", "\\n")


def reason_of(error: BaseException) -> str:
    """A library's error for use in a message: its type and text, on one line."""
    text = " ".join(str(error).split()).rstrip(".: ")
    return f"{type(error).__name__}: {printable(text, MOST_REASON)}" if text else type(error).__name__


def _escaped(character: str) -> str:
    keep = character.isprintable() or character == "\n"
    return character if keep else character.encode("unicode_escape").decode("ascii")

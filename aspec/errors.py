"""What can go wrong, in three kinds: the user's input, our own bug, the device or the disk.

AspecError
├── UserError            the input cannot be used; the message says what, expected, found and remedy   (exit 1)
│   ├── CheckpointError      a model folder or a shard is missing, damaged or contradicts itself
│   ├── UnsupportedModelError   the architecture or a config key is not supported
│   ├── VocabularyError      draft and target do not share a vocabulary
│   ├── BudgetError          the memory budget cannot hold the smallest plan
│   └── PromptError          the prompt is empty, too long, or the sampling parameters contradict
├── InternalError        a rule of aspec's own was broken (a stale slot, a schedule that cannot finish)
│   ├── GraphError           a task reads a content its buffer does not hold, or a write comes too early
│   └── DeadlockError        nothing runs and nothing can become ready
├── ClosedError          the engine was closed while a stream was open, or before it was
└── DeviceError          a device, disk or numeric failure while running
    ├── ReadError            the disk returned an error or too few bytes
    ├── WriteError           the output cannot be written: the disk is full, may not be written or fails
    ├── NumericError         the logits of one sequence are not numbers
    └── DivergenceError      with a draft the target drew other tokens than without
"""


class AspecError(Exception):
    """The root of every error aspec raises on purpose."""


class UserError(AspecError):
    """The input cannot be used as it is; the message tells what to change."""


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
    """A rule of aspec's own was broken: a bug, never the user's fault."""


class GraphError(InternalError):
    """A task contradicts what its buffers hold."""


class DeadlockError(InternalError):
    """Nothing is running and nothing can become ready."""


class ClosedError(AspecError):
    """The engine was closed, or its run was cancelled, before a stream had ended."""


class DeviceError(AspecError):
    """A device, a disk or the arithmetic failed while running."""


class ReadError(DeviceError):
    """The disk returned an error or fewer bytes than the index promises."""


class WriteError(DeviceError):
    """What is to be kept cannot be written: the disk is full, may not be written, or fails."""


class NumericError(DeviceError):
    """The logits of a sequence are not numbers."""


class DivergenceError(DeviceError):
    """Speculation gave other tokens than decoding without it: passes of another size rounded otherwise."""


def first_error(error: BaseException) -> BaseException:
    """What failed first in a task group: whatever else failed there failed because of it."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error

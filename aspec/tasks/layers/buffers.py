"""The names of all buffers, so that policy, executor, simulation and race detector agree."""

from aspec.tasks.task import WorkItem


def slot_buffer(slot: int) -> str:
    """The slot ``slot``, a device buffer that holds one part."""
    return f"slot:{slot}"


def expert_buffer(slot: int) -> str:
    """The expert slot ``slot``, a device buffer that holds one expert."""
    return f"expert:{slot}"


def routed_buffer(item: WorkItem) -> str:
    """A work item between its router and the end of a layer: its routes, and the results of its experts so far."""
    return f"routed:{item.name}"


def scratch_buffer(index: int, place: int) -> str:
    """The place of one part in the scratch buffer ``index``, which holds one layer's decoded weights."""
    return f"scratch:{index}.{place}"


def staging_buffer(index: int) -> str:
    """The staging buffer ``index``, in pinned host memory between disk and device."""
    return f"staging:{index}"


def hidden_buffer(item: WorkItem) -> str:
    """The hidden state of a work item between layers."""
    return f"hidden:{item.name}"


def attention_buffer(item: WorkItem) -> str:
    """The input of a work item's attention in a split layer, and then its result.

    Prefill items alternate between two such buffers, so that the memory of a pass does not grow with their number.
    """
    return f"attention:{_turn(item)}"


def crossing_buffer(item: WorkItem) -> str:
    """The same contents in host memory, for a split layer whose KV is there."""
    return f"crossing:{_turn(item)}"


def _turn(item: WorkItem) -> str:
    return f"{item.group}.prefill {item.index % 2}" if item.prefill else item.name


def draws_buffer(item: WorkItem) -> str:
    """The target's draws for a work item."""
    return f"draws:{item.name}"


def weights_buffer(layer: int) -> str:
    """The modules of a streamed layer; its first task in a pass binds their parameters to the slots."""
    return f"weights:{layer}"


def decoded_buffer(layer: int, place: int) -> str:
    """The modules of a streamed layer whose parameters the decoding of one part binds."""
    return f"weights:{layer}.{place}"


def kv_buffer(group: int, layer: int) -> str:
    """The target's keys and values of one layer for one group of rows."""
    return f"kv:{group}:{layer}"


def rows_kv_buffer(item: WorkItem, layer: int) -> str:
    """The same, for the rows of one item: two items of a pass share all rows (chunks of a prompt) or none."""
    return f"kv:{item.group}:{layer}:{item.rows[0]}"


def draft_kv_buffer(group: int) -> str:
    """The draft's keys and values of one group."""
    return f"draft_kv:{group}"


def proposal_buffer(group: int) -> str:
    """The proposed tokens of one group."""
    return f"proposal:{group}"


def sequence_buffer(group: int) -> str:
    """The committed tokens of one group."""
    return f"sequence:{group}"

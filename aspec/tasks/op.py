"""The operations of the dataflow. One op is one row: its name, and all that is generally true of it.

Who computes an op stands in ``runner.py``, what it costs in ``cost_table.py``; nobody else keeps a list of ops.
"""

from enum import StrEnum


class Lane(StrEnum):
    """The lanes on which a run is shown, from the files to the host's small work."""

    DISK = "disk"
    H2D = "h2d"
    D2H = "d2h"
    TARGET = "target"
    DRAFT = "draft"
    CPU = "cpu"


class Cost(StrEnum):
    """What the seconds of an op count as, where they are learned and where a machine charges flat ones."""

    DISK = "disk"  # by the bytes that travel, as the next three
    H2D = "h2d"
    D2H = "d2h"
    H2D_RESULTS = "back"
    EMBED = "embed"
    LAYER = "layer"
    HEAD = "head"
    ACCEPT = "accept"
    DRAFT = "draft"
    DRAFT_PREFILL = "draft_prefill"
    NOTHING = "nothing"  # a few dictionary entries


class Op(StrEnum):
    """What a task does: the lane that shows it, its label, its cost, its share of a layer, whether it ends one."""

    lane: Lane
    template: str  # of the label: {layer}, and {detail}: the part of a load, the step of a draft
    cost: Cost
    layer_share: float  # of a whole layer's flat seconds
    ends_layer: bool  # an item's layer ends with it

    def __new__(
        cls, name: str, lane: Lane, template: str, cost: Cost, layer_share: float = 0.0, ends_layer: bool = False
    ) -> "Op":
        """One row."""
        op = str.__new__(cls, name)
        op._value_ = name
        op.lane, op.template, op.cost = lane, template, cost
        op.layer_share, op.ends_layer = layer_share, ends_layer
        return op

    # disk -> slot (the device is the host's own memory) or staging
    READ = "read", Lane.DISK, "read {detail}", Cost.DISK
    # staging or pinned host part -> slot
    COPY = "copy", Lane.H2D, "copy {detail}", Cost.H2D
    # sequences take rows, or leave them
    ASSIGN_ROWS = "assign_rows", Lane.CPU, "assign rows", Cost.NOTHING
    # token ids -> hidden, positions and masks
    EMBED = "embed", Lane.TARGET, "embed", Cost.EMBED
    # one target layer for one work item
    LAYER = "layer", Lane.TARGET, "L{layer}", Cost.LAYER, 1.0, True
    # a layer that is split: its part up to the queries, keys and values
    PROJECT = "project", Lane.TARGET, "L{layer} projections", Cost.LAYER, 0.25
    # these to the host, where its KV is behind a device's link
    SEND = "send", Lane.D2H, "L{layer} queries out", Cost.D2H
    # its attention
    ATTEND = "attend", Lane.CPU, "L{layer} attention", Cost.LAYER, 0.25
    # the result of the attention, back to the device
    RETURN = "return", Lane.H2D, "L{layer} result back", Cost.H2D_RESULTS
    # and the rest of the layer
    FFN = "ffn", Lane.TARGET, "L{layer} rest", Cost.LAYER, 0.5, True
    # hidden -> logits -> the target's draws
    HEAD = "head", Lane.TARGET, "head", Cost.HEAD
    # compare draws with the proposal, commit, move the accepted path's KV, detokenise
    ACCEPT = "accept", Lane.CPU, "accept", Cost.ACCEPT
    # one step of the draft for all rows of a group
    DRAFT = "draft", Lane.DRAFT, "draft {detail}", Cost.DRAFT
    # a chunk of prompts into the draft's KV
    DRAFT_PREFILL = "draft_prefill", Lane.DRAFT, "draft_prefill", Cost.DRAFT_PREFILL

    def label(self, layer: int | None, detail: int | None) -> str:
        """The name of one task, from what tells it from others of its op."""
        return self.template.format(layer=layer, detail=detail)

    @property
    def loads(self) -> bool:
        """Whether it moves weights towards a slot."""
        return self.cost in (Cost.DISK, Cost.H2D)

    @property
    def computes(self) -> bool:
        """Whether it is the target's own compute."""
        return self.cost in (Cost.EMBED, Cost.LAYER, Cost.HEAD)

"""The operations of the dataflow: one row per op, with its name and all its fixed properties.

``engine/model_runner.py`` computes the ops, ``profiling/cost_tables.py`` has their costs; no other file lists all ops.
"""

from enum import StrEnum


class Lane(StrEnum):
    """The lanes on which a run is displayed, in order, from disk reads to the small tasks of the host."""

    DISK = "disk"
    H2D = "h2d"
    D2H = "d2h"
    DECODE = "decode"
    TARGET = "target"
    DRAFT = "draft"
    CPU = "cpu"


class Cost(StrEnum):
    """The cost class of an op: where its seconds are learned, and which flat cost a simulated machine charges."""

    DISK = "disk"  # by the bytes transferred, as are the next three
    H2D = "h2d"
    D2H = "d2h"
    H2D_RESULTS = "back"
    DECODE = "decode"  # by the bytes that it makes
    EMBED = "embed"
    LAYER = "layer"
    HEAD = "head"
    ACCEPT = "accept"
    DRAFT = "draft"
    DRAFT_PREFILL = "draft_prefill"
    NOTHING = "nothing"  # a few dictionary entries


class Op(StrEnum):
    """The kind of a task: its lane, its label, its cost class, its share of a layer, whether it ends a layer."""

    lane: Lane
    template: str  # of the label: {layer}, and {detail} (the part of a load or of a decoding, the step of a draft)
    cost: Cost
    layer_share: float  # the op's share of a whole layer's flat seconds, 0 .. 1
    ends_layer: bool  # whether the op is the last one of an item's layer

    def __new__(
        cls, name: str, lane: Lane, template: str, cost: Cost, layer_share: float = 0.0, ends_layer: bool = False
    ) -> "Op":
        """Create one row."""
        op = str.__new__(cls, name)
        op._value_ = name
        op.lane, op.template, op.cost = lane, template, cost
        op.layer_share, op.ends_layer = layer_share, ends_layer
        return op

    # disk -> slot (if the device is the host) or staging
    READ = "read", Lane.DISK, "read {detail}", Cost.DISK
    # staging or pinned host part -> slot
    COPY = "copy", Lane.H2D, "copy {detail}", Cost.H2D
    # slot -> scratch: stored weights to those that products take
    DECODE = "decode", Lane.DECODE, "decode {detail}", Cost.DECODE
    # assign sequences to rows, or free rows
    ASSIGN_ROWS = "assign_rows", Lane.CPU, "assign rows", Cost.NOTHING
    # token ids -> hidden, positions and masks
    EMBED = "embed", Lane.TARGET, "embed", Cost.EMBED
    # one target layer for one work item
    LAYER = "layer", Lane.TARGET, "L{layer}", Cost.LAYER, 1.0, True
    # a split layer: hidden -> queries, keys and values
    PROJECT = "project", Lane.TARGET, "L{layer} projections", Cost.LAYER, 0.25
    # a split layer: queries, keys and values to the host, if the KV is in host memory
    SEND = "send", Lane.D2H, "L{layer} queries out", Cost.D2H
    # a split layer: attention
    ATTEND = "attend", Lane.CPU, "L{layer} attention", Cost.LAYER, 0.25
    # a split layer: the result of the attention back to the device
    RETURN = "return", Lane.H2D, "L{layer} result back", Cost.H2D_RESULTS
    # a split layer: all work after attention
    FFN = "ffn", Lane.TARGET, "L{layer} rest", Cost.LAYER, 0.5, True
    # a layer with experts on demand: attention and router; the experts that the router chose
    ROUTE = "route", Lane.TARGET, "L{layer} attention and router", Cost.LAYER, 0.5
    # disk -> expert slot
    LOAD_EXPERT = "load_expert", Lane.DISK, "L{layer} expert {detail}", Cost.DISK
    # a layer with experts on demand: the products of some experts
    EXPERTS = "experts", Lane.TARGET, "L{layer} experts", Cost.LAYER
    # a layer with experts on demand: the last experts, and all work after them
    COMBINE = "combine", Lane.TARGET, "L{layer} last experts and rest", Cost.LAYER, 0.5, True
    # hidden -> logits -> the target's draws
    HEAD = "head", Lane.TARGET, "head", Cost.HEAD
    # compare draws with the proposal, commit, move the accepted path's KV, detokenise
    ACCEPT = "accept", Lane.CPU, "accept", Cost.ACCEPT
    # one step of the draft for all rows of a group
    DRAFT = "draft", Lane.DRAFT, "draft {detail}", Cost.DRAFT
    # a chunk of prompts into the draft's KV
    DRAFT_PREFILL = "draft_prefill", Lane.DRAFT, "draft_prefill", Cost.DRAFT_PREFILL

    def label(self, layer: int | None, detail: int | None) -> str:
        """The label of one task, from its layer and its detail."""
        return self.template.format(layer=layer, detail=detail)

    @property
    def loads(self) -> bool:
        """Whether the op moves weights towards a slot."""
        return self.cost in (Cost.DISK, Cost.H2D)

    @property
    def computes(self) -> bool:
        """Whether the op is compute of the target."""
        return self.cost in (Cost.EMBED, Cost.LAYER, Cost.HEAD)

"""Prices every task from a machine and the shapes of two models: makes the costs on which a simulation runs.

The seconds of products come from the machine's table of seconds per weight byte by rows. Without a table, they are the
larger of two times: reading the weights, or multiplying (roofline model). This file measures and reads nothing.
"""

import re
from bisect import bisect_right
from collections.abc import Sequence
from itertools import pairwise

from aspec.profiling.cost_tables import Attention, CostTable, LayerCost, ModelCost, PiecewiseLinear, SimCosts
from aspec.profiling.hardware import SOFTMAX_PASSES, AttentionRates, Hardware, Processor, Table
from aspec.profiling.model_shape import LayerShape, ModelShape, touched_experts
from aspec.tasks.experts.routing import TEXT_EXPONENT

ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048)
"""Token counts at which a line of products has a point."""

ACCEPTANCE, SPREAD = 0.8, 0.25  # guesses for a pair of models that has not run yet
ELEMENT_PASSES = 6  # of elementwise work over a layer's outputs in memory
STATE_PASSES = 12  # over the fp32 state of a recurrent layer, for every token: see ``RecurrentState.run``
DRAW_PASSES = {False: 1, True: 12}  # over the fp32 vocabulary: largest entry; noise, sum and largest entry
DECODE_COPIES = {"AWQ": 7, "FP8": 4, "GPTQ": 6, "MXFP4": 3, "NVFP4": 4, "bitsandbytes": 4, "compressed-tensors": 4}
"""Seconds of decoding a weight, as multiples of copying it; measured on one thread of a CPU with AVX-512."""
INT4_BYTES = 0.5 + 4 / 64  # of a weight, with the scale and the offset of a usual group
MOST_COPIES = 7  # of other methods: of the k-quants of GGUF
OFFER_PASSES = {False: 8, True: 20}  # the same for the children of a node, with their probabilities


def prices(
    target: ModelShape,
    draft: ModelShape | None,
    hardware: Hardware,
    *,
    draft_hardware: Hardware | None = None,
    exact: bool = False,
    sampled: bool = False,
    tree: bool = False,
    cpu_attention: bool = False,
    acceptance: float = ACCEPTANCE,
    spread: float = SPREAD,
    decoders: int = 1,
) -> SimCosts:
    """The costs of all tasks on a machine.

    ``draft_hardware``: the same machine with the draft's threads. ``exact``: the costs of exact steps. ``sampled``:
    draws with noise. ``tree``: proposals are trees. ``cpu_attention``: attention runs on the CPU, with the KV cache in
    host memory, on a machine with a device. ``decoders``: threads that decode weights.
    """
    device = hardware.processor
    kv_owner = hardware.cpu if cpu_attention else device  # of the target's KV cache
    gathers_s = kv_owner.gather_s * len(target.layers) + (0.0 if draft is None else device.gather_s * len(draft.layers))
    target_cost = model_cost(target, hardware, exact=exact, sampled=sampled, cpu_attention=cpu_attention)
    draft_cost = None if draft is None else model_cost(draft, draft_hardware or hardware, sampled=sampled)
    cost_table = CostTable(
        target_cost,
        draft_cost,
        accept_s=device.task_s,
        accept_row_s=hardware.cpu.accept_row_s,
        tree_row_s=hardware.cpu.tree_row_s + gathers_s if tree else 0.0,
        node_s=hardware.cpu.node_s,
        task_s=device.task_s,
        routed_s=device.routed_s,
        experts_s=device.experts_s,
        handover_s=hardware.cpu.handover_s,
        tree=tree,
        decoders=decoders,
        read_contention=1.0 if hardware.h2d_bytes_per_s is not None else hardware.read_contention,
    )
    return SimCosts(
        disk_bytes_per_s=hardware.disk_bytes_per_s,
        copy_bytes_per_s=hardware.h2d_bytes_per_s,
        d2h_bytes_per_s=hardware.d2h_bytes_per_s,
        acceptance=acceptance,
        spread=spread,
        cost_table=cost_table,
    )


def model_cost(
    shape: ModelShape, hardware: Hardware, *, exact: bool = False, sampled: bool = False, cpu_attention: bool = False
) -> ModelCost:
    """The costs of one model on the processor that runs the layers."""
    device = hardware.processor
    attends = hardware.cpu if cpu_attention else device
    attention = _attention_cost(shape, attends, exact=exact)
    costs: dict[LayerShape, LayerCost] = {}
    for layer in shape.layers:
        if layer not in costs:
            costs[layer] = _layer_cost(layer, shape, device, attention, exact=exact)
    cached = shape.nbytes <= device.cache_bytes
    frame_s = (device.frame_s + device.frame_layer_s * len(shape.layers)) * _warmth(shape, device)
    head = _product_line(
        [(shape.head_bytes - shape.itemsize * shape.head_int4, 1, 1)],
        shape.dtype,
        device,
        frame_s,
        shape.vocab,
        exact=exact,
        cached=cached,
        int4=shape.head_int4,
    )
    draw_s = device.sampled_s if sampled else device.greedy_s
    draw_s = device.passes_s(DRAW_PASSES[sampled]) if draw_s is None else draw_s
    offer_s = device.sampled_offer_s if sampled else device.offer_s
    offer_s = device.passes_s(OFFER_PASSES[sampled]) if offer_s is None else offer_s
    return ModelCost(
        layers=tuple(costs[layer] for layer in shape.layers),
        embed=PiecewiseLinear(
            ((1, frame_s), (1024, frame_s + 1024 * shape.hidden * shape.itemsize / device.copy_rate))
        ),
        head=head,
        draw_s=draw_s * shape.vocab,
        offer_s=offer_s * shape.vocab,
        mask_pair_s=device.mask_pair_s,
    )


WeightGroup = tuple[float, int, int]
"""(bytes of one expert, number of experts, experts of one token); dense weights count as one expert."""


def _layer_cost(
    layer: LayerShape, shape: ModelShape, device: Processor, attention: Attention, *, exact: bool
) -> LayerCost:
    overhead_s = device.layer_s if not exact or device.exact_layer_s is None else device.exact_layer_s
    share = layer.project_bytes / max(1, layer.dense_bytes)
    cached = shape.nbytes <= device.cache_bytes
    overhead_s *= _warmth(shape, device)
    routed: list[WeightGroup] = [(layer.expert_bytes, layer.experts, layer.active)] if layer.experts else []
    products_s = device.product_s * layer.products
    project = _product_line(
        [(layer.project_bytes - shape.itemsize * layer.project_int4, 1, 1)],
        shape.dtype,
        device,
        overhead_s / 2 + products_s * share,
        layer.wide * share,
        exact=exact,
        cached=cached,
        state=layer.state,
        int4=layer.project_int4,
    )
    rest = _product_line(
        [(layer.rest_bytes - shape.itemsize * layer.rest_int4, 1, 1), *routed],
        shape.dtype,
        device,
        overhead_s / 2 + products_s * (1 - share),
        layer.wide * (1 - share),
        exact=exact,
        cached=cached,
        int4=layer.rest_int4,
    )
    return LayerCost(project, rest, attention, _decode_byte_s(layer, shape, device))


def _warmth(shape: ModelShape, device: Processor) -> float:
    """The factor on overheads."""
    return device.cached_share if shape.nbytes <= max(device.cache_bytes, device.last_cache_bytes) else 1.0


def _decode_byte_s(layer: LayerShape, shape: ModelShape, device: Processor) -> float:
    """Seconds of one thread, per byte of decoded weights; of weights that are only cast, a copy's."""
    copy_s = 1.0 / device.copy_rate
    weights = sum(count for _, count in layer.packed)
    if not weights:
        return copy_s
    total_s = 0.0
    for method, count in layer.packed:
        usual_s = DECODE_COPIES.get(re.split(r"[ ,]", method)[0], MOST_COPIES) * copy_s * shape.itemsize
        total_s += count * device.decode_weight_s.get(method, usual_s)
    return total_s / (layer.written_bytes or weights * shape.itemsize)


def _product_line(
    weights: Sequence[WeightGroup],
    dtype: str,
    device: Processor,
    fixed_s: float,
    elements: float,
    *,
    exact: bool,
    cached: bool,
    state: int = 0,
    int4: int = 0,
) -> PiecewiseLinear:
    """Seconds by tokens: fixed seconds, the products, and elementwise work per output and element of a state.

    ``int4``: weights that are multiplied in 4 bits, beside ``weights``.
    """
    per_element = device.passes_s(ELEMENT_PASSES, 2) if device.element_s is None else device.element_s
    points = []
    for count in ROWS:
        products_s = sum(_product_s(w, count, dtype, device, exact=exact, cached=cached) for w in weights)
        points.append((count, fixed_s + products_s + int4 * int4_seconds(device, count, exact=exact)))
    each_s = per_element * elements + device.passes_s(STATE_PASSES * state)
    return PiecewiseLinear(tuple(points), each_s=each_s)


def _product_s(
    weights: WeightGroup, tokens: float, dtype: str, device: Processor, *, exact: bool, cached: bool
) -> float:
    """Seconds of the products of so many tokens with dense weights, or with the experts that tokens of a text use."""
    nbytes, experts, active = weights
    touched = touched_experts(experts, active, tokens**TEXT_EXPONENT) if experts > 1 else 1.0
    rows = tokens * active / touched if experts > 1 else tokens
    own_s = (device.product_s * 2 + device.expert_s) * touched if experts > 1 else 0.0
    return own_s + touched * nbytes * weight_seconds(device, dtype, rows, exact=exact, cached=cached)


def weight_seconds(device: Processor, dtype: str, rows: float, *, exact: bool = False, cached: bool = False) -> float:
    """Seconds per byte of weights for a product of so many rows."""
    tables = device.cached_weight_s if cached else device.weight_s
    if exact and not cached and dtype in device.exact_weight_s:
        tables = device.exact_weight_s
    table = tables.get(dtype)
    if table is not None:
        return _interpolate(table, rows)
    itemsize = 4 if dtype == "float32" else 2
    multiply_s = 2 * rows / itemsize / device.flops(dtype)
    return multiply_s if cached else max(1 / device.memory_bytes_per_s, multiply_s)


def int4_seconds(device: Processor, rows: float, *, exact: bool = False) -> float:
    """Seconds per weight of 4 bits for a product of so many rows. Unknown: it is read, or multiplied in float32."""
    tables = device.exact_int4_weight_s if exact and device.exact_int4_weight_s else device.int4_weight_s
    if (table := tables.get("bfloat16")) is not None:
        return _interpolate(table, rows)
    return max(INT4_BYTES / device.memory_bytes_per_s, 2 * rows / device.flops("float32"))


def _interpolate(table: Table, rows: float) -> float:
    """Linear between two counts; beyond the last one, the last slope goes on, and seconds never fall."""
    counts = [count for count, _ in table]
    above = bisect_right(counts, rows)
    if above == 0:
        return table[0][1]
    if above < len(table):
        (x, y), (x2, y2) = table[above - 1], table[above]
        return y + (y2 - y) * (rows - x) / (x2 - x)
    slopes = [(y2 - y) / (x2 - x) for (x, y), (x2, y2) in pairwise(table)]
    last, last_s = table[-1]
    return last_s + (rows - last) * (max(slopes[-1], 0.0) if slopes else last_s / last)


def _attention_cost(shape: ModelShape, device: Processor, *, exact: bool) -> Attention:
    rates = (device.exact_attention or device.attention) if exact else device.attention
    if rates is None:
        multiply_s = 4 / device.flops(shape.dtype)  # a product and a sum, with keys and with values
        rates = AttentionRates(
            kv_byte_s=1 / device.memory_bytes_per_s, score_s=device.passes_s(SOFTMAX_PASSES), width_s=multiply_s
        )
    width = (shape.width + shape.value_width) / 2
    return Attention(
        call_s=rates.call_s,
        row_s=rates.row_s,
        key_s=rates.kv_byte_s * shape.kv_bytes,
        pair_s=shape.heads * (rates.score_s + rates.width_s * width),
        own_pair_s=shape.kv_heads * rates.own_score_s,
        exact=exact,
    )

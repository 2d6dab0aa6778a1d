"""Measures what passes cost beside products, attention and reads: the interpreter, draft trees, routes. Blocking."""

import contextlib
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import nn
from transformers import LlamaConfig, MixtralConfig

from aspec.generation.params import SamplingParams
from aspec.generation.sampler import Sampler
from aspec.models.attention import NAME
from aspec.models.exact.elements import prove_elements, route_elements
from aspec.models.exact.modes import ExactStep
from aspec.models.exact.paths import MaskKind
from aspec.models.exact.products import route
from aspec.models.hf_compat import LlamaDecoderLayer, cache_argument, set_attention
from aspec.models.kv_cache import KVCache
from aspec.models.model import Model
from aspec.models.weights.parts import Part
from aspec.options import DEMO
from aspec.profiling.hardware import Hardware, Processor
from aspec.profiling.model_shape import ModelShape, layer_shape
from aspec.profiling.roofline import model_cost
from aspec.profiling.stopwatch import Work, cold_seconds_each, cold_seconds_of, seconds_of
from aspec.speculation.calibration import Calibration
from aspec.speculation.candidates import best_children
from aspec.speculation.proposal import ROOT
from aspec.speculation.tree import Tree
from aspec.tasks.task import WorkItem

HEADS, KV_HEADS, WIDTHS = 16, 4, (64, 128)  # of a measured attention
CONTEXT, COLUMNS = 512, 2048
MANY = 300  # tokens of a long item
SMALL = 64  # hidden size of a layer whose seconds are almost only overhead
FEW_EXPERTS, MORE_EXPERTS = 2, 10  # of a token, in two small layers

BEAMS, WIDTH = 8, 8  # nodes of a level, and children of each node
BUDGET, DEPTH = 64, 32  # most nodes and most depth of the tree
VOCABULARIES = 64, 32768  # entries of a small one and a large one
BEFORE = 64  # tokens before the tree


def with_overheads(measured: Processor, dtype: torch.dtype) -> Processor:
    """Add the overheads: seconds of real code minus the seconds that the measured rates explain."""
    small, large = (_SmallModel(DEMO / name, dtype) for name in ("draft", "target"))
    hot_s, cold_s = small.embed_seconds(1), small.embed_seconds(1, timed=cold_seconds_of)
    layers, more_layers = small.model.num_layers, large.model.num_layers
    frame_layer_s = max(0.0, (large.embed_seconds(1) - hot_s) / (more_layers - layers)) * cold_s / hot_s
    tiny = {exact: _LayerTimer(measured, dtype, exact=exact) for exact in (False, True)}
    fixed_s = {exact: layer.left_over(1) for exact, layer in tiny.items()}
    wide = _LayerTimer(measured, dtype, exact=False, multiplies=False)
    found = replace(
        measured,
        layer_s=fixed_s[False],
        exact_layer_s=fixed_s[True],
        element_s=max(0.0, wide.left_over(MANY) - wide.left_over(1)) / (MANY - 1) / wide.outputs,
        cached_share=min(1.0, tiny[False].left_over(1, cold=False) / max(1e-9, fixed_s[False])),
        frame_s=max(0.0, cold_s - layers * frame_layer_s),
        frame_layer_s=frame_layer_s,
        mask_pair_s=max(0.0, small.embed_seconds(MANY) - hot_s) / (MANY * (MANY + small.context)),
        gather_s=small.gather_seconds() / layers,
    )
    return _with_routes(found, dtype)


class _LayerTimer:
    """Measures a decoder layer, with cold or warm caches.

    The layer is small, so its seconds are overhead. If it does not multiply, it is wide and its products are computed
    beforehand, so the seconds left are elementwise work.
    """

    def __init__(self, known: Processor, dtype: torch.dtype, *, exact: bool, multiplies: bool = True) -> None:
        heads = {"num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS, "head_dim": WIDTHS[1]}
        size = SMALL if multiplies else COLUMNS
        config = LlamaConfig(hidden_size=size, intermediate_size=3 * size, num_hidden_layers=1, vocab_size=8, **heads)
        set_attention(config, NAME)
        with torch.device("meta"):
            self._layer = LlamaDecoderLayer(config, 0).to(dtype).eval()
        route(self._layer)
        prove_elements(route_elements(self._layer))
        facts = layer_shape(self._layer, config)
        for module in self._layer.modules():
            if multiplies or not isinstance(module, nn.Linear):
                for name, parameter in module.named_parameters(recurse=False):
                    values = torch.randn(parameter.shape).to(dtype) / 32
                    setattr(module, name, nn.Parameter(values, requires_grad=False))
            else:
                module.forward = partial(  # type: ignore[method-assign]
                    _precomputed, torch.randn(1, MANY, module.out_features).to(dtype)
                )
        self._size, self._dtype, self.outputs = size, dtype, facts.wide
        self._cache = KVCache([(KV_HEADS, WIDTHS[1], WIDTHS[1])], 1, CONTEXT, dtype, exact=exact)
        name = str(dtype).removeprefix("torch.")
        shape = ModelShape((facts,), size, 8, HEADS, KV_HEADS, WIDTHS[1], WIDTHS[1], head_bytes=0, dtype=name)
        bare = replace(known, layer_s=0.0, exact_layer_s=0.0, element_s=0.0)
        cost = model_cost(shape, Hardware(cpu=bare), exact=exact).layers[0]
        self._known = cost.seconds if multiplies else cost.attention.seconds

    def left_over(self, tokens: int, *, cold: bool = True) -> float:
        """Seconds for so many tokens that products and attention do not explain."""
        return max(0.0, self._seconds(tokens, cold=cold) - self._known(WorkItem(0, (0,), (0,), (tokens,))))

    def _seconds(self, tokens: int, *, cold: bool) -> float:
        step = self._cache.step([0], [0], [tokens])
        hidden = torch.randn(1, tokens, self._size).to(self._dtype)
        angles = torch.ones(1, tokens, WIDTHS[1], dtype=self._dtype)
        mask, cache = step.seen(MaskKind()), {cache_argument(self._layer): step}

        def once() -> None:
            with ExactStep() if step.exact else contextlib.nullcontext():
                self._layer(hidden, attention_mask=mask, position_embeddings=(angles, angles), **cache)

        return cold_seconds_of(once) if cold else seconds_of(once)


def _precomputed(product: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """A product ``[1, T, N]`` without computing: the first T rows of one that is given."""
    return product[:, : rows.shape[-2]]


class _SmallModel:
    """A small model whose weights are all zero: they need no reading and cost the same seconds."""

    context = 64  # cached tokens of the row before its new tokens

    def __init__(self, folder: Path, dtype: torch.dtype) -> None:
        self.model = Model(folder, dtype=dtype)
        _bind_zeros(self.model, self.model.parts(1 << 30))

    def _cache(self, *, exact: bool) -> KVCache:
        return KVCache(self.model.kv_shapes(), 1, CONTEXT, self.model.dtype, exact=exact)

    def embed_seconds(self, tokens: int, timed: Callable[[Work], float] = seconds_of) -> float:
        """Seconds of embedding so many token ids, with positions and masks, in a step that is not exact."""
        cache, ids = self._cache(exact=False), torch.zeros(1, tokens, dtype=torch.long)
        return timed(lambda: self.model.embed(ids, cache.step([0], [self.context], [tokens])))

    def gather_seconds(self) -> float:
        """Seconds of moving an accepted path of eight tokens in the KV cache of all layers."""
        cache = self._cache(exact=True)
        return seconds_of(lambda: cache.gather(0, self.context, range(0, 16, 2)))


# -- experts on demand -----------------------------------------------------------------------------------------


def _with_routes(measured: Processor, dtype: torch.dtype) -> Processor:
    """Add what a layer with experts on demand takes beside other layers' overhead, and products."""
    few, more = (_routed_seconds(number, dtype) for number in (FEW_EXPERTS, MORE_EXPERTS))
    expert_s = max(0.0, more["others"] - few["others"]) / (MORE_EXPERTS - FEW_EXPERTS)
    return replace(
        measured,
        routed_s=max(0.0, few["route"] + few["combine"] - measured.layer_s),
        experts_s=max(0.0, few["one"] - expert_s),
        expert_s=max(0.0, expert_s - 2 * measured.product_s),
    )


def _routed_seconds(top_k: int, dtype: torch.dtype) -> dict[str, float]:
    """Seconds of the steps of a small layer, with cold caches: one of the experts of a token is computed alone."""
    sizes = {"hidden_size": SMALL, "intermediate_size": 3 * SMALL, "num_hidden_layers": 1, "vocab_size": 8}
    heads = {"num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS, "head_dim": WIDTHS[1]}
    experts = {"num_local_experts": 2 * MORE_EXPERTS, "num_experts_per_tok": top_k}
    with tempfile.TemporaryDirectory() as folder:
        MixtralConfig(**sizes, **heads, **experts, architectures=["MixtralForCausalLM"]).save_pretrained(folder)
        model = Model(Path(folder), dtype=dtype, outlined=True)
    routed = model.routed()
    _bind_zeros(model, model.parts(1 << 30, on_demand=routed))
    assert routed.shape is not None, "a layer of this family can be cut into experts"
    slots = [torch.zeros(routed.shape.slot_bytes, dtype=torch.uint8) for _ in range(2 * MORE_EXPERTS)]
    model.read_on_demand(routed).use(slots, torch.zeros(routed.shape.scratch_bytes, dtype=torch.uint8))
    cache = KVCache(model.kv_shapes(), 1, CONTEXT, dtype)
    item = model.embed(torch.zeros(1, 1, dtype=torch.long), cache.step([0], [BEFORE], [1]))

    def chosen() -> list[tuple[int, int]]:
        assert item.routed is not None, "its router has run"
        return [(expert, expert) for expert, _ in item.routed.route]

    return cold_seconds_each(
        {
            "route": lambda: model.route(0, item),
            "one": lambda: model.compute_experts(0, item, chosen()[:1]),
            "others": lambda: model.compute_experts(0, item, chosen()[1:]),
            "combine": lambda: model.combine(0, item),
        }
    )


def _bind_zeros(model: Model, parts: Sequence[Part]) -> None:
    """Give a model weights that are all zero: they need no reading and cost the same seconds."""
    for part in parts:
        buffer, scratch = (torch.zeros(size, dtype=torch.uint8) for size in (part.size, part.scratch_bytes))
        model.bind(replace(part, scratch_at=0), buffer, scratch)


# -- draft trees -----------------------------------------------------------------------------------------------


def measure_trees(dtype: torch.dtype) -> dict[str, float]:
    """Fields of a ``Processor``: seconds per node, per vocabulary entry of a node, or per row."""
    few, many = (_logits(size, dtype) for size in VOCABULARIES)
    entries = BEAMS * (VOCABULARIES[1] - VOCABULARIES[0])
    offers = {noisy: _offer_seconds(many, noisy=noisy) - _offer_seconds(few, noisy=noisy) for noisy in (False, True)}
    levels = _grown(few)[1]
    return {
        "offer_s": max(0.0, offers[False]) / entries,
        "sampled_offer_s": max(0.0, offers[True]) / entries,
        "node_s": seconds_of(lambda: _grown(few)) / (BEAMS * levels),
        "tree_row_s": _row_seconds(few, dtype),
    }


def _logits(vocab: int, dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return (4 * torch.randn(BEAMS, vocab, generator=generator)).to(dtype)


def _offer_seconds(logits: torch.Tensor, *, noisy: bool) -> float:
    """Seconds of finding the children of a level's nodes; ``logits`` ``[beams, vocabulary]``."""
    sampler = Sampler(SamplingParams(temperature=1.0 if noisy else 0.0, seed=1))

    def offer() -> None:
        noise = sampler.noise(list(range(BEAMS)), logits.shape[-1], logits.device) if noisy else None
        best_children(logits, WIDTH, noise, temperature=0.5)

    return seconds_of(offer)


def _grown(logits: torch.Tensor) -> tuple[Tree, int]:
    """A tree grown to its budget, and its number of levels; scores are calibrated, as those of a draft are."""
    calibration, levels = Calibration(), 0
    tree = Tree(DEPTH, log_probability=calibration.log_probability)
    while nodes := tree.frontier(BEAMS):
        tree.feed(nodes)
        tree.slot_parents()
        tokens, scores = best_children(logits[: len(nodes)], WIDTH, temperature=0.5)
        for node, own_tokens, own_scores in zip(nodes, tokens.tolist(), scores.tolist(), strict=True):
            tree.extend(node, own_tokens, own_scores)
        tree.prune(BUDGET)
        tree.probabilities()
        tree.gain_bound(BEAMS)
        levels += 1
    return tree, levels


def _row_seconds(logits: torch.Tensor, dtype: torch.dtype) -> float:
    """Seconds of a row's tree in a pass: make a proposal and a mask, follow the accepted path, keep the rest."""
    tree, _ = _grown(logits)
    size = len(tree)
    cache = KVCache([(1, 8, 8)], 1, BEFORE + 2 * size, dtype, exact=True)

    def once() -> None:
        proposal = tree.proposal()
        parents = [ROOT, *(parent + 1 for parent in proposal.parents)]
        cache.step([0], [BEFORE], [size + 1], [parents]).paths(MaskKind())
        path, emitted = proposal.follow([*proposal.tokens, 0])
        proposal.verdicts(path)
        below = tree.descend(emitted[:1])[1]
        if below is not None:
            below.prune(BUDGET)
            below.probabilities()

    return seconds_of(once)

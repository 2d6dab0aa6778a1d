"""Measures the seconds of draft trees without the models' work: nodes, their children, a tree in a pass. Blocking."""

import torch

from aspec.generation.params import SamplingParams
from aspec.generation.sampler import Sampler
from aspec.models.exact.paths import MaskKind
from aspec.models.kv_cache import KVCache
from aspec.profiling.stopwatch import seconds_of
from aspec.speculation.calibration import Calibration
from aspec.speculation.candidates import best_children
from aspec.speculation.tree import ROOT, Tree

BEAMS, WIDTH = 8, 8  # nodes of a level, and children of each node
BUDGET, DEPTH = 64, 32  # most nodes and most depth of the tree
FEW, MANY = 64, 32768  # entries of a small and a large vocabulary
CONTEXT = 64  # tokens before the tree


def measure_trees(dtype: torch.dtype) -> dict[str, float]:
    """Fields of a ``Processor``: seconds per node, per vocabulary entry of a node, or per row."""
    few, many = _logits(FEW, dtype), _logits(MANY, dtype)
    entries = BEAMS * (MANY - FEW)
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
    cache = KVCache([(1, 8, 8)], 1, CONTEXT + 2 * size, dtype, exact=True)

    def once() -> None:
        proposal = tree.proposal()
        parents = [ROOT, *(parent + 1 for parent in proposal.parents)]
        cache.step([0], [CONTEXT], [size + 1], [parents]).paths(MaskKind())
        path, emitted = proposal.follow([*proposal.tokens, 0])
        proposal.verdicts(path)
        below = tree.descend(emitted[:1])[1]
        if below is not None:
            below.prune(BUDGET)
            below.probabilities()

    return seconds_of(once)

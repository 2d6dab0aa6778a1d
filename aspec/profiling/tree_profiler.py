"""Measures what a tree costs besides the models' own work: its nodes, their children, its place in a pass. Blocking."""

import torch

from aspec.generation.params import SamplingParams
from aspec.generation.sampler import Sampler
from aspec.models.kv_cache import KVCache, MaskKind
from aspec.profiling.stopwatch import seconds_of
from aspec.speculation.calibration import Calibration
from aspec.speculation.candidates import best_children
from aspec.speculation.tree import ROOT, Tree

BEAMS, WIDTH = 8, 8  # nodes of a level, and children that each of them offers
BUDGET, DEPTH = 64, 32  # of the tree
FEW, MANY = 64, 32768  # entries of a vocabulary
CONTEXT = 64  # tokens before the tree


def measure_trees(dtype: torch.dtype) -> dict[str, float]:
    """Fields of a processor, each the seconds of a node, of a vocabulary entry of one, or of a row."""
    few, many = _logits(FEW, dtype), _logits(MANY, dtype)
    entries = BEAMS * (MANY - FEW)
    offers = {noisy: _offer(many, noisy=noisy) - _offer(few, noisy=noisy) for noisy in (False, True)}
    levels = _grown(few)[1]
    return {
        "offer_s": max(0.0, offers[False]) / entries,
        "sampled_offer_s": max(0.0, offers[True]) / entries,
        "node_s": seconds_of(lambda: _grown(few)) / (BEAMS * levels),
        "tree_row_s": _row(few, dtype),
    }


def _logits(vocab: int, dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return (4 * torch.randn(BEAMS, vocab, generator=generator)).to(dtype)


def _offer(logits: torch.Tensor, *, noisy: bool) -> float:
    """The children of a level's nodes."""
    sampler = Sampler(SamplingParams(temperature=1.0 if noisy else 0.0, seed=1))

    def offer() -> None:
        noise = sampler.noise(list(range(BEAMS)), logits.shape[-1], logits.device) if noisy else None
        best_children(logits, WIDTH, noise, temperature=0.5)

    return seconds_of(offer)


def _grown(logits: torch.Tensor) -> tuple[Tree, int]:
    """A tree that is grown to its budget, and its levels; its scores are calibrated, as those of a draft are."""
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


def _row(logits: torch.Tensor, dtype: torch.dtype) -> float:
    """What a row's tree takes in a pass: it becomes a proposal and a mask, is followed, and left at the last draw."""
    tree, _ = _grown(logits)
    size = len(tree)
    cache = KVCache([(1, 8, 8)], 1, CONTEXT + 2 * size, dtype, exact=True)

    def once() -> None:
        proposal = tree.proposal()
        parents = [ROOT, *(parent + 1 for parent in proposal.parents)]
        cache.step([0], [CONTEXT], [size + 1], [parents]).layer_mask(MaskKind())
        path, emitted = proposal.follow([*proposal.tokens, 0])
        proposal.verdicts(path)
        below = tree.descend(emitted[:1])[1]
        if below is not None:
            below.prune(BUDGET)
            below.probabilities()

    return seconds_of(once)

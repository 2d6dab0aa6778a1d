"""A model's frame without its forward, where that is the embedding, rotary angles, layers, a norm and the head.

The forward of transformers takes a millisecond around them, as long as a small draft's layers. Its code is compared
(``hf_compat.known_model``), its first results too: an argument of a layer that is not recognised, or another bit, and
the model's own forward stays.
"""

from collections.abc import Callable, Sequence
from enum import Enum, auto
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from aspec.models.exact.modes import bare_step
from aspec.models.exact.products import RoutedLinear
from aspec.models.hf_compat import known_model, same_code
from aspec.models.kv_cache import StepCache
from aspec.models.probing.facts import LayerFacts

CHILDREN = {"embed_tokens", "layers", "norm", "rotary_emb"}
PLAIN = (bool, int, float, str, type(None))  # arguments that are the same in every step

Arguments = list[dict[str, Any]]
"""Of every layer, the hidden state among them."""


class _Given(Enum):
    """Arguments of a layer that belong to a step."""

    HIDDEN, ANGLES, POSITIONS, STEP, MASK = (auto() for _ in range(5))


class QuickFrame:
    """What the forward of one model does around its layers."""

    def __init__(self, model: PreTrainedModel, base: nn.Module, layers: Sequence[LayerFacts]) -> None:
        self._embed, self._norm, self._angles = (
            base.get_submodule(name) for name in ("embed_tokens", "norm", "rotary_emb")
        )
        self._head, self._layers = model.get_submodule("lm_head"), layers
        self._named: Arguments | None = None  # of every layer, by what is given; None: not known
        self._refused = False  # the layers are given something else
        self._same_head: bool | None = None  # whether the logits are those of the forward; None: not known

    def prologue(self, ids: torch.Tensor, positions: torch.Tensor, step: StepCache) -> Arguments | None:
        """Every layer's arguments for tokens [B, T]; None before they are known."""
        if self._named is None:
            return None
        with bare_step(step):
            hidden = self._embed(ids)
            angles = self._angles(hidden, position_ids=positions)
        given = {
            _Given.HIDDEN: hidden,
            _Given.ANGLES: angles,
            _Given.POSITIONS: positions,
            _Given.STEP: step,
            _Given.MASK: None,
        }
        return [
            {name: given[own] if isinstance(own, _Given) else own for name, own in layer.items()}
            for layer in self._named
        ]

    def learn(self, calls: Arguments, ids: torch.Tensor, positions: torch.Tensor, step: StepCache) -> None:
        """Recognise the arguments that the model's own forward has given its layers."""
        if self._refused or self._named is not None:
            return
        named = [self._name(*own, positions, step) for own in zip(self._layers, calls, strict=True)]
        if all(own is not None for own in named):
            self._named = [own for own in named if own is not None]
            again = self.prologue(ids, positions, step)
            if again is None or not all(map(self._equal, again, calls)):
                self._named = None
        self._refused = self._named is None

    def epilogue(self, hidden: torch.Tensor, step: StepCache, forward: Callable[[], torch.Tensor]) -> torch.Tensor:
        """Logits [B, T, V] from the hidden state after the last layer; ``forward`` has the model compute them."""
        if self._same_head is False:
            return forward()
        with bare_step(step):
            made: torch.Tensor = self._head(self._norm(hidden))
        if self._same_head is None and not made.is_meta:
            expected = forward()
            self._same_head = torch.equal(made, expected)
            return expected
        return made

    def _name(
        self, layer: LayerFacts, arguments: dict[str, Any], positions: torch.Tensor, step: StepCache
    ) -> dict[str, Any] | None:
        """A layer's arguments by what is given; None if one of them is something else."""
        found: dict[str, Any] = {}
        for name, own in arguments.items():
            if name == layer.parameters[0]:
                found[name] = _Given.HIDDEN
            elif name in (layer.mask_argument, "attention_mask"):
                found[name] = _Given.MASK  # ``layer_arguments.py`` puts the step's own in its place
            elif own is positions or own is step:
                found[name] = _Given.POSITIONS if own is positions else _Given.STEP
            elif isinstance(own, tuple) and all(isinstance(part, torch.Tensor) for part in own):
                found[name] = _Given.ANGLES
            elif isinstance(own, PLAIN):
                found[name] = own
            else:
                return None
        return found

    def _equal(self, made: dict[str, Any], expected: dict[str, Any]) -> bool:
        """Whether the tensors among a layer's arguments have the same bits."""
        tensors = ((made[name], own) for name, own in expected.items() if made[name] is not None)
        pairs = ((one, other) if isinstance(one, tuple) else ((one,), (other,)) for one, other in tensors)
        return all(
            len(ones) == len(others)
            and all(torch.equal(*pair) for pair in zip(ones, others, strict=True) if isinstance(pair[0], torch.Tensor))
            for ones, others in pairs
        )


def quick_frame(model: PreTrainedModel, layers: Sequence[LayerFacts]) -> QuickFrame | None:
    """The quick frame of a model on a CPU whose code allows it; None for others."""
    base, head, known = model._modules.get("model"), model._modules.get("lm_head"), known_model()
    if (
        base is None
        or head is None
        or base._modules.keys() != CHILDREN
        or model._modules.keys() != {"model", "lm_head"}
    ):
        return None
    same = same_code(type(model).forward, known.forward)
    same = same and any(same_code(type(base).forward, own) for own in known.bases)
    plain = type(base.get_submodule("embed_tokens")) is nn.Embedding and isinstance(head.forward, RoutedLinear)
    return QuickFrame(model, base, layers) if same and plain else None

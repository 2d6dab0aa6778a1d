"""The frame of a model: its own forward with recorder stubs in place of its layers.

The prologue gives every layer's arguments, the epilogue computes logits from a hidden state.
"""

import contextlib
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import PreTrainedModel

from aspec.errors import InternalError
from aspec.io.pinned import upload
from aspec.models.exact.modes import matmul_mode
from aspec.models.hf_compat import cache_argument
from aspec.models.kv_cache import StepCache
from aspec.models.layer_arguments import frame_mask
from aspec.models.probing.facts import ModelFacts
from aspec.models.quick_frame import quick_frame
from aspec.models.skeleton import find_layers, uses_cache
from aspec.models.weights.touched import same_memory


class _Stop(Exception):
    """Not an error: ends the frame's forward after the last layer."""


@dataclass(slots=True)
class _Tape:
    """State of the frame's stubs: they record the calls of the prologue, or return ``final`` for the epilogue."""

    final: torch.Tensor | None = None
    calls: list[dict[str, Any]] = field(default_factory=list)
    returned: torch.Tensor | None = None


class Frame:
    """Runs ``model``, whose layers it replaces; its state of a call is of the calling thread."""

    def __init__(self, model: PreTrainedModel, facts: ModelFacts) -> None:
        self.model = model
        self._facts = facts
        self._cache_argument, self._uses_cache = cache_argument(model), uses_cache(model.config)
        self._quick = quick_frame(model, facts.layers)
        self._local = threading.local()  # .tape: for the forward on this thread
        for index, layer in enumerate(find_layers(model)[1]):
            layer.forward = self._stub(index)

    def prologue(self, ids: torch.Tensor, positions: torch.Tensor, step: StepCache) -> list[dict[str, Any]]:
        """Every layer's arguments for tokens [B, T], the hidden state among them."""
        quick = self._quick if ids.is_cpu else None
        if quick is not None and (calls := quick.prologue(ids, positions, step)) is not None:
            return calls
        tape = _Tape()
        with contextlib.suppress(_Stop):
            self._run(tape, ids, positions, step)
        if quick is not None:
            quick.learn(tape.calls, ids, positions, step)
        return tape.calls

    def epilogue(
        self,
        hidden: torch.Tensor,
        ids: torch.Tensor,
        positions: torch.Tensor,
        step: StepCache,
    ) -> torch.Tensor:
        """Logits [B, T, V] from the hidden state after the last layer."""

        def forward() -> torch.Tensor:
            logits: torch.Tensor = self._run(_Tape(final=hidden), ids, positions, step).logits
            return logits

        return forward() if self._quick is None or not ids.is_cpu else self._quick.epilogue(hidden, step, forward)

    def _run(self, tape: _Tape, ids: torch.Tensor, positions: torch.Tensor, step: StepCache) -> Any:
        """Run the model's own forward; the stubs of its layers use ``tape``."""
        mask = frame_mask(self._facts, step, ids.shape[1])
        mask = upload(mask, positions.device) if step.offloaded else mask
        self._local.tape, cache = tape, {self._cache_argument: step, "use_cache": self._uses_cache}
        try:
            with matmul_mode(step):
                return self.model(input_ids=ids, position_ids=positions, attention_mask=mask, **cache)
        finally:
            del self._local.tape

    def _stub(self, index: int) -> Callable[..., object]:
        """The forward of the frame's layer ``index``: it records its call, or returns the final hidden state."""
        parameters, result = self._facts.layers[index].parameters, self._facts.result
        last = len(self._facts.layers) - 1

        def forward(*args: Any, **kwargs: Any) -> object:
            tape: _Tape = self._local.tape
            if tape.final is not None:
                return result(tape.final)
            arguments = dict(zip(parameters, args, strict=False)) | kwargs
            hidden = arguments[parameters[0]]
            if tape.returned is not None and not same_memory(hidden, tape.returned):
                raise InternalError(f"layer {index} does not receive the tensor that layer {index - 1} returned")
            tape.calls.append(arguments)
            tape.returned = hidden
            if index == last:
                raise _Stop
            return result(hidden)

        return forward

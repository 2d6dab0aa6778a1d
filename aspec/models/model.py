"""A decoder-only transformers model, driven layer by layer with weights bound from byte buffers.

The maths is transformers' own. Two skeletons on the meta device: the *frame* runs the model's own forward with
permanent recorder stubs in place of its layers, which yields every layer's arguments (prologue) and turns a hidden
state into logits (epilogue); the *layers* of the other skeleton run with parameters that are views of slots.
Nothing is patched while it runs, and whatever belongs to a work item lives in its ``Activation``, so items may be
in flight interleaved. Callers run everything under ``torch.inference_mode``.
"""

import contextlib
import reprlib
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedConfig

from aspec.errors import CheckpointError, InternalError
from aspec.io.checkpoint import Checkpoint, has_weights, outline
from aspec.io.upload import upload
from aspec.models.binding import Binder
from aspec.models.exact import matmul_mode
from aspec.models.hf_compat import cache_argument, tied_weights
from aspec.models.kv_cache import KVShape, StepCache
from aspec.models.kv_offload import HostAttention
from aspec.models.parts import Part, plan_parts
from aspec.models.probe import OffloadFacts, examine, examine_offload, examine_split, same_memory
from aspec.models.skeleton import build_skeleton, find_layers, first_line, load_config, max_context
from aspec.models.split_layer import Split, attend_to, finish, project, to_host
from aspec.models.tensor_map import map_tensors


@dataclass(slots=True)
class Activation:
    """A work item on its way through the layers; ``hidden`` [B, T, H] moves on, the rest stays."""

    step: StepCache
    input_ids: torch.Tensor  # [B, T] int64
    hidden: torch.Tensor
    arguments: list[dict[str, Any]]  # per layer, without the hidden state
    split: Split | None = None  # of a layer that is split, between ``project`` and ``finish``


class _Stop(Exception):
    """Not an error: ends the frame's forward behind the last layer."""


@dataclass(slots=True)
class _Tape:
    """What the frame's stubs do: record the prologue's calls, or hand a final hidden state to the epilogue."""

    final: torch.Tensor | None = None
    calls: list[dict[str, Any]] = field(default_factory=list)
    returned: torch.Tensor | None = None


class Model:
    """``folder``'s model. No weight is read here: ``plan`` tells the parts, ``bind`` points the model at them.

    ``outlined``: where the folder has a configuration and no weights, sizes are those that a checkpoint would have.
    Raises CheckpointError where the folder is damaged or config.json and weights do not belong together, and
    UnsupportedModelError where the architecture cannot be run layer by layer; both before any allocation.
    """

    def __init__(
        self,
        folder: Path,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str = "cpu",
        outlined: bool = False,
    ) -> None:
        self.folder = Path(folder)
        self.device = torch.device(device)
        self.config: PreTrainedConfig = load_config(self.folder)
        self.dtype = _compute_dtype(dtype, self.config, self.device)
        self._facts = examine(self.config, self.dtype)
        missing = outlined and not has_weights(self.folder)
        self.checkpoint = Checkpoint(self.folder, {}, 0, ()) if missing else Checkpoint.open(self.folder)
        self._layers_model = build_skeleton(self.config, self.dtype, self.device)
        if missing:
            tied = tied_weights(self._layers_model)
            stored = {name: own for name, own in self._layers_model.state_dict().items() if name not in tied}
            self.checkpoint = outline(self.folder, stored)
        self._layers_name, self._layers = find_layers(self._layers_model)
        self._tensors = map_tensors(self._layers_model, self.checkpoint)
        self._frame = build_skeleton(self.config, self.dtype, self.device)
        self._cache_argument = cache_argument(self._frame)
        for index, layer in enumerate(find_layers(self._frame)[1]):
            layer.forward = self._stub(index)
        self._binder = Binder(self._frame, self._layers_model, self._layers)
        self._local = threading.local()  # .tape: of the frame's forward that runs on this thread
        text = self.config.get_text_config()
        self.num_layers = len(self._layers)
        self.vocab_size = int(text.vocab_size)
        self.max_context = max_context(text)
        self.end_ids = _end_ids(self.folder, text)

    @property
    def unexpected(self) -> tuple[str, ...]:
        """Stored tensors that the model has no use for: worth a warning."""
        return self._tensors.unexpected

    def parts(self, max_part_bytes: int, alignment: int = 1) -> tuple[Part, ...]:
        """The parts in the order of use, the resident rest (layer -1) first; see ``plan_parts``."""
        return plan_parts(self._tensors, self._layers_name, max_part_bytes, alignment)

    def kv_shapes(self, *, offloaded: bool = False) -> list[KVShape | None]:
        """Per layer (heads, key width, value width); None where a layer uses what another one stored.

        ``offloaded``: of a cache on the other side of a link, which keeps what is attended to (``offload.py``).
        """
        return list(self.offload.kept) if offloaded else [layer.kv for layer in self._facts.layers]

    @property
    def layer_modules(self) -> tuple[torch.nn.Module, ...]:
        """The decoder layers, parameters on meta where no part is bound: what their shapes are."""
        return tuple(self._layers)

    # -- weights ---------------------------------------------------------------------------------------------

    def bind(self, part: Part, buffer: torch.Tensor, scratch: torch.Tensor | None = None) -> None:
        """Point the part's parameters at ``buffer`` (uint8, ``part.size`` bytes, page-aligned); cheap when repeated.

        What must be converted is converted now, into bytes ``part.scratch_at ..`` of ``scratch`` (uint8), which
        must keep them while the part is in use: a layer's parts may share one scratch, and layers may take turns in
        it, but a part that stays bound needs its own (``replace(part, scratch_at=0)`` and ``part.scratch_bytes``).
        """
        self._binder.bind(part, buffer, scratch)

    def unbind(self, part: Part) -> None:
        """Put the part's parameters back on meta: running its layer before the next ``bind`` is an InternalError."""
        self._binder.unbind(part)

    def forget(self, parts: tuple[Part, ...] = ()) -> None:
        """Unbind these parts and drop all views of buffers, so that their memory can be given back."""
        for part in parts:
            self._binder.unbind(part)
        self._binder.forget()

    # -- forward ---------------------------------------------------------------------------------------------

    def embed(self, input_ids: torch.Tensor, step: StepCache) -> Activation:
        """The prologue: hidden state and every layer's arguments for ``input_ids`` [B, T] int64."""
        if input_ids.shape != step.position_ids.shape:
            raise InternalError(f"tokens {list(input_ids.shape)} do not fit positions {list(step.position_ids.shape)}")
        tape = _Tape()
        with contextlib.suppress(_Stop):
            self._run_frame(
                tape, input_ids, self._beside(step, step.position_ids), self._beside(step, step.mask()), step
            )
        hidden = tape.calls[0][self._facts.layers[0].parameters[0]]
        for facts, arguments in zip(self._facts.layers, tape.calls, strict=True):
            # offloaded: the mask is where the attention is, and what stands for it here is looked at by nobody
            arguments[facts.mask_argument] = () if step.offloaded else step.layer_mask(facts.mask)
            del arguments[facts.parameters[0]]
        return Activation(step, input_ids, hidden, tape.calls)

    def layer(self, index: int, activation: Activation) -> None:
        """Run one layer on an item; its parameters must be bound."""
        if activation.step.offloaded:
            raise InternalError("a layer whose KV is in host memory runs in one piece")
        self._binder.check(index)
        with matmul_mode(activation.step):
            activation.hidden = self._forward(index, activation)

    @cached_property
    def split_bytes(self) -> tuple[int, int]:
        """Bytes that an item holds between ``project`` and ``finish``, per token and per slot of its rows.

        Raises UnsupportedModelError where a layer's attention cannot run apart from the rest of it.
        """
        return examine_split(self.config, self.dtype, self._facts)

    @cached_property
    def offload(self) -> OffloadFacts:
        """What its split layers are beside KV in host memory. Raises UnsupportedModelError as ``split_bytes`` does."""
        return examine_offload(self.config, self.dtype, self._facts)

    def project(self, index: int, activation: Activation) -> None:
        """``layer`` in three steps, to the same bits: this one goes up to the attention; keys and values are stored.

        The parameters must be bound from here to the end of ``finish``. Beside KV in host memory there are five:
        ``send`` and ``bring_back`` are around the attention, which stores.
        """
        self._binder.check(index)
        with matmul_mode(activation.step):
            activation.split = project(partial(self._forward, index, activation), activation.hidden)
        if activation.step.offloaded:
            facts = self._facts.layers[index]
            to_host(activation.split, activation.step, index, facts.mask, stores=facts.kv is not None)

    @staticmethod
    def send(activation: Activation) -> None:
        """To the host: what ``project`` has left for an attention there."""
        _crossing(activation).send()

    @staticmethod
    def attend(activation: Activation) -> None:
        """The attention of the layer at which ``project`` left an item, on any thread."""
        assert activation.split is not None
        attend_to(activation.split)

    @staticmethod
    def bring_back(activation: Activation) -> None:
        """From the host: what an attention there has made."""
        assert activation.split is not None
        activation.split.output = _crossing(activation).bring_back()

    def finish(self, index: int, activation: Activation) -> None:
        """What follows the attention of a layer."""
        assert activation.split is not None
        with matmul_mode(activation.step):
            activation.hidden = finish(partial(self._forward, index, activation), activation.split)
        activation.split = None

    def _forward(self, index: int, activation: Activation) -> torch.Tensor:
        """The hidden state that a layer makes of an item's."""
        output = self._layers[index](activation.hidden, **activation.arguments[index])
        hidden: torch.Tensor = output[0] if isinstance(output, tuple) else output
        return hidden

    def head(self, activation: Activation, keep: torch.Tensor | None = None) -> torch.Tensor:
        """Logits [B, N, V] at the columns ``keep`` [B, N] int64 of every row; all columns without it."""
        step, hidden, ids = activation.step, activation.hidden, activation.input_ids
        positions, mask = self._beside(step, step.position_ids), step.mask()
        if keep is not None:
            rows = torch.arange(keep.shape[0], device=keep.device)[:, None]
            hidden, ids, positions = (
                hidden[..., rows, keep, :],
                ids.gather(1, keep),
                positions.gather(1, keep),
            )
            mask = mask[:, :, : keep.shape[1]]  # nothing attends any more
        logits: torch.Tensor = self._run_frame(
            _Tape(final=hidden), ids, positions, self._beside(step, mask), step
        ).logits
        if logits.is_meta:
            raise InternalError("the head runs while the resident rest of the model is not bound")
        return logits

    def _beside(self, step: StepCache, tensor: torch.Tensor) -> torch.Tensor:
        """What a step tells, on the device of the layers: a cache in host memory tells it there."""
        return upload(tensor, self.device) if step.offloaded else tensor

    def _run_frame(
        self, tape: _Tape, ids: torch.Tensor, positions: torch.Tensor, mask: torch.Tensor, step: StepCache
    ) -> Any:
        """The model's own forward around stubs that follow ``tape``."""
        self._local.tape, cache = tape, {self._cache_argument: step}
        try:
            with matmul_mode(step):
                return self._frame(input_ids=ids, position_ids=positions, attention_mask=mask, use_cache=True, **cache)
        finally:
            del self._local.tape

    def _stub(self, index: int) -> Callable[..., object]:
        """The frame's layer ``index``: records its call, or passes the final hidden state on."""
        parameters, in_tuples = self._facts.layers[index].parameters, self._facts.in_tuples
        last = len(self._facts.layers) - 1

        def forward(*args: Any, **kwargs: Any) -> object:
            tape: _Tape = self._local.tape
            if tape.final is not None:
                return (tape.final,) if in_tuples else tape.final
            arguments = dict(zip(parameters, args, strict=False)) | kwargs
            hidden = arguments[parameters[0]]
            if tape.returned is not None and not same_memory(hidden, tape.returned):
                raise InternalError(f"layer {index} does not receive what layer {index - 1} returned")
            tape.calls.append(arguments)
            tape.returned = hidden
            if index == last:
                raise _Stop
            return (hidden,) if in_tuples else hidden

        return forward


def _crossing(activation: Activation) -> HostAttention:
    split = activation.split
    if split is None or split.crossing is None:
        raise InternalError("nothing crosses to the host: the KV cache is beside the layers")
    return split.crossing


def generation_defaults(folder: Path) -> dict[str, Any]:
    """What the checkpoint's generation_config.json sets, empty without one. Raises CheckpointError if it is damaged."""
    path = folder / "generation_config.json"
    if not path.is_file():
        return {}
    try:
        return dict(GenerationConfig.from_pretrained(folder).to_diff_dict())
    except Exception as error:  # its loader and its checks may raise anything for a value they do not know
        raise CheckpointError(
            f"{path}: expected generation defaults in JSON, found {first_line(error)}. Correct or remove the file."
        ) from error


def _end_ids(folder: Path, text: PreTrainedConfig) -> frozenset[int]:
    """Tokens that end a sequence, from the generation defaults or the configuration."""
    found = generation_defaults(folder).get("eos_token_id", getattr(text, "eos_token_id", None))
    ids = [token for token in (found if isinstance(found, list) else [found]) if token is not None]
    if not all(isinstance(token, int) for token in ids):
        raise CheckpointError(
            f"{folder}: expected eos_token_id to be a token id or a list of them, found {reprlib.repr(found)}. Correct "
            f"generation_config.json or config.json."
        )
    return frozenset(ids)


def _compute_dtype(wished: torch.dtype | None, config: PreTrainedConfig, device: torch.device) -> torch.dtype:
    """What was asked for, or the checkpoint's own; half precision becomes bfloat16 on a CPU, which is slow at it."""
    dtype = wished or (config.dtype if isinstance(config.dtype, torch.dtype) else torch.float32)
    return torch.bfloat16 if dtype == torch.float16 and device.type == "cpu" else dtype

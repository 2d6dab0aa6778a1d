"""A decoder-only transformers model, driven layer by layer with weights bound from byte buffers.

The maths is transformers' own. Two skeletons on the meta device: the *frame* runs the model's own forward with
permanent recorder stubs in place of its layers, which yields every layer's arguments (prologue) and turns a hidden
state into logits (epilogue); the *layers* of the other skeleton run with parameters that are views of slots.
Nothing is patched while it runs, and whatever belongs to a work item lives in its ``Activation``.
"""

import contextlib
import copy
import inspect
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedModel, initialization
from transformers.cache_utils import Cache

from aspec import attention
from aspec.errors import CheckpointError, InternalError, UnsupportedModelError
from aspec.families import LAYER_TYPES, REFUSED_KEYS, REFUSED_ROPE, family_of
from aspec.io.checkpoint import Checkpoint
from aspec.io.layout import Binding, Part, convert, plan_parts
from aspec.kv import KVShape, MaskKind, StepCache

Assignment = tuple[dict[str, Any], str, torch.Tensor]
"""A module's table of parameters or buffers, the name in it, and the tensor that belongs there."""


@dataclass(slots=True)
class Activation:
    """A work item on its way through the layers; ``hidden`` [B, T, H] moves on, the rest stays."""

    step: StepCache
    input_ids: torch.Tensor  # [B, T] int64
    hidden: torch.Tensor
    arguments: list[dict[str, Any]]  # per layer, without the hidden state


class _Stop(Exception):
    pass


@dataclass(slots=True)
class _Tape:
    """What the frame's stubs do: record the prologue's calls, or hand a final hidden state to the epilogue."""

    final: torch.Tensor | None = None
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = field(default_factory=list)
    returned: torch.Tensor | None = None


class Model:
    """``folder``'s model. No weight is read here: ``plan`` tells the parts, ``bind`` points the model at them."""

    def __init__(self, folder: Path, *, dtype: torch.dtype | None = None, device: str = "cpu") -> None:
        self.folder = folder
        self.device = torch.device(device)
        self.config = load_config(folder)
        self.dtype = dtype or _compute_dtype(self.config, device)
        self.checkpoint = Checkpoint.open(folder)
        self._layers_model = _skeleton(self.config, self.dtype)
        self._layers_name, self._layers = find_layers(self._layers_model)
        _refuse_modules(self._layers_model)
        self._kv_shapes, self._in_tuples = _probe(self.config, self.dtype)
        self._frame = _skeleton(self.config, self.dtype)
        self._tape = _Tape()
        for index, layer in enumerate(find_layers(self._frame)[1]):
            layer.forward = self._stub(index)
        self._signature = inspect.signature(type(self._layers[0]).forward)
        self._masks = _mask_kinds(self.config, len(self._layers))
        self._assignments: dict[tuple[int, int], list[Assignment]] = {}
        text = self.config.get_text_config()
        self.num_layers = len(self._layers)
        self.vocab_size = int(text.vocab_size)
        self.max_context: int | None = getattr(text, "max_position_embeddings", None)
        self.end_ids = _end_ids(folder, self.config)

    def plan(self, max_part_bytes: int) -> tuple[Part, ...]:
        """The parts, in the order of use. Raises CheckpointError where the stored tensors are not this model."""
        return plan_parts(self._layers_model, self._layers_name, self.checkpoint, max_part_bytes)

    def kv_shapes(self) -> list[KVShape | None]:
        """Per layer (heads, key width, value width); None where a layer uses another layer's."""
        return list(self._kv_shapes)

    # -- weights ---------------------------------------------------------------------------------------------

    def bind(self, part: Part, buffer: torch.Tensor, scratch: torch.Tensor | None = None) -> None:
        """Point the part's parameters at ``buffer`` (uint8, at least ``part.size``); microseconds when repeated.

        ``scratch`` (uint8, at least ``part.scratch_bytes``) receives what has to be converted.
        """
        key = (part.index, buffer.data_ptr())
        if key not in self._assignments:
            self._assignments[key] = [self._assignment(part, binding, buffer) for binding in part.bindings]
        for table, name, tensor in self._assignments[key]:
            table[name] = tensor
        if part.conversions:
            if scratch is None:
                raise InternalError(f"part {part.index} needs {part.scratch_bytes} bytes of scratch")
            self._convert(part, buffer, scratch)

    def _convert(self, part: Part, buffer: torch.Tensor, scratch: torch.Tensor) -> None:
        for conversion in part.conversions:
            stored = [(source.target, pattern, _view(buffer, source)) for source, pattern in conversion.sources]
            if conversion.converter is None:
                made = {target.target: stored[0][2] for target in conversion.targets}
            else:
                made = convert(conversion.converter, conversion.name, stored, self._layers_model)
            for target in conversion.targets:
                place = _view(scratch, target)
                place.copy_(made.get(target.target, next(iter(made.values()))))
                table, name, tensor = self._assign(part, target.target, place)
                table[name] = tensor

    def _assignment(self, part: Part, binding: Binding, buffer: torch.Tensor) -> Assignment:
        return self._assign(part, binding.target, _view(buffer, binding))

    def _assign(self, part: Part, target: str, tensor: torch.Tensor) -> Assignment:
        """Where a tensor goes: the rest lives in the frame, layers in the layers' skeleton."""
        model = self._frame if part.layer < 0 else self._layers_model
        path, _, name = target.rpartition(".")
        module = model.get_submodule(path)
        if name in module._parameters:
            return module._parameters, name, nn.Parameter(tensor, requires_grad=False)
        return module._buffers, name, tensor

    # -- forward ---------------------------------------------------------------------------------------------

    def embed(self, input_ids: torch.Tensor, step: StepCache) -> Activation:
        """The prologue: hidden state and every layer's arguments for ``input_ids`` [B, T] int64."""
        self._tape = tape = _Tape()
        with contextlib.suppress(_Stop):
            self._frame(
                input_ids=input_ids,
                position_ids=step.position_ids,
                attention_mask=step.mask(MaskKind()),
                past_key_values=step,
                use_cache=True,
            )
        arguments = [self._arguments(i, *call, step) for i, call in enumerate(tape.calls)]
        hidden = arguments[0]["hidden_states"]
        for kwargs in arguments:
            del kwargs["hidden_states"]
        return Activation(step, input_ids, hidden, arguments)

    def layer(self, index: int, activation: Activation) -> None:
        """Run one layer on an item; its parameters must be bound."""
        output = self._layers[index](activation.hidden, **activation.arguments[index])
        activation.hidden = output[0] if isinstance(output, tuple) else output

    def head(self, activation: Activation, keep: torch.Tensor | None = None) -> torch.Tensor:
        """Logits [B, N, V] at the columns ``keep`` [B, N] int64 of every row; all columns without it."""
        step, hidden, ids = activation.step, activation.hidden, activation.input_ids
        positions, mask = step.position_ids, step.mask(MaskKind())
        if keep is not None:
            rows = torch.arange(keep.shape[0])[:, None]
            hidden, ids, positions = (
                hidden[..., rows, keep, :],
                ids.gather(1, keep),
                positions.gather(1, keep),
            )
            mask = mask[:, :, : keep.shape[1]]
        self._tape = _Tape(final=hidden)
        output = self._frame(
            input_ids=ids, position_ids=positions, attention_mask=mask, past_key_values=step, use_cache=True
        )
        logits: torch.Tensor = output.logits
        return logits

    def _stub(self, index: int) -> Any:
        """The frame's layer ``index``: records its call, or passes the final hidden state on."""

        def forward(*args: Any, **kwargs: Any) -> Any:
            tape = self._tape
            if tape.final is not None:
                return (tape.final,) if self._in_tuples else tape.final
            hidden = args[0] if args else kwargs["hidden_states"]
            if tape.returned is not None and not _same(hidden, tape.returned):
                raise InternalError(f"layer {index} does not receive what layer {index - 1} returned")
            tape.calls.append((args, kwargs))
            tape.returned = hidden
            if len(tape.calls) == len(self._layers):
                raise _Stop
            return (hidden,) if self._in_tuples else hidden

        return forward

    def _arguments(self, index: int, args: tuple[Any, ...], kwargs: dict[str, Any], step: StepCache) -> dict[str, Any]:
        """A recorded call by name, with the layer's own mask."""
        bound = self._signature.bind(self._layers[index], *args, **kwargs).arguments
        named = dict(list(bound.items())[1:])
        named |= named.pop("kwargs", {})
        first = next(iter(named))
        named["hidden_states"] = named.pop(first)
        if "attention_mask" in named:
            named["attention_mask"] = step.mask(self._masks[index])
        return named


def load_config(folder: Path) -> Any:
    """The model's configuration. Raises CheckpointError or UnsupportedModelError in one paragraph."""
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"{folder} has no config.json: expected a model folder in transformers' format.")
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (ValueError, KeyError, OSError) as error:
        raise UnsupportedModelError(
            f"{folder / 'config.json'}: the architecture is not known to this version of transformers, or the file is "
            f"damaged ({str(error).splitlines()[0]}). Update transformers or choose another model."
        ) from error
    _refuse_config(folder, config)
    return config


def _refuse_config(folder: Path, config: Any) -> None:
    """What can be refused by the configuration alone."""
    where = f"{folder / 'config.json'}: {config.model_type}"
    text = config.get_text_config()
    reasons = [reason for key, reason in REFUSED_KEYS.items() if getattr(config, key, None) or getattr(text, key, None)]
    if (family := family_of(config.model_type)).refused:
        reasons.append(family.refused)
    if text is not config:
        reasons.append("a multimodal model; only text-only checkpoints are supported")
    kinds = set(getattr(text, "layer_types", None) or ()) - set(LAYER_TYPES)
    if kinds:
        reasons.append(f"its {', '.join(sorted(kinds))} layers keep recurrent state, which cannot be rolled back")
    rope = getattr(text, "rope_parameters", None) or {}
    for entry in [rope, *(value for value in rope.values() if isinstance(value, dict))]:
        kind = entry.get("rope_type", entry.get("type"))
        if isinstance(kind, str) and kind in REFUSED_ROPE:
            reasons.append(f"rotary positions of type {kind}: {REFUSED_ROPE[kind]}")
    if type(config) not in AutoModelForCausalLM._model_mapping:
        reasons.append("there is no decoder-only language model of this type")
    if reasons:
        raise UnsupportedModelError(f"{where} is not supported: {'; '.join(reasons)}.")


def _refuse_modules(model: PreTrainedModel) -> None:
    if not model._supports_attention_backend:
        raise UnsupportedModelError(
            f"{model.config.model_type} is not supported: its attention does not take a registered attention function."
        )


def find_layers(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """The decoder layers by name. Raises UnsupportedModelError if no module list has one module per layer."""
    count = model.config.get_text_config().num_hidden_layers
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return name, module
    raise UnsupportedModelError(f"{model.config.model_type} is not supported: found no list of {count} decoder layers.")


def _skeleton(config: Any, dtype: torch.dtype) -> PreTrainedModel:
    """The model with parameters on meta and its computed buffers (rotary frequencies, scales) real."""
    model = _on_meta(config, dtype)
    for parameter in model.parameters():
        parameter._is_hf_initialized = True
    for name, buffer in list(model.named_buffers()):
        path, _, last = name.rpartition(".")
        module = model.get_submodule(path)
        if last in module._non_persistent_buffers_set:
            module._buffers[last] = torch.empty_like(buffer, device="cpu")
        else:
            buffer._is_hf_initialized = True
    model.initialize_weights()
    return model


def _on_meta(config: Any, dtype: torch.dtype) -> PreTrainedModel:
    config = copy.deepcopy(config)
    config._attn_implementation = attention.NAME
    config._experts_implementation = "eager"
    try:
        with torch.device("meta"), initialization.no_init_weights():
            model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype)
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise UnsupportedModelError(
            f"{config.model_type} cannot be built from its configuration: {str(error).splitlines()[0]}."
        ) from error
    return model.eval()


class _Probe(Cache):  # type: ignore[misc]  # transformers is untyped
    """A cache that notes the shapes a layer wants to store, and leaves the layer at once."""

    def __init__(self) -> None:
        super().__init__(layers=[])
        self.shapes: dict[int, KVShape] = {}

    def update(self, key: torch.Tensor, value: torch.Tensor, layer_idx: int, *_: object, **__: object) -> None:
        self.shapes[layer_idx] = (key.shape[1], key.shape[3], value.shape[3])
        raise _Stop

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0


def _probe(config: Any, dtype: torch.dtype) -> tuple[list[KVShape | None], bool]:
    """Run the model on meta: what every layer stores, and whether layers answer in tuples.

    Raises UnsupportedModelError where layers pass more than a hidden state, or keep state of another kind.
    """
    shapes, error = _probe_once(config, dtype, in_tuples=False)
    in_tuples = error is not None
    if in_tuples:
        shapes, error = _probe_once(config, dtype, in_tuples=True)
    if error is not None:
        raise UnsupportedModelError(
            f"{config.model_type} is not supported: its layers exchange more than a hidden state "
            f"({type(error).__name__}: {(str(error).splitlines() or [''])[0]})."
        )
    if not any(shapes) or (None in shapes and not family_of(config.model_type).shares_kv):
        raise UnsupportedModelError(
            f"{config.model_type} is not supported: some of its layers keep no keys and values, so their state could "
            f"not be rolled back when a proposal is refused."
        )
    return shapes, in_tuples


def _probe_once(config: Any, dtype: torch.dtype, in_tuples: bool) -> tuple[list[KVShape | None], Exception | None]:
    model = _on_meta(config, dtype)
    layers = find_layers(model)[1]
    probe = _Probe()
    shape: list[torch.Size] = []

    def watched(original: Any) -> Any:
        def forward(*args: Any, **kwargs: Any) -> Any:
            hidden = args[0] if args else kwargs["hidden_states"]
            shape.append(hidden.shape)
            with contextlib.suppress(_Stop):
                original(*args, **kwargs)
            if shape[0] != hidden.shape:
                raise InternalError(f"the hidden state changed its shape from {shape[0]} to {hidden.shape}")
            return (hidden,) if in_tuples else hidden

        return forward

    for layer in layers:
        layer.forward = watched(layer.forward)
    tokens = torch.zeros(2, 4, dtype=torch.long, device="meta")
    mask = torch.ones(2, 1, 4, 4, dtype=torch.bool, device="meta")
    try:
        model(input_ids=tokens, position_ids=tokens, attention_mask=mask, past_key_values=probe, use_cache=True)
    except Exception as error:
        return [], error
    return [probe.shapes.get(i) for i in range(len(layers))], None


def _mask_kinds(config: Any, num_layers: int) -> list[MaskKind]:
    """The mask of every layer, by its type."""
    text = config.get_text_config()
    window = getattr(text, "sliding_window", None)
    kinds = {
        "full_attention": MaskKind(),
        "sliding_attention": MaskKind(window=window),
        "chunked_attention": MaskKind(chunk=getattr(text, "attention_chunk_size", None)),
    }
    uniform = "sliding_attention" if window else "full_attention"
    types: Sequence[str] = getattr(text, "layer_types", None) or [uniform] * num_layers
    return [kinds[kind] for kind in types]


def _end_ids(folder: Path, config: Any) -> frozenset[int]:
    """Tokens that end a sequence, from the generation defaults or the configuration."""
    found = generation_defaults(folder).get("eos_token_id", config.get_text_config().eos_token_id)
    ids = found if isinstance(found, list) else [found]
    return frozenset(token for token in ids if token is not None)


def generation_defaults(folder: Path) -> dict[str, Any]:
    """What the checkpoint's generation_config.json sets, empty without one."""
    if not (folder / "generation_config.json").is_file():
        return {}
    return dict(GenerationConfig.from_pretrained(folder).to_diff_dict())


def _compute_dtype(config: Any, device: str) -> torch.dtype:
    """The checkpoint's own dtype; half precision becomes bfloat16 on a CPU, where fp16 products are slow."""
    dtype = config.dtype if isinstance(config.dtype, torch.dtype) else torch.float32
    return torch.bfloat16 if dtype == torch.float16 and device == "cpu" else dtype


def _view(buffer: torch.Tensor, binding: Binding) -> torch.Tensor:
    nbytes = torch.Size(binding.shape).numel() * torch.empty(0, dtype=binding.dtype).element_size()
    return buffer[binding.at : binding.at + nbytes].view(binding.dtype).view(binding.shape)


def _same(first: torch.Tensor, second: torch.Tensor) -> bool:
    """Whether two tensors show the same memory in the same way."""
    return first.data_ptr() == second.data_ptr() and first.shape == second.shape and first.stride() == second.stride()

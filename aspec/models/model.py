"""A decoder-only transformers model that runs layer by layer with weights bound from byte buffers.

The maths is transformers' own. There are two skeletons on the meta device. The *frame* (``frame.py``) gives
every layer's arguments and computes logits from a hidden state. The *layers* of the other skeleton run with parameters
that are views of slots.
Nothing is patched at run time, and all state of a work item is in its ``Activation``, so several items can be in
progress at once. Callers run everything under ``torch.inference_mode``.
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig

from aspec.errors import InternalError
from aspec.io.checkpoint import Checkpoint, has_weights, outline
from aspec.io.hub import known_as, read_config
from aspec.io.pinned import upload
from aspec.models.configuration.compute_dtype import HALF_IS_SLOW, both_dtypes, computed_on, named_dtype, stored_dtype
from aspec.models.configuration.config_sizes import check_layers, experts_per_token
from aspec.models.configuration.context import context_limit
from aspec.models.configuration.generation_defaults import end_ids
from aspec.models.exact.attention import prove_attention
from aspec.models.exact.modes import LayerModes
from aspec.models.exact.products import prove_experts
from aspec.models.exact.whole_layers import Step, WholeLayers
from aspec.models.experts.layout import RoutedLayers, find_routed
from aspec.models.experts.pause import run_to_experts
from aspec.models.experts.running import ExpertRunner, RoutedItem
from aspec.models.formats.packed import Format, PackedWeight, StoredWeight, methods_of, packed_by_layer
from aspec.models.formats.registry import format_of, open_weights, stored_weights
from aspec.models.frame import Frame
from aspec.models.hf_compat import experts_of
from aspec.models.kv_cache import KVShape, StepCache
from aspec.models.layer_arguments import fill_in
from aspec.models.probing.facts import ModelFacts, OffloadFacts
from aspec.models.probing.layers import examine
from aspec.models.probing.split import examine_offload, examine_split
from aspec.models.skeleton import build_skeleton, find_layers, load_config
from aspec.models.split_layer import Split, attend_to, finish, host_attention_of, project, to_host
from aspec.models.state.mixers import bind_mixers
from aspec.models.state.shapes import StateShape
from aspec.models.weights.binding import Binder
from aspec.models.weights.factors import choose_factors
from aspec.models.weights.layout import plan_parts
from aspec.models.weights.linears import Linears
from aspec.models.weights.lora import Adapter, adapt
from aspec.models.weights.outline import outline_tensors
from aspec.models.weights.parts import Binding, Part, layer_of
from aspec.models.weights.tensor_map import map_tensors
from aspec.models.weights.touched import give_up
from aspec.models.weights.unused import check_unused, unread_bytes, unused_text, without_towers


@dataclass(slots=True)
class Activation:
    """A work item between layers. Its state in a layer changes from layer to layer, the rest is fixed."""

    step: StepCache
    input_ids: torch.Tensor  # [B, T] int64
    hidden: torch.Tensor  # [B, T, H]
    arguments: list[dict[str, Any]]  # by layer, without the hidden state
    split: Split | None = None  # the split layer, between ``project`` and ``finish``
    routed: RoutedItem | None = None  # the layer with experts on demand, between ``route`` and ``combine``


class Model:
    """The model in ``folder``. It reads no weights: ``parts`` lists what to read, ``bind`` uses the bytes read.

    ``adapter``: the folder of a LoRA adapter, which is merged while parts are bound.
    ``outlined``: if the folder has a configuration and no weights, take the sizes of tensors from the configuration.
    ``packed_products``: of weights of 4 bits, where torch has them; None: of weights that are stored for them.
    Raises CheckpointError if the folder is damaged or config.json and weights do not belong together, and
    UnsupportedModelError if the architecture cannot run layer by layer; both before any allocation.
    """

    def __init__(
        self,
        folder: Path,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str = "cpu",
        adapter: Path | None = None,
        outlined: bool = False,
        packed_products: bool | None = None,
    ) -> None:
        self.folder = Path(folder)
        self.name = known_as(self.folder)  # for messages
        self.device = torch.device(device)
        self.config: PreTrainedConfig = load_config(self.folder)
        named = named_dtype(dtype, self.config)
        packing = format_of(self.folder, read_config(self.folder))
        self.checkpoint = Checkpoint(self.folder, {}, 0, {})
        weights: Mapping[str, StoredWeight] = {}
        if stored := has_weights(self.folder):  # headers are cheap to read, and bound what the configuration may claim
            self.checkpoint, weights = open_weights(self.folder, packing)
            check_layers(self.config.get_text_config().num_hidden_layers, self.checkpoint)
        self.facts: ModelFacts = examine(self.config, named or torch.float32)  # no fact depends on the dtype
        usual = torch.float32 if packing is None else torch.bfloat16  # nobody packs a model of float32
        self._named_dtype = named or stored_dtype(weights) or usual
        self.dtype = computed_on(self.device, self._named_dtype)
        self._layers_model = build_skeleton(self.config, self.dtype, self.device)
        self._layers_name, self._layers = find_layers(self._layers_model)
        if not stored:
            self.checkpoint = self._outline(packing) if outlined else Checkpoint.open(self.folder)  # which raises
            weights = stored_weights(self.checkpoint.tensors, packing)
        remarks = () if packing is None else packing.remarks
        self._tensors = map_tensors(self._layers_model, self.name, weights, remarks, self.facts.unused)
        self.unexpected = without_towers(self.config, self._tensors.unexpected)  # stored tensors without a use
        check_unused(self._layers_model, self.checkpoint, self.unexpected)
        self.files = dict(self.checkpoint.files)  # that are read, as they were when their headers were read
        if adapter is not None:
            self._adapt(Adapter.open(adapter))
        self._frame = build_skeleton(self.config, self.dtype, self.device)
        give_up(self._frame, self.facts.unused, self.device)  # towers that text does not enter
        self._linears = Linears(self._frame, self._layers_model, self._layers_name, bind_mixers(self._layers_model))
        self._framed = Frame(self._frame, self.facts)
        self._modes = LayerModes()
        self._whole = WholeLayers()
        self._tensors = choose_factors(self._tensors, self._linears, self.device, self.dtype, packed_products)
        self._binder = Binder(self._frame, self._layers_model, self._layers, self._linears)
        self._experts: ExpertRunner | None = None  # None: experts are weights of their layers
        text = self.config.get_text_config()
        self.num_layers = len(self._layers)
        self.vocab_size = int(text.vocab_size)
        self.context, self.end_ids = context_limit(text), end_ids(self.folder, text)

    def _adapt(self, adapter: Adapter) -> None:
        """Add the weights of an adapter to those that it changes."""
        self._tensors = adapt(self._tensors, adapter, self._layers_model)
        self.files |= adapter.files

    def _outline(self, packing: Format | None) -> Checkpoint:
        """What the configuration says that the checkpoint would hold."""
        return outline(self.folder, outline_tensors(self._layers_model, packing, named_dtype(None, self.config)))

    @property
    def max_context(self) -> int | None:
        """The most tokens of a row that the model was made for; None: no limit."""
        return self.context.trained

    @property
    def unread_bytes(self) -> int:
        """Stored bytes that text does not need, such as those of a tower for images; they are never read."""
        return unread_bytes(self.checkpoint, self._tensors)

    @property
    def remarks(self) -> tuple[str, ...]:
        """What the user should know, a text each: tensors that are not read, and another dtype than the one named."""
        texts = [*self._tensors.remarks, *([unused_text(self.name, self.unexpected)] if self.unexpected else [])]
        if self.dtype != self._named_dtype:
            texts.append(f"{self.name}: {HALF_IS_SLOW}")
        return tuple(texts)

    @property
    def dtypes(self) -> str:
        """The dtype in which the model computes, and those in which its weights are stored, if they differ."""
        return both_dtypes(self.dtype, self.checkpoint.tensors.values())

    @cached_property
    def packed(self) -> Mapping[int, tuple[PackedWeight, ...]]:
        """The packed weights by layer; an embedding or a head has the layer REST."""
        name, entries = self._layers_name, self._tensors.entries
        return packed_by_layer((layer_of(entry.name, name), entry.sources) for entry in entries)

    @property
    def methods(self) -> tuple[str, ...]:
        """How weights are packed, the method of the most bytes first; empty if none is packed."""
        return methods_of(itertools.chain.from_iterable(self.packed.values()))

    def parts(self, max_part_bytes: int, alignment: int = 1, on_demand: RoutedLayers | None = None) -> tuple[Part, ...]:
        """The parts in the order of use, the resident part (layer -1) first; see ``plan_parts``.

        ``on_demand``: the layers whose experts are in no part.
        """
        if on_demand is not None:
            return plan_parts(on_demand.without_experts(self._tensors), self._layers_name, max_part_bytes, alignment)
        key = max_part_bytes, alignment
        if key not in self._parts:  # thousands of experts take seconds
            self._parts[key] = plan_parts(self._tensors, self._layers_name, max_part_bytes, alignment)
        return self._parts[key]

    @cached_property
    def _parts(self) -> dict[tuple[int, int], tuple[Part, ...]]:
        """The parts with whole layers, by most bytes and alignment, as far as they were asked for."""
        return {}

    def routed(self, alignment: int = 1) -> RoutedLayers:
        """The layers whose experts can be read one by one, to multiples of ``alignment`` bytes in a device's buffer."""
        return find_routed(
            list(self._layers), self._layers_name, self._tensors, experts_per_token(self.config), alignment
        )

    def read_on_demand(self, routed: RoutedLayers) -> ExpertRunner:
        """Run these layers in steps from now on: ``route``, ``compute_experts``, ``combine``."""
        self._binder.leave_out([name for layer in routed.layers.values() for name in layer.names])
        self._experts = ExpertRunner(routed, self._layers_model)
        return self._experts

    def kv_shapes(self, *, offloaded: bool = False) -> list[KVShape | None]:
        """By layer, as ``KVCache`` takes them; None for a layer that uses another layer's keys and values.

        ``offloaded``: of a cache in host memory, which stores what layers attend to (``kv_offload.py``).
        """
        return list(self.offload.kept) if offloaded else self.facts.kv_shapes

    @property
    def state_shapes(self) -> list[StateShape | None]:
        """By layer, what a recurrent layer keeps; None for other layers."""
        return [layer.state for layer in self.facts.layers]

    @property
    def layer_modules(self) -> tuple[torch.nn.Module, ...]:
        """The decoder layers, for their shapes; parameters that are not bound are on meta."""
        return tuple(self._layers)

    # -- weights ---------------------------------------------------------------------------------------------

    def bind(self, part: Part, buffer: torch.Tensor, scratch: torch.Tensor | None = None) -> None:
        """Make the part's parameters views of ``buffer`` (uint8, ``part.size`` bytes, page-aligned); fast if repeated.

        A part with updates of an adapter must have been read anew: they are merged into the buffer at every call.
        Tensors that need a conversion are converted at every call, into ``scratch`` (uint8) from byte
        ``part.scratch_at`` on. The caller must not change these bytes while the part is in use. The parts of one layer
        share a scratch, and layers may use it one after another; a part that stays bound needs its own scratch
        (``replace(part, scratch_at=0)``, ``part.scratch_bytes`` bytes). Raises InternalError if a buffer is too small.
        """
        self._binder.bind(part, buffer, scratch)

    def prove_products(self) -> None:
        """Prove the recipes of linear modules, experts and attention, before memory is taken for weights."""
        if self.facts.why_not_exact is None:
            prove_attention({shape for shape in self.kv_shapes() if shape is not None}, self.dtype)
        self._linears.prove()
        self._whole.find(self._layers)
        for module in self._layers_model.modules():
            if (experts := experts_of(module)) is not None:
                for name in (experts.up, experts.down):
                    prove_experts(module.get_parameter(name), transposed=not experts.transposed)

    def pack(self, part: Part) -> tuple[Binding, ...]:
        """Reorder weights of a bound part that stays bound, where products get faster; the bits stay the same.

        Returns the bindings whose bytes of the part's buffer are not read any more. Call it with the threads that
        compute. The reordered weights need as much memory as these bytes, one weight more while it runs.
        """
        return self._binder.pack(part)

    def unbind(self, part: Part) -> None:
        """Put the part's parameters back on meta: its layer raises InternalError until the next ``bind``."""
        self._binder.unbind(part)

    def forget(self, parts: tuple[Part, ...] = ()) -> None:
        """Unbind these parts and drop all views of buffers and packed weights, so that the memory can be freed."""
        self._linears.forget()
        for part in parts:
            self._binder.unbind(part)
        self._binder.forget()
        if self._experts is not None:
            self._experts.forget()

    # -- forward ---------------------------------------------------------------------------------------------

    def embed(self, input_ids: torch.Tensor, step: StepCache) -> Activation:
        """The prologue: hidden state and every layer's arguments for ``input_ids`` [B, T] int64.

        Raises InternalError if their shape is not that of the step's positions.
        """
        if input_ids.shape != step.position_ids.shape:
            raise InternalError(f"tokens {list(input_ids.shape)} do not fit positions {list(step.position_ids.shape)}")
        positions = self._on_layers_device(step, step.position_ids)
        calls = self._framed.prologue(input_ids, positions, step)
        hidden = calls[0][self.facts.layers[0].parameters[0]]
        fill_in(self.facts, calls, step)
        return Activation(step, input_ids, hidden, calls)

    def layer(self, index: int, activation: Activation) -> None:
        """Run one layer on an item. Raises InternalError if its parameters are not bound."""
        if activation.step.offloaded:
            raise InternalError("a layer whose KV is in host memory must run split, from project to finish")
        self._binder.check(index)
        step = Step(index, activation.hidden, activation.arguments[index], activation.step, self._binder.version(index))
        activation.hidden = self._whole.run(step, partial(self._by_modules, index, activation))

    @cached_property
    def split_bytes(self) -> tuple[int, int]:
        """Bytes that an item holds between ``project`` and ``finish``, per token and per slot of its rows.

        Raises UnsupportedModelError if a layer's attention cannot run apart from the rest of the layer.
        """
        return examine_split(self.config, self.dtype, self.facts)

    @cached_property
    def offload(self) -> OffloadFacts:
        """Facts of split layers with KV in host memory. Raises UnsupportedModelError as ``split_bytes`` does."""
        return examine_offload(self.config, self.dtype, self.facts)

    def project(self, index: int, activation: Activation) -> None:
        """Run a layer up to its attention and store its keys and values; ``attend`` and ``finish`` follow.

        The three calls give the same bits as ``layer``. The parameters must be bound until the end of ``finish``. With
        KV in host memory there are five calls: ``send`` before ``attend``, which then stores, and ``bring_back`` after.
        """
        self._binder.check(index)
        with self._modes.of(index, activation.step, "project"):
            activation.split = project(partial(self._forward, index, activation), activation.hidden)
        if activation.step.offloaded:
            facts = self.facts.layers[index]
            to_host(activation.split, activation.step, index, facts.mask, stores=facts.kv is not None)

    @staticmethod
    def send(activation: Activation) -> None:
        """Copy the attention's arguments to the host. Raises InternalError if the KV cache is not offloaded."""
        host_attention_of(activation.split).send()

    @staticmethod
    def attend(activation: Activation) -> None:
        """Run the attention of the layer that ``project`` stopped at, on any thread."""
        assert activation.split is not None
        attend_to(activation.split)

    @staticmethod
    def bring_back(activation: Activation) -> None:
        """Copy the attention's result from the host to the device. Raises InternalError as ``send`` does."""
        assert activation.split is not None
        activation.split.output = host_attention_of(activation.split).bring_back()

    def finish(self, index: int, activation: Activation) -> None:
        """Run the rest of a layer after its attention."""
        assert activation.split is not None
        with self._modes.of(index, activation.step, "finish"):
            activation.hidden = finish(partial(self._forward, index, activation), activation.split)
        activation.split = None

    def route(self, index: int, activation: Activation) -> tuple[tuple[int, int], ...]:
        """Run a layer up to its experts; returns those that its router has chosen, and the tokens of each.

        ``compute_experts`` of all of them and ``combine`` follow. The parameters must be bound until its end.
        """
        self._binder.check(index)
        with self._modes.of(index, activation.step, "route"):
            pause = run_to_experts(partial(self._forward, index, activation))
        activation.routed = self._on_demand.item(index, pause)
        return activation.routed.route

    def compute_experts(self, index: int, activation: Activation, experts: Sequence[tuple[int, int]]) -> None:
        """Compute (expert, slot) pairs of a routed layer."""
        assert activation.routed is not None
        with self._modes.of(index, activation.step, "experts"):
            self._on_demand.compute(index, activation.routed, experts)

    def combine(self, index: int, activation: Activation) -> None:
        """Run the rest of a layer, behind its experts."""
        assert activation.routed is not None
        with self._modes.of(index, activation.step, "combine"):
            made = self._on_demand.combine(index, activation.routed)
            activation.hidden = activation.routed.pause.resume(made)
        activation.routed = None

    @property
    def _on_demand(self) -> ExpertRunner:
        if self._experts is None:
            raise InternalError("no experts are read on demand")
        return self._experts

    def _by_modules(self, index: int, activation: Activation) -> torch.Tensor:
        with self._modes.of(index, activation.step):
            return self._forward(index, activation)

    def _forward(self, index: int, activation: Activation) -> torch.Tensor:
        """The hidden state [B, T, H] that a layer computes from an item's hidden state."""
        output = self._layers[index](activation.hidden, **activation.arguments[index])
        return self.facts.hand_over(index, output, activation.arguments)

    def head(self, activation: Activation, keep: torch.Tensor | None = None) -> torch.Tensor:
        """Logits [B, N, V] at the columns ``keep`` [B, N] int64 of every row; None: all columns.

        Raises InternalError if the resident part is not bound.
        """
        step, hidden, ids = activation.step, activation.hidden, activation.input_ids
        positions = self._on_layers_device(step, step.position_ids)
        if keep is not None:
            rows = torch.arange(keep.shape[0], device=keep.device)[:, None]
            hidden = hidden[rows, keep] if self.facts.rows_first else hidden[..., rows, keep, :]
            ids, positions = ids.gather(1, keep), positions.gather(1, keep)
        logits = self._framed.epilogue(hidden, ids, positions, step)
        if logits.is_meta:
            raise InternalError("the head runs while the resident part of the model is not bound")
        return logits

    def _on_layers_device(self, step: StepCache, tensor: torch.Tensor) -> torch.Tensor:
        """A step's tensor on the device of the layers; with KV in host memory it is made on the host."""
        return upload(tensor, self.device) if step.offloaded else tensor

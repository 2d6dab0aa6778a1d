"""Measures a device behind a link for ``roofline.py``: products, links, and the host's seconds for launches.

It measures rates and the host's seconds per layer. Details such as caches, which ``cpu_profiler.py`` measures, matter
little on a device. Blocking.
"""

import time
from dataclasses import replace
from functools import partial
from itertools import cycle
from math import inf
from typing import Any

import torch
from torch.nn.functional import linear

from aspec.backends.device import Buffers, DeviceLayer, copy_rate
from aspec.generation.params import SamplingParams
from aspec.generation.sampler import Sampler, draw_rows
from aspec.models.kv_cache import KVCache
from aspec.models.model import Model
from aspec.models.weights.parts import PAGE
from aspec.options import DEMO
from aspec.profiling.hardware import Hardware, Processor, Table
from aspec.profiling.stopwatch import Work
from aspec.speculation.candidates import best_children
from aspec.speculation.model_drafter import GREEDY

ROWS = (1, 8, 32, 128, 512, 2048)
COLUMNS, NUM_MATRICES, MATRIX_BYTES = 4096, 8, 32 << 20  # of weights that are read in turn
LINK_BYTES, LINK_S = 32 << 20, 0.1
REPEATS, CALLS = 4, 8
CONTEXT, VOCAB, WIDTH = 64, 32768, 8


def measure_device(device: DeviceLayer[Any, Any], dtype: torch.dtype, host: Hardware, memory_bytes: int) -> Hardware:
    """``host`` with the device and its links as measured now; the layers of models run on that device."""
    probe = _DeviceProbe(device)
    with torch.inference_mode():
        processor = probe.processor(dtype)
    h2d, d2h = probe.links()
    return replace(host, h2d_bytes_per_s=h2d, d2h_bytes_per_s=d2h, device=processor, device_memory=memory_bytes)


class _DeviceProbe:
    """Measures one device."""

    def __init__(self, device: DeviceLayer[Any, Any]) -> None:
        self._device, self._place = device, device.torch_device

    def seconds(self, work: Work) -> float:
        """Seconds of one call in a queue of calls, until the device has finished; the best of a few stretches."""
        work()
        self._device.synchronize()
        best = inf
        for _ in range(REPEATS):
            start = time.perf_counter()
            for _ in range(CALLS):
                work()
            self._device.synchronize()
            best = min(best, (time.perf_counter() - start) / CALLS)
        return best

    def processor(self, dtype: torch.dtype) -> Processor:
        """The rates of the device and the seconds of its small operations, for products in ``dtype``."""
        name = str(dtype).removeprefix("torch.")
        table = self._products(dtype)
        whole = torch.empty(2 * MATRIX_BYTES, dtype=torch.uint8, device=self._place)
        copy_s = self.seconds(lambda: whole[:MATRIX_BYTES].copy_(whole[MATRIX_BYTES:]))
        logits = torch.rand(1, 4, VOCAB, device=self._place).to(dtype)
        sampled = Sampler(SamplingParams(temperature=1.0))
        model = _SmallModel(DEMO / "target", dtype, self._place)
        product_s = self.seconds(partial(linear, *(torch.zeros(8, 8, dtype=dtype, device=self._place),) * 2))
        return Processor(
            flop_per_s={name: 2 * ROWS[-1] / dtype.itemsize / table[-1][1]},
            memory_bytes_per_s=1 / table[0][1],
            copy_bytes_per_s=MATRIX_BYTES / copy_s,
            layer_s=self.seconds(model.layer),
            product_s=product_s,
            frame_s=self.seconds(model.embed),
            greedy_s=self.seconds(lambda: draw_rows([GREEDY], logits, [[1, 2, 3, 4]])) / logits.numel(),
            sampled_s=self.seconds(lambda: draw_rows([sampled], logits, [[1, 2, 3, 4]])) / logits.numel(),
            offer_s=self.seconds(lambda: best_children(logits[0], WIDTH)) / logits.numel(),
            sampled_offer_s=self.seconds(partial(self._noisy_offer, sampled, logits[0])) / logits.numel(),
            gather_s=self.seconds(model.gather) / model.num_layers,
            weight_s={name: table},
        )

    @staticmethod
    def _noisy_offer(sampler: Sampler, logits: torch.Tensor) -> None:
        best_children(logits, WIDTH, sampler.noise([1, 2, 3, 4], logits.shape[-1], logits.device))

    def links(self) -> tuple[float, float]:
        """Bytes per second from pinned memory to the device, and back."""
        source = self._device.allocate_host(LINK_BYTES)
        slot = torch.empty(LINK_BYTES, dtype=torch.uint8, device=self._place)
        try:
            h2d = copy_rate(self._device, Buffers([slot], [source]), LINK_S)
            d2h = LINK_BYTES / self.seconds(lambda: source.tensor[:LINK_BYTES].copy_(slot, non_blocking=True))
        finally:
            self._device.free_host(source)
        return h2d, d2h

    def _products(self, dtype: torch.dtype) -> Table:
        """Seconds per byte of weights, by the rows of a product."""
        shape = MATRIX_BYTES // COLUMNS // dtype.itemsize, COLUMNS
        turn = cycle([torch.randn(shape, device=self._place).to(dtype) for _ in range(NUM_MATRICES)])

        def one(rows: int) -> float:
            hidden = torch.randn(rows, COLUMNS, device=self._place).to(dtype)
            return self.seconds(lambda: linear(hidden, next(turn))) / MATRIX_BYTES

        return tuple((rows, one(rows)) for rows in ROWS)


class _SmallModel:
    """A small model whose weights are all zero: its seconds are almost only launches."""

    def __init__(self, folder: Any, dtype: torch.dtype, place: torch.device) -> None:
        self._model = Model(folder, dtype=dtype, device=place)
        for part in self._model.parts(1 << 30, PAGE):
            buffer, scratch = (torch.zeros(n, dtype=torch.uint8, device=place) for n in (part.size, part.scratch_bytes))
            self._model.bind(replace(part, scratch_at=0), buffer, scratch)
        self._cache = KVCache(self._model.kv_shapes(), 1, 4 * CONTEXT, self._model.dtype, place)
        self._ids = torch.zeros(1, 1, dtype=torch.long, device=place)
        self._item = self._embedded()
        self.num_layers = self._model.num_layers

    def _embedded(self) -> Any:
        return self._model.embed(self._ids, self._cache.step([0], [CONTEXT], [1]))

    def embed(self) -> None:
        """Embed one token id."""
        self._embedded()

    def layer(self) -> None:
        """Run one layer for one token."""
        self._model.layer(0, self._item)

    def gather(self) -> None:
        """Move an accepted path of eight tokens in the KV cache of all layers."""
        self._cache.gather(0, CONTEXT, range(0, 16, 2))

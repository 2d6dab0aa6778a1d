"""What the products of a run's passes take alone: a roofline for compute."""

import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from aspec.models.exact.products import fastest
from aspec.models.hf_compat import experts_of
from aspec.models.model import Model
from aspec.plan import Plan
from aspec.tasks.op import Op
from aspec.tasks.task import Span

TIMED = 4  # times that a layer's products are timed, the first of them not counted


def products_of(target: str, plan: Plan, spans: Sequence[Span]) -> Iterator[tuple[Span, float]]:
    """Every span of a whole layer and the seconds that its products take alone, with weights from memory."""
    layer = Model(Path(target)).layer_modules[0]
    if any(experts_of(module) for module in layer.modules()):
        return
    shapes = [module.weight.shape for module in layer.modules() if isinstance(module, torch.nn.Linear)]
    weights = [torch.randn(shape).bfloat16() for shape in shapes]
    known: dict[int, float] = {}

    def seconds(count: int) -> float:
        rows = {shape[1]: torch.randn(count, shape[1]).bfloat16() for shape in shapes}
        took = []
        for _ in range(TIMED):
            begun = time.perf_counter()
            for weight in weights:
                fastest(rows[weight.shape[1]], weight)
            took.append(time.perf_counter() - begun)
        return min(took[1:])

    before, threads = torch.get_num_threads(), plan.request.threads
    torch.set_num_threads(before if threads is None else threads.decode)
    with torch.inference_mode():
        for span in spans:
            if span.task.op is Op.LAYER:
                count = span.task.item.padded_tokens
                if count not in known:
                    known[count] = seconds(count)
                yield span, known[count]
    torch.set_num_threads(before)

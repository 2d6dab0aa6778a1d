"""What quantised weights cost: nats per token on held-out text, for aspec's forms and for those of others.

python tools/quantisation_error.py MODEL ... [--texts 24] [--tokens 256]

Every form rounds the same matrices, those of the layers' linear modules; the rest, and the arithmetic, is fp32. The
texts are the demo pair's held-out files, each from its beginning. bitsandbytes (nf4) and gguf-py (Q4_0) are used where
they are installed.
"""

import argparse
import math
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from demo_corpus import read_corpus
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from aspec.options import DEMO
from aspec.preparing.forms import CompressedTensors, ProductForm
from aspec.preparing.rounding import Rounding
from aspec.preparing.source import open_source

Rounded = Callable[[torch.Tensor], torch.Tensor]
"""From a weight [N, K] in fp32 to the weight that its stored form stands for."""

ROWS = 4  # texts at once


def forms() -> Iterator[tuple[str, float, Rounded]]:
    """The name of a form, its bits for each weight, and what it makes of a weight."""
    for bits, group in ((8, 32), (8, 128)):
        made = CompressedTensors(bits, group, torch.bfloat16)
        yield f"--bits {bits} --group-size {group}", bits + 16 / group, own(made.rounding, group)
    for group in (32, 64, 128):
        yield f"--bits 4 --group-size {group}", 4 + 32 / group, own(ProductForm(group, 64).rounding, group)
    published = CompressedTensors(4, 32, torch.bfloat16)
    yield "--bits 4 --published", 4.5, own(published.rounding, 32)
    try:
        import bitsandbytes.functional as bnb

        def nf4(weight: torch.Tensor) -> torch.Tensor:
            made: torch.Tensor = bnb.dequantize_4bit(*bnb.quantize_4bit(weight, blocksize=64, quant_type="nf4"))
            return made

        yield "bitsandbytes nf4, blocks of 64", 4.5, nf4
    except ImportError:
        pass
    try:
        from gguf import GGMLQuantizationType, quants

        def q4_0(weight: torch.Tensor) -> torch.Tensor:
            kind = GGMLQuantizationType.Q4_0
            return torch.from_numpy(quants.dequantize(quants.quantize(weight.numpy(), kind), kind)).view(weight.shape)

        yield "Q4_0, blocks of 32", 4.5, q4_0
    except ImportError:
        pass


def own(rounding: Rounding, group: int) -> Rounded:
    """What aspec makes of a weight; it keeps one whose inputs are no whole groups."""

    def rounded(weight: torch.Tensor) -> torch.Tensor:
        if weight.shape[1] % group:
            return weight
        codes, scales, offsets = rounding(weight.view(weight.shape[0], -1, group))
        return ((codes - rounding.half) * scales + offsets).view(weight.shape)

    return rounded


@torch.inference_mode()
def nats(model: PreTrainedModel, rows: torch.Tensor) -> float:
    """The mean of the nats of every token after the first of its row; ``rows`` [N, T] int64."""
    total = 0.0
    for some in rows.split(ROWS):
        logits = model(some).logits[:, :-1].flatten(0, 1)
        total += float(torch.nn.functional.cross_entropy(logits, some[:, 1:].flatten(), reduction="sum"))
    return total / rows[:, 1:].numel()


def measure(folder: Path, num_texts: int, num_tokens: int) -> None:
    """Print a table for one model."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    encoded = (tokenizer(text[: 40 * num_tokens])["input_ids"] for text in read_corpus().heldout)
    rows = [ids[:num_tokens] for ids in encoded if len(ids) >= num_tokens][:num_texts]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    source = open_source(folder)
    weights = {name: model.get_parameter(name) for name in source.linears if name.startswith(source.layers)}
    kept = {name: weight.detach().clone() for name, weight in weights.items()}
    plain = nats(model, torch.tensor(rows))
    print(f"{folder}: {len(rows)} texts of {num_tokens} tokens, {plain:.4f} nats per token as it is", flush=True)
    for label, bits, rounded in forms():
        with torch.no_grad():
            for name, weight in weights.items():
                weight.copy_(rounded(kept[name]))
        found = nats(model, torch.tensor(rows)) - plain
        print(f"| {label} | {bits:.2f} | {found:+.4f} | {100 * math.expm1(found):+.1f} % |", flush=True)


def main() -> None:
    """Read the command line and print a table for each model."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("models", nargs="*", type=Path, default=[DEMO / "target"])
    parser.add_argument("--texts", type=int, default=24)
    parser.add_argument("--tokens", type=int, default=256)
    options = parser.parse_args()
    for folder in options.models:
        measure(folder, options.texts, options.tokens)


if __name__ == "__main__":
    main()

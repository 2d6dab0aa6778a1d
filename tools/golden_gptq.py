"""Small GPTQ and AWQ weights, and what GPTQModel decodes them to: tests/golden/gptq.safetensors.

The tests compare with these, because the library brings CUDA and a compiler. Run this where it is installed:
``pip install gptqmodel && python tools/golden_gptq.py``.
"""

from pathlib import Path

import torch
from gptqmodel.nn_modules.qlinear.torch import TorchLinear
from gptqmodel.quantization.awq.utils.packing_utils import dequantize_gemm
from gptqmodel.utils.model import convert_gptq_v1_to_v2_format_module
from safetensors.torch import save_file

PATH = Path(__file__).resolve().parent.parent / "tests" / "golden" / "gptq.safetensors"
ROWS, COLUMNS = 32, 64
GPTQ = [(2, 1, 32), (2, 2, -1), (3, 1, 32), (3, 2, 16), (4, 1, 32), (4, 2, 16), (8, 1, -1), (8, 2, 32)]
"""Bits, version and size of groups."""

AWQ = [(32, torch.float16), (-1, torch.bfloat16)]
"""Size of groups, and the dtype of scales."""


def words(*shape: int) -> torch.Tensor:
    """Any bits."""
    return torch.randint(-(2**31), 2**31, shape, dtype=torch.int64).int()


def decoded(stored: dict[str, torch.Tensor], bits: int, version: int, size: int) -> torch.Tensor:
    """The weight [out, in] that the library makes."""
    module = TorchLinear(bits, size, False, True, COLUMNS, ROWS, register_buffers=True)
    for name, tensor in stored.items():
        setattr(module, name, tensor.clone())
    if version == 1:
        convert_gptq_v1_to_v2_format_module(module, bits, torch.int32)
    module.optimized = True  # no compiler
    module.post_init()
    return module.eval().dequantize_weight().t()


def main() -> None:
    """Write the file."""
    torch.manual_seed(0)
    found: dict[str, torch.Tensor] = {}
    for bits, version, size in GPTQ:
        groups = 1 if size == -1 else COLUMNS // size
        index = torch.arange(COLUMNS, dtype=torch.int32) // (COLUMNS // groups)
        stored = {
            "qweight": words(COLUMNS * bits // 32, ROWS),
            "qzeros": words(groups, ROWS * bits // 32),
            "scales": (torch.randn(groups, ROWS) / 64).half(),
            "g_idx": index[torch.randperm(COLUMNS)] if version == 1 else index,
        }
        name = f"gptq.{bits}.{version}.{size}"
        found |= {f"{name}.{end}": tensor for end, tensor in stored.items()}
        found[f"{name}.expected"] = decoded(stored, bits, version, COLUMNS if size == -1 else size)
    for size, dtype in AWQ:
        groups = 1 if size == -1 else COLUMNS // size
        stored = {
            "qweight": words(COLUMNS, ROWS // 8),
            "qzeros": words(groups, ROWS // 8),
            "scales": (torch.randn(groups, ROWS) / 64).to(dtype),
        }
        found |= {f"awq.{size}.{end}": tensor for end, tensor in stored.items()}
        found[f"awq.{size}.expected"] = dequantize_gemm(*stored.values(), 4, COLUMNS // groups).t()
    save_file({name: tensor.contiguous() for name, tensor in found.items()}, PATH)


if __name__ == "__main__":
    main()

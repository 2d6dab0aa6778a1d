"""Small quantised weights, and what their own libraries decode them to: tests/golden/formats.safetensors.

The tests compare with these where the libraries are not installed: both bring CUDA. Run this with both of them:
``pip install bitsandbytes nvidia-modelopt && python tools/golden_formats.py``.
"""

from pathlib import Path

import bitsandbytes.functional as bnb
import torch
from modelopt.torch.quantization.qtensor.nvfp4_tensor import NVFP4QTensor
from safetensors.torch import save_file

PATH = Path(__file__).resolve().parent.parent / "tests" / "golden" / "formats.safetensors"
FOUR_BITS = {
    "nf4": ("nf4", 64, False, torch.bfloat16, (12, 64)),
    "fp4": ("fp4", 64, False, torch.float16, (12, 64)),
    "nf4_double": ("nf4", 32, True, torch.bfloat16, (257, 32)),  # 257 blocks: two blocks of scales
    "fp4_double": ("fp4", 64, True, torch.float32, (12, 64)),
}


def main() -> None:
    """Write the file."""
    torch.manual_seed(0)
    found: dict[str, torch.Tensor] = {}
    for name, (kind, block, double, dtype, shape) in FOUR_BITS.items():
        weight = torch.randn(shape).to(dtype)
        codes, state = bnb.quantize_4bit(weight, blocksize=block, quant_type=kind, compress_statistics=double)
        found[f"{name}.weight"] = codes
        found |= {f"{name}.weight.{key}": own for key, own in state.as_dict(packed=True).items()}
        found[f"{name}.expected"] = bnb.dequantize_4bit(codes, state)
    codes, scale, _ = bnb.int8_vectorwise_quant(torch.randn(9, 40).half())
    found |= {"int8.weight": codes, "int8.SCB": scale, "int8.weight_format": torch.tensor(0, dtype=torch.uint8)}
    found["int8.expected"] = bnb.int8_vectorwise_dequant(codes, scale)
    own, scale, factor = NVFP4QTensor.quantize(torch.randn(12, 48).bfloat16(), 16)
    found |= {"nvfp4.weight": own._quantized_data, "nvfp4.weight_scale": scale, "nvfp4.weight_scale_2": factor}
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        expected = own.dequantize(dtype, scale=scale, double_scale=factor, block_sizes={-1: 16})
        found[f"nvfp4.expected.{str(dtype).removeprefix('torch.')}"] = expected
    save_file({name: tensor.contiguous() for name, tensor in found.items()}, PATH)


if __name__ == "__main__":
    main()

"""Whole tiny checkpoints in every quantised format, each beside a plain one with the weights that it decodes to.

The decoded weights come from a method's own library, or from its definition, and never from aspec.
"""

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from tests import tiny
from tests.packed_words import AWQ_COLUMNS, awq_weight, gptq_weight, packed

Stored = Mapping[str, torch.Tensor]
E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
NF4 = load_file(Path(__file__).parent / "golden" / "formats.safetensors")["nf4.weight.quant_map"]
FLOAT8_MAX = 448


@dataclass(frozen=True)
class Method:
    """A way to store weights: what turns a weight [N, K] of a module into stored tensors and their meaning."""

    settings: Mapping[str, object]
    quantise: Callable[[torch.Tensor, str], tuple[Stored, torch.Tensor]]
    ends: tuple[str, ...] = field(default=("_proj", ".w1", ".w2", ".w3"))  # of the names of its modules


def groups_of(weight, size, bits, dtype=torch.float16):
    """Numbers [N, K], scales and zero points [N, groups] that are near a weight, by groups of its columns."""
    rows, columns = weight.shape
    own = weight.view(rows, -1, columns if size == -1 else size)
    low, high = own.amin(-1).clamp_max(0), own.amax(-1).clamp_min(0)
    scales = ((high - low) / (2**bits - 1)).to(dtype)
    zeros = (-low / scales.float()).round().clamp(1, 2**bits - 1)
    numbers = (own / scales.float()[..., None] + zeros[..., None]).round().clamp(0, 2**bits - 1)
    return numbers.view(rows, columns).int(), scales, zeros.int()


def gptq(bits, size, reordered=False, version=1, **more):
    def quantise(weight, module):
        columns = weight.shape[1]
        order = torch.randperm(columns) if reordered else torch.arange(columns)
        numbers, scales, zeros = groups_of(weight[:, order], size, bits)
        index = torch.empty(columns, dtype=torch.int32)
        index[order] = (torch.arange(columns) // (columns if size == -1 else size)).int()
        stored = {
            f"{module}.qweight": packed(numbers[:, torch.argsort(order)], bits).t(),
            f"{module}.qzeros": packed(zeros.t() - int(version == 1), bits),
            f"{module}.scales": scales.t(),
            f"{module}.g_idx": index,
        }
        return stored, gptq_weight(stored, bits, version, module)

    settings = {"quant_method": "gptq", "bits": bits, "group_size": size, "desc_act": reordered, "sym": False}
    if version == 2:
        settings["checkpoint_format"] = "gptq_v2"
    return Method({**settings, **more}, quantise)


def awq(size):
    def in_order(values):
        columns = values.view(len(values), -1, 8)[..., torch.tensor(AWQ_COLUMNS)]
        return packed(columns.flatten(1), 4)

    def quantise(weight, module):
        numbers, scales, zeros = groups_of(weight, size, 4)
        stored = {
            f"{module}.qweight": in_order(numbers.t().contiguous()),
            f"{module}.qzeros": in_order(zeros.t().contiguous()),
            f"{module}.scales": scales.t(),
        }
        return stored, awq_weight(stored, module)

    settings = {"quant_method": "awq", "bits": 4, "group_size": size, "version": "gemm", "zero_point": True}
    return Method(settings, quantise)


def fp8(rows, columns, scales_dtype=torch.float32):
    """Blocks that need not divide a weight."""

    def quantise(weight, module):
        grid = -(-weight.shape[0] // rows), -(-weight.shape[1] // columns)
        whole = torch.zeros(grid[0] * rows, grid[1] * columns)
        whole[: weight.shape[0], : weight.shape[1]] = weight
        scales = whole.view(grid[0], rows, grid[1], columns).abs().amax((1, 3)) / FLOAT8_MAX
        if scales_dtype == torch.float8_e8m0fnu:
            scales = scales.log2().ceil().exp2()
        scales = scales.to(scales_dtype)
        full = scales.float().repeat_interleave(rows, 0).repeat_interleave(columns, 1)
        full = full[: weight.shape[0], : weight.shape[1]]
        codes = (weight / full).to(torch.float8_e4m3fn)
        stored = {f"{module}.weight": codes, f"{module}.weight_scale_inv": scales}
        stored[f"{module}.input_scale"] = torch.ones(())
        return stored, codes.float() * full

    settings = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [rows, columns]}
    return Method(settings, quantise)


def fbgemm():
    """One scale for every row."""

    def quantise(weight, module):
        scales = weight.abs().amax(1, keepdim=True) / FLOAT8_MAX
        codes = (weight / scales).to(torch.float8_e4m3fn)
        return {f"{module}.weight": codes, f"{module}.weight_scale": scales}, codes.float() * scales

    return Method({"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0}, quantise)


def e2m1(weight, scales, size):
    """Codes of four bits near a weight, two in a byte, and the numbers that they are without scales."""
    full = scales.repeat_interleave(size, -1)
    ratio = weight / full
    codes = (ratio.abs().unsqueeze(-1) - E2M1).abs().argmin(-1)
    numbers = E2M1[codes] * torch.where(ratio < 0, -1.0, 1.0)
    codes = (codes + 8 * (ratio < 0)).to(torch.uint8)
    return codes[..., ::2] | codes[..., 1::2] << 4, numbers


def nvfp4():
    """ModelOpt's: scales of 16 weights in fp8, and one for the whole weight."""

    def quantise(weight, module):
        most = weight.view(len(weight), -1, 16).abs().amax(-1)
        factor = most.max() / (6 * FLOAT8_MAX)
        scales = (most / (6 * factor)).to(torch.float8_e4m3fn)
        full = scales.float() * factor
        codes, numbers = e2m1(weight, full, 16)
        stored = {f"{module}.weight": codes, f"{module}.weight_scale": scales, f"{module}.weight_scale_2": factor}
        stored[f"{module}.input_scale"] = torch.ones(())
        return stored, numbers * full.repeat_interleave(16, 1)

    return Method({"quant_method": "modelopt", "quant_algo": "NVFP4"}, quantise)


def mxfp4():
    """gpt-oss' fused experts, stored with the input last and used with the output last."""

    def quantise(weight, name):
        own = weight.transpose(1, 2)
        most = own.reshape(*own.shape[:2], -1, 32).abs().amax(-1)
        powers = (most / 6).log2().ceil().int()
        codes, numbers = e2m1(own, powers.float().exp2(), 32)
        stored = {f"{name}_blocks": codes.view(*powers.shape, 16), f"{name}_scales": (powers + 127).to(torch.uint8)}
        return stored, (numbers * powers.float().exp2().repeat_interleave(32, -1)).transpose(1, 2)

    settings = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
    return Method(settings, quantise, ("experts.gate_up_proj", "experts.down_proj"))


def nf4(block=64, dtype=torch.bfloat16):
    """bitsandbytes': blocks of weights in the order of memory."""

    def quantise(weight, module):
        blocks = weight.view(-1, block)
        scales = blocks.abs().amax(1)
        codes = (blocks / scales[:, None]).unsqueeze(-1).sub(NF4).abs().argmin(-1).flatten()
        state = {"quant_type": "nf4", "blocksize": block, "dtype": str(dtype)[6:], "shape": list(weight.shape)}
        text = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
        stored = {
            f"{module}.weight": (codes[::2] << 4 | codes[1::2]).to(torch.uint8).view(-1, 1),
            f"{module}.weight.absmax": scales,
            f"{module}.weight.quant_map": NF4,
            f"{module}.weight.quant_state.bitsandbytes__nf4": text,
        }
        return stored, (NF4[codes].view(-1, block) * scales[:, None]).to(dtype).view(weight.shape)

    return Method({"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, quantise)


def int8():
    """bitsandbytes': one scale for every row."""

    def quantise(weight, module):
        scales = weight.abs().amax(1)
        codes = (weight / scales[:, None] * 127).round().to(torch.int8)
        stored = {f"{module}.weight": codes, f"{module}.SCB": scales}
        stored[f"{module}.weight_format"] = torch.tensor(0, dtype=torch.uint8)
        return stored, codes.float() * scales[:, None] * (1 / 127)

    return Method({"quant_method": "bitsandbytes", "load_in_8bit": True}, quantise)


def compress(format, weight, dtype=torch.bfloat16, module="m", **arguments):
    """The stored tensors of a module that compressed-tensors compressed, and the weight that it makes of them."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    args = QuantizationArgs(**arguments)
    scheme = QuantizationScheme(targets=["Linear"], weights=args, format=format)
    rows, columns = weight.shape
    size = {"group": args.group_size, "channel": columns}.get(args.strategy)
    groups = weight.view(1, 1, -1) if size is None else weight.view(rows, -1, size)
    low, high = groups.amin(-1), groups.amax(-1)
    least, most = -(2 ** (args.num_bits - 1)), 2 ** (args.num_bits - 1) - 1
    state = {"weight": weight}
    if args.type == "float":
        scales = groups.abs().amax(-1) / FLOAT8_MAX
    elif args.symmetric:
        scales = groups.abs().amax(-1) / -least
    else:
        scales = (high - low) / (most - least)
        zeros = (least - low / scales).round().clamp(least, most).to(torch.int8)
        state["weight_zero_point"] = zeros if size else zeros.view(1)
    state["weight_scale"] = (scales if size else scales.view(1)).to(dtype)
    kind = BaseCompressor.get_value_from_registry(format)
    stored = kind.compress(state, scheme)
    tensors = {f"{module}.{name}": tensor.clone().contiguous() for name, tensor in stored.items()}
    return tensors, kind.decompress(dict(stored), scheme)["weight"]


def compressed(format, targets=("Linear",), ends=Method.__dataclass_fields__["ends"].default, **weights):
    """compressed-tensors, by its own library."""

    def quantise(weight, module):
        return compress(format, weight, module=module, **weights)

    group = {"targets": list(targets), "weights": weights, "input_activations": None, "output_activations": None}
    settings = {"quant_method": "compressed-tensors", "format": format, "config_groups": {"group_0": group}}
    more = {"ignore": ["lm_head", r"re:.*\.gate$"], "quantization_status": "compressed"}
    return Method({**settings, **more}, quantise, ends)


METHODS: Mapping[str, Callable[[], Method]] = {
    "gptq 4 bits": lambda: gptq(4, 32),
    "gptq 4 bits act-order": lambda: gptq(4, 32, reordered=True),
    "gptq 4 bits v2": lambda: gptq(4, 32, version=2),
    "gptq 2 bits": lambda: gptq(2, 16),
    "gptq 3 bits": lambda: gptq(3, 32),
    "gptq 8 bits": lambda: gptq(8, -1),
    "awq": lambda: awq(32),
    "fp8 ragged": lambda: fp8(48, 40),
    "fp8 e8m0": lambda: fp8(32, 32, torch.float8_e8m0fnu),
    "fbgemm": fbgemm,
    "nvfp4": nvfp4,
    "mxfp4": mxfp4,
    "nf4": nf4,
    "bitsandbytes int8": int8,
    "ct int4": lambda: compressed("pack-quantized", num_bits=4, strategy="group", group_size=32),
    "ct int4 zeros": lambda: compressed("pack-quantized", num_bits=4, symmetric=False, strategy="group", group_size=32),
    "ct int8": lambda: compressed("int-quantized", num_bits=8, strategy="channel"),
    "ct fp8": lambda: compressed("float-quantized", num_bits=8, type="float", strategy="channel"),
    "ct embeddings": lambda: compressed(
        "pack-quantized", ("Linear", "Embedding"), ("_proj", "embed_tokens"), num_bits=8, strategy="channel"
    ),
}


def build(folder: Path, source: Path, method: str) -> tuple[Path, Path]:
    """The checkpoint ``source`` in a quantised format, and in a plain one that has the same weights."""
    torch.manual_seed(0)
    own, stored, plain, count = METHODS[method](), {}, {}, 0
    for path in source.glob("*.safetensors"):
        for name, tensor in load_file(path).items():
            module = name.removesuffix(".weight")
            if module.endswith(own.ends) and tensor.dim() >= 2:
                tensors, decoded = own.quantise(tensor.float(), module)
                count += 1
            else:
                tensors, decoded = {name: tensor}, tensor
            stored |= tensors
            plain[name] = decoded.to(tensor.dtype)
    assert count, f"{method} finds no weight in {source}"
    for place, tensors, settings in (("packed", stored, own.settings), ("plain", plain, None)):
        shutil.copytree(source, folder / place, ignore=shutil.ignore_patterns("*.safetensors*"))
        save_file(
            {n: t.contiguous().clone() for n, t in tensors.items()},
            folder / place / "model.safetensors",
            {"format": "pt"},
        )
        if settings is not None:
            tiny.edit_config(folder / place, quantization_config=settings)
    return folder / "packed", folder / "plain"

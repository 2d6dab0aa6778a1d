"""Whole tiny checkpoints in every quantised format, each beside a plain one with the weights that it decodes to.

The decoded weights come from a method's own library, or from its definition, and never from aspec.
"""

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from aspec.models.formats.int4.kernel import proved_block
from tests import tiny
from tests.packed_words import AWQ_COLUMNS, awq_weight, gptq_weight, packed, values_of

Stored = Mapping[str, torch.Tensor]
E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
GOLDEN = load_file(Path(__file__).parent / "golden" / "formats.safetensors")
VALUES = {kind: GOLDEN[f"{kind}.weight.quant_map"] for kind in ("nf4", "fp4")}
NESTED = GOLDEN["nf4_double.weight.nested_quant_map"]
FLOAT8_MAX = 448


ENDS = ("_proj", "_proj_with_mqa", ".w1", ".w2", ".w3")


@dataclass(frozen=True)
class Method:
    """A way to store weights: what turns a weight [N, K] of a module into stored tensors and their meaning."""

    settings: Mapping[str, object]
    quantise: Callable[[torch.Tensor, str], tuple[Stored, torch.Tensor]]
    ends: tuple[str, ...] = ENDS  # of the names of its modules
    plain: str = ""  # a part of the names of modules that are not quantised all the same


def mixed(settings, ways: Mapping[str, "Method"]):
    """Several methods in one checkpoint, by the ends of the names of modules; others are stored plainly."""

    def quantise(weight, module):
        return next(way for end, way in ways.items() if module.endswith(end)).quantise(weight, module)

    return Method(settings, quantise, tuple(ways))


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


def prepared(size=32, block=proved_block() or 64):
    """The form of ``formats/int4/form.py``, written out here; weights that do not fit it are stored plainly."""

    def quantise(weight, module):
        rows, columns = weight.shape
        if rows % block or columns % size:
            return {f"{module}.weight": weight.bfloat16()}, weight.bfloat16().float()
        grouped = weight.view(rows, -1, size)
        low, high = grouped.amin(-1), grouped.amax(-1)
        scales = ((high - low) / 15).clamp_min(1e-8).bfloat16()
        offsets = (low + 8 * scales.float()).bfloat16()
        codes = ((grouped - offsets.float()[..., None]) / scales.float()[..., None] + 8).round().clamp(0, 15)
        decoded = (codes - 8) * scales.float()[..., None] + offsets.float()[..., None]
        half = codes.to(torch.uint8).view(rows // block, 2, block // 2, columns)
        stored = {
            f"{module}.int4_codes": (half[:, 0] | half[:, 1] << 4).transpose(1, 2).reshape(rows, columns // 2),
            f"{module}.int4_scales": torch.stack([scales.t(), offsets.t()], -1),
        }
        return stored, decoded.view(rows, columns)

    return Method({"quant_method": "aspec", "bits": 4, "group_size": size, "block": block}, quantise)


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


def most_of_blocks(weight, rows, columns):
    """The largest absolute value of every block; blocks need not divide the weight."""
    grid = -(-weight.shape[0] // rows), -(-weight.shape[1] // columns)
    whole = torch.zeros(grid[0] * rows, grid[1] * columns)
    whole[: weight.shape[0], : weight.shape[1]] = weight
    return whole.view(grid[0], rows, grid[1], columns).abs().amax((1, 3))


def fp8(rows, columns, scales_dtype=torch.float32):
    """Blocks that need not divide a weight, or one of fused experts [E, N, K]."""

    def quantise(weight, module):
        if weight.dim() == 3:
            each = [quantise(own, module) for own in weight]
            codes, scales = (
                torch.stack([stored[f"{module}.{end}"] for stored, _ in each]) for end in ("weight", "weight_scale_inv")
            )
            return {module: codes, f"{module}_scale_inv": scales}, torch.stack([decoded for _, decoded in each])
        scales = most_of_blocks(weight, rows, columns) / FLOAT8_MAX
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


def fp8_tensor(end="_scale_inv"):
    """One scale for a whole weight, and one for its inputs."""

    def quantise(weight, module):
        scale = weight.abs().amax() / FLOAT8_MAX
        codes = (weight / scale).to(torch.float8_e4m3fn)
        stored = {f"{module}.weight": codes, f"{module}.weight{end}": scale, f"{module}.activation_scale": scale}
        return stored, codes.float() * scale

    settings = {"quant_method": "fp8", "activation_scheme": "static", "weight_block_size": None}
    return Method(settings, quantise)


def fbgemm():
    """One scale for every row; of fused experts [E, input, output] for every column."""

    def quantise(weight, module):
        name = f"{module}.weight" if weight.dim() == 2 else module
        scales = weight.abs().amax(1, keepdim=True) / FLOAT8_MAX
        codes = (weight / scales).to(torch.float8_e4m3fn)
        return {name: codes, f"{name}_scale": scales}, codes.float() * scales

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


def modelopt(layers: Mapping[str, str]):
    """ModelOpt's mixed precision: an algorithm for the modules of four layers, by the ends of their names."""
    ways = {"NVFP4": nvfp4(), "FP8": fp8_tensor("_scale")}
    named = {
        f"model.layers.{layer}.{end}": {"quant_algo": algorithm}
        for layer in range(4)
        for end, algorithm in layers.items()
    }
    settings = {"quant_method": "modelopt", "quant_algo": "MIXED_PRECISION", "quantized_layers": named}
    return mixed(settings, {end: ways[algorithm] for end, algorithm in layers.items()})


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


def bits4(kind="nf4", block=64, nested=0, dtype=torch.bfloat16):
    """bitsandbytes': blocks of weights in the order of memory; ``nested``: blocks of scales that are quantised too."""

    def quantise(weight, module):
        blocks = weight.view(-1, block)
        scales = blocks.abs().amax(1)
        state = {"quant_type": kind, "blocksize": block, "dtype": str(dtype)[6:], "shape": list(weight.shape)}
        stored = {f"{module}.weight.absmax": scales, f"{module}.weight.quant_map": VALUES[kind]}
        if nested:
            offset = float(scales.mean())
            outer = torch.stack([own.abs().amax() for own in (scales - offset).split(nested)])
            wide = outer.repeat_interleave(nested)[: len(scales)]
            numbers = nearest((scales - offset) / wide, NESTED)
            scales = NESTED[numbers] * wide + offset
            state |= {"nested_blocksize": nested, "nested_dtype": "float32", "nested_offset": offset}
            stored[f"{module}.weight.absmax"] = numbers.to(torch.uint8)
            stored[f"{module}.weight.nested_absmax"] = outer
            stored[f"{module}.weight.nested_quant_map"] = NESTED
        codes = nearest(blocks / scales[:, None], VALUES[kind]).flatten()
        text = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
        stored[f"{module}.weight.quant_state.bitsandbytes__{kind}"] = text
        stored[f"{module}.weight"] = (codes[::2] << 4 | codes[1::2]).to(torch.uint8).view(-1, 1)
        return stored, (VALUES[kind][codes].view(-1, block) * scales[:, None]).to(dtype).view(weight.shape)

    return Method({"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": kind}, quantise)


def nearest(numbers, values):
    """The index of the value that is nearest to each number."""
    return (numbers.unsqueeze(-1) - values).abs().argmin(-1)


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
    sizes = {"group": args.group_size, "tensor_group": args.group_size, "channel": columns}
    size = sizes.get(args.strategy)
    groups = weight.view(1, 1, -1) if size is None else weight.view(rows, -1, size)
    low, high = groups.amin(-1), groups.amax(-1)
    least, most = -(2 ** (args.num_bits - 1)), 2 ** (args.num_bits - 1) - 1
    state = {"weight": weight}
    if args.type == "float" and (args.num_bits == 4 or args.scale_dtype == torch.uint8):
        scales, factor = scales_of_floats(groups.abs().amax(-1), args)
        if factor is not None:
            state["weight_global_scale"] = factor
    elif args.strategy == "block":
        scales = most_of_blocks(weight, *args.block_structure) / FLOAT8_MAX
    elif args.type == "float":
        scales = groups.abs().amax(-1) / FLOAT8_MAX
    elif args.symmetric:
        scales = groups.abs().amax(-1) / -least
    else:
        scales = (high - low) / (most - least)
        zeros = (least - low / scales).round().clamp(least, most).to(torch.int8)
        state["weight_zero_point"] = zeros if size else zeros.view(1)
    state["weight_scale"] = (scales.view(1) if args.strategy == "tensor" else scales).to(dtype)
    kind = BaseCompressor.get_value_from_registry(format)
    stored = kind.compress(state, scheme)
    tensors = {f"{module}.{name}": tensor.clone().contiguous() for name, tensor in stored.items()}
    return tensors, kind.decompress(dict(stored), scheme)["weight"]


def scales_of_floats(most, args):
    """Scales of groups, by the library, and for nvfp4 the scale of the whole weight."""
    from compressed_tensors.quantization.utils import calculate_qparams

    factor = (6 * FLOAT8_MAX / most.max()).view(1) if args.strategy == "tensor_group" else None
    return calculate_qparams(-most, most, args, factor)[0].float(), factor


def compressed(
    format,
    targets=("Linear",),
    ends=ENDS,
    ignore=("lm_head", r"re:.*\.gate$"),
    **weights,
):
    """compressed-tensors, by its own library."""

    def quantise(weight, module):
        return compress(format, weight, module=module, **weights)

    group = {"targets": list(targets), "weights": weights, "input_activations": None, "output_activations": None}
    settings = {"quant_method": "compressed-tensors", "format": format, "config_groups": {"group_0": group}}
    more = {"ignore": list(ignore), "quantization_status": "compressed"}
    return Method({**settings, **more}, quantise, ends)


def keeping(method: Method, words: str, **settings):
    """A method whose settings leave out the modules with these words in their names."""
    return replace(method, settings={**method.settings, **settings}, plain=words)


def with_ends(method: Method, *ends: str, **settings):
    """A method that is applied to other modules, too."""
    return replace(method, settings={**method.settings, **settings}, ends=(*method.ends, *ends))


def gptq_mixed():
    """Rules for single modules: one kind has other bits, one is left out."""
    ways = dict.fromkeys(("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj"), gptq(4, 32))
    rules = {"-:.*down_proj": {}, r"+:.*\.up_proj": {"bits": 8, "group_size": -1}}
    return mixed({**gptq(4, 32).settings, "dynamic": rules}, {**ways, "up_proj": gptq(8, -1)})


def compressed_mixed():
    """compressed-tensors' groups of modules: bytes for attention, half bytes for the rest, and one module plain."""
    eight = dict(num_bits=8, strategy="channel")
    four = dict(num_bits=4, strategy="group", group_size=32)
    attention = compressed("int-quantized", **eight)
    ways = dict.fromkeys(("q_proj", "k_proj", "v_proj", "o_proj"), attention)
    groups = {
        "group_0": {"targets": [r"re:.*self_attn\..*_proj"], "weights": eight, "format": "int-quantized"},
        "group_1": {"targets": ["Linear"], "weights": four, "format": "pack-quantized"},
    }
    settings = {**attention.settings, "format": "mixed-precision", "config_groups": groups}
    settings["ignore"] = ["lm_head", r"re:.*down_proj"]
    return mixed(settings, {**ways, **dict.fromkeys(("gate_proj", "up_proj"), compressed("pack-quantized", **four))})


def compressed_reordered():
    """Columns that choose their groups, as versions of compressed-tensors up to 0.19 stored them."""

    def quantise(weight, module):
        order = torch.randperm(weight.shape[1])
        stored, decoded = compress("pack-quantized", weight[:, order], module=module, **FOUR_BITS)
        back = torch.argsort(order)
        numbers = values_of(stored[f"{module}.weight_packed"], 4, weight.shape[1])
        index = torch.empty_like(order, dtype=torch.int32)
        index[order] = (torch.arange(weight.shape[1]) // 32).int()
        more = {f"{module}.weight_packed": packed(numbers[:, back], 4), f"{module}.weight_g_idx": index}
        return {**stored, **more}, decoded[:, back]

    return Method(compressed("pack-quantized", **FOUR_BITS, actorder="group").settings, quantise)


FOUR_BITS = dict(num_bits=4, strategy="group", group_size=32)
MXFP4 = dict(num_bits=4, type="float", strategy="group", group_size=32, scale_dtype="torch.uint8")
NVFP4 = dict(num_bits=4, type="float", strategy="tensor_group", group_size=16, scale_dtype="torch.float8_e4m3fn")
EVERY_MODULE = ("_proj", "embed_tokens", "lm_head")

METHODS: Mapping[str, Callable[[], Method]] = {
    "gptq 4 bits": lambda: gptq(4, 32),
    "gptq 4 bits act-order": lambda: gptq(4, 32, reordered=True),
    "gptq 4 bits v2": lambda: gptq(4, 32, version=2),
    "gptq 2 bits": lambda: gptq(2, 16),
    "gptq 3 bits": lambda: gptq(3, 32),
    "gptq 8 bits": lambda: gptq(8, -1),
    "gptq head": lambda: with_ends(gptq(4, 32), "lm_head", lm_head=True),
    "gptq mixed": gptq_mixed,
    "prepared": prepared,
    "prepared embedding": lambda: with_ends(prepared(), "embed_tokens"),
    "awq": lambda: awq(32),
    "awq one group": lambda: awq(-1),
    "awq left out": lambda: keeping(awq(32), "mlp.down_proj", modules_to_not_convert=["mlp.down_proj"]),
    "fp8 ragged": lambda: fp8(48, 40),
    "fp8 e8m0": lambda: fp8(32, 32, torch.float8_e8m0fnu),
    "fp8 tensor": fp8_tensor,
    "fp8 left out": lambda: keeping(fp8(32, 32), "layers.1.mlp", modules_to_not_convert=["model.layers.1.mlp"]),
    "fp8 every module": lambda: with_ends(fp8(32, 32), "embed_tokens", "lm_head"),
    "fbgemm": fbgemm,
    "nvfp4": nvfp4,
    "nvfp4 head": lambda: with_ends(nvfp4(), "lm_head"),
    "modelopt fp8": lambda: replace(fp8_tensor("_scale"), settings={"quant_method": "modelopt", "quant_algo": "FP8"}),
    "modelopt mixed": lambda: modelopt(
        {"q_proj": "FP8", "k_proj": "FP8", "o_proj": "FP8", "up_proj": "NVFP4", "gate_proj": "NVFP4"}
    ),
    "mxfp4": mxfp4,
    "mxfp4 left out": lambda: keeping(mxfp4(), "layers.1.", modules_to_not_convert=["model.layers.1.mlp.experts"]),
    "nf4": bits4,
    "nf4 double": lambda: bits4(nested=256),
    "nf4 left out": lambda: keeping(bits4(), "layers.1.mlp", llm_int8_skip_modules=["lm_head", "model.layers.1.mlp"]),
    "nf4 head": lambda: with_ends(bits4(), "lm_head"),
    "fp4": lambda: bits4("fp4"),
    "fp4 double": lambda: bits4("fp4", nested=256),
    "bitsandbytes int8": int8,
    "ct int4": lambda: compressed("pack-quantized", **FOUR_BITS),
    "ct int4 zeros": lambda: compressed("pack-quantized", **FOUR_BITS, symmetric=False),
    "ct int4 act-order": compressed_reordered,
    "ct int8": lambda: compressed("int-quantized", num_bits=8, strategy="channel"),
    "ct int8 naive": lambda: compressed("naive-quantized", num_bits=8, strategy="tensor", symmetric=False),
    "ct fp8": lambda: compressed("float-quantized", num_bits=8, type="float", strategy="channel"),
    "ct fp8 tensor": lambda: compressed("float-quantized", num_bits=8, type="float", strategy="tensor"),
    "ct fp8 blocks": lambda: compressed(
        "float-quantized", num_bits=8, type="float", strategy="block", block_structure=[32, 32]
    ),
    "ct mxfp8": lambda: compressed("mxfp8-quantized", **{**MXFP4, "num_bits": 8}),
    "ct mxfp4": lambda: compressed("mxfp4-pack-quantized", **MXFP4),
    "ct nvfp4": lambda: compressed("nvfp4-pack-quantized", **NVFP4),
    "ct mixed": compressed_mixed,
    "ct every module": lambda: compressed(
        "pack-quantized", ("Linear", "Embedding"), EVERY_MODULE, num_bits=8, strategy="channel", ignore=()
    ),
}


def build(folder: Path, source: Path, method: str) -> tuple[Path, Path]:
    """The checkpoint ``source`` in a quantised format, and in a plain one that has the same weights."""
    torch.manual_seed(0)
    own, stored, plain, count = METHODS[method](), {}, {}, 0
    for path in source.glob("*.safetensors"):
        for name, tensor in load_file(path).items():
            module = name.removesuffix(".weight")
            left_out = own.plain and own.plain in name
            if module.endswith(own.ends) and tensor.dim() >= 2 and not left_out:
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

"""For tests of formats: tensors in a file, decoding into memory with other contents, and a count of allocations."""

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from random import Random

import torch
from safetensors.torch import save_file
from torch.profiler import ProfilerActivity, profile

from aspec.io.checkpoint import TensorRef, read_header

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def store(folder, tensors: Mapping[str, torch.Tensor]) -> dict[str, TensorRef]:
    """Write tensors to a file and read its header."""
    path = folder / "model.safetensors"
    save_file({name: tensor.contiguous().clone() for name, tensor in tensors.items()}, path)
    return {ref.name: ref for ref in read_header(path)}


def decode(weight, tensors: Mapping[str, torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
    """A decoded weight. The memory has other numbers before, and bytes behind it that must stay."""
    margin, numel = 64, torch.Size(weight.shape).numel()
    workspace = torch.randint(0, 256, (weight.workspace_bytes + margin,), dtype=torch.uint8)
    memory = torch.full((numel + margin,), torch.nan, dtype=dtype)
    edge = workspace[-margin:].clone()
    assert hash(weight) == hash(replace(weight)), "weights are keys"
    weight.decode(stored(weight, tensors), memory[:numel].view(weight.shape), workspace[:-margin])
    assert memory[numel:].isnan().all(), "written behind the weight"
    assert torch.equal(workspace[-margin:], edge), "written behind the workspace"
    return memory[:numel].view(weight.shape)


def stored(weight, tensors: Mapping[str, torch.Tensor]) -> list[torch.Tensor]:
    """The tensors of a weight, in the order of its references."""
    return [tensors[ref.name] for ref in weight.refs]


def assert_same_bits(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal in every bit; one thing that is not a number is as good as another."""
    assert found.dtype == expected.dtype
    assert found.shape == expected.shape
    whole = torch.int32 if found.dtype == torch.float32 else torch.int16
    same = found.contiguous().view(whole) == expected.contiguous().view(whole)
    other = ~(same | (found.isnan() & expected.isnan()))
    assert not other.any(), (int(other.sum()), found[other][:3], expected[other][:3])


def allocations(call: Callable[[], object]) -> list[int]:
    """The bytes of every piece of CPU memory that PyTorch allocates during a call, inside of its operations too."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as measured:
        call()
    events = measured.profiler.kineto_results.events()
    return [event.nbytes() for event in events if event.name() == "[memory]" and event.nbytes() > 0]


def assert_allocates_nothing(weight, tensors: Mapping[str, torch.Tensor], dtype: torch.dtype) -> None:
    """Decoding takes no memory but for single numbers."""
    own, out = stored(weight, tensors), torch.empty(weight.shape, dtype=dtype)
    workspace = torch.empty(weight.workspace_bytes, dtype=torch.uint8)
    weight.decode(own, out, workspace)
    assert max(allocations(lambda: weight.decode(own, out, workspace)), default=0) <= 64


def damaged(method: str, settings, refs, hurt: Callable[..., None]) -> Iterator[tuple[Random, dict, dict]]:
    """1,000 copies of settings and headers with one or two faults each, which ``hurt`` adds, and the random source."""
    for number in range(1000):
        random = Random(f"{method}/{number}")
        own, found = copy.deepcopy(settings), dict(refs)
        for _ in range(random.choice((1, 1, 2))):
            hurt(random, own, found)
        yield random, own, found


def refusal(error: Exception) -> str:
    """``refused``, if the error is one paragraph of a sensible length."""
    paragraph = "\n" not in str(error) and len(str(error)) < 1500
    return "refused" if paragraph else f"refused badly: {error}"

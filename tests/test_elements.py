"""Norms and gates by kernels: their formula is found by their numbers, and another one keeps its own forward."""

import pytest
import torch
from torch import nn

from aspec.io.host_info import compiler
from aspec.models.compiled import products as compiled
from aspec.models.compiled.products import gated, norm
from aspec.models.exact import elements
from aspec.models.exact.elements import RoutedGate, RoutedNorm, prove_elements, route_elements
from aspec.models.exact.modes import ExactProducts

pytestmark = pytest.mark.skipif(not compiler(), reason="without llvmlite (pip install 'aspec[fast]') nothing compiles")

WIDTH = 80


class Norm(nn.Module):
    """As families write it, with a fault that can be chosen."""

    def __init__(self, rounded=True, offset=False, power=2, eps=1e-5):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(WIDTH).bfloat16(), requires_grad=False)
        self.eps, self.rounded, self.offset, self.power = eps, rounded, offset, power

    def forward(self, rows):
        wide = rows.float()
        wide = wide * torch.rsqrt(wide.abs().pow(self.power).mean(-1, keepdim=True) + self.eps)
        weight = 1.0 + self.weight.float() if self.offset else self.weight
        if self.rounded:
            return weight.to(rows.dtype) * wide.to(rows.dtype)
        return (weight.float() * wide).to(rows.dtype)


class Gate(nn.Module):
    def __init__(self, act, swapped=False):
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = (
            nn.Linear(own, other, bias=False, dtype=torch.bfloat16) for own, other in ((16, 48), (16, 48), (48, 16))
        )
        self.act, self.swapped = act, swapped

    def forward(self, rows):
        gate, up = self.gate_proj(rows), self.up_proj(rows)
        if self.swapped:
            gate, up = up, gate
        return self.down_proj(self.act(gate) * up)


def routed(module):
    """The module in a model, proven."""
    found = route_elements(nn.ModuleList([module]))
    prove_elements(found)
    return found[0]


@pytest.fixture
def rows():
    return torch.randn(3, 7, WIDTH).bfloat16()


@pytest.mark.parametrize("offset", [False, True])
@pytest.mark.parametrize("rounded", [False, True])
@torch.inference_mode()
def test_the_formula_of_a_norm_is_found(rounded, offset, rows):
    if rounded and offset:
        pytest.skip("no family rounds a weight that is stored less 1")
    module = Norm(rounded, offset)
    expected = module(rows)
    proven = routed(module)
    assert proven.kernel.keywords == {"eps": 1e-5, "rounded": rounded, "offset": offset}
    made = module(rows)
    assert (made == expected).float().mean() > 0.99
    assert torch.allclose(made, expected, rtol=2**-7)


@pytest.mark.parametrize("module", [Norm(power=1), Norm(power=2.1)], ids=["mean of sizes", "another power"])
@torch.inference_mode()
def test_another_norm_keeps_its_forward(module, rows):
    expected = module(rows)
    assert routed(module).kernel is None
    assert torch.equal(module(rows), expected)


@torch.inference_mode()
def test_two_norms_of_one_class_may_have_two_formulas(rows):
    several = nn.ModuleList([Norm(), Norm(power=1), Norm(rounded=False), Norm(eps=1e-2)])
    expected = [own(rows) for own in several]
    found = route_elements(several)
    prove_elements(found)
    assert [own.kernel is not None for own in found] == [True, False, True, True]
    for own, before in zip(several, expected, strict=True):
        assert torch.allclose(own(rows), before, rtol=2**-7)


@torch.inference_mode()
def test_rows_that_a_kernel_can_not_read_go_the_usual_way(rows):
    module = Norm()
    wide = module(rows.float())
    routed(module)
    assert torch.equal(module(rows.float()), wide)
    turned = rows.transpose(0, 1)
    assert torch.equal(module(turned), module(turned.contiguous()))


@torch.inference_mode()
def test_a_row_has_bits_of_its_own_with_any_number_of_threads(monkeypatch):
    monkeypatch.setattr(compiled, "LEAST_WORK", 1)
    before = torch.get_num_threads()
    rows, weight = torch.randn(33, 208).bfloat16(), torch.randn(208).bfloat16()
    torch.set_num_threads(1)
    whole = norm(rows, weight, 1e-6, rounded=True, offset=False), gated(rows, rows.flip(0))
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            for count in (1, 2, 5, 33):
                assert torch.equal(norm(rows[:count], weight, 1e-6, rounded=True, offset=False), whole[0][:count])
                assert torch.equal(gated(rows[:count], rows.flip(0)[:count]), whole[1][:count])
    finally:
        torch.set_num_threads(before)


@torch.inference_mode()
def test_a_gate_is_what_torch_makes_of_it():
    every = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)  # all of bf16
    every = every[every.isfinite()].repeat(2)[: 65024 // 16 * 16]
    up = torch.full_like(every, 1.5)
    made, expected = gated(every, up).double(), (nn.functional.silu(every) * up).double()
    assert torch.allclose(made, expected, rtol=2**-7, atol=1e-30)
    assert gated(torch.full((16,), float("nan")).bfloat16(), up[:16]).isnan().all()


@torch.inference_mode()
def test_the_two_halves_of_one_product_are_a_gate_and_its_factor():
    both = torch.randn(2, 3, 96).bfloat16()
    gate, up = both.chunk(2, -1)
    assert torch.equal(gated(gate, up), gated(gate.contiguous(), up.contiguous()))
    assert torch.equal(gated(gate[:, :0], up[:, :0]), gate[:, :0])


@torch.inference_mode()
def test_a_gate_is_proven_or_keeps_its_forward():
    rows = torch.randn(5, 16).bfloat16()
    for act, swapped, proven in (
        (nn.SiLU(), False, True),
        (nn.SiLU(), True, False),
        (nn.GELU(), False, False),
        (nn.ReLU(), False, False),
    ):
        module = Gate(act, swapped)
        expected = module(rows)
        found = routed(module)
        assert isinstance(found, RoutedGate)
        assert (found.kernel is not None) is proven
        assert torch.allclose(module(rows), expected, rtol=0.05, atol=0.01)


@torch.inference_mode()
def test_a_module_whose_forward_wants_more_is_left_alone():
    class Gated(Norm):
        def forward(self, rows, gate):
            return super().forward(rows) * gate

    module = Gated()
    assert routed(module).kernel is None
    rows = torch.randn(2, WIDTH).bfloat16()
    assert torch.equal(module(rows, rows), Norm.forward(module, rows) * rows)


@torch.inference_mode()
def test_a_mode_sees_one_call_of_a_norm(rows):
    """A pause replays calls: a kernel's own must not be among them."""
    seen = []

    class Watch(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            seen.append(func)
            return func(*args, **kwargs or {})

    module = Norm()
    routed(module)
    with Watch():
        module(rows)
    assert seen == [elements.normed]
    with ExactProducts():
        inside = module(rows)
    assert torch.equal(inside, module(rows))


def test_nothing_is_routed_in_other_dtypes_and_widths():
    wide = Norm()
    wide.weight = nn.Parameter(torch.ones(WIDTH))
    odd = Norm()
    odd.weight = nn.Parameter(torch.ones(WIDTH + 1).bfloat16())
    assert route_elements(nn.ModuleList([wide, odd, nn.LayerNorm(16, dtype=torch.bfloat16)])) == []
    assert isinstance(route_elements(nn.ModuleList([Norm()]))[0], RoutedNorm)

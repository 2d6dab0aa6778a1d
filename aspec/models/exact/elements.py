"""Norms and gates of a model by kernels of this machine, where they are proven to be what the module computes.

Which formula a module has is not known from its name: its own forward is run on numbers that tell the formulas apart.
Kernels compute every row by itself, so they serve exact steps and others.
"""

import copy
import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Mapping
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.overrides import handle_torch_function, has_torch_function_unary

from aspec.io.host_info import compiler
from aspec.models.compiled.products import INNER, gated, norm
from aspec.models.hf_compat import Experts, experts_of, set_gate

EPS = ("variance_epsilon", "eps")  # the names of what norms add to the mean square
NORMS = tuple(itertools.product((True, False), (False, True)))
"""Formulas of norms, ``rounded`` and ``offset``: Llama rounds before the weight, Gemma stores weights less 1."""

GATE = ("gate_proj", "up_proj", "down_proj")  # the linear modules of a feed-forward layer with a gate
PLAIN = (torch.Tensor, nn.Parameter)  # no other kinds of tensor
PROVEN_ROWS = 48
EQUAL = 0.99  # of the numbers of a proof have the same bits: another order of rounding changes a fifth of them
TOLERANCE, TINY = 2**-7, 1e-30  # of all numbers: relative, one rounding to bf16, and what counts as 0

Rows = torch.Tensor
Forward = Callable[..., torch.Tensor]


class Routed(ABC):
    """What takes the place of a module's ``own`` function: a kernel, once ``prove`` has found one, else that."""

    def __init__(self, module: nn.Module, own: Forward) -> None:
        self._module, self._own = module, own
        self.kernel: Forward | None = None

    @property
    def kind(self) -> Hashable:
        """Modules of one kind compute the same."""
        settings = (
            (name, own) for name, own in vars(self._module).items() if isinstance(own, bool | int | float | str)
        )
        return type(self), type(self._module), repr(self._module), tuple(sorted(settings))

    @abstractmethod
    def prove(self) -> None:
        """Find the kernel that gives the bits of the module's own function, if there is one."""


class RoutedNorm(Routed):
    """The forward of a norm by the mean of squares."""

    def __init__(self, module: nn.Module, eps: float) -> None:
        super().__init__(module, module.forward)
        self._eps = eps

    def __call__(self, rows: Rows, *rest: object, **named: object) -> Rows:
        """[..., W] -> [..., W]. A torch function mode sees one call of ``normed``."""
        if self.kernel is None or rest or named:
            return self._own(rows, *rest, **named)
        return normed(rows, self)

    @property
    def formula(self) -> dict[str, Any]:
        """The settings of its kernel; empty if there is none."""
        return self.kernel.keywords if isinstance(self.kernel, partial) else {}

    @property
    def parameters(self) -> Mapping[str, nn.Parameter | None]:
        """Those of the module, with its weight."""
        return self._module._parameters

    def compute(self, rows: Rows) -> Rows:
        """The same, when no mode looks on."""
        weight = self._module._parameters["weight"]
        assert self.kernel is not None, "a formula was found"
        return self.kernel(rows, weight) if _plain(rows) and _plain(weight) else self._own(rows)

    def prove(self) -> None:
        """Find the formula that gives the bits of the module's own forward, if there is one."""
        weight, module = self._module._parameters["weight"], copy.copy(self._module)
        assert weight is not None, "a norm that was routed has a weight"
        generator = torch.Generator().manual_seed(5)
        width, dtype = len(weight), weight.dtype
        rows = torch.randn(PROVEN_ROWS, width, generator=generator)
        rows = (rows * torch.logspace(-4, 3, PROVEN_ROWS)[:, None]).to(dtype)
        weight = nn.Parameter(torch.randn(width, generator=generator).to(dtype), requires_grad=False)
        module.__dict__["_parameters"] = {"weight": weight}
        expected = _result(type(module).forward, module, rows)
        for rounded, offset in NORMS:
            kernel = partial(norm, eps=self._eps, rounded=rounded, offset=offset)
            if _same(kernel(rows, weight), expected):
                self.kernel = kernel
                return


class RoutedGate(Routed):
    """The forward of a feed-forward layer with a gate: its activation and product in a kernel."""

    def __call__(self, rows: Rows, *rest: object, **named: object) -> Rows:
        """[..., H] -> [..., H]. A torch function mode sees the products, and one call of ``acted``."""
        if self.kernel is None or rest or named or not _plain(rows):
            return self._own(rows, *rest, **named)
        gate, up, down = (self._module.get_submodule(name) for name in GATE)
        made: Rows = down(acted(gate(rows), up(rows)))
        return made

    def prove(self) -> None:
        """Find out whether the module's own forward computes this."""
        module = copy.copy(self._module)
        gate, up = _gate_and_factor((PROVEN_ROWS, _outputs(self._module)))
        given = dict(zip(GATE, map(_Given, (gate, up, None)), strict=True))
        module.__dict__["_modules"] = {**self._module._modules, **given}
        self.kernel = acted if _same(gated(gate, up), _result(type(module).forward, module, gate)) else None


class RoutedAct(Routed):
    """What experts compute between their two products, from rows [n, 2 I]."""

    def __init__(self, module: nn.Module, experts: Experts) -> None:
        super().__init__(module, experts.act)
        self.width = module.get_parameter(experts.down).shape[1 if experts.transposed else 2]

    def __call__(self, rows: Rows) -> Rows:
        """[n, 2 I] -> [n, I]."""
        return acted(*rows.chunk(2, -1)) if self.kernel is not None and _plain(rows) else self._own(rows)

    def prove(self) -> None:
        """Find out whether the first half is a gate, and the second its factor."""
        gate, up = _gate_and_factor((PROVEN_ROWS, self.width))
        self.kernel = acted if _same(gated(gate, up), _result(self._own, torch.cat([gate, up], 1))) else None


def normed(rows: Rows, norm: RoutedNorm) -> Rows:
    """What a norm makes of rows [..., W]."""
    if has_torch_function_unary(rows):
        made: Rows = handle_torch_function(normed, (rows,), rows, norm)
        return made
    return norm.compute(rows)


def acted(gate: Rows, up: Rows) -> Rows:
    """The activation of ``gate`` [..., I] times ``up``."""
    if has_torch_function_unary(gate):
        made: Rows = handle_torch_function(acted, (gate,), gate, up)
        return made
    return gated(gate, up)


def _gate_and_factor(shape: tuple[int, int]) -> tuple[Rows, Rows]:
    """Numbers of all sizes that tell activations apart."""
    generator = torch.Generator().manual_seed(5)
    gate, up = (torch.randn(shape, generator=generator) for _ in range(2))
    return (gate * torch.logspace(-3, 1.5, len(gate))[:, None]).bfloat16(), up.bfloat16()


class _Given(nn.Module):
    """In place of a linear module: what it returns, or None: its input."""

    def __init__(self, result: torch.Tensor | None) -> None:
        super().__init__()
        self._result = result

    def forward(self, rows: Rows) -> Rows:
        return rows if self._result is None else self._result


def route_elements(model: nn.Module) -> list[Routed]:
    """Give the norms and gates of ``model`` forwards that may use kernels, once after it is built."""
    found: list[Routed] = []
    for module in model.modules():
        routed = None if "forward" in vars(module) else _routed(module)
        if routed is not None:
            module.forward = routed
            found.append(routed)
        experts = experts_of(module)
        if experts is not None and experts.gated:
            act = RoutedAct(module, experts)
            if _fits(module.get_parameter(experts.down).dtype, act.width):
                set_gate(module, act)
                found.append(act)
    return found


def _routed(module: nn.Module) -> RoutedNorm | RoutedGate | None:
    """What takes the place of the module's forward, if it is a norm or has a gate."""
    eps = [vars(module)[name] for name in EPS if isinstance(vars(module).get(name), float)]
    if eps and not module._modules and set(module._parameters) == {"weight"}:
        weight = module._parameters["weight"]
        if weight is not None and weight.dim() == 1 and _fits(weight.dtype, len(weight)):
            return RoutedNorm(module, eps[0])
    elif all(type(module._modules.get(name)) is nn.Linear for name in GATE):
        weight = module.get_parameter(f"{GATE[0]}.weight")
        if _fits(weight.dtype, _outputs(module)):
            return RoutedGate(module, module.forward)
    return None


def _outputs(module: nn.Module) -> int:
    """The width between the linear modules of a feed-forward layer with a gate."""
    return len(module.get_parameter(f"{GATE[0]}.weight"))


@torch.inference_mode()
def prove_elements(routed: list[Routed]) -> None:
    """Let those use kernels for which they are proven; without a compiler none does."""
    if not compiler():
        return
    proven: dict[Hashable, Routed] = {}
    try:
        for own in routed:
            known = proven.setdefault(own.kind, own)
            if known is own:
                own.prove()
            own.kernel = known.kernel
    except (ImportError, OSError, RuntimeError):  # a build of the package that this machine can not use
        return


def _result(forward: Callable[..., object], *given: object) -> object:
    """What a forward makes of what it is given; None if it wants something else."""
    try:
        return forward(*given)
    except Exception:  # a family's own code
        return None


def _fits(dtype: torch.dtype, width: int) -> bool:
    return dtype == torch.bfloat16 and width > 0 and width % INNER == 0


def _plain(tensor: torch.Tensor | None) -> bool:
    """Whether a kernel may read the tensor."""
    return tensor is not None and tensor.is_cpu and tensor.dtype == torch.bfloat16 and type(tensor) in PLAIN


def _same(made: torch.Tensor, expected: object) -> bool:
    if not isinstance(expected, torch.Tensor) or made.shape != expected.shape or made.dtype != expected.dtype:
        return False
    near = (made.float() - expected.float()).abs() <= TOLERANCE * expected.float().abs() + TINY
    return bool(near.all()) and float((made == expected).float().mean()) >= EQUAL

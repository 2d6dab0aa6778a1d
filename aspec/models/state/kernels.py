"""The functions that a family's mixer calls, for one layer of one step: each brings its inputs into one form.

Arguments and shapes are those of transformers' own functions: B rows, T tokens, H heads; the state comes from the step.
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, Protocol

import torch
from torch.nn import functional

from aspec.models.exact.blocks import in_whole_vectors
from aspec.models.hf_compat import activation_function
from aspec.models.state.recurrence import Inputs


class MixerStep(Protocol):
    """One layer of one step, as its mixer sees it."""

    def convolve(self, inputs: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """[B, T, C] -> [B, T, C] with ``weight`` [C, K]."""
        ...

    def recur(self, given: Inputs) -> torch.Tensor:
        """The results [B * T, H, Dv] fp32."""
        ...


def convolution(
    step: MixerStep,
    hidden_states: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    activation: str | None = None,
    **_: object,
) -> torch.Tensor:
    """A depthwise causal convolution of [B, C, T]."""
    result = step.convolve(hidden_states.transpose(1, 2), weight, bias)
    if activation is not None:
        result = in_whole_vectors(activation_function(activation), result)
    return result.transpose(1, 2)


def delta_rule(
    step: MixerStep,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    use_qk_l2norm_in_kernel: bool = False,
    **_: object,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gated delta rule, g [B, T, H], and Kimi delta attention, g [B, T, H, Dk]: the logarithm of the decay.

    Query and key are [B, T, G, Dk], value is [B, T, H, Dv].
    """
    query, key = (states.flatten(0, 1).float() for states in (query, key))
    if use_qk_l2norm_in_kernel:
        query, key = _normalised(query), _normalised(key)
    value_rows = value.flatten(0, 1).float()
    rate = g.float().reshape(*value_rows.shape[:2], -1, 1)
    given = Inputs(query * key.shape[-1] ** -0.5, key, value_rows, rate, beta.flatten(0, 1).float())
    return step.recur(given).view(value.shape).to(value.dtype), value.new_empty(0)


def state_space(
    step: MixerStep,
    hidden_states: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,  # transformers' names
    B: torch.Tensor,
    C: torch.Tensor,
    chunk_size: int = 0,
    D: torch.Tensor | None = None,
    dt_bias: torch.Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
    return_final_states: bool = False,
    **_: object,
) -> Any:
    """The SSD of Mamba 2: x [B, T, H, P], dt [B, T, H], A [H], B and C [B, T, G, N], D [H]."""
    inputs = hidden_states.float()
    dt = _step_sizes(dt, dt_bias, dt_softplus).clamp(*dt_limit).float()
    given = Inputs(
        C.flatten(0, 1).float(),
        B.flatten(0, 1).float(),
        (inputs * dt[..., None]).flatten(0, 1),
        (dt * A.float()).flatten(0, 1)[..., None, None],
    )
    result = step.recur(given).view(inputs.shape)
    if D is not None:
        result = result + inputs * D[:, None]
    return (result, result.new_empty(0)) if return_final_states else result


def lightning_attention(
    step: MixerStep, mixer: Any, hidden_states: torch.Tensor, **_: object
) -> tuple[torch.Tensor, None]:
    """The whole mixer of MiniMax-01 (arXiv 2501.08313), attention without a softmax that decays by a slope per head."""
    states = mixer.act_fn(mixer.qkv_proj(hidden_states)).flatten(0, 1)
    states = states.unflatten(-1, (mixer.num_attention_heads, 3 * mixer.head_dim)).float()
    query, key, value = states.split(mixer.head_dim, -1)
    slopes = mixer.slope_rate.float().expand(len(value), *mixer.slope_rate.shape)
    mixed = step.recur(Inputs(query, key, value, -slopes)).to(hidden_states.dtype)
    mixed = mixer.norm(mixed.view(*hidden_states.shape[:2], -1))
    return mixer.out_proj(torch.sigmoid(mixer.output_gate(hidden_states)) * mixed), None


def selective_scan(
    step: MixerStep,
    hidden_states: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None = None,
    z: torch.Tensor | None = None,
    delta_bias: torch.Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
    **_: object,
) -> Any:
    """Mamba 1: x, dt and the gate z [B, I, T], A [I, N], B and C [B, N, T], D [I]. One head, Dk = N, Dv = I."""
    batch, channels, tokens = hidden_states.shape
    inputs, dt = hidden_states.transpose(1, 2).float(), dt.transpose(1, 2)
    dt = _step_sizes(dt, delta_bias, delta_softplus)
    nodes = batch * tokens
    given = Inputs(
        C.transpose(1, 2).float().reshape(nodes, 1, -1),
        B.transpose(1, 2).float().reshape(nodes, 1, -1),
        (dt * inputs).reshape(nodes, 1, channels),
        dt.float().reshape(nodes, 1, 1, channels),
        scale=A.float().T,
    )
    result = step.recur(given).view(inputs.shape)
    if D is not None:
        result = result + inputs * D
    if z is not None:
        result = result * in_whole_vectors(functional.silu, z.transpose(1, 2))
    result = result.transpose(1, 2)
    return (result, result.new_empty(0)) if return_last_state else result


def _step_sizes(dt: torch.Tensor, bias: torch.Tensor | None, softplus: bool) -> torch.Tensor:
    dt = dt if bias is None else dt + bias.to(dt.dtype)
    return in_whole_vectors(functional.softplus, dt) if softplus else dt


def _normalised(states: torch.Tensor) -> torch.Tensor:
    """``states`` [..., D] divided by their lengths."""
    return states * torch.rsqrt((states * states).sum(-1, keepdim=True) + 1e-6)


KERNELS: Mapping[str, Callable[..., Any]] = MappingProxyType(
    {
        "convolution": convolution,
        "delta rule": delta_rule,
        "state space": state_space,
        "selective scan": selective_scan,
    }
)
"""By the kinds of ``hf_compat.RECURRENT_FUNCTIONS``."""

FORWARDS: Mapping[str, Callable[..., Any]] = MappingProxyType({"lightning attention": lightning_attention})
"""By the kinds of ``hf_compat.RECURRENT_FORWARDS``: of a layer's step, the mixer, and the arguments of its forward."""

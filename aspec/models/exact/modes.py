"""The contexts in which a layer computes its products: exact ones in exact steps, the fastest in others."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from aspec.models.exact.blocks import VECTOR_ELEMENTS, in_whole_vectors
from aspec.models.exact.products import PRODUCTS, WHOLE_VECTORS, grouped_product, set_exact, widens_experts
from aspec.models.kv_cache import StepCache


class ExactStep:
    """Linear modules that are ``routed`` compute exact products on the thread that enters it."""

    def __enter__(self) -> None:
        set_exact(True)

    def __exit__(self, *_: object) -> None:
        set_exact(False)


class ExactProducts(TorchFunctionMode):
    """Computes every product of activations and weights exactly, on the thread that enters the mode.

    A token's bits then depend on the token only: not on its place in the pass and not on the other rows.
    ``torch.matmul`` is unchanged, because only attention uses it. Inputs of activation functions are padded to whole
    vectors, because other instructions compute the remainder of a width. ``acted``: some call was changed, so that
    ``ExactStep`` would not do.
    """

    acted = False

    def __torch_function__(
        self, func: Callable[..., Any], types: object, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        product = PRODUCTS.get(func)
        if product is not None:
            self.acted = True
            return product(*args, **kwargs)
        if func in WHOLE_VECTORS and args[0].shape[-1] % VECTOR_ELEMENTS:
            self.acted = True
            return in_whole_vectors(func, *args, **kwargs)
        return func(*args, **kwargs)

    def __enter__(self) -> "ExactProducts":
        set_exact(True)
        return super().__enter__()  # type: ignore[no-untyped-call, no-any-return]

    def __exit__(self, *error: Any) -> None:
        set_exact(False)
        super().__exit__(*error)  # type: ignore[no-untyped-call]


class FastExperts(TorchFunctionMode):
    """Widens the grouped products of experts where that is faster, in steps that are not exact.

    ``acted``: there was such a product, so that a step without the mode would be slower.
    """

    acted = False

    def __torch_function__(
        self, func: Callable[..., Any], types: object, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch._grouped_mm and widens_experts(args[1]):
            self.acted = True
            return grouped_product(*args, **kwargs)
        return func(*args, **kwargs)


def matmul_mode(step: StepCache) -> contextlib.AbstractContextManager[object]:
    """The context in which a step's products are computed: ExactProducts if the step is exact."""
    return ExactProducts() if step.exact else contextlib.nullcontext()


def bare_step(step: StepCache) -> contextlib.AbstractContextManager[object]:
    """The same where only linear modules that are ``routed`` compute."""
    return ExactStep() if step.exact else contextlib.nullcontext()


class LayerModes:
    """The cheapest context in which each layer of a model computes its products: exact in exact steps, else fast.

    A mode costs microseconds in every call of torch. The first step of every layer runs in one; if it changes nothing,
    all the layer's products are those of routed linear modules, and later steps need no mode. One token and several
    are told apart, because a layer may take another way for one.
    """

    def __init__(self) -> None:
        self._bare: set[tuple[bool, int, str, bool]] = set()
        self._needs_mode: set[tuple[bool, int, str]] = set()

    def of(self, layer: int, step: StepCache, half: str = "") -> contextlib.AbstractContextManager[object]:
        """The context of one layer's step; ``half``: the part of a layer that does not run as a whole."""
        key = step.exact, layer, half, step.position_ids.shape[1] == 1
        if key not in self._bare or key[:3] in self._needs_mode:
            return self._learn(key)
        return bare_step(step)

    @contextlib.contextmanager
    def _learn(self, key: tuple[bool, int, str, bool]) -> Iterator[None]:
        with ExactProducts() if key[0] else FastExperts() as mode:
            yield
        if mode.acted:
            self._needs_mode.add(key[:3])
        self._bare.add(key)

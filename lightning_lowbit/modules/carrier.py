"""What travels between the layers of an integer network: int8 and one exponent, in the shape of a float tensor."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from lightning_lowbit.errors import UnsupportedModelError
from lightning_lowbit.kernels.sums import aligned_sum
from lightning_lowbit.numerics.block import align_all
from lightning_lowbit.numerics.exponent import clamp_exponent, pow2

if TYPE_CHECKING:
    from lightning_lowbit.modules.base import Scheme, Switch

__all__ = ["Carrier", "apply", "carry", "is_codes", "plain"]

_aten = torch.ops.aten

# Calls that move values, pad with zeros or scatter them back: the codes move, the exponent stays.
_MOVES = frozenset({
    _aten.detach.default, _aten.alias.default, _aten.view.default, _aten._unsafe_view.default, _aten.clone.default,
    _aten._reshape_alias.default, _aten.permute.default, _aten.transpose.int, _aten.t.default, _aten.slice.Tensor,
    _aten.slice_backward.default, _aten.select.int, _aten.select_backward.default, _aten.squeeze.default,
    _aten.squeeze.dim, _aten.squeeze.dims, _aten.unsqueeze.default, _aten.expand.default, _aten.flip.default,
    _aten.roll.default, _aten.index_select.default, _aten.split.Tensor, _aten.split_with_sizes.default,
    _aten.unbind.int, _aten.pixel_shuffle.default, _aten.pixel_unshuffle.default, _aten.contiguous.default,
})  # fmt: skip

# What reads memory sees the float values.
_READS_MEMORY: frozenset[Any] = frozenset({
    Tensor.numpy, Tensor.tolist, Tensor.item, Tensor.__array__, Tensor.__repr__, Tensor.__format__, Tensor.data_ptr,
    Tensor.__reduce_ex__, Tensor.__deepcopy__, Tensor.untyped_storage, Tensor.__bool__, Tensor.__float__,
    Tensor.__int__,
})  # fmt: skip


class Origin(Protocol):
    """Who makes carriers: a low-bit module, or a quantizer behind a module of the user's."""

    scheme: Scheme
    switch: Switch

    @property
    def path(self) -> str: ...


class Carrier(Tensor):
    """A float32 tensor to everyone who looks, stored as ``payload * 2**exponent`` until someone does.

    Views, slices and zero padding keep it a carrier; any other operation reads its exact float values and gives
    an ordinary tensor. The sum of two carriers is one too, wider and exact: that is how autograd adds up the errors
    of a tensor that forks, and whoever made the tensor rounds once.

    Attributes:
        payload: int8 codes; int32 or int64 in a sum of errors.
        exponent: int32, 0-dim, on the device.
        origin: the module that made it; its scheme says which functions of torch are integer ones.
    """

    payload: Tensor
    exponent: Tensor
    origin: Any

    @staticmethod
    def __new__(cls, payload: Tensor, exponent: Tensor, origin: Any) -> Carrier:
        made: Carrier = Tensor._make_wrapper_subclass(
            cls, payload.shape, strides=payload.stride(), dtype=torch.float32, device=payload.device
        )
        return made

    def __init__(self, payload: Tensor, exponent: Tensor, origin: Any) -> None:
        self.payload, self.exponent, self.origin = payload, exponent, origin

    def plain(self) -> Tensor:
        """The values as an ordinary float32 tensor: exact, since codes have at most 24 bits."""
        return self.payload.to(torch.float32) * pow2(self.exponent)

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _READS_MEMORY:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*tree_map(plain, args), **kwargs)
        first = args[0] if args else kwargs.get("input")
        if type(first) is Carrier and first.__dict__["payload"].dtype is torch.int8:
            integer: Callable[..., Any] | None = first.__dict__["origin"].scheme.functions().get(func)
            if integer is not None:
                result = integer(*args, **kwargs)
                if result is not NotImplemented:
                    return result
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch's stub has no defaults
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        first = args[0]
        if isinstance(first, Carrier):
            if func in _MOVES or (func is _aten.constant_pad_nd.default and (len(args) < 3 or args[2] == 0)):
                if torch.is_inference_mode_enabled() and not first.is_inference():
                    with torch.inference_mode(False):  # autograd expects a view of an ordinary tensor to be one too
                        return _moved(func, first, args[1:], kwargs)
                return _moved(func, first, args[1:], kwargs)
            plain_sum = func is _aten.add.Tensor and kwargs.get("alpha", 1) == 1
            if plain_sum and isinstance(args[1], Carrier) and first.shape == args[1].shape:
                return _sum(first, args[1])
            if func is _aten._to_copy.default and kwargs.get("dtype", torch.float32) in (None, torch.float32):
                kwargs = {key: value for key, value in kwargs.items() if key != "dtype"}
                device = kwargs.get("device", first.device)
                return Carrier(func(first.payload, **kwargs), first.exponent.to(device), first.origin)
            if func._schema.is_mutable:
                raise UnsupportedModelError(
                    f"{first.origin.path}: {func._schema.name} writes into its result in place, which is stored as "
                    "integers. Write it out of place (x = x + 1 for x += 1), or leave the layer float with skip=."
                )
        if func is _aten.cat.default and all(isinstance(part, Carrier) for part in first):
            return _joined(first, *args[1:], **kwargs)
        # Without autograd (inference mode) compound operations come here whole: reshape, flatten, to.
        result = func.decompose(*args, **kwargs)
        return func(*tree_map(plain, args), **tree_map(plain, kwargs)) if result is NotImplemented else result


def _joined(parts: Sequence[Carrier], dim: int = 0) -> Carrier:
    """Side by side on the finest exponent: how autograd puts together the errors of a tensor that was split."""
    payloads, exponent = align_all([part.payload for part in parts], [part.exponent for part in parts])
    return Carrier(torch.cat(payloads, dim), exponent, parts[0].origin)


def apply(function: Any, *args: Any) -> Tensor:
    """``function.apply`` of an autograd.Function that gives one tensor."""
    result: Tensor = function.apply(*args)
    return result


def plain(value: Any) -> Any:
    """A carrier's float values; anything else as it is."""
    return value.plain() if isinstance(value, Carrier) else value


def is_codes(value: Any) -> bool:
    """Whether it is a carrier of int8, not of a wider sum that user code made where nobody followed it."""
    return isinstance(value, Carrier) and value.payload.dtype is torch.int8


def carry(payload: Tensor, exponent: Tensor, origin: Any) -> Carrier:
    """A carrier whose exponent lies where float32 holds its values exactly; exponents that had to move are counted."""
    inside = clamp_exponent(exponent)
    run = origin.switch.run
    run.clamped = run.clamped + (inside != exponent)
    return Carrier(payload, inside, origin)


def _moved(func: Any, x: Carrier, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The codes moved; whatever tensors come out keep the exponent."""
    return tree_map(lambda payload: Carrier(payload, x.exponent, x.origin), func(x.payload, *args, **kwargs))


def _sum(a: Carrier, b: Carrier) -> Carrier:
    total, exponent = aligned_sum(a.payload, a.exponent, b.payload, b.exponent)
    return Carrier(total, exponent, a.origin)

"""A dispatch mode that sees every operation of torch and keeps those that compute with floats."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from types import CodeType
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lightning_lowbit import kernels
from lightning_lowbit.modules.carrier import Carrier
from lightning_lowbit.modules.loss import displayed_loss

__all__ = ["EXACT_SUMS", "INTEGER_PRODUCTS", "LOSS_FACTOR", "SUSPENDED", "FloatAudit"]

INTEGER_PRODUCTS: tuple[Callable[..., Any], ...] = (
    kernels.int8_matmul, kernels.int8_conv2d, kernels.int8_conv2d_input, kernels.int8_conv2d_weight,
)  # fmt: skip
"""They may compute in float32, and return it, where all their sums are integers below 2^24."""

SUSPENDED = (*INTEGER_PRODUCTS, displayed_loss)
"""Functions inside which nothing is looked at: the products, and the loss that is shown and used nowhere."""

LOSS_FACTOR = "_CrossEntropy.backward"
"""Where 0-dim floats may be computed with: the factor on the loss, whose exponent goes into that of the errors."""

EXACT_SUMS = "_with_bias"
"""Where float32 numbers may be added if they and their sum are integers below 2^24: a bias to float32 products."""

# They move, make, compare or select values.
_FREE = {
    # reshape, slice, pad, copy
    "view", "_unsafe_view", "reshape", "_reshape_alias", "as_strided", "t", "transpose", "permute", "expand", "squeeze",
    "unsqueeze", "slice", "select", "narrow", "split", "split_with_sizes", "unbind", "cat", "stack", "index_select",
    "constant_pad_nd", "detach", "alias", "clone", "contiguous", "copy_", "unfold",
    # make
    "empty", "empty_like", "empty_strided", "new_empty", "new_zeros", "zeros", "zeros_like", "ones_like", "full",
    "full_like", "scalar_tensor", "lift_fresh", "zero_", "fill_", "arange",
    # compare and select
    "eq", "ne", "lt", "le", "gt", "ge", "where", "maximum", "minimum", "amax", "amin", "aminmax", "max", "min", "relu",
    "clamp", "clamp_", "clamp_min", "threshold_backward", "sign", "isfinite", "masked_fill", "masked_fill_",
    "is_same_size", "equal",
}  # fmt: skip
_MULTIPLICATIONS = {"mul", "mul_", "div", "div_"}


class FloatAudit(TorchDispatchMode):
    """Notes each operation on floats that is none of these: a multiplication by a power of two, a cast that changes
    no value, reshaping, padding, slicing, copying, comparing, selecting; and outside of the functions named above.

    Attributes:
        armed: whether it notes anything.
        found: "operator in function", in the order of their first call.
        seen: how many operations it looked at.
        passed: names of the suspended functions that were called.
    """

    def __init__(self) -> None:
        super().__init__()
        self.armed = False
        self.found: dict[str, None] = {}
        self.seen = 0
        self.passed: set[str] = set()
        self._suspended = {function.__code__: function.__name__ for function in SUSPENDED}

    def arm(self, *_: Any) -> None:
        """From here on; takes the arguments of a module's forward hook."""
        self.armed = True

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if Carrier in types:
            return NotImplemented  # it unfolds into operations on its integers, which come here one by one
        result = func(*args, **kwargs)
        if self.armed:
            self._look(func, (args, kwargs), result)
        return result

    def _look(self, func: Any, given: Any, result: Any) -> None:
        self.seen += 1
        inputs, outputs = list(_tensors(given)), list(_tensors(result))
        if not any(x.is_floating_point() for x in (*inputs, *outputs)):
            return
        name = func._schema.name.partition("::")[2]
        if name in _FREE or (name in _MULTIPLICATIONS and _by_power_of_two(given)):
            return
        if name in ("_to_copy", "round") and _unchanged(inputs, outputs):
            return
        if name == "_local_scalar_dense" and float(result).is_integer():
            return  # read to decide something; any other float could be computed with out of sight
        callers = _callers()
        suspended = [self._suspended[code] for code in callers if code in self._suspended]
        self.passed.update(suspended)
        if suspended or (callers[0].co_qualname == EXACT_SUMS and _exact_sum(name, [*inputs, *outputs])):
            return
        if all(x.dim() == 0 for x in (*inputs, *outputs)) and any(code.co_qualname == LOSS_FACTOR for code in callers):
            return
        self.found[f"{name} in {callers[0].co_qualname}"] = None


def _tensors(tree: Any) -> Iterable[Tensor]:
    return (leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor))


def _by_power_of_two(given: Any) -> bool:
    """Whether one factor is a power of two, its sign aside, or nothing but zeros and ones (a mask)."""
    (left, right), _ = given
    return any(_is_power_of_two(torch.as_tensor(x).double()) for x in (right, left))


def _is_power_of_two(x: Tensor) -> bool:
    if x.dim() > 0:
        return bool(((x == 0) | (x == 1)).all())
    return bool(torch.frexp(x).mantissa.abs() == 0.5)


def _unchanged(inputs: list[Tensor], outputs: list[Tensor]) -> bool:
    """A cast that changes no value; exponents are kept in float32, and read back by rounding what is whole."""
    return all(torch.equal(x.double(), y.double()) for x, y in zip(inputs, outputs, strict=True))


def _exact_sum(name: str, numbers: list[Tensor]) -> bool:
    return name == "add_" and all(torch.equal(x, x.round()) and float(x.abs().max()) < 2**24 for x in numbers)


def _callers() -> list[CodeType]:
    """The package's functions that are running, innermost first."""
    codes, frame = [], sys._getframe(1)
    while frame is not None:
        if "lightning_lowbit" in frame.f_code.co_filename:
            codes.append(frame.f_code)
        frame = frame.f_back  # type: ignore[assignment]
    return codes or [sys._getframe(1).f_code]

"""One tensor's value with another's gradient: the exact form of y + (value - y).detach()."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_lowbit.errors import UnsupportedModelError

__all__ = ["pass_through", "require_first_order"]


def require_first_order(name: str) -> None:
    """Called in a backward: UnsupportedModelError where a graph of it is built, for derivatives that are none."""
    if torch.is_grad_enabled():
        raise UnsupportedModelError(
            f"{name}: got a gradient of gradients (create_graph=True, as a gradient penalty has it), and rounded "
            "errors have none. Leave the layers that it passes float with skip=."
        )


class _PassThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, value: Tensor | tuple[Tensor], inside: Tensor | None) -> Tensor:
        ctx.dtype = x.dtype
        ctx.save_for_backward(inside)
        return value.view_as(value) if isinstance(value, Tensor) else value[0]

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        (inside,) = ctx.saved_tensors
        return (g if inside is None else torch.where(inside, g, 0.0)).to(ctx.dtype), None, None


def pass_through(x: Tensor, value: Tensor, inside: Tensor | None = None) -> Tensor:
    """The very bits of ``value``; its gradient goes to ``x``, where ``inside`` says so.

    Adding a detached difference instead would round, and leave the grid.

    Args:
        x: any shape.
        value: shape of x; no gradient flows into it.
        inside: bool, shape of x; None is everywhere.

    >>> x = torch.tensor([0.3, 0.7], requires_grad=True)
    >>> y = pass_through(x, torch.tensor([0.25, 0.75]), torch.tensor([True, False]))
    >>> y.sum().backward()
    >>> y.tolist(), x.grad.tolist()
    ([0.25, 0.75], [1.0, 0.0])
    """
    if not (torch.is_grad_enabled() and x.requires_grad):
        return value
    # In a tuple it is no argument whose view comes back, and may be overwritten later; compilers know tensors only.
    given = value if torch.compiler.is_compiling() or value is x else (value,)
    return _PassThrough.apply(x, given, inside)  # type: ignore[no-untyped-call, no-any-return]  # torch leaves it untyped

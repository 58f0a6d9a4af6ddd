"""Hinge losses, one class against all others (Courbariaux et al., arXiv:1602.02830, whose networks train with them)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_lowbit.errors import ConfigError

__all__ = ["HingeLoss", "hinge_loss"]


def hinge_loss(input: Tensor, target: Tensor, squared: bool = False) -> Tensor:
    """Mean over batch and classes of max(0, 1 - z t), or of its square.

        z t                    -1    0   0.5   1    2
        max(0, 1 - z t)         2    1   0.5   0    0
        its gradient in z      -t   -t   -t    0    0
        max(0, 1 - z t)^2       4    1  0.25   0    0
        its gradient in z     -4t  -2t   -t    0    0

    Outputs of a LogSoftmax are never above 0, so that the right class could not reach its margin: z are logits.

    Args:
        input: z, float [N, classes].
        target: class labels, int64 [N]: t is +1 for the labelled class and -1 for the others; or t itself, float
            [N, classes] of -1 and +1.
        squared: square each term (L2-SVM), which the paper's own experiments use.
    Returns:
        scalar, at least float32.
    Raises:
        ConfigError: a target of another shape or type, a label outside 0 .. classes - 1, a t that is not -1 or +1.

    >>> hinge_loss(torch.tensor([[2.0, 0.5], [0.0, 1.0]]), torch.tensor([0, 1]))  # terms 0, 1.5, 1, 0
    tensor(0.6250)
    """
    z = input.to(torch.promote_types(input.dtype, torch.float32))
    terms = F.relu(1 - z * _one_against_all(z, target))  # its gradient at 0 is 0
    return (terms.square() if squared else terms).mean()


class HingeLoss(nn.Module):
    """``hinge_loss`` as a module.

    Args:
        squared: square each term.
    """

    def __init__(self, squared: bool = False) -> None:
        super().__init__()
        self.squared = squared

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return hinge_loss(input, target, self.squared)

    def extra_repr(self) -> str:
        return f"squared={self.squared}"


def _one_against_all(z: Tensor, target: Tensor) -> Tensor:
    """Targets -1 and +1 in the shape of ``z``."""
    if z.dim() != 2:
        raise ConfigError(f"hinge_loss: input has shape {tuple(z.shape)}, expected [N, classes].")
    if target.dtype is torch.int64 and target.shape == z.shape[:1]:
        classes = z.shape[1]
        if _any((target < 0) | (target >= classes)):
            raise ConfigError(
                f"hinge_loss: target holds labels {int(target.min())} to {int(target.max())}, expected 0 to "
                f"{classes - 1}: input has {classes} classes. Leave out samples without a class before the loss."
            )
        return torch.full_like(z, -1.0).scatter(1, target.unsqueeze(1), 1.0)
    if target.is_floating_point() and target.shape == z.shape:
        if _any(target.abs() != 1):
            raise ConfigError(
                "hinge_loss: a float target of input's shape must hold -1 and +1 alone; this one has "
                f"{float(target[target.abs() != 1][0]):g}. Pass 2 * target - 1 for zeros and ones, or class labels."
            )
        return target.to(z.dtype)
    raise ConfigError(
        f"hinge_loss: target is {str(target.dtype).removeprefix('torch.')} {list(target.shape)}, expected class labels "
        f"(int64 {[len(z)]}) or -1 and +1 (float {list(z.shape)}). Convert labels with target.long()."
    )


def _any(wrong: Tensor) -> bool:
    """Whether any element is True; in a compiled graph, where values are not looked at, no."""
    return not torch.compiler.is_compiling() and bool(wrong.any())

"""Pieces for binary networks that users write: Bi-Real Net's block, ReActNet's learnable shifts.

In the float network they are ordinary differentiable modules, and their parameters are the user's optimizer's.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_lowbit.errors import ConfigError
from lightning_lowbit.graph.ops import Kind
from lightning_lowbit.modules.lowering import Builder

__all__ = ["BiRealBlock", "RPReLU", "RSign"]


class RSign(nn.Module):
    """x + shift: the learnable threshold, for each channel, of the sign that follows (ReActNet, arXiv:2003.03488).

    RSign(x) = +1 where x > alpha_c, else -1: the sign of x + shift with shift = -alpha_c. The sign itself is not
    here: a layer that is converted by a binary scheme takes it of whatever it reads.

    Args:
        channels: size of axis 1 of the input [N, channels, ...].
    """

    lowbit_kind = Kind.ACTIVATION  # one operation to the planner, as the activations of torch.nn

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        return _add(x, self.shift)

    def lower(self, build: Builder, x: Any) -> Any:
        """The same in a program."""
        return _added(build, x, self.shift)

    def extra_repr(self) -> str:
        return str(len(self.shift))


class RPReLU(nn.Module):
    """PReLU with a learnable shift before and behind it, for each channel (ReActNet, arXiv:2003.03488, eq. 4).

    f(x) = x - shift + offset where x > shift, slope (x - shift) + offset elsewhere; gamma_c, beta_c and zeta_c there
    are shift, slope and offset here.

    Args:
        channels: size of axis 1 of the input [N, channels, ...].
    """

    lowbit_kind = Kind.ACTIVATION

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(channels))
        self.slope = nn.Parameter(torch.full((channels,), 0.25))
        self.offset = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        return _add(F.prelu(_add(x, -self.shift), self.slope), self.offset)

    def lower(self, build: Builder, x: Any) -> Any:
        """The same in a program."""
        x = build.island("prelu", _added(build, x, -self.shift), constants={"slope": self.slope})
        return _added(build, x, self.offset)

    def extra_repr(self) -> str:
        return str(len(self.shift))


class BiRealBlock(nn.Module):
    """One 3x3 convolution with a shortcut of its own (Bi-Real Net, arXiv:1808.00278; with ``react``, ReActNet's).

    y = activation(norm(conv(sign(x))) + shortcut(x)), where sign is RSign and activation RPReLU, or, without
    ``react``, nothing and Hardtanh. The shortcut is the identity, or [2x2 average pool with stride 2,] 1x1
    convolution and batch norm where stride or channels change. To keep that convolution float under a binary scheme,
    as both papers do, pass ``skip=["*shortcut"]``.

    Args:
        in_channels, out_channels: of the input [N, in_channels, H, W] and the result [N, out_channels, H', W'].
        stride: 1, or 2 for half the size (H' = ceil(H / 2)).
        react: ReActNet's shifts and PReLU.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1, react: bool = True) -> None:
        super().__init__()
        if stride not in (1, 2):
            raise ConfigError(f"BiRealBlock(stride={stride!r}): expected 1, or 2 for half the size.")
        self.sign = RSign(in_channels) if react else nn.Identity()
        self.conv = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(out_channels)
        self.shortcut = nn.Sequential()
        if stride == 2:
            self.shortcut.append(nn.AvgPool2d(2, ceil_mode=True))  # an odd side halves as the convolution's does
        if stride == 2 or in_channels != out_channels:
            self.shortcut.append(nn.Conv2d(in_channels, out_channels, 1, bias=False))
            self.shortcut.append(nn.BatchNorm2d(out_channels))
        self.activation = RPReLU(out_channels) if react else nn.Hardtanh()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.activation(self.norm(self.conv(self.sign(x))) + self.shortcut(x))
        return y


def _add(x: Tensor, per_channel: Tensor) -> Tensor:
    """Add along axis 1, whatever the rank: a forward that asks for it could not be followed by torch.fx."""
    return (x.transpose(1, -1) + per_channel).transpose(1, -1)


def _added(build: Builder, x: Any, per_channel: Tensor) -> Any:
    other = per_channel.reshape(-1, *[1] * (len(x.shape) - 2))
    return build.island("add", x, constants={"other": other})

"""A layer, its batch norm, its rectifier and its quantizer as one step: value in integers, gradient through float.

nrm    = BN(conv(xq, W) + b)                         the float path, which moves the norm's statistics
Wm, bm = W, b with BN merged by those statistics     never by the batch's own
Wq, bq = their quantized values
y      = quantized(conv(xq, Wq) + bq), by the range that nrm has moved; gradient of clamp(nrm, low, high)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_lowbit.modules.clipped import ClipQuantizer
from lightning_lowbit.modules.merged import take_apart
from lightning_lowbit.modules.merging_sums import narrowed, product
from lightning_lowbit.modules.quantizer import in_backward, on
from lightning_lowbit.numerics.through import pass_through

__all__ = ["Backward", "Group", "merged_layer", "quantized"]

Backward = Literal["float", "quantized", "folded"]


@dataclass
class Group:
    """What a layer computes together with itself.

    Attributes:
        end: the quantizer of the result; None leaves sums as they are.
        rectify: whether a rectifier stands between.
        six: whether that ends at 6.
        tap: is shown the sums of the quantized operands.
        norms: batch norms of the network that no layer has merged.
        statistics: mean and variance that the last training batch took out of a weight, where values go by the batch.
    """

    end: ClipQuantizer | None = None
    rectify: bool = False
    six: bool = False
    tap: Callable[[Tensor], None] | None = None
    norms: list[nn.Module] = field(default_factory=list)
    statistics: tuple[Tensor, Tensor] | None = None

    def close(self, nrm: Tensor, sums: Tensor | None = None, seen: Tensor | None = None) -> Tensor:
        """The value of ``sums`` quantized, the gradient of nrm, the range of ``seen``; both are nrm if not given."""
        if self.end is None:
            return nrm if sums is None else pass_through(nrm, sums)
        if self.six:
            nrm = nrm.clamp(max=6.0)
            sums, seen = (None if t is None else t.clamp(max=6.0) for t in (sums, seen))
        result: Tensor = self.end(nrm, self.rectify, value=sums, seen=seen, closes=True)
        return result


def merged_layer(layer: Any, x: Tensor, backward: Backward, batch_value: bool = False) -> Tensor:
    """Forward of a group that quantizes.

    Args:
        layer: a LowBitLayer with a ``group``.
        x: its input.
        backward: what the backward pass goes through. float: W. quantized: Wq, with BN taken out of it again. folded:
            the convolution with Wq itself, statistics as constants, which needs no second one once BN is frozen.
        batch_value: while BN is live the value too is normalized by the batch, from the quantized weight and without a
            second convolution (the rule of torch's own QAT).
    """
    group: Group = layer.group
    x = on(layer.lowbit_input, x)
    layer.renew_norm()
    if _live(layer) and batch_value:
        with _exact(x):
            if not in_backward():  # a checkpointed block runs again: by the statistics that it had
                group.statistics = layer.norm.running_mean.clone(), layer.norm.running_var.clone()
            return group.close(_float_path(layer, x.to(layer.weight.dtype), _apart(layer, group.statistics)))
    traced = torch.is_grad_enabled() and (x.requires_grad or any(p.requires_grad for p in _parameters(layer)))
    watching = group.end is not None and group.end.follows
    if not (traced or watching or _live(layer)):
        return narrowed(layer, group.close(_sums(layer, x)))
    if backward == "float":
        nrm = _float_path(layer, x, layer.weight)
        return narrowed(layer, group.close(nrm, _sums(layer, x)))
    seen = None
    if _live(layer) or watching:
        with torch.no_grad():
            seen = _float_path(layer, x.detach(), layer.weight)
    if backward == "folded":
        with _exact(x):
            weight, bias, scale = quantized(layer)
            return narrowed(layer, group.close(product(layer, x.to(weight.dtype), weight, bias, scale), None, seen))
    sums = _sums(layer, x)
    return narrowed(layer, group.close(_float_path(layer, x, _apart(layer), moves=False), sums, seen))


def _exact(x: Tensor) -> Any:
    """Autocast off: sums of products of codes need all the bits of float32."""
    return torch.autocast(x.device.type, enabled=False)


def _live(layer: Any) -> bool:
    """Whether the batch norm trains."""
    return layer.norm is not None and layer.norm.training and not layer.norm_frozen


def _parameters(layer: Any) -> list[Tensor]:
    norm = layer.norm
    found = (layer.weight, layer.bias, None if norm is None else norm.weight, None if norm is None else norm.bias)
    return [p for p in found if p is not None]


def _float_path(layer: Any, x: Tensor, weight: Tensor, moves: bool = True) -> Tensor:
    """BN(conv(x, weight) + b); in training BN goes by the batch, and ``moves`` its statistics."""
    c, norm = layer.op(x, weight, layer.bias), layer.norm
    if norm is None:
        return c  # type: ignore[no-any-return]
    if _live(layer):  # its own forward: a synchronized one stays so
        if moves and not in_backward():
            return norm.op(c)  # type: ignore[no-any-return]
        with _spare_statistics(norm):  # a checkpointed block, which runs again in the backward pass, counts once
            return norm.op(c)  # type: ignore[no-any-return]
    return F.batch_norm(c, norm.running_mean, norm.running_var, norm.weight, norm.bias, False, 0.0, norm.eps)


@contextmanager
def _spare_statistics(norm: nn.Module) -> Iterator[None]:
    """A norm moves copies of its statistics meanwhile; its own keep even their version."""
    kept = norm._buffers
    norm._buffers = {name: None if b is None else b.clone() for name, b in kept.items()}
    try:
        yield
    finally:
        norm._buffers = kept


def quantized(layer: Any) -> tuple[Tensor, Tensor | None, Tensor]:
    """Wq and bq, whose gradients pass through the rounding where they are recorded, and the codes per unit of Wq."""
    weight, bias = layer.by_moving_statistics(layer.weight)
    with torch.no_grad():
        scale = layer.lowbit_weight.scale(weight, bias)
    weight = layer.lowbit_weight(weight, scale=scale)
    layer.lowbit_weight.snap(weight.detach())
    if bias is not None and layer.lowbit_bias is not None:
        bias = layer.lowbit_bias(bias, scale=scale)
    return weight, bias, scale


@torch.no_grad()
def _sums(layer: Any, x: Tensor) -> Tensor:
    """conv(x, Wq) + bq, at least in float32 whatever autocast says: products of codes need all its bits."""
    weight, bias, scale = quantized(layer)
    with _exact(x):
        sums = product(layer, x.detach().to(weight.dtype), weight, bias, scale)
    tap = layer.group.tap
    if tap is not None:
        tap(sums.to(weight.dtype))
    return sums


def _apart(layer: Any, statistics: tuple[Tensor, Tensor] | None = None) -> Tensor:
    """Wq with BN taken out again, as a function of W that passes gradients through; W where BN's factor is nil."""
    quantizer, master, norm = layer.lowbit_weight, layer.weight, layer.norm
    with torch.no_grad():
        weight, bias, var = master, layer.bias, None
        if norm is not None:
            mean, var = statistics or (norm.running_mean, norm.running_var)
            weight, bias = layer.scheme.merge(layer, master, mean, var)
        scale = quantizer.scale(weight, bias)
        value = quantizer(weight, scale=scale)
        quantizer.snap(value)
        mask = quantizer.mask(weight, scale)
        if var is not None:
            value = take_apart(layer, value, master.detach(), var)
    return pass_through(master, value, mask)

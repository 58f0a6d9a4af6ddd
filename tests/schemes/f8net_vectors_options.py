"""F8Net's golden vectors: the scheme that a file's ``cfg`` describes, and networks converted with it."""

from __future__ import annotations

import json
from typing import Any

import torch
from schemes.vector_table import Comparison
from torch import Tensor, nn

from lightning_lowbit.modules.base import switch_of
from lightning_lowbit.modules.convert import quantizers
from lightning_lowbit.modules.elementwise import LowBitReLU
from lightning_lowbit.modules.fraclen import FraclenInput
from lightning_lowbit.modules.layers import LowBitLayer
from lightning_lowbit.schemes import convert
from lightning_lowbit.schemes.f8net import F8Net

__all__ = ["configuration", "converted", "input_of", "scheme_of", "set_alpha", "set_fraclen"]


def configuration(v: Comparison) -> dict[str, Any]:
    return json.loads(str(v.arrays["cfg"]))  # type: ignore[no-any-return]


def scheme_of(cfg: dict[str, Any], **options: Any) -> F8Net:
    """The published code's knobs as options."""
    select = "grid" if cfg.get("format_grid_search") else cfg.get("metric", "std")
    settings: dict[str, Any] = {
        "select": select,
        "weight_select": select,
        "weight_bits": cfg.get("weight_format", [8])[0],
        "act_bits": cfg.get("input_format", [8])[0],
        "clip": not (cfg.get("no_clipping") or cfg.get("floating_wo_clip")),
        "floating": bool(cfg.get("floating")),
        "per_channel": cfg.get("format_type") == "per_channel",
        "own_average": not cfg.get("input_fraclen_sharing"),
        "momentum": cfg.get("fraclen_momentum", 0.1),
        "rescale": cfg.get("rescale_type", "constant") if cfg.get("rescale_forward", True) else "none",
    }
    return F8Net.reference(**{**settings, **options})


def converted(net: nn.Module, scheme: F8Net, x: Tensor, dtype: torch.dtype = torch.float64) -> nn.Module:
    """``net`` in low bits, its quantizers ready to be set; no calibration.

    The rectifiers that a toy has are those that the published networks compute, none of them merged.
    """
    convert(net, scheme, x.to(next(net.parameters()).dtype))
    net.to(dtype)
    for module in net.modules():
        if isinstance(module, LowBitReLU):
            module.__dict__["rectified_by"] = ()
    for _, quantizer in quantizers(net):
        quantizer.set_ready()
    switch = switch_of(net)
    switch.started = switch.managed = True
    return net


def input_of(layer: nn.Module) -> FraclenInput:
    assert isinstance(layer, LowBitLayer)
    assert isinstance(layer.lowbit_input, FraclenInput)
    return layer.lowbit_input


@torch.no_grad()
def set_alpha(layer: nn.Module, alpha: Tensor) -> None:
    """The clip in front of ``layer``, where it has one."""
    if (own := input_of(layer).alpha) is not None:
        own.copy_(alpha)


@torch.no_grad()
def set_fraclen(layer: nn.Module, fraclen: Tensor) -> None:
    """The moving average of ``layer``'s input; a fixed one stays."""
    source = input_of(layer)
    if source.fixed is None:
        source.fraclen.copy_(fraclen)

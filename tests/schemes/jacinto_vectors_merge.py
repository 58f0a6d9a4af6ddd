"""Jacinto's golden vectors of merged layers: weight and bias that an evaluation multiplies with."""

from __future__ import annotations

import ast
import warnings
from typing import Any

import torch
from schemes.vector_table import Comparison
from torch import Tensor, nn

from lightning_lowbit.modules.base import switch_of
from lightning_lowbit.modules.clipped import ClipQuantizer
from lightning_lowbit.modules.convert import convert_module, quantizers
from lightning_lowbit.modules.layers import LowBitLayer
from lightning_lowbit.modules.merged import MergedWeight
from lightning_lowbit.schemes.jacinto import Jacinto

__all__ = ["check_merge_weights", "operands"]

BIAS = {0: "own", 1: "tidl", 2: "tidl_scale"}
CHANNELS = {False: "none", True: "depthwise", "all": "all"}
OFF_GRID = 1e-6  # without powers of two the last bit of a scale is in every weight


def check_merge_weights(v: Comparison) -> None:
    for match in v.matching(r"(\w+)\.W"):
        tag = match[1]
        opt = ast.literal_eval(str(v.arrays[f"{tag}.opt"]))
        layer = converted(v, tag, opt)
        weight, bias = operands(layer, sample(layer))
        bound = 0.0 if opt.get("p2", True) else OFF_GRID
        v.close(f"{tag}.Wq", weight, bound)
        v.close(f"{tag}.bq", torch.zeros(len(v[f"{tag}.bq"])) if bias is None else bias, bound)


def converted(v: Comparison, tag: str, opt: dict[str, Any]) -> LowBitLayer:
    """The layer of a tag in evaluation, as its options say."""
    limits = v[f"{tag}.in_clips"]
    scheme = Jacinto.reference(
        weight_bits=opt.get("bits", 8),
        power2=opt.get("p2", True),
        per_channel=CHANNELS[opt.get("pc", False)],
        bias=BIAS[opt.get("cb", 1)],
        constrain_weights=opt.get("cw", False),
        quantize_in=len(limits) > 0,
    )
    net = network(v, tag).eval()
    convert_module(net, scheme)
    switch_of(net).started = True
    for _, quantizer in quantizers(net):
        if isinstance(quantizer, ClipQuantizer):
            if quantizer.site.role == "input":
                quantizer.clips.copy_(limits)
        elif isinstance(quantizer, MergedWeight):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # an outlier is clipped: said to the user
                quantizer.commit(lambda tensor, operation: tensor)
        quantizer.set_ready()
    layer = net[0]
    assert isinstance(layer, LowBitLayer)
    return layer


def network(v: Comparison, tag: str) -> nn.Sequential:
    """A float layer and the batch norm behind it; what kind of layer it is, the tag says."""
    weight, b = v[f"{tag}.W"], f"{tag}.b" in v.arrays
    (rows, columns), kernel = weight.shape[:2], weight.shape[2:]
    layer: nn.Module
    if tag.startswith("deconv"):
        layer = nn.ConvTranspose2d(rows, columns, (kernel[0], kernel[1]), stride=2, bias=b)
    elif tag.startswith("dw"):
        layer = nn.Conv2d(rows, rows, (kernel[0], kernel[1]), groups=rows, bias=b)
    elif tag.startswith("linear"):
        layer = nn.Linear(columns, rows, bias=b)
    else:
        layer = nn.Conv2d(columns, rows, (kernel[0], kernel[1]), bias=b)
    state = {"0.weight": weight, **({"0.bias": v[f"{tag}.b"]} if b else {})}
    if f"{tag}.bn" not in v.arrays:
        net = nn.Sequential(layer)
    else:
        norm = v[f"{tag}.bn"]
        net = nn.Sequential(layer, nn.BatchNorm2d(norm.shape[1]))
        state |= dict(zip(("1.weight", "1.bias", "1.running_mean", "1.running_var"), norm, strict=True))
    assert not net.load_state_dict(state, strict=False).unexpected_keys
    return net


def sample(layer: Any) -> Tensor:
    """Something that the layer can read."""
    if isinstance(layer, nn.Linear):
        return torch.zeros(2, layer.in_features)
    return torch.zeros(2, layer.in_channels, *layer.kernel_size)


@torch.no_grad()
def operands(layer: LowBitLayer, x: Tensor) -> tuple[Tensor, Tensor | None]:
    """Weight and bias that a call multiplies with last."""
    used: list[tuple[Tensor, Tensor | None]] = []
    operation = layer.op

    def spy(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        used.append((weight, bias))
        return operation(x, weight, bias)

    layer.__dict__["op"] = spy
    try:
        layer(x)
    finally:
        del layer.__dict__["op"]
    return used[-1]

"""Jacinto's golden vectors of numbers: ranges, limits that follow batches, fake-quantized tensors."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from schemes.vector_table import Comparison
from torch import Tensor

from lightning_lowbit.modules.base import Site, Switch
from lightning_lowbit.modules.clipped import ClipQuantizer
from lightning_lowbit.numerics.clipping import Limits, clip_quantize, clip_quantize_reference, limits_of
from lightning_lowbit.numerics.exponent import ceil_log2, pow2
from lightning_lowbit.numerics.merged import covered_range, quantize_weight
from lightning_lowbit.numerics.percentile import percentile_range, range_histogram, range_of_histogram
from lightning_lowbit.numerics.rounding import Rounding, round_to
from lightning_lowbit.numerics.through import pass_through
from lightning_lowbit.schemes.jacinto import Jacinto

__all__ = ["RANGE", "check_fake_quant_act", "check_pact2_updates", "check_quant_dequant", "check_range_search"]

RANGE = 1e-6
TAGS: dict[str, dict[str, Any]] = {
    "signed_none": {},
    "unsigned": {"overrides": {"*": {"signed": False}}},
    "signed": {"overrides": {"*": {"signed": True}}},
    "noshrink": {"range_shrink": 0.0},
    "nopow2": {"power2": False},
    "fixed": {"overrides": {"*": {"range": (-1.5, 1.5)}}},
    "batchq": {"batch_ranges": True},
    "positive_none": {},
    "freeze2": {},
}
SIGNS: dict[str, dict[str, bool]] = {"u": {"signed": False}, "s": {"signed": True}, "auto": {}}


def check_range_search(v: Comparison) -> None:
    for match in v.matching(r"(\w+)\.p([\d.]+)"):
        x, percent = v[f"{match[1]}.x"], float(match[2])
        v.close(match[0], percentile_range(x, percent), RANGE)
        ends = x.amin(), x.amax()
        v.close(match[0], range_of_histogram(range_histogram(x, *ends), *ends, percent), RANGE)


# -- limits that follow batches ------------------------------------------------------------------------------
def quantizer(**options: Any) -> ClipQuantizer:
    """That of a tensor of either sign, quantizing in training mode."""
    found = Jacinto.reference(**options).quantizer(Site("layer", "output", "conv2d", signed=None))
    assert isinstance(found, ClipQuantizer)
    found.switch = Switch(started=True)
    found.set_ready()
    return found.train()


def check_pact2_updates(v: Comparison) -> None:
    batches = v["x"]
    for tag in sorted({match[1] for match in v.matching(r"(\w+)\.clips_act")}):
        q, found = quantizer(**TAGS[tag]), _Found(tag)
        found.after(q)
        for n, x in enumerate(batches.abs() if tag == "positive_none" else batches):
            q.frozen = tag == "freeze2" and n > 0 and torch.equal(*v["freeze2.clips_act"][n - 1 : n + 1])
            y, limits = clipped(q, x)
            found.after(q)
            found.outputs.append(y)
            found.limits.append(limits)
            found.running.append(limits_now(q))
        found.compare(v)
        if f"{tag}.y_eval0" in v.arrays:
            v.close(f"{tag}.y_eval0", clipped(q.eval(), batches[0])[0], _off_grid(tag))
        if f"{tag}.nbt" in v.arrays:
            v.exact(f"{tag}.nbt", q.batches)


class _Found:
    """What a quantizer had before and behind every batch."""

    def __init__(self, tag: str) -> None:
        self.tag = tag
        self.clips: list[Tensor] = []
        self.limits: list[Tensor] = []
        self.running: list[Tensor] = []
        self.outputs: list[Tensor] = []

    def after(self, q: ClipQuantizer) -> None:
        # A fixed range is kept as it was given, not raised to what it acts as.
        self.clips.append(q.clips.clone() if q.fixed is None else limits_now(q))

    def compare(self, v: Comparison) -> None:
        clips = torch.stack(self.clips)
        v.close(f"{self.tag}.clips_act", clips[-len(v[f"{self.tag}.clips_act"]) :], RANGE)
        if f"{self.tag}.limits" in v.arrays:
            limits, running = torch.stack(self.limits), torch.stack(self.running)
            # Where each batch has its own range, those of the running one may be kept instead; y is by the batch's.
            kept = running if torch.equal(v[f"{self.tag}.limits"], running) else limits
            v.close(f"{self.tag}.limits", kept, _off_grid(self.tag))
        if f"{self.tag}.y" in v.arrays:
            v.close(f"{self.tag}.y", torch.stack(self.outputs), _off_grid(self.tag))


def _off_grid(tag: str) -> float:
    """Limits that are powers of two are exact, and so is what they clip."""
    return 0.0 if TAGS[tag].get("power2", True) else RANGE


def limits_now(q: ClipQuantizer) -> Tensor:
    limits = q.limits()
    return torch.stack([limits.low, limits.high])


def clipped(q: ClipQuantizer, x: Tensor) -> tuple[Tensor, Tensor]:
    """What a quantizer's gradient takes its function for, the clip of x, and by which limits."""
    x = x.clone().requires_grad_()
    quantized = q(x)
    inside = torch.autograd.grad(quantized.sum(), x)[0].bool()
    x = x.detach()
    if q.form.batch_ranges and q.training:
        batch = limits_of(q.range_of(x), q.flag, q.form.bits, q.form.power2, q.form.symmetric)
        limits = torch.stack([batch.low, batch.high])
    else:
        limits = limits_now(q)
    y = torch.where(inside, x, torch.where(x < limits[0], limits[0], limits[1]))
    step = limits[1] * 2.0 ** (1 - q.form.bits)
    assert (quantized - y).abs().max() <= step + RANGE * limits[1], "more than a step from the clip"
    return y, limits


# -- fake-quantized tensors ----------------------------------------------------------------------------------
def check_fake_quant_act(v: Comparison) -> None:
    batches = v["x"]
    for match in v.matching(r"(([a-z]+)(\d+))\.y"):
        tag, sign, bits = match[1], match[2], int(match[3])
        q = quantizer(act_bits=bits, overrides={"*": SIGNS[sign]})
        outputs, gradients, clips = [], [], []
        for batch in batches:
            x = batch.clone().requires_grad_()
            y = q(x)
            y.backward(torch.linspace(-1, 1, x.numel()).reshape(x.shape))
            assert x.grad is not None
            outputs.append(y.detach())
            gradients.append(x.grad)
            clips.append(q.clips.clone())
        v.exact(f"{tag}.y", torch.stack(outputs))
        v.exact(f"{tag}.grad", torch.stack(gradients))
        v.close(f"{tag}.clips_act", torch.stack(clips), RANGE)
        v.exact(f"{tag}.y_eval0", q.eval()(batches[0]))


def check_quant_dequant(v: Comparison) -> None:
    x = v["x"]
    upstream = torch.linspace(-1, 1, x.numel())
    for match in v.matching(r"(\w+)\.args"):
        tag = match[1]
        scale, qmin, qmax, power2 = v[match[0]].float().unbind()
        if power2:
            scale = floor2(scale)
        for y, leaf in quantized(tag, x, scale, qmin, qmax):
            v.exact(f"{tag}.y", y)
            v.exact(f"{tag}.grad", torch.autograd.grad(y, leaf, upstream)[0])
    positive = x.abs() + 1e-3
    v.exact("ceil2_func", covered_range(positive))
    v.exact("ceil2_func", torch.stack([limits_of(torch.stack([0 * p, p]), False, 8).high for p in positive]))
    v.exact("floor2_func", floor2(positive))
    v.exact("round2_func", pow2(round_to(torch.log2(positive))))


def floor2(x: Tensor) -> Tensor:
    """2^floor(log2 x); the reciprocal of a float32 is far from a power of two in float64 unless it is one."""
    return pow2(-ceil_log2(x.double().reciprocal()))


def quantized(tag: str, x: Tensor, scale: Tensor, qmin: Tensor, qmax: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Results and the leaves behind them; a weight's and an activation's rounding by the tag."""
    leaf = x.clone().requires_grad_()
    if tag.startswith(("w_", "s4")):
        yield pass_through(leaf, quantize_weight(leaf, scale, int(math.log2(qmax - qmin + 1)))), leaf
        return
    rounding = Rounding.HALF_EVEN if tag == "torch" else Rounding.HALF_UP
    wide = torch.tensor(2.0**100)  # nothing is masked here
    limits = Limits(-wide, wide, scale, qmin, qmax, torch.zeros(()))
    for function in (clip_quantize, clip_quantize_reference):
        yield function(leaf, limits, rounding), leaf

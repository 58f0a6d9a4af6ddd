"""TQT's golden vectors: quantizer, layers, folding, initialization, training and integer execution."""

from __future__ import annotations

import itertools
import math
from typing import Any

import torch
import torch.nn.functional as F
from schemes.vector_table import Comparison, Kind, VectorFile
from torch import Tensor

from lightning_lowbit.graph.fold import batch_statistics, fold_batch_norm
from lightning_lowbit.numerics.exponent import log2_threshold
from lightning_lowbit.numerics.ranges import (
    abs_histogram,
    klj_divergences,
    threshold_3sd,
    threshold_klj,
    threshold_max,
)
from lightning_lowbit.numerics.rounding import saturate, shift_right_rounded
from lightning_lowbit.numerics.ste import threshold_quantize
from lightning_lowbit.schemes.tqt_training import NormedSgd, next_to_freeze, staircase

FLOAT_SUM = 1e-5  # of the array's largest value, on one thread
THRESHOLD_GRAD = 1e-3
DOUBLE = 1e-9


def signed(x: Tensor, log2_t: Tensor, bits: int) -> Tensor:
    half = 2 ** (bits - 1)
    return threshold_quantize(x, log2_t, qmin=-half, qmax=half - 1, point=bits - 1)


def unsigned(x: Tensor, log2_t: Tensor, bits: int, rectify: bool = False) -> Tensor:
    return threshold_quantize(x, log2_t, qmin=0, qmax=2**bits - 1, point=bits, rectify=rectify)


def package_unsigned_grad(x: Tensor, log2_t: Tensor, bits: int, g: Tensor) -> Tensor:
    """d log2_t as the package has it: it keeps round(v) in place of v, so the inside term (r - v) is 0."""
    s = 2.0 ** (math.ceil(float(log2_t)) - bits)
    c = torch.where(torch.round(x / s) >= 2**bits, 2.0**bits - 1, 0.0)
    return (g * c).sum() * s * math.log(2)


def gradients(y: Tensor, g: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(y, inputs, g)


def convolution(x: Tensor, w: Tensor, b: Tensor | None, y: Tensor) -> Tensor:
    """A convolution padded by half a kernel, with the stride that gives y's size."""
    pad = w.shape[-1] // 2
    span = x.shape[-1] + 2 * pad - w.shape[-1]
    stride = next(s for s in range(1, span + 2) if span // s + 1 == y.shape[-1])
    return F.conv2d(x, w, b, stride=stride, padding=pad)


def check_quantizer(v: Comparison) -> None:
    for match in v.matching(r"((signed|unsigned)_b(\d+)_l([+-][\d.]+))_y"):
        prefix, sign, bits, log2_t = match[1], match[2], int(match[3]), torch.tensor([float(match[4])])
        x, g = v["x"].requires_grad_(), v["gout"]
        log2_t.requires_grad_()
        y = (signed if sign == "signed" else unsigned)(x, log2_t, bits)
        grad_x, grad_log2_t = gradients(y, g, x, log2_t)
        v.exact(f"{prefix}_y", y)
        v.exact(f"{prefix}_grad_x", grad_x)
        v.close(f"{prefix}_grad_log2t", grad_log2_t, THRESHOLD_GRAD)
        if sign == "unsigned":
            bug = package_unsigned_grad(x.detach(), log2_t.detach(), bits, g)
            v.close(f"{prefix}_grad_log2t_packagebug", bug, THRESHOLD_GRAD)


def check_layers(v: Comparison) -> None:
    for layer, weight_bits in (("conv", 8), ("linear", 4)):
        names = ("x", "w", "b", "w_log2t", "b_log2t", "a_log2t")
        x, w, b, w_t, b_t, a_t = (v[f"{layer}_{name}"].requires_grad_() for name in names)
        g = v[f"{layer}_gout"]
        qw, qb = signed(w, w_t, weight_bits), signed(b, b_t, 16)
        pre = convolution(x, qw, qb, g) if layer == "conv" else F.linear(x, qw, qb)
        y = unsigned(pre, a_t, 8, rectify=True)
        v.close(f"{layer}_pre", pre, FLOAT_SUM)
        v.close(f"{layer}_y", y, FLOAT_SUM)
        for name, grad in zip(names, gradients(y, g, x, w, b, w_t, b_t, a_t), strict=True):
            v.close(f"{layer}_grad_{name}", grad, THRESHOLD_GRAD if "log2t" in name else FLOAT_SUM)
        bug = package_unsigned_grad(pre.detach().relu(), a_t.detach(), 8, g)
        v.close(f"{layer}_grad_a_log2t_packagebug", bug, THRESHOLD_GRAD)


def check_fold(v: Comparison) -> None:
    statistics = v["gamma"], v["beta"], v["mean"], v["var"], v.number("eps")
    x, w, g, a_t = v["x"].requires_grad_(), v["w"].requires_grad_(), v["gout"], v["a_log2t"]

    folded_w, folded_b = fold_batch_norm(w, None, *statistics)
    v.close("folded_w", folded_w, FLOAT_SUM)
    v.close("folded_b", folded_b, FLOAT_SUM)
    w_t = v["frozen_w_log2t"].requires_grad_()
    qw = signed(folded_w, w_t, v.count("frozen_weight_bits"))
    qb = signed(folded_b, v["frozen_b_log2t"], v.count("frozen_bias_bits"))
    y = unsigned(convolution(x, qw, qb, g), a_t, v.count("frozen_acti_bits"), rectify=True)
    compare_fold(v, "frozen", y, gradients(y, g, x, w, w_t))

    w_t = v["unfrozen_package_w_log2t"].requires_grad_()
    y = package_unfrozen(v, x, w, w_t)
    compare_fold(v, "unfrozen_package", y, gradients(y, g, x, w, w_t))


def package_unfrozen(v: Comparison, x: Tensor, w: Tensor, w_t: Tensor) -> Tensor:
    """The package before it freezes: the raw weight on the folded one's threshold, then a batch norm.

    That norm ignores its eps and quantizes gamma and beta on thresholds that nobody sets, so that whatever
    memory held decides: the pair of exponents that explains y is searched for.
    """
    bits = [v.count(f"unfrozen_package_{name}_bits") for name in ("weight", "bias", "acti")]
    z = convolution(x, signed(w, w_t, bits[0]), None, v["gout"])
    for k_gamma, k_beta in itertools.product(range(-8, 9), repeat=2):
        gamma = signed(v["gamma"], torch.tensor([float(k_gamma)]), bits[0])
        beta = signed(v["beta"], torch.tensor([float(k_beta)]), bits[1])
        normed = F.batch_norm(z, v["mean"], v["var"], gamma, beta)
        y = unsigned(normed, v["a_log2t"], bits[2], rectify=True)
        if torch.allclose(y, v["unfrozen_package_y"], rtol=0, atol=FLOAT_SUM):
            return y
    raise AssertionError("unfrozen_package_y: no thresholds of gamma and beta explain it")


def compare_fold(v: Comparison, phase: str, y: Tensor, grads: tuple[Tensor, ...]) -> None:
    v.close(f"{phase}_y", y, FLOAT_SUM)
    v.close(f"{phase}_grad_x", grads[0], FLOAT_SUM)
    v.close(f"{phase}_grad_w", grads[1], FLOAT_SUM)
    v.close(f"{phase}_grad_w_log2t", grads[2], THRESHOLD_GRAD)


def check_fold_train(v: Comparison) -> None:
    bits, eps, momentum = v.count("bits"), v.number("eps"), v.number("bn_momentum")
    names = ("x", "w", "gamma", "beta", "w_log2t")
    running_mean, running_var = v["running_mean"], v["running_var"]
    for phase in ("batch", "moving"):
        leaves = tuple(v[name].requires_grad_() for name in names)
        x, w, gamma, beta, w_t = leaves
        if phase == "batch":
            mean, var, unbiased = batch_statistics(convolution(x, w, None, v["gout"]))
            v.close("running_mean_next", (1 - momentum) * running_mean + momentum * mean, DOUBLE)
            v.close("running_var_next", (1 - momentum) * running_var + momentum * unbiased, DOUBLE)
        else:
            mean, var = running_mean, running_var
        w_folded, b_folded = fold_batch_norm(w, None, gamma, beta, mean, var, eps)
        y = convolution(x, signed(w_folded, w_t, bits), b_folded, v["gout"])
        results = {"y": y, "w_folded": w_folded, "b_folded": b_folded, "mean": mean, "var": var}
        for name, grad in zip(names, gradients(y, v["gout"], *leaves), strict=True):
            results[f"grad_{name}"] = grad
        for name, got in results.items():
            v.close(f"{phase}_{name}", got, DOUBLE)


def check_threshold_init(v: Comparison) -> None:
    w, act = v["w"], v["act"]
    v.close("w_max", threshold_max(w), FLOAT_SUM)
    v.close("w_max_log2t", log2_threshold(threshold_max(w)), FLOAT_SUM)
    v.close("w_3sd", threshold_3sd(w, population=False), FLOAT_SUM)
    v.close("w_3sd_population", threshold_3sd(w), FLOAT_SUM)
    v.close("w_3sd_log2t", log2_threshold(threshold_3sd(w, population=False)), FLOAT_SUM)
    for match in v.matching(r"act_klj_b(\d+)_threshold"):
        bits, prefix = int(match[1]), match[0].removesuffix("_threshold")
        counts, width = abs_histogram(act, "sqrt")
        candidates, divergence = klj_divergences(counts, bits)
        if f"{prefix}_index" in v.arrays:  # absent where there are no more bins than levels
            v.close(f"{prefix}_divergence", divergence, DOUBLE)
            v.exact(f"{prefix}_index", candidates[divergence.argmin()])
        v.close(match[0], threshold_klj(counts, width, bits, cap=False), DOUBLE)
    for match in v.matching(r"act_small_klj_b(\d+)_threshold"):
        few = abs_histogram(v["act_small"], "sqrt")
        v.close(match[0], threshold_klj(*few, int(match[1]), cap=False), FLOAT_SUM)
    v.close("ref_w_max_log2t", torch.log2(w.abs().max() + 1e-8), FLOAT_SUM)
    v.close("ref_w_3sd_log2t", torch.log2(w.mean().abs() + 3 * w.std()), FLOAT_SUM)
    v.close("ref_act_max_log2t", torch.log2(act.abs().max() + 1e-8), FLOAT_SUM)
    for match in v.matching(r"ref_act_entropy(\d+)_log2t"):
        v.close(match[0], package_entropy(act, bins=int(match[1])), FLOAT_SUM)


def package_entropy(x: Tensor, bins: int, levels: int = 128) -> Tensor:
    """The package's entropy threshold: KL between the clipped histogram and its average over bin groups."""
    dist = torch.histc(x, bins=bins) + 1e-12
    divergence = []
    for i in range(levels, bins):
        p = dist[:i].clone()
        p[-1] += dist[i:].sum()
        width = i // levels
        group = (torch.arange(i) // width).clamp(max=levels - 1)
        # The last group is wider than the others and still divided by their width.
        q = torch.zeros(levels).index_add_(0, group, dist[:i])[group] / width
        p, q = p / p.sum(), q / q.sum()
        divergence.append((p * torch.log(p / q)).sum())
    best = torch.stack(divergence).argmin() + levels
    return torch.log2(x.min() + (best + 0.5) * (x.max() - x.min()) / bins)


def trajectory(v: Comparison, optimizer: type[torch.optim.Optimizer], **options: Any) -> tuple[Tensor, Tensor]:
    """log2_t after each step and its gradient in it: loss 0.5 * sum((q(x) - x)^2), start at log2_t = 0."""
    log2_t = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))
    stepper = optimizer([log2_t], lr=v.number("lr"), **options)
    after, grads = [], []
    for x in v["x"]:
        stepper.zero_grad()
        (0.5 * (signed(x, log2_t, v.count("bits")) - x).square().sum()).backward()
        assert log2_t.grad is not None
        grads.append(log2_t.grad.clone())
        stepper.step()
        after.append(log2_t.detach().clone())
    return torch.cat(after), torch.cat(grads)


def check_threshold_training(v: Comparison) -> None:
    normed = {"beta": v.number("normed_beta"), "eps": v.number("normed_eps")}
    for name, optimizer, options in (("adam", torch.optim.Adam, {}), ("normed", NormedSgd, normed)):
        after, grads = trajectory(v, optimizer, **options)
        v.close(f"{name}_log2t", after, atol=1e-5)
        v.close(f"{name}_grad", grads, THRESHOLD_GRAD)

    steps = v["sched_step"].tolist()
    v.close("sched_lr_threshold", torch.tensor([staircase(n, 1e-2, 1000, 0.5) for n in steps]).double(), 1e-6)
    v.close("sched_lr_weight", torch.tensor([staircase(n, 1e-6, 3000, 0.94) for n in steps]).double(), 1e-6)

    now, average, grad = v["freeze_cur"], v["freeze_ema"], v["freeze_absgrad"]
    frozen, order = torch.zeros_like(now, dtype=torch.bool), []
    while (index := next_to_freeze(now, average, grad, frozen)) is not None:
        frozen[index] = True
        order.append(index)
    v.exact("freeze_order", torch.tensor(order, dtype=torch.int64))


def check_integer_execution(v: Comparison) -> None:
    x, w, b = v["conv_x_u8"], v["conv_w_s8"], v["conv_b_s16"]
    f_x, f_w, f_acc, f_y = v["conv_frac"].tolist()
    shape = v["conv_y_u8"]
    acc = convolution(x, w, None, shape)
    acc16 = saturate(shift_right_rounded(acc, f_x + f_w - f_acc), -(2**15), 2**15 - 1)
    summed = saturate(acc16 + b[:, None, None], 0, 2**16)
    y = saturate(shift_right_rounded(summed, f_acc - f_y), 0, 255)
    v.exact("conv_acc_s32", acc)
    v.exact("conv_acc_s16", acc16)
    v.exact("conv_y_u8", y)
    v.exact("conv_y", y.double() * 2.0**-f_y)
    # The same layer as training computes it, on real values: this is the promise that integers keep.
    real = [t.double() * 2.0**-f for t, f in ((x, f_x), (w, f_w), (b, f_acc))]
    t_x, t_w, t_acc, t_y = v["conv_log2t"].double().split(1)
    z = convolution(unsigned(real[0], t_x, 8), signed(real[1], t_w, 8), None, shape)
    z = signed(z, t_acc, 16) + real[2][:, None, None]
    v.exact("conv_y", unsigned(z, t_y, 8, rectify=True))

    f_in, f_out = v["add_frac"].tolist()
    added = shift_right_rounded(v["add_a_s8"] + v["add_b_s8"], f_in - f_out)
    v.exact("add_y_s8", saturate(added, -128, 127))

    # The published average pool multiplies by a rounded reciprocal; ours divides, this is for reference only.
    pixels = v["pool_x_u8"]
    area = pixels[0, 0].numel()
    f_recip = 8 - math.ceil(math.log2(1 / area))
    recip = round(2**f_recip / area)
    f_in, f_out = v["pool_frac_in_out"].tolist()
    acc = recip * pixels.sum((2, 3))
    v.exact("pool_recip_frac", f_recip)
    v.exact("pool_recip_u8", recip)
    v.exact("pool_acc", acc)
    v.exact("pool_y_u8", saturate(shift_right_rounded(acc, f_in + f_recip - f_out), 0, 255))


GRADS = "grad_(x|w|b|gamma|beta|log2t|[wba]_log2t)"
FILES = {
    "quantizer": VectorFile(
        {
            "x|gout": Kind.INPUT,
            r"unsigned_.*_grad_log2t_packagebug": Kind.QUIRK,
            rf"(un)?signed_b\d+_l[+-][\d.]+_(y|{GRADS})": Kind.OUTPUT,
        },
        check_quantizer,
    ),
    "layers": VectorFile(
        {
            r"(conv|linear)_(x|w|b|gout|[wba]_log2t)": Kind.INPUT,
            r"(conv|linear)_grad_a_log2t_packagebug": Kind.QUIRK,
            rf"(conv|linear)_(pre|y|{GRADS})": Kind.OUTPUT,
        },
        check_layers,
    ),
    "fold_conv_bn_relu": VectorFile(
        {
            "x|w|gamma|beta|mean|var|eps|gout|a_log2t": Kind.INPUT,
            r"(frozen|unfrozen_package)_([wb]_log2t|(weight|bias|acti)_bits)": Kind.INPUT,
            rf"unfrozen_package_(y|{GRADS})": Kind.QUIRK,
            rf"frozen_(y|{GRADS})|folded_[wb]": Kind.OUTPUT,
        },
        check_fold,
    ),
    "fold_train_mode": VectorFile(
        {
            "x|w|gamma|beta|running_mean|running_var|gout|w_log2t|eps|bits|bn_momentum": Kind.INPUT,
            rf"(batch|moving)_(y|[wb]_folded|mean|var|{GRADS})": Kind.OUTPUT,
            "running_(mean|var)_next": Kind.OUTPUT,
        },
        check_fold_train,
    ),
    "threshold_init": VectorFile(
        {
            "w|act|act_small": Kind.INPUT,
            r"w_(max|3sd)(_log2t)?|w_3sd_population": Kind.OUTPUT,
            r"act_klj_b\d+_(threshold|index|divergence)|act_small_klj_b\d+_threshold": Kind.OUTPUT,
            r"ref_w_(max|3sd)_log2t|ref_act_max_log2t|ref_act_entropy\d+_log2t": Kind.QUIRK,
        },
        check_threshold_init,
    ),
    "threshold_training": VectorFile(
        {
            "x|bits|lr|normed_(beta|eps)|sched_step|freeze_(cur|ema|absgrad)": Kind.INPUT,
            "(adam|normed)_(log2t|grad)|sched_lr_(threshold|weight)|freeze_order": Kind.OUTPUT,
        },
        check_threshold_training,
    ),
    "integer_execution": VectorFile(
        {
            "conv_(x_u8|w_s8|b_s16|log2t|frac)|add_[ab]_s8|add_frac|pool_x_u8|pool_frac_in_out": Kind.INPUT,
            "conv_(acc_s32|acc_s16|y_u8|y)|add_y_s8|pool_(recip_u8|recip_frac|acc|y_u8)": Kind.OUTPUT,
        },
        check_integer_execution,
    ),
}

"""NITI's golden vectors: ranges, roundings, requantization, initialization, loss and integer operators."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from modules.integer_twin import carrier, send_back
from schemes import niti_reference as reference
from schemes.niti_steps import STEPS
from schemes.vector_table import Comparison, Kind, VectorFile
from torch import Tensor

from lightning_lowbit.kernels import int8_conv2d, int8_conv2d_input, int8_conv2d_weight, int8_matmul
from lightning_lowbit.kernels.requantize import requantize, update_weights
from lightning_lowbit.modules.carrier import plain
from lightning_lowbit.numerics.block import ShiftRounding, bit_width, shift_round
from lightning_lowbit.numerics.integer_loss import cross_entropy_error, wide_error
from lightning_lowbit.numerics.niti_rules import (
    act_shift,
    decayed,
    grad_shift,
    input_codes,
    weight_codes_maxnorm,
)

ROUNDINGS = {
    "round": ShiftRounding.HALF_AWAY,
    "psto": ShiftRounding.PSEUDO_STOCHASTIC,
    "sto": ShiftRounding.STOCHASTIC,
}
PUBLISHED_2020_EXPONENT = -9  # that file's README names it, no key holds it


def int8(x: Tensor) -> Tensor:
    return x.to(torch.int8)


def int32(x: Tensor) -> Tensor:
    return x.to(torch.int32)


def names(v: Comparison) -> list[str]:
    return [str(name) for name in v.arrays["names"]]


def mu_of(text: str) -> int:
    """``m1`` is -1."""
    return int(text.replace("m", "-"))


def check_range_estimate(v: Comparison) -> None:
    magnitude = v["magnitude"]
    exact = torch.stack([bit_width(m) for m in int32(magnitude)])
    rounded = torch.stack([reference.float_bit_width(m) for m in magnitude])
    v.exact("bitwidth_exact", exact)
    v.exact("bitwidth_ref", rounded)
    v.exact("bitwidth_ref_negated", torch.stack([reference.float_bit_width(-m) for m in magnitude]))
    v.exact("agree", exact == rounded)
    v.notes.append(f"{int((exact != rounded).sum())} of {len(exact)} widths differ from the float32 log2's")
    for match in v.matching(r"(tensor\d+)_bitwidth"):
        v.exact(match[0], bit_width(int32(v[match[1]])))


def check_rounding(v: Comparison) -> None:
    for match in v.matching(r"(round|psto|sto)_s(\d+)"):
        name, shift = match[1], int(match[2])
        x = int32(v["x_small" if "x_small" in v.arrays else f"x_s{shift}"])
        noise = int32(v[f"sto_rand_s{shift}"]) if name == "sto" else None
        v.exact(match[0], shift_round(x, shift, ROUNDINGS[name], noise).clamp(-127, 127))
        v.exact(match[0], requantize(x, torch.tensor(shift, dtype=torch.int32), rounding=ROUNDINGS[name], noise=noise))


def compare_grads(v: Comparison, case: str, acc: Tensor) -> None:
    """The rounded weight gradient at every mu of the file."""
    width = bit_width(acc)
    for match in v.matching(rf"{case}_grad_mu(m?\d+)"):
        shift = grad_shift(width, mu_of(match[1]))
        grad = requantize(acc, shift, rounding=ShiftRounding.PSEUDO_STOCHASTIC)
        v.exact(match[0], torch.where(width > 0, grad, 0))
        if f"{case}_grad_shift_mu{match[1]}" in v.arrays:
            v.exact(f"{case}_grad_shift_mu{match[1]}", shift)


def check_requantize(v: Comparison) -> None:
    for case in names(v):
        acc = int32(v[f"{case}_acc"])
        shift = act_shift(bit_width(acc))
        codes = requantize(acc, shift, rounding=ShiftRounding.HALF_AWAY)
        if acc.abs().max() == 128:
            assert torch.equal(codes, int8(acc.clamp(-127, 127)))
            codes = reference.wrapped(acc)
            v.notes.append(f"{case}: 128 clipped, published as -128")
        for key in ("act", "err"):
            v.exact(f"{case}_{key}", codes)
        v.exact(f"{case}_act_exp", v["exp_in"] + shift)
        v.exact(f"{case}_err_shift", shift)
        compare_grads(v, case, acc)


def check_legacy2020(v: Comparison) -> None:
    for match in v.matching(r"(.+)(?<!_decayed)_acc"):
        case, acc = match[1], int32(v[match[0]])
        shift = reference.legacy_shift(act_shift(bit_width(acc)))
        codes = requantize(acc, shift, rounding=ShiftRounding.PSEUDO_STOCHASTIC)
        v.exact(f"{case}_act", codes)
        v.exact(f"{case}_err", codes)
        v.exact(f"{case}_act_exp", PUBLISHED_2020_EXPONENT + shift)
        compare_grads(v, case, acc)
        if f"{case}_decay_w" in v.arrays:
            v.exact(f"{case}_decayed_acc", decayed(acc, int8(v[f"{case}_decay_w"])))


def check_quantize_init(v: Comparison) -> None:
    for match in v.matching(r"(.+)_float"):
        case, x = match[1], v[match[0]]
        drawn = case.startswith("xavier")
        codes, exponent = weight_codes_maxnorm(x)
        v.exact(f"{case}_q" if drawn else f"{case}_wq", codes)
        v.exact(f"{case}_exp" if drawn else f"{case}_wq_exp", exponent)
        if not drawn:
            codes, exponent = input_codes(x)
            v.exact(f"{case}_dq", codes)
            v.exact(f"{case}_dq_exp", exponent)


def check_loss(v: Comparison) -> None:
    for case in names(v):
        logits, target, noise = int8(v[f"{case}_val"]), v[f"{case}_target"], v[f"{case}_rand"]
        s = int32(v[f"{case}_exp"])
        # extra=0: the published loss has 11 bits of probability however many classes there are.
        v.exact(f"{case}_int_pre", wide_error(logits, s, target, extra=0))
        v.exact(f"{case}_int_err", cross_entropy_error(logits, s, target, noise, extra=0))
        v.exact(f"{case}_head_pre", reference.true_division_wide_error(logits, int(s), target))
        v.exact(f"{case}_head_err", reference.true_division_error(logits, int(s), target, noise))


def nchw(x: Tensor) -> Tensor:
    """Channels-last arrays in torch's logical order, their memory as it is."""
    return int8(x).permute(0, 3, 1, 2)


def nhwc(x: Tensor) -> Tensor:
    return x.permute(0, 2, 3, 1)


def check_ops(v: Comparison) -> None:
    x, w, err = nchw(v["conv_x"]), nchw(v["conv_w"]), nchw(v["conv_err_in"])
    padding = (w.shape[2] // 2, w.shape[3] // 2)
    v.exact("conv_acc", nhwc(int8_conv2d(x, w, padding=padding)))
    v.exact("conv_err_acc", nhwc(int8_conv2d_input(err, w, x.shape, padding=padding)))
    v.exact("conv_gacc", nhwc(int8_conv2d_weight(x, err, w.shape, padding=padding)))
    v.exact("mm_acc", int8_matmul(int8(v["mm_a"]), int8(v["mm_b"])))
    v.exact("upd_out", update_weights(int8(v["upd_w"]), int32(v["upd_g"]), 0, rounding=ShiftRounding.HALF_AWAY))
    v.exact("relu_y", requantize(int32(v["relu_x"]), 0, rectify=True))
    v.exact("relu_err_out", requantize(int32(v["relu_err_in"]), 0, keep=int8(v["relu_x"])))
    for match in v.matching(r"(pool_\w+)_x"):
        case, pixels = match[1], carrier(nchw(v[match[0]]), grad=True)
        y = F.max_pool2d(pixels, pixels.shape[2] // v.arrays[f"{case}_y"].shape[1])
        send_back(y, nchw(v[f"{case}_err_in"]))
        v.exact(f"{case}_y", nhwc(plain(y.detach())) * 2**7)
        v.exact(f"{case}_err_out", nhwc(plain(pixels.grad)) * 2**7)


FILES = {
    **STEPS,
    "range_estimate": VectorFile(
        {
            r"magnitude|tensor\d+": Kind.INPUT,
            r"bitwidth_exact|tensor\d+_bitwidth": Kind.OUTPUT,
            "bitwidth_ref(_negated)?|agree": Kind.QUIRK,
        },
        check_range_estimate,
    ),
    "rounding_small": VectorFile(
        {r"x_small|sto_rand_s\d+": Kind.INPUT, r"(round|psto|sto)_s\d+": Kind.OUTPUT}, check_rounding
    ),
    "rounding_large": VectorFile(
        {r"x_s\d+|sto_rand_s\d+": Kind.INPUT, r"(round|psto|sto)_s\d+": Kind.OUTPUT}, check_rounding
    ),
    "requantize": VectorFile(
        {
            r"names|exp_in|\w+_acc": Kind.INPUT,
            "(pos|neg)128_(act|err)": Kind.QUIRK,
            r"\w+_(act|act_exp|err|err_shift|grad_(shift_)?mum?\d+)": Kind.OUTPUT,
        },
        check_requantize,
    ),
    "legacy2020": VectorFile(
        {
            r"\w+_decayed_acc|\w+_grad_mum?\d+": Kind.OUTPUT,
            r"\w+_acc|\w+_decay_w": Kind.INPUT,
            r"\w+_(act|act_exp|err)": Kind.QUIRK,
        },
        check_legacy2020,
    ),
    "quantize_init": VectorFile(
        {r"names|\w+_float": Kind.INPUT, r"\w+_([wd]q(_exp)?)|xavier_\w+_(q|exp)": Kind.OUTPUT}, check_quantize_init
    ),
    "loss": VectorFile(
        {
            r"names|\w+_(val|exp|target|rand)": Kind.INPUT,
            r"\w+_int_(pre|err)": Kind.OUTPUT,
            r"\w+_head_(pre|err)": Kind.QUIRK,
        },
        check_loss,
    ),
    "ops": VectorFile(
        {
            r"conv_(w|x|err_in)|mm_[ab]|upd_[wg]|(relu|pool_\w+)_(x|err_in)": Kind.INPUT,
            r"conv_(acc|err_acc|gacc)|mm_acc|upd_out|(relu|pool_\w+)_(y|err_out)": Kind.OUTPUT,
        },
        check_ops,
    ),
}

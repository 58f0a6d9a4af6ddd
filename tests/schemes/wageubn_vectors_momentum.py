"""WAGEUBN's golden vectors of the update: quantized gradients, momentum and stored weights, step by step."""

from __future__ import annotations

import torch
from schemes.vector_table import Comparison
from schemes.wageubn_vectors_quantizers import learning_rates
from torch import Tensor

from lightning_lowbit.numerics.constant import constant_codes
from lightning_lowbit.numerics.direct import direct_quantize
from lightning_lowbit.numerics.momentum import UpdateFormat, float_step, integer_step, momentum_code, recover, store

__all__ = ["check_integer_update", "check_momentum"]

CLIP_STORED = False  # as published


def check_integer_update(v: Comparison) -> None:
    weight, gradient, learning_rate, momentum, accumulator = (int(fraction) + 1 for fraction in v["frac"])
    format = UpdateFormat(gradient, momentum, accumulator, learning_rate, weight)
    start, lr = v["w0_int"].to(torch.int32), v["lr_int"].tolist()
    for dtype in (torch.int16, torch.int32):
        w, acc = integer_steps(start, v["g_int"].to(dtype), lr, v.count("mom_int"), format)
        v.exact("w_int", w)
        v.exact("acc_int", acc)


def check_momentum(v: Comparison) -> None:
    format = UpdateFormat()
    momentum = momentum_code(v.number("momentum"), format)
    rates = learning_rates(v["lr"], format.learning_rate)
    v.exact("lr_q", rates)
    lr = [int(code) for code in rates * 2.0 ** (format.learning_rate - 1)]
    unit = 2.0 ** (1 - format.gradient)
    codes = torch.stack(
        [constant_codes(g, u, dr=int(dr))[0] for g, u, dr in zip(v["grads"], v["uniform"], v["dr"], strict=True)]
    )
    v.exact("gq", codes * unit)
    direct = direct_quantize(v["grads_bn"], format.gradient)
    v.exact("gq_bn", direct)
    of_norm = (direct / unit).to(torch.int32)  # unclipped: no int16
    for name, start, grads in (("w", v["w0"], codes), ("bn", v["bn0"], of_norm)):
        weights, accs = integer_steps(recover(start, format), grads, lr, momentum, format)
        v.exact(name, store(weights, format))
        v.exact(f"acc_{name}", accs * 2.0 ** (1 - format.accumulator))
        w, acc = start, torch.zeros_like(start)
        for t, g in enumerate(grads):
            w, acc, _ = float_step(w, acc, g * unit, lr[t], momentum, format, CLIP_STORED)
            assert torch.equal(w, store(weights[t], format)), f"{name}: the float step {t} is another"
            assert torch.equal(acc, accs[t] * 2.0 ** (1 - format.accumulator))


def integer_steps(
    weight: Tensor, grads: Tensor, lr: list[int], momentum: int, format: UpdateFormat
) -> tuple[Tensor, Tensor]:
    """Codes of weights and accumulators after every step, from an accumulator of zeros; its dtype is the gradients'."""
    acc = torch.zeros_like(weight, dtype=grads.dtype)
    weights, accs = [], []
    for g, rate in zip(grads, lr, strict=True):
        weight, acc, _ = integer_step(weight, acc, g, rate, momentum, format, CLIP_STORED)
        weights.append(weight)
        accs.append(acc)
    return torch.stack(weights), torch.stack(accs)

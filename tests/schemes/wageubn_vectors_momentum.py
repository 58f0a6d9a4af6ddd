"""WAGEUBN's golden vectors of the update: quantized gradients, momentum and stored weights, step by step."""

from __future__ import annotations

from typing import Any

import torch
from schemes.vector_table import Comparison
from schemes.wageubn_vectors_nets import Beside, authors, converted, layer_like, same
from schemes.wageubn_vectors_quantizers import learning_rates
from torch import Tensor, nn

from lightning_lowbit.modules.base import switch_of
from lightning_lowbit.numerics.constant import constant_codes
from lightning_lowbit.numerics.direct import direct_quantize
from lightning_lowbit.numerics.momentum import (
    UpdateFormat,
    float_step,
    integer_step,
    learning_rate_code,
    learning_rate_notice,
    momentum_code,
    recover,
    store,
)
from lightning_lowbit.plugins.precision import lowbit_step, rule_of
from lightning_lowbit.schemes.wageubn import Wageubn

__all__ = ["check_integer_update", "check_momentum"]

BITS = None  # of weights: the published stored ones have no end
WEIGHT, GAMMA, BETA = "layer.weight", "norm.weight", "norm.bias"


# -- in a network --------------------------------------------------------------------------------------------
class Stepped:
    """A converted network that takes one optimizer step after the other with given gradients and draws.

    Args:
        weight, channel: where the layer's weight, and gamma and beta, begin.
        scheme: its update's options.
        momentum: of the user's optimizer.

    Attributes:
        gq: quantized gradients of the last step by parameter, int64: how far a code moved, less the momentum.
    """

    def __init__(self, weight: Tensor, channel: Tensor, scheme: Wageubn, momentum: float) -> None:
        example = torch.ones(2, *weight.shape[1:]), torch.ones(2, len(channel))
        self.net = converted(Beside(layer_like(weight), nn.BatchNorm1d(len(channel))), scheme, *example)
        self.parameters = dict(self.net.named_parameters())
        with torch.no_grad():
            self.parameters[WEIGHT].copy_(weight)
            for name in (GAMMA, BETA):
                self.parameters[name].copy_(channel)
        self.optimizer = torch.optim.SGD(self.net.parameters(), lr=1.0, momentum=momentum)
        self.format, self.steps = scheme.update_format, 0
        self.momentum = momentum_code(momentum, self.format)
        self.gq: dict[str, Tensor] = {}

    @property
    def rule(self) -> Any:
        return rule_of(self.net)

    def step(self, grad: Tensor, grad_channel: Tensor, draws: Tensor | None, lr: float, dr: int) -> None:
        before = {name: (self.codes(name), self.sums(name)) for name in (WEIGHT, GAMMA, BETA)}

        def closure() -> None:
            for name in before:
                self.parameters[name].grad = (grad if name == WEIGHT else grad_channel).clone()

        def injected(path: str, purpose: str, samples: int, per_sample: int) -> Tensor:
            assert (path, purpose) == (WEIGHT, "gradient"), f"drew for {path}, {purpose}"
            assert draws is not None
            return draws.reshape(samples, per_sample)

        switch_of(self.net).run.injected = None if draws is None else injected
        self.rule.milestone(f"dr[{self.steps}]={dr}", True, self.steps)
        self.optimizer.param_groups[0]["lr"] = lr
        lowbit_step(self.net, self.optimizer, closure)
        self.steps += 1
        rate = learning_rate_code(lr, self.format)
        for name, (code, acc) in before.items():
            moved = code - self.codes(name)
            assert rate == 0 or not (moved % rate).any(), f"{name}: not a multiple of the learning rate"
            self.gq[name] = moved // max(rate, 1) - self.momentum * acc

    def codes(self, name: str) -> Tensor:
        known = self.rule.masters.get(name)
        return (recover(self.parameters[name], self.format) if known is None else known).to(torch.int64)

    def sums(self, name: str) -> Tensor:
        acc = self.rule.accumulators.get(name)
        return torch.zeros_like(self.parameters[name], dtype=torch.int64) if acc is None else acc.to(torch.int64)


# -- the files -----------------------------------------------------------------------------------------------
def check_integer_update(v: Comparison) -> None:
    weight, gradient, learning_rate, momentum, accumulator = (int(fraction) + 1 for fraction in v["frac"])
    format = UpdateFormat(gradient, momentum, accumulator, learning_rate, weight)
    start, lr = v["w0_int"].to(torch.int32), v["lr_int"].tolist()
    for dtype in (torch.int16, torch.int32):
        w, acc = integer_steps(start, v["g_int"].to(dtype), lr, v.count("mom_int"), format)
        v.exact("w_int", w)
        v.exact("acc_int", acc)
    check_integers_in_network(v, format)


def check_integers_in_network(v: Comparison, format: UpdateFormat) -> None:
    """The gradients as weights' and as those of a norm, which are not brought to a range.

    One row more holds the largest gradient of the range, which is then a unit of the others.
    """
    start, grads, unit = v["w0_int"], v["g_int"], 2.0 ** (1 - format.gradient)
    dr = max(4, 1 << int(grads.abs().max()).bit_length())
    row = torch.zeros_like(start[:1])
    weight = torch.cat([start, row]).float() * 2.0 ** (1 - format.weight)
    scheme = authors().replace(
        gradient_bits=format.gradient, momentum_bits=format.momentum, lr_bits=format.learning_rate,
        accumulator_bits=format.accumulator, stored_bits=format.weight, momentum=None,
    )  # fmt: skip
    net = Stepped(weight, weight[:-1].flatten(), scheme, v.count("mom_int") * 2.0 ** (1 - format.momentum))
    seen: dict[str, list[Tensor]] = {name: [] for name in ("w", "acc", "gamma", "acc_gamma")}
    for g, rate in zip(grads, v["lr_int"], strict=True):
        whole = torch.cat([g, row + dr - 1]).float()
        net.step(
            whole, g.flatten() * unit, torch.zeros_like(whole), float(rate) * 2.0 ** (1 - format.learning_rate), dr
        )
        seen["w"].append(net.codes(WEIGHT)[:-1])
        seen["acc"].append(net.sums(WEIGHT)[:-1])
        seen["gamma"].append(net.codes(GAMMA).reshape(g.shape))
        seen["acc_gamma"].append(net.sums(GAMMA).reshape(g.shape))
        if rate:
            same("gradient", net.gq[WEIGHT][:-1], g)
        same("what the layer holds", net.parameters[WEIGHT], net.codes(WEIGHT).double() * 2.0 ** (1 - format.weight))
    for key, names in (("w_int", ("w", "gamma")), ("acc_int", ("acc", "acc_gamma"))):
        for name in names:
            v.exact(key, torch.stack(seen[name]))


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
            w, acc, _ = float_step(w, acc, g * unit, lr[t], momentum, format, BITS)
            assert torch.equal(w, store(weights[t], format)), f"{name}: the float step {t} is another"
            assert torch.equal(acc, accs[t] * 2.0 ** (1 - format.accumulator))
    check_momentum_in_network(v, rates)


def check_momentum_in_network(v: Comparison, rates: Tensor) -> None:
    """The user's optimizer holds learning rate and momentum, rounded only where that would be told: 0 is not raised."""
    net = Stepped(v["w0"], v["bn0"], authors().replace(momentum=None), v.number("momentum"))
    unit, unit_of_sum = 2.0 ** (1 - net.format.gradient), 2.0 ** (1 - net.format.accumulator)
    for t, (lr, rate) in enumerate(zip(v["lr"], rates, strict=True)):
        given = float(rate if learning_rate_notice(float(lr), net.format) else lr)
        net.step(v["grads"][t], v["grads_bn"][t], v["uniform"][t], given, int(v["dr"][t]))
        same(f"w, step {t}", net.parameters[WEIGHT], v["w"][t])
        same(f"acc_w, step {t}", net.sums(WEIGHT) * unit_of_sum, v["acc_w"][t])
        for name in (GAMMA, BETA):
            same(f"{name}, step {t}", net.parameters[name], v["bn"][t])
            same(f"acc of {name}, step {t}", net.sums(name) * unit_of_sum, v["acc_bn"][t])
        for name, key in ((WEIGHT, "gq"), (GAMMA, "gq_bn"), (BETA, "gq_bn")):
            if rate:
                same(f"gradient of {name}, step {t}", net.gq[name] * unit, v[key][t])
    assert net.rule.accumulators[WEIGHT].dtype == torch.int16


def integer_steps(
    weight: Tensor, grads: Tensor, lr: list[int], momentum: int, format: UpdateFormat
) -> tuple[Tensor, Tensor]:
    """Codes of weights and accumulators after every step, from an accumulator of zeros; its dtype is the gradients'."""
    acc = torch.zeros_like(weight, dtype=grads.dtype)
    weights, accs = [], []
    for g, rate in zip(grads, lr, strict=True):
        weight, acc, _ = integer_step(weight, acc, g, rate, momentum, format, BITS)
        weights.append(weight)
        accs.append(acc)
    return torch.stack(weights), torch.stack(accs)

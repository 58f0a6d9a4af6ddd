"""Three training steps of the published NITI networks, through the package's own modules: every tensor compared."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from schemes.niti_reference import true_division_error
from schemes.vector_table import Comparison, Kind, VectorFile
from torch import Tensor, nn

from lightning_lowbit.kernels import bit_width
from lightning_lowbit.modules.base import switch_of
from lightning_lowbit.modules.carrier import Carrier
from lightning_lowbit.numerics.block import ShiftRounding, shift_round
from lightning_lowbit.numerics.exponent import ceil_log2
from lightning_lowbit.numerics.integer_loss import ERROR_EXPONENT
from lightning_lowbit.numerics.niti_rules import grad_shift
from lightning_lowbit.plugins.precision import lowbit_step, rule_of
from lightning_lowbit.schemes import convert
from lightning_lowbit.schemes.niti import Niti

__all__ = ["STEPS"]


class Steps:
    """A published network rebuilt from a file, and what passed between its modules in the present step.

    The files keep channels last; the package's tensors have the channels on axis 1.
    """

    def __init__(self, v: Comparison, published_loss: bool) -> None:
        self.v, self.published_loss = v, published_loss
        self.kinds = [str(kind) for kind in v.arrays["layers"]]
        self.image: tuple[int, ...] | None = None  # height, width and channels where the flatten stands
        self.step = 0
        self.net = nn.Sequential(*(self.module(i, kind) for i, kind in enumerate(self.kinds)))
        mus = tuple(int(mu) for mu in v["mus"])
        convert(self.net, Niti(preset="reference", dropout="shared", mu=mus[0]), self.input(0))
        for i in self.weighted:
            layer = self.net[i]
            layer.lowbit_weight.block_exponent.copy_(v[f"w_exp_{i}"])  # type: ignore[operator, union-attr]
            layer.lowbit_weight.store(self.weight(f"w_init_{i}", i).to(torch.int8))  # type: ignore[operator, union-attr]
        switch_of(self.net).run.injected = self.random
        self.passed: dict[int, Carrier] = {}
        self.errors: dict[int, Carrier] = {}
        for i, module in enumerate(self.net):
            module.register_forward_hook(self.keeper(i))
        self.optimizer = torch.optim.SGD(self.net.parameters(), lr=1.0)
        self.mus = mus

    @property
    def weighted(self) -> list[int]:
        return [i for i, kind in enumerate(self.kinds) if kind in ("TiConv2d", "TiLinear")]

    def module(self, i: int, kind: str) -> nn.Module:
        if kind == "TiConv2d":
            outputs, height, width, inputs = self.v.arrays[f"w_init_{i}"].shape
            return nn.Conv2d(inputs, outputs, (height, width), padding=(height // 2, width // 2), bias=False)
        if kind == "TiLinear":
            outputs, inputs = self.v.arrays[f"w_init_{i}"].shape
            return nn.Linear(inputs, outputs, bias=False)
        if kind == "TiFlat":
            self.image = self.v.arrays[f"s0_act_{i - 1}"].shape[1:]
        return {"TiReLU": nn.ReLU, "TiFlat": nn.Flatten, "TiDropout": nn.Dropout}.get(kind, lambda: nn.MaxPool2d(2))()

    # -- between the file's layout and the package's -----------------------------------------------------------
    def ours(self, x: Tensor, flat: bool) -> Tensor:
        """[..., H, W, C] to [..., C, H, W]; with ``flat`` the last axis holds all three."""
        if not flat:
            return x.movedim(-1, 1) if x.dim() == 4 else x
        if self.image is None:
            return x
        return x.reshape(-1, *self.image).movedim(-1, 1).reshape(x.shape)

    def theirs(self, x: Tensor, flat: bool) -> Tensor:
        if not flat:
            return x.movedim(1, -1) if x.dim() == 4 else x
        if self.image is None:
            return x
        height, width, channels = self.image
        return x.reshape(-1, channels, height, width).movedim(1, -1).reshape(x.shape)

    def is_flat(self, i: int) -> bool:
        """Whether layer i's result is an image in one axis."""
        while self.kinds[i] == "TiDropout":
            i -= 1
        return self.kinds[i] == "TiFlat"

    def reads_flat(self, i: int) -> bool:
        return i > 0 and self.is_flat(i - 1)

    def weight(self, key: str, i: int) -> Tensor:
        return self.ours(self.v[key], self.reads_flat(i))

    def input(self, step: int) -> Tensor:
        return self.v[f"s{step}_x"]

    # -- one step --------------------------------------------------------------------------------------------
    def keeper(self, i: int) -> Callable[[nn.Module, object, Tensor], None]:
        def keep(module: nn.Module, args: object, output: Tensor) -> None:
            if isinstance(output, Carrier):  # not in calibration
                self.passed[i] = output
                output.register_hook(lambda grad: self.errors.__setitem__(i, grad))  # type: ignore[no-untyped-call]

        return keep

    def random(self, path: str, purpose: str, samples: int, per_sample: int) -> Tensor:
        if purpose == "dropout":
            # Masks are keyed by the module that made the tensor: the next dropout behind it.
            i = next(i for i, kind in enumerate(self.kinds) if kind == "TiDropout" and i > int(path))
            mask = self.ours(self.v[f"s{self.step}_dropmask_{i}"][None], self.is_flat(i))
            return mask * (2**31 - 1)  # a kept value's number is above any share of 2^31, a dropped one's below
        assert purpose == "loss"
        return self.v[f"s{self.step}_loss_rand"]

    def backward(self, x: Tensor, target: Tensor) -> None:
        entered: list[Carrier] = []
        first = self.net[0]
        hook = first.lowbit_input.register_forward_hook(lambda m, a, out: entered.append(out))  # type: ignore[union-attr]
        # Linear layers hand an error back even to the data; a first convolution does not.
        logits = self.net(x.requires_grad_(f"s{self.step}_err_0" in self.v.arrays))
        hook.remove()
        self.v.exact(f"s{self.step}_x_q", self.theirs(entered[0].payload, flat=False))
        self.v.exact(f"s{self.step}_x_exp", entered[0].exponent)
        if x.requires_grad:
            entered[0].register_hook(lambda grad: self.errors.__setitem__(-1, grad))  # type: ignore[no-untyped-call]
        if self.published_loss:
            noise = self.v[f"s{self.step}_loss_rand"]
            err = true_division_error(logits.payload.detach(), int(logits.exponent), target, noise)
            logits.backward(Carrier(err, self.start(target), logits.origin))
        else:
            F.cross_entropy(logits, target).backward()  # type: ignore[no-untyped-call]

    @staticmethod
    def start(target: Tensor) -> Tensor:
        """Exponent of the errors of a mean over the batch; the published code starts at 0."""
        return ceil_log2(torch.tensor(1.0 / len(target), dtype=torch.float64)) + ERROR_EXPONENT

    def run(self) -> None:
        for step, mu in enumerate(self.mus):
            self.step = step
            rule = rule_of(self.net)
            rule.milestone(f"mu[{step}]={mu}", True, step)  # type: ignore[union-attr]  # a NitiRule
            target = self.v[f"s{self.step}_target"]

            def closure(target: Tensor = target, mu: int = mu) -> None:
                self.backward(self.input(self.step), target)
                self.compare(target, mu)

            lowbit_step(self.net, self.optimizer, closure)
            for i in self.weighted:
                codes = self.net[i].lowbit_weight.codes()  # type: ignore[operator, union-attr]
                self.v.exact(f"s{self.step}_w_{i}", self.theirs(codes, self.reads_flat(i)))
                shown = self.net[i].weight * 2.0 ** -int(self.v[f"w_exp_{i}"])  # type: ignore[operator]
                assert torch.equal(shown.to(torch.int8), codes)

    def compare(self, target: Tensor, mu: int) -> None:
        s, v = self.step, self.v
        for i, carrier in self.passed.items():
            v.exact(f"s{s}_act_{i}", self.theirs(carrier.payload, self.is_flat(i)))
            v.exact(f"s{s}_act_exp_{i}", carrier.exponent)
        last = max(self.passed)
        v.exact(f"s{s}_loss_err", self.errors.pop(last).payload)
        for before, err in self.errors.items():
            i = before + 1  # the layer that handed it back
            flat = self.is_flat(before) if before >= 0 else False
            v.exact(f"s{s}_err_{i}", self.theirs(err.payload, flat))
            # The published exponents begin at 0 and forget what dropout multiplies with.
            dropped = sum(kind == "TiDropout" for kind in self.kinds[i:])
            v.exact(f"s{s}_err_exp_{i}", err.exponent - self.start(target) - dropped)
        self.errors.clear()
        for i in self.weighted:
            acc, _ = self.net[i].gathered["weight"]  # type: ignore[index]
            v.exact(f"s{s}_gacc_{i}", self.theirs(acc, self.reads_flat(i)))
            width = bit_width(acc)
            grad = shift_round(acc, grad_shift(width, mu), ShiftRounding.PSEUDO_STOCHASTIC) * (width > 0)
            v.exact(f"s{s}_grad_{i}", self.theirs(grad, self.reads_flat(i)))


_INPUTS = r"mus|layers|w_init_\d+|w_exp_\d+|s\d+_(x|target|loss_rand|dropmask_\d+)"
_OUTPUTS = r"s\d+_(x_q|x_exp|act_\d+|act_exp_\d+|loss_err|err_\d+|err_exp_\d+|gacc_\d+|grad_\d+|w_\d+)"


def table(published_loss: bool) -> VectorFile:
    keys = {_INPUTS: Kind.INPUT, _OUTPUTS: Kind.OUTPUT}
    return VectorFile(keys, lambda v: Steps(v, published_loss).run())


STEPS = {f"{net}_{loss}": table(loss == "head") for net in ("linear1", "mlp", "convnet") for loss in ("int", "head")}

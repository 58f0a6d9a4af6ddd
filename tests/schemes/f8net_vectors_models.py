"""F8Net's golden vectors of whole networks: training steps in float64, evaluation in float32, integers."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from schemes.f8net_vectors_layers import DOUBLE, OWN_ALPHA, compare_fraclen, logit_scale
from schemes.f8net_vectors_nets import is_signed, network
from schemes.f8net_vectors_options import configuration, converted, input_of, scheme_of, set_alpha, set_fraclen
from schemes.vector_table import Comparison
from torch import Tensor

from lightning_lowbit.modules.fixed_point_operands import ResultUnit
from lightning_lowbit.modules.layers import LowBitLayer

__all__ = ["SINGLE", "Model", "check_evaluation", "check_training", "evaluated", "published_logits"]

SINGLE = 1e-6
ONE_CODE = 0.05  # of the largest logit: what a code that falls to the other side of a tie may change


class Model:
    """The converted toy of a file, and its layers by the names that they have there.

    Args:
        v: the file.
        dtype: of everything.
        options: of the scheme, beside what the file says.
    """

    def __init__(self, v: Comparison, dtype: torch.dtype, **options: Any) -> None:
        self.v, self.cfg = v, configuration(v)
        flags = self.cfg["flags"]
        self.net = network(self.cfg).to(dtype)
        average = "reference" if flags["quant_avgpool"] else "exact"
        scheme = scheme_of(self.cfg, pixels=not self.cfg["normalize"], avgpool=average, **options)
        converted(self.net, scheme, v["s0/x"], dtype)
        self.units: dict[str, LowBitLayer] = {
            path.removesuffix(".conv"): m for path, m in self.net.named_modules() if isinstance(m, LowBitLayer)
        }
        for name, layer in self.units.items():
            input_of(layer).set_signed(is_signed(self.cfg, name))
        if flags["pool_fusing"] and "tail.0" in self.units:
            self._fuse(flags["pool"] ** 2)

    def _fuse(self, count: int) -> None:
        """Published pool fusing: what a mean by a shift leaves goes into the layer before it; its norm divides it out.

        Where a block stands before the pool nobody reads the factor.
        """
        self.net.pool.__dict__["factor"] = 2.0 ** round(math.log2(count)) / count
        input_of(self.units["tail.0"]).__dict__["mean"] = self.net.pool

    @torch.no_grad()
    def set_state(self, phase: str) -> None:
        for key, value in self.net.state_dict().items():
            if f"{phase}/{key}" in self.v.arrays:
                value.copy_(self.v[f"{phase}/{key}"])
        for name, layer in reversed(self.units.items()):  # who leads a tie comes last: its clip is the one that counts
            set_alpha(layer, self.v[f"{phase}/{name}.alpha"])
            set_fraclen(layer, self.v[f"{phase}/{name}.input_fraclen"])

    def optimizer(self) -> torch.optim.Optimizer:
        """SGD over all parameters; weight decay where the published recipes have it."""
        decayed = [p for p in self.net.parameters() if p.dim() == 2 or (p.dim() == 4 and p.shape[1] > 1)]
        ids = {id(p) for p in decayed}
        groups = [
            {"params": decayed, "weight_decay": self.cfg["wd"]},
            {"params": [p for p in self.net.parameters() if id(p) not in ids]},
        ]
        lr, momentum, nesterov = (self.cfg[name] for name in ("lr", "momentum", "nesterov"))
        return torch.optim.SGD(groups, lr=lr, momentum=momentum, nesterov=nesterov)


# -- training ------------------------------------------------------------------------------------------------
def check_training(v: Comparison) -> None:
    model = Model(v, torch.float64)
    model.set_state("init")
    optimizer = model.optimizer()
    model.net.train()
    for t in range(len(v.matching(r"s\d+/x"))):
        optimizer.zero_grad()
        logits = model.net(v[f"s{t}/x"])
        loss = F.cross_entropy(logits, v[f"s{t}/t"])
        loss.backward()
        v.close(f"s{t}/logits", logits, DOUBLE)
        v.close(f"s{t}/loss", loss, DOUBLE)
        compare_gradients(v, model, t)
        for name, layer in model.units.items():
            compare_fraclen(v, f"s{t}/fraclen/{name}", f"init/{name}.input_fraclen", layer)
        optimizer.step()
    compare_final(v, model)


def compare_gradients(v: Comparison, model: Model, step: int) -> None:
    parameters = dict(model.net.named_parameters())
    for match in v.matching(rf"s{step}/grad/(.*)"):
        unit, _, last = match[1].rpartition(".")
        parameter = input_of(model.units[unit]).alpha if last == "alpha" else parameters[match[1]]
        assert parameter is not None
        assert parameter.grad is not None
        v.close(match[0], parameter.grad, DOUBLE, OWN_ALPHA)


def compare_final(v: Comparison, model: Model) -> None:
    for key, value in model.net.state_dict().items():
        if f"final/{key}" in v.arrays:
            v.close(f"final/{key}", value, DOUBLE)
    for name, layer in model.units.items():
        compare_fraclen(v, f"final/{name}.input_fraclen", f"init/{name}.input_fraclen", layer)
        source = input_of(layer)
        if source.alpha is not None and source.leader is source:
            v.close(f"final/{name}.alpha", source.alpha, DOUBLE)
        else:  # the published code keeps a clip that nobody reads, beside that of the tie
            v.exact(f"final/{name}.alpha", v[f"init/{name}.alpha"])


# -- evaluation ----------------------------------------------------------------------------------------------
def unit_of(layer: LowBitLayer) -> Tensor:
    """What the layer's result is counted in."""
    reader = layer.lowbit_unit.reader if isinstance(layer.lowbit_unit, ResultUnit) else None
    unit = None if reader is None else reader.unit()
    return torch.ones(()) if unit is None else unit


def evaluated(v: Comparison, dtype: torch.dtype = torch.float32, **options: Any) -> Model:
    """The trained network, rounded to float32; computing in ``dtype``."""
    model = Model(v, torch.float32, **options)
    model.set_state("final")
    model.net.to(dtype).eval()
    return model


def published_logits(model: Model) -> Tensor:
    dtype = next(model.net.parameters()).dtype
    logits: Tensor = model.net(model.v["eval/x"].to(dtype)) / logit_scale(model.units["classifier.0"], model.cfg)
    return logits


@torch.no_grad()
def check_evaluation(v: Comparison, model: Model) -> None:
    """What evaluation computes in floats, with a bias off its grid too."""
    got, want = published_logits(evaluated(v, bias="float")), v["eval/logits"]
    moved = ((got - want).abs().amax(1) > SINGLE * want.abs().max()).sum()
    assert moved <= 1, f"eval/logits: {moved} of {len(want)} images differ"
    v.close("eval/logits", got, SINGLE if moved == 0 else ONE_CODE)
    for name, layer in model.units.items():
        source = input_of(layer)
        unit = source.unit()
        v.close(f"eval/fix_scaling/{name}", torch.ones(()) if unit is None else unit, SINGLE)
        if f"eval/next_fix_scaling/{name}" in v.arrays:
            v.close(f"eval/next_fix_scaling/{name}", unit_of(layer), SINGLE)
        v.exact(f"eval/input_fl/{name}", source.rounded())
        assert layer.lowbit_weight is not None
        v.exact(f"eval/weight_fl/{name}", -layer.lowbit_weight.exponent())

r"""A seventh scheme in one file: SAWB (Choi et al., "Accurate and Efficient 2-bit Quantized Neural Networks", 2019).

    PYTHONPATH=examples lightning-lowbit fit --config examples/configs/digits_float.yaml \
        --quant.scheme your_own_scheme.Sawb --quant.scheme.bits 4
"""

from dataclasses import dataclass
from typing import Literal

import torch
from lightning.pytorch import Trainer, seed_everything

from lightning_lowbit import QuantCallback, Scheme, lower, verify
from lightning_lowbit.demos import DigitsCnn, DigitsData
from lightning_lowbit.modules.quantizer import Quantizer
from lightning_lowbit.modules.thresholds import BiasQuantizer, ThresholdQuantizer
from lightning_lowbit.numerics.grid import Grid
from lightning_lowbit.numerics.ste import fake_quantize


class StatisticsAware(Quantizer):
    """The largest code is alpha = c1 sqrt(E[w^2]) - c2 E|w| (section 3), on the nearest power-of-two step."""

    def __init__(self, site, bits):
        super().__init__(site)
        self.bits, self.qmax = bits, 2 ** (bits - 1) - 1
        self.register_buffer("step_exponent", torch.zeros(()))  # float32: averages of networks truncate integers

    def observe(self, w):  # in calibration; c1 and c2 of codes with a zero, as in the authors' fms-model-optimizer
        (c1, c2), mean = {2: (2.6, 1.71), 4: (12.035, 12.03), 8: (31.76, 35.04)}[self.bits], w.abs().mean().clamp(1e-9)
        alpha = torch.maximum(c1 * w.square().mean().sqrt() - c2 * mean, mean)
        self.step_exponent.copy_((alpha / self.qmax).log2().round())

    def exponent(self):
        return self.step_exponent.round().to(torch.int32)

    def grid(self):
        return Grid(bits=self.bits, exponent=int(self.exponent()), signed=True, narrow=True)

    def quantize(self, w, rectify=False):
        if self.training:  # in evaluation nothing moves
            self.observe(w.detach())
        return fake_quantize(w, self.exponent(), qmin=-self.qmax, qmax=self.qmax)


@dataclass(frozen=True)
class Sawb(Scheme):
    """Weights whose clip follows their statistics; activations in 8 bits on calibrated ranges.

    Args:
        bits: of weights; of the first and the last layer, 8.
    """

    name = "sawb"
    bits: Literal[2, 4, 8] = 4

    def quantizer(self, site):
        if site.role == "weight":
            return StatisticsAware(site, 8 if site.first or site.last else self.bits)
        if site.role == "bias":
            return BiasQuantizer(site, bits=32, own=False)  # on the grid of the products
        flows = site.role in ("input", "output", "operand") and site.source is None  # errors and gradients stay float
        return ThresholdQuantizer(site, 8, "max", trainable=False) if flows else None

    def batch_norm(self, site, norm):
        return "fold"

    def start(self, pretrained):
        return 0 if pretrained else 0.3  # activations keep calibrated ranges: let a new network train first


def main(epochs: int = 20) -> None:
    seed_everything(0)
    model, data, quant = DigitsCnn(lr=0.01), DigitsData(), QuantCallback(Sawb(bits=4))
    Trainer(max_epochs=epochs, accelerator="cpu", callbacks=[quant], logger=False).fit(model, data)
    print(verify(model, lower(model), data.test_dataloader()))


if __name__ == "__main__":
    main()

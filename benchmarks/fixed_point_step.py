"""Cost of F8Net's training step over that of the float step: its phases, and what choosing fraclens adds.

    python benchmarks/fixed_point_step.py [--net resnet20] [--rounds 15] [--no-compile] [--json FILE]

Rows, all on one thread and alternating:
    standing    fraclens stand still, batch norms are live: two convolutions in every layer
    rms, histogram, grid    the same, and fraclens of activations are chosen from every batch
    frozen      fraclens and batch norms stand still: one convolution
The second ratio is over ``standing``: what the choice costs.
"""

from __future__ import annotations

from functools import partial

from qat_step import batch, float_net
from steps import main
from torch import nn

from lightning_lowbit import F8Net, convert
from lightning_lowbit.modules.base import low_bit_modules
from lightning_lowbit.modules.fraclen import FraclenInput


def fixed_point_net(name: str, select: str | None = None, frozen: bool = False) -> nn.Module:
    """``select``: how fraclens are chosen (None: they stand still); ``frozen``: whether batch norms stand still."""
    net = float_net(name)
    convert(net, F8Net(select=select or "rms"), example_input=batch(name)[0])  # type: ignore[arg-type]  # one of them
    net.train()
    for _, module in low_bit_modules(net):
        module.milestone("freeze_batch_norm", frozen)
    for module in net.modules():
        if isinstance(module, FraclenInput):
            module.frozen = select is None
    return net


ROWS = {
    "standing": (fixed_point_net, False),
    **{name: (partial(fixed_point_net, select=name), False) for name in ("rms", "histogram", "grid")},
    "frozen": (partial(fixed_point_net, frozen=True), False),
    "rms compiled": (partial(fixed_point_net, select="rms"), True),
    "frozen compiled": (partial(fixed_point_net, frozen=True), True),
}


if __name__ == "__main__":
    main(__doc__, ROWS, beside="standing")

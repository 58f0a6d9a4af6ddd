"""Cost of Jacinto's training step over that of the float step: its backward variants, and its phases.

    python benchmarks/merged_step.py [--net resnet20] [--batch 64] [--rounds 15] [--no-compile] [--json FILE]

Rows, all on one thread and alternating, by ``ste_weights`` (or ``bn_value="batch"``):
    float, quantized, folded, batch    batch norms and ranges follow the batches
    ... standing                       neither does
"""

from __future__ import annotations

from functools import partial
from typing import Any

from qat_step import batch, float_net
from steps import main
from torch import nn

from lightning_lowbit import Jacinto, convert
from lightning_lowbit.modules.base import low_bit_modules
from lightning_lowbit.modules.clipped import ClipQuantizer


def merged_net(name: str, standing: bool = False, **options: Any) -> nn.Module:
    net = float_net(name)
    convert(net, Jacinto(**options), example_input=batch(name)[0])
    net.train()
    for _, module in low_bit_modules(net):
        module.milestone("freeze_batch_norm", standing)
    for module in net.modules():
        if isinstance(module, ClipQuantizer):
            module.frozen = standing
    return net


VARIANTS = {
    "float": {}, "quantized": {"ste_weights": "quantized"}, "folded": {"ste_weights": "folded"},
    "batch": {"bn_value": "batch"},
}  # fmt: skip
ROWS = {
    **{name: (partial(merged_net, **options), False) for name, options in VARIANTS.items()},
    **{
        f"{name} standing": (partial(merged_net, standing=True, **VARIANTS[name]), False)
        for name in ("float", "quantized", "folded")
    },
    "float compiled": (merged_net, True),
    "float standing compiled": (partial(merged_net, standing=True), True),
    "folded standing compiled": (partial(merged_net, standing=True, ste_weights="folded"), True),
}


if __name__ == "__main__":
    main(__doc__, ROWS)

"""Cost of WAGEUBN's training step over that of the float step, and of its parts.

    python benchmarks/full_step.py [--net resnet20 | vgg | mlp] [--batch 128] [--rounds 15] [--json FILE]

Rows, all on one thread and alternating; the last column divides by the first of them:
    simulate       products by float32 under a proof
    int8           by int8 instructions: the default
    ... one unit   errors of layers in one plane (e2="shift8")
    ... norms      batch norms left in float
"""

from __future__ import annotations

from functools import partial
from typing import Any

from qat_step import batch, float_net
from steps import main
from torch import nn

from lightning_lowbit import Wageubn, convert


def full_net(name: str, **options: Any) -> nn.Module:
    net = float_net(name)
    convert(net, Wageubn(**options), example_input=batch(name)[0])
    return net.train()


ROWS = {
    f"{backend}{part}": (partial(full_net, backend=backend, **options), False)
    for part, options in (("", {}), (", one unit", {"e2": "shift8"}), (", norms float", {"norms": False}))
    for backend in ("simulate", "int8")
}


if __name__ == "__main__":
    main(__doc__, ROWS, beside="simulate")

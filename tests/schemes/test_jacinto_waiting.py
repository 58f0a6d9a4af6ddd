"""A training step of Jacinto reads no value back, where that would wait for the device."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from schemes.jacinto_nets import chain, converted, images, labels
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_lowbit import lowbit_step
from lightning_lowbit.numerics import clipping, merged_bias, percentile


class NothingRead(TorchDispatchMode):
    """Raises where Python asks a tensor for its value."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default):
            raise AssertionError(f"{func} waits for the device")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "options",
    [
        {}, {"ste_weights": "quantized"}, {"ste_weights": "folded"}, {"bn_value": "batch"}, {"preset": "reference"},
        {"range_shrink": 1.0}, {"preset": "WC4M4_AT8"}, {"bias": "tidl_scale"}, {"range_subsample": 2},
    ],
    ids=str,
)  # fmt: skip
def test_a_training_step_reads_no_value(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    net = converted(chain(), **options).train()
    for module in (clipping, merged_bias, percentile):  # on the CPU, where that waits for nothing, they do read
        monkeypatch.setattr(module, "eager_cpu", lambda x: False)
    optimizer = torch.optim.SGD(net.parameters(), 0.01, foreach=False)
    x, y = images(), labels()
    for _ in range(2):
        optimizer.zero_grad()
        with NothingRead():
            F.cross_entropy(net(x), y).backward()
        lowbit_step(net, optimizer)


def test_the_guard_notices_a_reading() -> None:
    with pytest.raises(AssertionError, match="waits for the device"), NothingRead():
        float(torch.ones(()))

"""Every operand and result of an evaluation lies on the grid that the report prints for it."""

from __future__ import annotations

import pytest
import torch
from modules.watch import watch
from modules.zoo import ZOO, build

from lightning_lowbit import Tqt, convert, summarize

# What each network must show, so that a watch that sees nothing does not pass.
EXPECTED = {
    "resnet20": {"compute": 20, "add": 9},
    "mobilenet_v2": {"compute": 14, "add": 3},
    "densenet": {"compute": 11, "cat": 6},
}


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("name", sorted(ZOO))
def test_evaluation_stays_on_the_printed_grids(name: str, bits: int) -> None:
    net, x = build(name)
    convert(net, Tqt(bits=bits), x)
    net.eval()
    found = watch(net, summarize(net), x)
    assert found.off == []
    assert found.seen["compute"] > 0
    for kind, count in EXPECTED.get(name, {}).items():
        assert found.seen[kind] == count, (kind, found.seen)


@pytest.mark.parametrize("name", sorted(ZOO))
def test_a_batch_is_its_samples(name: str) -> None:
    net, x = build(name)
    convert(net, "tqt", x)
    net.eval()
    from modules.zoo import tensors

    with torch.no_grad():
        together = tensors(net(x))
        alone = [tensors(net(x[i : i + 1])) for i in range(len(x))]
    for k, result in enumerate(together):
        assert torch.equal(result, torch.cat([one[k] for one in alone]))

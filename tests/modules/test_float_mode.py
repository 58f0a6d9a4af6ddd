"""In float, a converted network is the network that it was: outputs, gradients, statistics, names."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from modules.zoo import ZOO, build, tensors
from torch import Tensor, nn

from lightning_lowbit import convert, float_mode
from lightning_lowbit.modules.base import low_bit_modules
from lightning_lowbit.modules.revert import revert

NETS = sorted(ZOO)


def run(net: nn.Module, x: Tensor, train: bool) -> dict[str, Tensor]:
    """Outputs, gradients of input and parameters, and buffers, after one pass."""
    net.train(train)
    torch.manual_seed(3)
    x = x.clone().requires_grad_()
    net.zero_grad(set_to_none=True)
    outputs = tensors(net(x))
    sum((output * (index + 1)).square().sum() for index, output in enumerate(outputs)).backward()
    found = {f"output {i}": output.detach() for i, output in enumerate(outputs)} | {"input": x.grad}
    found |= {f"grad {n}": p.grad for n, p in net.named_parameters() if p.grad is not None and "lowbit" not in n}
    return found | {f"buffer {n}": b.clone() for n, b in net.named_buffers() if "lowbit" not in n}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    different = [name for name, tensor in expected.items() if not torch.equal(found[name], tensor)]
    assert not different


@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("calibrated", [False, True], ids=["waiting", "float_mode"])
@pytest.mark.parametrize("name", NETS)
def test_float_bits(name: str, calibrated: bool, train: bool) -> None:
    net, x = build(name)
    plain = copy.deepcopy(net)
    convert(net, "tqt", x if calibrated else None)
    expected = run(plain, x, train)
    if calibrated:
        with float_mode(net):
            found = run(net, x, train)
    else:
        found = run(net, x, train)
    assert_same(found, expected)


@pytest.mark.parametrize("name", NETS)
def test_names_objects_and_the_way_back(name: str) -> None:
    net, x = build(name)
    plain = copy.deepcopy(net)
    keys, parameters = list(net.state_dict()), dict(net.named_parameters())
    children = dict(net.named_modules())
    convert(net, "tqt", x)
    converted = dict(net.named_parameters())
    assert all(converted[n] is p for n, p in parameters.items())
    assert [key for key in net.state_dict() if "lowbit" not in key] == keys
    revert(net)
    assert list(net.state_dict()) == keys
    assert {path: type(m) for path, m in net.named_modules()} == {p: type(m) for p, m in plain.named_modules()}
    assert all(children[path] is module for path, module in net.named_modules())
    for (path, module), original in zip(net.named_modules(), plain.modules(), strict=True):
        assert vars(module).keys() == vars(original).keys(), path
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
    assert_same(run(net, x, True), run(plain, x, True))
    assert len(convert(net, "tqt", x).layers) > 0  # and once more


@pytest.mark.parametrize("state", ["fresh", "used"])
@pytest.mark.parametrize("place", range(len(NETS)), ids=NETS)
def test_copies(place: int, state: str) -> None:
    """Copied and pickled, before and after the first call: every pair occurs, half of them on every other network."""
    (net, x), before_first_call = build(NETS[place]), state == "fresh"
    way = "deepcopy" if before_first_call == bool(place % 2) else "pickle"
    convert(net, "tqt", None if before_first_call else x)
    twin = copy.deepcopy(net) if way == "deepcopy" else pickle.loads(pickle.dumps(net))
    if before_first_call:
        from lightning_lowbit.modules.calibrate import calibrate

        for each in (net, twin):
            calibrate(each, lambda each=each: (each(x), 1)[1])
    net.eval(), twin.eval()
    assert all(torch.equal(a, b) for a, b in zip(tensors(net(x)), tensors(twin(x)), strict=True))
    switches = {id(module.switch) for _, module in low_bit_modules(twin)}
    assert len(switches) == 1
    assert switches.isdisjoint({id(module.switch) for _, module in low_bit_modules(net)})
    with torch.no_grad():  # the copy computes with its own weights
        for parameter in net.parameters():
            parameter.zero_()
    assert any(output.any() for output in tensors(twin(x)))

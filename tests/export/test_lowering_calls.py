"""Lowering beside what users do around it: threads, hooks, names of arguments, float functions that are shifts."""

from __future__ import annotations

import threading
from collections.abc import Callable

import numpy as np
import pytest
import torch
from export.layered import Net
from torch import Tensor, nn

from lightning_lowbit import convert, lower, verify
from lightning_lowbit.errors import ConfigError, UnsupportedModelError
from lightning_lowbit.modules.carrier import Carrier


def two(between: Callable[[Tensor], Tensor], scheme: str = "tqt") -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    layers = {"a": nn.Conv2d(3, 4, 3), "n": nn.BatchNorm2d(4), "b": nn.Conv2d(4, 2, 3)}
    net = Net(lambda m, x: m.b(between(torch.relu(m.n(m.a(x))))), **layers)
    x = torch.randn(8, 3, 8, 8)
    convert(net.eval(), scheme, x)
    return net, x


@pytest.mark.parametrize(
    ("between", "widest"),
    [
        (lambda x: x * 0.5, ["requantize", "requantize"]),
        (lambda x: x * 2, ["requantize", "requantize"]),
        (lambda x: x + 0.5, ["requantize", "normalize", "requantize"]),
    ],
    ids=["half", "twice", "offset"],
)
def test_float_functions_that_are_shifts_and_clips(between: Callable[[Tensor], Tensor], widest: list[str]) -> None:
    net, x = two(between)
    program = lower(net, x)
    kinds = [op.kind for op in program.ops]
    assert kinds[2:-2] == widest
    assert max(value.bits for value in program.values.values()) < 32
    assert np.array_equal(program.run(x), net(x).detach().numpy())


@pytest.mark.parametrize("scheme", ["niti", "tqt"])
def test_threads_that_lower_do_not_see_each_other(scheme: str) -> None:
    plain, wrong = Carrier.plain, []
    nets = [two(lambda x: x, scheme) for _ in range(3)]

    def work(net: nn.Module, x: Tensor) -> None:
        try:
            for _ in range(3):
                if not np.array_equal(lower(net, x).run(x), net(x).detach().numpy()):
                    wrong.append("other numbers")
        except Exception as error:  # a thread's error would be lost
            wrong.append(repr(error))

    threads = [threading.Thread(target=work, args=pair) for pair in nets]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert Carrier.plain is plain


def test_a_hook_between_merged_modules_is_refused() -> None:
    net, x = two(lambda x: x, "jacinto")
    net.a.register_forward_hook(lambda module, args, output: output * 2)
    with pytest.raises(UnsupportedModelError, match="a: a forward_hook of yours"):
        lower(net, x)


def test_a_pool_called_by_the_name_of_torch() -> None:
    pool = nn.MaxPool2d(2)
    net, x = two(lambda x: pool(input=x))
    assert np.array_equal(lower(net, x).run(x), net(x).detach().numpy())


def test_code_that_was_not_followed_is_named_with_its_islands() -> None:
    def halved(x: Tensor) -> Tensor:
        if x.shape[-1] > 4:
            x = x[..., ::2]
        return x

    net, x = two(halved)
    program = lower(net, x)  # which decides by a size: nothing to warn of
    (said,) = program.note["not_followed"]
    assert said.startswith("Net (test_lowering_calls.py:")
    lines = str(program.summary()).splitlines()
    assert lines[0].startswith("float island: n")
    assert f"not followed: {said}" in lines
    assert "not_followed" not in lower(net.a, x).note
    assert "not_followed" not in lower(*two(lambda x: x)).note


def test_wrong_arguments_of_verify_are_named() -> None:
    net, x = two(lambda x: x)
    program = lower(net, x)
    with pytest.raises(ConfigError, match=r"verify: got a Net and a str, expected verify\(module, program, batches\)"):
        verify(net, "net.lowbit", [x])  # type: ignore[arg-type]  # that is the test
    with pytest.raises(ConfigError, match="got tolerance=-1"):
        verify(net, program, [x], tolerance=-1)

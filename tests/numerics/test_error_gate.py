"""Gates: the value passes, the summed gradient is quantized, and what is not finite is counted."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from lightning_lowbit.errors import ConfigError
from lightning_lowbit.numerics.error_gate import flag_gate, shift_gate
from lightning_lowbit.numerics.flag import flag_quantize
from lightning_lowbit.numerics.shift import shift_quantize

G = torch.randn(7, 9, generator=torch.Generator().manual_seed(2)) * 3e-3


def through(gate: object, g: Tensor, **options: object) -> Tensor:
    x = torch.randn(g.shape, generator=torch.Generator().manual_seed(0), dtype=g.dtype).requires_grad_()
    y = gate(x, **options)  # type: ignore[operator]  # either gate
    assert torch.equal(y, x)
    return torch.autograd.grad(y, x, g)[0]


@pytest.mark.parametrize("bits", [2, 8, 16])
def test_gates_quantize_what_flows_back(bits: int) -> None:
    assert torch.equal(through(flag_gate, G, bits=bits), flag_quantize(G, bits)[0])
    for clip_to_one in (False, True):
        expected = shift_quantize(G, bits, clip_to_one=clip_to_one)[0]
        assert torch.equal(through(shift_gate, G, bits=bits, clip_to_one=clip_to_one), expected)


def test_a_gate_sees_the_sum_over_its_consumers() -> None:
    x = torch.zeros(G.shape, requires_grad=True)
    y = flag_gate(x)
    (y * G + (y * G.flip(0)).sin()).sum().backward()
    assert torch.equal(x.grad, flag_quantize(G + G.flip(0))[0])


def test_half_precision_gradients_keep_their_type() -> None:
    got = through(shift_gate, G.bfloat16())
    assert got.dtype == torch.bfloat16
    assert torch.equal(got.float(), shift_quantize(G.bfloat16())[0])


def test_gradients_that_are_not_finite_pass_and_are_counted() -> None:
    count = torch.zeros((), dtype=torch.int32)
    bad = G.index_fill(1, torch.tensor([3]), math.inf)
    for gate in (shift_gate, flag_gate):
        assert torch.equal(through(gate, bad, nonfinite=count), bad)
        through(gate, G, nonfinite=count)
    assert int(count) == 2


def test_two_gates_of_one_graph_share_a_count() -> None:
    count = torch.zeros((), dtype=torch.int32)
    x = torch.ones(3, requires_grad=True)
    flag_gate(shift_gate(x, nonfinite=count) * 2, nonfinite=count).backward(torch.tensor([1.0, math.nan, 1.0]))
    assert int(count) == 2


def test_bits_are_checked_in_forward() -> None:
    for gate in (shift_gate, flag_gate):
        with pytest.raises(ConfigError, match="bits=1"):
            gate(torch.ones(2), 1)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:The .grad attribute:UserWarning")
def test_whole_graphs_equal_eager_and_count() -> None:
    def net(x: Tensor, count: Tensor) -> Tensor:
        return flag_gate(shift_gate(x, nonfinite=count) * 2, nonfinite=count)

    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    for g, expected in ((G, 0), (G.index_fill(0, torch.tensor([1]), math.nan), 2)):
        out = []
        for function in (net, compiled):
            x, count = torch.zeros(G.shape, requires_grad=True), torch.zeros((), dtype=torch.int32)
            function(x, count).backward(g)
            assert int(count) == expected
            out.append(x.grad.nan_to_num(9.0))
        assert torch.equal(out[0], out[1])

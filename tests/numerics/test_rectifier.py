"""The rectifier of compiled graphs: torch's values and gradients, and no mask kept."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lightning_lowbit.numerics.rectifier import rectify

# torch 2.13's compiler itself uses what torch has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:The .grad attribute:UserWarning")

X = torch.tensor([-2.0, -0.0, 0.0, 1e-30, 3.0, float("inf"), float("nan")])


def run(function: object, x: Tensor) -> tuple[Tensor, Tensor]:
    x = x.clone().requires_grad_()
    y = function(x)  # type: ignore[operator]  # a function
    (gradient,) = torch.autograd.grad(y, x, torch.arange(1.0, 1 + x.numel()).reshape(x.shape))
    return y.detach(), gradient


@pytest.mark.parametrize("backend", [None, "aot_eager"], ids=["eager", "compiled"])
def test_it_is_torch_s_rectifier(backend: str | None) -> None:
    function = rectify if backend is None else torch.compile(rectify, backend=backend, fullgraph=True)
    for got, want in zip(run(function, X), run(torch.relu, X), strict=True):
        assert torch.equal(got.nan_to_num(7.0), want.nan_to_num(7.0))


def test_a_compiled_one_keeps_no_mask() -> None:
    kept: list[torch.dtype] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor.dtype)
        return tensor

    x = torch.randn(4, 5, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        torch.compile(rectify, backend="aot_eager_decomp_partition", fullgraph=True)(x * 2)
    assert torch.bool not in kept

"""A whole training step against the formulas written out, bit for bit; and what leaves its grid is found out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from schemes.jacinto_nets import off
from schemes.wageubn_nets import (
    Twin,
    Wired,
    converted,
    draws,
    images,
    norms,
    on_grid,
    residual,
    rule,
    sgd,
    step,
    weights,
    widths,
)
from torch import Tensor, nn

from lightning_lowbit.errors import InvariantError
from lightning_lowbit.modules import error_gate, fixed_norm, plane_layers, stored
from lightning_lowbit.modules import widths as widths_module
from lightning_lowbit.modules.base import switch_of
from lightning_lowbit.modules.error_gate import ErrorGate
from lightning_lowbit.modules.stored import StoredWeight
from lightning_lowbit.schemes import wageubn_training

LR, MOMENTUM, DECAY = 0.3, 0.3, 0.02  # none of the first two is on its grid


def made(**options: Any) -> Any:
    """The residual network; some of its weights stand at the end of their range."""
    net = residual()
    with torch.no_grad():
        net.conv2.weight.view(-1)[:8] = torch.tensor([1.0, -1.0] * 4) * 126.99 / 128
    return converted(net, **{"check": True, **options})


def watched(net: Any) -> dict[str, Tensor]:
    """What arrives behind and, backward, before every module."""
    found: dict[str, Tensor] = {}
    for name, module in net.named_children():

        def note(module: Any, args: Any, y: Tensor, name: str = name) -> None:
            found[name] = y.detach().clone()
            if y.requires_grad:
                y.register_hook(lambda g: found.__setitem__(f"d {name}", g.clone()))

        module.register_forward_hook(note)
    return found


def differing(net: Any, steps: int = 3, twin: Twin | None = None) -> set[str]:
    """Names of tensors whose bits are not those of the formulas in ``steps`` training steps."""
    switch_of(net).run.injected = draws
    twin, seen, optimizer = twin or Twin(net), watched(net), sgd(net, LR, MOMENTUM, DECAY)
    found = set()
    for name, p in net.named_parameters():
        p.register_post_accumulate_grad_hook(lambda p, name=name: seen.__setitem__(f"grad {name}", p.grad.clone()))
    for number in range(steps):
        x, error = images(seed=50 + number), images(8, 4, 3, 3, seed=70 + number) * 0.1
        twin.run(x, error)
        step(net, optimizer, x, lambda y, error=error: (y * error).sum())
        twin.update(LR, MOMENTUM, DECAY)
        seen |= {name: p.detach() for name, p in net.named_parameters()} | dict(net.named_buffers())
        seen |= {f"acc {name}": acc * 2.0**-12 for name, acc in rule(net).accumulators.items()}
        for name, want in twin.seen.items():
            got = seen.get(name, torch.tensor(torch.nan)).double()
            same = got == want
            if name.startswith("bn"):  # of |y| >= 4 float32 keeps all bits but the last
                same |= (want.abs() >= 4) & ((got - want).abs() <= 2.0**-21)
            if not bool(same.all()):
                found.add(name)
    return found


# -- the step is the formulas -------------------------------------------------------------------------------
@pytest.mark.parametrize("weight_range", ["one", "fit", "room"])
@pytest.mark.parametrize("backend", ["int8", "simulate", "reference"])
def test_every_tensor_of_a_training_step_has_the_bits_of_the_formulas(weight_range: str, backend: str) -> None:
    net = made(weight_range=weight_range, backend=backend)
    twin = Twin(net)
    assert differing(net, twin=twin) == set()
    names = twin.seen.keys()
    parameters = {name for name, _ in net.named_parameters()}
    modules = {"conv1", "bn1", "relu1", "conv2", "bn2", "relu2", "conv3", "pool"}
    assert names >= modules | parameters | {f"grad {n}" for n in parameters} | {f"acc {n}" for n in parameters}
    assert names >= {f"d {name}" for name in modules - {"pool"}} | {"bn1.running_mean", "bn2.running_var"}


def test_a_range_that_is_no_one_counts_the_same_numbers() -> None:
    """Powers of the three layers differ, so that units that are mixed up would show."""
    net = residual()
    with torch.no_grad():
        net.conv1.weight.mul_(0.1)
        net.conv2.weight.mul_(5.0)
        net.conv2.bias.mul_(5.0)
    net = converted(net, weight_range="fit", check=True)
    assert len({q.power for q in weights(net).values()}) == 3
    assert differing(net) == set()


def test_what_is_stored_lies_on_its_grid() -> None:
    net = made(weight_range="one")
    switch_of(net).run.injected = draws
    seen, optimizer = watched(net), sgd(net, LR, MOMENTUM, DECAY)
    step(net, optimizer, images(seed=0), lambda y: y.square().sum())
    formats = {path: quantizer.format for path, quantizer in widths(net).items()}
    step(net, optimizer, images(seed=1), lambda y: y.square().sum())
    for path, format in formats.items():
        if path.endswith("lowbit_output"):
            low, high = format.limits
            assert on_grid(seen[path.split(".")[0]], format.fraction, high, low)
    held = rule(net)
    for name, p in net.named_parameters():
        layer = name in ("conv1.weight", "conv2.weight", "conv3.weight")
        assert on_grid(p, 23, 2**23 - 2**16 if layer else 2.0**30)
        assert held.accumulators[name].dtype == (torch.int16 if layer else torch.int32)
        assert torch.equal((held.masters[name].double() * 2.0**-23).float(), p)
    for name, buffer in net.named_buffers():
        assert not name.endswith(("running_mean", "running_var")) or on_grid(buffer, 15)
    assert all(on_grid(q.quantize(m.weight), 7, 127) for m, q in ((q.layer, q) for q in weights(net).values()))
    assert all(on_grid(net.get_submodule(path)(images(2, 6, 4, 4)), 22) for path in norms(net))


# -- what leaves its grid -----------------------------------------------------------------------------------
WIDER: dict[str, tuple[dict[str, Any], str]] = {
    "W": ({"weight_bits": 9}, "conv1"),
    "A": ({"act_bits": 9}, "relu1"),
    "unit of A": ({"act_format": "fixed_unit"}, "relu1"),
    "E1": ({"e1": "shift9"}, "d bn2"),
    "E1 off": ({"e1": "off"}, "d bn2"),
    "E2": ({"e2": "flag9"}, "grad conv3.weight"),
    "E2 one unit": ({"e2": "shift8"}, "grad conv3.weight"),
    "E2 off": ({"e2": "off"}, "grad conv3.weight"),
    "mean": ({"mean_bits": 32}, "bn1"),
    "deviation": ({"deviation_bits": 32}, "bn1"),
    "xhat": ({"xhat_bits": 32}, "bn1"),
    "gamma": ({"gamma_bits": 32}, "bn1"),
    "beta": ({"beta_bits": 32}, "bn1"),
    "running": ({"running_bits": 32}, "bn1.running_mean"),
    "bias": ({"bias_bits": 15}, "conv2"),
    "G": ({"rounding": "nearest"}, "conv1.weight"),
    "dr": ({"dr": 64}, "conv1.weight"),
    "gradient": ({"gradient_bits": 16, "exact": False}, "bn1.weight"),
    "accumulator": ({"accumulator_bits": 14, "exact": False}, "acc conv1.weight"),
    "lr": ({"lr_bits": 12, "exact": False}, "conv1.weight"),
    "momentum": ({"momentum_bits": 6, "exact": False}, "conv1.weight"),
    "stored": ({"stored_bits": 25, "exact": False}, "conv1.weight"),
    "clip_stored": ({"clip_stored": False}, "conv2.weight"),
    "io": ({"io": "none"}, "pool"),
    "norms": ({"norms": False}, "bn1.weight"),
}  # fmt: skip


@pytest.mark.parametrize("which", WIDER)
def test_another_grid_shows_in_the_tensor_that_lies_on_it(which: str) -> None:
    options, tensor = WIDER[which]
    net = made(weight_range="one")
    other = made(weight_range="one", **options)
    assert tensor in differing(other, twin=Twin(net))


def as_is(x: Tensor, *args: Any, **options: Any) -> Tensor:
    return x


def doubled(gradient: Tensor, draws: Any, *, dr: int) -> Any:
    codes, finite = CODES(gradient, draws, dr=dr)
    return codes * 2, finite


CODES = wageubn_training.constant_codes
RAISES: dict[str, tuple[Any, str, Callable[..., Any]]] = {
    "A": (widths_module, "fixed_width_values", as_is),
    "E1": (error_gate, "shift_quantize", lambda g, *a, **o: (g, torch.tensor(True))),
    "bias": (stored, "direct_quantize", as_is),
    "norm": (fixed_norm, "batch_norm", lambda x, *a, **o: (x / 3, x.mean((0, 2, 3)), x.var((0, 2, 3)))),
    "sums": (plane_layers, "together", lambda sums, *a: sums[0][0] / 3.0),
    "gradient": (wageubn_training, "constant_codes", doubled),
}  # fmt: skip


@pytest.mark.parametrize("which", RAISES)
def test_a_quantizer_that_does_nothing_is_found_by_the_check(which: str, monkeypatch: pytest.MonkeyPatch) -> None:
    net, unchecked = made(), made(check=False)
    monkeypatch.setattr(*RAISES[which])
    with pytest.raises(InvariantError):
        step(net, sgd(net, LR), images(seed=5), lambda y: y.square().sum())
    step(unchecked, sgd(unchecked, LR), images(seed=5), lambda y: y.square().sum())


@pytest.mark.parametrize(
    ("kind", "tensor"), [("running", "bn1.running_var"), ("lr", "bn1.bias"), ("recover", "bn1.weight")]
)
def test_a_rounding_that_is_left_out_shows(kind: str, tensor: str, monkeypatch: pytest.MonkeyPatch) -> None:
    net = made()
    down: dict[str, tuple[Any, str, Any]] = {
        "running": (fixed_norm, "running_update", lambda r, v, decay, *a: r.mul_(decay).add_(v * (1 - decay))),
        "lr": (wageubn_training, "learning_rate_code", lambda lr, format: int(lr * 512)),
        "recover": (
            wageubn_training, "recover", lambda w, format, clip: (w * 2.0**23).floor().clamp(-(2**30), 2**30).int(),
        ),
    }  # fmt: skip
    monkeypatch.setattr(*down[kind])
    assert tensor in differing(net)


def test_products_in_floats_multiply_numbers_on_grids_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers without an integer kernel, here all of them: sums of floats, exact forward, near to it backward."""
    monkeypatch.setattr(plane_layers, "multiplies_integers", lambda layer: False)
    forward = {"conv1", "bn1", "relu1", "conv2", "bn2", "relu2", "conv3", "pool"}
    net = made()
    twin = Twin(net)
    assert differing(net, 1, twin) & forward == set()
    found = {name: p.detach().double() for name, p in net.named_parameters()}
    assert all(off(found[name], want) < 1e-4 for name, want in twin.p.items())
    monkeypatch.setattr(ErrorGate, "values", lambda self, g, run, *more: g)
    assert "grad conv3.bias" in differing(made(), 1)
    monkeypatch.setattr(StoredWeight, "quantize", lambda self, x, rectify=False: x)
    assert "conv1" in differing(made(), 1)


# -- sums and other results ---------------------------------------------------------------------------------
def before(io: str) -> Any:
    """A pre-activation block: what is added goes to a norm as it is."""
    torch.manual_seed(0)

    def forward(net: Any, x: Tensor) -> Tensor:
        y: Tensor = net.conv1(x)
        z = torch.relu(net.bn1(y))
        y = y + net.conv2(z)
        result: Tensor = net.conv3(torch.relu(net.bn2(y)))
        return result

    net = Wired(
        forward, conv1=nn.Conv2d(3, 6, 3, padding=1), bn1=nn.BatchNorm2d(6), conv2=nn.Conv2d(6, 6, 3, padding=1),
        bn2=nn.BatchNorm2d(6), conv3=nn.Conv2d(6, 4, 3),
    )  # fmt: skip
    return converted(net, io=io, check=True)


@pytest.mark.parametrize("io", ["none", "outputs", "strict"])
def test_a_residual_sum_is_quantized_where_results_are(io: str) -> None:
    net = before(io)
    seen = watched(net)
    with torch.no_grad():
        net(images(seed=3))
    (add,) = (name for name, _ in net.named_children() if "add" in name)
    found = {path.split(".")[0] for path in widths(net)}
    assert (add in found) == (io != "none")
    for path, quantizer in widths(net).items():
        if path.endswith("lowbit_output"):
            low, high = quantizer.format.limits
            assert on_grid(seen[path.split(".")[0]], quantizer.format.fraction, high, low)
    relus = {name for name in found if "relu" in name}
    assert len(relus) == 2
    layers = {"conv1", "conv2", "conv3"}
    assert found >= (relus | layers if io == "strict" else relus)
    assert io == "strict" or found - relus - {add} == {"conv1"}  # its input

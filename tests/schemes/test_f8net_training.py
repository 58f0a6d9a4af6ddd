"""What moves fractional lengths and clips, when, and what must not: F8Net in training and in a Trainer."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from launch import run_script
from schemes.conformance import Net, copy_of, differing, trainer
from schemes.conformance import images as small_images
from schemes.conformance import loader as small_loader
from schemes.conformance import net as small_net
from schemes.f8net_nets import (
    converted,
    distance,
    fraclens,
    images,
    inputs,
    labels,
    outputs,
    reach,
    train,
)
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset

from lightning_lowbit import F8Net, QuantCallback, convert, lowbit_step
from lightning_lowbit.callbacks.calibrate import Calibrate
from lightning_lowbit.modules.base import float_mode

SCRIPT = Path(__file__).with_name("f8net_ranks.py")


def still(scheme: F8Net | None = None, **options: Any) -> QuantCallback:
    return QuantCallback(scheme or F8Net(**options), start=0)


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return differing(a, b) == []


# -- what the statistics do by themselves --------------------------------------------------------------------
@pytest.mark.parametrize("select", ["rms", "std", "mae", "grid", "histogram"])
@pytest.mark.parametrize("ties", ["shared", "realign"])
@pytest.mark.parametrize("network", ["resnet", "mobilenet_v2"])
def test_fraclens_alone_do_not_undo_a_float_network(network: str, ties: str, select: str) -> None:
    """Weights, norms and clips stand still for 60 steps: a fraclen that is its own cause would run away."""
    net = reach(converted(network, ties=ties, select=select, alpha_lr=0.0), "freeze_batch_norm")
    want = outputs(net)
    for quantizer in inputs(net).values():
        assert 0 <= float(quantizer.rounded()) <= 8
    before = {path: float(q.rounded()) for path, q in inputs(net).items()}
    train(net.train(), steps=60, lr=0.0)
    after = {path: float(q.rounded()) for path, q in inputs(net).items()}
    # The closed forms are for Gaussians: of means, mae asks for two bits less than the least error does.
    assert {path: (before[path], after[path]) for path in before if abs(after[path] - before[path]) > 2} == {}
    assert distance(outputs(net), want) < 0.08


def test_the_average_follows_the_momentum() -> None:
    net = converted("resnet", momentum=0.25)
    quantizer = inputs(net)["conv1"]
    quantizer.fraclen.fill_(2.0)
    want = 2.0
    for _ in range(3):
        train(net.train(), 1, lr=0.0)
        want = 0.75 * want + 0.25 * 5.0  # of a unit Gaussian, signed: 40 / 2^5 > 1
        assert float(quantizer.fraclen) == pytest.approx(want, rel=1e-6)


def test_a_training_batch_is_quantized_with_its_own_fraclen_until_it_is_frozen() -> None:
    net = converted("resnet").train()
    quantizer, x = inputs(net)["conv1"], images(3, gain=8.0)
    assert float(quantizer.rounded()) == 5.0
    assert torch.equal(quantizer(x), (x * 4).round().clamp(-127, 127) / 4)
    reach(net, "freeze_fraclen")
    assert torch.equal(quantizer(x), (x * 32).round().clamp(-127, 127) / 32)
    assert torch.equal(quantizer.eval()(x), quantizer.train()(x))


def test_autocast_does_not_reach_an_evaluation_by_hand() -> None:
    net = converted("resnet").eval()
    want = outputs(net)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(net(images()), want)


@pytest.mark.parametrize("where", ["evaluation", "no_grad", "frozen", "float"])
def test_fraclens_stand_still_outside_training(where: str) -> None:
    net = converted("resnet").train()
    before = copy_of(net)
    if where == "frozen":
        reach(net, "freeze_fraclen", "freeze_batch_norm")
        before = copy_of(net)
    with torch.set_grad_enabled(where != "no_grad"):
        if where == "float":
            with float_mode(net):
                net(images(3, gain=8.0))
        else:
            (net.eval() if where == "evaluation" else net)(images(3, gain=8.0))
    lowbit_step(net.train(), torch.optim.SGD(net.parameters(), lr=0.1))
    held = {key: value for key, value in copy_of(net).items() if "fraclen" in key}
    assert held
    assert all(torch.equal(value, before[key]) for key, value in held.items())


@pytest.mark.parametrize("stage", ["sanity", "validation", "validate", "test", "predict"])
def test_no_evaluation_moves_a_fraclen(stage: str) -> None:
    class Watched(Net):
        held: dict[str, Tensor]

        def test_step(self, batch: Any, batch_idx: int) -> None:
            self(batch[0])

        def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
            return self(batch[0])  # type: ignore[no-any-return]  # a module's call is not typed

        def on_validation_start(self) -> None:
            self.held = fraclens(self) if hasattr(self, "trainer") else {}

        def on_validation_end(self) -> None:
            assert self.held
            assert equal(self.held, fraclens(self))

    torch.manual_seed(0)
    module = Watched()
    module.load_state_dict(small_net().state_dict())
    sanity = 2 if stage == "sanity" else 0
    run = trainer(still(), num_sanity_val_steps=sanity)
    run.fit(module, small_loader(), small_loader(gain=8.0))
    before = fraclens(module)
    if stage in ("validate", "test", "predict"):
        getattr(trainer(still()), stage)(module, small_loader(gain=8.0))
    assert equal(before, fraclens(module))


# -- once a step ---------------------------------------------------------------------------------------------
def pooled(module: Net, accumulate: int, batch: int, **options: Any) -> dict[str, Tensor]:
    """Fraclens behind one epoch without learning, norms on moving statistics."""
    data = DataLoader(TensorDataset(small_images(3, 16), torch.arange(16) % 3), batch_size=batch)
    scheme = F8Net(freeze_batch_norm=0, freeze_fraclen=None, alpha_lr=0.0, momentum=0.5, **options)
    run = trainer(still(scheme), max_epochs=1, accumulate_grad_batches=accumulate)
    module.configure_optimizers = lambda: torch.optim.SGD(module.parameters(), lr=0.0)  # type: ignore[method-assign]
    module.drop.p = 0.0
    run.fit(module, data, small_loader())
    assert run.global_step == 2
    return fraclens(module)


@pytest.mark.parametrize("select", ["rms", "std", "grid"])
def test_accumulated_batches_teach_what_one_big_batch_teaches(select: str) -> None:
    big, small = pooled(small_net(), 1, 8, select=select), pooled(small_net(), 4, 2, select=select)
    assert all(torch.equal(big[path], small[path]) for path in big)
    assert any(float(value) % 1 for value in big.values())  # they moved


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "plain"])
def test_recomputation_is_not_counted(reentrant: bool) -> None:
    class Saving(nn.Module):
        def __init__(self, net: nn.Module, saves: bool) -> None:
            super().__init__()
            self.net, self.saves = net, saves

        def forward(self, x: Tensor) -> Tensor:
            net: Any = self.net
            x = net.maxpool(torch.relu(net.bn1(net.conv1(x))))
            x = checkpoint(net.layer1, x, use_reentrant=reentrant) if self.saves else net.layer1(x)
            y: Tensor = net.fc(net.avgpool(net.layer2(x)).flatten(1))
            return y

    results = []
    for saves in (False, True):
        net = converted("resnet", momentum=0.5)
        train_saving = Saving(net, saves)
        optimizer = torch.optim.SGD(net.parameters(), lr=0.02)
        for step in range(3):
            optimizer.zero_grad()
            F.cross_entropy(train_saving.train()(images(step, gain=1.5)), labels(step)).backward()  # type: ignore[no-untyped-call]  # torch does not type it
            lowbit_step(net, optimizer)
        results.append(copy_of(net))
    ignored = "num_batches_tracked", "running_"  # torch's own norms count recomputation too
    left = [key for key in differing(*results) if not key.endswith(ignored) and not any(i in key for i in ignored)]
    assert [key for key in left if "fraclen" in key] == []


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("f8net_ranks")
    run_script(SCRIPT, folder)
    return [torch.load(folder / f"{rank}.pt") for rank in (0, 1)]


def test_two_processes_hold_one_set_of_fraclens_and_clips(ranks: list[dict[str, Any]]) -> None:
    first, second = (result["trained"] for result in ranks)
    keys = [key for key in first if "lowbit" in key]
    assert any(key.endswith("alpha") for key in keys)
    assert [key for key in keys if not torch.equal(first[key], second[key])] == []
    moved = [key for key in keys if not torch.equal(first[key], ranks[0]["before"][key])]
    assert any(key.endswith("alpha") for key in moved)
    assert any(key.endswith("fraclen") for key in moved)


def test_two_processes_learn_what_one_learns_from_both_their_batches(ranks: list[dict[str, Any]]) -> None:
    """One process fed the batches of both, two to a step; rank 0's alone would teach something else."""
    both, one = ranks[0]["both"], ranks[0]["alone"]
    together = ranks[0]["pooled"]
    assert [key for key in together if not torch.equal(together[key], both[key])] == []
    assert [key for key in together if not torch.equal(together[key], one[key])] != []


# -- what there is nothing to learn from ---------------------------------------------------------------------
@contextmanager
def recorded() -> Iterator[list[str]]:
    said: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield said
        said += [str(w.message) for w in caught if "fraclen keeps" in str(w.message)]


class Fed(nn.Module):
    """Two layers, of which tests spoil what either reads."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.a(x))
        y: Tensor = self.b(x)
        return y


BAD = {
    "zero": torch.zeros(8, 4),
    "nan": torch.full((8, 4), math.nan),
    "inf": torch.full((8, 4), math.inf),
    "one_nan": torch.tensor([[math.nan, 1.0, 1.0, 1.0]] * 8),
    "empty": torch.zeros(0, 4),
}


@pytest.mark.parametrize("select", ["rms", "std", "mae", "grid", "histogram"])
@pytest.mark.parametrize("bad", BAD.values(), ids=list(BAD))
def test_a_batch_without_anything_to_learn_leaves_the_average_and_is_told_once(bad: Tensor, select: str) -> None:
    torch.manual_seed(0)
    net = Fed()
    convert(net, "f8net", torch.randn(8, 4), select=select)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.0)
    before = fraclens(net)["a"]
    with recorded() as said:
        for _ in range(3):
            net.train()(bad)  # without backward: a NaN gradient is another matter
            lowbit_step(net, optimizer)
            assert torch.equal(fraclens(net)["a"], before)
    assert [text.split(":")[0] for text in said if text.startswith("a.")] == ["a.lowbit_input"]
    assert all(bool(torch.isfinite(value).all()) for value in fraclens(net).values())
    net.train()(torch.randn(8, 4) * 64)
    lowbit_step(net, optimizer)
    assert not torch.equal(fraclens(net)["a"], before)


@pytest.mark.parametrize("select", ["rms", "std", "mae", "grid", "histogram"])
def test_a_dead_rectifier_leaves_its_reader_as_it_is(select: str) -> None:
    torch.manual_seed(0)
    net = Fed()
    convert(net, "f8net", torch.randn(8, 4), select=select)
    before = fraclens(net)["b"]
    with torch.no_grad():
        net.a.bias.fill_(-100.0)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    with recorded() as said:
        for _ in range(3):
            net.train()(torch.randn(8, 4)).square().mean().backward()
            lowbit_step(net, optimizer)
    assert [text.split(":")[0] for text in said] == ["b.lowbit_input"]
    assert "dead" in said[0]
    assert torch.equal(fraclens(net)["b"], before)
    assert bool(torch.isfinite(net.eval()(torch.randn(8, 4))).all())


@pytest.mark.parametrize("select", ["rms", "std", "mae", "grid", "histogram"])
def test_a_constant_tensor_is_not_cut_off(select: str) -> None:
    """Its spread is 0, which asks for all bits behind the point."""
    torch.manual_seed(0)
    net = Fed()
    convert(net, "f8net", torch.randn(8, 4), select=select, momentum=1.0)
    x = torch.full((8, 4), 3.0)
    net.train()(x)
    lowbit_step(net, torch.optim.SGD(net.parameters(), lr=0.0))
    quantizer = inputs(net)["a"].eval()
    assert distance(quantizer(x), x) < 0.5
    if select != "std":
        assert distance(quantizer(x), x) < 0.02


def test_an_infinite_batch_in_a_run_leaves_clips_and_fraclens_finite() -> None:
    module = small_net()
    data: Any = [(small_images(n, 4) * (math.inf if n == 2 else 1.0), torch.arange(4) % 3) for n in range(6)]
    module.configure_optimizers = lambda: torch.optim.SGD(module.parameters(), lr=0.0)  # type: ignore[method-assign]
    calibrate = Calibrate(DataLoader(TensorDataset(small_images(9), torch.arange(16) % 3), batch_size=4))
    with recorded():
        trainer(still(freeze_fraclen=None, freeze_batch_norm=None), calibrate, max_epochs=1).fit(
            module,
            DataLoader(data, batch_size=None),
            small_loader(),
        )
    held = {k: v for k, v in copy_of(module).items() if k.endswith(("alpha", "fraclen"))}
    assert all(bool(torch.isfinite(value).all()) for value in held.values())

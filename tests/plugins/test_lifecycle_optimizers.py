"""Whose step moves what: user optimizers of every kind, and the thresholds' private one beside them."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from plugins.lifecycle_nets import (
    NAMESPACES,
    QUIET,
    Batch,
    assert_equal_states,
    loader,
    net_class,
    seeded_net,
    states,
    trainer,
)
from torch import Tensor, nn

from lightning_lowbit import QuantCallback, Tqt, lowbit_step
from lightning_lowbit.errors import ConfigError
from lightning_lowbit.modules.convert import quantizers

pytestmark = QUIET
# One moment for everything: thresholds train in every step after the first.
SCHEME = Tqt(freeze_batch_norm=None, freeze_thresholds=None, freeze_thresholds_end=0.99)


def thresholds(net: nn.Module, prefix: str = "") -> dict[str, float]:
    return {
        q.site.key: float(q.log2_t.detach())
        for _, q in quantizers(net)
        if getattr(q, "log2_t", None) is not None and q.site.key.startswith(prefix)
    }


class Manual(net_class()):  # type: ignore[misc]  # made at run time
    """Manual optimization; ``how`` says what steps."""

    def __init__(self, how: str = "wrapped") -> None:
        super().__init__()
        self.how = how
        self.automatic_optimization = False

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        optimizer = self.optimizers(use_pl_optimizer=self.how == "wrapped")
        optimizer.zero_grad()
        self.manual_backward(nn.functional.cross_entropy(self(batch[0]), batch[1]))
        optimizer.step()


def test_manual_optimization_equals_automatic(tmp_path: Path) -> None:
    torch.manual_seed(0)
    manual = Manual()
    torch.manual_seed(1)
    trainer(tmp_path, QuantCallback(start=0)).fit(manual, loader())
    automatic = seeded_net()
    torch.manual_seed(1)
    trainer(tmp_path, QuantCallback(start=0)).fit(automatic, loader())
    assert_equal_states(states(manual), states(automatic))


def test_a_raw_optimizer_step_leaves_thresholds_behind_and_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"body\.\S+: .*self\.optimizers\(\)") as caught:
        trainer(tmp_path, QuantCallback(SCHEME, start=0)).fit(Manual("raw"), loader())
    assert "lowbit_step" in str(caught.value)


def test_raw_steps_are_fine_before_quantization_and_where_no_threshold_trains(tmp_path: Path) -> None:
    trainer(tmp_path, QuantCallback(SCHEME, start="9 steps")).fit(Manual("raw"), loader())
    trainer(tmp_path, QuantCallback(Tqt(mode="retrain_wt"), start=0)).fit(Manual("raw"), loader())
    trainer(tmp_path, QuantCallback(Tqt(freeze_thresholds=0, freeze_thresholds_end=0), start=0), max_epochs=1).fit(
        seeded_net(), loader()
    )


class Gan(LightningModule):
    """Two networks, two optimizers; each batch steps the discriminator, then the generator."""

    def __init__(self, steps: tuple[str, ...] = ("discriminator", "generator")) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.steps = steps
        self.generator = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 36))
        self.discriminator = nn.Sequential(nn.Linear(36, 16), nn.ReLU(), nn.Linear(16, 1))
        self.moved: list[tuple[str, set[str]]] = []  # the thresholds that each step moved

    def loss(self, part: str, real: Tensor) -> Tensor:
        fake, softplus = self.generator(torch.randn(len(real), 4)), nn.functional.softplus
        if part == "generator":
            return softplus(-self.discriminator(fake)).mean()
        return softplus(-self.discriminator(real)).mean() + softplus(self.discriminator(fake.detach())).mean()

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        for part, optimizer in zip(("discriminator", "generator"), self.optimizers(), strict=True):
            if part in self.steps:
                before = thresholds(self)
                optimizer.zero_grad()
                self.manual_backward(self.loss(part, batch[0].flatten(1)))
                optimizer.step()
                if torch.is_grad_enabled():  # not in calibration
                    self.moved.append((part, {key for key, t in thresholds(self).items() if t != before[key]}))

    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD(net.parameters(), 0.05) for net in (self.discriminator, self.generator)]


def test_two_optimizers_each_step_their_own_thresholds(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = Gan()
    trainer(tmp_path, QuantCallback(SCHEME, start=0), max_epochs=1).fit(net, loader())
    assert [part for part, _ in net.moved] == ["discriminator", "generator"] * 6
    for part, moved in net.moved:
        assert moved, part
        assert {key.partition(".")[0] for key in moved} == {part}


def test_gradients_that_another_optimizers_step_finds_are_discarded(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = Gan(steps=("generator",))  # its loss goes through the discriminator
    trainer(tmp_path, QuantCallback(SCHEME, start=0), max_epochs=1).fit(net, loader())
    assert [part for part, _ in net.moved] == ["generator"] * 6
    assert {key.partition(".")[0] for _, moved in net.moved for key in moved} == {"generator"}
    assert all(q.log2_t.grad is None for _, q in quantizers(net) if getattr(q, "log2_t", None) is not None)


class Grouped(net_class()):  # type: ignore[misc]  # made at run time
    """minGPT's grouping: every parameter of the module must be in exactly one group."""

    def configure_optimizers(self) -> Any:
        decay, no_decay = set(), set()
        for module_name, module in self.named_modules():
            for name, _ in module.named_parameters(recurse=False):
                full = f"{module_name}.{name}" if module_name else name
                if name == "bias" or isinstance(module, nn.BatchNorm2d):
                    no_decay.add(full)
                elif name == "weight" and isinstance(module, (nn.Linear, nn.Conv2d)):
                    decay.add(full)
        every = dict(self.named_parameters())
        assert not decay & no_decay
        assert set(every) == decay | no_decay, f"not separated: {set(every) - (decay | no_decay)}"
        return torch.optim.AdamW(
            [
                {"params": [every[name] for name in sorted(decay)], "weight_decay": 0.1},
                {"params": [every[name] for name in sorted(no_decay)], "weight_decay": 0.0},
            ],
            lr=0.01,
        )


def test_parameter_groups_that_count_all_parameters(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = Grouped()
    run = trainer(tmp_path, QuantCallback(SCHEME, start=0))
    run.fit(net, loader())
    grouped = {id(p) for group in run.optimizers[0].param_groups for p in group["params"]}
    hidden = {id(q.log2_t) for _, q in quantizers(net) if getattr(q, "log2_t", None) is not None}
    assert hidden
    assert not grouped & hidden
    assert hidden <= {id(p) for p in net.parameters()}  # visible again
    names = [name for name, _ in net.named_parameters() if "log2_t" in name]
    assert names == [name for name in net.state_dict() if "log2_t" in name and name in dict(net.named_parameters())]


@pytest.mark.parametrize("kind", ["lambda", "one_cycle"])
def test_schedulers_of_the_user_see_the_steps_of_a_float_run(tmp_path: Path, kind: str) -> None:
    class Scheduled(net_class()):  # type: ignore[misc]  # made at run time
        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.SGD(self.parameters(), 0.05, momentum=0.9)
            if kind == "lambda":
                schedule: Any = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
            else:
                total = int(self.trainer.estimated_stepping_batches)
                schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=total)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    rates = []
    for callbacks in ([], [QuantCallback(SCHEME, start=0.3)]):
        torch.manual_seed(0)
        net, seen = Scheduled(), []
        net.on_train_batch_end = lambda *args, net=net, seen=seen: seen.append(net.optimizers().param_groups[0]["lr"])
        trainer(tmp_path, *callbacks).fit(net, loader())
        rates.append(seen)
    assert len(rates[0]) == 12
    assert rates[0] == rates[1]


def test_accumulation_steps_thresholds_once_per_optimizer_step(tmp_path: Path) -> None:
    callback = QuantCallback(SCHEME, start=0)
    net = seeded_net()
    trainer(tmp_path, callback, accumulate_grad_batches=3).fit(net, loader())
    assert callback.rule is not None
    assert callback.rule.state_dict()["count"].tolist() == [4, 4]
    assert callback.schedule is not None
    assert callback.schedule.run.total == 4


@pytest.mark.parametrize("algorithm", ["norm", "value"])
def test_clipping_leaves_thresholds_out(tmp_path: Path, algorithm: str) -> None:
    """Clipped to almost nothing weights stand still; thresholds move as ever and enter no norm."""
    found: list[float] = []

    class Watching(net_class()):  # type: ignore[misc]  # made at run time
        def configure_gradient_clipping(self, optimizer: Any, *args: Any, **kwargs: Any) -> None:
            clipped = {id(p) for group in optimizer.param_groups for p in group["params"]}
            hidden = [q.log2_t for _, q in quantizers(self) if getattr(q, "log2_t", None) is not None]
            assert not clipped & {id(t) for t in hidden}
            before = [t.grad.clone() for t in hidden if t.grad is not None]
            super().configure_gradient_clipping(optimizer, *args, **kwargs)
            after = [t.grad for t in hidden if t.grad is not None]
            assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
            found.append(float(sum(g.abs().sum() for g in before)))

    torch.manual_seed(0)
    net = Watching()
    trainer(
        tmp_path,
        QuantCallback(SCHEME, start=0),
        gradient_clip_val=1e-8,
        gradient_clip_algorithm=algorithm,
        max_epochs=1,
    ).fit(net, loader())
    assert len(found) == 6
    assert max(found) > 0
    plain = seeded_net()
    torch.testing.assert_close(net.body.conv1.weight, plain.body.conv1.weight, atol=1e-6, rtol=0)
    assert any(value % 1 != 0.5 for value in thresholds(net).values())


def test_lowbit_step_in_a_plain_loop_does_what_the_trainer_does(tmp_path: Path) -> None:
    scheme = Tqt(freeze_batch_norm=None, freeze_thresholds=None, threshold_schedule="constant")
    trained, copies = seeded_net(), []
    trained.body.dropout.p = 0.0  # a Trainer's loaders draw seeds between its masks
    trained.on_train_batch_start = lambda *args: copies or copies.append(copy.deepcopy(trained.body))
    trainer(tmp_path, QuantCallback(scheme, start=0)).fit(trained, loader())
    body = copies[0]
    optimizer = torch.optim.SGD([p for name, p in body.named_parameters() if "lowbit" not in name], 0.05, momentum=0.9)
    for x, y in [batch for _ in range(2) for batch in loader()]:

        def closure(x: Tensor = x, y: Tensor = y) -> Tensor:
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(body(x), y)
            loss.backward()
            return loss

        lowbit_step(body, optimizer, closure)
    assert_equal_states(states(trained.body), states(body))


@pytest.mark.parametrize("namespace", NAMESPACES)
def test_lbfgs_is_refused(tmp_path: Path, namespace: str) -> None:
    net = seeded_net(namespace)
    net.configure_optimizers = lambda: torch.optim.LBFGS(net.parameters())
    with pytest.raises(ConfigError, match="LBFGS"):
        trainer(tmp_path, QuantCallback(), namespace=namespace).fit(net, loader())

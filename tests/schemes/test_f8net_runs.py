"""F8Net's clips, and whole runs: precision, checkpoints, schedules."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from schemes.conformance import Net, SaveAt, copy_of, differing, trainer
from schemes.conformance import images as small_images
from schemes.conformance import loader as small_loader
from schemes.conformance import net as small_net
from schemes.f8net_nets import NETWORKS, alphas, converted, fraclens, images, inputs, labels, outputs, rule, train
from torch import Tensor, nn

from lightning_lowbit import F8Net, QuantCallback, convert, load_from_checkpoint, lowbit_step
from lightning_lowbit.modules.layers import LowBitLayer
from lightning_lowbit.schemes.f8net_training import momentum_at

SCRIPT = Path(__file__).with_name("f8net_ranks.py")


def still(scheme: F8Net | None = None, **options: Any) -> QuantCallback:
    return QuantCallback(scheme or F8Net(**options), start=0)


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return differing(a, b) == []


# -- clips ---------------------------------------------------------------------------------------------------
def test_a_clip_never_reaches_zero_and_keeps_its_sign() -> None:
    net = converted("resnet", alpha_lr=0.1).train()
    with torch.no_grad():
        for number, alpha in enumerate(alphas(net).values()):
            alpha.fill_(1e-6 if number % 2 else -1e-6)
    train(net, 1)
    assert all(abs(alpha.item()) >= 1e-3 - 1e-9 for alpha in alphas(net).values())
    assert bool(torch.isfinite(outputs(net)).all())


def test_clips_learn_and_go_with_the_user_s_learning_rate_unless_they_have_their_own() -> None:
    moved = {}
    for lr, own in ((0.0, None), (0.1, None), (0.1, 0.0), (0.0, 0.1)):
        net = converted("resnet", alpha_lr=own)
        before = [float(a.detach()) for a in alphas(net).values()]
        train(net.train(), 2, lr=lr)
        moved[lr, own] = before != [float(a.detach()) for a in alphas(net).values()]
    assert moved == {(0.0, None): False, (0.1, None): True, (0.1, 0.0): False, (0.0, 0.1): True}


@pytest.mark.parametrize("make", ["sgd", "adamw", "decay"])
def test_tiny_moves_statistics_alone_whatever_the_optimizer(make: str) -> None:
    class Eager(Net):
        def configure_optimizers(self) -> Any:
            if make == "adamw":
                return torch.optim.AdamW(self.parameters(), lr=0.1, weight_decay=0.5)
            return torch.optim.SGD(self.parameters(), lr=0.5, momentum=0.9, weight_decay=0.5 * (make == "decay"))

    module = Eager()
    module.load_state_dict(small_net().state_dict())
    before = copy_of(module)
    trainer(still(F8Net.tiny()), max_epochs=1).fit(module, small_loader(gain=2.0), small_loader())
    after = copy_of(module)
    assert {key for key in before if not key.startswith("bn") or key.endswith(("weight", "bias"))} - {
        key for key in before if torch.equal(before[key], after[key])
    } == set()
    assert all(not torch.equal(before[f"bn{n}.running_{what}"], after[f"bn{n}.running_{what}"])
               for n in (1, 2) for what in ("mean", "var"))  # fmt: skip
    assert not any(key.endswith("alpha") for key in after)
    assert any(float(value) % 1 for value in fraclens(module).values())


def test_statistics_alone_leave_clips_too() -> None:
    module = small_net()
    trainer(still(train="statistics"), max_epochs=1).fit(module, small_loader(), small_loader())
    held = [float(alpha.detach()) for alpha in alphas(module).values()]
    assert held
    assert all(math.frexp(value)[0] == 0.5 or math.isclose(math.log2(255 / value) % 1, 0) for value in held)


# -- a run ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("rescale", ["stddev", "constant", "none"])
def test_validation_measures_the_loss_that_training_lowers(rescale: Any) -> None:
    """The published evaluation has logits of another scale."""

    class Both(Net):
        pairs: list[tuple[float, float]]

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            evaluation = F.cross_entropy(self(batch[0]), batch[1])
            self.train()
            training = F.cross_entropy(self(batch[0]), batch[1])
            self.eval()
            self.pairs.append((evaluation.item(), training.item()))

    module = Both()
    module.load_state_dict(small_net().state_dict())
    module.drop.p, module.pairs = 0.0, []
    scheme = F8Net(rescale=rescale, freeze_fraclen="2 steps", freeze_batch_norm="3 steps", bias="float")
    callback = QuantCallback(scheme, start=0, evaluate=False)
    trainer(callback).fit(module, small_loader(), small_loader())
    assert len(module.pairs) >= 4
    assert all(evaluation == pytest.approx(training, rel=1e-4) for evaluation, training in module.pairs)


def test_mixed_precision_computes_layers_in_float32_and_evaluates_alike() -> None:
    module, seen = small_net(), []
    run = trainer(still(), precision="bf16-mixed", max_epochs=1)
    for layer in module.modules():
        if type(layer) in (nn.Conv2d, nn.Linear):
            layer.register_forward_hook(lambda m, args, y: seen.append((m.training, m.switch.quantizing, y.dtype)))
    # A hook of the user's leaves its class without a clip: the precision is what is looked at.
    run.fit(module, small_loader(), small_loader())
    low = {(training, dtype) for training, quantizing, dtype in seen if quantizing}
    assert {dtype for training, dtype in low if training} == {torch.float32}
    assert torch.bfloat16 not in {dtype for _, dtype in low}


def test_evaluation_does_not_depend_on_the_precision_of_the_trainer() -> None:
    module = small_net()
    trainer(still(), max_epochs=1).fit(module, small_loader(), small_loader())
    found = []
    for precision in ("bf16-mixed", "32-true"):
        other = copy.deepcopy(module)
        found.append(
            trainer(still(), precision=precision).validate(other, small_loader(), verbose=False)[0]["val_loss"]
        )
    assert found[0] == found[1]


def test_a_checkpoint_loads_with_equal_logits_and_tied_clips(tmp_path: Path) -> None:
    module = small_net()
    trainer(still(alpha_lr=0.1), SaveAt(tmp_path / "middle.ckpt", 8)).fit(module, small_loader(), small_loader())
    again = load_from_checkpoint(Net, tmp_path / "middle.ckpt").eval()
    assert torch.equal(again(small_images(1)), module.eval()(small_images(1)))
    tied = [q.alpha for path, q in inputs(again).items() if path in ("conv2", "conv3")]
    assert tied[0] is tied[1] is not None
    assert {id(a) for a in alphas(again).values()}.isdisjoint(id(a) for a in alphas(module).values())


def test_the_schedule_freezes_fraclens_before_norms() -> None:
    class Watch(pl.Callback):
        frozen: list[tuple[bool, bool]]

        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            layers = [m for m in pl_module.modules() if isinstance(m, LowBitLayer) and m.norm is not None]
            found = inputs(pl_module).values()
            assert len({q.frozen for q in found}) == len({m.norm_frozen for m in layers}) == 1
            self.frozen.append((next(iter(found)).frozen, layers[0].norm_frozen))

    watch = Watch()
    watch.frozen = []
    trainer(still(), watch).fit(small_net(), small_loader(), small_loader())
    assert watch.frozen == [(False, False)] * 4 + [(True, False)] * 2 + [(True, True)] * 2


def test_momentum_goes_geometrically_between_two_steps() -> None:
    assert momentum_at(5, 0, None, 0.1, None) == 0.1
    assert momentum_at(5, 0, 10, 0.1, None) == 0.1
    assert [momentum_at(s, 10, 20, 0.4, 0.1) for s in (0, 10, 15, 20, 99)] == pytest.approx([0.4, 0.4, 0.2, 0.1, 0.1])
    assert momentum_at(3, 3, 3, 0.5, 0.1) in (0.5, 0.1)


def test_a_rule_counts_flips() -> None:
    net = converted("resnet", momentum=1.0)
    assert sum(rule(net).flips.values()) == 0
    train(net.train(), 1, lr=0.0)
    counted = dict(rule(net).flips)
    inputs(net)["conv1"].fraclen.fill_(1.0)
    train(net, 1, lr=0.0)
    assert rule(net).flips["conv1.lowbit_input"] == counted["conv1.lowbit_input"] + 1


@pytest.mark.parametrize("network", NETWORKS)
def test_reference_options_train(network: str) -> None:
    net = train(converted(network, **{f: getattr(F8Net.reference(), f) for f in ("preset", "ties", "select")}).train())
    assert bool(torch.isfinite(outputs(net)).all())


def test_a_clip_goes_at_the_rate_of_the_group_that_holds_its_layer() -> None:
    """Fine-tuning with a still backbone: its clips stand still too."""
    module = converted("resnet")
    groups: dict[bool, list[nn.Parameter]] = {True: [], False: []}
    for path, parameter in module.named_parameters():
        if "lowbit" not in path:
            groups[path.startswith("layer2")].append(parameter)
    optimizer = torch.optim.SGD([{"params": groups[False], "lr": 0.0}, {"params": groups[True], "lr": 0.1}])
    clips = {path: q for path, q in inputs(module).items() if q.alpha is not None and q.leader is q}
    before = {path: float(q.clip().detach()) for path, q in clips.items()}
    for _ in range(3):
        optimizer.zero_grad()
        F.cross_entropy(module(images()), labels()).backward()
        lowbit_step(module, optimizer)
    moved = {path for path, q in clips.items() if float(q.clip().detach()) != before[path]}
    assert moved
    assert all(path.startswith("layer2") for path in moved)


class Pooled(nn.Sequential):
    """Its result is a mean: scores of an all-convolutional network."""

    def __init__(self) -> None:
        super().__init__(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 5, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())


def test_a_mean_that_is_the_result_is_not_rounded() -> None:
    torch.manual_seed(0)
    module = Pooled()
    convert(module, F8Net(), images())
    values = module.eval()(images()).detach()
    assert module[3].lowbit_output is None
    assert len(values.unique()) == values.numel()

"""The teacher's output as the only target: against steps written by hand, beside QuantCallback, over a resume."""

from __future__ import annotations

import copy
import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from plugins.lifecycle_nets import (
    NAMESPACES,
    QUIET,
    Body,
    assert_equal_states,
    loader,
    net_class,
    quantized,
    random_state,
    seeded_net,
    states,
    trainer,
)
from torch import Tensor, nn

from lightning_lowbit import QuantCallback, load_from_checkpoint
from lightning_lowbit.callbacks.distill import Distill, soft_cross_entropy
from lightning_lowbit.errors import ConfigError
from lightning_lowbit.modules.convert import is_converted

pytestmark = QUIET
NET = net_class()
BATCHES = 6  # an epoch of loader()


class Teacher(nn.Module):
    """A Body with other weights that counts its calls and remembers what it was called with."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(5)
            self.body = Body()
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        assert not self.training
        assert not torch.is_grad_enabled()
        self.calls += 1
        return 4 * self.body(x)  # type: ignore[no-any-return]


def fit(folder: Path, net: Any, *callbacks: Any, data: Any = None, ckpt_path: Any = None, **options: Any) -> Any:
    run = trainer(folder, *callbacks, **options)
    torch.manual_seed(1)
    run.fit(net, loader() if data is None else data, loader(), ckpt_path=ckpt_path)
    return run


def by_hand(namespace: str = NAMESPACES[0], weight: float = 1.0, temperature: float = 1.0, own: float = 0.0) -> Any:
    """The class whose training_step says what Distill does."""
    teacher = Teacher().eval()

    class ByHand(net_class(namespace)):  # type: ignore[misc]  # made at run time
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            logits = self(batch[0])
            with torch.no_grad():
                soft = teacher(batch[0])
            loss = weight * soft_cross_entropy(logits, soft, temperature)
            return loss + own * F.cross_entropy(logits, batch[1])

    return ByHand


def test_the_loss_and_its_gradient() -> None:
    generator = torch.Generator().manual_seed(0)
    z, t = (torch.randn(5, 3, generator=generator, dtype=torch.float64) for _ in range(2))
    z.requires_grad_()
    temperature = 2.0
    loss = soft_cross_entropy(z, t, temperature)
    p, q = F.softmax(t / temperature, 1), F.softmax(z.detach() / temperature, 1)
    entropy = -(p * p.log()).sum(1).mean()
    divergence = F.kl_div(q.log(), p, reduction="batchmean")
    torch.testing.assert_close(loss.detach(), temperature**2 * (divergence + entropy))
    (grad,) = torch.autograd.grad(loss, z)
    torch.testing.assert_close(grad, temperature * (q - p) / 5)


def test_axes_behind_the_classes_count_as_samples() -> None:
    z, t = torch.randn(2, 3, 4, 5), torch.randn(2, 3, 4, 5)
    rows = [x.movedim(1, -1).reshape(-1, 3) for x in (z, t)]
    torch.testing.assert_close(soft_cross_entropy(z, t), soft_cross_entropy(rows[0], rows[1]))
    assert soft_cross_entropy(z.bfloat16(), t.bfloat16()).dtype is torch.float32


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("namespace", NAMESPACES)
@pytest.mark.parametrize("keep_loss", [False, True], ids=["teacher alone", "kept loss"])
def test_a_fit_is_the_one_written_by_hand(tmp_path: Path, keep_loss: bool, namespace: str, accumulate: int) -> None:
    options = {"namespace": namespace, "accumulate_grad_batches": accumulate}
    torch.manual_seed(0)
    expected = by_hand(namespace, 0.5, 3.0, float(keep_loss))()
    fit(tmp_path, expected, **options)
    net = seeded_net(namespace)
    teacher = Teacher()
    fit(tmp_path, net, Distill(teacher, 0.5, 3.0, keep_loss), **options)
    assert_equal_states(states(net), states(expected))
    assert teacher.calls == 2 * BATCHES  # none in validation


def test_generators_are_left_alone(tmp_path: Path) -> None:
    fit(tmp_path, seeded_net())
    expected = random_state()
    fit(tmp_path, seeded_net(), Distill(Teacher()))
    assert random_state() == expected
    torch.save(seeded_net(seed=3).state_dict(), tmp_path / "teacher.pt")
    fit(tmp_path, seeded_net(), Distill(tmp_path / "teacher.pt"))
    assert random_state() == expected


@pytest.mark.parametrize("scheme", ["bnn", "niti", "tqt"])
def test_either_order_of_callbacks_is_the_same_run(tmp_path: Path, scheme: str) -> None:
    found = []
    for first in (True, False):
        net, teacher = seeded_net(), Teacher()
        quant, distill = QuantCallback(scheme, start=0), Distill(teacher)
        fit(tmp_path, net, *([distill, quant] if first else [quant, distill]))
        assert quantized(net)
        assert teacher.calls == 2 * BATCHES  # none in calibration
        found.append(states(net))
    assert_equal_states(found[0], found[1])
    plain = seeded_net()
    fit(tmp_path, plain, QuantCallback(scheme, start=0))
    assert any(not torch.equal(value, found[0][key]) for key, value in states(plain).items())


def test_a_low_bit_network_comes_to_agree_with_its_teacher(tmp_path: Path) -> None:
    net, teacher = seeded_net(lr=0.2), Teacher()
    x = loader().dataset.tensors[0]  # type: ignore[attr-defined]

    def distance() -> float:
        with torch.no_grad():
            return float(F.kl_div(F.log_softmax(net.eval()(x), 1), F.softmax(teacher.eval()(x), 1), reduction="sum"))

    before = distance()
    fit(tmp_path, net.train(), Distill(teacher), QuantCallback(start=0), max_epochs=12)
    assert quantized(net)
    assert distance() < 0.5 * before


@pytest.mark.parametrize("built", ["init", "setup", "configure_model"])
@pytest.mark.parametrize("first", [True, False], ids=["before QuantCallback", "behind it"])
def test_a_path_is_the_float_network_of_that_file(tmp_path: Path, first: bool, built: str) -> None:
    source = seeded_net(seed=3)
    fit(tmp_path, source, max_epochs=1)
    path = tmp_path / "teacher.pt"
    torch.save({"state_dict": source.state_dict()}, path)
    net, distill = seeded_net(built=built), Distill(str(path))
    looked = []

    def on_train_batch_end(*args: Any) -> None:
        teacher = distill._network
        assert teacher is not None
        assert not is_converted(teacher)
        assert not teacher.training
        assert_equal_states(states(teacher), states(source))
        x = torch.randn(4, 1, 6, 6, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            assert torch.equal(teacher(x), source.eval()(x))
        looked.append(quantized(net))

    net.on_train_batch_end = on_train_batch_end
    quant = QuantCallback(start=0)
    fit(tmp_path, net, *([distill, quant] if first else [quant, distill]))
    assert looked == [True] * 2 * BATCHES


@pytest.mark.parametrize("by_path", [True, False], ids=["path", "module"])
def test_a_resumed_fit_has_the_same_teacher(tmp_path: Path, by_path: bool) -> None:
    path = tmp_path / "teacher.pt"
    torch.save(seeded_net(seed=3).state_dict(), path)

    def run(folder: str, ckpt_path: Any = None, *savers: Any) -> Any:
        net = seeded_net(seed=0 if ckpt_path is None else 9)
        callbacks = [Distill(path if by_path else Teacher()), QuantCallback(start="4 steps"), *savers]
        fit(tmp_path / folder, net, *callbacks, ckpt_path=ckpt_path)
        return net

    pl = importlib.import_module(NAMESPACES[0])
    saver = pl.callbacks.ModelCheckpoint(tmp_path, "{step}", save_top_k=-1, every_n_train_steps=1)
    whole = run("a", None, saver)
    for step in (2, 8):
        file = tmp_path / f"step={step}.ckpt"
        checkpoint = torch.load(file, weights_only=True)
        assert checkpoint["state_dict"].keys() == whole.state_dict().keys()
        assert not any("Distill" in key for key in checkpoint["callbacks"])
        assert_equal_states(states(run("b", file)), states(whole))


class Variant(NET):  # type: ignore[misc, valid-type]  # made at run time
    """Its training_step is what a test sets."""

    step: Any = None

    def training_step(self, batch: Any) -> Any:  # without batch_idx
        return self.step(batch)


def variant(step: Any) -> Any:
    torch.manual_seed(0)
    net = Variant()
    net.step = step
    return net


def test_two_calls_in_a_step_count_alike(tmp_path: Path) -> None:
    teacher = Teacher().eval()

    def written_out(batch: Any) -> Tensor:
        losses = []
        for x in (batch[0], -batch[0]):
            with torch.no_grad():
                soft = teacher(x)
            losses.append(soft_cross_entropy(expected(x), soft))
        return torch.stack(losses).mean()

    expected = variant(written_out)
    fit(tmp_path, expected)
    net = variant(lambda batch: F.mse_loss(net(batch[0]), net(x=-batch[0])))
    fit(tmp_path, net, Distill(Teacher()))
    assert_equal_states(states(net), states(expected))


def test_a_call_without_gradients_is_not_compared(tmp_path: Path) -> None:
    def step(batch: Any) -> Tensor:
        with torch.no_grad():
            net(batch[0])
        return net(batch[0]).sum()  # type: ignore[no-any-return]

    net, teacher = variant(step), Teacher()
    fit(tmp_path, net, Distill(teacher))
    assert teacher.calls == 2 * BATCHES


def test_what_else_a_step_returns_stays(tmp_path: Path) -> None:
    seen = []

    class Watch(importlib.import_module(NAMESPACES[0]).Callback):  # type: ignore[misc]
        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, *args: Any) -> None:
            seen.append(outputs)

    def step(batch: Any) -> Any:
        if len(seen) == 1:
            return None
        logits = net(batch[0])
        return {"loss": logits.sum(), "logits": logits.detach()}

    net, teacher = variant(step), Teacher()
    with pytest.warns(UserWarning, match="`training_step` returned `None`"):
        run = fit(tmp_path, net, Distill(teacher), Watch(), max_epochs=1)
    assert seen[1] == {}
    assert teacher.calls == BATCHES - 1
    assert seen[0]["logits"].shape == (8, 3)
    assert run.callback_metrics["distill_loss"] == seen[-1]["loss"]
    assert run.callback_metrics.keys() == {"distill_loss", "val_loss"}


@pytest.mark.parametrize("fails", [False, True], ids=["fit", "exception"])
def test_nothing_is_left_on_the_module(tmp_path: Path, fails: bool) -> None:
    def step(batch: Any) -> Tensor:
        if fails:
            raise RuntimeError("on purpose")
        return net(batch[0]).sum()  # type: ignore[no-any-return]

    net = variant(step)
    if fails:
        with pytest.raises(RuntimeError, match="on purpose"):
            fit(tmp_path, net, Distill(Teacher()))
    else:
        fit(tmp_path, net, Distill(Teacher()))
    assert "training_step" not in vars(net)
    assert not net._forward_hooks
    assert copy.deepcopy(net).training_step.__func__ is Variant.training_step


def test_a_search_for_the_learning_rate_trains_toward_the_teacher(tmp_path: Path) -> None:
    teacher = Teacher()
    pl = importlib.import_module(NAMESPACES[0])
    net = seeded_net()
    search = pl.callbacks.LearningRateFinder(num_training_steps=4, update_attr=False, early_stop_threshold=None)
    fit(tmp_path, net, search, Distill(teacher), max_epochs=1)
    assert teacher.calls > BATCHES


REFUSED = {
    "no call": (lambda net, batch: net.body(batch[0]).sum(), "Variant: its training_step returned a loss without call"),
    "other classes": (lambda net, batch: net(batch[0]).sum(), r"forward returns .*\[8, 2\], the teacher .*\[8, 3\]"),
    "tuple": (lambda net, batch: net(batch[0])[0].sum(), r"Variant: forward returns a tuple, the teacher \(Teacher\)"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_outputs_that_cannot_be_compared_are_refused(tmp_path: Path, case: str) -> None:
    function, message = REFUSED[case]
    net = variant(lambda batch: function(net, batch))
    if case == "other classes":
        net.body.fc = nn.Linear(16, 2)
    elif case == "tuple":
        net.forward = lambda x: (net.body(x), x)
    with pytest.raises(ConfigError, match=message):
        fit(tmp_path, net, Distill(Teacher()))


def test_manual_optimization_is_refused(tmp_path: Path) -> None:
    net = seeded_net()
    net.automatic_optimization = False
    with pytest.raises(ConfigError, match=r"under manual optimization nobody reads that"):
        fit(tmp_path, net, Distill(Teacher()))


@pytest.mark.parametrize("part", [False, True], ids=["the network itself", "a part of it"])
def test_a_teacher_that_is_trained_along_is_refused(tmp_path: Path, part: bool) -> None:
    net = seeded_net()
    with pytest.raises(ConfigError, match=r"body\.conv1\.weight: this parameter of .* is the teacher's too"):
        fit(tmp_path, net, Distill(net.body if part else net))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"teacher": 3}, r"Distill\(teacher=int\): expected a torch module"),
        ({"weight": 0}, r"Distill\(weight=0\): expected a finite number above 0"),
        ({"temperature": float("nan")}, r"Distill\(temperature=nan\)"),
    ],
    ids=["teacher", "weight", "temperature"],
)
def test_arguments_are_checked(arguments: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Distill(**{"teacher": nn.Identity(), **arguments})


def test_files_that_hold_no_float_teacher_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"Distill\(teacher='.*absent.pt'\): no such file"):
        fit(tmp_path, seeded_net(), Distill(tmp_path / "absent.pt"))
    torch.save(nn.Linear(2, 2).state_dict(), tmp_path / "other.pt")
    with pytest.raises(ConfigError, match=r"Distill\(teacher='.*other.pt'\) does not fit Net.*missing in the file"):
        fit(tmp_path, seeded_net(), Distill(tmp_path / "other.pt"))
    run = fit(tmp_path, seeded_net(), QuantCallback(start=0), max_epochs=1)
    path = tmp_path / "low.ckpt"
    run.save_checkpoint(path)
    with pytest.raises(ConfigError, match=r"low.ckpt'\) was trained in low bits"):
        fit(tmp_path, seeded_net(), Distill(path))
    fit(tmp_path, seeded_net(), Distill(load_from_checkpoint(NET, path)), max_epochs=1)

"""What WAGEUBN keeps through validations, averages, abandoned batches and scalers; its products, options and pieces."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import EMAWeightAveraging, WeightAveraging
from lightning.pytorch.plugins.precision import MixedPrecision
from schemes.conformance import Net, differing, loader, net, trainer
from schemes.wageubn_nets import chain, converted, finite, images, labels, norms, rule, sgd, state, step, widths
from torch import Tensor, nn

from lightning_lowbit import QuantCallback, Wageubn, load_from_checkpoint, lowbit_step
from lightning_lowbit.errors import ConfigError
from lightning_lowbit.graph.ops import Kind, drops
from lightning_lowbit.graph.plan import OpPlan, Plan, Site
from lightning_lowbit.modules.base import Run, StepContext
from lightning_lowbit.modules.convert import quantizers
from lightning_lowbit.modules.error_gate import ErrorForm, ErrorGate
from lightning_lowbit.modules.integer_layers import LinearProducts
from lightning_lowbit.numerics.momentum import UpdateFormat
from lightning_lowbit.schemes.options import check_flags, check_number, check_whole
from lightning_lowbit.schemes.step_advice import lr_notice
from lightning_lowbit.schemes.values import Values, value_milestones


def fit(module: Any, *callbacks: Any, scheme: Wageubn | None = None, data: Any = None, **options: Any) -> Any:
    callback = QuantCallback(scheme or Wageubn(first_last="int8"), start=0, evaluate=False, calibrate_batches=1)
    torch.manual_seed(5)
    run = trainer(callback, *callbacks, **options)
    run.fit(module, data or loader(), loader())
    return run


# -- scalers -------------------------------------------------------------------------------------------------
class Loud(Net):
    """A loss of some hundreds."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return 256.0 * super().training_step(batch, batch_idx)


@pytest.mark.parametrize("update", ["integer", "fake"])
def test_a_scale_that_overflows_falls_until_steps_are_taken(update: Any) -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**126)
    module = Loud()
    before = module.conv2.weight.detach().clone()
    scheme = Wageubn(first_last="int8", update=update)
    fit(module, scheme=scheme, plugins=[MixedPrecision("16-mixed", "cpu", scaler)], max_epochs=4)
    skipped = rule(module).skipped
    assert 0 < skipped < 16
    assert math.log2(scaler.get_scale()) == 126 - skipped
    assert not torch.equal(module.conv2.weight, before)
    assert finite(module)


def test_a_step_is_left_out_under_a_scaler_where_no_gradient_is() -> None:
    found = converted(chain())
    found(images() * torch.inf)
    lowbit_step(found, sgd(found), None, StepContext(0, None, grad_scale=2.0))
    assert rule(found).skipped == 1


def test_a_scaler_is_told_in_a_gradient_of_whatever_kind() -> None:
    torch.manual_seed(0)
    found = nn.Sequential(nn.Embedding(10, 8, sparse=True), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
    found = converted(found, torch.arange(8))
    F.cross_entropy(found(torch.arange(8)), labels()).mul(torch.inf).backward()
    optimizer = torch.optim.SGD(found.parameters(), 0.5)
    rule(found).before_step(optimizer, StepContext(0, None, grad_scale=2.0))
    assert any(bool(p.grad.to_dense().isinf().any()) for p in found.parameters() if p.grad is not None)


# -- averages ------------------------------------------------------------------------------------------------
class Growing(Net):
    """Data that grow, so that integer bits change; validated on the largest."""

    factor = staticmethod(lambda step: 1.0 + step)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return super().training_step([batch[0] * self.factor(self.global_step), batch[1]], batch_idx)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        super().validation_step([batch[0] * 16, batch[1]], batch_idx)


class SaveBehindValidation(pl.Callback):
    """A checkpoint of each epoch, and the loss that was validated."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.losses = folder, [0.0]

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        self.losses.append(float(trainer.callback_metrics["val_loss"]))
        trainer.save_checkpoint(self.folder / f"{len(self.losses) - 1}.ckpt")
        whole_as_in_python(next(c._average_model for c in trainer.callbacks if hasattr(c, "_average_model")))


@pytest.mark.filterwarnings("ignore:You're using the WeightAveraging callback")
@pytest.mark.parametrize("kind", [EMAWeightAveraging, WeightAveraging])
def test_the_network_of_a_checkpoint_is_the_one_that_was_validated(kind: Any, tmp_path: Path) -> None:
    module, save = Growing(), SaveBehindValidation(tmp_path)
    module.load_state_dict(net().state_dict())
    average = kind(decay=0.9, use_buffers=True) if kind is EMAWeightAveraging else kind(use_buffers=True)
    scheme = Wageubn(first_last="int8", quantize_norms=0.5)
    fit(module, average, save, scheme=scheme, max_epochs=4)
    for epoch in (2, 4):
        again = load_from_checkpoint(Growing, tmp_path / f"{epoch}.ckpt").eval()
        with torch.no_grad():
            found = [float(F.cross_entropy(again(x * 16), y)) for x, y in loader()]
        assert sum(found) / len(found) == pytest.approx(save.losses[epoch], rel=1e-6)
        assert all(grids.on == (epoch > 2) for grids in norms(again).values())
    assert widths(module)["conv1.lowbit_input"].integer >= 5
    whole_as_in_python(module)
    whole_as_in_python(again)


def whole_as_in_python(module: nn.Module) -> None:
    """Buffers of whole numbers hold them, and what Python works with is equal."""
    for _, quantizer in quantizers(module):
        for name in quantizer.whole:
            value = getattr(quantizer, name)
            value = value.reshape(-1)[:4]  # of a width: its state but the last step's share
            assert torch.equal(value, value.round())
    assert all(float(q.width[0]) == q.integer for q in widths(module).values())
    assert all(bool(q.begun) == q.on for q in norms(module).values())


# -- validation ----------------------------------------------------------------------------------------------
def test_a_validation_in_the_middle_of_an_accumulation_changes_nothing() -> None:
    found = []
    scheme = Wageubn(first_last="int8", width_patience=1, freeze_widths=None)
    for options in ({"limit_val_batches": 0}, {"val_check_interval": 1}):
        module = Growing()
        module.load_state_dict(net().state_dict())
        module.factor = lambda step: 0.5 ** (2 + step)  # integer bits shrink
        fit(module, scheme=scheme, accumulate_grad_batches=4, max_epochs=3, **options)
        assert widths(module)["conv1.lowbit_input"].integer <= 0
        found.append(state(module))
    assert differing(*found) == []


def test_settling_between_steps_leaves_what_was_seen() -> None:
    module = converted(chain())
    module(images() * 0.05)
    before = state(module)
    for _, quantizer in quantizers(module):
        quantizer.settle(False)
    assert differing(before, state(module)) == []
    assert all(float(q.width[-1]) % 1 for q in rule(module).widths)


# -- what is not finite, and when it counts ------------------------------------------------------------------
@pytest.mark.filterwarnings("ignore:.*The step is left out")
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("continues", [False, True], ids=["begins", "continues"])
def test_what_an_abandoned_batch_met_is_forgotten_where_a_batch_begins(continues: bool, backward: bool) -> None:
    module = converted(chain())
    if backward:
        module(images()).mul(torch.inf).sum().backward()
    else:
        module(images() * torch.inf)
    rule(module).before_batch(continues)
    step(module, sgd(module), images())
    assert rule(module).skipped == int(continues)


class Saliency(pl.Callback):
    """Differentiates the network in evaluation between two batches, to infinity."""

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == 0:
            kept = [p.grad for p in pl_module.parameters()]
            pl_module.eval()(batch[0]).mul(torch.inf).sum().backward()
            pl_module.train()
            for p, grad in zip(pl_module.parameters(), kept, strict=True):
                p.grad = grad


class InfiniteError(pl.Callback):
    """An error that is infinite on its way to conv2, in the first batch of an epoch."""

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        def hook(module: nn.Module, args: Any, y: Tensor) -> None:
            y.register_hook(lambda g: g * torch.inf)  # type: ignore[no-untyped-call]  # torch does not type it

        self.handle = pl_module.conv3.register_forward_hook(hook) if batch_idx == 0 else None

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if self.handle is not None:
            self.handle.remove()


@pytest.mark.filterwarnings("ignore:.*The step is left out")
@pytest.mark.parametrize(
    ("callback", "accumulated", "skipped"),
    [(Saliency, 1, 0), (InfiniteError, 1, 2), (InfiniteError, 2, 2), (Saliency, 2, 2)],
    ids=["an evaluation between", "a batch", "the first of two", "an evaluation within"],
)
def test_a_step_is_left_out_for_what_its_own_batches_met(callback: Any, accumulated: int, skipped: int) -> None:
    module = net()
    fit(module, callback(), accumulate_grad_batches=accumulated, max_epochs=2)
    assert rule(module).skipped == skipped
    assert finite(module)


def test_an_infinite_error_in_a_part_that_is_kept_in_evaluation_leaves_the_step_out() -> None:
    module = converted(chain())
    module[2].eval()
    module[2].register_full_backward_pre_hook(lambda m, g: (g[0] * torch.inf,))
    before = state(module)
    with pytest.warns(UserWarning, match="skipped_steps"):
        step(module, sgd(module), images())
    assert rule(module).skipped == 1
    assert [key for key in differing(before, state(module)) if key.endswith(("weight", "bias"))] == []


# -- processes -----------------------------------------------------------------------------------------------
def test_all_processes_hold_the_largest_guard() -> None:
    module = converted(chain())
    step(module, sgd(module), images())
    (held,) = rule(module).norms
    assert float(held.guard) == 4

    def reduce_max(tensor: Tensor) -> Tensor:  # another process has seen more values of a channel
        return tensor + 2 if torch.equal(tensor, torch.tensor([4.0])) else tensor

    step(module, sgd(module), images(), context=StepContext(1, None, reduce_max=reduce_max, world=2))
    assert float(held.guard) == 6
    assert held.present.integer_bits == 6


# -- kernels -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("shape", [(9, 5), (3, 4, 5)], ids=["2-D", "3-D"])
def test_a_linear_layer_s_weight_gradient_takes_unsigned_codes(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    x = torch.randint(0, 256, shape, dtype=torch.uint8)
    err = torch.randint(-127, 128, (*shape[:-1], 7), dtype=torch.int8)
    got = LinearProducts().for_weight(None, x, err)
    want = err.reshape(-1, 7).long().t() @ x.reshape(-1, 5).long()
    assert torch.equal(got.long(), want)


def test_a_linear_layer_s_gradient_is_the_product_of_rounded_errors_and_codes() -> None:
    module = converted(nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4)), images(8, 5, 6), e2="shift8")
    seen: dict[str, Tensor] = {}
    module[2].register_forward_hook(lambda m, args, y: seen.update(x=args[0].detach()))
    g = images(8, 5, 4, seed=1)
    module(images(8, 5, 6)).backward(g)
    codes = seen["x"].double() * 2.0 ** module[2].input_grid.format.fraction
    assert float(codes.max()) > 127
    err = ErrorGate(ErrorForm("shift", 8), "").values(g, Run()).double()
    assert torch.equal(module[2].weight.grad.double(), err.reshape(-1, 4).t() @ seen["x"].reshape(-1, 8).double())


ERRORS: dict[str, Tensor] = {
    "normal": images(2, 3, 4, 5), "zeros": torch.zeros(2, 3, 4, 5), "small": images(2, 3, 4, 5) * 2.0**-140,
    "large": images(2, 3, 4, 5) * 2.0**120,
}  # fmt: skip


@pytest.mark.parametrize("kind", ERRORS)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels last"])
def test_masked_errors_are_errors_times_the_mask(kind: str, layout: torch.memory_format) -> None:
    run = Run()
    g, keep = (t.to(memory_format=layout) for t in (ERRORS[kind], images(2, 3, 4, 5, seed=1) > 0))
    for form in (ErrorForm("shift", 8), ErrorForm("shift", 3), ErrorForm("shift", 16), ErrorForm("flag", 8)):
        gate = ErrorGate(form, "")
        got = gate.values(g.clone(memory_format=torch.preserve_format), run, keep)
        assert torch.equal(got, gate.values(g, run) * keep)
        assert got.stride() == g.stride()
    assert int(run.nonfinite) == 0


@pytest.mark.parametrize("value", [torch.inf, torch.nan])
def test_masked_errors_that_are_not_finite_are_noted(value: float) -> None:
    run = Run()
    g = images(2, 3, 4, 5)
    g[1, 2, 3, 4] = value
    ErrorGate(ErrorForm("shift", 8), "").values(g, run, torch.zeros(g.shape, dtype=torch.bool))
    assert int(run.nonfinite) == 1


def test_a_contiguous_error_meets_a_mask_in_channels_last() -> None:
    quantizer = widths(converted(chain()))["1.lowbit_output"]
    found = []
    for layout in (torch.channels_last, torch.contiguous_format):
        x = images(2, 3, 4, 5).to(memory_format=layout).requires_grad_()
        back: list[Tensor] = []
        y = x * 1.0
        y.register_hook(back.append)
        quantizer(y, rectify=True).backward(images(2, 3, 4, 5, seed=1))
        assert back[0].is_contiguous(memory_format=layout)
        found.append(back[0])
    assert torch.equal(*found)


# -- pieces --------------------------------------------------------------------------------------------------
def test_a_plan_joins_what_is_concatenated_and_not_what_is_added() -> None:
    def operation(path: str, kind: Kind) -> OpPlan:
        return OpPlan(path, "", ("", 0), kind, None, None)  # type: ignore[arg-type]  # no call is looked at

    keys = [f"{path}.lowbit_output" for path in "abcdef"]
    plan = Plan(
        ops=[operation("cat", Kind.CAT), operation("cat_1", Kind.CAT), operation("add", Kind.ADD)],
        sites=[Site(path, "output", "relu", slot="lowbit_output") for path in "abcdef"],
        operands={"cat": keys[:2], "cat_1": [keys[1], keys[3]], "add": [keys[3], keys[4], keys[5]]},
    )
    assert plan.joined() == [[keys[0], keys[1], keys[3]]]
    plan.ops = plan.ops[2:]
    assert plan.joined() == []


@pytest.mark.parametrize(
    ("target", "wanted"),
    [
        (nn.Dropout(), True), (nn.Dropout2d(), True), (nn.AlphaDropout(), True), (F.dropout, True),
        (F.dropout3d, True), (nn.Identity(), False), (F.relu, False), ("view", False), (torch.flatten, False),
    ],
    ids=[
        "Dropout", "Dropout2d", "AlphaDropout", "dropout", "dropout3d", "Identity", "relu", "view", "flatten",
    ],
)  # fmt: skip
def test_dropouts_are_known(target: Any, wanted: bool) -> None:
    assert drops(target) is wanted


def test_values_follow_their_moments_and_go_back() -> None:
    values = Values("dr", (128, 32, 128))
    what = [m.what for m in value_milestones("dr", (128, 32, 128), (0, 0.5, "9 steps"))]
    seen = []
    for name, reached in [(what[0], True), (what[1], True), (what[2], True), (what[2], False), (what[1], False)]:
        assert values.follow(name, reached)
        seen.append(values.now)
    assert seen == [128, 32, 128, 32, 128]
    assert not values.follow("drop[0]=5", True)
    values.follow(what[0], False)
    assert values.now == 128


WRONG: dict[str, tuple[Callable[..., None], tuple[Any, ...], tuple[Any, ...]]] = {
    "number": (check_number, (0, 0.5, 1), (-0.1, 1.1, math.nan, math.inf, True, "1", None)),
    "whole": (check_whole, (0, 1), (-1, 2, 0.0, True, "1", None)),
}


@pytest.mark.parametrize("kind", WRONG)
def test_numbers_are_checked_with_their_bounds(kind: str) -> None:
    check, good, bad = WRONG[kind]
    for value in good:
        check(Wageubn, "seed", value, 0, 1)
    for value in bad:
        with pytest.raises(ConfigError, match=r"Wageubn\(seed=.*expected an? .* from 0 to 1"):
            check(Wageubn, "seed", value, 0, 1)


def test_flags_are_true_or_false() -> None:
    check_flags(Wageubn(), "exact", "check")
    scheme = Wageubn()
    object.__setattr__(scheme, "check", 1)
    with pytest.raises(ConfigError, match=r"Wageubn\(check=1\): expected True or False"):
        check_flags(scheme, "exact", "check")


def test_bits_do_not_switch_on_what_is_off() -> None:
    assert Wageubn(preset="pypi", bits=4).e1 == Wageubn(e1="off").replace(bits=4).e1 == "off"
    assert Wageubn(bits=4).e1 == Wageubn(e1="shift8").replace(bits=4).e1 == "shift4"
    assert Wageubn(preset="pypi", bits=4).weight_bits == 4


def test_values_and_moments_of_dr_come_in_pairs() -> None:
    for options in ({"preset": "authors", "dr": (64,)}, {"dr": 128, "dr_at": (0, 0.5, 0.8)}):
        with pytest.raises(ConfigError, match=r"1 values and [35] moments"):
            Wageubn(**options)
    assert Wageubn(preset="authors", dr=(64,), dr_at=(0,)).dr == (64,)


@pytest.mark.parametrize("e1", ["flag8", "off"])
def test_clip_to_one_is_of_a_shift(e1: str) -> None:
    with pytest.raises(ConfigError, match=rf"clip_to_one=True, e1='{e1}'.*'shift'"):
        Wageubn(clip_to_one=True, e1=e1)


def test_the_reach_of_a_rate_is_that_of_the_momentum_on_its_grid() -> None:
    words = lr_notice([0.1], 0.02, 0.9, 128, UpdateFormat(momentum=6, accumulator=10), 200)
    want = 200 * 0.02 * 128 * 2.0**-14 / (1 - 29 / 32) / 0.1
    assert f"at most {want:.2g} standard deviations" in words

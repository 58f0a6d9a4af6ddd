"""Bad input is refused by name, with what was found, what was expected and the next step; nothing is lost."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, StochasticWeightAveraging
from refusals import Net, fit_is_refused, loader, net, refusal, trainer
from torch import Tensor, nn

from lightning_lowbit.callbacks.calibrate import Calibrate
from lightning_lowbit.callbacks.fold import FoldBatchNorm
from lightning_lowbit.callbacks.freeze import Freeze
from lightning_lowbit.callbacks.quant import QuantCallback
from lightning_lowbit.modules.base import low_bit_modules
from lightning_lowbit.plugins import checks
from lightning_lowbit.schemes import convert, resolve
from lightning_lowbit.schemes.tqt import Tqt


class WithLbfgs(Net):
    def configure_optimizers(self) -> Any:
        return torch.optim.LBFGS(self.parameters())


class Nothing(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss: Tensor = (batch[0] * self.scale).mean()
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.01)


class Doubled(nn.Conv2d):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2)
        self.out = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.out(self.attention(x, x, x)[0])
        return y


# -- schemes, options, patterns, moments ---------------------------------------------------------------------
@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: QuantCallback("tqtt"), ["'tqtt'", "Did you mean 'tqt'?"]),
        (lambda: QuantCallback("zzzz"), ["'zzzz'", "Known: ", "'tqt'"]),
        (lambda: QuantCallback(8), ["got 8", "'tqt'", "Scheme instance"]),  # type: ignore[arg-type]
        (lambda: resolve("tqt", bitz=4), ["Tqt", "'bitz'", "Did you mean 'bits'?"]),
        (lambda: convert(net(), "tqt", weight_bit=4), ["'weight_bit'", "Did you mean 'weight_bits'?"]),
        (lambda: Tqt(bits=1), ["weight_bits=1", "from 2 to 16"]),
        (lambda: Tqt(act_bits=17), ["act_bits=17", "from 2 to 16"]),
        (lambda: Tqt(input_bits=4.0), ["input_bits=4.0", "integer"]),  # type: ignore[arg-type]
        (lambda: Tqt(act_round="half_evn"), ["'half_evn'", "Did you mean 'half_even'?"]),  # type: ignore[arg-type]
        (
            lambda: Tqt(overrides={"fc": {"weigth_bits": 4}}),
            ["'fc'", "'weigth_bits'", "Did you mean 'weight_bits'?"],
        ),
        (lambda: QuantCallback(calibrate_batches=0), ["calibrate_batches=0", "at least 1"]),
        (lambda: Calibrate(batches=0), ["batches=0", "at least 1"]),
    ],
)
def test_settings_are_refused_where_they_are_given(call: Callable[[], Any], words: list[str]) -> None:
    message = refusal(call)
    assert [word for word in words if word not in message] == [], message


def test_a_single_pattern_may_be_given_without_a_list() -> None:
    module = net()
    trainer(QuantCallback(skip="conv1", start=0)).fit(module, loader())  # type: ignore[arg-type]
    assert "conv1" not in dict(low_bit_modules(module))


@pytest.mark.parametrize("option", ["warmup", "freeze_thresholds", "freeze_batch_norm"])
def test_a_moment_among_options_is_refused_where_it_is_given(option: str) -> None:
    assert f"{option}=2.5" in refusal(lambda: Tqt(**{option: 2.5}))  # type: ignore[arg-type]


@pytest.mark.parametrize("moment", [1.5, -1, -0.5, 1.0, "steps", "5 epochs", "0.5", True, math.nan])
@pytest.mark.parametrize(
    ("take", "name"),
    [
        (lambda moment: QuantCallback(start=moment), "start"),
        (lambda moment: Freeze(moment), "Freeze"),
        (lambda moment: Freeze(0.5, until=moment), "until"),
        (lambda moment: FoldBatchNorm(moment), "FoldBatchNorm"),
    ],
)
def test_what_is_no_moment_is_refused_with_the_four_ways_to_give_one(take: Any, name: str, moment: Any) -> None:
    message = refusal(lambda: take(moment))
    assert name in message
    assert f"{moment!r}: expected a fraction" in message
    assert all(way in message for way in ("(0, 1)", "epoch", "'500 steps'", "0 for at once"))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"skip": ["conv9"]}, ["skip: 'conv9' matches no module of Net", "Did you mean 'conv1'?"]),
        ({"skip": [nn.Conv3d]}, ["skip: ", "Conv3d", "matches no module of Net"]),
        ({"include": ["con1"]}, ["include: 'con1' matches no module of Net", "Did you mean 'conv1'?"]),
        ({"skip": ["*"]}, ["Net: nothing to convert", "found 6 layers", "by skip="]),
    ],
)
def test_a_pattern_must_match(settings: dict[str, Any], words: list[str]) -> None:
    fit_is_refused(net(), trainer(QuantCallback(**settings)), *words)


# -- models --------------------------------------------------------------------------------------------------
def test_a_model_without_layers_is_refused_in_convert_and_in_fit() -> None:
    words = ["nothing to convert", "Expected nn.Linear", "found none"]
    message = refusal(lambda: convert(nn.Sequential(nn.ReLU()), "tqt"))
    assert all(word in message for word in ["Sequential", *words])
    fit_is_refused(Nothing(), trainer(QuantCallback(start=0)), "Nothing", *words)


def test_a_subclass_with_code_of_its_own_is_left_alone_and_named() -> None:
    model = nn.Sequential(Doubled(1, 2, 3), nn.Conv2d(2, 2, 3))
    result = convert(model, "tqt", torch.randn(2, 1, 8, 8))
    assert type(model[0]) is Doubled
    assert result.skipped == {"0": "Doubled is a subclass of a torch layer with code of its own"}
    assert refusal(lambda: convert(nn.Sequential(Doubled(1, 2, 3)), "tqt")).startswith("Sequential: nothing to convert")


def test_attention_that_calls_no_layer_is_refused_unless_it_is_skipped() -> None:
    message = refusal(lambda: convert(Attention(), "tqt"))
    assert message.startswith("attention: nn.MultiheadAttention")
    assert "skip=['attention']" in message
    assert [layer.path for layer in convert(Attention(), "tqt", skip=["attention"]).layers] == ["out"]


def test_a_lone_layer_is_refused_with_the_way_to_wrap_it() -> None:
    message = refusal(lambda: convert(nn.Linear(2, 2), "tqt"))
    assert message.startswith("Linear: the module itself is one layer")
    assert "nn.Sequential(layer)" in message


def test_a_converted_layer_that_never_runs_is_refused_by_path() -> None:
    words = ["extra: converted, but it did not run in calibration", "skip="]
    fit_is_refused(net(extra=True), trainer(QuantCallback(start=0)), *words, again=False)


def test_the_advice_to_skip_a_layer_can_be_taken_with_the_same_module() -> None:
    module = net(extra=True)
    refusal(lambda: trainer(QuantCallback(start=0)).fit(module, loader()))
    trainer(QuantCallback(skip=["extra"], start=0)).fit(module, loader())
    assert "extra" not in dict(low_bit_modules(module))


# -- trainers and neighbors ----------------------------------------------------------------------------------
@pytest.mark.parametrize("neighbor", [EMAWeightAveraging, lambda: StochasticWeightAveraging(1e-2)])
def test_a_callback_that_copies_the_model_must_come_after_ours(neighbor: Any) -> None:
    other = neighbor()
    name = type(other).__name__
    fit_is_refused(net(), trainer(other, QuantCallback(start=0)), name, "Put QuantCallback before it in the list")


@pytest.mark.parametrize("precision", ["16-true", "bf16-true"])
def test_half_precision_parameters_are_refused(precision: str) -> None:
    run = trainer(QuantCallback(start=0), precision=precision)
    fit_is_refused(net(), run, f"precision='{precision}'", "Expected '32-true'", "'bf16-mixed'")


def test_sync_batchnorm_is_refused() -> None:
    class Stub:
        precision = "32-true"
        strategy = type("DDPStrategy", (), {"_layer_sync": object()})()

    message = refusal(lambda: checks.check_trainer(Stub()))
    assert "sync_batchnorm=True" in message
    assert "FoldBatchNorm" in message


@pytest.mark.parametrize("name", ["FSDPStrategy", "DeepSpeedStrategy", "ModelParallelStrategy", "XLAStrategy"])
def test_strategies_that_nobody_has_tried_are_refused_by_name(name: str) -> None:
    """Also subclasses of them; most need a device that a test machine lacks."""
    base = type(name, (), {})

    class Stub:
        precision = "32-true"
        strategy = type("Mine", (base,), {})()

    message = refusal(lambda: checks.check_trainer(Stub()))
    assert name in message
    assert "strategy='ddp'" in message


@pytest.mark.parametrize("method", ["spawn", "fork"])
def test_processes_that_hand_back_a_float_module_are_refused(method: str) -> None:
    run = trainer(strategy=f"ddp_{method}", devices=2)  # not started
    message = refusal(lambda: checks.check_trainer(run))
    assert f"strategy='ddp_{method}'" in message
    assert "Use strategy='ddp'" in message


def test_lbfgs_is_refused() -> None:
    module = WithLbfgs()
    run = trainer(QuantCallback(start=0))
    message = refusal(lambda: run.fit(module, loader()))
    assert "configure_optimizers: LBFGS" in message
    assert "SGD or Adam" in message
    assert "configure_optimizers" not in module.__dict__


def test_two_quant_callbacks_and_settings_without_one_are_refused() -> None:
    fit_is_refused(net(), trainer(QuantCallback(), QuantCallback()), "2 QuantCallbacks, expected one")
    fit_is_refused(net(), trainer(Freeze(0.5)), "Freeze", "Add QuantCallback() to the list")


def test_a_module_in_eval_mode_is_refused() -> None:
    fit_is_refused(
        net().eval(), trainer(QuantCallback(start=0)), "Net was handed to fit in eval mode", "module.train()"
    )


def test_a_start_that_the_run_does_not_reach_is_refused() -> None:
    words = ["start=5 means step 10", "this run ends after 2 steps", "fraction of the run"]
    fit_is_refused(net(), trainer(QuantCallback(start=5)), *words)
    fit_is_refused(net(), trainer(QuantCallback(start=0), Freeze("90 steps")), "freeze_ranges='90 steps'", "2 steps")


@pytest.mark.parametrize("cut", [{"fast_dev_run": True}, {"overfit_batches": 1}])
def test_a_run_that_is_cut_on_purpose_only_warns(cut: dict[str, Any]) -> None:
    module = net()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer(QuantCallback(start=5), **cut).fit(module, loader())
    assert [str(w.message) for w in caught if "start=5 means step" in str(w.message)]


# -- data ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_values_that_are_not_finite_are_refused_by_the_first_site_that_saw_them(value: float) -> None:
    words = ["conv1.lowbit_input: 1 NaN or infinite value in calibration", "calibration batches"]
    fit_is_refused(net(), trainer(QuantCallback(start=0)), *words, data=loader(value=value), again=False)


def test_a_refused_calibration_leaves_nothing_behind() -> None:
    module, fresh = net(), net()
    refusal(lambda: trainer(QuantCallback(start=0)).fit(module, loader(value=math.nan)))
    for one in (module, fresh):
        trainer(QuantCallback(Tqt(mode="static"), start=0)).fit(one, loader())
    assert all(torch.equal(value, fresh.state_dict()[key]) for key, value in module.state_dict().items())


def test_weights_that_are_not_finite_are_refused() -> None:
    module = net()
    with torch.no_grad():
        module.get_parameter("branches.2.weight")[0, 0, 0, 0] = math.inf
    words = ["branches.2.", "NaN or infinite", "weights of the layers before it"]
    fit_is_refused(module, trainer(QuantCallback(start=0)), *words, again=False)


def test_calibration_without_a_batch_is_refused() -> None:
    none = Calibrate(loader(samples=2, drop_last=True))
    words = ["Net: calibration got no batch", "drop_last", "Calibrate(dataloader=...)"]
    fit_is_refused(net(), trainer(QuantCallback(start=0), none), *words)

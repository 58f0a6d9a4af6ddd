"""What each setting of Lightning does to integer weights: every cell of the table in the documentation."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.plugins import MixedPrecision
from schemes.niti_nets import Net, Validated, differing, fit, images, loader, on_grid, trainer, weights
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lightning_lowbit import Niti, QuantCallback
from lightning_lowbit.errors import ConfigError
from lightning_lowbit.modules.base import switch_of
from lightning_lowbit.modules.block import WeightCodes
from lightning_lowbit.modules.carrier import plain
from lightning_lowbit.modules.convert import quantizers
from lightning_lowbit.plugins.checks import check_trainer

pytestmark = [
    pytest.mark.filterwarnings(f"ignore:{text}")
    for text in (
        ".*does not have many workers", "You're using the WeightAveraging callback with a model that overrides",
        "Swapping scheduler", "You requested to overfit", "You passed .*16-mixed.* but AMP with fp16 is not supported",
        ".*LeafSpec", "None of the inputs have requires_grad", "You have set progress_bar", ".*would never act",
        ".*callbacks used to create the checkpoint need to be provided", ".*exists and is not empty",
    )
]  # fmt: skip
SAID = "no effect on integer weights"
C = pl.callbacks


@pytest.fixture(scope="module")
def plain_fit() -> dict[str, Tensor]:
    """Weights of a fit with nothing set."""
    return weights(fit()[0])


def optimizer(kind: Callable[..., Any], **options: Any) -> Callable[[], Net]:
    return lambda: Net(optimizers=lambda net: kind(net.parameters(), **options))


def scheduled(net: Net) -> Any:
    sgd = torch.optim.SGD(net.parameters(), 0.1)
    return {"optimizer": sgd, "lr_scheduler": torch.optim.lr_scheduler.StepLR(sgd, 1)}


class Clipping(Net):
    def configure_gradient_clipping(self, optimizer: Any, *args: Any, **kwargs: Any) -> None:
        assert all(p.grad is None for group in optimizer.param_groups for p in group["params"])
        super().configure_gradient_clipping(optimizer, *args, **kwargs)


# -- no effect -------------------------------------------------------------------------------------------------
SILENT: dict[str, dict[str, Any]] = {
    "precision=bf16-mixed": {"precision": "bf16-mixed"},
    "precision=16-mixed": {"precision": "16-mixed"},
    "precision=64-true": {"precision": "64-true"},
    "lr": {"net": optimizer(torch.optim.SGD, lr=100.0)},
    "Adam": {"net": optimizer(torch.optim.Adam, lr=0.01)},
    "deterministic": {"deterministic": True},
    "detect_anomaly": {"detect_anomaly": True},
    "profiler": {"profiler": "simple"},
    "inference_mode=False": {"inference_mode": False},
    "EarlyStopping that does not stop": {
        "callbacks": [C.EarlyStopping("val_loss", patience=9)], "net": Validated, "val": loader(),
    },
}  # fmt: skip
NAMED: dict[str, tuple[dict[str, Any], str]] = {
    "clipping by norm": ({"gradient_clip_val": 1e-8, "net": Clipping}, "gradient_clip_val (mu bounds every update)"),
    "clipping by value": (
        {"gradient_clip_val": 1e-8, "gradient_clip_algorithm": "value", "net": Clipping}, "gradient_clip_val",
    ),
    "weight_decay": ({"net": optimizer(torch.optim.SGD, lr=0.1, weight_decay=0.1)}, "weight_decay (weight_decay of"),
    "AdamW": ({"net": optimizer(torch.optim.AdamW)}, "weight_decay"),
    "momentum": ({"net": optimizer(torch.optim.SGD, lr=0.1, momentum=0.9)}, "momentum (momentum of the scheme"),
    "scheduler": ({"net": lambda: Net(optimizers=scheduled)}, "lr_scheduler (mu and mu_at"),
}  # fmt: skip


@pytest.mark.parametrize("name", SILENT)
def test_what_leaves_every_integer_as_it_is(name: str, plain_fit: Any, caplog: Any) -> None:
    caplog.set_level(logging.INFO)
    net, *_ = fit(**SILENT[name])
    assert differing(net.float(), plain_fit) == []
    assert SAID not in caplog.text


@pytest.mark.parametrize("name", NAMED)
def test_what_has_no_effect_and_is_said_once(name: str, plain_fit: Any, caplog: Any) -> None:
    caplog.set_level(logging.INFO)
    options, words = NAMED[name]
    net, *_ = fit(**options)
    assert differing(net, plain_fit) == []
    said = [record.getMessage() for record in caplog.records if SAID in record.getMessage()]
    assert len(said) == 1
    assert words in said[0]


def test_a_scheme_with_float_weights_says_nothing_of_it(caplog: Any) -> None:
    caplog.set_level(logging.INFO)
    fit("tqt", net=NAMED["momentum"][0]["net"], max_epochs=1)
    assert SAID not in caplog.text


def test_a_gradient_scaler_scales_exponents_alone(plain_fit: Any) -> None:
    """What 16-mixed is on a GPU: a scaler refuses to step where no parameter has a gradient."""
    net, *_ = fit(plugins=[MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))])
    assert differing(net, plain_fit) == []
    # Beside float parameters the scaler works as ever: it grows.
    scaler, scales = torch.amp.GradScaler("cpu", growth_interval=2), []

    class Watching(Net):
        def on_before_optimizer_step(self, optimizer: Any) -> None:
            scales.append(scaler.get_scale())

    net, *_ = fit(net=Watching, plugins=[MixedPrecision("16-mixed", "cpu", scaler)], quant={"skip": ["body.5"]})
    assert on_grid(net)
    assert max(scales) > scales[0]


# -- acts ------------------------------------------------------------------------------------------------------
def test_accumulated_batches_are_one_update() -> None:
    net, run, _ = fit(accumulate_grad_batches=3)
    assert run.global_step == 4
    assert on_grid(net)
    scheduled_net, run, _ = fit(callbacks=[C.GradientAccumulationScheduler({0: 2, 1: 3})])
    assert run.global_step == 3 + 2
    assert on_grid(scheduled_net)


@pytest.mark.parametrize(("options", "steps"), [
    ({"overfit_batches": 1}, 2), ({"overfit_batches": 0.5}, 6), ({"fast_dev_run": True}, 1),
    ({"limit_train_batches": 3}, 6), ({"max_epochs": -1, "max_steps": 5}, 5),
], ids=str)  # fmt: skip
def test_short_runs_train_as_long_as_they_say(options: dict[str, Any], steps: int) -> None:
    net, run, _ = fit(**options)
    assert run.global_step == steps
    assert on_grid(net)


def test_early_stopping_stops() -> None:
    stop = C.EarlyStopping("val_loss", patience=0, min_delta=10.0)
    _, run, _ = fit(callbacks=[stop], net=Validated, val=loader(), max_epochs=9)
    assert run.current_epoch == 2


class Average(C.EMAWeightAveraging):  # type: ignore[name-defined, misc]
    """Sees what is validated."""

    def __init__(self, decay: float) -> None:
        super().__init__(decay=decay)
        self.validated: list[bool] = []

    def on_validation_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        codes = pl_module.body[0].lowbit_weight
        read = torch.round(codes.target().detach().double() * 2.0 ** -int(codes.exponent()))
        self.validated.append(torch.equal(read, codes.codes().double()))


def test_ema_validates_and_leaves_the_average_rounded_to_the_grid() -> None:
    plain_net, *_ = fit(net=Validated, val=loader())
    ema = Average(0.5)
    net, *_ = fit(callbacks=[ema], net=Validated, val=loader())
    assert ema.validated
    assert all(ema.validated)
    assert differing(net, plain_net)
    assert on_grid(net)
    # What computes is what the parameters hold.
    for _, q in quantizers(net):
        if isinstance(q, WeightCodes):
            held = torch.round(q.target().detach().double() * 2.0 ** -int(q.exponent()))
            assert torch.equal(q.codes().double(), held)
    averages = dict(ema._average_model.module.named_parameters())
    for name in ("body.0.weight", "body.5.weight"):
        layer = net.get_submodule(name.rpartition(".")[0])
        unit = 2.0 ** int(layer.lowbit_weight.exponent())
        limit = 127 * unit
        off = averages[name].detach().clamp(-limit, limit) - layer.weight.detach()
        assert off.abs().max() <= unit / 2


def test_ema_leaves_training_and_its_fraction_bits_alone() -> None:
    scheme = Niti(recipe="finetune", mu=0)
    plain_run = fit(scheme, net=Validated, val=loader())
    masters = {key: value.clone() for key, value in plain_run[2].rule.masters.items()}
    averaged = fit(scheme, callbacks=[Average(0.9)], net=Validated, val=loader())
    again = averaged[2].rule.masters
    assert [key for key, value in masters.items() if not torch.equal(value, again[key])] == []


def test_swa_leaves_the_average_rounded_to_the_grid() -> None:
    plain_net, *_ = fit(max_epochs=4)
    net, *_ = fit(callbacks=[C.StochasticWeightAveraging(swa_lrs=0.01, swa_epoch_start=1)], max_epochs=4)
    assert differing(net, plain_net)
    assert on_grid(net)
    x, y = images()
    with torch.no_grad():
        assert torch.isfinite(F.cross_entropy(plain(net.eval()(x)), y))


@pytest.mark.parametrize("scheme", [Niti(), Niti(recipe="finetune", momentum=4)], ids=["scratch", "finetune"])
def test_the_learning_rate_finder_leaves_no_trace(scheme: Niti, plain_fit: Any) -> None:
    finder = C.LearningRateFinder(num_training_steps=5, update_attr=False, early_stop_threshold=None)
    found, _, first = fit(scheme, callbacks=[finder])
    alone, _, second = fit(scheme)
    assert differing(found, alone) == []
    assert all(torch.equal(first.rule.masters[key], value) for key, value in second.rule.masters.items())
    # And what it looks for does not exist: the loss does not depend on the rate.
    assert len(set(finder.optimal_lr.results["lr"])) == 5  # type: ignore[union-attr]


def test_the_batch_size_finder_finds() -> None:
    torch.manual_seed(0)
    net = Validated()
    net.batch_size = 2  # type: ignore[assignment]
    net.train_dataloader = lambda: loader(batch=net.batch_size)  # type: ignore[method-assign, arg-type]
    net.val_dataloader = loader  # type: ignore[method-assign]
    trainer(QuantCallback(Niti()), C.BatchSizeFinder(max_trials=2, steps_per_trial=2)).fit(net)
    assert net.batch_size == 4  # type: ignore[comparison-overlap]
    assert on_grid(net)


class Checkpointed(Net):
    """``again`` None computes nothing again."""

    again: bool | None = None

    def forward(self, x: Tensor) -> Tensor:
        x = self.body[0](x)  # type: ignore[index]
        for layer in list(self.body)[1:5]:  # type: ignore[call-overload]
            x = layer(x) if self.again is None else checkpoint(layer, x, use_reentrant=self.again)
        y: Tensor = self.body[5](x)  # type: ignore[index]
        return y


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_gives_the_same_weights(reentrant: bool) -> None:
    again = type("Again", (Checkpointed,), {"again": reentrant})
    assert differing(fit(net=again)[0], fit(net=Checkpointed)[0]) == []


def test_manual_optimization_is_the_automatic_one(plain_fit: Any) -> None:
    class Manual(Net):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch: list[Tensor], batch_idx: int) -> None:  # type: ignore[override]
            optimizer = self.optimizers()
            optimizer.zero_grad()  # type: ignore[union-attr]
            self.manual_backward(F.cross_entropy(self(batch[0]), batch[1]))
            optimizer.step()  # type: ignore[union-attr]

    assert differing(fit(net=Manual)[0], plain_fit) == []


def test_a_raw_step_is_refused_at_the_end_of_the_epoch() -> None:
    class Raw(Net):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch: list[Tensor], batch_idx: int) -> None:  # type: ignore[override]
            optimizer = self.trainer.optimizers[0]
            self.manual_backward(F.cross_entropy(self(batch[0]), batch[1]))
            optimizer.step()

    with pytest.raises(ConfigError, match=r"body\.0.*never stepped.*self\.optimizers\(\)"):
        fit(net=Raw)


def test_a_checkpoint_in_the_middle_of_anything_goes_on(tmp_path: Path) -> None:
    saver = C.ModelCheckpoint(tmp_path, "{step}", save_top_k=-1, every_n_train_steps=1)
    options: dict[str, Any] = {"accumulate_grad_batches": 2, "precision": "bf16-mixed"}
    whole, *_ = fit(callbacks=[saver], enable_checkpointing=True, **options)
    again, *_ = fit(ckpt_path=tmp_path / "step=4.ckpt", **options)
    assert differing(whole, again) == []


# -- refused ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("options", "words"), [
    ({"precision": "16-true"}, "precision='16-true'"), ({"precision": "bf16-true"}, "precision='bf16-true'"),
    ({"callbacks": [C.ModelPruning("l1_unstructured", amount=0.5)]}, "ModelPruning.*integer weights in place.*mask"),
    ({"net": lambda: Net(optimizers=lambda net: torch.optim.LBFGS(net.parameters()))}, "LBFGS"),
], ids=["16-true", "bf16-true", "pruning", "lbfgs"])  # fmt: skip
def test_refusals(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        fit(**options)


@pytest.mark.parametrize("callback", [C.EMAWeightAveraging(), C.StochasticWeightAveraging(0.1)], ids=["EMA", "SWA"])
def test_averages_before_ours_are_refused(callback: Any) -> None:
    run = trainer(callback, QuantCallback(Niti()))
    with pytest.raises(ConfigError, match=r"took the float model.*Put QuantCallback before it"):
        run.fit(Net(), loader())


def test_synchronized_batch_norms_are_refused() -> None:
    run = trainer(sync_batchnorm=True, strategy="ddp")  # a fit would start the processes' group in this one
    with pytest.raises(ConfigError, match="sync_batchnorm=True"):
        check_trainer(run)


def test_a_later_start_trains_in_float_until_then() -> None:
    net, _, callback = fit(quant={"start": "3 steps"})
    assert callback.schedule.begin == 3
    assert switch_of(net).started
    assert on_grid(net)

"""Bad input is refused by name, with what was found, what was expected and the next step; nothing is lost by it."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, StochasticWeightAveraging
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_lowbit.callbacks.calibrate import Calibrate
from lightning_lowbit.callbacks.fold import FoldBatchNorm
from lightning_lowbit.callbacks.freeze import Freeze
from lightning_lowbit.callbacks.quant import QuantCallback
from lightning_lowbit.errors import ConfigError, UnsupportedModelError
from lightning_lowbit.modules.base import low_bit_modules
from lightning_lowbit.plugins import checks
from lightning_lowbit.plugins.checkpoint import load_from_checkpoint
from lightning_lowbit.schemes import convert, resolve
from lightning_lowbit.schemes.tqt import Tqt

REFUSALS = (ConfigError, UnsupportedModelError)


class Net(pl.LightningModule):
    """Four convolutions, added in pairs; ``crossed`` pairs them the other way, on the same sites."""

    def __init__(self, width: int = 4, extra: bool = False, crossed: bool = False) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.conv1 = nn.Conv2d(1, width, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(width)
        self.branches = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in range(4))
        self.fc = nn.Linear(width, 2)
        self.extra = nn.Linear(width, 2) if extra else None
        self.crossed = crossed

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.bn1(self.conv1(x)))
        a, b, c, d = (self.branches[i](x) for i in range(4))
        if self.crossed:
            b, c = c, b
        y: Tensor = self.fc(((a + b) + (c + d)).mean((2, 3)))
        return y

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.01)


class WithLbfgs(Net):
    def configure_optimizers(self) -> Any:
        return torch.optim.LBFGS(self.parameters())


class Nothing(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return (batch[0] * self.scale).mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.01)


class Doubled(nn.Conv2d):
    def forward(self, input: Tensor) -> Tensor:  # noqa: A002  # torch's name
        return 2 * super().forward(input)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2)
        self.out = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.out(self.attention(x, x, x)[0])
        return y


class SaveAtTheEnd(pl.Callback):
    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        trainer.save_checkpoint(self.path)


def loader(
    samples: int = 8, batch: int = 4, value: float | None = None, drop_last: bool = False
) -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(samples, 1, 6, 6, generator=generator)
    if value is not None:
        x[0, 0, 0, 0] = value
    return DataLoader(TensorDataset(x, torch.arange(samples) % 2), batch_size=batch, drop_last=drop_last)


def trainer(*callbacks: Any, **options: Any) -> pl.Trainer:
    silent = {
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
    }
    return pl.Trainer(
        **{"accelerator": "cpu", "max_epochs": 1, "callbacks": list(callbacks), **silent, **options}
    )


def net(**options: Any) -> Net:
    torch.manual_seed(0)
    return Net(**options)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Checkpoints: float, low-bit, one of a future format, cut ones, and float files that do not fit."""
    folder = tmp_path_factory.mktemp("files")
    names = (
        "float.ckpt", "lowbit.ckpt", "future.ckpt", "unknown.ckpt", "cut.ckpt", "begun.ckpt", "empty.ckpt",
        "keys.pt", "numbers.pt", "module.pt", "absent.pt",
    )  # fmt: skip
    path = {name: folder / name for name in names}
    trainer(SaveAtTheEnd(path["float.ckpt"])).fit(net(), loader())
    trainer(QuantCallback(Tqt(), start=0), SaveAtTheEnd(path["lowbit.ckpt"])).fit(net(), loader())
    whole = path["lowbit.ckpt"].read_bytes()
    path["cut.ckpt"].write_bytes(whole[: len(whole) // 2])
    path["begun.ckpt"].write_bytes(whole[:10])
    path["empty.ckpt"].write_bytes(b"")
    for name, changes in (
        ("future.ckpt", {"format": 99, "version": "9.0"}),
        ("unknown.ckpt", {"scheme": "tqtt"}),
    ):
        content = torch.load(path["lowbit.ckpt"])
        content["lightning_lowbit"].update(changes)
        torch.save(content, path[name])
    state = net().state_dict()
    state["stem.weight"] = state.pop("conv1.weight")
    state["fc.weight"] = torch.zeros(3, 4)
    torch.save(state, path["keys.pt"])
    torch.save({"epoch": 1}, path["numbers.pt"])
    torch.save(net(), path["module.pt"])
    return path


def refusal(call: Callable[[], Any]) -> str:
    with pytest.raises(REFUSALS) as caught:
        call()
    return str(caught.value)


def fit_is_refused(
    module: pl.LightningModule, run: pl.Trainer, *words: str, data: Any = None, **fit: Any
) -> None:
    """The fit is refused with all ``words``; module and trainer are as they were, and a correct fit works."""
    attributes = set(module.__dict__) | {"forward"}  # what the conversion wrote is no patch
    weights = {key: value.clone() for key, value in module.state_dict().items()}
    plugin = run.strategy.precision_plugin
    message = refusal(lambda: run.fit(module, data or loader(), **fit))
    assert [word for word in words if word not in message] == [], message
    assert set(module.__dict__) <= attributes
    assert run.strategy.precision_plugin is plugin
    copy.deepcopy(module)
    now = module.state_dict()
    assert [key for key in weights if not torch.equal(now[key].nan_to_num(), weights[key].nan_to_num())] == []
    if isinstance(module, Net) and all(bool(torch.isfinite(w).all()) for w in weights.values()):
        skip = ["extra"] if module.extra is not None else []
        correct = trainer(
            QuantCallback(next((m.scheme for _, m in low_bit_modules(module)), "tqt"), skip=skip, start=0)
        )
        correct.fit(module.train(), loader())
        assert all(m.switch.started for _, m in low_bit_modules(module))


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
def test_what_is_no_moment_is_refused_with_the_four_ways_to_give_one(
    take: Any, name: str, moment: Any
) -> None:
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
        ({"skip": ["*"]}, ["Net: nothing to convert", "6 layers, all left out by skip= and include="]),
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
    assert refusal(lambda: convert(nn.Sequential(Doubled(1, 2, 3)), "tqt")).startswith(
        "Sequential: nothing to convert"
    )


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
    fit_is_refused(net(extra=True), trainer(QuantCallback(start=0)), *words)


# -- trainers and neighbors ----------------------------------------------------------------------------------
@pytest.mark.parametrize("neighbor", [EMAWeightAveraging, lambda: StochasticWeightAveraging(1e-2)])
def test_a_callback_that_copies_the_model_must_come_after_ours(neighbor: Any) -> None:
    other = neighbor()
    name = type(other).__name__
    fit_is_refused(
        net(), trainer(other, QuantCallback(start=0)), name, "Put QuantCallback before it in the list"
    )


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


@pytest.mark.parametrize(
    "name", ["FSDPStrategy", "DeepSpeedStrategy", "ModelParallelStrategy", "XLAStrategy"]
)
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
    fit_is_refused(
        net(), trainer(QuantCallback(start=0), Freeze("90 steps")), "freeze_ranges='90 steps'", "2 steps"
    )


@pytest.mark.parametrize("cut", [{"fast_dev_run": True}, {"overfit_batches": 1}])
def test_a_run_that_is_cut_on_purpose_only_warns(cut: dict[str, Any]) -> None:
    module = net()
    with pytest.warns(UserWarning, match="start=5 means step"):
        trainer(QuantCallback(start=5), **cut).fit(module, loader())


# -- data ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_values_that_are_not_finite_are_refused_by_the_first_site_that_saw_them(value: float) -> None:
    words = ["conv1.lowbit_input: 1 ", "NaN or infinite", "calibration batches"]
    fit_is_refused(net(), trainer(QuantCallback(start=0)), *words, data=loader(value=value))


def test_weights_that_are_not_finite_are_refused() -> None:
    module = net()
    module.branches[2].weight.data[0, 0, 0, 0] = math.inf  # type: ignore[union-attr, index]  # a convolution
    words = ["branches.2.", "NaN or infinite", "weights of the layers before it"]
    fit_is_refused(module, trainer(QuantCallback(start=0)), *words)


def test_calibration_without_a_batch_is_refused() -> None:
    none = Calibrate(loader(samples=2, drop_last=True))
    words = ["Net: calibration got no batch", "drop_last", "Calibrate(dataloader=...)"]
    fit_is_refused(net(), trainer(QuantCallback(start=0), none), *words)


# -- files ---------------------------------------------------------------------------------------------------
def test_a_float_checkpoint_does_not_resume(files: dict[str, Path]) -> None:
    path = files["float.ckpt"]
    words = [str(path), "is a float checkpoint", "QuantCallback(init_from=...)"]
    fit_is_refused(net(), trainer(QuantCallback(start=0)), *words, ckpt_path=path)


@pytest.mark.parametrize("name", ["cut.ckpt", "begun.ckpt", "empty.ckpt"])
@pytest.mark.parametrize("way", ["ckpt_path", "init_from", "load_from_checkpoint"])
def test_a_file_that_is_cut_off_is_refused_with_its_size(files: dict[str, Path], way: str, name: str) -> None:
    path = files[name]
    words = [str(path), "cut off", f"{path.stat().st_size} bytes"]
    if way == "ckpt_path":
        fit_is_refused(net(), trainer(QuantCallback(start=0)), *words, ckpt_path=path)
    elif way == "init_from":
        fit_is_refused(net(), trainer(QuantCallback(init_from=str(path))), *words)
    else:
        message = refusal(lambda: load_from_checkpoint(Net, path))
        assert [word for word in words if word not in message] == [], message


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("keys.pt", ["nothing was loaded", "fc.weight (3, 4) for (2, 4)", "missing in the file: conv1.weight", "stem.weight"]),
        ("numbers.pt", ["no tensors found", "'state_dict'"]),
        ("module.pt", ["weights_only=True", "torch.save(module.state_dict(), path)"]),
        ("absent.pt", ["no such file"]),
    ],
)  # fmt: skip
def test_init_from_a_file_that_does_not_fit_loads_nothing(
    files: dict[str, Path], name: str, words: list[str]
) -> None:
    path = files[name]
    fit_is_refused(net(), trainer(QuantCallback(init_from=str(path))), f"init_from='{path}'", *words)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"width": 6}, ["conv1.weight", "(4, 1, 3, 3)", "(6, 1, 3, 3)"]),
        ({"extra": True}, ["extra.", "only here"]),
        (
            {"crossed": True},
            ["branches.0.lowbit_output: tied to branches.", "differs from the one that was trained"],
        ),
    ],
)
def test_a_low_bit_checkpoint_of_another_network_is_refused(
    files: dict[str, Path], options: dict[str, Any], words: list[str]
) -> None:
    fit_is_refused(net(**options), trainer(QuantCallback(start=0)), *words, ckpt_path=files["lowbit.ckpt"])


def test_a_low_bit_checkpoint_without_its_trainer_is_held_to_its_ties(files: dict[str, Path]) -> None:
    message = refusal(lambda: load_from_checkpoint(Net, files["lowbit.ckpt"], crossed=True))
    assert "branches." in message
    assert "differs from the one that was trained" in message


def test_a_checkpoint_of_other_options_names_what_differs(files: dict[str, Path]) -> None:
    run = trainer(QuantCallback(Tqt(act_bits=4), start=0))
    words = ["act_bits", "trained with", "'tqt'", "options from the checkpoint"]
    fit_is_refused(net(), run, *words, ckpt_path=files["lowbit.ckpt"])


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("future.ckpt", ["format 99", "lightning-lowbit 9.0", "reads format 1", "Install"]),
        ("unknown.ckpt", ["no scheme is called 'tqtt'", "Did you mean 'tqt'?"]),
    ],
)
def test_a_checkpoint_from_elsewhere_says_what_is_needed(
    files: dict[str, Path], name: str, words: list[str]
) -> None:
    fit_is_refused(net(), trainer(QuantCallback(start=0)), *words, ckpt_path=files[name])
    message = refusal(lambda: load_from_checkpoint(Net, files[name]))
    assert [word for word in words if word not in message] == [], message

"""What BinaryMonitor says of real runs, against copies of the weights and inputs; and that it changes no bit."""

from __future__ import annotations

import csv
import logging
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from launch import run_script
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import DDPStrategy
from plugins.lifecycle_nets import QUIET, assert_equal_states, random_state, states, trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_lowbit import Bnn, QuantCallback, Tqt
from lightning_lowbit.callbacks.binary_monitor import BinaryMonitor
from lightning_lowbit.errors import ConfigError

pytestmark = QUIET
BATCH, STEPS = 8, 6  # an epoch
BINARY = ("conv2", "fc1")


class Net(pl.LightningModule):
    """Two binary layers between two float ones; keeps what their signs are taken of."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.conv2, self.bn2 = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.drop = nn.Dropout(0.3)
        self.fc1, self.bn3, self.fc2 = nn.Linear(144, 16), nn.BatchNorm1d(16), nn.Linear(16, 3)
        self.inputs: list[dict[str, Tensor]] = []
        self.fails = False

    def forward(self, x: Tensor) -> Tensor:
        a = self.bn1(self.conv1(x))
        b = self.drop(self.bn2(self.conv2(a))).flatten(1)
        if torch.is_grad_enabled():
            self.inputs.append({"conv2": a.detach(), "fc1": b.detach()})
        y: Tensor = self.fc2(self.bn3(self.fc1(b)))
        return y

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss = nn.functional.cross_entropy(self(batch[0]), batch[1])
        if self.fails and len(self.inputs) == 4:  # calibration is not counted
            raise RuntimeError("on purpose")
        return loss

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self(batch[0])

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), 0.02)


class Weights(pl.Callback):
    """Copies of the weights before the first step and behind each."""

    def __init__(self) -> None:
        self.copies: list[dict[str, Tensor]] = []

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        if not self.copies:
            self.keep(pl_module)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        if trainer.global_step == len(self.copies):
            self.keep(pl_module)

    def keep(self, module: Any) -> None:
        self.copies.append({path: module.get_submodule(path).weight.detach().clone() for path in BINARY})


class History(pl.Callback):
    """The monitor's values behind each batch, by the step that they are of."""

    def __init__(self, monitor: BinaryMonitor) -> None:
        self.monitor = monitor
        self.values: dict[int, dict[str, dict[str, float]]] = {}

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        if self.monitor.step is not None:
            self.values[self.monitor.step] = self.monitor.values


def net(seed: int = 0) -> Net:
    torch.manual_seed(seed)
    return Net()


def data(batches: int = STEPS) -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(batches * BATCH, 1, 6, 6, generator=generator)
    x[:, :, :2] = 0  # exact zeros
    return DataLoader(TensorDataset(x, torch.randint(0, 3, (len(x),), generator=generator)), BATCH)


def fit(folder: Path, module: Net, *callbacks: Any, ckpt_path: Any = None, **options: Any) -> Any:
    run = trainer(folder, *callbacks, **{"log_every_n_steps": 1, **options})
    torch.manual_seed(1)
    run.fit(module, data(), data(2), ckpt_path=ckpt_path)
    return run


def expected_inputs(x: Tensor) -> dict[str, Any]:
    shares = {"zeros": (x == 0).float().mean(), "outside": (x.abs() > 1).float().mean()}
    return {**{name: pytest.approx(float(share)) for name, share in shares.items()}, "nan": 0}


def expected_weights(before: Tensor, after: Tensor, steps: int) -> dict[str, Any]:
    flips = float(((before < 0) != (after < 0)).float().mean()) / steps
    return {"flips": pytest.approx(flips), "clipped": pytest.approx(float((after.abs() == 1).float().mean()))}


@pytest.mark.parametrize("first", [False, True], ids=["behind QuantCallback", "before it"])
@pytest.mark.parametrize("every", [1, 4])
def test_values_are_those_of_the_weights_and_of_the_batch(tmp_path: Path, first: bool, every: int) -> None:
    module, weights, monitor = net(), Weights(), BinaryMonitor(every)
    history, quant = History(monitor), QuantCallback(Bnn(latent_std=0.7), start=0)
    own = [monitor, quant] if first else [quant, monitor]
    fit(tmp_path, module, *own, weights, history, val_check_interval=2)
    assert list(history.values) == list(range(every, 2 * STEPS + 1, every))
    assert len(module.inputs) == 2 * STEPS
    for step, values in history.values.items():
        assert values == {
            path: {
                **expected_weights(weights.copies[step - every][path], weights.copies[step][path], every),
                **expected_inputs(module.inputs[step - 1][path]),
            }
            for path in BINARY
        }
    assert all(0 < history.values[4][path][name] < 1 for path in BINARY for name in ("flips", "clipped", "outside"))
    assert history.values[4]["fc1"]["zeros"] > 0.2  # dropout leaves them


@pytest.mark.parametrize("every", [1, 5])
@pytest.mark.parametrize("scheme", [Bnn(), Bnn(stochastic="both", shift=True), Bnn(update="bop", bop_threshold=1e-6)],
                         ids=["plain", "stochastic", "bop"])  # fmt: skip
def test_training_is_the_same_with_and_without(tmp_path: Path, scheme: Bnn, every: int) -> None:
    plain, watched = net(), net()
    fit(tmp_path, plain, QuantCallback(scheme, start=0))
    generators = random_state()
    run = fit(tmp_path, watched, BinaryMonitor(every), QuantCallback(scheme, start=0))
    assert_equal_states(states(watched), states(plain))
    assert random_state() == generators
    assert ("clipped/conv2" in run.callback_metrics) is (scheme.update == "latent")


def test_shifts_are_part_of_what_signs_are_taken_of(tmp_path: Path) -> None:
    class Shift(pl.Callback):
        def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
            shifts.append(pl_module.conv2.lowbit_input.shift.detach().clone())

        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            pl_module.conv2.lowbit_input.shift.data += 0.5

    shifts: list[Tensor] = []
    module, monitor = net(), BinaryMonitor(4)
    fit(tmp_path, module, QuantCallback(Bnn(shift=True), start=0), monitor, Shift(), max_epochs=1)
    x = module.inputs[3]["conv2"] + shifts[3].reshape(-1, 1, 1)
    assert monitor.values["conv2"].items() >= expected_inputs(x).items()


def rows(folder: Path) -> list[dict[str, str]]:
    (file,) = folder.rglob("metrics.csv")
    with file.open() as lines:
        return list(csv.DictReader(lines))


def test_a_logger_gets_them_at_the_step_of_their_batch(tmp_path: Path) -> None:
    monitor = BinaryMonitor(4)
    run = fit(tmp_path, net(), QuantCallback("bnn", start=0), monitor, logger=CSVLogger(tmp_path))
    logged = [row for row in rows(tmp_path) if row["flips/conv2"]]
    assert [int(row["step"]) for row in logged] == [3, 7, 11]  # counted from 0, as training_step's own values
    last = {f"{name}/{path}": value for path, row in monitor.values.items() for name, value in row.items()}
    assert {name.split("/")[0] for name in last} == {"flips", "clipped", "zeros", "outside", "nan"}
    assert {name: float(logged[-1][name]) for name in last} == pytest.approx(last)
    assert {name: float(run.callback_metrics[name]) for name in last} == pytest.approx(last)


def test_without_a_logger_it_says_so_once_and_prints_a_table(tmp_path: Path, caplog: Any) -> None:
    monitor = BinaryMonitor(6)
    with caplog.at_level(logging.INFO):
        fit(tmp_path, net(), QuantCallback("bnn", start=0), monitor)
    said = [record.message for record in caplog.records if "onitor" in record.message or "binary" in record.message]
    assert [message.split(";")[0].splitlines()[0] for message in said] == [
        "BinaryMonitor: the Trainer has no logger", "binary layers at step 12:",
    ]  # fmt: skip
    assert said[1] == monitor.table()
    conv2 = monitor.values["conv2"]
    lines = monitor.table().splitlines()
    assert lines[1].split() == ["layer", "flips", "per", "step", "clipped", "zeros", "outside"]
    assert lines[2].split()[:2] == ["conv2", f"{conv2['flips']:.1e}"]
    assert lines[2].split()[-2:] == [f"{100 * conv2['outside']:.2f}", "%"]
    assert lines[3].startswith("fc1 ")


def test_gradient_accumulation_counts_steps(tmp_path: Path) -> None:
    module, weights, monitor = net(), Weights(), BinaryMonitor(3)
    quant = QuantCallback(Bnn(latent_std=0.7), start=0)
    fit(tmp_path, module, quant, monitor, weights, accumulate_grad_batches=2, max_epochs=1)
    assert monitor.step == 3
    first = module.inputs[4]  # of the two batches that the third step adds up
    assert monitor.values == {
        path: {
            **expected_weights(weights.copies[0][path], weights.copies[3][path], 3),
            **expected_inputs(first[path]),
        }
        for path in BINARY
    }


@pytest.mark.parametrize("at", [4, 5])
def test_a_resumed_run_goes_on(tmp_path: Path, at: int) -> None:
    saver = ModelCheckpoint(tmp_path, "{step}", save_top_k=-1, every_n_train_steps=1)
    whole, resumed, weights = BinaryMonitor(4), BinaryMonitor(4), Weights()
    histories = History(whole), History(resumed)
    fit(tmp_path, net(), QuantCallback("bnn", start=0), whole, histories[0], weights, saver)
    file = tmp_path / f"step={at}.ckpt"
    assert not any("BinaryMonitor" in key for key in torch.load(file, weights_only=True)["callbacks"])
    fit(tmp_path, net(9), QuantCallback("bnn", start=0), resumed, histories[1], ckpt_path=file)
    assert list(histories[1].values) == [8, 12]
    assert histories[1].values[12] == histories[0].values[12]
    for path in BINARY:  # of the steps since it went on
        flips = expected_weights(weights.copies[at][path], weights.copies[8][path], 8 - at)
        assert histories[1].values[8][path].items() >= flips.items()


def test_float_weights_of_the_first_stage_have_no_flips(tmp_path: Path) -> None:
    monitor, weights = BinaryMonitor(2), Weights()
    history = History(monitor)
    fit(tmp_path, net(), monitor, QuantCallback(Bnn(weights_at="5 steps"), start=0), history, weights, max_epochs=1)
    names = {step: {name for row in values.values() for name in row} for step, values in history.values.items()}
    inputs = {"zeros", "outside", "nan"}
    assert names == {2: inputs, 4: inputs, 6: inputs | {"flips", "clipped"}}
    for path in BINARY:  # of one step: signs were none before
        flips = expected_weights(weights.copies[5][path], weights.copies[6][path], 1)["flips"]
        assert monitor.values[path]["flips"] == flips
    monitor.values = history.values[4]
    assert monitor.table().splitlines()[1].split() == ["layer", "zeros", "outside"]


def test_a_float_start_has_nothing_to_show(tmp_path: Path) -> None:
    monitor, module = BinaryMonitor(2), net()
    history = History(monitor)
    fit(tmp_path, module, monitor, QuantCallback("bnn", start="5 steps"), history, max_epochs=1)
    assert {step: bool(values) for step, values in history.values.items()} == {6: True}
    for path in BINARY:  # calibration and two validations passed by in the same batch
        assert monitor.values[path].items() >= expected_inputs(module.inputs[5][path]).items()
    monitor.values = {}
    assert monitor.table() == "BinaryMonitor(every_n_steps=2): no such step came with binary layers."


def test_nan_is_counted(tmp_path: Path) -> None:
    class Spoil(pl.Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            if batch_idx == 1:
                pl_module.bn1.bias.data[0] = float("nan")

    monitor = BinaryMonitor(2)
    fit(tmp_path, net(), QuantCallback("bnn", start=0), monitor, Spoil(), max_steps=2)
    assert monitor.values["conv2"]["nan"] == BATCH * 36
    assert monitor.table().splitlines()[1].split()[-1] == "NaN"
    assert monitor.table().splitlines()[2].split()[-1] == str(BATCH * 36)


def test_several_optimizers_step_in_a_batch(tmp_path: Path) -> None:
    class Two(Net):
        automatic_optimization = False

        def configure_optimizers(self) -> Any:
            groups = [*self.conv1.parameters(), *self.conv2.parameters()], [*self.fc1.parameters()]
            return [torch.optim.Adam(group, 0.02) for group in groups]

        def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
            for optimizer in self.optimizers():
                optimizer.zero_grad()
            self.manual_backward(nn.functional.cross_entropy(self(batch[0]), batch[1]))
            for optimizer in self.optimizers():
                optimizer.step()

    torch.manual_seed(0)
    monitor, module = BinaryMonitor(5), Two()
    history = History(monitor)
    module.automatic_optimization = False
    fit(tmp_path, module, QuantCallback("bnn", start=0), monitor, history, max_epochs=1)
    assert list(history.values) == [6, 10]  # twelve steps in six batches
    assert all(len(row) == 5 for values in history.values.values() for row in values.values())


class Watch(pl.Callback):
    """How many hooks the inputs' quantizers have while a batch runs."""

    def __init__(self) -> None:
        self.hooks: list[int] = []

    def on_before_backward(self, trainer: Any, pl_module: Any, loss: Any) -> None:
        self.hooks.append(hooks(pl_module))


def hooks(module: Any) -> int:
    return sum(len(module.get_submodule(path).lowbit_input._forward_pre_hooks) for path in BINARY)


def test_hooks_stand_on_the_measured_batches_alone(tmp_path: Path) -> None:
    watch, module = Watch(), net()
    fit(tmp_path, module, QuantCallback("bnn", start=0), BinaryMonitor(4), watch)
    assert watch.hooks == [0, 0, 0, 2] * 3
    assert hooks(module) == 0


def test_an_exception_leaves_no_hook(tmp_path: Path) -> None:
    module = net()
    module.fails = True
    with pytest.raises(RuntimeError, match="on purpose"):
        fit(tmp_path, module, QuantCallback("bnn", start=0), BinaryMonitor(4))
    assert hooks(module) == 0


# What torch.compile provokes in torch itself.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_compiled_layers_lack_what_hooks_count(tmp_path: Path, caplog: Any) -> None:
    class Compile(pl.Callback):
        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            for path in BINARY:
                pl_module.get_submodule(path).compile(backend="eager")

    plain, watched, monitor = net(), net(), BinaryMonitor(1)
    fit(tmp_path, plain, QuantCallback("bnn", start=0), Compile(), max_epochs=1)
    torch._dynamo.reset()  # what was recorded without hooks would serve this network too
    with caplog.at_level(logging.INFO):
        fit(tmp_path, watched, QuantCallback("bnn", start=0), Compile(), monitor, max_epochs=1)
    assert_equal_states(states(watched), states(plain))
    assert [row.keys() for row in monitor.values.values()] == [{"flips", "clipped"}] * 2
    assert caplog.text.count("no input of a binary layer was seen in the batch of step 1") == 1
    assert caplog.text.count("runs past hooks") == 1


REFUSED = {
    "no QuantCallback": ([], r"Net has no low-bit layer, expected binary ones\. Add QuantCallback\('bnn'\)"),
    "another scheme": ([QuantCallback(Tqt(), start=0)], r"Net, converted by scheme 'tqt', has no binary layer\. Train"),
    "float by choice": (
        [QuantCallback(Bnn(first="int8"), start=0, skip=["conv2", "fc1"])],
        r"scheme 'bnn', has no binary layer; float are .*fc2 \(last layer, by last='float'\).*or leave BinaryMonitor",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_network_without_binary_layers_is_refused(tmp_path: Path, case: str) -> None:
    callbacks, message = REFUSED[case]
    with pytest.raises(ConfigError, match=message):
        fit(tmp_path, net(), BinaryMonitor(), *callbacks)


def test_the_interval_is_checked() -> None:
    with pytest.raises(ConfigError, match=r"BinaryMonitor\(every_n_steps=0\): expected at least 1"):
        BinaryMonitor(0)


def on_two_ranks(folder: Path) -> None:
    """Run in a script of its own: each rank has other images, and saves what its layers saw."""
    strategy = DDPStrategy(process_group_backend="gloo", timeout=timedelta(seconds=60))
    monitor, module = BinaryMonitor(2), net()
    run = trainer(folder, QuantCallback("bnn", start=0), monitor, devices=2, strategy=strategy, max_epochs=1)
    run.fit(module, data())
    torch.save((monitor.step, monitor.values, module.inputs), folder / f"{run.global_rank}.pt")


def test_processes_count_together(tmp_path: Path) -> None:
    run_script(Path(__file__), tmp_path, ranks=2)
    (step, values, a), (other_step, other_values, b) = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert step == other_step == 2
    assert values == other_values
    for path in BINARY:
        x, y = a[step - 1][path], b[step - 1][path]
        assert not torch.equal(x, y)
        assert values[path].items() >= expected_inputs(torch.cat([x, y])).items()


if __name__ == "__main__":
    on_two_ranks(Path(sys.argv[1]))

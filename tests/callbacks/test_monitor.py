"""What QuantMonitor says of real runs, against what stood before and behind each quantizer; it changes no bit."""

from __future__ import annotations

import copy
import csv
import logging
import math
import sys
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from launch import run_script
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.strategies import DDPStrategy
from plugins.lifecycle_nets import QUIET, assert_equal_states, loader, random_state, seeded_net, states, trainer
from torch import Tensor

from lightning_lowbit import Bnn, Jacinto, QuantCallback, Tqt, convert
from lightning_lowbit.callbacks.monitor import QuantMonitor
from lightning_lowbit.callbacks.monitor_sites import METRICS, WatchedSite, computed, find_sites
from lightning_lowbit.errors import ConfigError

pytestmark = QUIET
SITE, WEIGHT = "body.relu1.output", "body.conv2.weight"
STEPS = 6  # an epoch


class Witness(pl.Callback):
    """What came in at SITE and went out, the weight, and a threshold's gradient, by step."""

    def __init__(self) -> None:
        self.seen: dict[int, list[tuple[Tensor, Tensor]]] = {}
        self.weights: dict[int, Any] = {}
        self.gradients: dict[int, float] = {}

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        def hook(quantizer: Any, args: Any, output: Tensor) -> None:
            if torch.is_grad_enabled():
                step = trainer.fit_loop.epoch_loop._batches_that_stepped + 1
                self.seen.setdefault(step, []).append((args[0].detach().relu(), output.detach()))

        self.handle = pl_module.body.relu1.lowbit_output.register_forward_hook(hook)

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        step = trainer.fit_loop.epoch_loop._batches_that_stepped + 1
        gradient = pl_module.body.relu1.lowbit_output.log2_t.grad
        self.gradients[step] = 0.0 if gradient is None else abs(float(gradient))

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        layer = copy.deepcopy(pl_module.body.conv2).eval()
        layer.norm.eval()
        with torch.no_grad():
            x = layer.in_evaluation()[0]
            y = layer.lowbit_weight.quantize(x)
        step = trainer.fit_loop.epoch_loop._batches_that_stepped + 1
        self.weights[step] = x, y, layer.lowbit_weight.grid()

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self.handle.remove()


class History(pl.Callback):
    """The monitor's values behind each batch, by the step that they are of."""

    def __init__(self, monitor: QuantMonitor) -> None:
        self.monitor = monitor
        self.values: dict[int, dict[str, dict[str, float]]] = {}
        self.summaries: dict[int, dict[str, float]] = {}

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        if self.monitor.step is not None:
            self.values[self.monitor.step] = self.monitor.values
            self.summaries[self.monitor.step] = self.monitor.summary


class Widen(pl.Callback):
    """SITE's range becomes four times as wide in step 3."""

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == 2:
            pl_module.body.relu1.lowbit_output.log2_t.data += 2


class Snapshots(pl.Callback):
    """The whole state behind each batch, and the generators."""

    def __init__(self) -> None:
        self.states: list[dict[str, Tensor]] = []
        self.generators: list[Any] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        self.states.append(states(pl_module))
        self.generators.append(random_state())


def fit(
    folder: Path, *callbacks: Any, seed: int = 0, lr: float = 0.05, ckpt_path: Any = None, **options: Any
) -> tuple[Any, Any]:
    module = seeded_net(seed=seed, lr=lr)
    run = trainer(folder, *callbacks, **{"max_epochs": 1, **options})
    torch.manual_seed(1)
    run.fit(module, loader(), loader(samples=8), ckpt_path=ckpt_path)
    return run, module


def tqt(**options: Any) -> QuantCallback:
    return QuantCallback(Tqt(freeze_thresholds=None, **options), start=0, evaluate=False)


def decibels(x: Tensor, y: Tensor) -> Any:
    x, y = x.double(), y.double()
    return pytest.approx(float(10 * torch.log10((x**2).sum() / ((x - y) ** 2).sum())))


@pytest.mark.parametrize("first", [False, True], ids=["behind QuantCallback", "before it"])
def test_values_are_those_of_the_batch_and_of_the_weight(tmp_path: Path, first: bool) -> None:
    witness, monitor = Witness(), QuantMonitor(2)
    history = History(monitor)
    quant = tqt(operand_bits=4, weight_bits=5)
    fit(tmp_path, *([monitor, quant] if first else [quant, monitor]), Widen(), witness, history)
    assert list(history.values) == [2, 4, 6]
    for step, rows in history.values.items():
        row, ((x, y),) = rows[SITE], witness.seen[step]
        unit = 2.0 ** row["exponent"]
        assert row["sqnr"] == decibels(x, y)
        assert row["saturation"] == pytest.approx(float(((x / unit).round() > 15).float().mean()))
        assert row["dead_bits"] == 4 - int((y / unit).max()).bit_length()
        assert row["threshold_grad"] == pytest.approx(witness.gradients[step])
        x, y, grid = witness.weights[step]
        assert rows[WEIGHT]["sqnr"] == decibels(x, y)
        assert rows[WEIGHT]["exponent"] == grid.exponent
        if step > 2:
            before = witness.weights[step - 2]
            changed = (y / grid.step) != (before[1] / before[2].step)
            assert rows[WEIGHT]["flips"] == pytest.approx(float(changed.float().mean()))
    first_row, widened = history.values[2][SITE], history.values[4][SITE]
    assert first_row["saturation"] > 0
    assert first_row["dead_bits"] == 0
    assert {"drift", "flips"}.isdisjoint(history.values[2][WEIGHT])
    assert widened["drift"] == 2
    assert widened["dead_bits"] > 0
    rows, summary = history.values[4].values(), history.summaries[4]
    assert summary["sqnr_min"] == min(row["sqnr"] for row in rows if "sqnr" in row)
    assert summary["drift_max"] == 2
    assert summary["flips_mean"] == pytest.approx(sum(row.get("flips", 0) for row in rows) / 3)
    for name in ("saturation", "dead_bits"):
        assert summary[f"{name}_max"] == max(row[name] for row in rows)


@pytest.mark.parametrize("scheme", ["bnn", "bnn ends", "f8net", "jacinto", "niti", "tqt", "wageubn"])
def test_training_is_the_same_with_and_without(tmp_path: Path, scheme: str, caplog: Any) -> None:
    monitor, asked = QuantMonitor(2), Bnn(first="int8", last="int8") if scheme == "bnn ends" else scheme
    plain, watched = Snapshots(), Snapshots()
    fit(tmp_path, QuantCallback(asked, start=0, evaluate=False), plain)
    with caplog.at_level(logging.INFO):
        run, _ = fit(tmp_path, monitor, QuantCallback(asked, start=0, evaluate=False), watched)
    assert len(plain.states) == len(watched.states) == STEPS
    for before, after in zip(plain.states, watched.states, strict=True):
        assert_equal_states(after, before)
    assert watched.generators == plain.generators
    found = {metric for row in monitor.values.values() for metric in row}
    signs = {"sqnr", "dead_bits", "exponent", "drift"} if scheme == "bnn" else set()
    untrained = set() if scheme == "tqt" else {"threshold_grad"}
    untrained |= set() if scheme in ("f8net", "jacinto", "tqt") else {"log2_t"}
    assert found == set(METRICS) - signs - untrained
    if scheme not in ("bnn", "bnn ends"):
        assert all("exponent" in row for row in monitor.values.values())
    assert all("flips" in row for name, row in monitor.values.items() if name.endswith(".weight"))
    assert {f"lowbit/{name}/{metric}" for name, row in monitor.values.items() for metric in row} <= {
        *run.callback_metrics
    }
    told = [message for message in caplog.messages if message.startswith("QuantMonitor")]
    assert len(told) == {"bnn": 1, "bnn ends": 1, "niti": 2}.get(scheme, 0)  # once, though it measured three times
    if scheme == "bnn":
        what = "QuantMonitor: sqnr, dead_bits, exponent, drift left out (of signs there are none)"
        assert told == [f"{what} for body.conv2.input, body.conv2.weight."]
    if scheme == "niti":
        assert told[0].endswith("holds the codes) for body.conv1.weight, body.conv2.weight, body.fc.weight.")
        assert monitor.values["body.conv1.accumulator"].keys() == {"saturation", "dead_bits", "exponent", "drift"}
        assert monitor.values["body.conv1.input"]["sqnr"] > 35


def test_thresholds_are_those_that_training_moves(tmp_path: Path) -> None:
    found: dict[str, Any] = {}
    for scheme in ("tqt", "f8net", "jacinto"):
        monitor = QuantMonitor(STEPS, metrics=["log2_t", "exponent"])
        _, module = fit(tmp_path, QuantCallback(scheme, start=0, evaluate=False), monitor)
        found[scheme] = monitor.values, module.body
    rows, body = found["tqt"]
    assert rows[SITE]["log2_t"] == pytest.approx(float(body.relu1.lowbit_output.log2_t.detach()))
    rows, body = found["jacinto"]
    clips = body.relu1.lowbit_output.clips
    assert rows[SITE]["log2_t"] == pytest.approx(float(clips.max().log2()))
    assert math.ceil(rows[SITE]["log2_t"]) - 8 == rows[SITE]["exponent"]  # unsigned codes of eight bits
    rows, body = found["f8net"]
    alpha = float(body.conv2.lowbit_input.alpha.detach())
    assert rows["body.conv2.input"]["log2_t"] == pytest.approx(math.log2(abs(alpha)))
    assert "log2_t" not in rows["body.conv1.input"]  # pixels are not clipped


def test_flips_of_signs_are_those_of_the_latents(tmp_path: Path) -> None:
    class Latents(pl.Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
            negative.append(pl_module.body.conv2.weight.detach() < 0)

    negative: list[Tensor] = []
    monitor = QuantMonitor(2)
    scheme = Bnn(scale="channel_mean", stochastic="both")
    fit(tmp_path, QuantCallback(scheme, start=0, evaluate=False), monitor, Latents(), lr=3.0)
    flipped = float((negative[3] != negative[5]).float().mean())
    assert flipped > 0
    assert monitor.values[WEIGHT]["flips"] == pytest.approx(flipped)


class Board(DummyLogger):
    """Draws histograms, as TensorBoard's logger does; keeps what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.drawn: list[tuple[str, Tensor, int]] = []
        self.board = SimpleNamespace(add_histogram=lambda *args: self.drawn.append(args))

    @property
    def experiment(self) -> Any:
        return self.board

    def log_metrics(self, *args: Any, **kwargs: Any) -> None:
        pass


def test_loggers_get_values_and_histograms_at_the_step_of_the_batch(tmp_path: Path) -> None:
    board, monitor = Board(), QuantMonitor(2, histograms=2)
    fit(tmp_path, tqt(), monitor, logger=[CSVLogger(tmp_path), board], log_every_n_steps=1)
    (file,) = tmp_path.rglob("metrics.csv")
    with file.open() as lines:
        rows = [row for row in csv.DictReader(lines) if row["lowbit/sqnr_min"]]
    assert [int(row["step"]) for row in rows] == [1, 3, 5]  # counted from 0, as training_step's own values
    last = {f"lowbit/{name}/{metric}": v for name, row in monitor.values.items() for metric, v in row.items()}
    last |= {f"lowbit/{name}": value for name, value in monitor.summary.items()}
    assert {name: float(rows[-1][name]) for name in last} == pytest.approx(last)
    assert {at for _, _, at in board.drawn} == {1, 5}
    codes = {name: codes for name, codes, at in board.drawn if at == 5}
    assert codes.keys() == {f"lowbit/{name}/codes" for name in monitor.values}
    weight = codes[f"lowbit/{WEIGHT}/codes"]
    assert torch.equal(weight, weight.round())
    assert weight.min() < 0
    assert 64 <= weight.abs().max() <= 128


def test_metrics_and_sites_are_chosen(tmp_path: Path) -> None:
    monitor = QuantMonitor(3, metrics=["sqnr", "drift"], sites=["*.weight", "body.relu1"])
    run, _ = fit(tmp_path, tqt(), monitor)
    assert {*monitor.values} == {SITE, WEIGHT, "body.conv1.weight", "body.fc.weight"}
    assert all(row.keys() == {"sqnr", "drift"} for row in monitor.values.values())
    assert {name for name in run.callback_metrics if name.count("/") == 1} == {"lowbit/sqnr_min", "lowbit/drift_max"}


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "metric": ({"metrics": ["sqnrs"]}, r"metrics=\['sqnrs'\]\): no such metric\. Did you mean 'sqnr'\?"),
    "interval": ({"every_n_steps": 0}, r"QuantMonitor\(every_n_steps=0\): expected at least 1"),
    "site": ({"sites": "conv9.*"}, r"sites=\['conv9\.\*'\]\): it fits none of body\.conv1\.input, body\.conv1\.weight"),
    "float": ({}, r"has no quantizer, expected a low-bit network\. Add QuantCallback\(\)"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_is_refused(tmp_path: Path, case: str) -> None:
    options, message = REFUSED[case]
    with pytest.raises(ConfigError, match=message):
        fit(tmp_path, *([] if case == "float" else [tqt()]), QuantMonitor(**options))


def test_nothing_is_looked_at_between(tmp_path: Path, monkeypatch: Any) -> None:
    class Watch(pl.Callback):
        def on_before_backward(self, trainer: Any, pl_module: Any, loss: Any) -> None:
            counts.append((sum(len(m._forward_hooks) for m in pl_module.modules()), len(called)))

    def counting(name: str) -> Any:
        original = getattr(WatchedSite, name)
        return lambda self, *args, **kwargs: (called.append(name), original(self, *args, **kwargs))[1]

    counts: list[tuple[int, int]] = []
    called: list[str] = []
    for name in ("hook", "take_gradient", "finish", "row"):
        monkeypatch.setattr(WatchedSite, name, counting(name))
    _, module = fit(tmp_path, tqt(), QuantMonitor(4), Watch())
    assert [hooks > 0 for hooks, _ in counts] == [False, False, False, True, False, False]
    assert [calls > 0 for _, calls in counts[:4]] == [False, False, False, True]
    assert counts[4][1] == counts[5][1]
    assert sum(len(m._forward_hooks) for m in module.modules()) == 0


def test_an_exception_leaves_no_hook(tmp_path: Path) -> None:
    class Fail(pl.Callback):
        def on_before_backward(self, trainer: Any, pl_module: Any, loss: Any) -> None:
            modules.append(pl_module)
            raise RuntimeError("on purpose")

    modules: list[Any] = []
    with pytest.raises(RuntimeError, match="on purpose"):
        fit(tmp_path, tqt(), QuantMonitor(1), Fail())
    assert sum(len(m._forward_hooks) for m in modules[0].modules()) == 0


def test_accumulated_batches_make_one_step_and_a_resumed_run_goes_on(tmp_path: Path) -> None:
    saver = ModelCheckpoint(tmp_path, "{step}", save_top_k=-1, every_n_train_steps=1)
    witness, monitor, resumed = Witness(), QuantMonitor(3), QuantMonitor(3)
    fit(tmp_path, tqt(), monitor, witness, saver, accumulate_grad_batches=2)
    assert monitor.step == 3
    inputs, outputs = zip(*witness.seen[3], strict=True)
    assert len(inputs) == 2
    assert monitor.values[SITE]["sqnr"] == decibels(torch.cat(inputs), torch.cat(outputs))
    file = tmp_path / "step=2.ckpt"
    assert not any("QuantMonitor" in key for key in torch.load(file, weights_only=True)["callbacks"])
    fit(tmp_path, tqt(), resumed, seed=9, ckpt_path=file, accumulate_grad_batches=2)
    assert (resumed.step, resumed.values) == (3, monitor.values)


def test_a_validation_before_the_step_does_not_count(tmp_path: Path) -> None:
    witness, monitor = Witness(), QuantMonitor(2)
    fit(tmp_path, monitor, QuantCallback("tqt", start="1 steps"), witness, max_steps=2)
    ((x, y),) = witness.seen[2]
    assert monitor.values[SITE]["sqnr"] == decibels(x, y)


def test_whole_samples_stand_for_a_large_tensor() -> None:
    net = seeded_net().body
    x = torch.randn(16, 1, 6, 6, generator=torch.Generator().manual_seed(3))
    convert(net, "tqt", example_input=x)
    net.train()
    (site,) = find_sites(net, ["conv1.input"], ["sqnr"], 5 * 36)
    site.prepare(torch.device("cpu"))
    hooks = list(site.hook())
    net(x)
    for hook in hooks:
        hook.remove()
    y = net.conv1.lowbit_input(x).detach()
    assert computed([site]) == [{"sqnr": decibels(x[::4], y[::4])}]


def test_channels_have_steps_of_their_own(tmp_path: Path) -> None:
    class Quiet(pl.Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
            pl_module.body.conv1.weight.data[0] *= 2.0**-6

    monitor = QuantMonitor(1, sites="body.conv1.weight")
    history = History(monitor)
    quant = QuantCallback(Jacinto(per_channel="all"), start=0, evaluate=False)
    _, module = fit(tmp_path, quant, Quiet(), monitor, history)
    row = monitor.values["body.conv1.weight"]
    exponents = module.body.conv1.lowbit_weight.grid().exponent
    assert len(set(exponents)) > 1
    assert row["exponent"] == pytest.approx(sum(exponents) / 4)
    assert row["sqnr"] > 35  # with one step for all of them the quiet channel would be nothing but noise
    assert row["saturation"] == row["dead_bits"] == 0


def on_two_ranks(folder: Path) -> None:
    """Run in a script of its own: each rank has other images, and saves what it saw and was told."""
    strategy = DDPStrategy(process_group_backend="gloo", timeout=timedelta(seconds=60))
    witness, monitor = Witness(), QuantMonitor(3)
    run, _ = fit(folder, tqt(), monitor, witness, devices=2, strategy=strategy)
    torch.save((monitor.values, monitor.summary, witness.seen, witness.gradients), folder / f"{run.global_rank}.pt")


def test_processes_count_together(tmp_path: Path) -> None:
    run_script(Path(__file__), tmp_path, ranks=2)
    a, b = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert a[:2] == b[:2]
    ((x0, y0),), ((x1, y1),) = a[2][3], b[2][3]
    assert not torch.equal(x0, x1)
    row = a[0][SITE]
    assert row["sqnr"] == decibels(torch.cat([x0, x1]), torch.cat([y0, y1]))
    largest = max(int((y / 2.0 ** row["exponent"]).max()) for y in (y0, y1))
    assert row["dead_bits"] == 8 - largest.bit_length()
    assert row["threshold_grad"] == pytest.approx((a[3][3] + b[3][3]) / 2)


if __name__ == "__main__":
    on_two_ranks(Path(sys.argv[1]))

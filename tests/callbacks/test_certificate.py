"""A certificate of two equal runs agrees, names the step and layer of a change, and goes on over a resume."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import numpy as np
import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import ModelCheckpoint
from schemes.toy_integer import ToyInteger
from schemes.toy_ranks import Net, data
from torch.utils.data import DataLoader, WeightedRandomSampler

from lightning_lowbit import QuantCallback, TrainingCertificate
from lightning_lowbit.callbacks import certificate as module
from lightning_lowbit.errors import ConfigError, InvariantError
from lightning_lowbit.reports.certificate import compare, layer_hashes, read_certificate

pytestmark = [
    pytest.mark.filterwarnings(f"ignore:{text}")
    for text in (".*LeafSpec", ".*does not have many workers", "Be aware that when using `ckpt_path`",
                 "Checkpoint directory .* exists and is not empty", ".*exists and is not empty")
]  # fmt: skip

EVERY = 3  # steps, of 8 an epoch: no step of it but the 24th is an epoch's last one


class Change(L.Callback):
    """One weight moves by one code behind one step."""

    def __init__(self, step: int, layer: str = "again") -> None:
        self.step, self.layer = step, layer

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        if trainer.global_step == self.step:
            layer = getattr(pl_module, self.layer)
            with torch.no_grad():
                code = layer.weight[0, 0] / 2.0 ** float(layer.lowbit_exponent)
                layer.weight[0, 0] += 2.0 ** float(layer.lowbit_exponent) * (1 if code < 127 else -1)


def fit(folder: Path, *callbacks: Any, net: Any = None, loader: Any = None, epochs: int = 3, ckpt_path: Any = None,
        certificate: Any = None, **quant: Any) -> TrainingCertificate:  # fmt: skip
    own = TrainingCertificate(EVERY) if certificate is None else certificate
    trainer = L.Trainer(
        max_epochs=epochs, accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        enable_checkpointing=any(isinstance(c, ModelCheckpoint) for c in callbacks), default_root_dir=folder,
        callbacks=[QuantCallback(ToyInteger(), calibrate_batches=1, **quant), *callbacks, own],
    )  # fmt: skip
    trainer.fit(net or Net(), loader or data(), ckpt_path=ckpt_path)
    return own


def moments(certificate: TrainingCertificate) -> list[tuple[int, int, str]]:
    return [(entry["epoch"], entry["step"], entry["at"]) for entry in certificate.records]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, TrainingCertificate]:
    """The uninterrupted run: 3 epochs of 8 steps, with a checkpoint behind each step and each epoch."""
    folder = tmp_path_factory.mktemp("whole")
    steps = ModelCheckpoint(folder, "{step}", save_top_k=-1, every_n_train_steps=1, save_on_train_epoch_end=False)
    ends = ModelCheckpoint(folder, "end-{epoch}", save_top_k=-1, every_n_epochs=1, save_on_train_epoch_end=True)
    return folder, fit(folder, steps, ends)


def test_records_stand_where_they_are_due(whole: tuple[Path, TrainingCertificate]) -> None:
    _, certificate = whole
    assert moments(certificate) == [
        (0, 3, "step"), (0, 6, "step"), (0, 8, "epoch_end"),
        (1, 9, "step"), (1, 12, "step"), (1, 15, "step"), (1, 16, "epoch_end"),
        (2, 18, "step"), (2, 21, "step"), (2, 24, "step"), (2, 24, "epoch_end"),
    ]  # fmt: skip
    assert len({entry["state"] for entry in certificate.records}) == 10  # an epoch's end changes nothing here


def test_what_is_recorded_is_the_state_behind_the_step(tmp_path: Path) -> None:
    seen: list[dict[str, str]] = []

    class See(L.Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            if trainer.global_step == 3:
                seen.append(layer_hashes(pl_module, None))

    certificate = fit(tmp_path, See(), epochs=1)
    assert certificate.records[0]["layers"] == seen[0]
    assert list(seen[0]) == ["first", "again", "left", "right"]


def test_two_equal_runs_agree(whole: tuple[Path, TrainingCertificate], tmp_path: Path) -> None:
    folder, first = whole
    torch.manual_seed(17)  # neither order nor rounding come from here
    second = fit(tmp_path)
    assert second.records == first.records
    found = compare(*(read_certificate(path / "certificate.json") for path in (folder, tmp_path)))
    assert (found.compared, found.parting, found.notes) == (11, None, [])


@pytest.mark.parametrize(("step", "record"), [(12, (1, 12, "step")), (13, (1, 15, "step")), (16, (1, 16, "epoch_end"))])
def test_one_code_changed_at_one_step_is_found(
    whole: tuple[Path, TrainingCertificate], tmp_path: Path, step: int, record: tuple[int, int, str]
) -> None:
    """At a recorded step in the one layer, before any other follows."""
    changed = fit(tmp_path, Change(step))
    found = compare(whole[1].state_dict(), changed.state_dict())
    assert found.parting is not None
    assert tuple(found.parting[name] for name in ("epoch", "step", "at")) == record
    assert found.agreed == whole[1].records[moments(changed).index(record) - 1]
    assert "again" in found.layers
    if step == record[1]:
        assert found.layers == ["again"]


def test_the_file_and_the_checkpoint_hold_the_same(whole: tuple[Path, TrainingCertificate]) -> None:
    folder, certificate = whole
    file = read_certificate(folder / "certificate.json")
    assert file == read_certificate(folder / "end-epoch=2.ckpt") == certificate.state_dict()
    assert read_certificate(folder / "step=10.ckpt")["records"] == file["records"][:4]
    assert {name: file[name] for name in ("format", "scheme", "options", "seed", "world_size", "limits")} == {
        "format": 1, "scheme": "toy_integer", "options": {"update_bits": 4}, "seed": None, "world_size": 1,
        "limits": [],
    }  # fmt: skip
    assert not list(folder.glob("*.part"))


FILES = ["step=2.ckpt", "step=3.ckpt", "step=8.ckpt", "step=13.ckpt", "end-epoch=0.ckpt", "end-epoch=1.ckpt"]


@pytest.mark.parametrize("file", FILES)
def test_a_resumed_run_has_the_certificate_of_the_whole_one(
    whole: tuple[Path, TrainingCertificate], tmp_path: Path, file: str
) -> None:
    torch.manual_seed(5)
    resumed = fit(tmp_path, ckpt_path=whole[0] / file)
    assert resumed.state_dict() == whole[1].state_dict()
    assert read_certificate(tmp_path / "certificate.json") == whole[1].state_dict()


class SaveAt(L.Callback):
    """Stands before the certificate in the list: it saves before the record of that moment is taken."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        if trainer.global_step == 9:
            trainer.save_checkpoint(self.folder / "step.ckpt")

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        if trainer.current_epoch == 1:
            trainer.save_checkpoint(self.folder / "epoch.ckpt")


def test_a_callback_that_saves_first_saves_the_record_too(
    whole: tuple[Path, TrainingCertificate], tmp_path: Path
) -> None:
    assert fit(tmp_path, SaveAt(tmp_path)).records == whole[1].records
    for file in ("step.ckpt", "epoch.ckpt"):
        assert fit(tmp_path / "again", ckpt_path=tmp_path / file).records == whole[1].records


def test_a_run_that_is_killed_leaves_its_file_and_goes_on(
    whole: tuple[Path, TrainingCertificate], tmp_path: Path
) -> None:
    class StopError(Exception):
        pass

    class Stop(L.Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            if trainer.global_step == 14:
                raise StopError

    saver = ModelCheckpoint(tmp_path, "last", every_n_train_steps=1, save_on_train_epoch_end=False)
    with pytest.raises(StopError):
        fit(tmp_path, saver, Stop())
    assert read_certificate(tmp_path / "certificate.json")["records"] == whole[1].records[:5]
    resumed = fit(tmp_path, ckpt_path=tmp_path / "last.ckpt")
    assert resumed.records == whole[1].records


def test_a_run_resumed_without_its_certificate_says_so(whole: tuple[Path, TrainingCertificate], tmp_path: Path) -> None:
    content = torch.load(whole[0] / "step=13.ckpt")
    del content["callbacks"]["TrainingCertificate"]
    torch.save(content, tmp_path / "without.ckpt")
    resumed = fit(tmp_path, ckpt_path=tmp_path / "without.ckpt")
    assert resumed.records == whole[1].records[5:]
    assert resumed.header["limits"] == ["no record before step 13, where the run went on without"]


def test_a_second_fit_begins_anew(tmp_path: Path) -> None:
    certificate = fit(tmp_path, epochs=1)
    first = list(certificate.records)
    fit(tmp_path, epochs=1, certificate=certificate)
    assert certificate.records == first


def test_without_the_callback_nothing_is_hashed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any) -> None:
        raise AssertionError("hashed")

    monkeypatch.setattr("lightning_lowbit.reports.certificate.digest", refuse)
    trainer = L.Trainer(
        max_epochs=1, accelerator="cpu", logger=False, enable_progress_bar=False, enable_checkpointing=False,
        enable_model_summary=False, callbacks=[QuantCallback(ToyInteger(), calibrate_batches=1)],
        default_root_dir=tmp_path,
    )  # fmt: skip
    trainer.fit(Net(), data())
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(AssertionError, match="hashed"):
        fit(tmp_path, epochs=1)


def test_only_epochs_by_default_and_another_file_on_request(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "mine.json"
    certificate = fit(tmp_path, epochs=2, certificate=TrainingCertificate(path=str(path)))
    assert moments(certificate) == [(0, 8, "epoch_end"), (1, 16, "epoch_end")]
    assert json.loads(path.read_text(encoding="utf-8")) == certificate.state_dict()
    assert not (tmp_path / "certificate.json").exists()


# -- limits ---------------------------------------------------------------------------------------------------
def limits(certificate: TrainingCertificate) -> list[str]:
    found: list[str] = certificate.state_dict()["limits"]
    return found


@pytest.mark.filterwarnings("ignore:resume. the loader .* keeps its own order")
def test_a_loader_with_an_order_of_its_own_is_a_limit(tmp_path: Path) -> None:
    dataset = data().dataset
    sampler = WeightedRandomSampler([1.0] * 64, 64)
    (limit,) = limits(fit(tmp_path, loader=DataLoader(dataset, 8, sampler=sampler), epochs=1))
    assert "keeps its own order, because its sampler is a WeightedRandomSampler" in limit


def test_declining_the_sample_order_is_a_limit(tmp_path: Path) -> None:
    (limit,) = limits(fit(tmp_path, epochs=1, resume_order=False))
    assert limit == "the loaders draw their order with their own samplers"


@pytest.mark.parametrize("draw", [lambda: torch.rand(1), random.random, np.random.rand], ids=["torch", "py", "numpy"])
def test_drawing_in_a_training_step_is_a_limit(tmp_path: Path, draw: Any) -> None:
    net = Net()
    step = net.training_step
    net.training_step = lambda batch, batch_idx: (draw(), step(batch, batch_idx))[1]  # type: ignore[method-assign]
    (limit,) = limits(fit(tmp_path, net=net, epochs=1))
    assert limit.startswith("the training step draws from a global random generator")


def test_a_float_start_is_a_limit_and_has_no_record(tmp_path: Path) -> None:
    certificate = fit(tmp_path, epochs=2, start="8 steps", evaluate=False)
    assert moments(certificate)[0] == (1, 9, "step")
    assert limits(certificate) == ["float training up to step 8, not hashed"]


def test_the_seed_is_kept(tmp_path: Path) -> None:
    L.seed_everything(7)
    assert fit(tmp_path, epochs=1).header["seed"] == 7
    assert os.environ["PL_GLOBAL_SEED"] == "7"


# -- refusals and ranks -----------------------------------------------------------------------------------------
def test_it_stands_behind_the_callback_that_converts(tmp_path: Path) -> None:
    for callbacks in ([TrainingCertificate()], [TrainingCertificate(), QuantCallback(ToyInteger())]):
        trainer = L.Trainer(
            max_epochs=1, accelerator="cpu", logger=False, callbacks=callbacks, default_root_dir=tmp_path
        )
        with pytest.raises(ConfigError, match="expected a QuantCallback before it in the list"):
            trainer.fit(Net(), data())


def test_wrong_settings_and_later_formats_are_refused() -> None:
    with pytest.raises(ConfigError, match="every_n_steps=0"):
        TrainingCertificate(every_n_steps=0)
    with pytest.raises(ConfigError, match="has format 9"):
        TrainingCertificate().load_state_dict({"format": 9, "records": []})


def test_ranks_that_differ_are_an_invariant_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other rank's answer is invented; that equal ranks pass is the first half."""
    other: dict[str, str] = {}

    def gather(ranks: list[Any], mine: dict[str, str]) -> None:
        ranks[:] = [mine, {**mine, **other}]

    monkeypatch.setattr(module, "world_size", lambda: 2)
    monkeypatch.setattr(dist, "all_gather_object", gather)
    fit(tmp_path, epochs=1)
    other["again"] = "0"
    with pytest.raises(InvariantError, match=r"^again: rank 1 holds other integers than rank 0 at step 8, in 1 of 4"):
        fit(tmp_path, epochs=1)
    fit(tmp_path, epochs=1, certificate=TrainingCertificate(check_ranks=False))

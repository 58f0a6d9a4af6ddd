"""A resumed fit ends with the bits of the uninterrupted one, whatever drew the order, wherever it stopped."""

from __future__ import annotations

import importlib
import random
import re
import textwrap
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from launch import run_script
from torch import nn
from torch.utils.data import BatchSampler, DataLoader, Dataset, IterableDataset, WeightedRandomSampler
from torch.utils.data.distributed import DistributedSampler

from lightning_lowbit.errors import InvariantError
from lightning_lowbit.plugins.resume import ResumeState
from lightning_lowbit.plugins.rng import capture_rng, restore_rng
from lightning_lowbit.plugins.sampler import OrderedSampler

pytestmark = [
    pytest.mark.filterwarnings(r"ignore:.*callbacks used to create the checkpoint need to be provided"),
    pytest.mark.filterwarnings(r"ignore:.*does not have many workers"),
    pytest.mark.filterwarnings(r"ignore:.*exists and is not empty"),
    pytest.mark.filterwarnings(r"ignore:You defined a `validation_step` but have no"),
    # torch warns on machines with a single core.
    pytest.mark.filterwarnings(r"ignore:This DataLoader will create 2 worker processes"),
]
SAMPLES, BATCH, EPOCHS = 22, 4, 3  # six batches, the last one of two samples
STEPS = -(-SAMPLES // BATCH)


class Points(Dataset[Any]):
    """Samples that depend on their index; ``noise`` adds an augmentation from the three global generators."""

    def __init__(self, noise: bool = False) -> None:
        self.noise = noise
        self.loaded: list[int] = []

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        self.loaded.append(index)
        x = torch.randn(4, generator=torch.Generator().manual_seed(index))
        y = (x.sum() > 0).long()
        if self.noise:
            x = x + 0.1 * torch.randn(4) + 0.1 * np.random.randn() + 0.1 * random.gauss(0, 1)
        return x, y


def net_of(pl: Any) -> Any:
    class Net(pl.LightningModule):  # type: ignore[misc]  # the namespace is chosen at run time
        def __init__(self, plateau: str = "") -> None:
            super().__init__()
            self.plateau = plateau
            self.layers = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 2))

        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            parts = batch.values() if isinstance(batch, dict) else [batch]
            loss = sum(nn.functional.cross_entropy(self.layers(x), y) for x, y in parts)
            self.log("loss", loss, on_step=False, on_epoch=True, batch_size=BATCH)
            return loss

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            x, y = batch
            self.log("val", nn.functional.cross_entropy(self.layers(x + torch.randn_like(x)), y))

        def on_train_epoch_start(self) -> None:
            torch.rand(1)

        def on_train_epoch_end(self) -> None:
            torch.rand(1)

        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.SGD(self.parameters(), 0.1, momentum=0.9)
            if not self.plateau:
                return optimizer
            # A threshold that no loss meets: every epoch is a bad one and halves the rate.
            plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=0, threshold=1.0)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": plateau, "monitor": self.plateau}}

    return Net


def keeper_of(pl: Any, order_seed: int | None) -> Any:
    class Keeper(pl.Callback):  # type: ignore[misc]  # the namespace is chosen at run time
        def __init__(self) -> None:
            self.resume = ResumeState(order_seed)

        def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
            self.trainer = trainer
            self.resume.attach(trainer)

        def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
            self.resume.detach(trainer)

        def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
            self.resume.detach(trainer)

        def state_dict(self) -> dict[str, Any]:
            return self.resume.state_dict(self.trainer)

        def load_state_dict(self, state: dict[str, Any]) -> None:
            self.resume.load_state_dict(state)

    return Keeper()


def savers(pl: Any, folder: Path, validate: bool) -> list[Any]:
    """Callbacks that write a checkpoint behind each step, each epoch and each validation."""
    checkpoint = pl.callbacks.ModelCheckpoint
    callbacks = [
        checkpoint(folder, filename="batch{step}", every_n_train_steps=1, save_top_k=-1),
        checkpoint(folder, filename="epoch{step}", save_top_k=-1, save_on_train_epoch_end=True),
    ]
    if validate:
        callbacks.append(checkpoint(folder, "val{step}", monitor="val", save_top_k=-1, save_on_train_epoch_end=False))
    return callbacks


def fit(
    folder: Path,
    loader: Callable[[], Any],
    *,
    resume: str | None = None,
    keep: bool = True,
    save: bool | None = None,
    namespace: str = "lightning.pytorch",
    validate: bool = True,
    plateau: str = "",
    order_seed: int | None = None,
    extra: tuple[Any, ...] = (),
    **options: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Fit from the start, with a checkpoint in every place, or from one of them; final weights and RNG."""
    pl = importlib.import_module(namespace)
    torch.manual_seed(11)
    random.seed(11)
    np.random.seed(11)
    module = net_of(pl)(plateau)
    callbacks = [keeper_of(pl, order_seed), *extra] if keep else []
    if save is None:
        save = keep and resume is None
    if save:
        callbacks += savers(pl, folder, validate)
    trainer = pl.Trainer(
        callbacks=callbacks,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=save,
        default_root_dir=folder,
        **{"max_epochs": EPOCHS, **options},
    )
    if resume is not None:
        torch.manual_seed(99)
        random.seed(99)
        np.random.seed(99)
    trainer.fit(
        module,
        loader(),
        DataLoader(Points(), batch_size=8) if validate else None,
        ckpt_path=None if resume is None else str(folder / f"{resume}.ckpt"),
        weights_only=None if resume is None else True,
    )
    weights = torch.cat([value.flatten().double() for value in module.state_dict().values()])
    return weights, torch.get_rng_state()


def check(folder: Path, loader: Callable[[], Any], places: tuple[str, ...], **options: Any) -> None:
    plain = fit(folder, loader, keep=False, **options) if options.get("order_seed") is None else None
    whole = fit(folder, loader, **options)
    if plain is not None:
        assert torch.equal(whole[0], plain[0]), "ResumeState changed an uninterrupted run"
        assert torch.equal(whole[1], plain[1])
    for place in places:
        resumed = fit(folder, loader, resume=place, **options)
        assert torch.equal(resumed[0], whole[0]), f"weights differ after a resume from {place}"
        assert torch.equal(resumed[1], whole[1]), f"random state differs after a resume from {place}"


def default(workers: int = 0, **settings: Any) -> DataLoader[Any]:
    return DataLoader(Points(), batch_size=BATCH, shuffle=True, num_workers=workers, **settings)


class Backwards(BatchSampler):
    """A user's batch sampler, which draws when it is iterated and not at its first batch."""

    def __iter__(self) -> Any:
        order = torch.randperm(SAMPLES).tolist()
        return iter([order[i : i + BATCH] for i in reversed(range(0, SAMPLES, BATCH))])


LOADERS: dict[str, Callable[[int], Any]] = {
    "default": default,
    "own generator": lambda workers: default(workers, generator=torch.Generator().manual_seed(5)),
    "sequential": lambda workers: DataLoader(Points(), batch_size=BATCH, num_workers=workers),
    "distributed": lambda workers: DataLoader(
        Points(),
        batch_size=BATCH,
        sampler=DistributedSampler(Points(), num_replicas=1, rank=0),
        num_workers=workers,
    ),
    "weighted": lambda workers: DataLoader(
        Points(),
        batch_size=BATCH,
        sampler=WeightedRandomSampler(list(range(1, SAMPLES + 1)), SAMPLES),
        num_workers=workers,
    ),
    "user's batches": lambda workers: DataLoader(
        Points(), batch_sampler=Backwards(range(SAMPLES), BATCH, False), num_workers=workers
    ),
    "ordered": lambda workers: DataLoader(
        Points(), batch_size=BATCH, sampler=OrderedSampler(SAMPLES, shuffle=True, seed=3), num_workers=workers
    ),
    "two, one shorter": lambda workers: {
        "long": default(workers),
        "short": DataLoader(Points(), batch_size=9, shuffle=True, num_workers=workers),
    },
    "persistent workers": lambda workers: default(2, persistent_workers=True),
}
MID, LAST, EPOCH_END, VALIDATED = (
    "batchstep=8",
    f"batchstep={STEPS}",
    f"epochstep={STEPS}",
    f"valstep={2 * STEPS}",
)


@pytest.mark.parametrize("name", LOADERS)
def test_resume_is_bit_equal(name: str, tmp_path: Path) -> None:
    # Step 11 is the fifth batch of its epoch: a loader of three batches has begun again.
    places = ("batchstep=3", MID, "batchstep=11", LAST, EPOCH_END, VALIDATED)
    check(tmp_path, lambda: LOADERS[name](0), places)


@pytest.mark.parametrize("name", ["default", "own generator", "distributed", "user's batches", "two, one shorter"])
def test_resume_is_bit_equal_with_workers(name: str, tmp_path: Path) -> None:
    """Two epochs, since processes are started for each; all places without workers stand above."""
    check(tmp_path, lambda: LOADERS[name](2), (MID, LAST, EPOCH_END), max_epochs=2)


@pytest.mark.parametrize(
    ("options", "places"),
    [
        ({"val_check_interval": 0.5}, ("batchstep=3", LAST, "valstep=3", VALIDATED)),
        ({"val_check_interval": 2}, ("batchstep=4", "batchstep=5", "valstep=8")),
        ({"check_val_every_n_epoch": 2}, (MID, LAST, "batchstep=12", "valstep=12")),
        ({"check_val_every_n_epoch": None, "val_check_interval": 4}, ("batchstep=4", LAST, "valstep=8")),
        ({"num_sanity_val_steps": 0}, (MID, LAST, EPOCH_END)),
        ({"validate": False}, (MID, LAST, EPOCH_END)),
        ({"limit_train_batches": 5}, (MID, "batchstep=5", "epochstep=5")),
        ({"limit_train_batches": 5, "validate": False}, (MID, "batchstep=5", "epochstep=5")),
        ({"max_epochs": -1, "max_steps": 15}, (MID, LAST, EPOCH_END)),
        ({"max_epochs": -1, "max_steps": 15, "validate": False}, (MID, LAST, EPOCH_END)),
        ({"accumulate_grad_batches": 2}, ("batchstep=2", "batchstep=3", "epochstep=3", "valstep=3")),
        ({"accumulate_grad_batches": 4}, ("batchstep=1", "batchstep=2", "epochstep=2")),
        ({"reload_dataloaders_every_n_epochs": 1}, (MID, LAST, EPOCH_END, VALIDATED)),
        ({"reload_dataloaders_every_n_epochs": 2, "max_epochs": 4}, (MID, "batchstep=12", "epochstep=12")),
        ({"plateau": "val"}, (MID, LAST, EPOCH_END, VALIDATED)),
        ({"plateau": "val", "val_check_interval": 0.5}, ("batchstep=9", LAST, EPOCH_END, VALIDATED)),
    ],
    ids=str,
)
def test_resume_is_bit_equal_under_options(options: dict[str, Any], places: tuple[str, ...], tmp_path: Path) -> None:
    check(tmp_path, default, places, **options)


@pytest.mark.parametrize(("first", "second"), [(MID, "batchstep=10"), (LAST, "valstep=6"), (EPOCH_END, MID)])
def test_a_resumed_run_is_resumed(first: str, second: str, tmp_path: Path) -> None:
    whole = fit(tmp_path, default)
    (tmp_path / f"{second}.ckpt").unlink()
    fit(tmp_path, default, resume=first, save=True)
    again = fit(tmp_path, default, resume=second)
    assert torch.equal(again[0], whole[0])
    assert torch.equal(again[1], whole[1])


def test_resume_in_the_other_namespace(tmp_path: Path) -> None:
    check(tmp_path, default, (MID, LAST, EPOCH_END), namespace="pytorch_lightning")


def test_augmentation_from_every_global_generator(tmp_path: Path) -> None:
    loader = lambda: DataLoader(Points(noise=True), batch_size=BATCH, shuffle=True)  # noqa: E731
    check(tmp_path, loader, (MID, LAST, EPOCH_END))


def test_ordered_sampler_on_request(tmp_path: Path) -> None:
    check(tmp_path, default, (MID, LAST, EPOCH_END), order_seed=7)
    own = fit(tmp_path / "own", default)
    assert not torch.equal(own[0], fit(tmp_path / "seeded", default, order_seed=7)[0])


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended")
@pytest.mark.parametrize("place", [MID, LAST, EPOCH_END, VALIDATED])
def test_without_resume_state_every_place_differs(place: str, tmp_path: Path) -> None:
    """What the tests above would not notice, they would not test."""
    whole = fit(tmp_path, default)
    resumed = fit(tmp_path, default, resume=place, keep=False)
    assert not torch.equal(resumed[0], whole[0])


def test_trained_batches_are_not_loaded(tmp_path: Path) -> None:
    fit(tmp_path, default)
    loader = default()
    fit(tmp_path, lambda: loader, resume=MID)
    assert len(loader.dataset.loaded) == SAMPLES - 2 * BATCH + SAMPLES


def test_checkpoint_written_by_a_later_callback_after_an_exception(tmp_path: Path) -> None:
    from lightning.pytorch.callbacks import Callback

    class Fails(Callback):
        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            if trainer.global_step == 9:
                raise RuntimeError("power cut")

        def on_exception(self, trainer: Any, *_: Any) -> None:
            trainer.save_checkpoint(tmp_path / "cut.ckpt")

    whole = fit(tmp_path, default)
    with pytest.raises(RuntimeError, match="power cut"):
        fit(tmp_path, default, extra=(Fails(),))
    assert torch.equal(fit(tmp_path, default, resume="cut")[0], whole[0])


def test_detach_leaves_no_trace(tmp_path: Path) -> None:
    pl = importlib.import_module("lightning.pytorch")
    loader = default()
    trainer = pl.Trainer(
        max_epochs=1,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        callbacks=[keeper_of(pl, None)],
        default_root_dir=tmp_path,
    )
    before = set(vars(trainer.fit_loop)), set(vars(trainer.fit_loop.epoch_loop))
    trainer.fit(net_of(pl)(), loader)
    assert (set(vars(trainer.fit_loop)), set(vars(trainer.fit_loop.epoch_loop))) == before
    assert type(loader.batch_sampler) is BatchSampler


def test_unknown_release_is_an_error() -> None:
    class Loop:
        epoch_loop = object()

    class Trainer:
        fit_loop = Loop()

    with pytest.raises(InvariantError, match="Loop has no '_load_combined_loader_states'"):
        ResumeState().attach(Trainer())


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Any:
        points = Points()
        return (points[index] for index in range(SAMPLES))


class Shuffled(BatchSampler):
    """Draws from a generator that no checkpoint can know."""

    def __init__(self) -> None:
        super().__init__(range(SAMPLES), BATCH, False)
        self.rng = random.Random(1)

    def __iter__(self) -> Any:
        order = self.rng.sample(range(SAMPLES), SAMPLES)
        return iter([order[i : i + BATCH] for i in range(0, SAMPLES, BATCH)])


@pytest.mark.parametrize(
    ("loader", "reason"),
    [
        (lambda: DataLoader(Stream(), batch_size=BATCH), r"DataLoader of Stream.*iterable"),
        (lambda: dict.fromkeys("ab", default()), "given twice"),
        (lambda: DataLoader(Points(), batch_sampler=Shuffled()), r"Shuffled\.rng is a Random"),
    ],
    ids=["iterable", "twice", "foreign generator"],
)
def test_what_cannot_be_kept_is_said_once_and_trains(loader: Any, reason: str, tmp_path: Path) -> None:
    plain = fit(tmp_path, loader, keep=False)
    kept, said = said_during(lambda: fit(tmp_path, loader))
    assert len(said) == 1
    assert re.search(reason, said[0])
    assert torch.equal(kept[0], plain[0])


def said_during(run: Callable[[], Any]) -> tuple[Any, list[str]]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = run()
    return result, [str(warning.message) for warning in caught if str(warning.message).startswith("resume: ")]


def test_a_resume_with_an_iterable_loader_goes_on(tmp_path: Path) -> None:
    stream = lambda: DataLoader(Stream(), batch_size=BATCH)  # noqa: E731
    said_during(lambda: fit(tmp_path, stream, validate=False))
    (weights, _), said = said_during(lambda: fit(tmp_path, stream, resume=EPOCH_END, validate=False))
    assert len(said) == 1
    assert torch.isfinite(weights).all()


def ordered(seed: int) -> DataLoader[Any]:
    return DataLoader(Points(), batch_size=BATCH, sampler=OrderedSampler(SAMPLES, shuffle=True, seed=seed))


def test_another_order_is_noticed(tmp_path: Path) -> None:
    fit(tmp_path, lambda: ordered(1))
    assert said_during(lambda: fit(tmp_path, lambda: ordered(1), resume=MID))[1] == []
    (said,) = said_during(lambda: fit(tmp_path, lambda: ordered(2), resume=MID))[1]
    assert "DataLoader of Points drew other batches" in said


def test_checkpoint_between_accumulated_batches_is_named(tmp_path: Path) -> None:
    (said,) = said_during(lambda: fit(tmp_path, default, accumulate_grad_batches=2, val_check_interval=3))[1]
    assert "between two accumulated batches" in said


def test_plateau_without_its_metric_is_named(tmp_path: Path) -> None:
    """A mean over the interrupted epoch is not in the file; Lightning would raise if it were asked for."""
    fit(tmp_path, default, plateau="loss")
    (said,) = said_during(lambda: fit(tmp_path, default, plateau="loss", resume=LAST))[1]
    assert "no value of loss" in said


def test_random_state_survives_a_file(tmp_path: Path) -> None:
    random.gauss(0, 1)  # leaves a second value behind in Python's and numpy's generator
    np.random.randn()
    own = torch.Generator().manual_seed(3)
    torch.save(capture_rng([own]), tmp_path / "state")

    def draw() -> list[float]:
        return [
            *torch.rand(2),
            *np.random.randn(3),
            *(random.gauss(0, 1) for _ in range(3)),
            torch.rand(1, generator=own),
        ]

    expected = draw()
    restore_rng(torch.load(tmp_path / "state", weights_only=True), [own])
    assert draw() == expected


RANKS = """
    import sys
    import torch
    from torch.utils.data import DataLoader
    sys.path[:0] = [{tests!r}]
    from test_resume_order import BATCH, Points, default, keeper_of, net_of, savers
    import lightning.pytorch as pl

    folder, place = sys.argv[1:]
    torch.manual_seed(11)
    module = net_of(pl)()
    callbacks = [keeper_of(pl, None)]
    if place == "none":
        callbacks += savers(pl, folder, True)
    trainer = pl.Trainer(
        max_epochs=2, accelerator="cpu", devices=2, strategy="ddp", logger=False, enable_progress_bar=False,
        enable_model_summary=False, enable_checkpointing=place == "none", callbacks=callbacks,
    )
    # Ranks that draw different dropout masks: a state of rank 0 alone would not do.
    torch.manual_seed(11 + trainer.global_rank if place == "none" else 99)
    ckpt = None if place == "none" else f"{{folder}}/{{place}}.ckpt"
    validation = DataLoader(Points(), batch_size=BATCH)
    trainer.fit(module, default(), validation, ckpt_path=ckpt, weights_only=bool(ckpt))
    end = [*module.parameters(), torch.get_rng_state()]
    torch.save(end, f"{{folder}}/end-{{place}}-{{trainer.global_rank}}")
"""


def test_two_ranks(tmp_path: Path) -> None:
    script = tmp_path / "ranks.py"
    script.write_text(textwrap.dedent(RANKS.format(tests=str(Path(__file__).parent))))
    places = ("none", "batchstep=2", "epochstep=3")
    for place in places:
        run_script(script, tmp_path, place, ranks=2)
    for rank in range(2):
        whole, *resumed = (torch.load(tmp_path / f"end-{place}-{rank}", weights_only=False) for place in places)
        for place, end in zip(places[1:], resumed, strict=True):
            same = all(torch.equal(a, b) for a, b in zip(whole, end, strict=True))
            assert same, f"rank {rank} differs after a resume from {place}"
    first, second = (torch.load(tmp_path / f"end-none-{rank}", weights_only=False)[-1] for rank in range(2))
    assert not torch.equal(first, second), "ranks that draw alike would do with rank 0's state"

"""bolts: loaded on request and without a trace, trained low-bit, resumed; its page says what works and runs."""

from __future__ import annotations

import re
import subprocess
import sys
import warnings
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning import core, loggers, utilities
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import lightning_lowbit.integrations.bolts as integration
from lightning_lowbit import QuantCallback, Tqt, convert, load_from_checkpoint
from lightning_lowbit.errors import ConfigError
from lightning_lowbit.integrations.bolts import bolts, importable_bolts

PAGE = (Path(__file__).parents[2] / "docs" / "bolts.md").read_text()
LR = "optimizers.lr_scheduler.LinearWarmupCosineAnnealingLR"
TABLE = "callbacks.PrintTableMetricsCallback"


def installed() -> bool:
    try:
        return bool(version("pytorch-lightning-bolts"))
    except PackageNotFoundError:
        return False


needs_bolts = pytest.mark.skipif(not installed(), reason="pytorch-lightning-bolts is not installed (extra bolts)")


def small_encoder(*_: Any) -> nn.Module:
    """In place of the ResNet-18, whose checkpoints take 240 MB: one of its blocks, and as many features."""
    parts = bolts("models.autoencoders.components")
    return nn.Sequential(
        parts.conv1x1(3, 8), parts.EncoderBlock(8, 8), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 512)
    )


def small_decoder(latent: int, height: int, *_: Any) -> nn.Module:
    parts = bolts("models.autoencoders.components")
    upsample = nn.Sequential(parts.resize_conv1x1(4, 4, 2), nn.BatchNorm2d(4))
    return nn.Sequential(
        nn.Linear(latent, height**2), nn.Unflatten(1, (4, height // 2, height // 2)),
        parts.DecoderBlock(4, 4, 2, upsample), nn.Conv2d(4, 3, 3, padding=1),
    )  # fmt: skip


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("ae", "vae"):
        module = bolts(f"models.autoencoders.basic_{name}.basic_{name}_module")
        monkeypatch.setattr(module, "resnet18_encoder", small_encoder)
        monkeypatch.setattr(module, "resnet18_decoder", small_decoder)


def net(kind: str, seed: int = 0) -> Any:
    base, schedule = bolts(f"models.autoencoders.{kind}"), bolts(LR)

    class Net(base):  # type: ignore[misc, valid-type]  # found at run time
        def configure_optimizers(self) -> Any:
            optimizer = super().configure_optimizers()
            return [optimizer], [schedule(optimizer, 2, 10)]

    torch.manual_seed(seed)
    return Net(input_height=8, latent_dim=4, lr=0.01)


def loader(shuffle: bool) -> Any:
    images = torch.rand(8, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    return DataLoader(TensorDataset(images, torch.zeros(8)), batch_size=4, shuffle=shuffle)


def trainer(folder: Path, *callbacks: Any) -> Any:
    return pl.Trainer(
        max_epochs=3, accelerator="cpu", callbacks=list(callbacks), logger=False, log_every_n_steps=1,
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=folder,
    )  # fmt: skip


@needs_bolts
@pytest.mark.parametrize("kind", ["AE", "VAE"])
def test_an_autoencoder_is_trained_low_bit_and_resumes(kind: str, tmp_path: Path, small: None) -> None:
    every_epoch = pl.callbacks.ModelCheckpoint(tmp_path / "checkpoints", "{epoch}", save_top_k=-1)
    pl.seed_everything(1)
    whole, table, quant = net(kind), bolts(TABLE)(), QuantCallback(Tqt(bits=4), start=0)
    first = trainer(tmp_path, quant, table, every_epoch)
    first.fit(whole, loader(True), loader(False))
    assert "trained" in quant.metrics
    assert [set(row) >= {"train_loss", "val_loss"} for row in table.metrics] == [True] * 3  # one row an epoch
    codes = whole.decoder[3].weight.detach()
    assert not torch.equal(codes, net(kind).decoder[3].weight)

    # A resumed ModelCheckpoint wants its own folder, and wants it empty.
    folder = (tmp_path / "checkpoints").rename(tmp_path / "first")
    pl.seed_everything(2)
    resumed, rest = net(kind, seed=3), bolts(TABLE)()
    second = trainer(tmp_path, QuantCallback(Tqt(bits=4), start=0), rest)
    second.fit(resumed, loader(True), loader(False), ckpt_path=folder / "epoch=1.ckpt")
    a, b = whole.state_dict(), resumed.state_dict()
    assert a.keys() == b.keys()
    assert any("lowbit" in key for key in a)
    assert all(torch.equal(a[key], b[key]) for key in a)
    assert rest.metrics == table.metrics[2:]
    rates = [t.lr_scheduler_configs[0].scheduler.get_last_lr() for t in (first, second)]
    assert rates[0] == rates[1]
    assert rates[0][0] < 0.01  # the cosine, behind two epochs of warm-up

    again = load_from_checkpoint(type(whole), folder / "epoch=2.ckpt").eval()
    x = torch.rand(2, 3, 8, 8)
    outputs = []
    for model in (whole.eval(), again):
        torch.manual_seed(0)  # VAE draws
        outputs.append(model(x).detach())
    assert torch.equal(*outputs)


@needs_bolts
def test_all_layers_of_the_published_network_are_converted() -> None:
    model = bolts("models.autoencoders.AE")(input_height=32)
    report = convert(model, "tqt")
    assert len(report.layers) == 42
    assert not report.skipped
    assert "42 of 42 layers of AE" in PAGE


def lightning_names() -> tuple[Any, ...]:
    found = [set(vars(module)) for module in (core, loggers, utilities)]
    return *found, [name for name in sys.modules if name.startswith("pytorch_lightning.")], list(sys.meta_path)


@needs_bolts
def test_nothing_stays_behind_in_lightning() -> None:
    bolts(LR)
    before = lightning_names()
    assert not hasattr(utilities, "AMPType")
    assert not hasattr(core, "lightning")
    assert "pytorch_lightning.core.lightning" not in sys.modules
    with importable_bolts():
        from pytorch_lightning.utilities import AMPType  # type: ignore[attr-defined]  # supplied here

        assert AMPType.NATIVE
        assert lightning_names() != before
    assert lightning_names() == before
    with pytest.raises(RuntimeError, match="on purpose"), importable_bolts():
        raise RuntimeError("on purpose")
    assert lightning_names() == before


@needs_bolts
def test_names_that_lightning_has_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(utilities, "AMPType", "theirs", raising=False)
    with importable_bolts():
        assert utilities.AMPType == "theirs"  # type: ignore[attr-defined]  # set above
    assert utilities.AMPType == "theirs"  # type: ignore[attr-defined]


@needs_bolts
def test_import_statements_and_packages_give_the_same_classes() -> None:
    with importable_bolts():
        import pl_bolts  # type: ignore[import-untyped]
        from pl_bolts.models.autoencoders import VAE  # type: ignore[import-untyped]
    assert VAE is bolts("models.autoencoders.VAE") is bolts("pl_bolts.models.VAE") is pl_bolts.models.VAE
    assert bolts("losses.self_supervised_learning").__name__ == "pl_bolts.losses.self_supervised_learning"
    assert bolts("__version__") == "0.3.2post1"
    assert "AE" in dir(bolts("models.autoencoders"))


@needs_bolts
def test_a_package_imports_what_it_is_asked_for_later(monkeypatch: pytest.MonkeyPatch) -> None:
    package: Any = bolts("callbacks")
    monkeypatch.delitem(vars(package), "ModuleDataMonitor", raising=False)
    monkeypatch.delitem(sys.modules, "pl_bolts.callbacks.data_monitor", raising=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of wandb, which is missing
        monitor = package.ModuleDataMonitor  # its module asks Lightning for two names that were removed
    assert monitor.__module__ == "pl_bolts.callbacks.data_monitor"


def test_importing_the_integration_imports_neither_bolts_nor_lightning() -> None:
    code = (
        "import sys, lightning_lowbit.integrations.bolts\n"
        "print([n for n in ('pl_bolts', 'pytorch_lightning', 'torch') if n in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "[]"


@needs_bolts
@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("models.autoencoders.AEE", "pl_bolts.models.autoencoders has no 'AEE'. Did you mean 'AE'?"),
        ("moodels.AE", "pl_bolts has no 'moodels'. Did you mean 'models'?"),
        ("models.autoencoders.AE.encoders", "pl_bolts.models.autoencoders.AE has no 'encoders'."),
        ("datamodules.AsynchronousLoader", "cannot be imported here (No module named 'torch._six')"),
    ],
)
def test_what_is_not_there_is_said(name: str, words: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(words)):
        bolts(name)


@pytest.mark.parametrize("found", [None, "0.3.1"])
def test_without_bolts_the_extra_is_named(monkeypatch: pytest.MonkeyPatch, found: str | None) -> None:
    def some_version(name: str) -> str:
        if found is None:
            raise PackageNotFoundError(name)
        return found

    monkeypatch.setattr(integration, "version", some_version)
    with pytest.raises(ConfigError, match=rf"{found or 'none'}, expected 0\.3\.2\.post1.*lightning-lowbit\[bolts\]"):
        bolts("models.autoencoders.AE")


@needs_bolts
def test_the_table_of_the_page_holds() -> None:
    rows = [line.strip("| ").split(" | ") for line in PAGE.splitlines() if line.startswith("| `")]
    assert len(rows) > 5
    for names, works, *_ in rows:
        for name in re.findall(r"`(.*?)`", names):
            if works == "no":
                with pytest.raises(ConfigError):
                    bolts(name)
                continue
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # bolts' own, of packages that are missing
                assert bolts(name).__name__ == name.rpartition(".")[2]


@needs_bolts
def test_the_code_of_the_page_runs(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, small: None, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    original = pl.Trainer.__init__

    def quiet(self: Any, *args: Any, **kwargs: Any) -> None:
        settings = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False}
        original(self, *args, **kwargs, **settings, enable_checkpointing=False)

    monkeypatch.setattr(pl.Trainer, "__init__", quiet)
    namespace: dict[str, Any] = {}
    for block in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL):
        exec(block, namespace)
    assert namespace["trainer"].current_epoch == 2
    assert namespace["VAE"] is bolts("models.autoencoders.VAE")
    assert "layers low-bit, scheme tqt" in capsys.readouterr().out

"""What the tests of refusals share: a network, its data, and what must hold after a refusal."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_lowbit.callbacks.quant import QuantCallback
from lightning_lowbit.errors import ConfigError, UnsupportedModelError
from lightning_lowbit.modules.base import low_bit_modules
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


class SaveAtTheEnd(pl.Callback):
    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        trainer.save_checkpoint(self.path)


def loader(samples: int = 8, batch: int = 4, value: float | None = None, drop_last: bool = False) -> DataLoader[Any]:
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
    return pl.Trainer(**{"accelerator": "cpu", "max_epochs": 1, "callbacks": list(callbacks), **silent, **options})


def net(**options: Any) -> Net:
    torch.manual_seed(0)
    return Net(**options)


def refusal(call: Callable[[], Any]) -> str:
    with pytest.raises(REFUSALS) as caught:
        call()
    return str(caught.value)


def fit_is_refused(
    module: pl.LightningModule, run: pl.Trainer, *words: str, data: Any = None, again: bool = True, **fit: Any
) -> None:
    """The fit is refused with all ``words``; module and trainer are as they were, and a correct fit works."""
    attributes = set(module.__dict__) | {"forward"}  # what the conversion wrote is no patch
    weights = {key: value.clone() for key, value in module.state_dict().items()}
    plugin = run.strategy.precision_plugin
    message = refusal(lambda: run.fit(module, data or loader(), **fit))
    assert [word for word in words if word not in message] == [], message
    left = {name: module.__dict__[name] for name in set(module.__dict__) - attributes}
    assert [name for name, value in left.items() if callable(value) or name.startswith("_ddp")] == []
    assert run.strategy.precision_plugin is plugin
    copy.deepcopy(module)
    now = module.state_dict()
    assert [key for key in weights if not torch.equal(now[key].nan_to_num(), weights[key].nan_to_num())] == []
    if isinstance(module, Net) and again:
        scheme = next((m.scheme for _, m in low_bit_modules(module)), Tqt())
        trainer(QuantCallback(scheme, start=0)).fit(module.train(), loader())
        assert all(m.switch.started for _, m in low_bit_modules(module))

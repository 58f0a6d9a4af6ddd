"""A small network that NITI trains in a moment, and how tests fit it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_lowbit import Niti, QuantCallback, convert
from lightning_lowbit.modules.base import low_bit_modules
from lightning_lowbit.plugins.precision import rule_of

SAMPLES, BATCH = 44, 8  # six batches, the last one of four samples
Fitted = tuple[Any, Any, Any]


def body() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Dropout(0.2), nn.Linear(36, 3)
    )


class Net(pl.LightningModule):
    """Cross-entropy of a body of modules; SGD unless told otherwise."""

    def __init__(self, net: nn.Module | None = None, optimizers: Callable[[Any], Any] | None = None) -> None:
        super().__init__()
        self.body = body() if net is None else net
        self.optimizers_of = optimizers
        self.losses: list[float] = []

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.body(x)
        return logits

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss = F.cross_entropy(self(batch[0]), batch[1])
        self.losses.append(float(loss.detach()))
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.1) if self.optimizers_of is None else self.optimizers_of(self)


class Validated(Net):
    """The same with a validation."""

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("val_loss", F.cross_entropy(self(batch[0]), batch[1]))


def images(samples: int = SAMPLES) -> tuple[Tensor, Tensor]:
    """[n, 1, 6, 6] with three classes that a mean decides."""
    x = torch.randn(samples, 1, 6, 6, generator=torch.Generator().manual_seed(7))
    return x, torch.bucketize(x.mean((1, 2, 3)) * 6, torch.tensor([-0.4, 0.4]))


def loader(x: Tensor | None = None, y: Tensor | None = None, batch: int = BATCH, **options: Any) -> DataLoader[Any]:
    given = images()
    return DataLoader(TensorDataset(given[0] if x is None else x, given[1] if y is None else y), batch, **options)


def trainer(*callbacks: Any, **options: Any) -> Any:
    silent = {
        "logger": False, "enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False,
        "num_sanity_val_steps": 0,
    }  # fmt: skip
    return pl.Trainer(**{"accelerator": "cpu", "max_epochs": 2, "callbacks": list(callbacks), **silent, **options})


def fit(
    scheme: Niti | str | None = None, callbacks: Sequence[Any] = (), net: Callable[[], Any] | None = None,
    data: Any = None, val: Any = None, ckpt_path: Any = None, quant: dict[str, Any] | None = None, **options: Any,
) -> Fitted:  # fmt: skip
    """The network, its Trainer and our callback behind a fit from a seed."""
    torch.manual_seed(0)
    module = Net() if net is None else net()
    callback = QuantCallback(Niti() if scheme is None else scheme, **{"evaluate": False, **(quant or {})})
    run = trainer(callback, *callbacks, **options)
    run.fit(module, loader() if data is None else data, val, ckpt_path=ckpt_path)
    return module, run, callback


def weights(module: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in module.named_parameters()}


def differing(a: nn.Module | dict[str, Tensor], b: nn.Module | dict[str, Tensor]) -> list[str]:
    """Names of the parameters that differ."""
    x, y = (weights(v) if isinstance(v, nn.Module) else v for v in (a, b))
    assert x.keys() == y.keys()
    return [name for name in x if not torch.equal(x[name], y[name])]


def on_grid(module: nn.Module) -> bool:
    """Whether every integer parameter holds codes times its power of two."""
    codes = [getattr(m, name, None) for m in module.modules() for name in ("lowbit_weight", "lowbit_bias")]
    found = [(q.target().detach().double() * 2.0 ** -int(q.exponent())) for q in codes if q is not None]
    return bool(found) and all(torch.equal(x, x.round()) for x in found)


class Steps(pl.Callback):
    """By step: mu, and the largest move of any int8 code."""

    def __init__(self) -> None:
        self.mu: list[int] = []
        self.moves: list[int] = []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        self.before = {path: q.codes().clone() for path, q in weight_codes(pl_module)}
        self.mu.append(rule_of(pl_module).mu)  # type: ignore[union-attr, attr-defined]

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        now = dict(weight_codes(pl_module))
        self.moves.append(max(int((now[p].codes().int() - w.int()).abs().max()) for p, w in self.before.items()))


def weight_codes(module: nn.Module) -> list[tuple[str, Any]]:
    return [(path, layer.lowbit_weight) for path, layer in low_bit_modules(module) if hasattr(layer, "gathered")]


def convert_body(scheme: Niti | None = None, seed: int = 0) -> tuple[Any, Tensor, Tensor]:
    torch.manual_seed(seed)
    net, (x, y) = body(), images()
    convert(net, scheme or Niti(), x)
    return net.train(), x, y

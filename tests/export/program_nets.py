"""What the tests of lowering BNN and WAGEUBN share: small networks of many forms, and the comparison with a program."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from export.layered import Net
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader, TensorDataset

from lightning_lowbit.callbacks.quant import QuantCallback
from lightning_lowbit.export.program import IntegerProgram

__all__ = ["NETS", "Net", "built", "close", "conv", "differing", "fitted", "functions"]


def conv(i: int = 3, o: int = 3, kernel: int = 3, **options: Any) -> nn.Conv2d:
    return nn.Conv2d(i, o, kernel, **options)


IMAGE, SIGNAL, WORDS = (3, 9, 9), (3, 12), (5, 6)
NETS: dict[str, tuple[tuple[int, ...], Callable[[], nn.Module]]] = {
    "residual": (IMAGE, lambda: Net(
        lambda m, x: m.c(F.relu((y := F.relu(m.n(m.a(x)))) + m.k(m.b(y)))), a=conv(padding=1), n=nn.BatchNorm2d(3),
        b=conv(padding=1, bias=False), k=nn.BatchNorm2d(3), c=conv(3, 2),
    )),
    "concat": (IMAGE, lambda: Net(
        lambda m, x: m.d(torch.cat([m.a(x), F.relu(m.b(x)), m.c(x)], 1)), a=conv(padding=1), b=conv(padding="same"),
        c=conv(kernel=1), d=conv(9, 2),
    )),
    "max pools": (IMAGE, lambda: nn.Sequential(
        conv(), nn.BatchNorm2d(3), nn.MaxPool2d(3, 2, 1, ceil_mode=True), nn.Hardtanh(), conv(3, 4, 1, bias=False),
        nn.AdaptiveMaxPool2d(3), nn.ReLU(), conv(4, 2, 1),
    )),
    "average pools": (IMAGE, lambda: nn.Sequential(
        conv(padding=1), nn.ReLU(), nn.AvgPool2d(3, 2, 1), conv(3, 3, 1), nn.ReLU(),
        nn.AvgPool2d(3, 2, 1, count_include_pad=False), conv(3, 3, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(2),
        conv(3, 2, 1),
    )),
    "uneven windows": (IMAGE, lambda: Net(
        lambda m, x: m.c(F.adaptive_avg_pool2d(F.relu(m.b(F.avg_pool2d(F.relu(m.a(x)), 2, ceil_mode=True))), (3, 2))),
        a=conv(padding=1), b=conv(padding=1), c=conv(3, 2, 1),
    )),
    "groups": (IMAGE, lambda: nn.Sequential(
        conv(3, 6, groups=3, padding=1, stride=2), nn.BatchNorm2d(6), nn.ReLU6(), conv(6, 4, 2, groups=2, dilation=2),
        nn.BatchNorm2d(4), nn.ReLU(), conv(4, 2, 1),
    )),
    "borders": (IMAGE, lambda: nn.Sequential(
        conv(padding=1, padding_mode="reflect"), nn.BatchNorm2d(3), nn.ReLU(), conv(padding=2, padding_mode="circular"),
    )),
    "signal": (SIGNAL, lambda: nn.Sequential(
        nn.Conv1d(3, 4, 3, padding=1), nn.BatchNorm1d(4), nn.ReLU(), nn.MaxPool1d(2), nn.Conv1d(4, 4, 2, bias=False),
        nn.BatchNorm1d(4), nn.ReLU(), nn.Flatten(), nn.Linear(20, 2),
    )),
    "volume": ((2, 5, 5, 5), lambda: nn.Sequential(
        nn.Conv3d(2, 3, 3, padding=1), nn.BatchNorm3d(3), nn.ReLU(), nn.Conv3d(3, 2, 2),
    )),
    "words": (WORDS, lambda: nn.Sequential(
        nn.Linear(6, 7), nn.ReLU(), nn.Dropout(0.3), nn.Linear(7, 8), nn.Hardtanh(), nn.Linear(8, 2),
    )),
    "norm of words": (WORDS, lambda: Net(
        lambda m, x: m.c(F.hardtanh(m.n(m.b(F.relu(m.a(x))).transpose(1, 2)).transpose(1, 2))),
        a=nn.Linear(6, 7), b=nn.Linear(7, 8, bias=False), n=nn.BatchNorm1d(8), c=nn.Linear(8, 2),
    )),
    "outputs": (IMAGE, lambda: Net(
        lambda m, x: {"a": (y := F.relu(m.n(m.a(x)))), "b": [m.b(y).argmax(1), m.c(y.mean((2, 3)))]},
        a=conv(), n=nn.BatchNorm2d(3), b=conv(), c=nn.Linear(3, 2),
    )),
    "moves": (IMAGE, lambda: Net(
        lambda m, x: m.b(F.interpolate(F.relu(m.a(x)), scale_factor=2)[:, :, 1:, ::2]).flip(2).repeat(1, 2, 1, 1),
        a=conv(), b=conv(3, 2, 1),
    )),
    "wide": ((3000,), lambda: nn.Sequential(
        nn.Linear(3000, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 3000), nn.ReLU(), nn.Linear(3000, 3),
    )),
}  # fmt: skip


@torch.no_grad()
def built(name: str) -> tuple[nn.Module, Tensor]:
    """A float network whose norms have seen data, and seven samples."""
    torch.manual_seed(0)
    shape, make = NETS[name]
    net, x = make().eval(), torch.randn(7, *shape)
    for norm in (module for module in net.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)):
        for p in (norm.running_mean, norm.weight, norm.bias):
            nn.init.normal_(p, std=0.5)  # type: ignore[arg-type]
        nn.init.uniform_(norm.running_var, 0.1, 3.0)  # type: ignore[arg-type]
        norm.num_batches_tracked.fill_(9)  # type: ignore[union-attr]
    for layer in (module for module in net.modules() if isinstance(module, nn.Linear) and module.in_features > 999):
        layer.weight.abs_()  # sums beyond the 24 bits of float32
    return net, x.abs() if name == "wide" else x


def differing(net: nn.Module, program: IntegerProgram, x: Tensor) -> list[int]:
    """Batch sizes at which the program gives something else."""
    found = []
    for batch in (1, 3, 7):
        with torch.no_grad():
            wanted = tree_leaves(net(x[:batch]))
        got = [torch.as_tensor(y) for y in tree_leaves(program.run(x[:batch]))]
        alike = [a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(got, wanted, strict=True)]
        found += [batch] * (not all(alike))
    return found


@torch.no_grad()
def close(net: nn.Module, program: IntegerProgram, x: Tensor, most: float = 1e-3) -> None:
    """Fails where floats between the integers differ by more."""
    for found, wanted in zip(tree_leaves(program.run(x)), tree_leaves(net(x)), strict=True):
        torch.testing.assert_close(torch.as_tensor(found), wanted, atol=most, rtol=most)


def functions(program: IntegerProgram) -> list[str]:
    """The float islands."""
    return [op.attributes["function"] for op in program.ops if op.kind == "island"]


class _Fitted(pl.LightningModule):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Any:
        return self.net(x)

    def training_step(self, batch: list[Tensor]) -> Tensor:
        y: Tensor = self.net(batch[0])
        return y.square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.05)


def fitted(name: str, scheme: Any, folder: Any) -> tuple[nn.Module, Tensor]:
    """A network behind two training steps of a real Trainer, and samples."""
    net, x = built(name)
    module, loader = _Fitted(net.train()), DataLoader(TensorDataset(x.repeat(4, *[1] * (x.dim() - 1))), batch_size=14)
    trainer = pl.Trainer(
        max_steps=2, callbacks=[QuantCallback(scheme)], accelerator="cpu", logger=False, enable_progress_bar=False,
        enable_model_summary=False, enable_checkpointing=False, default_root_dir=folder,
    )  # fmt: skip
    trainer.fit(module, loader)
    return module.eval(), x

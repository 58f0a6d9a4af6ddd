"""Networks in the shape that signs want, product -> [pool] -> batch norm -> hardtanh, and how they are trained."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import torch
from recipe import SgdClassifier
from resnet import ResNet
from torch import Tensor, nn

from lightning_lowbit.modules.hinge import HingeLoss

Net = Literal["digits_mlp", "mnist_mlp", "vgg", "resnet20", "resnet8"]


def mlp(inputs: int, hidden: int, layers: int = 3) -> nn.Sequential:
    """``layers`` hidden layers; the batch norm behind the last layer gives the logits a scale."""
    net: list[nn.Module] = [nn.Flatten()]
    for width in [inputs] + [hidden] * (layers - 1):
        net += [nn.Linear(width, hidden, bias=False), nn.BatchNorm1d(hidden), nn.Hardtanh()]
    return nn.Sequential(*net, nn.Linear(hidden, 10, bias=False), nn.BatchNorm1d(10))


def vgg(width: int = 48) -> nn.Sequential:
    """w-w-M-2w-2w-M-4w-4w-M-10 for 32x32 images (BinaryNet's with w = 128 and two more layers at the end).

    Pooling stands before the batch norm: of signs almost every maximum would be +1.
    """
    net: list[nn.Module] = []
    channels = 3
    for out in (width, 2 * width, 4 * width):
        for pool in ([], [nn.MaxPool2d(2)]):
            net += [nn.Conv2d(channels, out, 3, padding=1, bias=False), *pool, nn.BatchNorm2d(out), nn.Hardtanh()]
            channels = out
    return nn.Sequential(*net, nn.Flatten(), nn.Linear(channels * 16, 10, bias=False), nn.BatchNorm1d(10))


NETS: dict[str, Callable[[], nn.Module]] = {
    "digits_mlp": lambda: mlp(64, 256),
    "mnist_mlp": lambda: mlp(784, 1024),
    "vgg": vgg,
    "resnet20": ResNet,
    "resnet8": lambda: ResNet(blocks=1),
}


class BinaryClassifier(SgdClassifier):
    """A classifier under Adam, whose rate falls to zero along a cosine, step by step, once per stage.

    Args:
        net: which network; resnet20 has the names of its public checkpoints.
        lr: rate of the first step of a stage.
        weight_decay: of Adam; a second stage of binary weights runs without, whatever stands here.
        loss: squared_hinge (arXiv:1602.02830) or cross_entropy.
        restart: fraction of the run after which the rate begins anew, for Bnn(weights_at=); None never.
        width: of vgg.
    """

    def __init__(
        self,
        net: Net = "digits_mlp",
        lr: float = 3e-3,
        weight_decay: float = 0.0,
        loss: Literal["squared_hinge", "cross_entropy"] = "cross_entropy",
        restart: float | None = None,
        width: int = 48,
    ) -> None:
        super().__init__(vgg(width) if net == "vgg" else NETS[net]())
        self.save_hyperparameters()
        self.loss = HingeLoss(squared=True) if loss == "squared_hinge" else nn.CrossEntropyLoss()

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        loss: Tensor = self.loss(self(images), labels)
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self) -> Any:
        rate = self.hparams
        optimizer = torch.optim.Adam(self.parameters(), rate["lr"], weight_decay=rate["weight_decay"])
        steps = int(self.trainer.estimated_stepping_batches)
        first = round(steps * (rate["restart"] or 1.0))

        def factor(step: int) -> float:
            begun, length = (0, first) if step < first else (first, steps - first)
            return (1 + math.cos(math.pi * min(1.0, (step - begun) / max(1, length)))) / 2

        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

"""Toy networks of F8Net's golden vectors, named as there: plain torch, built from a file's ``cfg`` and shapes.

Inside a block no rectifier stands before a layer: the published code leaves that to the unsigned quantizer, which
then sees the statistics of what was not rectified.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

__all__ = ["Unit", "is_signed", "network"]


class Unit(nn.Module):
    """Convolution and batch norm."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
        self.bn = nn.BatchNorm2d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.bn(self.conv(x))
        return y


class Block(nn.Module):
    """body(x) + x, + shortcut(x), or nothing; then a rectifier in ResNets."""

    def __init__(self, body: list[Unit], shortcut: Unit | None, identity: bool, rectified: bool) -> None:
        super().__init__()
        self.body = nn.Sequential(*body)
        self.shortcut = None if shortcut is None else nn.Sequential(shortcut)
        self.identity = identity
        self.end = nn.ReLU() if rectified else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = self.body(x)
        if self.shortcut is not None:
            y = y + self.shortcut(x)
        elif self.identity:
            y = y + x
        return self.end(y)  # type: ignore[no-any-return]


class Net(nn.Module):
    """Stem, blocks, an average over the final map, a classifier."""

    def __init__(self, head: list[nn.Module], blocks: dict[str, Block], tail: list[nn.Module], settings: Any) -> None:
        super().__init__()
        self.head = nn.Sequential(*head)
        self.blocks = list(blocks)
        for name, block in blocks.items():
            self.add_module(name, block)
        self.tail = nn.Sequential(*tail)
        self.pool = nn.AvgPool2d(settings["flags"]["pool"])
        self.flat = nn.Flatten()
        self.classifier = nn.Sequential(nn.Linear(settings["features"], settings["ncls"]))

    def forward(self, x: Tensor) -> Tensor:
        x = self.head(x)
        for name in self.blocks:
            x = self.get_submodule(name)(x)
        x = self.flat(self.pool(self.tail(x)))
        logits: Tensor = self.classifier(x)
        return logits


def network(cfg: dict[str, Any]) -> Net:
    """The network of a file."""
    return mobilenet(cfg) if "tail_ch" in cfg["flags"] else resnet(cfg)


def resnet(cfg: dict[str, Any]) -> Net:
    """Basic blocks, from depth 50 on bottlenecks; the first block of later stages halves the map."""
    flags = cfg["flags"]
    deep = flags["depth"] >= 50
    channels, blocks = flags["stem_ch"], {}
    for stage, repeats in enumerate(flags["block_setting"]):
        width = flags["feats"][stage]
        outputs = 4 * width if deep else width
        for layer in range(repeats):
            stride = 2 if stage > 0 and layer == 0 else 1
            if deep:
                body = [Unit(channels, width, 1), Unit(width, width, 3, stride), Unit(width, outputs, 1)]
            else:
                body = [Unit(channels, width, 3, stride), Unit(width, width, 3)]
            same = stride == 1 and channels == outputs
            shortcut = None if same else Unit(channels, outputs, 1, stride)
            blocks[f"stage_{stage}_layer_{layer}"] = Block(body, shortcut, same, True)
            channels = outputs
    head = [Unit(3, flags["stem_ch"], 3), nn.ReLU(), nn.MaxPool2d(3, 2, 1)]
    return Net(head, blocks, [], {**cfg, "features": channels})


def mobilenet(cfg: dict[str, Any]) -> Net:
    """Inverted residuals: expansion unless it is by 1, depthwise, projection; no rectifier behind."""
    flags = cfg["flags"]
    channels, blocks = flags["stem_ch"], {}
    for stage, (expansion, outputs, repeats, first_stride) in enumerate(flags["block_setting"]):
        for layer in range(repeats):
            stride = first_stride if layer == 0 else 1
            wide = expansion * channels
            body = [] if expansion == 1 else [Unit(channels, wide, 1)]
            body += [Unit(wide, wide, 3, stride, wide), Unit(wide, outputs, 1)]
            same = stride == 1 and channels == outputs
            blocks[f"stage_{stage}_layer_{layer}"] = Block(body, None, same, False)
            channels = outputs
    head = [Unit(3, flags["stem_ch"], 3, 2), nn.ReLU()]
    tail = [Unit(channels, flags["tail_ch"], 1), nn.ReLU()]
    return Net(head, blocks, tail, {**cfg, "features": flags["tail_ch"]})


def is_signed(cfg: dict[str, Any], unit: str) -> bool:
    """Whether negative values reach a unit: normalized images, and what blocks without a rectifier hand on."""
    if unit == "head.0":
        return bool(cfg["normalize"])
    if "tail_ch" not in cfg["flags"] or unit.startswith(("classifier", "stage_0_layer_0.")):
        return False
    return unit.endswith("body.0") or unit == "tail.0"

"""Cost of a low-bit training step: time and kept memory over those of the float step, beside other tools.

    python benchmarks/qat_step.py [--nets resnet20 mlp] [--rounds 15] [--no-compile] [--json FILE]

Float is the same network with its batch norm, in the same memory format. ``frozen`` folds batch norm with
moving statistics, ``batch`` with those of the batch, which takes a second convolution. Compiled rows are
divided by the float step as it stands and, in the last column, by the compiled float step. Brevitas and
torch.ao appear when they can be imported.
"""

from __future__ import annotations

import argparse
import json
import platform
import warnings
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from timing import alternate, kept_bytes
from torch import Tensor, nn

from lightning_lowbit import Tqt, convert, lowbit_step
from lightning_lowbit.modules.base import low_bit_modules
from lightning_lowbit.plugins.compiling import compile_in_place
from lightning_lowbit.plugins.patching import Patches

Step = Callable[[], object]


class Parts:
    """Layers of the networks below; a tool that swaps classes instead of converting gives its own."""

    def conv(self, inputs: int, outputs: int, stride: int) -> nn.Module:
        return nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)

    def linear(self, inputs: int, outputs: int) -> nn.Module:
        return nn.Linear(inputs, outputs)

    def relu(self) -> nn.Module:
        return nn.ReLU()

    def operand(self) -> nn.Module:
        return nn.Identity()


class Block(nn.Module):
    """Basic block of He et al. (2016), shortcut A: subsample, pad with zero channels, no parameters."""

    def __init__(self, inputs: int, outputs: int, stride: int, parts: Parts) -> None:
        super().__init__()
        self.conv1, self.bn1, self.relu1 = (
            parts.conv(inputs, outputs, stride),
            nn.BatchNorm2d(outputs),
            parts.relu(),
        )
        self.conv2, self.bn2, self.relu2 = (
            parts.conv(outputs, outputs, 1),
            nn.BatchNorm2d(outputs),
            parts.relu(),
        )
        self.operand = parts.operand()
        self.stride, self.pad = stride, (outputs - inputs) // 2

    def forward(self, x: Tensor) -> Tensor:
        y = self.operand(self.bn2(self.conv2(self.relu1(self.bn1(self.conv1(x))))))
        if self.stride > 1:
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.pad, self.pad))
        return self.relu2(y + x)


class ResNet20(nn.Module):
    def __init__(self, parts: Parts) -> None:
        super().__init__()
        self.input = parts.operand()
        self.conv, self.bn, self.relu = parts.conv(3, 16, 1), nn.BatchNorm2d(16), parts.relu()
        widths = [(16, 16, 1), (16, 32, 2), (32, 64, 2)]
        stages = [(i if k == 0 else o, o, s if k == 0 else 1) for i, o, s in widths for k in range(3)]
        self.blocks = nn.Sequential(*(Block(i, o, s, parts) for i, o, s in stages))
        self.fc = parts.linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(self.relu(self.bn(self.conv(self.input(x)))))
        return self.fc(F.adaptive_avg_pool2d(x, 1).flatten(1))


def mlp(parts: Parts) -> nn.Module:
    hidden = (parts.linear(784, 2048), parts.relu(), parts.linear(2048, 2048), parts.relu())
    return nn.Sequential(parts.operand(), *hidden, parts.linear(2048, 10))


def vgg_small() -> nn.Module:
    """VGG-small-7 of the publication: no bias, no batch norm."""
    layers: list[nn.Module] = []
    for inputs, outputs in ((3, 128), (128, 256), (256, 512)):
        layers += [nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.ReLU()]
        layers += [nn.Conv2d(outputs, outputs, 3, padding=1, bias=False), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Dropout(0.5), nn.Linear(8192, 10, bias=False))


NETS: dict[str, tuple[Callable[[Parts], nn.Module], tuple[int, ...]]] = {
    "resnet20": (ResNet20, (64, 3, 32, 32)),
    "mlp": (mlp, (128, 784)),
    "vgg": (lambda parts: vgg_small(), (32, 3, 32, 32)),
}


def float_net(name: str, parts: Parts | None = None) -> nn.Module:
    torch.manual_seed(0)
    net = NETS[name][0](parts or Parts()).train()
    return net.to(memory_format=torch.channels_last) if len(NETS[name][1]) == 4 else net


def batch(name: str) -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    shape = NETS[name][1]
    x = torch.randn(shape)
    return x.to(memory_format=torch.channels_last) if len(shape) == 4 else x, torch.randint(10, shape[:1])


def lowbit_net(name: str, frozen: bool) -> nn.Module:
    net = float_net(name)
    convert(net, Tqt(), example_input=batch(name)[0])
    for _, module in low_bit_modules(net):
        module.milestone("freeze_batch_norm", frozen)
    return net


def brevitas_net(name: str) -> nn.Module:
    """Power-of-two scales, trained; 8 bits throughout."""
    import brevitas.nn as qnn
    from brevitas import quant

    class BrevitasParts(Parts):
        def conv(self, inputs: int, outputs: int, stride: int) -> nn.Module:
            weight = quant.Int8WeightPerTensorFixedPoint
            return qnn.QuantConv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False, weight_quant=weight)

        def linear(self, inputs: int, outputs: int) -> nn.Module:
            return qnn.QuantLinear(inputs, outputs, bias=True, weight_quant=quant.Int8WeightPerTensorFixedPoint)

        def relu(self) -> nn.Module:
            return qnn.QuantReLU(act_quant=quant.Uint8ActPerTensorFixedPoint)

        def operand(self) -> nn.Module:
            return qnn.QuantIdentity(act_quant=quant.Int8ActPerTensorFixedPoint)

    net = float_net(name, BrevitasParts())
    x = batch(name)[0][:2]
    with torch.no_grad():
        for _ in range(310):  # its activation scales are collected for 300 steps and trained from then on
            net(x)
    return net


def ao_net(name: str) -> nn.Module:
    """FX graph mode with observers running, as its documentation trains."""
    from torch.ao.quantization import get_default_qat_qconfig_mapping
    from torch.ao.quantization.quantize_fx import prepare_qat_fx

    x = batch(name)[0]
    net = prepare_qat_fx(float_net(name), get_default_qat_qconfig_mapping("x86"), (x,))
    net(x)
    return net


def training_step(name: str, net: nn.Module, lowbit: bool) -> tuple[Step, Callable[[], Tensor]]:
    """One optimizer step (thresholds by the scheme's own rule), and the loss alone."""
    x, target = batch(name)
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-3, momentum=0.9)

    def loss() -> Tensor:
        return F.cross_entropy(net(x), target)

    def closure() -> Tensor:
        optimizer.zero_grad(set_to_none=True)
        value = loss()
        value.backward()
        return value

    if lowbit:
        return lambda: lowbit_step(net, optimizer, closure), loss
    return lambda: optimizer.step(closure), loss


def measure(name: str, rounds: int, compiled: bool) -> dict[str, dict[str, Any]]:
    makers: dict[str, tuple[Callable[[], nn.Module], bool, bool]] = {
        "float": (lambda: float_net(name), False, False),
        "tqt frozen": (lambda: lowbit_net(name, True), True, False),
        "tqt batch": (lambda: lowbit_net(name, False), True, False),
        "float compiled": (lambda: float_net(name), False, True),
        "tqt frozen compiled": (lambda: lowbit_net(name, True), True, True),
        "tqt batch compiled": (lambda: lowbit_net(name, False), True, True),
        "brevitas": (lambda: brevitas_net(name), False, False),
        "torch.ao fx": (lambda: ao_net(name), False, False),
    }
    steps: dict[str, Step] = {}
    kept: dict[str, int] = {}
    for label, (make, lowbit, compile_it) in makers.items():
        if (compile_it and not compiled) or ("batch" in label and name == "mlp"):
            continue
        try:
            net = make()
            if compile_it and lowbit:
                compile_in_place(
                    nn.Sequential(net), Patches()
                )  # what compile=True does to the net of a LightningModule
            elif compile_it:
                net.compile()
            step, loss = training_step(name, net, lowbit)
            step()
        except ImportError as error:
            print(f"{name}: without {label} ({error})")
            continue
        kept[label] = kept_bytes(net, loss)
        steps[label] = step
    timings = alternate(steps, rounds)
    return {label: {**asdict(timing), "kept_mb": kept[label] / 1e6} for label, timing in timings.items()}


def show(name: str, rows: dict[str, dict[str, Any]]) -> None:
    base, compiled = rows["float"], rows.get("float compiled")
    print(f"\n{name}, batch {NETS[name][1][0]}, one thread")
    print(f"{'':22}{'ms':>8}{'min':>8}{'/ float':>9}{'kept MB':>9}{'/ float':>9}{'/ float compiled':>18}")
    for label, row in rows.items():
        line = f"{label:22}{row['median_ms']:8.1f}{row['min_ms']:8.1f}{row['ratio']:9.2f}"
        line += f"{row['kept_mb']:9.1f}{row['kept_mb'] / base['kept_mb']:9.2f}"
        if compiled is not None and "compiled" in label:
            line += f"{row['ratio'] / compiled['ratio']:18.2f}"
        print(line)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nets", nargs="+", choices=NETS, default=list(NETS))
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--no-compile", action="store_true", help="leave out the compiled steps")
    parser.add_argument("--json", type=Path, help="write the figures here")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")  # the other tools use much that torch has deprecated
    results = {}
    for name in options.nets:
        results[name] = measure(name, options.rounds, not options.no_compile)
        show(name, results[name])
    if options.json is not None:
        about = {
            "torch": torch.__version__,
            "machine": platform.machine(),
            "threads": torch.get_num_threads(),
        }
        options.json.write_text(json.dumps({"about": about, "nets": results}, indent=2) + "\n")


if __name__ == "__main__":
    main()

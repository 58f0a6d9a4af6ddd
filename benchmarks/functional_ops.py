"""What it costs to give functional operations quantizers: the alternatives of docs/decisions/0001.

Forward and backward over the same float network, in one process, alternating, one thread's CPU time.
"""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from timing import alternate
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lightning_lowbit.graph.network import follow
from lightning_lowbit.graph.rewrite import TracedForward


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(width, width, 3, padding=1), nn.Conv2d(width, width, 3, padding=1)
        self.unused = nn.Linear(2, 2)  # a child that forward does not call

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.conv1(x))
        return F.relu(self.conv2(y) + x)


class Net(nn.Module):
    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.blocks = nn.Sequential(*[Block(width) for _ in range(depth)])
        self.fc = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(F.relu(self.stem(x)))
        return self.fc(F.adaptive_avg_pool2d(x, 1).flatten(1))


class Intercept(TorchFunctionMode):
    """Sees every torch function, as a mode that looks up sites would."""

    def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]  # torch's signature
        if func is F.relu or func is torch.Tensor.add:
            return func(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def rewritten(net: nn.Module) -> nn.Module:
    for path in follow(net).containers:
        module = net.get_submodule(path)
        module.__dict__["forward"] = TracedForward(module, path, {}, {})
    return net


def main() -> None:
    torch.manual_seed(0)
    for name, width, depth, shape in (("tiny", 4, 3, (2, 3, 8, 8)), ("ResNet-20-like", 16, 9, (64, 3, 32, 32))):
        net, x = Net(width, depth), torch.randn(shape)
        graph_module, traced = torch.fx.symbolic_trace(copy.deepcopy(net)), rewritten(copy.deepcopy(net))

        def under_mode(net: nn.Module = net, x: Tensor = x) -> None:
            with Intercept():
                net(x).sum().backward()

        candidates = {
            "as written": lambda net=net, x=x: net(x).sum().backward(),
            "TorchFunctionMode": under_mode,
            "GraphModule": lambda m=graph_module, x=x: m(x).sum().backward(),
            "forward rewritten in place": lambda m=traced, x=x: m(x).sum().backward(),
        }
        times = alternate(candidates, rounds=30 if name == "tiny" else 9)
        for label, timing in times.items():
            print(f"{name:16} {label:28} {timing.ratio:.2f}")
        lost = len(net.state_dict()) - len(graph_module.state_dict())
        kept = len(net.state_dict()) - len(traced.state_dict())
        print(f"{name:16} GraphModule drops {lost} of {len(net.state_dict())} keys; rewritten in place drops {kept}")


if __name__ == "__main__":
    main()

"""Block-wise reconstruction: a quantized network learns from its float self, block by block, without labels."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_lowbit.modules.base import LowBitModule, Mode, mode, switch_of
from lightning_lowbit.modules.layers import LowBitLayer
from lightning_lowbit.modules.quantizer import Quantizer

__all__ = ["Block", "blocks", "reconstruct"]

MOST_LAYERS = 4


@dataclass
class Block:
    """A module of at most four layers, with what it was fed and what the float network makes of it."""

    path: str
    module: nn.Module
    inputs: list[tuple[tuple[Any, ...], dict[str, Any]]] = field(default_factory=list)
    targets: list[Tensor] = field(default_factory=list)


def blocks(root: nn.Module) -> list[Block]:
    """The largest modules with at most four low-bit layers that return a tensor when called, in execution order."""
    order = {layer.path: n for n, layer in enumerate(switch_of(root).conversion.layers)}
    found: list[Block] = []

    def visit(path: str, module: nn.Module) -> None:
        layers = [m for m in module.modules() if isinstance(m, LowBitLayer)]
        callable_itself = not isinstance(module, (nn.ModuleList, nn.ModuleDict)) and path != ""
        if layers and callable_itself and len(layers) <= MOST_LAYERS:
            found.append(Block(path, module))
        elif layers:
            for name, child in module.named_children():
                visit(f"{path}.{name}" if path else name, child)

    visit("", root)
    first = {b.path: min(order.get(m.path, 0) for m in b.module.modules() if isinstance(m, LowBitLayer)) for b in found}
    return sorted(found, key=lambda block: first[block.path])


def reconstruct(
    root: nn.Module, run: Callable[[], int], steps: int, lr: float, threshold_lr: float
) -> dict[str, tuple[float, float]]:
    """Train each block so that its output, on inputs from the quantized network before it, is the float one's.

    Loss: mean squared error, Adam on the block's weights (``lr``) and thresholds (``threshold_lr``), batch norms
    frozen. Labels and the user's loss play no part.

    Args:
        root: converted and calibrated.
        run: feeds the same batches each time it is called.
        steps: Adam steps a block.
    Returns:
        block path -> (error before, error after), mean over the batches.
    """
    switch, errors = switch_of(root), {}
    training = [m for m in root.modules() if m.training]
    root.eval()
    try:
        originals = {parameter: parameter.detach().clone() for parameter in root.parameters()}
        for block in blocks(root):
            with (
                torch.no_grad(),
                _holding(originals),
                _recording(block, outputs=True),
                mode([switch], Mode.FOLDED),
            ):
                run()
            with torch.no_grad(), _recording(block, outputs=False):
                run()
            if block.targets and len(block.inputs) == len(block.targets):
                errors[block.path] = _fit_block(block, steps, lr, threshold_lr)
    finally:
        for m in training:
            m.training = True
    return errors


@contextmanager
def _holding(values: dict[nn.Parameter, Tensor]) -> Iterator[None]:
    """The float network is the one before any block was trained."""
    present = {parameter: parameter.detach().clone() for parameter in values}
    try:
        for parameter, value in values.items():
            parameter.copy_(value)
        yield
    finally:
        for parameter, value in present.items():
            parameter.copy_(value)


@contextmanager
def _recording(block: Block, outputs: bool) -> Iterator[None]:
    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        if not isinstance(result, Tensor):
            return
        if outputs:
            block.targets.append(result.detach())
        else:
            block.inputs.append((args, kwargs))

    handle = block.module.register_forward_hook(note, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def _fit_block(block: Block, steps: int, lr: float, threshold_lr: float) -> tuple[float, float]:
    quantizers = [m for m in block.module.modules() if isinstance(m, Quantizer)]
    thresholds = list({id(p): p for q in quantizers for p in q.parameters() if p.requires_grad}.values())
    held = {id(p) for p in thresholds}
    low = [m for m in block.module.modules() if isinstance(m, LowBitModule)]
    weights = [p for m in low for p in m.parameters(recurse=False) if p.requires_grad and id(p) not in held]
    optimizer = torch.optim.Adam([{"params": weights, "lr": lr}, {"params": thresholds, "lr": threshold_lr}])
    before = _error(block)
    best, kept = before, [p.detach().clone() for p in (*weights, *thresholds)]
    for step in range(steps):
        index = step % len(block.inputs)
        args, kwargs = block.inputs[index]
        with torch.enable_grad():
            loss = F.mse_loss(block.module(*args, **kwargs), block.targets[index])
            gradients = torch.autograd.grad(loss, [*weights, *thresholds], allow_unused=True)
        for parameter, gradient in zip((*weights, *thresholds), gradients, strict=True):
            parameter.grad = gradient
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if (step + 1) % max(1, steps // 4) == 0 and (error := _error(block)) < best:
            best, kept = error, [p.detach().clone() for p in (*weights, *thresholds)]
    with torch.no_grad():
        for parameter, value in zip((*weights, *thresholds), kept, strict=True):
            parameter.copy_(value)
    return before, best


@torch.no_grad()
def _error(block: Block) -> float:
    losses = [F.mse_loss(block.module(*a, **k), t) for (a, k), t in zip(block.inputs, block.targets, strict=True)]
    return float(torch.stack(losses).mean())

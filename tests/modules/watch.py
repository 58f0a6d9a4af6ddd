"""Looks at every operand and result of an evaluation, from outside the package's own modules."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lightning_lowbit.modules.base import LowBitModule
from lightning_lowbit.modules.elementwise import LowBitAdd, LowBitAvgPool, LowBitCat
from lightning_lowbit.modules.layers import LowBitLayer
from lightning_lowbit.modules.quantizer import Quantizer
from lightning_lowbit.numerics.grid import Grid
from lightning_lowbit.reports.summary import Summary

CONVOLUTIONS = {
    torch.conv1d, torch.conv2d, torch.conv3d, torch.conv_transpose1d, torch.conv_transpose2d,
    torch.conv_transpose3d, F.conv1d, F.conv2d, F.conv3d, F.conv_transpose1d, F.conv_transpose2d,
    F.conv_transpose3d, F.linear,
}  # fmt: skip
MAX_POOLS = {F.max_pool1d, F.max_pool2d, F.max_pool3d, torch.max_pool1d, torch.max_pool2d, torch.max_pool3d}
CATS = {torch.cat, torch.stack}


class GridWatch(TorchFunctionMode):
    """Compares tensors with the grids that a report prints.

    A tensor that a quantizer returned is remembered with that quantizer's row, through every function that
    only moves values; an operand is then compared with the row of the quantizer that it came from, and a
    result with the row of its layer. Tensors on no printed grid are collected in ``off``.
    """

    def __init__(self, net: nn.Module, report: Summary) -> None:
        super().__init__()
        self.report, self.off, self.seen = report, [], Counter()
        self.stack: list[nn.Module] = []
        self.grids: dict[int, tuple[Tensor, Grid]] = {}  # id -> (kept alive, grid)
        self.handles = []
        for module in net.modules():
            self.handles.append(module.register_forward_pre_hook(lambda m, args: self.stack.append(m)))
            self.handles.append(module.register_forward_hook(self._leave))

    def _leave(self, module: nn.Module, args: Any, result: Any) -> None:
        self.stack.pop()
        if isinstance(module, Quantizer):
            site = module.site
            row = self.report[f"{site.path}.{site.slot.removeprefix('lowbit_')}"]
            assert row.grid is not None, f"{site.key} is open"
            self._remember(result, row.grid)
        elif isinstance(module, (LowBitAdd, LowBitCat)) and module.lowbit_output is None:
            self._check(
                result,
                self.report[f"{module.path}.{'sum' if isinstance(module, LowBitAdd) else 'concat'}"].grid,
            )
        elif isinstance(module, LowBitAvgPool):
            self._check(result, self._grid_of(result))

    def _remember(self, tensor: Tensor, grid: Grid) -> None:
        self.grids[id(tensor)] = (tensor, grid)

    def _grid_of(self, tensor: Tensor) -> Grid | None:
        return self.grids[id(tensor)][1] if id(tensor) in self.grids else None

    def _check(self, tensor: Tensor, grid: Grid | None) -> None:
        where = next((m.path for m in reversed(self.stack) if isinstance(m, LowBitModule)), "outside")
        if grid is None:
            self.off.append(f"{where}: on no printed grid")
        elif not grid.contains(tensor):
            self.off.append(f"{where}: not on {grid}")

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        inside = self.stack[-1] if self.stack else None
        if isinstance(inside, Quantizer):
            return result
        if isinstance(result, (tuple, list)) and args and isinstance(args[0], Tensor):
            grid = self._grid_of(args[0])
            for part in result:
                if grid is not None and isinstance(part, Tensor) and grid.contains(part):
                    self._remember(part, grid)
        if not isinstance(result, Tensor):
            return result
        if isinstance(inside, LowBitLayer) and func in CONVOLUTIONS:
            self.seen["compute"] += 1
            for operand in (*args[:3], *(kwargs.get(n) for n in ("input", "weight", "bias"))):
                if isinstance(operand, Tensor):
                    self._check(operand, self._grid_of(operand))
            row = self.report[f"{inside.path}.sum"]
            self._check(result, row.grid)
            if row.grid is not None:
                self._remember(result, row.grid)
        elif isinstance(inside, (LowBitAdd, LowBitCat)):
            operands = [t for t in (args[0] if func in CATS else args[:2]) if isinstance(t, Tensor)]
            self.seen["cat" if func in CATS else "add"] += 1
            for operand in operands:
                self._check(operand, self._grid_of(operand))
            grids = [self._grid_of(operand) for operand in operands]
            if all(grid is not None for grid in grids):
                assert len({grid.exponent for grid in grids}) == 1, f"{inside.path}: operands on {grids}"
                assert func not in CATS or len(set(grids)) == 1, f"{inside.path}: operands on {grids}"
            role = "concat" if func in CATS else "sum"
            self._remember(result, self.report[f"{inside.path}.{role}"].grid)
        elif isinstance(inside, LowBitAvgPool):
            self.seen["avg_pool"] += 1
            if isinstance(args[0], Tensor) and func not in (torch.Tensor.div, torch.Tensor.__truediv__):
                self._check(args[0], self._grid_of(args[0])) if id(args[0]) in self.grids else None
        else:
            source = args[1 if func is Tensor.copy_ else 0] if args else None
            first = source if isinstance(source, Tensor) else None
            if func in MAX_POOLS:
                self.seen["max_pool"] += 1
            grid = None if first is None else self._grid_of(first)
            if grid is not None and (func in MAX_POOLS or grid.contains(result)):
                self._check(result, grid)
                self._remember(result, grid)
        return result

    def close(self) -> None:
        for handle in self.handles:
            handle.remove()


def watch(net: nn.Module, report: Summary, x: Tensor) -> GridWatch:
    """Run one evaluation under the watch."""
    mode = GridWatch(net, report)
    try:
        with torch.no_grad(), mode:
            net(x)
    finally:
        mode.close()
    return mode

"""A layer that ran in calibration must run in evaluation: fused paths read weights and call nothing."""

from __future__ import annotations

from typing import Any

from torch import nn

from lightning_lowbit.errors import UnsupportedModelError
from lightning_lowbit.modules.base import switch_of
from lightning_lowbit.modules.convert import Selection
from lightning_lowbit.modules.layers import LowBitLayer

__all__ = ["Presence"]


class Presence:
    """Looks at the first evaluation batch after calibration, once.

    A silent layer counts only if the container that holds it ran: the discriminator of a GAN need not be
    evaluated.
    """

    def __init__(self, selection: Selection) -> None:
        self.selection = selection
        self.expected: set[str] = set()
        self.handles: list[Any] = []
        self.ran: set[str] = set()

    def expect(self, model: nn.Module) -> None:
        self.expected = {m.path for m in model.modules() if isinstance(m, LowBitLayer)}

    def watch(self, model: nn.Module) -> None:
        if not self.expected:
            return
        self.ran = set()
        switch_of(model).ran = set()
        for parent in {path.rpartition(".")[0] for path in self.expected}:
            self.handles.append(model.get_submodule(parent).register_forward_pre_hook(_Note(self.ran, parent)))

    def check(self, model: nn.Module) -> None:
        if not self.expected or not self.handles:
            return
        switch = switch_of(model)
        ran, switch.ran = switch.ran or set(), None
        reached = {path for path in self.expected - ran if path.rpartition(".")[0] in self.ran}
        silent = sorted(path for path in reached if not self.selection.skips(path, model.get_submodule(path)))
        self.forget()
        self.expected = set()
        if silent:
            raise UnsupportedModelError(
                f"{silent[0]}: converted and calibrated, but the first evaluation batch went through "
                f"{silent[0].rpartition('.')[0] or type(model).__name__} without calling it"
                f"{f' ({len(silent)} layers in all)' if len(silent) > 1 else ''}"
                ". Its weights are used unquantized there, or not at all. If that is meant, pass "
                f"skip=['{silent[0]}']."
            )

    def forget(self) -> None:
        for handle in self.handles:
            handle.remove()
        self.handles.clear()


class _Note:
    def __init__(self, ran: set[str], path: str) -> None:
        self.ran, self.path = ran, path

    def __call__(self, module: nn.Module, args: Any) -> None:
        self.ran.add(self.path)

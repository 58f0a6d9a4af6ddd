"""What Jacinto does between batches: ranges that all processes share, ranges and statistics that stand still."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from lightning_lowbit.modules.base import StepContext, UpdateRule
from lightning_lowbit.modules.clipped import ClipQuantizer

if TYPE_CHECKING:
    from lightning_lowbit.schemes.jacinto import Jacinto

__all__ = ["RangeRule"]


class RangeRule(UpdateRule):
    """All weights are the user's optimizer's; ranges follow the batches in the forward pass, and processes meet here.

    Args:
        scheme: the options.
        modules: low-bit modules by path.
    """

    def __init__(self, scheme: Jacinto, modules: dict[str, nn.Module]) -> None:
        self.scheme = scheme
        found = [quantizer for module in modules.values() for quantizer in _quantizers_at(module)]
        self.ranges = list({id(q): q for q in found if isinstance(q, ClipQuantizer)}.values())
        norms = [norm for module in modules.values() for norm in _norms_at(module)]
        self.norms = list({id(norm): norm for norm in norms}.values())
        self.held: list[nn.Module] = []  # norms put into evaluation mode, in the order of ``norms``

    def step(self, owned: set[str], context: StepContext) -> None:
        """Nothing is updated outside the user's optimizer."""

    def before_batch(self, continues: bool) -> None:
        for norm in self.held:  # the user's code may have called train()
            norm.training = False
        for quantizer in self.ranges:
            quantizer.begin_batch()

    def after_batch(self, context: StepContext) -> None:
        moving = [quantizer for quantizer in self.ranges if quantizer.follows]
        if context.world == 1 or self.scheme.range_sync != "mean" or not moving:
            return
        clips = context.reduce_mean(torch.stack([quantizer.clips for quantizer in moving]))
        for quantizer, mean in zip(moving, clips, strict=True):
            quantizer.clips.copy_(mean)

    def end_run(self) -> None:
        self.milestone("freeze_batch_norm", False, 0)

    def milestone(self, what: str, reached: bool, when: int) -> None:
        if what == "freeze_ranges":
            for quantizer in self.ranges:
                quantizer.frozen = reached
        elif what == "freeze_batch_norm" and reached != bool(self.held):
            changed = self.held or [norm for norm in self.norms if norm.training]
            for norm in changed:
                norm.training = not reached
            self.held = changed if reached else []


def _quantizers_at(module: Any) -> list[Any]:
    """Those of a low-bit module, and those that put what it reads on a grid: behind a user's activation."""
    near = [*module.children(), module.__dict__.get("input_grid"), *module.__dict__.get("operand_grids", ())]
    return [member for child in near if child is not None for member in getattr(child, "group", ())]


def _norms_at(module: Any) -> list[nn.Module]:
    group = module.__dict__.get("group")
    return [] if group is None else group.norms

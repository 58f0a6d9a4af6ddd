"""Whether training gives the same bits on any machine, and if not, which of its sums are float."""

from __future__ import annotations

from torch import nn

from lightning_lowbit.modules.base import low_bit_modules, switch_of
from lightning_lowbit.modules.convert import quantizers

__all__ = ["differs"]

_BACKWARD = ("error", "weight_grad")  # roles of what only the backward pass rounds


def differs(module: nn.Module) -> str:
    """Why training may give other bits on another machine; "" where it may not.

    Args:
        module: converted.
    """
    conversion = switch_of(module).conversion
    if not all(low.scheme.carries_errors for _, low in low_bit_modules(module)):
        if any(quantizer.site.role in _BACKWARD for _, quantizer in quantizers(module)):
            return "gradients are quantized, between float sums: the loss, batch norms, layers that stay float"
        return "gradients are float"
    islands = [*conversion.skipped, *(path for paths in conversion.float_by_nature.values() for path in paths)]
    islands += conversion.uncovered
    return f"{len(islands)} float island{'s' * (len(islands) > 1)}, {islands[0]} first" if islands else ""

"""The way back: a converted network as the float network that it was, weights as they are now."""

from __future__ import annotations

from torch import nn

from lightning_lowbit.graph.rewrite import TracedForward
from lightning_lowbit.modules.convert import PassThrough
from lightning_lowbit.modules.elementwise import LowBitOp
from lightning_lowbit.modules.exits import Exit
from lightning_lowbit.modules.layers import LAYERS, LowBitLayer
from lightning_lowbit.modules.norm import NORMS, LowBitBatchNorm
from lightning_lowbit.modules.quantizer import Quantizer
from lightning_lowbit.modules.slow_path import SlowPath

__all__ = ["revert"]

_FLOAT = {low: plain for plain, low in (*LAYERS.items(), *NORMS.items())}
_STATE = (
    "group", "norm", "input_grid", "path", "scheme", "switch", "pattern", "norm_frozen", "requested",
    "ungraded", "gathered", "island", "since", "narrow", "rounded_by",
)  # fmt: skip


def revert(root: nn.Module) -> None:
    """Take all low-bit modules out again, in place; parameters and their names stay."""
    for parent in list(root.modules()):
        if isinstance(parent.__dict__.get("forward"), (TracedForward, SlowPath)):
            del parent.__dict__["forward"]
        for name, child in list(parent._modules.items()):
            if isinstance(child, Quantizer) or (child is None and name.startswith("lowbit_")):
                del parent._modules[name]
            elif isinstance(child, LowBitOp):
                if child.replaced is None:
                    del parent._modules[name]
                else:
                    parent._modules[name] = child.replaced
        for hooks in (parent._forward_hooks, parent._forward_pre_hooks):
            for key, hook in list(hooks.items()):
                if isinstance(hook, (PassThrough, Exit)):
                    del hooks[key]
    for module in root.modules():
        if isinstance(module, (LowBitLayer, LowBitBatchNorm)):
            for name in [name for name in module._buffers if name.startswith("lowbit_")]:
                del module._buffers[name]
                module._non_persistent_buffers_set.discard(name)
            for name in _STATE:
                module.__dict__.pop(name, None)
            module.__class__ = _FLOAT[type(module)]  # type: ignore[assignment]  # it was that before

"""The way back: a converted network as the float network that it was, weights as they are now."""

from __future__ import annotations

from torch import nn

from lightning_lowbit.graph.rewrite import TracedForward
from lightning_lowbit.modules.convert import PassThrough
from lightning_lowbit.modules.elementwise import LowBitOp
from lightning_lowbit.modules.layers import LAYERS, LowBitLayer
from lightning_lowbit.modules.norm import NORMS, LowBitBatchNorm
from lightning_lowbit.modules.quantizer import Quantizer

__all__ = ["revert"]

_FLOAT = {low: plain for plain, low in (*LAYERS.items(), *NORMS.items())}
_STATE = ("norm", "input_grid", "path", "scheme", "switch", "pattern", "links_in", "links_out", "norm_frozen", "requested")


def revert(root: nn.Module) -> None:
    """Take all low-bit modules out again, in place; parameters and their names stay."""
    for parent in list(root.modules()):
        if isinstance(parent.__dict__.get("forward"), TracedForward):
            del parent.__dict__["forward"]
        for name, child in list(parent._modules.items()):
            if isinstance(child, Quantizer) or (child is None and name.startswith("lowbit_")):
                del parent._modules[name]
            elif isinstance(child, LowBitOp):
                if child.replaced is None:
                    del parent._modules[name]
                else:
                    parent._modules[name] = child.replaced
        for key, hook in list(parent._forward_hooks.items()):
            if isinstance(hook, PassThrough):
                del parent._forward_hooks[key]
    for module in root.modules():
        if isinstance(module, (LowBitLayer, LowBitBatchNorm)):
            module._buffers.pop("lowbit_norm_frozen", None)
            for name in _STATE:
                module.__dict__.pop(name, None)
            module.__class__ = _FLOAT[type(module)]



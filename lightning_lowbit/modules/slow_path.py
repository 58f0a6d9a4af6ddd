"""Encoder layers have a fused evaluation path that calls nothing; low-bit ones must not take it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from lightning_lowbit.modules.base import Switch

__all__ = ["SlowPath"]

# With something false in it, forward takes the path of training, in which every layer is called.
_OPENS_FUSED_PATH = {
    nn.TransformerEncoderLayer: "activation_relu_or_gelu",
    nn.TransformerEncoder: "use_nested_tensor",
}


@dataclass(eq=False)
class SlowPath:
    """The forward of an nn.TransformerEncoder or one of its layers, to put in ``module.__dict__["forward"]``.

    Not a hook: any hook closes the fused path to the float network too, whose numbers would then differ.
    """

    module: nn.Module
    switch: Switch

    @staticmethod
    def applies(module: nn.Module) -> bool:
        return isinstance(module, tuple(_OPENS_FUSED_PATH))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        module = self.module
        if not self.switch.folding:
            return type(module).forward(module, *args, **kwargs)
        name = next(name for cls, name in _OPENS_FUSED_PATH.items() if isinstance(module, cls))
        kept = getattr(module, name)
        setattr(module, name, type(kept)(0))
        try:
            return type(module).forward(module, *args, **kwargs)
        finally:
            setattr(module, name, kept)

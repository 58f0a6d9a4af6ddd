"""torch.compile for the converted parts: in place, names unchanged, the LightningModule itself left alone."""

from __future__ import annotations

import os
import shutil

import torch
from lightning_utilities.core.rank_zero import rank_zero_info
from torch import nn

from lightning_lowbit.graph.rewrite import TracedForward
from lightning_lowbit.modules.base import LowBitModule

__all__ = ["compile_in_place"]

# Each phase (float, batch norm live, frozen; train and eval) is a variant of the same code to torch.compile,
# whose
# limit of 8 would end in eager with only a warning.
_VARIANTS = 64


def compile_in_place(model: nn.Module) -> None:
    """Compile the root's traced forward, or its children that hold low-bit modules.

    torch.compile of a whole LightningModule fails in training_step as soon as it logs.
    """
    if not _has_compiler():
        rank_zero_info("lightning_lowbit: compile=True, but there is no C++ compiler (g++ or $CXX): running eager.")
        return
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, _VARIANTS)
    forward = model.__dict__.get("forward")
    if isinstance(forward, TracedForward):
        forward.compile()
        return
    for child in model.children():
        if any(isinstance(m, LowBitModule) for m in child.modules()) and child._compiled_call_impl is None:
            child.compile()


def _has_compiler() -> bool:
    return any(shutil.which(name) for name in (os.environ.get("CXX", "g++"), "clang++", "c++"))

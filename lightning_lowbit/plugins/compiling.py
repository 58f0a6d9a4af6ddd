"""torch.compile for the converted parts: in place, names unchanged, the LightningModule itself left alone."""

from __future__ import annotations

import os
import shutil

import torch
from lightning_utilities.core.rank_zero import rank_zero_info
from torch import nn

from lightning_lowbit.graph.rewrite import TracedForward
from lightning_lowbit.kernels import fusion
from lightning_lowbit.modules.base import LowBitModule, low_bit_modules
from lightning_lowbit.plugins.patching import Patches

__all__ = ["compile_in_place"]

# Each phase (float, batch norm live, frozen; train and eval) is a variant of the same code to torch.compile, whose
# limit of 8 would end in eager with only a warning.
_VARIANTS = 64


def compile_in_place(model: nn.Module, patches: Patches) -> None:
    """Compile the root's traced forward, or its children that hold low-bit modules.

    torch.compile of a whole LightningModule fails in training_step as soon as it logs.

    Args:
        model: a converted module.
        patches: undone when the run ends.
    """
    if not _has_compiler():
        rank_zero_info("lightning_lowbit: compile=True, but there is no C++ compiler (g++ or $CXX): running eager.")
        return
    if all(module.scheme.integer_kernels for _, module in low_bit_modules(model)):
        # Around integer products there is no float operation to fuse: what gains is compiled by the kernels themselves,
        # large tensors by default and now the small ones too.
        patches.set(fusion, "chosen_policies", ["always"])
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

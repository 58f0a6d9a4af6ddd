"""Reductions over the processes of a run, and what DistributedDataParallel must leave alone."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

from lightning_lowbit.modules.base import low_bit_modules
from lightning_lowbit.modules.convert import quantizers
from lightning_lowbit.plugins.patching import Patches

__all__ = ["all_reduce", "ignore_in_ddp", "reduce_max", "reduce_mean", "reduce_sum", "share_ignored"]

_IGNORED = "_ddp_params_and_buffers_to_ignore"


def all_reduce(tensor: Tensor, op: str) -> Tensor:
    """Combine over processes by "sum" or "max"; the tensor itself on one process."""
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return tensor
    result = tensor.clone()
    dist.all_reduce(result, dist.ReduceOp.SUM if op == "sum" else dist.ReduceOp.MAX)
    return result


def reduce_sum(tensor: Tensor) -> Tensor:
    """Sum over processes; exact for integer tensors that do not overflow (gloo wraps int8: use int32)."""
    return all_reduce(tensor, "sum")


def reduce_max(tensor: Tensor) -> Tensor:
    """Maximum over processes, element by element."""
    return all_reduce(tensor, "max")


def reduce_mean(tensor: Tensor) -> Tensor:
    world = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
    return reduce_sum(tensor) / world


def ignore_in_ddp(model: nn.Module, strategy: Any, patches: Patches) -> None:
    """List what no gradient of DDP's reducer reaches; with nothing left for it there is no wrap.

    These are quantizers (their gradients come late or never, and the update rule averages them) and what a
    scheme updates itself.
    """
    names = {
        f"{path}.{name}" for path, q in quantizers(model) for name, _ in (*q.named_parameters(), *q.named_buffers())
    }
    own = {id(t) for _, q in quantizers(model) for t in (*q.parameters(), *q.buffers())}
    own |= {id(getattr(module, name)) for _, module in low_bit_modules(model) for name in module.ungraded}
    every = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    names |= {name for name, tensor in every if id(tensor) in own}
    patches.set(model, _IGNORED, sorted(names))
    left = [name for name, p in model.named_parameters(remove_duplicate=False) if p.requires_grad and name not in names]
    if not left and hasattr(strategy, "configure_ddp"):
        patches.set(strategy, "configure_ddp", lambda: None)


def share_ignored(model: nn.Module) -> None:
    """Give all processes rank 0's values of what DDP will not broadcast."""
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return
    names = set(getattr(model, _IGNORED, ()))
    for name, tensor in sorted([*model.named_parameters(), *model.named_buffers()]):
        if name in names:
            dist.broadcast(tensor.detach(), src=0)
    for _, quantizer in quantizers(model):
        quantizer.refresh()

"""Reductions over the processes of a run, and what DistributedDataParallel must leave alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_lowbit.errors import InvariantError
from lightning_lowbit.modules.base import StepContext, low_bit_modules
from lightning_lowbit.modules.convert import quantizers
from lightning_lowbit.plugins.patching import Patches

__all__ = [
    "Traffic", "all_reduce", "counted", "ignore_in_ddp", "process_rank", "reduce_max", "reduce_mean", "reduce_sum",
    "reduce_sum_flat", "share_ignored", "step_context", "world_size",
]  # fmt: skip

_IGNORED = "_ddp_params_and_buffers_to_ignore"


@dataclass
class Traffic:
    """What this process handed to collectives, by kind: "sum int32" -> [calls, bytes].

    DistributedDataParallel's own reductions are not among them. One process alone has none.

    Attributes:
        steps: one entry for each ``end_step``.
        open: since the last one.
    """

    steps: list[dict[str, list[int]]] = field(default_factory=list)
    open: dict[str, list[int]] = field(default_factory=dict)

    def count(self, kind: str, tensor: Tensor) -> None:
        entry = self.open.setdefault(f"{kind} {str(tensor.dtype).removeprefix('torch.')}", [0, 0])
        entry[0] += 1
        entry[1] += tensor.numel() * tensor.element_size()

    def end_step(self) -> None:
        self.steps.append(self.open)
        self.open = {}


_COUNTING: list[Traffic] = []


@contextmanager
def counted() -> Iterator[Traffic]:
    """Count collectives inside the with-block; whoever runs the steps calls ``end_step`` on what it yields."""
    traffic = Traffic()
    _COUNTING.append(traffic)
    try:
        yield traffic
    finally:
        # By identity: two that counted the same are equal.
        _COUNTING[:] = [other for other in _COUNTING if other is not traffic]


def world_size() -> int:
    """Processes of the run; 1 where there is no process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def process_rank() -> int:
    """This process among them, in [0, world_size)."""
    return dist.get_rank() if world_size() > 1 else 0


def all_reduce(tensor: Tensor, op: str) -> Tensor:
    """Combine over processes by "sum" or "max"; the tensor itself on one process."""
    if world_size() == 1:
        return tensor
    for traffic in _COUNTING:
        traffic.count(op, tensor)
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
    return reduce_sum(tensor) / world_size()


def reduce_sum_flat(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Sum integer tensors over processes in one collective for each dtype; the tensors themselves on one process.

    Integer addition is associative, so that neither the buffer's layout nor the number of processes changes a bit,
    even where a sum wraps around.

    Args:
        tensors: int32 and int64 of any shape, in the same order, shapes and dtypes on every process.
    Returns:
        the sums, each with its tensor's shape and dtype, contiguous.
    Raises:
        InvariantError: another dtype; narrower integers would wrap, and the order of a float sum counts.
    """
    for tensor in tensors:
        if tensor.dtype not in (torch.int32, torch.int64):
            raise InvariantError(f"reduce_sum_flat: got {tensor.dtype} {tuple(tensor.shape)}, expected int32 or int64.")
    if world_size() == 1:
        return list(tensors)
    sums: dict[int, Tensor] = {}
    for dtype in (torch.int32, torch.int64):
        places = [place for place, tensor in enumerate(tensors) if tensor.dtype is dtype]
        if places:
            flat = reduce_sum(torch.cat([tensors[place].reshape(-1) for place in places]))
            parts = flat.split_with_sizes([tensors[place].numel() for place in places])
            sums |= {place: part.view(tensors[place].shape) for place, part in zip(places, parts, strict=True)}
    return [sums[place] for place in range(len(tensors))]


def step_context(step: int, total: int | None) -> StepContext:
    """What an update rule may know of step ``step`` of ``total``, with the reductions over this run's processes."""
    return StepContext(step, total, reduce_sum, reduce_mean, reduce_max, reduce_sum_flat, world_size())


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
        # The wrap would also have given all processes one network.
        patches.set(strategy, "configure_ddp", lambda: _broadcast(model, {name for name, _ in every} - names))


def share_ignored(model: nn.Module) -> None:
    """Give all processes rank 0's values of what neither DDP nor Lightning's evaluation broadcasts."""
    if world_size() > 1:
        _broadcast(model, set(getattr(model, _IGNORED, ())))
        for _, quantizer in quantizers(model):
            quantizer.refresh()


def _broadcast(model: nn.Module, names: set[str]) -> None:
    for name, tensor in sorted([*model.named_parameters(), *model.named_buffers()]):
        if name in names and world_size() > 1:
            dist.broadcast(tensor.detach(), src=0)

"""A program holds for any batch: what a network's calls are given must not come from one batch's size or values."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from lightning_lowbit.errors import UnsupportedModelError
from lightning_lowbit.export.moves import BATCHES
from lightning_lowbit.export.record import Node, Recording, Ref

__all__ = ["alive", "refs_of", "require_same_calls", "require_same_numbers", "without_batch"]


def refs_of(structure: Any) -> list[Ref]:
    return [x for x in tree_flatten(structure)[0] if isinstance(x, Ref)]


def alive(recording: Recording) -> set[int]:
    """Calls that the network's result depends on; the others only check something."""
    found: set[int] = set()
    waiting = refs_of(recording.output)
    while waiting:
        node = waiting.pop().node
        if node >= 0 and node not in found:
            found.add(node)
            waiting += refs_of((recording.nodes[node].args, recording.nodes[node].kwargs))
    return found


def require_same_calls(small: Recording, large: Recording) -> None:
    """UnsupportedModelError where two recordings, of batches of other sizes and values, part."""
    paths = [[node.path for node in recording.nodes] for recording in (small, large)]
    if paths[0] != paths[1]:
        other = next((a for a, b in zip(*paths, strict=False) if a != b), "its last call")
        raise UnsupportedModelError(
            f"{other}: the forward makes other calls for another batch, of {BATCHES[1]} samples in place of "
            f"{BATCHES[0]} and of other values. Keep branches apart from sizes and values."
        )


def require_same_numbers(node: Node, twin: Node, scales: bool) -> None:
    """UnsupportedModelError where a call computes with numbers that are another batch's.

    Args:
        node, twin: one call at the sizes of ``BATCHES``.
        scales: it takes sizes, which may be multiples of the batch.
    """
    (leaves, tree), (others, other_tree) = (
        tree_flatten((node.args, node.kwargs)),
        tree_flatten((twin.args, twin.kwargs)),
    )
    same = tree == other_tree
    for a, b in zip(leaves, others, strict=same):
        if not same or not _same(a, b, scales):
            raise UnsupportedModelError(
                f"{node.path}: it computes with {_shown(a)} for one batch and with {_shown(b)} for another; a program "
                "would keep the first. Compute with tensors (x.amax(1, True) for x.max().item()), or with a constant."
            )


def _same(a: Any, b: Any, scales: bool) -> bool:
    if isinstance(a, Ref) or isinstance(b, Ref):
        return type(a) is type(b)
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        zeros = a.dim() == b.dim() and not bool(a.any()) and not bool(b.any())
        return zeros or (a.shape == b.shape and torch.equal(a, b)) or _same_rows(a, b)
    if type(a) is int and type(b) is int and scales and a != b:
        return a * BATCHES[1] == b * BATCHES[0]
    if isinstance(a, slice) and isinstance(b, slice):
        ends = ((a.start, b.start), (a.stop, b.stop), (a.step, b.step))
        return all(_same(x, y, scales) for x, y in ends)
    return bool(a == b) if type(a) is type(b) else False


def _same_rows(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are one row, repeated for every sample."""
    sizes = a.dim() > 0 and a.dim() == b.dim() and (len(a), len(b)) == BATCHES
    return sizes and a.shape[1:] == b.shape[1:] and all(torch.equal(x, a[:1].expand_as(x)) for x in (a, b))


def without_batch(twin: Node, args: Any, kwargs: Any) -> Any:
    """Arguments of a call; of constants that were repeated for every sample one row."""
    leaves, tree = tree_flatten((args, kwargs))
    others = tree_flatten((twin.args, twin.kwargs))[0]
    for index, (x, other) in enumerate(zip(leaves, others, strict=True)):
        if isinstance(x, Tensor) and isinstance(other, Tensor) and bool(x.any()) and _same_rows(x, other):
            leaves[index] = x[:1]
    return tree_unflatten(leaves, tree)


def _shown(value: Any) -> str:
    return f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)

"""Give every quantizer its first grid from data, in at most two passes over the batches."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from lightning_lowbit.errors import ConfigError
from lightning_lowbit.modules.answers import check_grids, first_tensors
from lightning_lowbit.modules.base import LowBitModule, Mode, mode, switch_of
from lightning_lowbit.modules.convert import quantizers
from lightning_lowbit.modules.layers import LowBitLayer
from lightning_lowbit.modules.quantizer import Quantizer
from lightning_lowbit.numerics.observers import AllReduce

__all__ = ["calibrate", "open_quantizers", "reset"]


def alone(tensor: Tensor, op: str) -> Tensor:
    """Reduction over one process."""
    return tensor


def calibrate(
    root: nn.Module,
    run: Callable[[], int],
    all_reduce: AllReduce = alone,
    accept_silent: Callable[[str], bool] = lambda path: False,
) -> list[str]:
    """Observe what ``run`` feeds the network, in evaluation mode and float arithmetic, and set all grids.

    Args:
        root: a converted module.
        run: feeds the calibration batches, the same ones each time it is called; returns how many.
        all_reduce: combines statistics over processes.
        accept_silent: whether a layer may stay silent, by path.
    Returns:
        keys of sites that stay open, because their tensors were zero throughout.
    Raises:
        ConfigError: no batch, a value that is not finite, a converted layer that never ran, or a quantizer that leaves
            the grid that it declares.
    """
    switch = switch_of(root)
    training = [module for module in root.modules() if module.training]
    leaders = [q for q in (quantizer for _, quantizer in quantizers(root)) if q.group[0] is q]
    try:
        root.eval()
        switch.ran = set()
        with mode([switch], Mode.OBSERVE), torch.no_grad(), first_tensors(root) as seen:
            for again in (False, True):
                _observe_weights(root)
                if run() == 0:
                    raise ConfigError(
                        f"{type(root).__name__}: calibration got no batch. Check that the loader is not "
                        "empty (limit_train_batches, drop_last with a small dataset), or give another with "
                        "Calibrate(dataloader=...)."
                    )
                if again:
                    break
                _require_ran(root, switch.ran, accept_silent)
                asked = [leader.close_pass(all_reduce) for leader in leaders]  # of all, whatever the first says
                if not any(asked):
                    break
            for leader in leaders:
                leader.commit(all_reduce)
        switch.started = True
        for scheme in {id(m.scheme): m.scheme for m in root.modules() if isinstance(m, LowBitModule)}.values():
            with torch.no_grad():
                scheme.refine(root, run, all_reduce)
        check_grids(root, seen)
    finally:
        for _, quantizer in quantizers(root):
            quantizer.forget()  # after a refusal too: the next calibration starts from nothing
        switch.ran = None
        for module in training:
            module.training = True
    return open_quantizers(root)


def reset(root: nn.Module) -> None:
    """Forget all grids: the network is float until the next calibration."""
    for _, quantizer in quantizers(root):
        quantizer.set_ready(False)
    switch_of(root).started = switch_of(root).provisional = False


def open_quantizers(root: nn.Module) -> list[str]:
    """Keys of the sites without a grid, but for those that need none yet."""
    return [q.site.key for _, q in quantizers(root) if q.has_grid and not (q.ready or q.waits)]


def _observe_weights(root: nn.Module) -> None:
    """Weights and biases as the layers multiply with them: batch norm folded with its moving statistics."""
    for module in root.modules():
        if isinstance(module, LowBitLayer):
            weight, bias = module.effective(module.weight)
            for quantizer, tensor in ((module.lowbit_weight, weight), (module.lowbit_bias, bias)):
                if isinstance(quantizer, Quantizer) and tensor is not None:
                    quantizer.observe(tensor.detach())


def _require_ran(root: nn.Module, ran: set[str], accepted: Callable[[str], bool]) -> None:
    silent = [
        m.path for m in root.modules() if isinstance(m, LowBitLayer) and m.path not in ran and not accepted(m.path)
    ]
    if silent:
        raise ConfigError(
            f"{silent[0]}: converted, but it did not run in calibration"
            + (f" (nor did {len(silent) - 1} more: {', '.join(silent[1:4])})" if len(silent) > 1 else "")
            + ". A layer that is bypassed stays float unseen."
            + _branch(root, silent[0])
            + " If that is meant, name it in skip=; otherwise calibrate on batches that reach it."
        )


def _branch(root: nn.Module, path: str) -> str:
    """The forward around a silent layer that is not followed, if there is one: the layer may be in a branch of it."""
    around = [u for u in switch_of(root).conversion.untraced if not u.path or path.startswith(f"{u.path}.")]
    if not around:
        return ""
    inner = max(around, key=lambda untraced: len(untraced.path))
    name = inner.path or type(root).__name__
    return f" The forward around it is not followed: {name} ({inner.where}): {inner.reason}; it may stand in a branch."

"""What cannot work is refused by name before anything is lost: precision, strategy, neighbors, files."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import torch
from lightning_utilities.core.rank_zero import rank_zero_info
from torch import nn

from lightning_lowbit.errors import ConfigError
from lightning_lowbit.modules.base import UpdateRule

__all__ = [
    "check_checkpoint_file",
    "check_neighbors",
    "check_optimizers",
    "check_root_mode",
    "check_stepped",
    "check_trainer",
    "say_inert",
]

# By name: the same classes exist in two Lightning namespaces.
_COPIES_THE_MODEL = ("WeightAveraging", "EMAWeightAveraging", "StochasticWeightAveraging")
_EDITS_WEIGHTS = ("ModelPruning",)
_UNTESTED_STRATEGIES = (
    "FSDPStrategy",
    "ModelParallelStrategy",
    "DeepSpeedStrategy",
    "XLAStrategy",
    "XLAFSDPStrategy",
)


def _names(value: Any) -> list[str]:
    return [cls.__name__ for cls in type(value).__mro__]


def check_trainer(trainer: Any) -> None:
    """Refuse precisions and strategies under which the grids do not hold, or that nobody has tried."""
    precision = str(trainer.precision)
    if precision in ("16-true", "bf16-true", "transformer-engine", "transformer-engine-float16"):
        raise ConfigError(
            f"Trainer(precision={precision!r}): parameters in half precision cannot hold the grids (8 "
            "significant bits and the "
            "running sums of training). Expected '32-true', '64-true', 'bf16-mixed' or '16-mixed'."
        )
    strategy = trainer.strategy
    for name in _names(strategy):
        if name in _UNTESTED_STRATEGIES:
            raise ConfigError(
                f"Trainer(strategy={name}): low-bit training under it is untested and may be quietly wrong. "
                "Expected one device "
                "or strategy='ddp'."
            )
    launcher = getattr(strategy, "_start_method", "popen")
    if launcher in ("spawn", "fork", "forkserver") and "DDPStrategy" in _names(strategy):
        raise ConfigError(
            f"Trainer(strategy='ddp_{launcher}'): the processes hand back a float module, the trained "
            "low-bit one is lost. "
            "Use strategy='ddp', which launches this script once a process."
        )
    if getattr(strategy, "_layer_sync", None) is not None:
        raise ConfigError(
            "Trainer(sync_batchnorm=True): it replaces batch norms that are folded into their layers. Leave "
            "it out: in the "
            "frozen phase all processes use the same statistics (freeze early with "
            "FoldBatchNorm(freeze=...) or init_from=)."
        )


def check_neighbors(trainer: Any, ours: Any) -> None:
    """Callbacks that copy or edit the model must come after us: before, they hold the float one."""
    position = next(i for i, callback in enumerate(trainer.callbacks) if callback is ours)
    for callback in trainer.callbacks[:position]:
        for name in _names(callback):
            if name in (*_COPIES_THE_MODEL, *_EDITS_WEIGHTS):
                raise ConfigError(
                    f"Trainer(callbacks=[..., {type(callback).__name__}, ..., {type(ours).__name__}]): "
                    f"{type(callback).__name__} took "
                    f"the float model in its setup. Put {type(ours).__name__} before it in the list."
                )
    for callback in trainer.callbacks if ours.scheme.carries_errors else ():
        if not set(_EDITS_WEIGHTS).isdisjoint(_names(callback)):
            raise ConfigError(
                f"Trainer(callbacks=[..., {type(callback).__name__}, ...]): scheme {ours.scheme.name!r} updates "
                f"integer weights in place, which a mask would undo unseen. Leave {type(callback).__name__} out, or "
                "prune before and make it permanent (torch.nn.utils.prune.remove)."
            )


def check_optimizers(trainer: Any) -> None:
    for optimizer in trainer.optimizers:
        if isinstance(optimizer, torch.optim.LBFGS):
            raise ConfigError(
                "configure_optimizers: LBFGS evaluates the loss many times a step on a smooth function, "
                "which a quantized network is "
                "not, and thresholds would step once for many evaluations. Use SGD or Adam."
            )


def say_inert(trainer: Any, rule: UpdateRule | None) -> None:
    """Settings of the user's that do not reach the weights which the rule updates: named once a fit."""
    groups = [group for optimizer in trainer.optimizers for group in optimizer.param_groups]
    given = {
        "gradient_clip_val": trainer.gradient_clip_val,
        "lr_scheduler": trainer.lr_scheduler_configs,
        "weight_decay": any(group.get("weight_decay") for group in groups),
        "momentum": any(group.get("momentum") for group in groups),
    }
    inert = {} if rule is None else rule.inert
    named = [f"{name} ({inert[name]})" for name, value in given.items() if value and name in inert]
    if named:
        rank_zero_info(f"lightning_lowbit: no effect on integer weights: {'; '.join(named)}")


def check_stepped(waiting: list[str]) -> None:
    """Refuse an epoch in which ranges or integer weights got gradients and no step came; call it where none did."""
    if waiting:
        raise ConfigError(
            f"{waiting[0]}: it got gradients for a whole epoch and was never stepped ({len(waiting)} such "
            "in all), so ranges would stay at their calibration, and integer weights as they are. A raw "
            "optimizer.step() passes the Trainer by: take the optimizers from self.optimizers(), whose step() goes "
            "through it, or call lightning_lowbit.lowbit_step(self, optimizer) in its place."
        )


def check_checkpoint_file(path: Any, option: str) -> None:
    """Refuse a file that is cut off before anybody loads it; other formats are left to their loaders."""
    if not isinstance(path, (str, Path)) or not Path(path).is_file():
        return
    with open(path, "rb") as file:
        head = file.read(4)
    if not head or (head[:2] == b"PK" and not zipfile.is_zipfile(path)):
        raise ConfigError(
            f"{option}={str(path)!r}: the file is cut off ({Path(path).stat().st_size} bytes, no zip "
            "directory at its end). It was "
            "probably still being written; take an earlier checkpoint or copy it again."
        )


def check_root_mode(module: nn.Module) -> list[str]:
    """A root in eval mode trains nothing quietly; parts that the user keeps in eval are named and left alone.

    Returns:
        paths of the uppermost parts in eval mode.
    """
    if not module.training:
        raise ConfigError(
            f"{type(module).__name__} was handed to fit in eval mode: batch norms and dropout would not "
            "train, and Lightning leaves it "
            "so. Call module.train() first (from_pretrained and load_from_checkpoint helpers often end in "
            "eval())."
        )
    found: list[str] = []
    for path, child in module.named_modules():
        if not child.training and not any(path.startswith(f"{upper}.") for upper in found):
            found.append(path)
    return found

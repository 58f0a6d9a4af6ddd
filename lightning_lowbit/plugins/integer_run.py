"""What integer arithmetic must know of a run, batch by batch, and what it leaves for evaluation."""

from __future__ import annotations

from typing import Any

import torch
from lightning_utilities.core.rank_zero import rank_zero_info
from torch import nn

from lightning_lowbit.errors import ConfigError
from lightning_lowbit.kernels import backend_report
from lightning_lowbit.modules.base import Run, UpdateRule, switch_of
from lightning_lowbit.modules.block import BlockRange, WeightCodes
from lightning_lowbit.modules.convert import quantizers
from lightning_lowbit.plugins.calibration import share_whole_numbers
from lightning_lowbit.plugins.distributed import process_rank, reduce_max, reduce_sum, world_size
from lightning_lowbit.plugins.sampler import is_blank

__all__ = ["begin_batch", "end_run", "log_rule", "renew_codes", "run_notes", "settle"]


_NOT_FINITE = 128  # the range of a tensor that holds NaN or inf


def begin_batch(trainer: Any, model: nn.Module, rule: UpdateRule | None, batch_idx: int) -> None:
    """Before a training batch: its number, and this process's place among the others."""
    if rule is not None:
        automatic = trainer.lightning_module.automatic_optimization
        rule.before_batch(not automatic or batch_idx % trainer.accumulate_grad_batches != 0)
    run = switch_of(model).run
    run.reduce_max, run.reduce_sum, run.rank, run.world = reduce_max, reduce_sum, process_rank(), world_size()
    run.batch = trainer.fit_loop.epoch_loop.total_batch_idx
    run.blank = is_blank(_loader(trainer), batch_idx)


def end_run(model: nn.Module, rule: UpdateRule | None) -> None:
    """Computing goes on in one process, as if there had been no run; averaged weights lie on their grids."""
    if rule is not None:
        rule.end_run()
    switch = switch_of(model)
    renew_codes(model)
    for _, quantizer in quantizers(model):
        if isinstance(quantizer, WeightCodes) and quantizer.ready:
            quantizer.store(quantizer.codes())
    switch.run = Run(batch=switch.run.batch, clamped=switch.run.clamped)


def renew_codes(model: nn.Module) -> None:
    """Read integer weights from the parameters anew: weight averaging writes to ``parameter.data``, unseen."""
    for _, quantizer in quantizers(model):
        if isinstance(quantizer, WeightCodes):
            quantizer.cache = None


def settle(trainer: Any, model: nn.Module, reset: bool) -> None:
    """Evaluation takes over the largest ranges that training has seen; ``reset`` begins to watch anew.

    Ranges that training shares only now and then are shared: all processes, and a checkpoint, hold the same.
    """
    found = [quantizer for _, quantizer in quantizers(model)]
    shared = [quantizer for quantizer in found if isinstance(quantizer, BlockRange) and quantizer.static]
    if shared:
        seen = reduce_max(torch.stack([quantizer.seen for quantizer in shared]).to(torch.int32))
        for ranges, value in zip(shared, seen, strict=True):
            ranges.seen.copy_(value)
    _check_finite([quantizer for quantizer in found if isinstance(quantizer, BlockRange)])
    for quantizer in found:
        quantizer.settle(reset)
    share_whole_numbers(trainer, model)


def _check_finite(ranges: list[BlockRange]) -> None:
    """Integers hold no NaN: a value that was none has left its mark on the range of the tensor that it entered."""
    beyond = (torch.stack([quantizer.seen for quantizer in ranges]) >= _NOT_FINITE).tolist() if ranges else []
    sites = [quantizer.site.key for quantizer, bad in zip(ranges, beyond, strict=True) if bad]
    if sites:
        raise ConfigError(
            f"{sites[0]}: got NaN, infinite values or some beyond 2^127 in training since the epoch began"
            + (f" (and so did {len(sites) - 1} more: {', '.join(sites[1:4])})" if len(sites) > 1 else "")
            + ", expected finite numbers. Look at the batches and the loss, and go on from an earlier checkpoint."
        )


def log_rule(trainer: Any, rule: UpdateRule | None, interval: str) -> None:
    """Log what the rule does (mu) where a LearningRateMonitor of that interval logs; without one, every epoch.

    What the rule has to say besides is printed.
    """
    for words in () if rule is None else rule.news():
        rank_zero_info(f"lightning_lowbit: {words}")
    values = {} if rule is None else rule.logged()
    monitors = [callback for callback in trainer.callbacks if type(callback).__name__ == "LearningRateMonitor"]
    intervals = {monitor.logging_interval for monitor in monitors} or {"epoch"}
    wanted = interval in intervals or None in intervals
    if not values or not wanted or (interval == "step" and not trainer._logger_connector.should_update_logs):
        return
    trainer.callback_metrics.update({name: torch.tensor(value) for name, value in values.items()})
    for logger in trainer.loggers:
        logger.log_metrics(values, step=trainer.fit_loop.epoch_loop._batches_that_stepped)


def run_notes(model: nn.Module, rule: UpdateRule | None) -> list[str]:
    """What the report of a run says beside the table: where integers were multiplied, and who stopped learning."""
    notes, stopped = [], [] if rule is None else rule.stopped()
    if rule is not None and rule.logged():
        notes.append(f"kernels: {backend_report()}")
    if stopped:
        notes.append(
            f"no longer learning: {', '.join(stopped)} (zero gradients in the last steps). A layer behind it is dead "
            "or saturated: look at its ranges above, lower mu, or start again from an earlier checkpoint"
        )
    notes += [] if rule is None else rule.notes()
    run = switch_of(model).run
    if rule is not None and rule.logged() and run.float_errors:
        notes.append(
            f"float errors entered at {', '.join(sorted(run.float_errors))} (a loss other than plain cross-entropy, or "
            "float code behind it): their bits are this machine's and this number of processes'"
        )
    clamped = int(run.clamped)
    if clamped:
        notes.append(f"{clamped} exponents left the range of float32 carriers and were clamped")
    return notes


def _loader(trainer: Any) -> Any:
    loader = trainer.train_dataloader
    return loader if hasattr(loader, "sampler") else None

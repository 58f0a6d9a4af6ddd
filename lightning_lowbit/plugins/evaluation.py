"""The user's own validation, run once more inside a fit: same loop and hooks, nothing logged or kept."""

from __future__ import annotations

from typing import Any

from lightning.pytorch.utilities.seed import isolate_rng

__all__ = ["batches_trained", "validate_within_fit", "validation_metrics"]


def batches_trained(trainer: Any) -> int:
    """Training batches of the run so far: while it stands still, so do weights and running statistics."""
    return int(trainer.fit_loop.epoch_loop.batch_progress.total.processed)


def validation_metrics(trainer: Any) -> dict[str, float]:
    """What the validation that has just ended logged, as plain floats; nothing that training logged."""
    return {key: float(value) for key, value in trainer._logger_connector.metrics["callback"].items()}


def validate_within_fit(trainer: Any) -> dict[str, float]:
    """Run the validation loop as the sanity check does, over all validation batches.

    The trainer is in its sanity-check stage meanwhile, in which loggers, checkpoints and early stopping stand
    still; its own metrics are put back afterwards.

    Returns:
        what validation_step and its epoch hooks logged; empty if there is no validation.
    """
    if not trainer.enable_validation:  # no validation_step, no loader for it, or no batches of it
        return {}
    loop = trainer.fit_loop.epoch_loop.val_loop
    connector = trainer._logger_connector
    kept = dict(connector.__dict__)  # also its place in the training batch that is going on
    connector._progress_bar_metrics, connector._logged_metrics, connector._callback_metrics = {}, {}, {}
    stage, sanity_steps = trainer.state.stage, trainer.num_sanity_val_steps
    module = trainer.lightning_module
    training = [m for m in module.modules() if m.training]
    progress = loop.batch_progress.state_dict()
    try:
        trainer.num_sanity_val_steps = float("inf")
        trainer.sanity_checking = True
        with isolate_rng():
            loop.setup_data()
            if loop.skip:
                return {}
            loop.run()
        return {key: float(value) for key, value in trainer.callback_metrics.items()}
    finally:
        trainer.sanity_checking = False
        trainer.state.stage, trainer.num_sanity_val_steps = stage, sanity_steps
        loop.batch_progress.load_state_dict(progress)
        loop._results.reset()
        connector.__dict__.update(kept)
        for m in training:
            m.training = True

"""The life of a low-bit network in a Trainer: swap, calibrate, schedule, keep. One hook, one hop."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback
from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_warn
from torch import nn

from lightning_lowbit.errors import ConfigError
from lightning_lowbit.modules.base import (
    Milestone,
    Mode,
    Moment,
    Scheme,
    StepContext,
    Tally,
    UpdateRule,
    mode,
    switch_of,
)
from lightning_lowbit.modules.calibrate import reset
from lightning_lowbit.modules.convert import Pattern, Selection, is_converted, quantizers
from lightning_lowbit.modules.moments import check_moment
from lightning_lowbit.plugins import checkpoint as files
from lightning_lowbit.plugins import checks
from lightning_lowbit.plugins.calibration import calibrate_before_evaluation, calibrate_on, update_averages
from lightning_lowbit.plugins.compiling import compile_in_place
from lightning_lowbit.plugins.distributed import ignore_in_ddp, share_ignored, step_context
from lightning_lowbit.plugins.evaluation import batches_trained, validate_within_fit, validation_metrics
from lightning_lowbit.plugins.integer_run import begin_batch, end_run, log_rule, renew_codes, settle
from lightning_lowbit.plugins.label_free import reconstruct_within_fit
from lightning_lowbit.plugins.patching import Patches
from lightning_lowbit.plugins.precision import low_bit, rule_of
from lightning_lowbit.plugins.presence import Presence
from lightning_lowbit.plugins.registration import register_strategies
from lightning_lowbit.plugins.resume import ResumeState
from lightning_lowbit.plugins.run_report import report_run
from lightning_lowbit.plugins.schedule import Schedule, run_length
from lightning_lowbit.plugins.swap import has_layers, swap, swap_for_checkpoint
from lightning_lowbit.schemes import resolve

__all__ = ["Lifecycle"]

register_strategies()


class Lifecycle(Callback):
    """From ``Trainer(callbacks=[...])`` to a trained low-bit network; QuantCallback is the public face."""

    def __init__(
        self,
        scheme: Scheme | str = "tqt",
        skip: Pattern | Sequence[Pattern] = (),
        include: Pattern | Sequence[Pattern] | None = None,
        init_from: str | None = None,
        calibrate_batches: int = 8,
        start: Moment | None = None,
        compile: bool = False,
        evaluate: bool = True,
        resume_order: bool | None = None,
    ) -> None:
        register_strategies()  # a namespace that was imported behind this file
        check_moment("start", start)
        if calibrate_batches < 1:
            raise ConfigError(f"calibrate_batches={calibrate_batches}: expected at least 1.")
        self.by_name = isinstance(scheme, str)  # then a checkpoint's options win over the defaults
        self.asked = self.scheme = resolve(scheme)  # the second: with what was left open decided for the network
        self.selection = Selection.of(skip, include)
        self.init_from, self.calibrate_batches, self.start = init_from, calibrate_batches, start
        self.compile, self.evaluate, self.resume_order = compile, evaluate, resume_order
        self.calibration_loader: Any = None  # Calibrate sets it
        self.replaced: dict[str, Milestone] = {}  # Freeze and FoldBatchNorm put theirs
        self.metrics: dict[str, dict[str, float]] = {}
        self._validated: int | None = None  # batches trained before the last validation
        self.schedule: Schedule | None = None
        self.rule: UpdateRule | None = None
        self._patches = Patches()
        self.resume = ResumeState(0 if (self.scheme.reproducible if resume_order is None else resume_order) else None)
        self._presence = Presence(self.selection)
        self._restored: dict[str, Any] | None = None  # the run's section of the checkpoint that was read
        self._initialized: weakref.ref[nn.Module] | None = None  # the module that has the weights of init_from
        self._max_epochs: int | None = None  # the user's: weight averaging adds an epoch for statistics
        self._loading: Any = None  # path of the checkpoint that is being read
        self._reached: Any = None
        self._steps_before_epoch: int | None = None  # None where the epoch was not quantized from its start
        self._tally = Tally()

    def replace(self, *milestones: Milestone) -> None:
        """Put these in place of the scheme's milestones of the same kind."""
        self.replaced.update({milestone.what: milestone for milestone in milestones})

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        others = [c for c in trainer.callbacks if isinstance(c, Lifecycle) and c is not self]
        if others:
            raise ConfigError(f"Trainer(callbacks=...): {1 + len(others)} QuantCallbacks, expected one.")
        checks.check_trainer(trainer)
        self._undo()
        self._patches.set(trainer.strategy, "load_checkpoint", functools.partial(self._load, trainer.strategy))
        self._restored = None
        if stage == "fit":
            checks.check_neighbors(trainer, self)
            self.schedule, self._max_epochs = None, trainer.max_epochs
            self.resume.attach(trainer)  # the loaders may be asked for as early as in configure_optimizers
        # Plain functions bound by partial: a deepcopy of the module rebinds them to the copy.
        for name, function in (
            ("configure_model", self._configure_model), ("on_load_checkpoint", self._on_load_checkpoint),
            ("on_save_checkpoint", self._on_save_checkpoint),
            ("configure_optimizers", self._configure_optimizers),
        ):  # fmt: skip
            self._patch(trainer, pl_module, name, function)
        if has_layers(pl_module):
            self._swap(trainer, pl_module)

    def _patch(self, trainer: Any, pl_module: Any, name: str, function: Any) -> None:
        before = pl_module.__dict__.get(name)

        def patched(module: Any, *args: Any) -> Any:
            original = functools.partial(getattr(type(module), name), module) if before is None else before
            return function(trainer, module, original, *args)

        self._patches.set(pl_module, name, functools.partial(patched, pl_module))

    def _load(self, strategy: Any, checkpoint_path: Any, *args: Any, **kwargs: Any) -> Any:
        checks.check_checkpoint_file(checkpoint_path, "ckpt_path")
        self._loading = checkpoint_path
        return type(strategy).load_checkpoint(strategy, checkpoint_path, *args, **kwargs)

    def _configure_model(self, trainer: Any, pl_module: Any, original: Any) -> None:
        """Layers were built in setup or are built here; weights from elsewhere arrive behind this."""
        original()
        self._swap(trainer, pl_module)
        if self.init_from is not None and Path(self.init_from).is_file():
            self._initialize(pl_module)

    def _initialize(self, pl_module: Any) -> None:
        """Take the weights of init_from, once a module; a checkpoint that is resumed replaces them."""
        if self.init_from is None or (self._initialized is not None and self._initialized() is pl_module):
            return
        files.initialize_from(self.init_from, pl_module)
        self._initialized = weakref.ref(pl_module)
        rank_zero_info(f"lightning_lowbit: weights from {self.init_from}")

    def _swap(self, trainer: Any, pl_module: Any) -> None:
        self.scheme = swap(pl_module, self.scheme, self.by_name, self.selection, self.init_from is not None)
        ignore_in_ddp(pl_module, trainer.strategy, self._patches)
        if not hasattr(trainer.strategy.precision_plugin, "lowbit_model"):
            plugin = low_bit(
                trainer.strategy.precision_plugin, pl_module, functools.partial(self.step_context, trainer)
            )
            self._patches.set(trainer.strategy, "_precision_plugin", plugin)

    def _on_load_checkpoint(self, trainer: Any, pl_module: Any, original: Any, checkpoint: dict[str, Any]) -> None:
        spec = files.read_spec(checkpoint)
        if spec is None:
            if trainer.state.fn == "fit":
                raise ConfigError(
                    f"ckpt_path={str(self._loading)!r} is a float checkpoint: it initializes, it does not "
                    "resume. Pass it as init_from= (--quant.init_from at the command line) and leave ckpt_path out."
                )
            files.add_open_keys(checkpoint["state_dict"], pl_module)
        else:
            saved = files.read_scheme(spec)
            self.scheme = swap_for_checkpoint(pl_module, saved, self.asked.like(saved), self.by_name, self.selection)
            files.compare_spec(spec, pl_module)
            files.check_shapes(checkpoint["state_dict"], pl_module)
            reset(pl_module)  # what is open or calibrated is what the file says
            if "run" in spec:  # a tuner puts back what it saved before the run began
                self._restored = spec["run"]
        original(checkpoint)

    def _on_save_checkpoint(self, trainer: Any, pl_module: Any, original: Any, checkpoint: dict[str, Any]) -> None:
        original(checkpoint)
        self._write(trainer, pl_module, checkpoint)

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """A checkpoint saved when no run is on: the module's own hook is no longer ours."""
        if files.KEY not in checkpoint and is_converted(pl_module):
            self._write(trainer, pl_module, checkpoint)

    def _write(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        settle(trainer, pl_module, reset=False)  # in place: the checkpoint's state dict holds these very buffers
        spec = files.write_spec(self.scheme, self.selection, switch_of(pl_module).conversion)
        if "optimizer_states" in checkpoint and self.schedule is not None:
            spec["run"] = {
                "schedule": self.schedule.state_dict(),
                "rule": {} if self.rule is None else self.rule.state_dict(),
                "resume": self.resume.state_dict(trainer),
                "metrics": {name: dict(values) for name, values in self.metrics.items()},
                "max_epochs": self._max_epochs,
            }
        checkpoint[files.KEY] = spec

    def _configure_optimizers(self, trainer: Any, pl_module: Any, original: Any) -> Any:
        """The user's groups never see the scheme's parameters (minGPT-style code counts all of them)."""
        hidden = [(q, dict(q._parameters)) for _, q in quantizers(pl_module)]
        try:
            for quantizer, _ in hidden:
                quantizer._parameters.clear()
            return original()
        finally:
            for quantizer, parameters in hidden:
                quantizer._parameters.update(parameters)

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        if not is_converted(pl_module):
            self._swap(trainer, pl_module)  # nothing to convert: says so
        files.check_trainable(pl_module)
        kept_in_eval = checks.check_root_mode(pl_module)
        if kept_in_eval:
            rank_zero_info(f"lightning_lowbit: in eval mode and left so: {', '.join(kept_in_eval[:8])}")
        checks.check_optimizers(trainer)
        share_ignored(pl_module)
        self.rule = rule_of(pl_module, renew=True)
        checks.say_inert(trainer, self.rule)
        if self._restored is None:
            self._initialize(pl_module)  # a missing file is no matter to a run that resumes
        else:
            self.schedule = Schedule.from_state(self._restored["schedule"])
            self.metrics = {name: dict(values) for name, values in self._restored["metrics"].items()}
            if self.rule is not None:
                self.rule.load_state_dict(self._restored["rule"])
            self.resume.load_state_dict(self._restored["resume"])

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        switch = switch_of(pl_module)
        if self._restored is None:
            self.metrics = {}
            if switch.provisional:
                reset(pl_module)  # it was calibrated for an evaluation, not trained
            pretrained = self.init_from is not None or switch.started
            start = self.scheme.start(pretrained) if self.start is None else self.start
            self.schedule = Schedule.make(
                trainer,
                run_length(trainer, self._max_epochs),
                start,
                self.scheme.milestones(),
                tuple(self.replaced.values()),
            )
            if self.schedule.begin > 0:
                reset(pl_module)
        elif self._restored["max_epochs"] != self._max_epochs:
            rank_zero_warn(
                f"resumed with max_epochs={self._max_epochs}, begun with {self._restored['max_epochs']}: "
                "fractions keep the steps that they had."
            )
        assert self.schedule is not None
        rank_zero_info(f"lightning_lowbit: {self.schedule}")
        self._reached = self._steps_before_epoch = self._validated = None
        if self.compile:
            compile_in_place(pl_module, self._patches)
        self._tick(trainer, pl_module)

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self._tick(trainer, pl_module)
        begin_batch(trainer, pl_module, self.rule, batch_idx)
        log_rule(trainer, self.rule, "step")

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if self.rule is not None and switch_of(pl_module).started:
            self.rule.after_batch(self.step_context(trainer))

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        whole = switch_of(pl_module).started and not trainer.fit_loop._skip_backward
        self._steps_before_epoch = trainer.precision_plugin.lowbit_steps if whole else None

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        if self.rule is not None and self._steps_before_epoch == trainer.precision_plugin.lowbit_steps:
            checks.check_stepped(self.rule.waiting())
        settle(trainer, pl_module, reset=True)
        log_rule(trainer, self.rule, "epoch")

    def _tick(self, trainer: Any, pl_module: Any) -> None:
        """What is due is a function of the step alone."""
        assert self.schedule is not None
        step = self.step(trainer)
        if step >= self.schedule.begin and not switch_of(pl_module).started:
            self._begin(trainer, pl_module)
        # Weight averaging recomputes norm statistics in one more epoch without backward: with live ones.
        suspended = frozenset({"freeze_batch_norm"} if trainer.fit_loop._skip_backward else ())
        reached = (self.schedule.reached(step), suspended)
        if reached != self._reached:
            self._reached = reached
            if self.schedule.apply(pl_module, self.rule, step, suspended):
                update_averages(trainer, pl_module, weights=True)

    @staticmethod
    def step(trainer: Any) -> int:
        """Optimizer steps of the run, each batch counting once however many optimizers step in it."""
        return int(trainer.fit_loop.epoch_loop._batches_that_stepped)

    def step_context(self, trainer: Any) -> StepContext:
        return step_context(self.step(trainer), None if self.schedule is None else self.schedule.run.total)

    def _begin(self, trainer: Any, pl_module: Any) -> None:
        """Quantization starts: float metrics, calibration, calibrated metrics."""
        evaluate = self.evaluate and not trainer.fast_dev_run
        if evaluate and self._validated != batches_trained(trainer):  # else they are of these very weights
            with mode([switch_of(pl_module)], Mode.FLOAT):
                self.metrics["float"] = validate_within_fit(trainer)
        loaders = self.calibration_loader if self.calibration_loader is not None else trainer.train_dataloader
        settings = self.scheme.reconstruction()
        step = "training_step" if settings is None else "forward"
        calibrate_on(trainer, pl_module, loaders, self.calibrate_batches, step)
        self._presence.expect(pl_module)
        update_averages(trainer, pl_module)
        if evaluate:
            self.metrics["calibrated"] = validate_within_fit(trainer)
        if settings is not None:
            reconstruct_within_fit(trainer, pl_module, loaders, self.calibrate_batches, settings)
            if evaluate:
                self.metrics["trained"] = validate_within_fit(trainer)

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        if trainer.state.fn != "fit":
            self._before_evaluation(trainer, pl_module, trainer.validate_loop, "validation_step")
        elif not trainer.sanity_checking:
            settle(trainer, pl_module, reset=False)

    def on_test_start(self, trainer: Any, pl_module: Any) -> None:
        self._before_evaluation(trainer, pl_module, trainer.test_loop, "test_step")

    def on_predict_start(self, trainer: Any, pl_module: Any) -> None:
        self._before_evaluation(trainer, pl_module, trainer.predict_loop, "predict_step")

    def _before_evaluation(self, trainer: Any, pl_module: Any, loop: Any, step: str) -> None:
        share_ignored(pl_module)
        if calibrate_before_evaluation(trainer, pl_module, loop, step, self.calibration_loader, self.calibrate_batches):
            self._presence.expect(pl_module)

    def on_validation_batch_start(
        self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self._watch(pl_module, batch_idx, dataloader_idx)

    on_test_batch_start = on_predict_batch_start = on_validation_batch_start

    def on_validation_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self._watched(pl_module, batch_idx, dataloader_idx)

    on_test_batch_end = on_predict_batch_end = on_validation_batch_end

    def _watch(self, pl_module: nn.Module, batch_idx: int, dataloader_idx: int) -> None:
        switch = switch_of(pl_module)
        if batch_idx == dataloader_idx == 0 and switch.quantizing:
            renew_codes(pl_module)  # weight averaging has put its own in place by now
            self._tally = switch.tally = Tally()  # saturation of one batch stands for the report
            self._presence.watch(pl_module)

    def _watched(self, pl_module: nn.Module, batch_idx: int, dataloader_idx: int) -> None:
        switch_of(pl_module).tally = None
        if batch_idx == dataloader_idx == 0:
            self._presence.check(pl_module)

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        renew_codes(pl_module)
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            kind = "trained" if switch_of(pl_module).started else "float"
            self.metrics[kind], self._validated = validation_metrics(trainer), batches_trained(trainer)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        if trainer.is_global_zero and not trainer.fast_dev_run and switch_of(pl_module).started:
            report_run(trainer, pl_module, self.metrics, self._tally, self.rule)

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        if self.schedule is None:  # the loop left before its first hook
            raise ConfigError(
                f"{type(pl_module).__name__}: fit had no training batch, so nothing was calibrated or trained. "
                "Check that the loader is not empty and that limit_train_batches is not 0."
            )

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        self._leave(trainer, pl_module)

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        self._leave(trainer, pl_module)

    def _leave(self, trainer: Any, pl_module: Any) -> None:
        if is_converted(pl_module):
            end_run(pl_module, self.rule)
        self._undo()
        files.keep_record(pl_module)
        self.resume.detach(trainer)

    def _undo(self) -> None:
        self._patches.undo()
        self._presence.forget()

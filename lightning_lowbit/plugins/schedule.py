"""What is due when: moments resolved to steps once, then compared with the step counter."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from lightning_utilities.core.rank_zero import rank_zero_warn

from lightning_lowbit.errors import ConfigError
from lightning_lowbit.modules.base import Milestone, Moment, UpdateRule, low_bit_modules
from lightning_lowbit.modules.moments import HALF
from lightning_lowbit.plugins.moments import RunLength, resolve

__all__ = ["Schedule", "run_length"]


def run_length(trainer: Any, max_epochs: int | None) -> RunLength:
    """Optimizer steps of the present fit; call it when the train loader exists.

    Args:
        trainer: the Trainer.
        max_epochs: as the user gave it; weight averaging adds an epoch without steps to the trainer's.
    """
    total, batches = trainer.estimated_stepping_batches, trainer.num_training_batches
    endless = batches == float("inf")
    per_epoch = None if endless else max(1, -(-int(batches) // trainer.accumulate_grad_batches))
    if per_epoch is not None and max_epochs is not None and max_epochs > 0:
        total = min(total, per_epoch * max_epochs)
    return RunLength(None if total == float("inf") else int(total), per_epoch)


@dataclass
class Schedule:
    """Steps at which quantization begins and at which each milestone is reached.

    Attributes:
        run: the length that fractions were resolved with; kept over a resume.
        begin: first quantized step.
        steps: what -> step.
    """

    run: RunLength
    begin: int
    steps: dict[str, int] = field(default_factory=dict)

    @classmethod
    def make(
        cls, trainer: Any, run: RunLength, start: Moment, milestones: tuple[Milestone, ...], replaced:
            tuple[Milestone, ...] = (),
    ) -> Schedule:  # fmt: skip
        """Resolve for a new run.

        Args:
            run: its length.
            start: when quantization begins.
            milestones: the scheme's; their fractions count from the start of quantization.
            replaced: the user's (Freeze, FoldBatchNorm); of the whole run, in place of the scheme's of the
                same kind.
        Raises:
            ConfigError: a moment that the run does not reach (a warning where the run was cut on purpose).
        """
        known = {m.what for m in milestones}
        for m in replaced:
            if m.what not in known:
                names = ", ".join(sorted(known)) or "nothing"
                raise ConfigError(
                    f"{m.what}={m.when!r}: this scheme schedules nothing of that name, but {names}. Leave the "
                    "callback out (Freeze, FoldBatchNorm), or take a scheme that has it."
                )
        begin = resolve(start, run)
        # What a scheme schedules before quantization begins happens then.
        steps = {m.what: max(begin, resolve(m.when, run, begin)) for m in milestones if m.when is not None}
        steps.update({m.what: resolve(m.when, run) for m in replaced if m.when is not None})
        for m in replaced:
            if m.when is None:
                steps.pop(m.what, None)
        schedule = cls(run, begin, steps)
        schedule._require_reached(trainer, start, {m.what: m.when for m in (*milestones, *replaced)})
        return schedule

    def _require_reached(self, trainer: Any, start: Moment, moments: dict[str, Moment | None]) -> None:
        if self.run.total is None:
            return
        for what, step in {"start": self.begin, **self.steps}.items():
            if HALF.fullmatch(str(moments.get(what))) is not None:
                continue  # a rule for runs of any length: this one is too short for it
            if step >= self.run.total and step > 0:
                message = (
                    f"{what}={start if what == 'start' else moments.get(what)!r} means step {step}, this "
                    "run ends after "
                    f"{self.run.total} steps, so it would never act. Choose a fraction of the run, an "
                    "earlier moment, or train longer."
                )
                if trainer.fast_dev_run or trainer.overfit_batches:
                    rank_zero_warn(message)
                else:
                    raise ConfigError(message)

    def apply(self, model: Any, rule: UpdateRule | None, step: int, suspended: frozenset[str] = frozenset()) -> bool:
        """Tell all low-bit modules and the rule what is reached at ``step``; idempotent and reversible.

        Returns:
            whether the rule put other weights in place.
        """
        replaced = False
        for what, when in self.steps.items():
            reached = step >= when and what not in suspended
            for _, module in low_bit_modules(model):
                module.milestone(what, reached)
            if rule is not None:
                replaced |= bool(rule.milestone(what, reached, when))
        return replaced

    def reached(self, step: int) -> tuple[bool, ...]:
        """Changes exactly when ``apply`` has something to say."""
        return tuple(step >= when for when in self.steps.values())

    def state_dict(self) -> dict[str, Any]:
        return {
            "total": self.run.total,
            "per_epoch": self.run.per_epoch,
            "begin": self.begin,
            "steps": dict(self.steps),
        }

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> Schedule:
        return cls(RunLength(state["total"], state["per_epoch"]), state["begin"], dict(state["steps"]))

    def __str__(self) -> str:
        run = "of an endless run" if self.run.total is None else f"of {self.run.total}"
        parts = [f"quantization from step {self.begin} {run}"]
        parts += [f"{what} from {step}" for what, step in sorted(self.steps.items(), key=lambda item: item[1])]
        return ", ".join(parts)

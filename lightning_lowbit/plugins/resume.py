"""Bit-equal resume: the data order and the random state that Lightning 2.6 leaves behind.

Lightning restores the counters of a run, but no random state. In mid-epoch it starts the loaders from their
first batch, it skips a validation that was due right behind the checkpoint, and it drops the step of a
plateau scheduler. ``ResumeState`` adds what is missing to the checkpoint and goes on from the very point
where it was written.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from lightning_lowbit.errors import InvariantError
from lightning_lowbit.plugins.order import RecordedOrder, refusal
from lightning_lowbit.plugins.rng import capture_rng, restore_rng
from lightning_lowbit.plugins.sampler import use_ordered_sampler

__all__ = ["ResumeState"]

# A trainer is Any in this file: it may come from either of Lightning's two namespaces.


@dataclass
class _Resume:
    """What is left to do between reading a checkpoint and the first resumed batch."""

    state: dict[str, Any]
    own: dict[str, Any]
    batches: int
    end_of_batch_due: bool = False


class ResumeState:
    """Makes a resumed fit equal to the uninterrupted one, bit for bit, without changing the latter.

    ``attach`` in ``on_fit_start``: later is too late, because Lightning iterates the train loaders before
    ``on_train_start``. ``detach`` in ``teardown`` and ``on_exception``. Both namespaces' trainers will do.

    What it cannot keep, and says in a warning: loaders that are no map-style DataLoader, a sampler whose
    draws mix with those of training, a checkpoint written inside a batch or between two accumulated ones,
    another number of processes. What no warning can find: random augmentation inside worker processes
    resumed in mid-epoch, and a plateau scheduler that watches a mean over the interrupted epoch's batches.

    Args:
        order_seed: give the loaders an ``OrderedSampler`` with this seed where they allow it; None keeps
            their own samplers.
    """

    def __init__(self, order_seed: int | None = None) -> None:
        self.order_seed = order_seed
        self._orders: list[RecordedOrder] = []
        self._wrapped: list[tuple[Any, str, Any]] = []
        self._patched: list[tuple[Any, str]] = []
        self._loaded: dict[str, Any] | None = None
        self._resume: _Resume | None = None
        self._in_resumed_epoch = False
        self._said: set[str] = set()
        self.limits: list[str] = []  # what this fit's order and resume cannot keep

    def attach(self, trainer: Any) -> None:
        """Follow the fit loop of ``trainer`` from now on."""
        self._release()
        self._orders = []
        self._in_resumed_epoch = False
        self.limits = [] if self.order_seed is not None else ["the loaders draw their order with their own samplers"]
        fit_loop = trainer.fit_loop
        self._patch(trainer, fit_loop, "_load_combined_loader_states", self._loaders_made)
        self._patch(trainer, fit_loop, "reset", self._counters_read)
        self._patch(trainer, fit_loop, "on_advance_start", self._epoch_starts)
        self._patch(trainer, fit_loop, "on_advance_end", self._epoch_ends)
        self._patch(trainer, fit_loop.epoch_loop, "reset", _without_advice)

    def detach(self, trainer: Any) -> None:
        """Give the loops and loaders back as they were; may be called twice.

        ``state_dict`` goes on working: after an exception a later callback may still save a checkpoint.
        """
        self._release()
        self._loaded = self._resume = None

    def state_dict(self, trainer: Any) -> dict[str, Any]:
        """The state of all ranks, as plain types and tensors. A collective: call it on every rank."""
        fit_loop = trainer.fit_loop
        epoch, batch = fit_loop.epoch_progress.current, fit_loop.epoch_loop.batch_progress.current
        batches = 0 if epoch.processed == epoch.ready else batch.processed
        if batches and batch.processed < batch.ready:
            self._say(trainer, "a checkpoint written in the middle of a training batch does not resume bit-equal.")
        elif batches and fit_loop.epoch_loop._should_accumulate():
            self._say(
                trainer,
                "a checkpoint between two accumulated batches holds no gradients and does not resume"
                " bit-equal. Save at a multiple of accumulate_grad_batches.",
            )
        own = {"now": capture_rng(self._generators()), "orders": self._records(trainer, batches)}
        ranks: list[Any] = [own]
        if dist.is_available() and dist.is_initialized() and trainer.world_size > 1:
            ranks = [None] * trainer.world_size
            dist.all_gather_object(ranks, own)
        return {
            "epoch": epoch.processed,
            "batches": batches,
            "ranks": ranks,
            "reloaded": [
                fit_loop._last_train_dl_reload_epoch,
                fit_loop.epoch_loop.val_loop._last_val_dl_reload_epoch,
            ],
            "metrics": {
                name: torch.as_tensor(value).detach().cpu().clone() for name, value in trainer.callback_metrics.items()
            },
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Keep a ``state_dict`` for the next fit, which uses it if it restores Lightning's own loops, too."""
        self._loaded = state

    def _patch(self, trainer: Any, owner: Any, name: str, around: Callable[[Any, Callable[[], None]], None]) -> None:
        original = getattr(owner, name, None)
        if original is None:
            raise InvariantError(
                f"resume: {type(owner).__name__} has no {name!r}. Got a Lightning release that this version"
                " does not know, expected 2.6: install that one, or report the release."
            )
        # An attribute of the instance hides the method and is removed again: the class stays untouched.
        setattr(owner, name, functools.partial(around, trainer, original))
        self._patched.append((owner, name))

    def _release(self) -> None:
        for owner, name in self._patched:
            vars(owner).pop(name, None)
        for loader, name, inner in self._wrapped:
            object.__setattr__(loader, name, inner)
        self._patched, self._wrapped = [], []

    def _generators(self) -> list[torch.Generator]:
        unique = {id(generator): generator for order in self._orders for generator in order.generators}
        return list(unique.values())

    def _records(self, trainer: Any, batches: int) -> list[dict[str, Any]]:
        mode = trainer.fit_loop._combined_loader._mode if self._orders else ""
        return [
            order.current.record(_position(batches, len(order), mode))
            for order in self._orders
            if batches and order.current
        ]

    def _say(self, trainer: Any, message: str) -> None:
        if message not in self.limits:
            self.limits.append(message)
        if message not in self._said and trainer.is_global_zero:
            warnings.warn(f"resume: {message}", UserWarning, stacklevel=2)
        self._said.add(message)

    def _loaders_made(self, trainer: Any, original: Callable[[], None]) -> None:
        """The train loaders exist and are about to be iterated: at fit start, and at each reload."""
        original()
        for loader, name, inner in self._wrapped:
            object.__setattr__(loader, name, inner)
        self._wrapped, self._orders = [], []
        combined = trainer.fit_loop._combined_loader
        if self.order_seed is not None:
            combined.flattened = [self._ordered(trainer, loader) for loader in combined.flattened]
        loaders = combined.flattened
        reasons = [refusal(loader) for loader in loaders]
        if len({id(loader) for loader in loaders}) < len(loaders):
            reasons[-1] = "it is given twice"
        for position, (loader, reason) in enumerate(zip(loaders, reasons, strict=True)):
            if reason is not None:
                self._say(
                    trainer,
                    f"train loader {position} ({_name(loader)}) keeps training, but a resume in mid-epoch"
                    f" starts it anew, because {reason}. Use a map-style DataLoader.",
                )
        if any(reasons):
            # One loader that cannot be put back makes a replay of the others a pairing that never was.
            return
        for loader in loaders:
            name = "batch_sampler" if loader.batch_sampler is not None else "sampler"
            inner = getattr(loader, name)
            order = RecordedOrder(loader, inner)
            # On a resume this first iteration comes before the random state is back: it must load nothing.
            order.silent = self._resumes(trainer)
            object.__setattr__(loader, name, order)  # DataLoader forbids plain assignment
            self._wrapped.append((loader, name, inner))
            self._orders.append(order)

    def _ordered(self, trainer: Any, loader: Any) -> Any:
        assert self.order_seed is not None
        twin, reason = use_ordered_sampler(
            loader, seed=self.order_seed, rank=trainer.global_rank, world=trainer.world_size
        )
        if twin is None:
            self._say(trainer, f"the loader {_name(loader)} keeps its own order, because {reason}.")
            return loader
        return twin

    def _resumes(self, trainer: Any) -> bool:
        state, fit_loop = self._loaded, trainer.fit_loop
        # ready == 0: a checkpoint from before the first epoch, as the learning-rate finder restores one.
        if state is None or not fit_loop.is_resuming or fit_loop.epoch_progress.current.ready == 0:
            return False
        if len(state["ranks"]) != trainer.world_size:
            self._say(
                trainer,
                f"the checkpoint was written by {len(state['ranks'])} processes and is resumed by"
                f" {trainer.world_size}: data order and random state start anew.",
            )
            return False
        return True

    def _counters_read(self, trainer: Any, original: Callable[[], None]) -> None:
        """Before ``fit_loop.reset``: put the restored counters where Lightning goes on without a gap."""
        resumes = self._resumes(trainer)
        state, self._loaded = self._loaded, None
        if not resumes or state is None:
            original()
            return
        fit_loop, epoch_loop = trainer.fit_loop, trainer.fit_loop.epoch_loop
        epoch, batch = fit_loop.epoch_progress.current, epoch_loop.batch_progress
        resume = _Resume(state, state["ranks"][trainer.global_rank], state["batches"])
        trainer._logger_connector._callback_metrics.update(state["metrics"])
        if epoch.processed == epoch.ready:
            # Written at the epoch's end, before its plateau schedulers stepped.
            ended = epoch.completed < epoch.processed and epoch_loop._num_ready_batches_reached()
            if ended and self._plateaus_can_step(trainer):
                epoch_loop.update_lr_schedulers("epoch", update_plateau_schedulers=True)
            # With max_steps Lightning takes a finished epoch for an interrupted one and runs its end again.
            for loop in (fit_loop, epoch_loop, *vars(epoch_loop).values()):
                if hasattr(loop, "_restarting"):
                    loop._restarting = False
        elif batch.current.completed < batch.current.processed:
            # Written in on_train_batch_end. Lightning would skip the validation and the epoch end that
            # follow: with one more completed batch it takes only the end of this batch to be open.
            last = bool(self._orders) and epoch_loop._num_ready_batches_reached()
            if last or epoch_loop._should_check_val_fx(fit_loop._data_fetcher):
                batch.increment_completed()
                resume.end_of_batch_due = True
        self._resume = resume
        original()

    def _epoch_starts(self, trainer: Any, original: Callable[[], None]) -> None:
        """Around ``fit_loop.on_advance_start``: the last stop before the first resumed batch."""
        for order in self._orders:
            order.silent = False
        resume, self._resume = self._resume, None
        if resume is None:
            original()
            return
        fit_loop, val_loop = trainer.fit_loop, trainer.fit_loop.epoch_loop.val_loop
        fit_loop._last_train_dl_reload_epoch, val_loop._last_val_dl_reload_epoch = resume.state["reloaded"]
        if resume.batches == 0:
            self._set_rng(trainer, resume)
            original()
            # Makes Lightning iterate the loaders behind the epoch-start hooks, as in any epoch but the first.
            fit_loop._resuming_from_checkpoint = False
            return
        original()
        if resume.batches >= trainer.num_training_batches:
            # Silent until the next epoch starts: only validation and the epoch's end are open.
            for order in self._orders:
                order.silent = True
        elif len(self._orders) != len(resume.own["orders"]):
            self._say(trainer, "other train loaders than before: the interrupted epoch begins at its first batch.")
        elif self._orders:
            self._redraw(trainer, resume)
        self._set_rng(trainer, resume)
        if resume.end_of_batch_due:
            # Sends the first advance() straight to on_advance_end, where a due validation runs in full.
            val_loop._restart_stage = "restarted_mid_evaluation"
            val_loop._restarting = False
        self._in_resumed_epoch = True

    def _epoch_ends(self, trainer: Any, original: Callable[[], None]) -> None:
        if self._in_resumed_epoch:
            # Lightning steps no plateau scheduler at the end of a resumed epoch, for want of the metrics.
            trainer.fit_loop._restarting = not self._plateaus_can_step(trainer)
            self._in_resumed_epoch = False
        original()

    def _plateaus_can_step(self, trainer: Any) -> bool:
        watched = {config.monitor for config in trainer.lr_scheduler_configs if config.reduce_on_plateau}
        missing = sorted(map(str, watched - trainer._logger_connector._callback_metrics.keys()))
        if missing:
            self._say(
                trainer,
                f"no value of {', '.join(missing)} for the interrupted epoch: a plateau scheduler loses a step.",
            )
        return not missing

    def _redraw(self, trainer: Any, resume: _Resume) -> None:
        fit_loop = trainer.fit_loop
        for order, record in zip(self._orders, resume.own["orders"], strict=True):
            order.replay = record
        fit_loop._combined_loader.reset()  # ends the workers of the silent iteration
        iter(fit_loop._data_fetcher)
        for (loader, _, _), order in zip(self._wrapped, self._orders, strict=True):
            assert order.current is not None
            order.current.begin()
            order.replay = None
            if not order.current.replayed:
                self._say(
                    trainer,
                    f"the loader {_name(loader)} drew other batches than before the interruption: the"
                    " dataset, the batch size or a sampler's own state has changed.",
                )

    def _set_rng(self, trainer: Any, resume: _Resume) -> None:
        generators, state = self._generators(), resume.own["now"]
        if len(generators) != len(state["generators"]):
            self._say(
                trainer,
                f"the loaders own {len(generators)} generators, the checkpoint holds"
                f" {len(state['generators'])} states: theirs are not restored.",
            )
            state, generators = {**state, "generators": []}, []
        restore_rng(state, generators)


def _without_advice(trainer: Any, original: Callable[[], None]) -> None:
    """Lightning's advice to use a resumable loader is no longer due; ``ResumeState`` warns where it is."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*your dataloader is not resumable.*")
        original()


def _position(batches: int, length: int, mode: str) -> int:
    """Batches that a loader of ``length`` has given in its latest pass, after ``batches`` of the epoch."""
    if mode == "max_size_cycle" and length:
        return (batches - 1) % length + 1  # the shorter loaders begin again
    return min(batches, length)


def _name(loader: Any) -> str:
    dataset = getattr(loader, "dataset", None)
    return type(loader).__name__ + (f" of {type(dataset).__name__}" if dataset is not None else "")

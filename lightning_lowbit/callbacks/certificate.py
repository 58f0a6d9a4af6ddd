"""TrainingCertificate: hashes of every low-bit layer as a run goes on, in a file and in its checkpoints."""

from __future__ import annotations

import json
import os
import random
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from lightning.fabric.utilities.cloud_io import get_filesystem
from lightning.pytorch import Callback
from torch import nn

from lightning_lowbit.errors import ConfigError, InvariantError
from lightning_lowbit.modules.base import switch_of
from lightning_lowbit.plugins.checkpoint import write_spec
from lightning_lowbit.plugins.distributed import world_size
from lightning_lowbit.plugins.lifecycle import Lifecycle
from lightning_lowbit.reports.certificate import CALLBACK, FORMAT, layer_hashes, network_limits, record

__all__ = ["TrainingCertificate"]

_FILE = "certificate.json"
_DRAWS = "the training step draws from a global random generator: equal bits need one seed, and one torch and numpy"


class TrainingCertificate(Callback):
    """Certify a training run: one SHA-256 for each low-bit layer and one for all of them, epoch by epoch.

    The certificate stands in ``certificate.json`` beside the logs (in ``default_root_dir`` without a logger; an
    earlier one there is replaced) and in every checkpoint, with which it goes on over a resume.
    ``lightning-lowbit verify --certificate A B`` compares two. Stands behind QuantCallback in the list.

    Args:
        every_n_steps: hash behind every n-th optimizer step too, not only at the end of an epoch.
        path: another file to write.
        check_ranks: at the end of an epoch, compare the hashes of all processes (schemes with integer training).
    """

    def __init__(self, every_n_steps: int | None = None, path: str | None = None, check_ranks: bool = True) -> None:
        if every_n_steps is not None and every_n_steps < 1:
            raise ConfigError(f"{CALLBACK}(every_n_steps={every_n_steps}): expected at least 1, or None for epochs.")
        self.every_n_steps, self.path, self.check_ranks = every_n_steps, path, check_ranks
        self.header: dict[str, Any] = {}
        self.records: list[dict[str, Any]] = []
        self._lifecycle: Lifecycle | None = None
        self._file: str | None = None
        self._step = 0  # the last one that was looked at
        self._generators: Any = None  # their states before the batch; None once they are known to be drawn from

    @property
    def state_key(self) -> str:
        return CALLBACK

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        if stage != "fit":
            return
        before = trainer.callbacks[: trainer.callbacks.index(self)]
        found = [callback for callback in before if isinstance(callback, Lifecycle)]
        if not found:
            # Behind, the ranges of an epoch would be taken over after the hash of its end.
            raise ConfigError(
                f"Trainer(callbacks=[{CALLBACK}(...)]): expected a QuantCallback before it in the list, whose network "
                f"it certifies. Write callbacks=[QuantCallback(...), {CALLBACK}(...)]."
            )
        self._lifecycle = found[0]
        if trainer.global_step == 0:
            self.header, self.records = {}, []

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        assert self._lifecycle is not None
        self._step = trainer.global_step
        if not self.header:
            spec = write_spec(self._lifecycle.scheme, self._lifecycle.selection, switch_of(pl_module).conversion)
            seed = os.environ.get("PL_GLOBAL_SEED")  # where seed_everything leaves it
            self.header = {
                "format": FORMAT,
                **{name: spec[name] for name in ("version", "scheme", "options")},
                "seed": None if seed is None else int(seed),
                "torch": str(torch.__version__),
                "world_size": int(trainer.world_size),
                "limits": [f"no record before step {self._step}, where the run went on without"] * (self._step > 0),
            }
        folder = trainer.log_dir or trainer.default_root_dir  # asks all processes
        self._file = None if trainer.fast_dev_run else self.path or os.path.join(folder, _FILE)

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if _DRAWS not in self.header["limits"]:
            self._generators = _generator_states(pl_module.device)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if self._generators is not None and self._generators != _generator_states(pl_module.device):
            self._limit(_DRAWS)
        self._generators = None
        self._behind_step(trainer, pl_module)

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        assert self._lifecycle is not None
        self._record(trainer, pl_module, "epoch_end")
        # Under float gradients the running statistics of batch norms differ by rank.
        if self.check_ranks and self.records and self._lifecycle.scheme.carries_errors and world_size() > 1:
            _compare_ranks(self.records[-1])
        self._write(trainer, pl_module)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self._write(trainer, pl_module)

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        self._write(trainer, pl_module)

    # -- records -----------------------------------------------------------------------------------------------
    def _behind_step(self, trainer: Any, pl_module: nn.Module) -> None:
        step, n = trainer.global_step, self.every_n_steps
        if n is not None and step // n > self._step // n:
            self._record(trainer, pl_module, "step")
        self._step = step

    def _record(self, trainer: Any, pl_module: nn.Module, at: str) -> None:
        if not switch_of(pl_module).started:
            return
        assert self._lifecycle is not None
        layers = layer_hashes(pl_module, self._lifecycle.rule)
        entry = record(int(trainer.current_epoch), int(trainer.global_step), at, layers)
        moment = ("epoch", "step", "at")
        if self.records and all(self.records[-1][name] == entry[name] for name in moment):
            self.records.pop()  # an epoch whose end runs again behind a resume
        self.records.append(entry)

    def _limit(self, *limits: str) -> None:
        known = self.header["limits"]
        known += [limit for limit in limits if limit not in known]

    def _complete(self, trainer: Any, pl_module: nn.Module) -> dict[str, Any]:
        """The certificate so far, with all that is known of its limits."""
        lifecycle = self._lifecycle
        assert lifecycle is not None
        if lifecycle.schedule is not None and lifecycle.schedule.begin > 0:
            self._limit(f"float training up to step {lifecycle.schedule.begin}, not hashed")
        self._limit(*network_limits(pl_module), *lifecycle.resume.limits)
        return self.state_dict()

    # -- keeping ----------------------------------------------------------------------------------------------
    def state_dict(self) -> dict[str, Any]:
        """Plain types; empty before the run."""
        if not self.header:
            return {}
        return {**self.header, "limits": list(self.header["limits"]), "records": list(self.records)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if state_dict["format"] != FORMAT:
            raise ConfigError(
                f"{CALLBACK}: the checkpoint's certificate has format {state_dict['format']!r} (lightning-lowbit "
                f"{state_dict.get('version')}), this version goes on with format {FORMAT}. Leave the callback out, or "
                "install the version that wrote it."
            )
        self.header = {name: value for name, value in state_dict.items() if name != "records"}
        self.records = list(state_dict["records"])

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """A callback before this one may save behind a step or an epoch whose record is still due."""
        if not self.header or self._lifecycle is None:
            return
        if trainer.training:
            self._behind_step(trainer, pl_module)
            epoch = trainer.fit_loop.epoch_progress.current
            if epoch.completed < epoch.processed == epoch.ready:
                self._record(trainer, pl_module, "epoch_end")
        checkpoint["callbacks"][self.state_key] = self._complete(trainer, pl_module)

    def _write(self, trainer: Any, pl_module: nn.Module) -> None:
        """Replace the file in one move: a run that is killed leaves the last whole one."""
        if self._file is None or not self.header or not trainer.is_global_zero:
            return
        system = get_filesystem(self._file)
        system.makedirs(os.path.dirname(self._file) or ".", exist_ok=True)
        with system.open(f"{self._file}.part", "w") as file:
            json.dump(self._complete(trainer, pl_module), file, indent=1)
        system.mv(f"{self._file}.part", self._file)


def _generator_states(device: torch.device) -> tuple[Any, ...]:
    """States of the generators that a training step may draw from, in a form that == compares."""
    _, words, position, gauss, cached = np.random.get_state()
    states = (torch.get_rng_state().numpy().tobytes(), random.getstate(), np.asarray(words).tobytes())
    cuda = torch.cuda.get_rng_state(device).numpy().tobytes() if device.type == "cuda" else b""
    return (*states, position, gauss, cached, cuda)


def _compare_ranks(mine: dict[str, Any]) -> None:
    """InvariantError, on every rank, where two ranks hold different integers."""
    ranks: list[Any] = [None] * world_size()
    dist.all_gather_object(ranks, mine["layers"])
    for rank, layers in enumerate(ranks):
        names = dict.fromkeys([*ranks[0], *layers])
        differing = [name for name in names if layers.get(name) != ranks[0].get(name)]
        if differing:
            raise InvariantError(
                f"{differing[0]}: rank {rank} holds other integers than rank 0 at step {mine['step']}, in "
                f"{len(differing)} of {len(names)} entries; expected the same bits on all ranks. Please report it; "
                f"{CALLBACK}(check_ranks=False) goes on without the check."
            )

"""What every quantizer is: a place for a grid, silent until calibrated, one module per site."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_lowbit.errors import ConfigError
from lightning_lowbit.modules.base import Mode, Site, Switch
from lightning_lowbit.modules.lowering import Snap, refuse
from lightning_lowbit.numerics.grid import Grid
from lightning_lowbit.numerics.observers import AllReduce
from lightning_lowbit.numerics.rounding import Rounding

__all__ = ["Quantizer", "in_backward", "on"]


class Quantizer(nn.Module):
    """Base of the quantizers that schemes hand out.

    It passes tensors through until it is initialized (by calibration or from a checkpoint), and while its
    network runs in float. State is in float32 buffers, since weight averaging truncates integer ones;
    ``ready`` and ``signed`` are their Python copies, so that no forward reads a device.

    Args:
        site: the tensor it stands for.
    """

    waits: bool = False  # its turn comes behind calibration, which leaves it open
    has_exponent: bool = True  # False where its step is no power of two
    whole: tuple[str, ...] = ()  # buffers of whole numbers, which an average of networks has no use for
    has_grid: bool = True  # False for what only stands in a quantizer's place
    like: Any = None  # a layer in whose dtype codes are carried; None leaves them in that of what comes in
    initialized: Tensor
    negative: Tensor
    switch: Switch

    def __init__(self, site: Site) -> None:
        super().__init__()
        self.site = site
        self.ready = False
        self.signed = True if site.signed is None else site.signed
        self.group: Sequence[Quantizer] = (self,)  # all members of its tie, itself included
        self.register_buffer("initialized", torch.zeros(()))
        self.register_buffer("negative", torch.tensor(float(self.signed)))

    # -- what a scheme's quantizer answers ----------------------------------------------------------------
    @abstractmethod
    def quantize(self, x: Tensor, rectify: bool = False) -> Tensor:
        """Values of ``x`` (of relu(x) with ``rectify``) moved onto the grid."""

    @abstractmethod
    def exponent(self) -> Tensor:
        """log2 of the step, int32 0-dim on the device (or one per channel)."""

    @abstractmethod
    def grid(self) -> Grid:
        """The present grid, read back to the host."""

    @property
    def stored_bits(self) -> int:
        """Bits in which a device stores one value: those of a code, unless its codes are packed in another way."""
        return self.grid().bits

    def as_snap(self) -> Snap:
        """What it does in evaluation, for an integer program; UnsupportedModelError where that has none."""
        if not self.ready:
            raise refuse(
                self.site.key, "it has no grid, for it saw no calibration or nothing but zeros in it",
                "Calibrate or train the network, or skip the layer.",
            )  # fmt: skip
        grid = self.grid()
        if not isinstance(grid.exponent, int):
            raise refuse(
                self.site.key, f"its step is {grid}, expected one power of two", "Convert with power-of-two steps."
            )
        rounding = getattr(self, "rounding", Rounding.HALF_EVEN)
        return Snap(grid.exponent, grid.qmin - grid.zero_point, grid.qmax - grid.zero_point, rounding)

    def share(self, group: Sequence[Quantizer], same_grid: bool) -> None:
        """Give all members of a tie one step; with ``same_grid`` one sign too. Called on the first member."""

    def absorb(self, weight: Tensor) -> Tensor:
        """What multiplies this tensor so that products are in true units; ``weight`` itself but for scaled tensors."""
        return weight

    def saturated(self, x: Tensor) -> Tensor:
        """How many values of ``x`` lie beyond the grid, 0-dim."""
        return torch.zeros((), device=x.device)

    def log2_threshold(self) -> Tensor | None:
        """log2 of what it clips at where training moves that, before any rounding up, 0-dim; None elsewhere."""
        return None

    @property
    def counts(self) -> bool:
        """Whether it can say which values are saturated."""
        return type(self).saturated is not Quantizer.saturated

    def inherit(self, state: dict[str, Tensor]) -> None:
        """Take from another network's quantizer of this tensor what its weights are nothing without; {} mostly."""

    # Calibration, in this order: observe in a first pass, close_pass, observe again if it asks for that,
    # commit. close_pass and commit are called on the first member of a tie, for all of them.
    def observe(self, x: Tensor) -> None:
        """Look at a tensor."""

    def forget(self) -> None:
        """Drop what was observed."""

    def close_pass(self, all_reduce: AllReduce) -> bool:
        """End the first pass, over all processes; True asks for a second one."""
        return False

    def commit(self, all_reduce: AllReduce) -> None:
        """Set the grid from what was seen and mark the tie ready; a tensor of zeros only stays open."""
        self.set_ready()

    def integer_state(self) -> dict[str, Tensor]:
        """The integers that training moves here, by name."""
        return {}

    def settle(self, reset: bool) -> None:
        """An epoch of training ended, or (without ``reset``) a validation begins: take over what was seen in it."""

    # -- what all share -----------------------------------------------------------------------------------
    def forward(self, x: Tensor, rectify: bool = False) -> Tensor:
        mode = self.switch.mode
        if mode is Mode.LOWBIT and self.switch.started and self.ready:
            if self.switch.tally is not None:
                self.switch.tally.count(self, F.relu(x) if rectify else x)
            return self._carried(self.quantize(x, rectify))
        if rectify:
            x = F.relu(x)
        if mode is Mode.OBSERVE and self.site.role not in (
            "weight",
            "bias",
        ):  # those are read once, not per batch
            self.observe(x.detach())
        return self._carried(x)

    def _carried(self, x: Tensor) -> Tensor:
        return x.to(self.like.weight.dtype) if self.like is not None and x.dtype == torch.float64 else x

    def set_ready(self, ready: bool = True) -> None:
        """Mark the whole tie as calibrated, or as waiting for calibration."""
        for member in self.group:
            member.ready = ready
            member.initialized.fill_(float(ready))

    def set_signed(self, signed: bool) -> None:
        self.signed = signed
        self.negative.fill_(float(signed))

    def refresh(self) -> None:
        """Bring the Python copies up to date with the buffers: after a load, after averaging."""
        self.ready, self.signed = bool(self.initialized.round().item()), bool(self.negative.round().item())

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        self.refresh()
        self.switch.started = self.switch.started or self.ready

    def require_finite(self, bad: int) -> None:
        if bad:
            raise ConfigError(
                f"{self.site.key}: {bad} NaN or infinite value{'s' if bad > 1 else ''} in calibration, "
                "expected finite "
                "numbers. Look at the calibration batches and at the weights of the layers before it."
            )

    def extra_repr(self) -> str:
        return f"{self.site.role}, {self.grid() if self.ready else 'not calibrated'}"


def in_backward() -> bool:
    """Whether a backward pass is running: what computes then is a checkpointed block, for the second time."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def on(quantizer: Quantizer | None, x: Tensor) -> Tensor:
    """Apply a quantizer where there is one."""
    return x if quantizer is None else quantizer(x)

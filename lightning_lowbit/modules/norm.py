"""What stands in the place of a batch norm: itself in a float network; once folded nothing, as an island integers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_lowbit.graph.ops import Kind
from lightning_lowbit.modules.base import LowBitModule
from lightning_lowbit.modules.lowering import Builder, refuse
from lightning_lowbit.modules.quantizer import Quantizer, on

__all__ = ["NORMS", "LowBitBatchNorm", "has_seen_data"]


class LowBitBatchNorm(LowBitModule):
    """Same object, parameters, buffers and keys; still a ``_BatchNorm`` to whoever looks for one."""

    lowbit_kind = Kind.BATCH_NORM
    lowbit_output: Quantizer | None
    lowbit_accumulator: Quantizer | None
    lowbit_error: Quantizer | None
    island: bool
    since: int | None  # batches since the network changed and its statistics began anew; None where it did not
    _check_input_dim: Callable[[Tensor], None]  # of torch's batch norm behind it

    def prepare(self) -> None:
        self.register_module("lowbit_output", None)
        self.register_module("lowbit_accumulator", None)
        self.register_module("lowbit_error", None)
        self.island, self.since = False, None

    def op(self, x: Tensor) -> Tensor:
        """The float operation."""
        return super().forward(x)  # type: ignore[no-any-return]  # of torch's batch norm behind it

    def integer_state(self) -> dict[str, Tensor]:
        """An island's parameters and statistics are float, and the same bits on any machine."""
        own = (*self.named_parameters(recurse=False), *self.named_buffers(recurse=False)) if self.island else ()
        return {**super().integer_state(), **dict(own)}

    def forward(self, input: Tensor) -> Tensor:  # torch's name for it
        x = input
        if not self.switch.folding:
            return self.op(x)
        if self.island:
            return on(self.lowbit_output, self.scheme.compute(self, x))
        self._check_input_dim(x)
        return on(self.lowbit_output, x)

    def lower(self, build: Builder, x: Any) -> Any:
        """Merged into the layer before it, or a float function of its own."""
        if self.island:
            raise refuse(self.path, "it is a batch norm on integers whose scheme does not say what they are", "")
        return build.snap(x, self.lowbit_output)


def has_seen_data(module: nn.Module) -> bool:
    """Whether it is a batch norm that has been trained: its network's weights come from elsewhere."""
    return (
        isinstance(module, _BatchNorm) and module.num_batches_tracked is not None and bool(module.num_batches_tracked)
    )


class LowBitBatchNorm1d(LowBitBatchNorm, nn.BatchNorm1d):
    pass


class LowBitBatchNorm2d(LowBitBatchNorm, nn.BatchNorm2d):
    pass


class LowBitBatchNorm3d(LowBitBatchNorm, nn.BatchNorm3d):
    pass


class LowBitSyncBatchNorm(LowBitBatchNorm, nn.SyncBatchNorm):
    pass


NORMS: dict[type[nn.Module], type[LowBitBatchNorm]] = {
    nn.BatchNorm1d: LowBitBatchNorm1d,
    nn.BatchNorm2d: LowBitBatchNorm2d,
    nn.BatchNorm3d: LowBitBatchNorm3d,
    nn.SyncBatchNorm: LowBitSyncBatchNorm,
}

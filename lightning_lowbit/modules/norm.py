"""What stands in the place of a folded batch norm: itself in a float network, nothing once folded."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from lightning_lowbit.graph.ops import Kind
from lightning_lowbit.modules.base import LowBitModule
from lightning_lowbit.modules.quantizer import Quantizer, on

__all__ = ["NORMS", "LowBitBatchNorm"]


class LowBitBatchNorm(LowBitModule):
    """Same object, parameters, buffers and keys; still a ``_BatchNorm`` to whoever looks for one."""

    lowbit_kind = Kind.BATCH_NORM
    lowbit_output: Quantizer | None
    _check_input_dim: Callable[[Tensor], None]  # of torch's batch norm behind it

    def prepare(self) -> None:
        self.register_module("lowbit_output", None)

    def forward(self, x: Tensor) -> Tensor:
        if not self.switch.folding:
            return super().forward(x)  # type: ignore[no-any-return]
        self._check_input_dim(x)
        return on(self.lowbit_output, x)


class LowBitBatchNorm1d(LowBitBatchNorm, nn.BatchNorm1d):
    pass


class LowBitBatchNorm2d(LowBitBatchNorm, nn.BatchNorm2d):
    pass


class LowBitBatchNorm3d(LowBitBatchNorm, nn.BatchNorm3d):
    pass


NORMS: dict[type[nn.Module], type[LowBitBatchNorm]] = {
    nn.BatchNorm1d: LowBitBatchNorm1d,
    nn.BatchNorm2d: LowBitBatchNorm2d,
    nn.BatchNorm3d: LowBitBatchNorm3d,
}

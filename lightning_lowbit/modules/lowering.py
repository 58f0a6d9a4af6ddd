"""What modules build an integer program with: the other side of it is in ``export``, which knows no scheme."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol

from torch import Tensor, nn

from lightning_lowbit.errors import UnsupportedModelError
from lightning_lowbit.numerics.rounding import Rounding

if TYPE_CHECKING:
    from lightning_lowbit.modules.quantizer import Quantizer

__all__ = ["Builder", "Codes", "Snap", "refuse"]


@dataclass(frozen=True)
class Snap:
    """What a quantizer does in evaluation: clip(round(v / 2^exponent), low, high), counted from the code of 0."""

    exponent: int
    low: int
    high: int
    rounding: Rounding


Codes = Any
"""A tensor of a program: integers worth code * 2^exponent or, between integer stretches, floats.

It has ``shape`` (-k stands for k times the batch), ``is_float``, ``exponent`` (one, or one a channel) and the proved
bounds ``low`` and ``high`` of its codes. ``word`` is the bits of the integers that the network itself keeps it in, a
``Carrier``'s; 0 where it has floats of the same worth.
"""


class Builder(Protocol):
    """Writes the operations of one module into a program; every function gives the tensor that comes out.

    All is exact: nothing here rounds but ``snap`` and ``requantize``, by the rule that they are told.
    """

    path: str  # of the module that is being lowered

    def snap(self, x: Codes, by: Quantizer | Snap | None, rectify: bool = False, limit: float | None = None) -> Codes:
        """Codes of ``by``: of a float tensor, of integers on another step, of pooled sums (one exact division).

        Args:
            x: anything.
            by: a quantizer, or what it does; None leaves x.
            rectify: relu comes first.
            limit: so does a clip from above, at this value.
        """

    def clip(self, x: Codes, low: int | None, high: int | None) -> Codes:
        """Codes beyond the ends at the ends."""

    def product(self, layer: nn.Module, x: Codes, weight: Tensor, exponent: Tensor, bias: Tensor | None) -> Codes:
        """Convolution, transposed convolution or linear layer, by the geometry of ``layer``.

        Args:
            layer: gives type, stride, padding, dilation, groups.
            x: integers.
            weight: values on their grid, as evaluation multiplies them.
            exponent: log2 of the grid's step, 0-dim, or one per output.
            bias: values on the grid of the products, or None.
        """

    def constant(self, x: Codes, values: Tensor, exponent: int | Tensor, axis: int) -> Codes:
        """x plus constants along an axis, both brought to the finer of their steps."""

    def add(self, terms: Sequence[Codes]) -> Codes:
        """The sum of integers, on the finest of their steps."""

    def concat(self, parts: Sequence[Codes], axis: int, new: bool = False) -> Codes:
        """Side by side on the finest of their steps; along a ``new`` axis like torch.stack."""

    def pool(self, x: Codes, kind: tuple[int, bool] | None, *args: Any, **settings: Any) -> Codes:
        """Sums of an average pool's windows (``kind`` as of modules.pooling; None is torch.mean), to be divided.

        Whoever reads them divides, in one step with its own rounding.
        """

    def scaled(self, x: Codes, exponent: int) -> Codes:
        """The same codes worth 2^exponent times as much."""

    def move(self, x: Codes, function: Callable[[Tensor], Tensor]) -> Codes:
        """Elements moved, dropped or repeated, or zeros between them, as ``function`` does with any tensor."""

    def threshold(self, x: Codes, low: Tensor, flip: Tensor, axis: int = 1) -> Codes:
        """+1 where (code >= low) != flip, else -1; one number each along the channels."""

    def sign(self, x: Codes) -> Codes:
        """-1 where a value is negative, else +1: of floats too, and as a threshold where they come from integers."""

    def border(self, x: Codes, sides: Sequence[Sequence[int]], value: int) -> Codes:
        """That code around images [N, C, ...], (before, after) an axis."""

    def in_float32(self, x: Codes, how: Literal["nearest", "odd"], instead: str) -> Codes:
        """x, which evaluation carries in float32: where that does not hold its codes they are rounded so.

        What then has another result than the integers is refused; ``instead`` is the way around.
        """

    def normalize(self, x: Codes, attributes: Mapping[str, Any], constants: Mapping[str, Tensor], bits: int) -> Codes:
        """A batch norm with integer constants (numerics.normalize.normalize), its result on 2^-bits."""

    def floats(self, x: Codes, factor: float | None = None, precision: str = "float32") -> Codes:
        """The values of codes as float32, times a factor; in this precision until the last rounding."""

    def island(
        self, function: str, *inputs: Codes, shape: Sequence[int] | None = None,
        constants: Mapping[str, Tensor] | None = None, **attributes: Any,
    ) -> Codes:  # fmt: skip
        """A float function of export.runtime; integers among its inputs become floats first."""


def refuse(path: str, why: str, instead: str) -> UnsupportedModelError:
    """The error of a module that has no integer form."""
    return UnsupportedModelError(f"{path}: {why}, so that it has no integer form. {instead}")

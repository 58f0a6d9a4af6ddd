"""How wide every tensor is: total, integer and fraction bits, and the bits that sums need (WAGEUBN, "data width")."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lightning_lowbit.numerics.exponent import EXPONENT_MIN
from lightning_lowbit.numerics.grid import Grid
from lightning_lowbit.numerics.widths import ACCUMULATOR_BITS
from lightning_lowbit.reports.table import Columns, show, text

__all__ = ["Row", "Widths"]

_COLUMNS = Columns(
    ("tensor", "total", "integer", "fraction", "signed", "saturation", "sum needs"),
    kept=2,
    shortest={0: 14},
    right=frozenset({"total", "integer", "fraction", "saturation"}),
    mark=f"> {ACCUMULATOR_BITS}",
)


@dataclass(frozen=True)
class Row:
    """One tensor: ``grid`` None while it is float; ``exact`` None where there is no sum.

    Attributes:
        site, role: of which module it is the input, weight, sum ...
        pattern: what was merged there.
        grid: its codes and what they are worth.
        saturation: share of its values beyond the grid; None where nobody counted.
        exact: whether float32 sums are proved to be the integer sums.
        accumulator_bits: of a sum, the width that holds it, sign included; None where there is none, or in float.

    total = signed + integer + fraction. Of a grid with exponents per channel, integer and fraction are those of the
    channel that reaches farthest.

        grid                   total  integer  fraction
        float                  None   None     None
        int8·2^-5              8      2        5
        uint8·2^-9             8      -1       9
        int8·2^(-7..-3)@0      8      4        3
        uint8·0.1              8      None     None        its step is no power of two
        int8·2^-149            8      None     None        of a tensor that is empty

    >>> grids = [None, Grid(8, -5), Grid(8, -9, signed=False), Grid(8, (-7, -3), axis=0)]
    >>> grids += [Grid(8, scale=0.1, signed=False), Grid(8, EXPONENT_MIN)]
    >>> for row in (Row("conv", "weight", "", grid) for grid in grids): print(row.total, row.integer, row.fraction)
    None None None
    8 2 5
    8 -1 9
    8 4 3
    8 None None
    8 None None
    """

    site: str
    role: str
    pattern: str
    grid: Grid | None
    saturation: float | None = None
    exact: bool | None = None
    accumulator_bits: int | None = None

    @property
    def name(self) -> str:
        return f"{self.site}.{self.role}"

    @property
    def total(self) -> int | None:
        """Bits of a code, the sign among them."""
        return None if self.grid is None else self.grid.bits

    @property
    def integer(self) -> int | None:
        """Bits before the point; negative where all values are below 1/2."""
        return max(self._integers(), default=None)

    @property
    def fraction(self) -> int | None:
        """Bits behind the point; negative where the step is above 1."""
        return min(self._fractions(), default=None)

    @property
    def signed(self) -> bool | None:
        return None if self.grid is None else self.grid.signed

    @property
    def empty(self) -> bool:
        """Whether its grid has the lowest exponent: it never was anything but zero."""
        return self.grid is not None and self.grid.exponent == EXPONENT_MIN

    @property
    def too_wide(self) -> bool:
        """Whether its sums need more than ACCUMULATOR_BITS."""
        return self.accumulator_bits is not None and self.accumulator_bits > ACCUMULATOR_BITS

    def cells(self) -> tuple[str, ...]:
        """As printed by Widths."""
        needs = "" if self.accumulator_bits is None else f"{self.accumulator_bits:2}"
        return (
            self.name,
            str(self.total) if self.grid is not None else "" if needs else "float",
            _span(self._integers()),
            _span(self._fractions()),
            {None: "", True: "yes", False: "no"}[self.signed],
            "" if self.saturation is None else f"{100 * self.saturation:.2f} %",
            f"{needs} {_COLUMNS.mark}" if self.too_wide else needs,
        )

    def _fractions(self) -> list[int]:
        """One a channel; none where they are not known."""
        exponent = None if self.grid is None else self.grid.exponent
        exponents = exponent if isinstance(exponent, tuple) else () if exponent is None else (exponent,)
        return [-e for e in exponents if e > EXPONENT_MIN]

    def _integers(self) -> list[int]:
        if self.grid is None:
            return []
        magnitude = self.grid.bits - int(self.grid.signed)
        return [magnitude - fraction for fraction in self._fractions()]


@dataclass(frozen=True)
class Widths:
    """The widths of a network's tensors: str() is a table, ``rows`` have the numbers.

    >>> rows = [Row("conv1", "input", "", Grid(8, -7)), Row("conv1", "weight", "", Grid(8, (-9, -7), axis=0))]
    >>> rows.append(Row("conv1", "sum", "", Grid(32, -14), accumulator_bits=33))
    >>> print(str(Widths(rows)).partition("\\n\\n")[0])
    tensor        total  integer  fraction  signed  sum needs
    ------------  -----  -------  --------  ------  ---------
    conv1.input       8        0         7  yes
    conv1.weight      8    -2..0      7..9  yes
    conv1.sum        32       17        14  yes     33 > 31
    """

    rows: Sequence[Row]

    def __str__(self) -> str:
        return text(self.listed, self.notes, columns=_COLUMNS)

    def show(self) -> None:
        """Print it; with color where rich is installed."""
        show(self.listed, self.notes, {}, _COLUMNS)

    @property
    def listed(self) -> list[Row]:
        """What has a line: without tensors that never were there, such as errors before the first backward."""
        return [row for row in self.rows if not row.empty]

    @property
    def notes(self) -> list[str]:
        """What the columns say, of those that there are."""
        notes = ["bits: total = signed + integer + fraction; a code is worth 2^-fraction"]
        grids = [row.grid for row in self.listed if row.grid is not None]
        if any(row.grid is None and row.accumulator_bits is None for row in self.listed):
            notes.append("float: on no grid, or on one that is not known yet")
        if any(isinstance(grid.exponent, tuple) for grid in grids):
            notes.append("a..b: least and most of a tensor's channels")
        if any(grid.scale is not None for grid in grids):
            notes.append("without integer and fraction: its step is no power of two")
        absent = len(self.rows) - len(self.listed)
        if absent:
            notes.append(f"not listed: {absent} that held nothing but zeros so far")
        if any(row.accumulator_bits is not None for row in self.rows):
            notes.append("sum needs: bits that hold a sum, sign included, whatever its input; a layer's by its weights")
        if any(row.too_wide for row in self.rows):
            notes.append(f"{_COLUMNS.mark}: an int32 has no bit left for a bias or a second sum")
        return notes


def _span(values: Sequence[int]) -> str:
    if not values:
        return ""
    low, high = min(values), max(values)
    return str(low) if low == high else f"{low}..{high}"

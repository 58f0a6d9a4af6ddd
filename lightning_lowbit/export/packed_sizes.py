"""How large a packed network is."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor, nn

from lightning_lowbit.export.packed import packing_of
from lightning_lowbit.export.packed_layers import PackedConv, PackedLinear

__all__ = ["PackedSizes", "Size", "packed_sizes"]


@dataclass(frozen=True)
class Size:
    """Bytes of one module.

    Attributes:
        path: where it stands.
        dtype: of its weights: 1 bit, int8, float32.
        words, thresholds, rest: bytes stored.
        float32: bytes in the float network.
        binary: whether it is a binary layer.
    """

    path: str
    dtype: str
    words: int
    thresholds: int
    rest: int
    float32: int
    binary: bool = False

    @property
    def stored(self) -> int:
        return self.words + self.thresholds + self.rest


@dataclass(frozen=True)
class PackedSizes:
    """Bytes of a packed network beside its float one; printable.

    Attributes:
        rows: one a module that holds anything, in either network.
        file: bytes of the file on disk; None where none was written.
    """

    rows: tuple[Size, ...]
    file: int | None = None

    @property
    def binary(self) -> Size:
        """The binary layers alone."""
        return _total("binary layers", "", [row for row in self.rows if row.binary])

    @property
    def whole(self) -> Size:
        """All tensors of the network."""
        return _total("whole network", "", self.rows)

    def __str__(self) -> str:
        table: list[tuple[str, ...]] = [("layer", "dtype", "words", "thresholds", "rest", "float32", "smaller")]
        for row in (*self.rows, self.binary, self.whole):
            sizes = (f"{size:,}" for size in (row.words, row.thresholds, row.rest, row.float32))
            table.append((row.path or "(root)", row.dtype, *sizes, _ratio(row.float32, row.stored)))
        if self.file is not None:
            table.append(("file", "", f"{self.file:,}", "", "", "", _ratio(self.whole.float32, self.file)))
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        lines = [
            "  ".join(
                cell.ljust(w) if i < 2 else cell.rjust(w) for i, (cell, w) in enumerate(zip(r, widths, strict=True))
            )
            for r in table
        ]
        lines[1:1] = ["  ".join("-" * width for width in widths)]
        lines.insert(2 + len(self.rows), lines[1])
        return "\n".join(line.rstrip() for line in lines)


def packed_sizes(packed: nn.Module) -> PackedSizes:
    """Bytes that each module of a packed network stores, against its float32 parameters and buffers.

    Raises:
        ConfigError: not a packed network.
    """
    floats = packing_of(packed).float_bytes
    rows = []
    for path, module in packed.named_modules():
        own = {**dict(module.named_parameters(recurse=False)), **dict(module.named_buffers(recurse=False))}
        stored = {name: tensor.nbytes for name, tensor in own.items()}
        if not stored and path not in floats:
            continue
        binary = isinstance(module, (PackedLinear, PackedConv))
        words = stored.pop("words" if binary else "weight", 0)
        limits = stored.pop("low", 0) + stored.pop("flip", 0)
        weight = own.get("weight")
        dtype = (
            "1 bit"
            if binary
            else "folded"
            if not own
            else _named(next(iter(own.values())) if weight is None else weight)
        )
        rows.append(Size(path, dtype, words, limits, sum(stored.values()), floats.get(path, 0), binary))
    return PackedSizes(tuple(rows))


def _total(path: str, dtype: str, rows: Iterable[Size]) -> Size:
    sums = [(row.words, row.thresholds, row.rest, row.float32) for row in rows]
    return Size(path, dtype, *(sum(column) for column in zip(*sums, strict=True)) if sums else (0, 0, 0, 0))


def _named(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _ratio(large: int, small: int) -> str:
    return f"{large / small:.1f}x" if large and small else ""

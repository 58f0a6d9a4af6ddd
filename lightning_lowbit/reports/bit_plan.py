"""A plan of widths: what it says in print, and the file that a user edits and passes on."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from lightning_lowbit.errors import ConfigError
from lightning_lowbit.export.program import write_atomically
from lightning_lowbit.modules.base import Scheme
from lightning_lowbit.reports.allocation import Item
from lightning_lowbit.reports.effects import Effect
from lightning_lowbit.reports.table import Columns, show, text
from lightning_lowbit.schemes import registry, resolve

__all__ = ["BitPlan", "Planned", "Whole", "read_plan"]


_NO_MARK = "!"
_NETWORKS = Columns(
    ("network", "bytes", "bit ops", "SQNR", "cosine", "KL", "accuracy"),
    kept=3,
    shortest={},
    right=frozenset({"bytes", "bit ops", "SQNR", "cosine", "KL", "accuracy"}),
    mark=_NO_MARK,
)
_LEGEND = (
    "dB: SQNR of the outputs; of a tensor, with nothing else quantized. bit ops: products × bits of the weight × bits "
    "of the input, one sample. All of it calibrated, nothing trained",
)


@dataclass(frozen=True)
class Whole:
    """A whole network with some widths.

    Attributes:
        name: "4 bits", or "plan".
        size: bytes of its parameters.
        bit_ops: of its low-bit products, a sample: products x bits of the weight x bits of the input.
        effect: on the outputs, compared with those of the network without any quantizer.
    """

    name: str
    size: int
    bit_ops: int
    effect: Effect

    def cells(self) -> tuple[str, ...]:
        return (self.name, f"{self.size:,}", f"{self.bit_ops:,}", *self.effect.cells())


@dataclass(frozen=True)
class Planned:
    """Tensors of one width, and the width that they got."""

    item: Item
    bits: int

    def cells(self) -> tuple[str, ...]:
        found = [self.item.decibels(width) for width in self.item.noise]
        return (", ".join(self.item.paths), self.item.option, str(self.bits), *found)


@dataclass(frozen=True)
class BitPlan:
    """Widths of a network's layers: prints as a table, saves as a file to edit and to pass on.

    Attributes:
        scheme: what the network is converted with, ``overrides`` among its options.
        skip, include: as `convert` takes them, patterns of paths.
        rows: one a tensor or tie whose width was chosen.
        wholes: the network at each width throughout, and as planned.
        budget: in words.
        notes: what else there is to know.
    """

    scheme: Scheme
    skip: tuple[str, ...]
    include: tuple[str, ...] | None
    rows: tuple[Planned, ...]
    wholes: tuple[Whole, ...]
    budget: str
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        tables = ((self.rows, self.notes, self._columns), (self.wholes, _LEGEND, _NETWORKS))
        return "\n\n".join(text(rows, notes, columns=columns) for rows, notes, columns in tables)

    def show(self) -> None:
        """Print it; with color where rich is installed."""
        show(self.rows, self.notes, {}, self._columns)
        show(self.wholes, _LEGEND, {}, _NETWORKS)

    @property
    def _columns(self) -> Columns:
        widths = [f"{width} bits" for width in (self.rows[0].item.noise if self.rows else ())]
        names = ("tensor", "option", "bits", *widths)
        return Columns(names, kept=3, shortest={0: 14}, right=frozenset(["bits", *widths]), mark=_NO_MARK)

    def arguments(self) -> dict[str, Any]:
        """Those of `QuantCallback` and of `convert`."""
        found: dict[str, Any] = {"scheme": self.scheme}
        if self.skip:
            found["skip"] = list(self.skip)
        return found if self.include is None else {**found, "include": list(self.include)}

    def save(self, path: str | os.PathLike[str], words: str = "") -> None:
        """Write a YAML file of `QuantCallback`'s arguments, with what was measured as comments.

        Args:
            words: further ones for the command line that takes it.
        """
        write_atomically(path, "\n".join(self._lines(Path(path).name, words)).encode())

    def _lines(self, name: str, words: str) -> Iterator[str]:
        yield f"# Bits of each layer for at most {self.budget}. Edit it, and pass it on:"
        yield f"#   lightning-lowbit fit ... --quant {name}{words}"
        for whole in self.wholes:
            _, size, ops, sqnr, *_ = whole.cells()
            yield f"# {whole.name}: {size} bytes, {ops} bit ops, {sqnr} calibrated"
        yield f"scheme: {_yaml(_name(self.scheme))}"
        for option, value in _given(self.scheme).items():
            yield f"scheme.{option}: {_yaml(value)}"
        if self.skip:
            yield f"skip: {_yaml(list(self.skip))}"
        if self.include is not None:
            yield f"include: {_yaml(list(self.include))}"
        overrides: Mapping[str, Mapping[str, Any]] = getattr(self.scheme, "overrides")  # noqa: B009  # of no base class
        yield "scheme.overrides:" if overrides else "scheme.overrides: {}"
        of_path = {(path, row.item.option): row for row in self.rows for path in row.item.paths}
        for pattern, options in overrides.items():
            yield f"  {_yaml(pattern)}:"
            for option, value in options.items():
                row = of_path.get((pattern, option))
                found = () if row is None else (f"{bits}: {row.item.decibels(bits)}" for bits in row.item.noise)
                yield f"    {option}: {_yaml(value)}  # {', '.join(found)}".removesuffix("  # ")
        yield ""


def read_plan(path: str | os.PathLike[str]) -> dict[str, Any]:
    """A plan file as arguments: ``QuantCallback(**read_plan("plan.yaml"))``, ``convert(net, **read_plan(...))``.

    Raises:
        ConfigError: no such file, no mapping with a scheme, an option that the scheme does not have.
    """
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"plan {os.fspath(path)!r}: {error}. Give a file that BitPlan.save wrote.") from error
    if not isinstance(content, dict) or not isinstance(content.get("scheme"), str):
        raise ConfigError(f"plan {os.fspath(path)!r}: expected a mapping with 'scheme: tqt' or another name.")
    options = {key.removeprefix("scheme."): content.pop(key) for key in list(content) if key.startswith("scheme.")}
    return {**content, "scheme": resolve(content["scheme"], **options)}


def _name(scheme: Scheme) -> str:
    """What `resolve` and the command line find it by."""
    cls = type(scheme)
    return scheme.name if registry().get(scheme.name) is cls else f"{cls.__module__}.{cls.__qualname__}"


def _given(scheme: Scheme) -> dict[str, Any]:
    """The options that are not their defaults, and both widths, of which a file of fit may have others."""
    names = [f.name for f in dataclasses.fields(scheme)]  # type: ignore[arg-type]  # concrete schemes are dataclasses
    try:
        plain: Any = type(scheme)()
    except TypeError:  # an option without a default
        plain = None
    kept = [
        name for name in names
        if name in ("weight_bits", "act_bits") or plain is None or getattr(scheme, name) != getattr(plain, name)
    ]  # fmt: skip
    return {name: getattr(scheme, name) for name in kept if name != "overrides"}


def _yaml(value: Any) -> str:
    """On one line, read back as it was: words such as on, numbers such as 1e-05, any letter."""
    written: str = yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=10**9)
    return written.removesuffix("\n").removesuffix("\n...")

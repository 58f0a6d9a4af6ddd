"""What a comparison of a network with its integer program found: for people as text, for machines as JSON."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from lightning_lowbit.errors import ConfigError
from lightning_lowbit.export.program import write_atomically

__all__ = ["FORMAT", "Accumulator", "Certificate", "Difference", "Entry"]

FORMAT = 1
Found = int | float | str | bool | None


@dataclass(frozen=True)
class Difference:
    """The first place where program and network part.

    Attributes:
        op: number of the program's operation, -1 for its ends; with its ``kind`` and ``path``.
        value: name of the operation's result.
        what: "codes" or "values" of a batch, else a part of the program: "constant weight", "attribute shift" ...
        got, expected: what the program has there, and the network.
        index: place in the constant, or in the sample; None where it is no array.
        batch, sample: counted from 0; None for a part of the program.
    """

    op: int
    kind: str
    path: str
    value: str
    what: str
    got: Found
    expected: Found
    index: tuple[int, ...] | None = None
    batch: int | None = None
    sample: int | None = None

    def __str__(self) -> str:
        place = "" if self.index is None else f"[{', '.join(map(str, self.index))}]"
        where = "" if self.batch is None else f" in batch {self.batch}, sample {self.sample}"
        return (
            f"{self.path} (operation {self.op}, {self.kind}): {self.what}{place} is {self.got}, the network has "
            f"{self.expected}{where}"
        )


@dataclass(frozen=True)
class Accumulator:
    """The sums of one layer: seen in these samples, and proved for all inputs from the weights."""

    path: str
    seen_low: int
    seen_high: int
    low: int
    high: int
    bits: int


@dataclass(frozen=True)
class Entry:
    """Where floats become integers behind a float island.

    Attributes:
        flipped: codes of the program, run from the input on, that are not the network's.
        elements: of so many.
        seen: whether the network's own codes could be watched; if not, nothing behind is compared exactly.
    """

    path: str
    value: str
    flipped: int
    elements: int
    seen: bool


@dataclass(frozen=True)
class Certificate:
    """What was compared, and what differs.

    Attributes:
        ok: all compared codes are equal, floats agree within ``tolerance``, and the program is what the network
            lowers to now.
        end_to_end: so they are from the float input to the float output, with no float island between.
        values, elements: tensors of the program that were compared with the network's, and numbers in them.
        parted: how the program differs from what the network lowers to; found without any input.
        observed: the first codes that differ in a batch.
        islands: paths of float operations.
        float_error: largest difference of floats behind islands, relative to the largest value of their tensor.
        digests: SHA-256 of "program", "module" (its state) and "inputs".
    """

    ok: bool
    end_to_end: bool
    scheme: str
    model: str
    batches: int
    samples: int
    values: int
    elements: int
    parted: Difference | None
    observed: Difference | None
    islands: tuple[str, ...]
    entries: tuple[Entry, ...]
    tolerance: float
    float_error: float
    accumulators: tuple[Accumulator, ...]
    digests: dict[str, str]

    @property
    def difference(self) -> Difference | None:
        """The first in the program's order."""
        found = [each for each in (self.parted, self.observed) if each is not None]
        return min(found, key=lambda each: each.op, default=None)

    def __str__(self) -> str:
        compared = (
            f"{self.model} ({self.scheme}): {_count(self.samples, 'sample')} in {_count(self.batches, 'batch')}, "
            f"{_count(self.values, 'value')}, {self.elements:,} numbers"
        )
        return "\n".join([*self._verdict(), compared, *self._floats(), *self._sums(), self._limits()])

    def _verdict(self) -> list[str]:
        if self.ok:
            end = "from the float input to the float output" if self.end_to_end else "in every integer region"
            return [f"EQUAL: program and network have the same codes {end}"]
        lines = [f"DIFFERENT: {self.difference}"]
        if self.observed is not None and self.observed is not self.difference:
            lines.append(f"  seen at {self.observed}")
        elif self.observed is None:
            lines.append("  none of these samples shows it")
        return lines

    def _floats(self) -> list[str]:
        if not self.islands:
            return []
        lines = [
            f"float islands: {', '.join(self.islands)}; floats behind them within {self.float_error:.2g} of their "
            f"largest value ({self.tolerance:g} allowed)"
        ]
        for entry in self.entries:
            share = f"{entry.flipped:,} of {entry.elements:,} codes flipped"
            rest = "" if entry.seen else "; what follows was not compared code by code"
            lines.append(f"  entry {entry.path}: {share if entry.seen else 'not seen'}{rest}")
        return lines

    def _sums(self) -> list[str]:
        if not self.accumulators:
            return []
        widest = max(self.accumulators, key=lambda each: each.bits)
        return [
            f"widest sums: {widest.path}, {widest.seen_low:,} to {widest.seen_high:,} seen, {widest.low:,} to "
            f"{widest.high:,} ({widest.bits} bits) proved for all inputs"
        ]

    def _limits(self) -> str:
        short = ", ".join(f"{name} {digest[:12]}" for name, digest in self.digests.items())
        return f"holds for {short}; other inputs were not run, and a network that trains on needs another program"

    def to_json(self) -> dict[str, Any]:
        """Plain types: what ``save`` writes."""
        content = {"format": FORMAT, **asdict(self)}
        loaded: dict[str, Any] = json.loads(json.dumps(content))
        return loaded

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write JSON, whole or not at all."""
        write_atomically(path, (json.dumps(self.to_json(), indent=2) + "\n").encode())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Certificate:
        """Read what ``save`` wrote.

        Raises:
            ConfigError: no such file, or another kind of file.
        """
        try:
            content = json.loads(Path(path).read_bytes())
            if content["format"] != FORMAT:
                raise ConfigError(
                    f"certificate {str(path)!r}: format {content['format']!r}, this version reads format {FORMAT}. "
                    "Install the version that wrote it, or verify again."
                )
            return cls(**{**{field.name: content[field.name] for field in fields(cls)}, **_parts(content)})
        except OSError as error:
            raise ConfigError(
                f"certificate {str(path)!r}: {error.strerror}. Give the file that save() wrote."
            ) from error
        except (LookupError, TypeError, ValueError, RecursionError) as error:
            if isinstance(error, ConfigError):
                raise
            raise ConfigError(
                f"certificate {str(path)!r}: it is no certificate, or was cut off ({error}). Verify again and save it."
            ) from error


def _parts(content: dict[str, Any]) -> dict[str, Any]:
    """Fields that are no plain types."""

    def difference(part: dict[str, Any] | None) -> Difference | None:
        index = None if part is None or part["index"] is None else tuple(part["index"])
        return None if part is None else Difference(**{**part, "index": index})

    return {
        "parted": difference(content["parted"]),
        "observed": difference(content["observed"]),
        "islands": tuple(content["islands"]),
        "entries": tuple(Entry(**part) for part in content["entries"]),
        "accumulators": tuple(Accumulator(**part) for part in content["accumulators"]),
    }


def _count(number: int, what: str) -> str:
    plural = "" if number == 1 else "es" if what.endswith("ch") else "s"
    return f"{number:,} {what}{plural}"

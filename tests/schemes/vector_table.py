"""What a scheme's table of golden vectors consists of: which array is what, and how outputs are compared."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Array = npt.NDArray[np.generic]
Value = Tensor | Array | float


class Kind(StrEnum):
    """What an array is to the test."""

    INPUT = "input"
    OUTPUT = "output"
    QUIRK = "quirk"  # what a reference does instead: reproduced by a small function in the table
    TAIL = "tail"  # a trajectory past the step to which agreement is promised: reported
    EXCLUDED = "excluded"  # machine-dependent or wrong by its README's own word


@dataclass(frozen=True)
class VectorFile:
    """One .npz: its keys by regular expression (the first match decides) and what computes its outputs."""

    keys: Mapping[str, Kind]
    check: Callable[[Comparison], None]

    def kind(self, key: str) -> Kind | None:
        """What ``key`` is, or None if the table does not say."""
        return next((kind for pattern, kind in self.keys.items() if re.fullmatch(pattern, key)), None)


@dataclass
class Comparison:
    """The arrays of one file, and the account of those that were compared."""

    arrays: Mapping[str, Array]
    done: set[str] = field(default_factory=set)
    notes: list[str] = field(default_factory=list)

    def __getitem__(self, key: str) -> Tensor:
        """The array as a fresh tensor; integers as int64, so that sums of products have room."""
        tensor = torch.from_numpy(np.array(self.arrays[key]))
        return tensor if tensor.dtype.is_floating_point else tensor.to(torch.int64)

    def number(self, key: str) -> float:
        """An array of one element as a float."""
        return float(self.arrays[key].item())

    def count(self, key: str) -> int:
        """An array of one element as an int."""
        return int(self.arrays[key].item())

    def matching(self, pattern: str) -> list[re.Match[str]]:
        """The keys that match, for what a file enumerates in its names."""
        return [match for match in (re.fullmatch(pattern, key) for key in self.arrays) if match]

    def exact(self, key: str, got: Value) -> None:
        """Equal, element by element; -0 equals 0."""
        want, have = self._pair(key, got)
        wrong = np.flatnonzero(want != have)
        assert wrong.size == 0, (
            f"{key}: {wrong.size} of {want.size} differ, the first at {wrong[0]}: "
            f"got {have.flat[wrong[0]]!r}, want {want.flat[wrong[0]]!r}"
        )

    def close(self, key: str, got: Value, rtol: float = 0.0, atol: float = 0.0) -> None:
        """Within rtol of the array's largest value plus atol."""
        want, have = self._pair(key, got)
        error, bound = np.abs(want - have).max(initial=0), rtol * np.abs(want).max(initial=0) + atol
        assert error <= bound, f"{key}: off by {error:.3g}, allowed {bound:.3g}"

    def tail(self, key: str, got: Value) -> None:
        """Count the leading steps (rows) whose signs all agree; that count is reported, never demanded."""
        want, have = self._pair(key, got)
        flipped = (np.sign(want) != np.sign(have)).reshape(len(want), -1).any(1)
        steps = int(flipped.argmax()) if flipped.any() else len(want)
        self.notes.append(f"{key}: signs agree for {steps} of {len(want)} steps")

    def _pair(self, key: str, got: Value) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
        want = np.asarray(self.arrays[key], dtype=np.float64)
        have = np.asarray(got.detach() if isinstance(got, Tensor) else got, dtype=np.float64)
        if want.size == have.size == 1:
            have = have.reshape(want.shape)
        assert have.shape == want.shape, f"{key}: got shape {have.shape}, want {want.shape}"
        self.done.add(key)
        return want, have

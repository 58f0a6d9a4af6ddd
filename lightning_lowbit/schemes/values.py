"""A number that a scheme changes in steps over the run: one milestone for each of its values."""

from __future__ import annotations

from collections.abc import Sequence

from lightning_lowbit.modules.base import Milestone, Moment

__all__ = ["Values", "value_milestones"]


def value_milestones(name: str, values: Sequence[int], moments: Sequence[Moment]) -> tuple[Milestone, ...]:
    """``mu[0]=5`` at the first moment and so on: values may come again, so a name says which one of them it is.

    >>> [m.what for m in value_milestones("mu", (5, 4), (0, 0.5))]
    ['mu[0]=5', 'mu[1]=4']
    """
    return tuple(
        Milestone(when, f"{name}[{place}]={value}")
        for place, (value, when) in enumerate(zip(values, moments, strict=False))
    )


class Values:
    """The present one: the last whose moment has come.

    >>> dr = Values("dr", (128, 32))
    >>> dr.follow("dr[0]=128", True), dr.follow("dr[1]=32", True), dr.now, dr.follow("freeze_widths", True)
    (True, True, 32, False)
    """

    def __init__(self, name: str, values: Sequence[int]) -> None:
        self.name, self.first = name, values[0]
        self.reached: dict[int, int] = {}

    @property
    def now(self) -> int:
        return self.reached[max(self.reached)] if self.reached else self.first

    def follow(self, what: str, reached: bool) -> bool:
        """Take in a milestone; False where it is none of these."""
        if not what.startswith(f"{self.name}["):
            return False
        place, value = what.removeprefix(f"{self.name}[").split("]=")
        if reached:
            self.reached[int(place)] = int(value)
        else:
            self.reached.pop(int(place), None)
        return True

"""Exponents on their way between modules, forward and backward: what a carrier's values cannot tell."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

__all__ = ["Link", "Links", "Station"]


@dataclass(eq=False)
class Link:
    """One carrier on its way, for schemes whose exponents change from batch to batch.

    Its producer makes it in forward with ``exponent``; the consumer writes ``err_exponent`` when its backward
    returns the error: int32 0-dim tensors on the device. A Link belongs to one forward: both sides keep it
        for
    their backward, so that a second forward before that backward finds links of its own.

    A tensor that forks gives each reader a branch; the error at the fork is the sum of the branches' errors,
    exact on the finest of their grids (``error_exponent``), and is quantized once by the producer.
    """

    exponent: Tensor
    err_exponent: Tensor | None = None
    branches: list[Link] = field(default_factory=list)

    def branch(self) -> Link:
        self.branches.append(Link(self.exponent))
        return self.branches[-1]

    def error_exponent(self) -> Tensor | None:
        """Exponent of the grid on which the error has come back; None if a reader did not say."""
        if not self.branches:
            return self.err_exponent
        answers = [branch.error_exponent() for branch in self.branches]
        known = [answer for answer in answers if answer is not None]
        return torch.stack(known).amin() if len(known) == len(answers) else None


@dataclass(eq=False)
class Station:
    """Between one producer's call and one reader's: where the link waits."""

    link: Link | None = None


@dataclass(eq=False)
class Links:
    """Where one module's carriers come from and go to, call by call.

    A module called more than once in a forward takes ``calls`` in turn; ``rewind`` begins anew, whenever a
    network that holds the module is entered.

    Attributes:
        calls: per call, the stations of its operands and those of its readers.
        turn: calls since the forward began.
        present: links of the operands of the present call; None for one that comes from float code.
    """

    calls: list[tuple[list[Station | None], list[Station | None]]] = field(default_factory=list)
    turn: int = 0
    present: list[Link | None] = field(default_factory=list)

    def receive(self) -> list[Link | None]:
        """Begin a call: the links of its operands."""
        operands, _ = self.calls[self.turn % len(self.calls)] if self.calls else ([], [])
        self.present = [None if station is None else station.link for station in operands]
        self.turn += 1
        return self.present

    def send(self, link: Link | None) -> None:
        """End a call: hand a branch of ``link`` to every reader of the result; None: it is on no grid."""
        _, readers = self.calls[(self.turn - 1) % len(self.calls)] if self.calls else ([], [])
        for station in readers:
            branch = None if link is None else link.branch()
            if station is not None:  # else a float reader: its error comes back on no grid that we know
                station.link = branch

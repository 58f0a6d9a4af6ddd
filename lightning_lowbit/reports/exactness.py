"""Whether a trained network's evaluation is that of its integer program, tried out, and whether training repeats."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from lightning_lowbit.errors import ConfigError, UnsupportedModelError
from lightning_lowbit.export.lowering import lower
from lightning_lowbit.export.verify import verify
from lightning_lowbit.reports.repeats import differs
from lightning_lowbit.reports.sensitivity import split
from lightning_lowbit.reports.summary import claims, summarize

__all__ = ["Exactness", "exactness"]


@dataclass(frozen=True)
class Exactness:
    """What holds for a network.

    Attributes:
        exact: its program was run, and gave the codes of evaluation from the input to the output.
        why_not: why it did not; "" where it did.
        repeats: training gives the same bits on any machine.
        differs: why it does not; "" where it does.
    """

    exact: bool
    why_not: str
    repeats: bool
    differs: str


def exactness(module: nn.Module, batch: Any) -> Exactness:
    """Lower a converted network, run the program on a batch, and compare every code.

    Args:
        module: trained or calibrated.
        batch: of evaluation: a tensor, or a tuple of the forward's arguments with labels behind them.
    """
    why, floats = _parted(module, batch), differs(module)
    return Exactness(not why, why, not floats, floats)


def _parted(module: nn.Module, batch: Any) -> str:
    """Why program and network are not one; "" where they are."""
    try:
        arguments, _ = split(module, batch, 0)
        certificate = verify(module, lower(module, arguments), [arguments])
    except (ConfigError, UnsupportedModelError) as error:
        claim = claims(module, summarize(module))[0].partition(": ")[2]
        return str(error) if claim.startswith("yes") else claim.removeprefix("no: ")
    if certificate.difference is not None:
        return f"its program differs: {certificate.difference}"
    if not certificate.end_to_end:
        return f"float islands: {', '.join(certificate.islands[:3])}" + ", ..." * (len(certificate.islands) > 3)
    return ""

"""What a scheme does at its defaults, found by converting a small network and exporting it."""

from __future__ import annotations

import importlib
import inspect
import tempfile
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from lightning_lowbit.cli.parser import DEMOS
from lightning_lowbit.errors import ConfigError, UnsupportedModelError
from lightning_lowbit.export.c99 import export_c
from lightning_lowbit.export.lowering import lower
from lightning_lowbit.export.onnx import export_onnx
from lightning_lowbit.modules.base import Scheme, low_bit_modules
from lightning_lowbit.modules.convert import quantizers
from lightning_lowbit.reports.summary import summarize
from lightning_lowbit.schemes import convert

__all__ = ["Measured", "measured"]

UNKNOWN = "?"
ONNX = {"onnx": "integer", "qdq": "qdq", "clip": "clip"}  # words of the command line -> forms
READ = ("input", "output", "operand", "accumulator")


@dataclass(frozen=True)
class Measured:
    """One scheme on the demo network, a residual one: bits of codes, or "float".

    Attributes:
        weights, activations, biases, errors: of its layers; "8" or "6..9".
        norms: "folded" into the layers, bits of their own, or "float".
        update: what moves behind each step, beside or in place of what the user's optimizer does.
        forms: what ``export --to`` writes.
        note: why there is none.
    """

    weights: str = UNKNOWN
    activations: str = UNKNOWN
    biases: str = UNKNOWN
    errors: str = UNKNOWN
    norms: str = UNKNOWN
    update: str = UNKNOWN
    forms: tuple[str, ...] = ()
    note: str = ""


def measured(cls: type[Scheme]) -> Measured:
    """Convert, calibrate and export; nothing of the caller's is touched, its random numbers included."""
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what a scheme thinks of this network
        torch.manual_seed(0)
        net: nn.Module = importlib.import_module(DEMOS).DigitsCnn(channels=8).eval()
        for norm in (module for module in net.modules() if isinstance(module, nn.BatchNorm2d)):
            assert norm.running_var is not None
            nn.init.uniform_(norm.running_var, 0.5, 2)
        try:
            convert(net, cls(), torch.randint(0, 17, (8, 1, 8, 8)) / 16)
        except Exception as error:  # of somebody else's scheme
            return Measured(note=str(error))
        return _measured(net)


def _measured(net: nn.Module) -> Measured:
    rows = [row for row in summarize(net).rows if row.grid is not None]
    norms = {name for name, module in net.named_modules() if isinstance(module, nn.BatchNorm2d)}
    of_norms = [row.total for row in rows if row.site in norms and not row.role.startswith("error")]
    layers = [row for row in rows if row.site not in norms]
    errors = {quantizer.grid().bits for _, quantizer in quantizers(net) if quantizer.site.role == "error"}
    rule = next(module.scheme for _, module in low_bit_modules(net)).update_rule(dict(low_bit_modules(net)))
    forms, note = _forms(net)
    return Measured(
        weights=_span(row.total for row in layers if row.role == "weight"),
        activations=_span(row.total for row in layers if row.role in READ),
        biases=_span(row.total for row in layers if row.role == "bias"),
        errors=_span(errors),
        norms="folded" if any("+bn" in row.pattern for row in layers if row.role == "weight") else _span(of_norms),
        update="the user's optimizer" if rule is None else (inspect.getdoc(type(rule)) or "").partition("\n")[0],
        forms=forms,
        note=note,
    )


def _span(bits: Iterable[int | None]) -> str:
    known = sorted({n for n in bits if n is not None})
    return "float" if not known else str(known[0]) if len(known) == 1 else f"{known[0]}..{known[-1]}"


def _forms(net: nn.Module) -> tuple[tuple[str, ...], str]:
    try:
        program = lower(net)
    except (ConfigError, UnsupportedModelError) as error:
        return (), str(error)
    found = ["program"]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "net")
        for form in (*ONNX, "c"):
            try:
                if form == "c":
                    export_c(program, path)
                else:
                    export_onnx(program, path, ONNX[form])
                found.append(form)
            except UnsupportedModelError:
                continue
            except ConfigError:  # the package onnx is not installed
                found.append(form + UNKNOWN)
    return tuple(found), ""

"""Low-bit networks for PyTorch Lightning: train or fine-tune any LightningModule on a fixed-point grid.

The names of ``__all__`` are loaded when they are first used: importing this package imports neither torch nor
Lightning, so that what needs neither stays light.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from lightning_lowbit.plugins.registration import register_strategies as _register_strategies

if TYPE_CHECKING:
    from lightning_lowbit.callbacks.binary_monitor import BinaryMonitor
    from lightning_lowbit.callbacks.calibrate import Calibrate
    from lightning_lowbit.callbacks.certificate import TrainingCertificate
    from lightning_lowbit.callbacks.distill import Distill
    from lightning_lowbit.callbacks.fold import FoldBatchNorm
    from lightning_lowbit.callbacks.fraclen import FraclenSchedule
    from lightning_lowbit.callbacks.freeze import Freeze
    from lightning_lowbit.callbacks.monitor import QuantMonitor
    from lightning_lowbit.callbacks.quant import QuantCallback
    from lightning_lowbit.export.c99 import export_c
    from lightning_lowbit.export.lowering import lower
    from lightning_lowbit.export.onnx import export_onnx
    from lightning_lowbit.export.packed import pack
    from lightning_lowbit.export.program import IntegerProgram
    from lightning_lowbit.export.verify import verify
    from lightning_lowbit.modules.base import Scheme, float_mode
    from lightning_lowbit.plugins.checkpoint import float_state_dict, save_compact
    from lightning_lowbit.plugins.loading import load_from_checkpoint
    from lightning_lowbit.plugins.precision import LowBitPrecision, lowbit_step
    from lightning_lowbit.plugins.strategy import LowBitDDPStrategy, LowBitStrategy
    from lightning_lowbit.reports.bit_plan import read_plan
    from lightning_lowbit.reports.bit_search import plan_bits
    from lightning_lowbit.reports.html import html_report
    from lightning_lowbit.reports.sensitivity import sensitivity
    from lightning_lowbit.reports.summary import summarize
    from lightning_lowbit.schemes import convert
    from lightning_lowbit.schemes.bnn import Bnn
    from lightning_lowbit.schemes.f8net import F8Net
    from lightning_lowbit.schemes.jacinto import Jacinto
    from lightning_lowbit.schemes.niti import Niti
    from lightning_lowbit.schemes.step_advice import advise_lr
    from lightning_lowbit.schemes.tqt import Tqt
    from lightning_lowbit.schemes.wageubn import Wageubn

__all__ = [
    "BinaryMonitor",
    "Bnn",
    "Calibrate",
    "Distill",
    "F8Net",
    "FoldBatchNorm",
    "FraclenSchedule",
    "Freeze",
    "IntegerProgram",
    "Jacinto",
    "LowBitDDPStrategy",
    "LowBitPrecision",
    "LowBitStrategy",
    "Niti",
    "QuantCallback",
    "QuantMonitor",
    "Scheme",
    "Tqt",
    "TrainingCertificate",
    "Wageubn",
    "advise_lr",
    "convert",
    "export_c",
    "export_onnx",
    "float_mode",
    "float_state_dict",
    "html_report",
    "load_from_checkpoint",
    "lowbit_step",
    "lower",
    "pack",
    "plan_bits",
    "read_plan",
    "save_compact",
    "sensitivity",
    "summarize",
    "verify",
]

# name -> the module that defines it
_HOME = {
    "BinaryMonitor": "callbacks.binary_monitor",
    "Bnn": "schemes.bnn",
    "Calibrate": "callbacks.calibrate",
    "Distill": "callbacks.distill",
    "F8Net": "schemes.f8net",
    "FoldBatchNorm": "callbacks.fold",
    "FraclenSchedule": "callbacks.fraclen",
    "Freeze": "callbacks.freeze",
    "IntegerProgram": "export.program",
    "Jacinto": "schemes.jacinto",
    "LowBitDDPStrategy": "plugins.strategy",
    "LowBitPrecision": "plugins.precision",
    "LowBitStrategy": "plugins.strategy",
    "Niti": "schemes.niti",
    "QuantCallback": "callbacks.quant",
    "QuantMonitor": "callbacks.monitor",
    "Scheme": "modules.base",
    "Tqt": "schemes.tqt",
    "TrainingCertificate": "callbacks.certificate",
    "Wageubn": "schemes.wageubn",
    "advise_lr": "schemes.step_advice",
    "convert": "schemes",
    "export_c": "export.c99",
    "export_onnx": "export.onnx",
    "float_mode": "modules.base",
    "float_state_dict": "plugins.checkpoint",
    "html_report": "reports.html",
    "load_from_checkpoint": "plugins.loading",
    "lowbit_step": "plugins.precision",
    "lower": "export.lowering",
    "pack": "export.packed",
    "plan_bits": "reports.bit_search",
    "read_plan": "reports.bit_plan",
    "save_compact": "plugins.checkpoint",
    "sensitivity": "reports.sensitivity",
    "summarize": "reports.summary",
    "verify": "export.verify",
}


def __getattr__(name: str) -> Any:
    """Import ``name`` from the module that defines it (PEP 562)."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value  # so that the next use does not come here
    _register_strategies()  # this may have been the first import of Lightning
    return value


def __dir__() -> list[str]:
    """The public names, loaded or not, beside what is here already."""
    return sorted({*globals(), *__all__})


_register_strategies()

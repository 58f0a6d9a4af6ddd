"""The strings ``strategy="lowbit"`` and ``"lowbit_ddp"``, known to every Lightning that is imported already.

Imports nothing but the standard library, because importing the package registers them.
"""

from __future__ import annotations

import functools
import importlib
import sys
from typing import Any

__all__ = ["NAMESPACES", "register_strategies"]

NAMESPACES = ("lightning.pytorch", "pytorch_lightning")
_STRINGS = {"lowbit": "low-bit training on one device", "lowbit_ddp": "low-bit training in several processes"}


def register_strategies() -> None:
    """Put the strings into the registry of each namespace in ``sys.modules``; what stands there already stays."""
    for namespace in NAMESPACES:
        # None also where that namespace is being imported at this very moment.
        registry = getattr(sys.modules.get(f"{namespace}.strategies"), "StrategyRegistry", None)
        for name, description in _STRINGS.items():
            if registry is not None and name not in registry:
                registry.register(name, functools.partial(_make, namespace, name), description)


def _make(namespace: str, name: str, **options: Any) -> Any:
    """The strategy itself, whose class costs an import of torch and Lightning, when a Trainer asks for it."""
    strategies = importlib.import_module("lightning_lowbit.plugins.strategy").strategies_of(namespace)
    return {strategy.strategy_name: strategy for strategy in strategies}[name](**options)

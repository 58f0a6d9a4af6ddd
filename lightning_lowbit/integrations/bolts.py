"""Models, callbacks and schedulers of pytorch-lightning-bolts 0.3.2.post1 under Lightning 2.6.

Its wheel installs, and nothing of it imports: it asks pytorch_lightning for names that were removed, and its packages
import everything below them, torchvision's data sets included. Here the names are supplied while an import runs and
taken away behind it, and a package imports what it is asked for.
"""

from __future__ import annotations

import ast
import contextlib
import enum
import functools
import importlib
import sys
from collections.abc import Iterator, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from importlib.metadata import PackageNotFoundError, version
from types import ModuleType
from typing import Any

from lightning_lowbit.errors import ConfigError, nearest
from lightning_lowbit.plugins.patching import Patches

__all__ = ["bolts", "importable_bolts"]

_ROOT = "pl_bolts"
_DISTRIBUTION, _VERSION = "pytorch-lightning-bolts", "0.3.2.post1"
_EXECUTED = "pl_bolts.utils"  # the one package whose __init__ holds more than imports


def bolts(name: str) -> Any:
    """A class, function or module of bolts by its dotted path: ``bolts("models.autoencoders.AE")``.

    Args:
        name: below ``pl_bolts``.
    Raises:
        ConfigError: bolts is not installed, has no such name, or what it names needs something that is missing.
    """
    value: Any
    with importable_bolts():
        value = importlib.import_module(_ROOT)
        path = _ROOT
        for part in name.removeprefix(f"{_ROOT}.").split("."):
            value, path = _member(value, part, path), f"{path}.{part}"
    return value


@contextlib.contextmanager
def importable_bolts() -> Iterator[None]:
    """Inside it, import statements find bolts: ``from pl_bolts.models.autoencoders import AE``.

    What was imported stays imported; pytorch_lightning is left as it was.

    Raises:
        ConfigError: bolts is not installed, or in another version.
    """
    _check_installed()
    patches, finder = Patches(), _Finder()
    modules = dict(_supplied(patches))
    sys.modules.update(modules)
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
        for added in modules:
            sys.modules.pop(added, None)
        patches.undo()


def _check_installed() -> None:
    try:
        found = version(_DISTRIBUTION)
    except PackageNotFoundError:
        found = "none"
    if found != _VERSION:
        raise ConfigError(
            f"bolts: got {_DISTRIBUTION} {found}, expected {_VERSION}. Install the extra: "
            "pip install 'lightning-lowbit[bolts]' (lightning-bolts 0.4 to 0.7 refuse Lightning 2)."
        )


def _supplied(patches: Patches) -> Iterator[tuple[str, ModuleType]]:
    """Put removed names into pytorch_lightning where they are missing; removed modules are left to the caller."""
    from lightning_utilities.core.apply_func import apply_to_collection
    from lightning_utilities.core.imports import module_available
    from pytorch_lightning import LightningModule, core, loggers, utilities

    names: list[tuple[ModuleType, str, Any]] = [
        (loggers, "LightningLoggerBase", loggers.Logger),
        (utilities, "_module_available", module_available),
        (utilities, "AMPType", enum.Enum("AMPType", "NATIVE APEX")),
    ]
    for target, name, value in names:
        if not hasattr(target, name):
            patches.set(target, name, value)
    modules: list[tuple[ModuleType, str, str, Any]] = [
        (core, "lightning", "LightningModule", LightningModule),
        (utilities, "apply_func", "apply_to_collection", apply_to_collection),
    ]
    for parent, leaf, name, value in modules:
        dotted = f"{parent.__name__}.{leaf}"
        if dotted not in sys.modules:
            module = ModuleType(dotted)
            setattr(module, name, value)
            patches.set(parent, leaf, module)
            yield dotted, module


def _member(owner: Any, name: str, path: str) -> Any:
    """``owner.name``, a submodule that nobody has imported yet included."""
    try:
        if hasattr(owner, name) or not isinstance(owner, ModuleType):
            return getattr(owner, name)
        return importlib.import_module(f"{path}.{name}")
    except ImportError as error:
        if getattr(error, "name", None) != f"{path}.{name}":
            raise ConfigError(
                f"bolts: {path}.{name} cannot be imported here ({error}). Import what works without that; "
                "docs/bolts.md lists it."
            ) from error
    except AttributeError:
        pass
    known = (n for n in dir(owner) if not n.startswith("_")) if isinstance(owner, ModuleType) else ()
    raise ConfigError(f"bolts: {path} has no {name!r}.{nearest(name, known) if known else ''}")


class _Finder(MetaPathFinder):
    """Finds the modules of bolts as everybody does, and loads them in its own way."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        spec = PathFinder.find_spec(fullname, path) if fullname.partition(".")[0] == _ROOT else None
        if spec is not None and spec.origin is not None:
            spec.loader = _Loader(fullname, spec.origin)
        return spec


class _Loader(SourceFileLoader):
    """Runs a module; of a package it only reads which name comes from where."""

    def exec_module(self, module: ModuleType) -> None:
        if hasattr(module, "__path__") and module.__name__ != _EXECUTED:
            _make_lazy(module, ast.parse(self.get_data(self.path)))
            return
        super().exec_module(module)
        for value in vars(module).values():
            # Lightning 2.0 calls no on_epoch_end any more: without this the callback would do nothing, quietly.
            if isinstance(value, type) and "on_epoch_end" in vars(value) and "on_train_epoch_end" not in vars(value):
                value.on_train_epoch_end = value.on_epoch_end  # type: ignore[attr-defined]  # it was looked up above


def _make_lazy(package: ModuleType, source: ast.Module) -> None:
    """Give a package its literals, and a way to import each name when somebody asks for it (PEP 562)."""
    sources: dict[str, tuple[str, str]] = {}
    for node in source.body:
        if isinstance(node, ast.ImportFrom) and node.module is not None:
            sources.update({alias.asname or alias.name: (node.module, alias.name) for alias in node.names})
        elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            with contextlib.suppress(ValueError):  # computed: nothing outside these files reads those
                setattr(package, node.targets[0].id, ast.literal_eval(node.value))

    def get(name: str) -> Any:
        if name not in sources:
            raise AttributeError(f"module {package.__name__!r} has no attribute {name!r}")
        home, original = sources[name]
        with importable_bolts():
            if home == package.__name__:
                return importlib.import_module(f"{home}.{original}")
            value = getattr(importlib.import_module(home), original)
        setattr(package, name, value)
        return value

    package.__dict__.update(__getattr__=get, __dir__=functools.partial(_names, package, sources))


def _names(package: ModuleType, sources: dict[str, tuple[str, str]]) -> list[str]:
    return sorted({*vars(package), *sources})

"""The registry: scheme names to classes, found in this folder and in the entry points of installed packages."""

from __future__ import annotations

import dataclasses
import importlib
import pkgutil
from collections.abc import Sequence
from importlib.metadata import entry_points
from typing import Any

from torch import nn

from lightning_lowbit.errors import ConfigError, nearest
from lightning_lowbit.modules.base import Scheme
from lightning_lowbit.modules.convert import Pattern, Report, Selection, convert_module

__all__ = ["convert", "find", "registry", "require_usable", "resolve"]

GROUP = "lightning_lowbit.schemes"


def registry() -> dict[str, type[Scheme]]:
    """All schemes by name: modules of this folder, then installed entry points (which cannot replace a built-in)."""
    found = _built_in()
    for entry in entry_points(group=GROUP):
        if entry.name not in found:
            found[entry.name] = entry.load()
    return found


def _built_in() -> dict[str, type[Scheme]]:
    found: dict[str, type[Scheme]] = {}
    for module in pkgutil.iter_modules(__path__):
        loaded = importlib.import_module(f"{__name__}.{module.name}")
        for value in vars(loaded).values():
            if (
                isinstance(value, type)
                and issubclass(value, Scheme)
                and value.name
                and value.__module__ == loaded.__name__
            ):
                found[value.name] = value
    return found


def find(name: str) -> type[Scheme]:
    """The scheme called ``name``: built-in, entry point, or the name of a Scheme class that is imported already.

    Names that come from files are looked up here and nowhere else; nothing is imported by path.
    """
    built_in = _built_in()
    if name in built_in:  # without looking at entry points: somebody's broken one is not in the way
        return built_in[name]
    known = registry()
    if name in known:
        return known[name]
    for cls in _subclasses(Scheme):
        if name in (cls.name, f"{cls.__module__}.{cls.__qualname__}"):
            return cls
    raise ConfigError(
        f"scheme: no scheme is called {name!r}.{nearest(name, known)} A scheme of your own is imported first: at the "
        "command line, --quant.scheme my_module.MyScheme."
    )


def resolve(scheme: Scheme | str, **options: Any) -> Scheme:
    """An instance from a name and options, or from an instance and changes to it.

    Raises:
        ConfigError: unknown name or option, with the nearest valid one; a class that cannot be used as it is.
    """
    if isinstance(scheme, str):
        cls = find(scheme)
        require_usable(cls)
        _check_options(cls, options)
        return cls(**options)
    if isinstance(scheme, type) and issubclass(scheme, Scheme):
        require_usable(scheme)
        _check_options(scheme, options)
        return scheme(**options)
    if not isinstance(scheme, Scheme):
        raise ConfigError(
            f"scheme: got {scheme!r}, expected a name such as 'tqt' or a Scheme instance.{nearest('', registry())}"
        )
    require_usable(type(scheme))
    _check_options(type(scheme), options)
    return scheme.replace(**options) if options else scheme


def convert(
    module: nn.Module,
    scheme: Scheme | str = "tqt",
    example_input: Any = None,
    *,
    skip: Pattern | Sequence[Pattern] = (),
    include: Pattern | Sequence[Pattern] | None = None,
    **options: Any,
) -> Report:
    """Convert ``module`` in place, without a Trainer: for evaluation, calibration and export.

    Args:
        module: any module.
        scheme: name or instance; ``options`` are its fields, e.g. ``convert(net, "tqt", bits=4)``.
        example_input: a batch, or a tuple of forward's arguments; quantizers are calibrated on it. None leaves
            them open, and the network float until it is calibrated.
        skip, include: module-path globs or layer classes.
    Returns:
        what was converted and what was not.
    Raises:
        ConfigError, UnsupportedModelError: by module path, with the next step.
    """
    from lightning_lowbit.modules.calibrate import calibrate

    chosen = resolve(scheme, **options).adapted_to(module, pretrained=False)
    result = convert_module(module, chosen, Selection.of(skip, include))
    if example_input is not None:
        arguments = example_input if isinstance(example_input, tuple) else (example_input,)

        def run() -> int:
            module(*arguments)
            return 1

        calibrate(module, run)
    return result


def require_usable(cls: type[Scheme]) -> None:
    """ConfigError where a scheme's class is no dataclass, or has the name of another, as which its checkpoints load."""
    if cls in _built_in().values():
        return
    own = f"{cls.__module__}.{cls.__qualname__}"
    if not hasattr(cls, "__dataclass_fields__"):
        raise ConfigError(
            f"scheme: {own} is no dataclass, expected one: its fields are the options, and what a checkpoint keeps. "
            f"Write @dataclass(frozen=True) above class {cls.__name__}."
        )
    other = _named(cls.name, but=cls)
    if other is not None:
        inherited = "inherits" if "name" not in vars(cls) else "has"
        raise ConfigError(
            f"scheme: {own} {inherited} the name {cls.name!r}, taken by {other}, as which its checkpoints would load. "
            f'Give it a name of its own, as in name: ClassVar[str] = "{cls.__name__.lower()}".'
        )


def _named(name: str, but: type[Scheme]) -> str | None:
    """The class path of the built-in or installed scheme called ``name``, if that is another one.

    Classes that are merely imported do not count: a notebook, or a second import under another module's name, makes
    the same class anew.
    """
    installed = [entry.load() for entry in entry_points(group=GROUP, name=name)] if name else []
    known = [*(cls for cls in _built_in().values() if cls.name == name), *installed]
    paths = [f"{cls.__module__}.{cls.__qualname__}" for cls in known]
    return next((path for path in paths if path != f"{but.__module__}.{but.__qualname__}"), None)


def _check_options(cls: type[Scheme], options: dict[str, Any]) -> None:
    known: list[str] = [f.name for f in dataclasses.fields(cls)] if dataclasses.is_dataclass(cls) else []
    for option in options:
        if option not in known:
            raise ConfigError(f"{cls.__name__} has no option {option!r}.{nearest(option, known)}")


def _subclasses(cls: type[Scheme]) -> list[type[Scheme]]:
    return [found for sub in cls.__subclasses__() for found in (sub, *_subclasses(sub))]

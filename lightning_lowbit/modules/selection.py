"""Which layers are converted: the user's patterns, and what can be converted at all."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.parametrize import is_parametrized
from torch.nn.utils.prune import BasePruningMethod

from lightning_lowbit.errors import ConfigError, UnsupportedModelError, nearest
from lightning_lowbit.graph.ops import COMPUTE, FLOAT_BY_NATURE
from lightning_lowbit.graph.plan import Site
from lightning_lowbit.modules.answers import norm_word
from lightning_lowbit.modules.base import Scheme
from lightning_lowbit.modules.layers import LowBitLayer
from lightning_lowbit.modules.norm import NORMS

__all__ = [
    "BY_USER",
    "Pattern",
    "Selection",
    "check_layers",
    "check_patterns",
    "float_by_nature",
    "left_out",
    "norms_to_keep",
    "wanted_layers",
]

Pattern = str | type[nn.Module]
BY_USER = ("by skip=", "not in include=")
"""Reasons why a layer stays float that go with the selection, not with the layer or the scheme."""


@dataclass(frozen=True)
class Selection:
    """Which layers the user wants converted: module-path globs or layer classes.

    ``include`` narrows what is converted; ``skip`` wins over it and also accepts a refusal that names a path.
    """

    skip: Sequence[Pattern] = ()
    include: Sequence[Pattern] | None = None

    @classmethod
    def of(cls, skip: Pattern | Sequence[Pattern], include: Pattern | Sequence[Pattern] | None) -> Selection:
        """From what a user writes: one pattern stands for a list of one."""
        return cls(_patterns(skip), None if include is None else _patterns(include))

    def skips(self, path: str, module: nn.Module) -> bool:
        return _matches(self.skip, path, module)

    def wants(self, path: str, module: nn.Module) -> bool:
        return not self.skips(path, module) and (self.include is None or _matches(self.include, path, module))


def _patterns(given: Pattern | Sequence[Pattern]) -> tuple[Pattern, ...]:
    return (given,) if isinstance(given, (str, type)) else tuple(given)


def _matches(patterns: Iterable[Pattern], path: str, module: nn.Module) -> bool:
    for pattern in patterns:
        if isinstance(pattern, str):
            parts = path.split(".")  # a pattern that names a container takes all that it holds
            if any(fnmatch.fnmatchcase(".".join(parts[: n + 1]), pattern) for n in range(len(parts))):
                return True
        elif isinstance(module, pattern):
            return True
    return False


def check_patterns(root: nn.Module, selection: Selection) -> None:
    """ConfigError for a pattern that matches nothing."""
    paths = dict(root.named_modules())
    for name, patterns in (("skip", selection.skip), ("include", selection.include or ())):
        for pattern in patterns:
            if not any(_matches([pattern], path, module) for path, module in paths.items() if path):
                known = nearest(pattern, paths) if isinstance(pattern, str) else ""
                raise ConfigError(f"{name}: {pattern!r} matches no module of {type(root).__name__}.{known}")


def check_layers(root: nn.Module, selection: Selection) -> None:
    """UnsupportedModelError for a layer whose weights would be read past our modules."""
    for path, module in root.named_modules():
        if isinstance(module, nn.MultiheadAttention) and selection.wants(path, module):
            raise UnsupportedModelError(
                f"{path}: nn.MultiheadAttention multiplies with its projections' weights without calling "
                f"them, so they would stay float unseen. Accept that with skip=['{path}'] (what stands "
                "around it is converted), or use an attention written with nn.Linear layers."
            )


def wanted_layers(root: nn.Module, skipped: dict[str, str]) -> set[str]:
    """Paths of the layers to convert, all but ``skipped``; ConfigError if there is none."""
    layers = [path for path, module in root.named_modules() if type(module) in COMPUTE]
    if "" in layers:
        raise ConfigError(
            f"{type(root).__name__}: the module itself is one layer, which cannot be replaced in place. Put "
            "it in a container, e.g. nn.Sequential(layer)."
        )
    wanted = {path for path in layers if path not in skipped}
    if not wanted:
        lazy = any(isinstance(m, nn.modules.lazy.LazyModuleMixin) for m in root.modules())
        found = f"{len(layers)} layers ({_count(skipped[path] for path in layers)})" if layers else "none of them"
        raise ConfigError(
            f"{type(root).__name__}: nothing to convert. Expected nn.Linear, nn.Conv1d/2d/3d or "
            f"nn.ConvTranspose1d/2d/3d, found {found}."
            + (" Lazy layers have no weights yet: run one batch first." if lazy else "")
        )
    return wanted


def _count(reasons: Iterable[str]) -> str:
    reasons = list(reasons)
    return ", ".join(f"{reasons.count(reason)} {reason}" for reason in dict.fromkeys(reasons))


def left_out(
    root: nn.Module, selection: Selection, scheme: Scheme, ends: dict[str, tuple[bool, bool]]
) -> dict[str, str]:
    """Layers that multiply and are not converted: path -> reason; ``ends`` as in graph.network."""
    found: dict[str, str] = {}
    module: nn.Module
    for path, module in root.named_modules():
        if not isinstance(module, tuple(COMPUTE)) or isinstance(module, LowBitLayer):
            continue
        if selection.skips(path, module):
            found[path] = BY_USER[0]
        elif is_parametrized(module) or ("weight" not in module._parameters and not _pruned(module)):
            found[path] = "its weight is computed (weight_norm, spectral_norm or a parametrization)"
        elif isinstance(module, nn.modules.lazy.LazyModuleMixin):
            found[path] = "lazy, it has no weights yet: run one batch before converting"
        elif type(module) not in COMPUTE:
            found[path] = f"{type(module).__qualname__} is a subclass of a torch layer with code of its own"
        elif not selection.wants(path, module):
            found[path] = BY_USER[1]
        elif (reason := scheme.leaves_float(_weight_site(path, module, ends), module)) is not None:
            found[path] = reason
    return found


def _weight_site(path: str, module: nn.Module, ends: dict[str, tuple[bool, bool]]) -> Site:
    first, last = ends.get(path, (False, False))
    depthwise = 1 < getattr(module, "groups", 1) == getattr(module, "in_channels", 0)
    return Site(path, "weight", COMPUTE[type(module)], "", True, first, last, depthwise, slot="lowbit_weight")


def _pruned(module: nn.Module) -> bool:
    """Whether torch.nn.utils.prune masks the weight: a constant factor, it stays one tensor with one grid."""
    return any(isinstance(hook, BasePruningMethod) for hook in module._forward_pre_hooks.values())


def float_by_nature(root: nn.Module) -> dict[str, list[str]]:
    """Layers whose values are no sums of products on a grid: class name -> paths."""
    found: dict[str, list[str]] = {}
    for path, module in root.named_modules():
        if isinstance(module, FLOAT_BY_NATURE):
            found.setdefault(type(module).__name__, []).append(path)
    return found


def norms_to_keep(root: nn.Module, scheme: Scheme) -> tuple[set[str], set[str]]:
    """Paths of batch norms that must not be folded (by the scheme, or for want of moving statistics), and of islands.

    Some may be both foldable and islands: those become islands where no layer stands directly before them.
    """
    kept, islands = set(), set()
    for path, module in root.named_modules():
        if isinstance(module, _BatchNorm):
            known = type(module) in NORMS and (scheme.runs_norms or not isinstance(module, nn.SyncBatchNorm))
            foldable = known and module.track_running_stats and module.running_mean is not None
            answer = norm_word(scheme, path, module)
            if not foldable or answer not in ("fold", "fold_or_island"):
                kept.add(path)
            if known and answer in ("island", "fold_or_island"):
                islands.add(path)
    return kept, islands

"""What a scheme answers, checked where it is taken: its words, its quantizers, and the grids that they declare."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lowbit.errors import ConfigError, nearest
from lightning_lowbit.graph.plan import Site
from lightning_lowbit.modules.base import Mode, Scheme, low_bit_modules, mode, switch_of
from lightning_lowbit.modules.layers import LowBitLayer
from lightning_lowbit.modules.quantizer import Quantizer
from lightning_lowbit.numerics.grid import Grid

__all__ = ["check_grids", "checked_quantizer", "first_tensors", "norm_word"]

NORM_WORDS = ("keep", "fold", "quantize", "island", "fold_or_island")
MOST = 2**16  # values of one tensor that are held against a grid: a wrong one is no rare one
SEEN = ("input", "output", "operand")
_OURS = "lightning_lowbit.schemes."

Sample = tuple[Tensor, bool]
"""The first sample that came to a quantizer in calibration, and whether that rectifies it."""


def norm_word(scheme: Scheme, path: str, norm: nn.Module) -> str:
    """What ``scheme`` says of a batch norm; ConfigError where that is no word of ``Scheme.batch_norm``."""
    word: Any = scheme.batch_norm(Site(path, "output", "batch_norm"), norm)
    if word not in NORM_WORDS:
        raise ConfigError(
            f"{path}: {type(scheme).__name__}.batch_norm() gives {word!r}, expected one of its words."
            f"{nearest(str(word), NORM_WORDS)}"
        )
    return str(word)


def checked_quantizer(scheme: Scheme, site: Site) -> Quantizer | None:
    """What ``scheme`` gives for one tensor; ConfigError where that is neither None nor a whole ``Quantizer``."""
    given: Any = scheme.quantizer(site)
    if given is None:
        return None
    asked = f"{site.key}: {type(scheme).__name__}.quantizer() gives"
    if not isinstance(given, Quantizer):
        got = f"the class {given.__name__}" if isinstance(given, type) else f"{given!r} ({type(given).__name__})"
        raise ConfigError(f"{asked} {got}, expected a Quantizer for this site, or None to leave the tensor float.")
    kind = type(given)
    names = ("quantize", "exponent", "grid") if given.has_exponent else ("quantize", "grid")
    missing = [f"{name}()" for name in names if getattr(kind, name) is getattr(Quantizer, name)]
    if missing and given.has_grid:
        raise ConfigError(
            f"{asked} a {kind.__name__}, which has no {' and no '.join(missing)}. Write it: values of quantize() "
            "lie on grid(), whose step is 2 ** exponent()."
        )
    return given


@contextmanager
def first_tensors(root: nn.Module) -> Iterator[dict[Quantizer, Sample]]:
    """Keep the first sample that comes to each quantizer that `check_grids` looks at; training has no such hooks."""
    found: dict[Quantizer, Sample] = {}

    def keep(quantizer: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        x = args[0] if args else kwargs.get("x")
        if quantizer not in found and type(x) is Tensor and x.is_floating_point() and x.numel():
            rectify = bool(args[1] if len(args) > 1 else kwargs.get("rectify", False))
            found[quantizer] = (x[:1] if x.dim() else x).detach().clone(), rectify

    scheme = _scheme(root)
    looked_at = not (_ours(scheme) or scheme.carries_errors)
    watched = [q for q in root.modules() if looked_at and isinstance(q, Quantizer) and q.site.role in SEEN]
    hooks = [quantizer.register_forward_hook(keep, with_kwargs=True) for quantizer in watched]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def check_grids(root: nn.Module, seen: dict[Quantizer, Sample]) -> None:
    """Hold values of ``quantize`` against the grid that is declared for them: weights, and ``seen`` of calibration.

    Everything behind this believes ``grid()``: the report, sums that are exact, integers. Called behind calibration,
    in evaluation mode. Schemes of this package are left out: golden vectors and `verify` hold them to their grids, and
    some have modes that clip and do not round. Grids whose steps are no powers of two are not looked at, nor are
    tensors of integer schemes, which take their exponents from the batch.

    Raises:
        ConfigError: another shape, or values off the grid; by site and class.
    """
    scheme = _scheme(root)
    if _ours(scheme):
        return
    with mode([switch_of(root)], Mode.LOWBIT):
        for module in root.modules():
            if not isinstance(module, LowBitLayer):
                continue
            weight = module.lowbit_weight
            if isinstance(weight, Quantizer) and weight.ready:
                _check(module.scheme, weight, module.in_evaluation()[0].detach(), False)
        for quantizer, (x, rectify) in seen.items():
            if quantizer.ready:
                _check(scheme, quantizer, x, rectify)


def _scheme(root: nn.Module) -> Scheme:
    return next(module.scheme for _, module in low_bit_modules(root))


def _ours(scheme: Scheme) -> bool:
    return type(scheme).__module__.startswith(_OURS)


def _check(scheme: Scheme, quantizer: Quantizer, x: Tensor, rectify: bool) -> None:
    values: Any = quantizer.quantize(x, rectify)
    name = f"{quantizer.site.key}: {type(quantizer).__name__}"
    if not isinstance(values, Tensor) or values.shape != x.shape:
        got = list(values.shape) if isinstance(values, Tensor) else type(values).__name__
        raise ConfigError(
            f"{name}.quantize() of {type(scheme).__name__} gives {got} for a tensor of shape {list(x.shape)}. Expected "
            "the same shape: every value in its place, moved onto the grid."
        )
    if not quantizer.has_grid:
        return
    grid = quantizer.grid()
    if not isinstance(grid, Grid):
        raise ConfigError(f"{name}.grid() of {type(scheme).__name__} gives {grid!r}, expected a Grid.")
    if grid.axis is None:
        values = values.reshape(-1)[:MOST]
    elif values.shape[grid.axis] != len(grid.steps):  # a transposed layer in groups: its outputs are on no axis alone
        return
    if grid.exponent is None or grid.contains(values):
        return
    example = ""
    if grid.axis is None:
        value = next(v for v in values.unique() if not grid.contains(v))
        example = f", {value.item():.6g} for one"
    raise ConfigError(
        f"{name}.quantize() gives values that are not on {grid}, which its grid() declares{example}: quantize() and "
        f"grid() of {type(scheme).__name__} disagree. Values are codes of the grid times its power of two; declare "
        "the grid that they lie on, or clip and round to this one."
    )

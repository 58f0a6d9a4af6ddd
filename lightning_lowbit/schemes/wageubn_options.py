"""WAGEUBN's options: what presets set (the paper, its authors' code, the package of that name), and what may be set."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from lightning_lowbit.errors import ConfigError, nearest
from lightning_lowbit.modules.moments import check_moment
from lightning_lowbit.numerics.normalize_format import OFF
from lightning_lowbit.schemes.options import (
    check_bits,
    check_choice,
    check_flags,
    check_number,
    check_whole,
    each_override,
)

if TYPE_CHECKING:
    from lightning_lowbit.schemes.wageubn import Wageubn

__all__ = ["DEFAULTS", "PRESETS", "check_options", "settings_of"]

OVERRIDABLE = ("weight_bits", "act_bits", "act_format")

DEFAULTS: dict[str, Any] = {
    "weight_bits": 8,
    "act_bits": 8,
    "act_format": "fixed_width",
    "io": "outputs",
    "weight_range": "auto",
    "e1": "shift8",
    "e2": "flag8",
    "clip_to_one": False,
    "xhat_bits": 16,
    "running_bits": 16,
    "bias_bits": 16,
    "gradients": True,
    "update": "integer",
    "clip_stored": True,
    "dr": (128,),
    "dr_at": (0,),
    "first_last": "float",
}
"""Options that presets set, as they are without one."""

_PAPER: dict[str, Any] = {"act_format": "fixed_unit", "weight_range": "one", "bias_bits": 8}

PRESETS: dict[str, dict[str, Any]] = {
    "recommended": {},
    "paper": _PAPER,
    "authors": {
        **_PAPER, "clip_to_one": True, "xhat_bits": 8, "io": "none", "running_bits": 32, "norm_momentum": 0.003,
        "momentum": 0.25, "clip_stored": False, "dr": (128, 128, 32, 8, 2), "dr_at": (0, 0.3, 0.6, 0.8, 0.9),
    },
    "pypi": {
        "io": "strict", "weight_range": "one", "bias_bits": 8, "e1": "off", "e2": "off", "gradients": False,
        "update": "float", "first_last": "int8",
    },
}  # fmt: skip


def settings_of(preset: str) -> dict[str, Any]:
    """The options that a preset sets; ConfigError for a name that is none."""
    if preset not in PRESETS:
        raise ConfigError(f"Wageubn(preset={preset!r}): no such preset.{nearest(str(preset), PRESETS)}")
    return PRESETS[preset]


def check_options(scheme: Wageubn) -> None:
    """ConfigError for a value that an option cannot have, with the option, what it got and what it expected."""
    cls = type(scheme)
    for option in ("weight_bits", "act_bits", "bias_bits"):
        check_bits(cls, option, getattr(scheme, option))
    for option in (
        "act_format", "act_init", "io", "weight_range", "update", "rounding", "first_last", "backend",
    ):  # fmt: skip
        check_choice(cls, option, getattr(scheme, option))
    check_flags(scheme, "clip_to_one", "sync_range", "norms", "exact", "gradients", "clip_stored", "check")
    check_number(cls, "percentile", scheme.percentile, 0.001, 100)
    check_number(cls, "width_share", scheme.width_share, 0, 0.5)
    check_number(cls, "lr_scale", scheme.lr_scale, 2.0**-16, 2.0**16)
    check_whole(cls, "width_patience", scheme.width_patience, 1, 10**9)
    check_whole(cls, "seed", scheme.seed, 0, 2**63 - 1)
    for option in ("momentum", "norm_momentum"):
        if getattr(scheme, option) is not None:
            check_number(cls, option, getattr(scheme, option), 0, 0.999)
    _check_stages(scheme)
    for option in ("mean", "deviation", "xhat", "gamma", "beta", "running"):
        bits = getattr(scheme, f"{option}_bits")
        if type(bits) is not int or not (2 <= bits <= 24 or bits == OFF):
            raise ConfigError(f"Wageubn({option}_bits={bits!r}): expected an integer from 2 to 24, or 32 for none.")
    e1, _ = scheme.error_form("e1"), scheme.error_form("e2")
    if scheme.clip_to_one and (e1 is None or e1.kind != "shift"):
        raise ConfigError(f"Wageubn(clip_to_one=True, e1={scheme.e1!r}): it is of a 'shift' e1. Leave it out.")
    _check_update(scheme)
    for pattern, option, value in each_override(cls, scheme.overrides, OVERRIDABLE):
        if option == "act_format":
            _check_format(f"Wageubn(overrides[{pattern!r}].act_format={value!r})", value)
        else:
            check_bits(cls, f"overrides[{pattern!r}].{option}", value)


def _check_stages(scheme: Wageubn) -> None:
    check_moment("Wageubn: freeze_widths", scheme.freeze_widths)
    for event, instead in (
        ("quantize_norms", "norms=False"), ("quantize_errors", "e1='off' and e2='off'"),
        ("quantize_gradients", "update='float' and gradients=False"),
    ):  # fmt: skip
        if getattr(scheme, event) is None:
            raise ConfigError(f"Wageubn({event}=None): expected a moment, 0 for at once; for never take {instead}.")
        check_moment(f"Wageubn: {event}", getattr(scheme, event))


def _check_update(scheme: Wageubn) -> None:
    try:
        scheme.update_format  # noqa: B018  # refuses widths
    except ConfigError as error:
        names = "gradient_bits, momentum_bits, accumulator_bits, lr_bits, stored_bits"
        raise ConfigError(f"Wageubn({names}): {error}") from error
    check_whole(type(scheme), "stored_bits", scheme.stored_bits, 16, 28)  # leaves room for parameters up to 8
    assert scheme.dr is not None
    assert scheme.dr_at is not None
    if not scheme.dr or any(
        type(value) is not int or not 2 <= value <= 2**15 or value & (value - 1) for value in scheme.dr
    ):
        raise ConfigError(f"Wageubn(dr={scheme.dr!r}): expected powers of two from 2 to 2^15.")
    for moment in scheme.dr_at:
        check_moment("Wageubn: dr_at", moment)
    if len(scheme.dr) != len(scheme.dr_at):
        raise ConfigError(
            f"Wageubn(dr={scheme.dr!r}, dr_at={scheme.dr_at!r}): {len(scheme.dr)} values and {len(scheme.dr_at)} "
            "moments. Give a moment for each value of dr."
        )
    if scheme.update == "integer" and not scheme.gradients:
        raise ConfigError(
            "Wageubn(update='integer', gradients=False): the integer update is of quantized gradients. Take "
            "update='fake' or 'float', or gradients=True."
        )


def _check_format(where: str, value: Any) -> None:
    """Refuse what is no policy and no (total, integer) bits."""
    if value in ("fixed_width", "fixed_unit"):
        return
    pair = isinstance(value, Sequence) and not isinstance(value, str) and len(value) == 2
    if not pair or not (type(value[0]) is type(value[1]) is int and 2 <= value[0] <= 16 and abs(value[1]) <= 32):
        raise ConfigError(
            f"{where}: expected 'fixed_width', 'fixed_unit' or a pair of total (2 to 16) and integer bits (-32 to 32)."
        )

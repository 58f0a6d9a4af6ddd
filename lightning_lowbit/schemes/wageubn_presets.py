"""What WAGEUBN's presets set: the paper, its authors' code, the package of that name."""

from __future__ import annotations

from typing import Any

from lightning_lowbit.errors import ConfigError, nearest

__all__ = ["DEFAULTS", "PRESETS", "settings_of"]

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

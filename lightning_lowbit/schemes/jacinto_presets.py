"""Names of whole settings: the published scheme, its calibration styles, and the formats of TI's later tools."""

from __future__ import annotations

import re
from typing import Any

from lightning_lowbit.errors import ConfigError, nearest

__all__ = ["DEFAULTS", "PRESETS", "settings_of"]

DEFAULTS: dict[str, Any] = {
    "weight_bits": 8, "act_bits": 8, "power2": True, "symmetric": True, "per_channel": "none", "range_shrink": 0.01,
    "constrain_weights": True, "snap_weights_at_start": False, "bias": "int32", "bias_calibration": 0.0,
    "avgpool": "exact", "dead_channels": "constant", "freeze_batch_norm": 0.75, "freeze_ranges": 0.8,
}  # fmt: skip
"""What a preset may set and leaves alone where it is not named."""

PRESETS: dict[str, dict[str, Any]] = {
    "recommended": {},
    "reference": {
        "bias": "tidl", "snap_weights_at_start": True, "avgpool": "float", "dead_channels": "merge",
        "freeze_batch_norm": "half-1", "freeze_ranges": "half+1",
    },
    "simple": {"range_shrink": 0.0, "constrain_weights": False},
    "advanced": {"bias_calibration": 0.05},
}  # fmt: skip
"""The published training scheme, and its two styles of calibration without training."""

_FORMAT = re.compile(
    r"(?P<plain>MSA_)?W(?P<channels>[CT])(?P<weight_bits>\d+)(?P<weight>SYM)?(?P<weight_power2>P2)?(?:M(?P<cap>\d+))?"
    r"_AT(?P<act_bits>\d+)(?P<symmetric>SYM)?(?P<act_power2>P2)?(?:R(?P<range>\d+))?"
)


def settings_of(preset: str) -> dict[str, Any]:
    """The options that a preset stands for.

    Beside ``PRESETS``, formats: W (weights) with C or T, a scale per channel or per tensor, and bits; A (activations)
    with T and bits; SYM without zero point, P2 on powers of two; M4 weights up to 4, R4 activations up to 4; MSA_ in
    front drops no tails of ranges. Weights never have a zero point.

    Raises:
        ConfigError: no preset, and no format, or one that mixes powers of two with others.

    >>> settings_of("WT8SYMP2_AT8SYMP2") == {
    ...     "per_channel": "none", "weight_bits": 8, "act_bits": 8, "power2": True, "symmetric": True}
    True
    >>> settings = settings_of("MSA_WC4M4_AT8R4")
    >>> [settings[option] for option in ("weight_bits", "per_channel", "weight_cap", "act_range", "range_shrink")]
    [4, 'all', 4.0, 4.0, 0.0]
    """
    if preset in PRESETS:
        return dict(PRESETS[preset])
    found = _FORMAT.fullmatch(str(preset))
    if found is None:
        raise ConfigError(
            f"Jacinto(preset={preset!r}): expected a preset, or a format such as 'WT8SYMP2_AT8SYMP2', 'WC8_AT8', "
            f"'WC4_AT8', 'WC4M4_AT8'.{nearest(str(preset), PRESETS)}"
        )
    if (found["weight_power2"] is None) != (found["act_power2"] is None):
        raise ConfigError(
            f"Jacinto(preset={preset!r}): weights and activations are both on powers of two or both not, expected P2 "
            "on both sides of the underscore or on neither."
        )
    settings: dict[str, Any] = {
        "per_channel": "all" if found["channels"] == "C" else "none",
        "weight_bits": int(found["weight_bits"]),
        "act_bits": int(found["act_bits"]),
        "power2": found["act_power2"] is not None,
        "symmetric": found["symmetric"] is not None,
    }
    if found["cap"] is not None:
        settings["weight_cap"] = float(found["cap"])
    if found["range"] is not None:
        settings["act_range"] = float(found["range"])
    if found["plain"] is not None:
        settings["range_shrink"] = 0.0
    return settings

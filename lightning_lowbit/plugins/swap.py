"""The swap: a module's layers made low-bit under the scheme in force, however often asked."""

from __future__ import annotations

from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_warn
from torch import nn

from lightning_lowbit.errors import ConfigError
from lightning_lowbit.graph.ops import COMPUTE
from lightning_lowbit.modules.base import Scheme, low_bit_modules, switch_of
from lightning_lowbit.modules.convert import Selection, convert_module, is_converted
from lightning_lowbit.modules.revert import revert
from lightning_lowbit.modules.selection import BY_USER
from lightning_lowbit.plugins.checkpoint import difference

__all__ = ["has_layers", "swap", "swap_for_checkpoint"]


def has_layers(module: nn.Module) -> bool:
    """Whether there is anything to convert yet."""
    return any(type(m) in COMPUTE for m in module.modules())


def swap(module: nn.Module, scheme: Scheme, by_name: bool, selection: Selection, pretrained: bool = False) -> Scheme:
    """Convert ``module`` in place; a converted one is taken as it is.

    It is converted anew where layers were built since, and, as long as nothing was trained in low bits, where the
    scheme or the selection is another one.

    Args:
        module: the LightningModule.
        scheme: what the callback asks for.
        by_name: it asked by name alone, so that the options of a converted module win.
        selection: what to convert.
        pretrained: whether weights from elsewhere will be loaded.
    Returns:
        the scheme in force.
    Raises:
        ConfigError: the module is converted with another scheme.
    """
    if is_converted(module):  # by this callback, an earlier one, or loaded low-bit
        present, switch = next(m.scheme for _, m in low_bit_modules(module)), switch_of(module)
        trained = switch.started and not switch.provisional
        if by_name and present.name == scheme.name:
            scheme = present
        scheme = scheme.like(present) if trained else scheme.adapted_to(module, pretrained)
        unwanted = _unwanted_layers(module, selection)
        if trained and present != scheme:
            raise ConfigError(
                f"{type(module).__name__} is trained already, with {difference(present, scheme)}. Start from the "
                "float module, or pass the same scheme."
            )
        if trained and unwanted:
            raise ConfigError(
                f"{unwanted[0]}: left out by skip= or include=, and this module has it trained in low bits. Pass the "
                "same skip= and include=, or start from the float module."
            )
        if present != scheme or unwanted or _late_layers(module, selection):
            revert(module)
    if not is_converted(module):
        scheme = scheme.adapted_to(module, pretrained)
        report = convert_module(module, scheme, selection)
        for effect in report.effects:
            rank_zero_info(f"lightning_lowbit: not followed: {effect}")
        _warn(report.findings)
    switch_of(module).managed = True
    return scheme


def _warn(findings: list[str]) -> None:
    if findings:
        listed = "".join(f"\n  - {finding}" for finding in findings)
        rank_zero_warn(f"this network will train badly as it is:{listed}")


def _late_layers(module: nn.Module, selection: Selection) -> bool:
    left = {path for path, reason in switch_of(module).conversion.skipped.items() if reason not in BY_USER}
    return any(
        type(m) in COMPUTE and path not in left and selection.wants(path, m) for path, m in module.named_modules()
    )


def _unwanted_layers(module: nn.Module, selection: Selection) -> list[str]:
    layers = [layer.path for layer in switch_of(module).conversion.layers]
    return [path for path in layers if not selection.wants(path, module.get_submodule(path))]


def swap_for_checkpoint(
    module: nn.Module, saved: Scheme, scheme: Scheme, by_name: bool, selection: Selection
) -> Scheme:
    """Convert anew where a checkpoint's options differ from the callback's and the callback gave only a name.

    Returns:
        the scheme in force.
    Raises:
        ConfigError: the callback gave another scheme, or other options.
    """
    if saved == scheme:
        return scheme
    if not by_name or saved.name != scheme.name:
        raise ConfigError(
            f"ckpt_path: trained with {difference(saved, scheme)}. Pass the same scheme, or only its name "
            f"({saved.name!r}) to take the options from the checkpoint."
        )
    revert(module)
    convert_module(module, saved, selection)
    switch_of(module).managed = True
    return saved

"""Strategies that bring the life cycle with them: ``Trainer(strategy=LowBitStrategy("tqt"))`` needs no callback."""

from __future__ import annotations

import functools
import importlib
import inspect
from typing import Any

import torch
from torch.nn.parallel import DistributedDataParallel

from lightning_lowbit.errors import ConfigError, nearest
from lightning_lowbit.modules.base import Scheme
from lightning_lowbit.plugins.lifecycle import Lifecycle
from lightning_lowbit.plugins.registration import NAMESPACES

__all__ = ["LowBitDDPStrategy", "LowBitStrategy", "strategies_of"]

_SETTINGS = tuple(inspect.signature(Lifecycle).parameters)  # scheme first
# They round, drop or postpone what DDP reduces; postponed, the processes no longer hold one network.
_HOOKS = ("ddp_comm_hook", "ddp_comm_state", "ddp_comm_wrapper", "model_averaging_period")


@functools.cache
def strategies_of(namespace: str) -> tuple[Any, Any]:
    """LowBitStrategy and LowBitDDPStrategy for the Trainer of one Lightning namespace.

    A Trainer accepts strategies of its own namespace only; the public names are those of ``lightning.pytorch``,
    and ``strategy="lowbit"`` or ``"lowbit_ddp"`` finds the right ones.

    Args:
        namespace: "lightning.pytorch" or "pytorch_lightning".
    """
    base: Any = importlib.import_module(f"{namespace}.strategies")

    class LowBitStrategy(base.SingleDeviceStrategy):  # type: ignore[misc]  # the namespace is chosen at run time
        """Low-bit training on one device; the life cycle comes with it.

        Args:
            scheme: a name or a Scheme instance; None leaves it to the QuantCallback among the callbacks.
            options: QuantCallback's others (skip, init_from, start, ...), and those of Lightning's
                SingleDeviceStrategy.

        Attributes:
            lifecycle: what leads the run and holds its metrics, ours or the QuantCallback; None before it.

        Raises:
            ConfigError: an unknown option, options without a scheme, a scheme beside a QuantCallback, or none at
                all; more than one device.
        """

        strategy_name = "lowbit"
        _root_device: torch.device
        parallel_devices: list[torch.device] | None = None  # the Trainer sets it and num_nodes
        num_nodes = 1

        def __init__(self, scheme: Scheme | str | None = None, **options: Any) -> None:
            self.own, rest = _take(type(self), base.SingleDeviceStrategy, scheme, options)
            super().__init__(**rest)
            self.lifecycle: Lifecycle | None = None
            self._device_given = "device" in rest

        def _configure_launcher(self) -> None:
            devices = self.parallel_devices or [self.root_device]
            self.parallel_devices = None  # a second Trainer would take it for a choice of the user's
            if len(devices) * self.num_nodes > 1:
                raise ConfigError(
                    f"Trainer(strategy='lowbit', devices={len(devices)}, num_nodes={self.num_nodes}): LowBitStrategy "
                    "trains on one device. Pass devices=1, or strategy='lowbit_ddp' (LowBitDDPStrategy) for several."
                )
            if not self._device_given:
                self._root_device = devices[0]
            super()._configure_launcher()

        def setup_environment(self) -> None:
            _join(self)
            super().setup_environment()

    class LowBitDDPStrategy(base.DDPStrategy):  # type: ignore[misc]  # the namespace is chosen at run time
        """Low-bit training in several processes, one script each; the life cycle comes with it.

        What a scheme trains in integers is reduced by its update rule, outside of torch's DDP, which gets what
        is left and is not there at all where nothing is.

        Args:
            scheme: a name or a Scheme instance; None leaves it to the QuantCallback among the callbacks.
            options: QuantCallback's others (skip, init_from, start, ...), and those of Lightning's DDPStrategy
                (process_group_backend, timeout, ...) and of DistributedDataParallel (static_graph,
                find_unused_parameters, ...).

        Attributes:
            lifecycle: what leads the run and holds its metrics, ours or the QuantCallback; None before it.

        Raises:
            ConfigError: as LowBitStrategy; a launcher that hands back a float module; a hook on DDP's gradients.
        """

        strategy_name = "lowbit_ddp"

        def __init__(self, scheme: Scheme | str | None = None, **options: Any) -> None:
            self.own, rest = _take(
                type(self), base.DDPStrategy, scheme, options, *inspect.signature(DistributedDataParallel).parameters
            )
            _check_ddp(rest)
            super().__init__(**rest)
            self.lifecycle: Lifecycle | None = None

        def setup_environment(self) -> None:
            _join(self)  # before there is a process group that an error would leave waiting
            super().setup_environment()

    for cls in (LowBitStrategy, LowBitDDPStrategy):
        cls.__qualname__ = cls.__name__
    return LowBitStrategy, LowBitDDPStrategy


def _take(
    cls: type, base: type, scheme: Scheme | str | None, options: dict[str, Any], *others: str
) -> tuple[Lifecycle | None, dict[str, Any]]:
    """The life cycle that the options describe, and the options left for Lightning.

    Args:
        cls: the strategy's class.
        base: Lightning's.
        scheme: as given.
        options: as given.
        others: what base passes on.
    """
    known = {*_SETTINGS, *inspect.signature(base).parameters, *others} - {"kwargs", "module"}
    for option in options:
        if option not in known:
            raise ConfigError(f"{cls.__name__} has no option {option!r}.{nearest(option, known)}")
    ours = {name: value for name, value in options.items() if name in _SETTINGS}
    rest = {name: value for name, value in options.items() if name not in _SETTINGS}
    if scheme is not None:
        return Lifecycle(scheme, **ours), rest
    if ours:
        raise ConfigError(
            f"{cls.__name__}({', '.join(ours)}): options of a scheme, and none is given. Add scheme='tqt' (or "
            "another), or give them to QuantCallback."
        )
    return None, rest


def _check_ddp(options: dict[str, Any]) -> None:
    method = options.get("start_method", "popen")
    if method != "popen":
        raise ConfigError(
            f"LowBitDDPStrategy(start_method={method!r}): processes launched by {method} hand back a float module, the "
            "trained low-bit one is lost. Leave it out: 'popen' launches this script once a process."
        )
    hooks = [name for name in _HOOKS if options.get(name) is not None]
    if hooks:
        raise ConfigError(
            f"LowBitDDPStrategy({hooks[0]}=...): it changes how DDP reduces gradients, while integers and ranges are "
            "reduced beside DDP and exactly; nobody has tried the two together. Leave it out."
        )


def _join(strategy: Any) -> None:
    """Put the strategy's life cycle first among the callbacks, or leave the run to the QuantCallback there.

    ``setup_environment`` is the one hook of a strategy behind ``configure_callbacks``, which may bring a
    QuantCallback (Lightning drops an inserted base class of it), and before ``Callback.setup``.
    """
    trainer, own = strategy.lightning_module.trainer, strategy.own
    present = [callback for callback in trainer.callbacks if isinstance(callback, Lifecycle)]
    if not present and own is None:
        raise ConfigError(
            f"Trainer(strategy={strategy.strategy_name!r}): no scheme is given. Pass "
            f"strategy={type(strategy).__name__}(scheme='tqt') or callbacks=[QuantCallback('tqt')]; a float run takes "
            "strategy='auto' or 'ddp'."
        )
    if not present:
        trainer.callbacks.insert(0, own)  # before averaging and pruning, which must find the low-bit network
        present = [own]
    if own is not None and present[0] is not own:
        mine, theirs = own.scheme, present[0].scheme
        which = f"{mine} and {theirs}" if type(mine) is not type(theirs) else f"both {type(mine).__name__}"
        raise ConfigError(
            f"Trainer(strategy={type(strategy).__name__}(...), callbacks=[{type(present[0]).__name__}(...)]): two "
            f"schemes are given, {which}. Leave out the callback, or the strategy's scheme and options."
        )
    strategy.lifecycle = present[0]


LowBitStrategy, LowBitDDPStrategy = strategies_of(NAMESPACES[0])

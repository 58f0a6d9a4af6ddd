"""A converted LightningModule from its checkpoint alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from torch import nn

from lightning_lowbit.errors import ConfigError
from lightning_lowbit.plugins.checkpoint import (
    check_shapes,
    has_low_bit_keys,
    keep_record,
    read_spec,
    restore_conversion,
)
from lightning_lowbit.plugins.checks import check_checkpoint_file

__all__ = ["load_from_checkpoint"]

_M = TypeVar("_M", bound=nn.Module)


def load_from_checkpoint(cls: type[_M], path: str | Path, map_location: Any = None, **kwargs: Any) -> _M:
    """Load a LightningModule that was trained in low bits, without Trainer or callback.

    Lightning's own loader does the work; between making the module and loading its weights, the network is converted by
    what the file says. A compact checkpoint (``save_compact``) gives the same evaluation. A float checkpoint comes back
    unconverted: it is the float module.

    Args:
        cls: the user's LightningModule class.
        path, map_location, kwargs: as in ``cls.load_from_checkpoint``.
    """
    check_checkpoint_file(path, "checkpoint_path")

    def prepare(module: Any, checkpoint: dict[str, Any]) -> None:
        spec = read_spec(checkpoint)
        if spec is not None:
            restore_conversion(module, spec)
            check_shapes(checkpoint["state_dict"], module)
        elif has_low_bit_keys(checkpoint["state_dict"]):
            raise ConfigError(
                f"checkpoint_path={str(path)!r}: low-bit weights without the record of their conversion. Save the "
                "module with Trainer.save_checkpoint or lightning_lowbit.save_compact, or load these weights in a "
                "Trainer with the QuantCallback of the training."
            )

    with _before_weights(cls, prepare):
        module: Any = cls.load_from_checkpoint(path, map_location=map_location, **kwargs)  # type: ignore[attr-defined]  # of Lightning
    keep_record(module)
    return module  # type: ignore[no-any-return]


@contextmanager
def _before_weights(cls: type, prepare: Callable[[Any, dict[str, Any]], None]) -> Iterator[None]:
    """``prepare`` runs once before ``on_load_checkpoint`` of a module of this class.

    Not on a subclass made for it: a checkpoint of the command line names its class, which may be a subclass of ``cls``,
    and Lightning makes that one.
    """
    classes, done = [cls], set[int]()
    for known in classes:
        classes += known.__subclasses__()
    own = {known: known.__dict__["on_load_checkpoint"] for known in classes if "on_load_checkpoint" in known.__dict__}

    def hook(original: Callable[[Any, dict[str, Any]], None]) -> Callable[[Any, dict[str, Any]], None]:
        def on_load_checkpoint(self: Any, checkpoint: dict[str, Any]) -> None:
            if id(self) not in done:
                done.add(id(self))
                prepare(self, checkpoint)
            original(self, checkpoint)

        return on_load_checkpoint

    for known in {cls, *own}:
        known.on_load_checkpoint = hook(known.on_load_checkpoint)  # type: ignore[attr-defined]  # of Lightning
    try:
        yield
    finally:
        for known in {cls, *own}:
            if known in own:
                known.on_load_checkpoint = own[known]  # type: ignore[attr-defined]  # of Lightning
            else:
                del known.on_load_checkpoint  # type: ignore[attr-defined]  # of Lightning

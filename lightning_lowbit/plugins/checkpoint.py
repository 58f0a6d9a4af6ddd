"""What a checkpoint keeps beside the weights, and the ways in: resume, load, initialize from a float file."""

from __future__ import annotations

import dataclasses
import pickle
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from lightning_lowbit.errors import ConfigError
from lightning_lowbit.modules.base import Scheme, switch_of
from lightning_lowbit.modules.convert import Report, Selection, convert_module, quantizers
from lightning_lowbit.plugins.checks import check_checkpoint_file
from lightning_lowbit.schemes import find

__all__ = [
    "KEY", "add_open_keys", "check_shapes", "compare_spec", "difference", "float_state_dict", "initialize_from",
    "load_from_checkpoint", "read_scheme", "write_spec",
]  # fmt: skip

KEY = "lightning_lowbit"
FORMAT = 1
_PREFIXES = ("module.", "_orig_mod.", "model.", "net.")
_M = TypeVar("_M", bound=nn.Module)


def write_spec(scheme: Scheme, selection: Selection, conversion: Report) -> dict[str, Any]:
    """Plain types that load under ``weights_only=True``."""
    skip = [p if isinstance(p, str) else f"{p.__module__}.{p.__qualname__}" for p in selection.skip]
    return {
        "format": FORMAT,
        "version": _own_version(),
        "scheme": scheme.name or f"{type(scheme).__module__}.{type(scheme).__qualname__}",
        "options": _plain(dataclasses.asdict(scheme) if dataclasses.is_dataclass(scheme) else {}),
        "layers": [layer.path for layer in conversion.layers],
        "skip": skip,
        **conversion.spec(),
    }


def _own_version() -> str:
    try:
        return version("lightning-lowbit")
    except PackageNotFoundError:  # run from a source tree
        return "0"


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value if type(value) in (bool, int, float, str, type(None)) else type(value).__mro__[-2](value)
    raise ConfigError(
        f"scheme option {value!r} ({type(value).__name__}) is no plain type and cannot be kept in a checkpoint."
    )


def read_scheme(spec: Mapping[str, Any]) -> Scheme:
    """The scheme of a checkpoint, looked up by name among known classes; nothing is imported by path."""
    if spec.get("format") != FORMAT:
        raise ConfigError(
            f"checkpoint: low-bit format {spec.get('format')!r} (written by lightning-lowbit "
            f"{spec.get('version')}), this version reads format {FORMAT}. Install the version that wrote it."
        )
    cls = find(spec["scheme"])
    known: set[str] = {f.name for f in dataclasses.fields(cls)} if dataclasses.is_dataclass(cls) else set()
    unknown = sorted(set(spec["options"]) - known)
    if unknown:
        raise ConfigError(
            f"checkpoint: {cls.__name__} has no option {unknown[0]!r}; it was written by version {spec.get('version')}."
        )
    return cls(**spec["options"])


def difference(saved: Scheme, here: Scheme) -> str:
    """Where two schemes differ, for messages: ``Tqt(act_bits=8), this callback has act_bits=4``."""
    options = getattr(saved, "__dataclass_fields__", {})
    if type(saved) is not type(here) or not options:
        return f"{_brief(saved)}, this callback has {_brief(here)}"
    names = [name for name in options if getattr(saved, name) != getattr(here, name)]
    theirs, ours = (", ".join(f"{name}={getattr(s, name)!r}" for name in names) for s in (saved, here))
    return f"{type(saved).__name__}({theirs}), this callback has {ours}"


def _brief(scheme: Scheme) -> str:
    """A scheme with the options that are not its defaults."""
    fields: dict[str, Any] = getattr(scheme, "__dataclass_fields__", {})
    try:
        plain: Any = type(scheme)()
    except TypeError:  # an option without a default
        return str(scheme)
    given = [f"{n}={getattr(scheme, n)!r}" for n in fields if getattr(scheme, n) != getattr(plain, n)]
    return f"{type(scheme).__name__}({', '.join(given)})"


def compare_spec(spec: Mapping[str, Any], model: nn.Module) -> None:
    """Refuse weights whose sites or ties are not this network's."""
    conversion = switch_of(model).conversion
    saved, found = set(spec["sites"]), set(conversion.spec()["sites"])
    if saved != found:
        only_saved, only_here = sorted(saved - found), sorted(found - saved)
        raise ConfigError(
            f"{(only_saved or only_here)[0]}: the checkpoint has {len(saved)} low-bit sites, "
            f"{type(model).__name__} has {len(found)} (only in the checkpoint: {only_saved[:3]}; only here: "
            f"{only_here[:3]}). Expected the same layers, skip= and include= as in training; to start anew from "
            "its weights use init_from=."
        )
    saved_ties = {tuple(sorted(tie)) for tie in spec["ties"]}
    here_ties = {tuple(sorted(tie)) for tie in conversion.derived_ties}
    if saved_ties != here_ties:
        tie = sorted(saved_ties ^ here_ties)[0]
        raise ConfigError(
            f"{tie[0]}: tied to {', '.join(tie[1:])} {'in the checkpoint' if tie in saved_ties else 'here'} "
            f"and not {'here' if tie in saved_ties else 'in the checkpoint'}. The forward of "
            f"{type(model).__name__} differs from the one that was trained; use the same code."
        )


def check_shapes(state_dict: Mapping[str, Any], model: nn.Module) -> None:
    """Refuse tensors of another shape before torch has copied those that fit."""
    wrong = [
        f"{key} {tuple(state_dict[key].shape)} for {tuple(value.shape)}"
        for key, value in model.state_dict().items()
        if isinstance(state_dict.get(key), Tensor) and state_dict[key].shape != value.shape
    ]
    if wrong:
        raise ConfigError(
            f"{type(model).__name__}: the checkpoint does not fit, nothing was loaded."
            + _listing("of another shape", wrong)
            + " Build the model with the hyperparameters of the training."
        )


def add_open_keys(state_dict: dict[str, Any], model: nn.Module) -> None:
    """Complete a float state dict with this network's low-bit keys, all waiting for calibration."""
    for key, value in model.state_dict().items():
        if "lowbit" in key and key not in state_dict:
            state_dict[key] = value.clone()


def has_low_bit_keys(state_dict: Mapping[str, Any]) -> bool:
    return any("lowbit" in key for key in state_dict)


def float_state_dict(module: nn.Module) -> dict[str, Tensor]:
    """The state dict without low-bit keys: it loads into the plain module that was converted.

    Returns:
        weights as trained (latent values where a scheme has them), batch norms unfolded.
    """
    return {key: value for key, value in module.state_dict().items() if "lowbit" not in key}


def initialize_from(path: str | Path, module: nn.Module) -> None:
    """Load float weights from a checkpoint that anybody made into ``module``, all or nothing.

    Of low-bit state only what the weights were trained with and are nothing without is taken (``Quantizer.inherit``).

    Takes a state dict, or a file that holds one under ``state_dict`` or ``model``. Prefixes of wrappers
    (module., _orig_mod., model., net.) are stripped; then the one prefix is used under which all names and
    shapes agree.

    Raises:
        ConfigError: keys are missing, unexpected or of another shape; all are listed and nothing is loaded.
    """
    tensors = _read_tensors(path)
    saved = {k: v for k, v in tensors.items() if "lowbit" not in k}
    wanted = {k: v for k, v in module.state_dict().items() if "lowbit" not in k}
    device = next((p.device for p in module.parameters()), torch.device("cpu"))
    best: tuple[int, str, dict[str, Tensor]] | None = None
    for prefix in sorted(
        {""} | {_PREFIXES[i] for i in range(len(_PREFIXES))} | {f"{k.split('.')[0]}." for k in wanted}
    ):
        here = {k.removeprefix(prefix): k for k in wanted if k.startswith(prefix)}
        candidate = {here[k]: v for k, v in saved.items() if k in here and wanted[here[k]].shape == v.shape}
        if best is None or len(candidate) > best[0]:
            best = (len(candidate), prefix, candidate)
    assert best is not None
    _, prefix, found = best
    covered = [k for k in wanted if k.startswith(prefix)]
    counters = [k for k in covered if k.endswith("num_batches_tracked")]  # older files do not have them
    missing = [k for k in covered if k not in found and k not in counters]
    parameters = {k for k, _ in module.named_parameters()}
    missing += [k for k in wanted if not k.startswith(prefix) and k in parameters]
    shapes = [k for k in missing if k.removeprefix(prefix) in saved]
    unexpected = [k for k in saved if f"{prefix}{k}" not in wanted]
    if missing or unexpected:
        raise ConfigError(
            f"init_from={str(path)!r} does not fit {type(module).__name__}; nothing was loaded."
            + _listing(
                "of another shape",
                [f"{k} {tuple(saved[k.removeprefix(prefix)].shape)} for {tuple(wanted[k].shape)}" for k in shapes],
            )
            + _listing("missing in the file", [k for k in missing if k not in shapes])
            + _listing("unexpected in the file", unexpected)
            + " Check that the file and the model are the same architecture."
        )
    with torch.no_grad():
        state = module.state_dict()
        for key, value in found.items():
            state[key].copy_(value.to(device))
        for place, quantizer in quantizers(module):
            start = f"{place.removeprefix(prefix)}."
            quantizer.inherit({k.removeprefix(start): v for k, v in tensors.items() if k.startswith(start)})


def _read_tensors(path: str | Path) -> dict[str, Tensor]:
    check_checkpoint_file(path, "init_from")
    if not Path(path).is_file():
        raise ConfigError(f"init_from={str(path)!r}: no such file.")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        unpickling = isinstance(error, pickle.UnpicklingError)
        why = "the file holds Python objects beside tensors" if unpickling else " ".join(str(error).split())[:200]
        raise ConfigError(
            f"init_from={str(path)!r}: torch.load(weights_only=True) failed: {why or type(error).__name__}. "
            "Expected a "
            "state dict of tensors; save one with torch.save(module.state_dict(), path)."
        ) from error
    for name in ("state_dict", "model_state_dict", "model", "net"):
        if isinstance(content, Mapping) and isinstance(content.get(name), Mapping):
            content = content[name]
            break
    tensors = {str(k): v for k, v in content.items() if isinstance(v, Tensor)} if isinstance(content, Mapping) else {}
    if not tensors:
        raise ConfigError(
            f"init_from={str(path)!r}: no tensors found, expected a state dict or a file with one under 'state_dict'."
        )
    while True:
        prefix = next((p for p in _PREFIXES if all(k.startswith(p) for k in tensors)), None)
        if prefix is None:
            return tensors
        tensors = {k.removeprefix(prefix): v for k, v in tensors.items()}


def _listing(title: str, keys: list[str]) -> str:
    if not keys:
        return ""
    return f" {len(keys)} {title}: {', '.join(keys[:6])}{', ...' if len(keys) > 6 else ''}."


def load_from_checkpoint(cls: type[_M], path: str | Path, map_location: Any = None, **kwargs: Any) -> _M:
    """Load a LightningModule that was trained in low bits, without Trainer or callback.

    Lightning's own loader does the work, on a subclass that converts the network by what the file says before
    the weights arrive. A float checkpoint comes back unconverted: it is the float module.

    Args:
        cls: the user's LightningModule class.
        path, map_location, kwargs: as in ``cls.load_from_checkpoint``.
    """
    check_checkpoint_file(path, "checkpoint_path")

    class Loaded(cls):  # type: ignore[misc, valid-type]
        def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            spec = checkpoint.get(KEY)
            if spec is not None:
                restore_conversion(self, spec)
                check_shapes(checkpoint["state_dict"], self)
            elif has_low_bit_keys(checkpoint["state_dict"]):
                raise ConfigError(
                    f"checkpoint_path={str(path)!r}: low-bit weights without the record of their conversion, as "
                    "Trainer.save_checkpoint(weights_only=True) writes them when no fit is on. Save a full checkpoint, "
                    "use ModelCheckpoint(save_weights_only=True) in the fit, or load it in a Trainer with the same "
                    "QuantCallback."
                )
            super().on_load_checkpoint(checkpoint)

    Loaded.__name__, Loaded.__qualname__, Loaded.__module__ = cls.__name__, cls.__qualname__, cls.__module__
    module = Loaded.load_from_checkpoint(path, map_location=map_location, **kwargs)
    module.__class__ = cls
    return module  # type: ignore[no-any-return]


def restore_conversion(model: nn.Module, spec: Mapping[str, Any]) -> Report:
    """Convert a float network as a checkpoint says."""
    present = dict(model.named_modules())
    missing = [path for path in spec["layers"] if path not in present]
    if missing:
        raise ConfigError(
            f"{missing[0]}: low-bit in the checkpoint, absent from {type(model).__name__}. Layers must exist "
            "when the checkpoint is read: build them in __init__ or configure_model, with the hyperparameters "
            "of the training."
        )
    conversion = convert_module(model, read_scheme(spec), Selection(include=list(spec["layers"])), spec["ties"])
    compare_spec(spec, model)
    return conversion

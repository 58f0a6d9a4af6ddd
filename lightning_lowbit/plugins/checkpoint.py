"""What a checkpoint keeps beside the weights, and the ways in: resume, load, initialize from a float file."""

from __future__ import annotations

import dataclasses
import os
import pickle
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeVar

import torch
from lightning import __version__ as lightning_version
from lightning_utilities.core.rank_zero import rank_zero_info
from torch import Tensor, nn

from lightning_lowbit.errors import ConfigError
from lightning_lowbit.export.checkpoint import Compact, compact, expand
from lightning_lowbit.modules.base import Scheme, low_bit_modules, switch_of
from lightning_lowbit.modules.convert import Report, Selection, convert_module, is_converted, quantizers
from lightning_lowbit.modules.selection import BY_USER
from lightning_lowbit.plugins.checks import check_checkpoint_file
from lightning_lowbit.plugins.migrations import FORMAT, migrate
from lightning_lowbit.schemes import find

__all__ = [
    "KEY", "add_open_keys", "check_shapes", "check_trainable", "compare_spec", "difference", "float_state_dict",
    "initialize_from", "keep_record", "read_scheme", "read_spec", "save_compact", "write_spec",
]  # fmt: skip

KEY = "lightning_lowbit"
COMPACT, EVALUATION_ONLY = "compact", "evaluation_only"  # in the record of a compact checkpoint
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
        **({EVALUATION_ONLY: True} if _evaluation_only(conversion) else {}),
    }


def _spec_of(module: nn.Module) -> dict[str, Any]:
    """The record of a converted network that no Trainer holds: it names its layers one by one."""
    scheme = next(m.scheme for _, m in low_bit_modules(module))
    return write_spec(scheme, Selection(), switch_of(module).conversion)


def keep_record(module: nn.Module) -> None:
    """Have a converted network's state dicts carry its record from now on, as metadata, as torch keeps versions there.

    A Trainer asks no callback when it saves weights alone, and the module's own hook is ours only during a run.
    """
    if is_converted(module) and _record not in module._state_dict_hooks.values():
        module.register_state_dict_post_hook(_record)  # type: ignore[no-untyped-call]  # torch does not type it


def _record(module: nn.Module, state: dict[str, Any], prefix: str, metadata: dict[str, Any]) -> None:
    if is_converted(module):
        metadata[KEY] = _spec_of(module)


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


def read_spec(checkpoint: dict[str, Any]) -> dict[str, Any] | None:
    """The record of a checkpoint in the present format; None where there is none.

    The checkpoint is brought up to date itself: its record is this one, and weights that were codes are floats.
    """
    of_state: dict[str, Any] = getattr(checkpoint["state_dict"], "_metadata", {}).get("", {})
    spec = checkpoint.get(KEY) or of_state.get(KEY)
    if spec is None:
        return None
    spec = dict(migrate(spec, checkpoint["state_dict"]))
    if COMPACT in spec:
        expand(checkpoint["state_dict"], spec.pop(COMPACT))
    checkpoint[KEY] = spec
    return spec


def read_scheme(spec: Mapping[str, Any]) -> Scheme:
    """The scheme of a checkpoint, looked up by name among known classes; nothing is imported by path."""
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


def _evaluation_only(conversion: Report) -> bool:
    return bool(getattr(conversion, EVALUATION_ONLY, False))


def check_trainable(model: nn.Module) -> None:
    """Refuse to train a network that came from a compact checkpoint."""
    if is_converted(model) and _evaluation_only(switch_of(model).conversion):
        raise ConfigError(
            f"{type(model).__name__}: it was loaded from a compact checkpoint, which holds what evaluation needs: "
            "latent weights, batch norms and the states of optimizers are gone. Resume from the full checkpoint, or "
            "start anew from the compact one's weights: the float module with QuantCallback(init_from=...)."
        )


def compare_spec(spec: Mapping[str, Any], model: nn.Module) -> None:
    """Refuse weights whose sites or ties are not this network's; take down what they are good for."""
    conversion = switch_of(model).conversion
    setattr(conversion, EVALUATION_ONLY, bool(spec.get(EVALUATION_ONLY)))
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
    if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
        read_spec(content)  # codes become weights
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


def save_compact(module: nn.Module, path: str | Path) -> Compact:
    """Save a trained low-bit network with weights as codes: int8 or int16 and a step, one bit where they are signs.

    ``load_from_checkpoint`` and a Trainer's ``ckpt_path`` read it like any checkpoint, and evaluation is the same bit
    for bit. Training does not resume from it (fit refuses it), ``init_from=`` starts anew from its weights.

    Args:
        module: the converted LightningModule, trained or calibrated; it is left alone.
        path: of the file, which ``torch.load`` opens with ``weights_only=True``.
    Returns:
        what became codes, and which layers keep their floats and why.
    Raises:
        ConfigError: the module is not converted, was never calibrated, or the folder does not exist.
    """
    path = Path(path)
    if not path.parent.is_dir():
        raise ConfigError(f"save_compact: path={str(path)!r}: no folder {str(path.parent)!r}. Create it first.")
    found: Compact = compact(module)
    content: dict[str, Any] = {"pytorch-lightning_version": lightning_version, "state_dict": found.state}
    host: Any = module
    if getattr(host, "hparams", None):
        content[host.CHECKPOINT_HYPER_PARAMS_NAME] = host._hparams_name
        content[host.CHECKPOINT_HYPER_PARAMS_KEY] = dict(host.hparams)
    getattr(host, "on_save_checkpoint", dict)(content)  # what the user's own on_load_checkpoint expects
    content[KEY] = {**_spec_of(module), EVALUATION_ONLY: True, COMPACT: found.table}
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        torch.save(content, unfinished)
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)
    floats = sum(value.numel() * value.element_size() for value in float_state_dict(module).values())
    rank_zero_info(f"lightning_lowbit: {path}: {path.stat().st_size} bytes, {floats} in floats; {found}")
    return found


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
    # Not by a wish of the user's here: a callback that wishes nothing would convert those, and so all, anew.
    said = {path: "float in the checkpoint" if why in BY_USER else why for path, why in conversion.skipped.items()}
    conversion.skipped = said
    compare_spec(spec, model)
    return conversion

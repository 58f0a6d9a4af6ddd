"""Certificates of training: one SHA-256 per low-bit layer, step by step, and where two of them part."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lowbit.errors import ConfigError
from lightning_lowbit.modules.base import LowBitModule, UpdateRule, low_bit_modules, switch_of

__all__ = [
    "CALLBACK", "FORMAT", "RULE", "Comparison", "compare", "digest", "layer_hashes", "layer_state", "network_limits",
    "read_certificate", "record",
]  # fmt: skip

FORMAT = 1
CALLBACK = "TrainingCertificate"  # the key under which a checkpoint's "callbacks" hold a certificate
RULE = "update_rule"  # the entry of what the update rule holds, among those of the layers
MOMENTS = ("step", "epoch_end")  # an epoch's end comes behind its last step
_COMPARED = ("scheme", "options", "seed")  # a difference explains a parting, it is none


# -- hashing -------------------------------------------------------------------------------------------------
def digest(value: Any) -> str:
    """SHA-256, in hexadecimal, of tensors and plain types nested in mappings and sequences.

    It depends on names, dtypes, shapes and bits. It does not depend on the device, on strides, on the order of a
    mapping, or on the byte order of the machine.

    Args:
        value: tensors of any dtype; None, bool, int, float, str; mappings and sequences of them.
    Raises:
        TypeError: another type.

    >>> weight = torch.arange(6, dtype=torch.int8).reshape(2, 3)
    >>> digest({"weight": weight})[:16]
    '417c4589129a0904'
    >>> digest(weight) == digest(weight.t().contiguous().t()), digest(weight) == digest(weight.int())
    (True, False)
    """
    hasher = hashlib.sha256()
    _feed(hasher, value)
    return hasher.hexdigest()


def _feed(hasher: Any, value: Any) -> None:
    """Every part says what it is and how long, so that no two values have the same bytes."""
    if isinstance(value, Tensor):
        hasher.update(f"tensor {str(value.dtype).removeprefix('torch.')} {list(value.shape)}\n".encode())
        hasher.update(_little_endian(value))
    elif isinstance(value, Mapping):
        hasher.update(f"mapping {len(value)}\n".encode())
        for key in sorted(value, key=lambda key: (type(key).__name__, key)):
            _feed(hasher, key)
            _feed(hasher, value[key])
    elif isinstance(value, (list, tuple)):
        hasher.update(f"sequence {len(value)}\n".encode())
        for item in value:
            _feed(hasher, item)
    elif value is None or isinstance(value, (bool, int, float, str)):
        text = f"{type(value).__name__} {value!r}".encode()
        hasher.update(f"{len(text)} ".encode() + text + b"\n")
    else:
        raise TypeError(f"digest: got a {type(value).__name__}, expected tensors and plain types")


def _little_endian(tensor: Tensor) -> Any:
    """The elements in row-major order, as a buffer of bytes."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    if flat.is_complex():
        flat = torch.view_as_real(flat).reshape(-1)
    data = flat.view(torch.uint8).numpy()
    if sys.byteorder == "big":
        data = data.reshape(-1, flat.element_size())[:, ::-1].copy()
    return data


def layer_state(module: LowBitModule) -> dict[str, Tensor]:
    """The integers that a module is trained to; where it names none, its own parameters and persistent buffers.

    Low-bit modules inside it are entries of their own.
    """
    state = module.integer_state()
    if state:
        return state
    inside = tuple(f"{path}." for path, _ in low_bit_modules(module) if path)
    return {
        name: value
        for name, value in module.state_dict().items()
        if isinstance(value, Tensor) and not name.startswith(inside)
    }


def layer_hashes(root: nn.Module, rule: UpdateRule | None) -> dict[str, str]:
    """Module path -> hash, for each low-bit module that has state, and an entry for what the update rule holds."""
    states = {path: layer_state(module) for path, module in low_bit_modules(root)}
    hashes = {path: digest(state) for path, state in states.items() if state}
    held = {} if rule is None else rule.state_dict()
    return {**hashes, RULE: digest(held)} if held else hashes


def record(epoch: int, step: int, at: str, layers: dict[str, str]) -> dict[str, Any]:
    """One entry of a certificate, of plain types.

    Args:
        epoch: counted from 0.
        step: optimizer steps done.
        at: "step" behind a step, "epoch_end" behind an epoch.
        layers: from `layer_hashes`.
    """
    return {"epoch": epoch, "step": step, "at": at, "layers": layers, "state": digest(layers)}


def network_limits(root: nn.Module) -> list[str]:
    """What of a converted network can differ between two runs although no low-bit layer is to blame."""
    switch = switch_of(root)
    scheme, conversion = next(module.scheme for _, module in low_bit_modules(root)), switch.conversion
    limits = []
    if not scheme.carries_errors:
        limits.append(f"scheme {scheme.name} trains with float gradients: equal bits need one machine and one torch")
    limits += [f"float layer, not hashed: {path} ({why})" for path, why in conversion.skipped.items()]
    limits += [
        f"float by nature, not hashed: {path} ({kind})"
        for kind, paths in conversion.float_by_nature.items()
        for path in paths
    ]
    limits += [f"float code: {note}" for note in conversion.uncovered]
    limits += [
        f"float errors enter at {path}: the loss has no integer form, or float code stands behind it"
        for path in sorted(switch.run.float_errors)
    ]
    return limits


# -- files ---------------------------------------------------------------------------------------------------
def read_certificate(path: str | Path) -> dict[str, Any]:
    """Read a certificate from its JSON file, or from a checkpoint of the run.

    Raises:
        ConfigError: no such file, another kind of file, or a certificate that was cut off or altered.
    """
    path = Path(path)
    if not path.is_file():
        raise ConfigError(f"certificate {str(path)!r}: no such file.")
    with path.open("rb") as file:
        packed = file.read(2) == b"PK"
    return _checked(_from_checkpoint(path) if packed else _from_json(path), path)


def _from_checkpoint(path: Path) -> Any:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:
        why = " ".join(str(error).split())[:160]
        raise ConfigError(
            f"certificate {str(path)!r}: the checkpoint cannot be read as tensors and plain types: {why}. Pass the "
            "certificate.json beside the logs of the run."
        ) from error
    callbacks = content.get("callbacks") if isinstance(content, dict) else None
    if not isinstance(callbacks, dict) or CALLBACK not in callbacks:
        raise ConfigError(
            f"certificate {str(path)!r}: the checkpoint holds none. Train with "
            f"Trainer(callbacks=[QuantCallback(...), {CALLBACK}()]); a weights-only checkpoint never holds one."
        )
    return callbacks[CALLBACK]


def _from_json(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ConfigError(
            f"certificate {str(path)!r} ({path.stat().st_size} bytes): neither JSON nor a checkpoint, or cut off "
            f"({error}). Expected a certificate.json, or a .ckpt of a run with {CALLBACK}."
        ) from error


def _checked(content: Any, path: Path) -> dict[str, Any]:
    """``content`` if it is a certificate whose sums are right."""
    if not isinstance(content, dict) or not isinstance(content.get("records"), list) or "format" not in content:
        raise ConfigError(
            f"certificate {str(path)!r}: another kind of file. Expected the fields 'format' and 'records' of a "
            "certificate.json."
        )
    if content["format"] != FORMAT:
        raise ConfigError(
            f"certificate {str(path)!r}: format {content['format']!r} (written by lightning-lowbit "
            f"{content.get('version')}), this version reads format {FORMAT}. Install the version that wrote it."
        )
    for number, entry in enumerate(content["records"]):
        if not _is_record(entry) or entry["state"] != digest(entry["layers"]):
            raise ConfigError(
                f"certificate {str(path)!r}: record {number} is damaged: its fields and its sum do not belong "
                "together. Take another copy, or a checkpoint of the same run."
            )
    return content


def _is_record(entry: Any) -> bool:
    if not isinstance(entry, dict) or not isinstance(entry.get("layers"), dict):
        return False
    numbers = all(type(entry.get(name)) is int for name in ("epoch", "step"))
    hashes = all(isinstance(value, str) for pair in entry["layers"].items() for value in pair)
    return numbers and hashes and entry.get("at") in MOMENTS


# -- comparing -----------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Comparison:
    """What two certificates say of each other.

    Attributes:
        compared: records that both have, up to and including the first that differs.
        alone: records that only the one or only the other has.
        agreed: the last common record before the parting, None where there is none.
        parting: the first common record that differs, as the first certificate has it; None where they agree.
        layers: entries that differ there, in the network's order.
        notes: differing settings, and what limits either claim.
    """

    compared: int
    alone: tuple[int, int]
    agreed: dict[str, Any] | None
    parting: dict[str, Any] | None = None
    layers: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        if self.parting is None:
            assert self.agreed is not None
            first = f"agree: {_count(self.compared, 'record')} compared, up to {_moment(self.agreed)}"
        else:
            others = f" (and {_count(len(self.layers) - 1, 'other')}: {', '.join(self.layers[1:6])}" + (
                ", ...)" if len(self.layers) > 6 else ")"
            )
            first = f"part at {_moment(self.parting)}: {self.layers[0]}{others if len(self.layers) > 1 else ''}"
            before = "no common record before" if self.agreed is None else f"equal up to {_moment(self.agreed)}"
            first += f"; {before}"
        alone = [f"{_count(n, 'record')} only in {name}" for name, n in zip("AB", self.alone, strict=True) if n]
        return "\n".join([first, *alone, *self.notes])


def compare(a: Mapping[str, Any], b: Mapping[str, Any]) -> Comparison:
    """The first step and the layers at which two certificates part.

    Args:
        a, b: from `read_certificate`. Their versions, their numbers of processes and their torch are not compared.
    Raises:
        ConfigError: one is empty, or they have no step in common.
    """
    ours, theirs = _by_moment(a), _by_moment(b)
    common = sorted(ours.keys() & theirs.keys())
    if not common:
        spans = (f"{name} has {_span(found)}" for name, found in (("A", ours), ("B", theirs)))
        raise ConfigError(
            f"certificates: {', '.join(spans)}, and no record of both is of the same moment. Train both with one "
            "every_n_steps, on as many batches an epoch, for at least one epoch."
        )
    alone = (len(ours) - len(common), len(theirs) - len(common))
    agreed = None
    for place, moment in enumerate(common):
        mine, other = ours[moment], theirs[moment]
        if mine["state"] != other["state"]:
            names = dict.fromkeys([*mine["layers"], *other["layers"]])
            layers = [name for name in names if mine["layers"].get(name) != other["layers"].get(name)]
            return Comparison(place + 1, alone, agreed, mine, layers, _notes(a, b))
        agreed = mine
    return Comparison(len(common), alone, agreed, notes=_notes(a, b))


def _by_moment(certificate: Mapping[str, Any]) -> dict[tuple[int, int], dict[str, Any]]:
    return {(entry["step"], MOMENTS.index(entry["at"])): entry for entry in certificate["records"]}


def _notes(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[str]:
    notes = [f"{name}: {a.get(name)} in A, {b.get(name)} in B" for name in _COMPARED if a.get(name) != b.get(name)]
    ours, theirs = a.get("limits") or [], b.get("limits") or []
    for limit in dict.fromkeys([*ours, *theirs]):
        who = "A and B" if limit in ours and limit in theirs else "A" if limit in ours else "B"
        notes.append(f"limit of {who}: {limit}")
    return notes


def _moment(entry: Mapping[str, Any]) -> str:
    end = "the end of " if entry["at"] == "epoch_end" else ""
    return f"step {entry['step']} ({end}epoch {entry['epoch']})"


def _span(found: Mapping[tuple[int, int], Any]) -> str:
    if not found:
        return "no record"
    steps = [step for step, _ in found]
    return f"{_count(len(found), 'record')} of steps {min(steps)} to {max(steps)}"


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'s' * (number != 1)}"

"""A packed network as a file of plain types."""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lowbit.errors import ConfigError
from lightning_lowbit.export.folding import find_chains
from lightning_lowbit.export.packed import Packing, build, float_bytes
from lightning_lowbit.export.packed_layers import Packed
from lightning_lowbit.export.packed_sizes import PackedSizes, packed_sizes
from lightning_lowbit.graph.network import follow
from lightning_lowbit.modules.layers import LowBitLayer

__all__ = ["load_packed", "save_packed"]

_FORMAT = "lightning_lowbit.packed"
_VERSION = 1


def save_packed(packed: nn.Module, path: str | os.PathLike[str]) -> PackedSizes:
    """Write a packed network to a file of plain types, which ``torch.load`` opens with ``weights_only=True``.

    Prints and returns the sizes, the file's among them.

    Raises:
        ConfigError: not a packed network.
    """
    sizes = packed_sizes(packed)
    layers = {name: module.spec() for name, module in packed.named_modules() if isinstance(module, Packed)}
    state = {name: tensor.detach().cpu() for name, tensor in packed.state_dict().items()}
    torch.save({"format": _FORMAT, "version": _VERSION, "layers": layers, "state": state}, path)
    sizes = PackedSizes(sizes.rows, Path(path).stat().st_size)
    print(sizes)
    return sizes


def load_packed(module: nn.Module, path: str | os.PathLike[str]) -> nn.Module:
    """A packed network from its file.

    Args:
        module: the network's code, converted with the same scheme and options; its values do not matter.
        path: written by `save_packed`.
    Returns:
        a packed copy; ``module`` is left alone.
    Raises:
        ConfigError: no such file, a foreign or damaged one, or one of another network.
    """
    layers, state = _read(path)
    if not any(isinstance(child, LowBitLayer) for child in module.modules()):
        raise ConfigError(
            f"{type(module).__name__}: expected a converted network to load {path} into. Convert it as the packed one "
            "was: lightning_lowbit.convert(module, 'bnn') with the same options."
        )
    with torch.inference_mode(False), torch.no_grad():
        root = copy.deepcopy(module).eval()
        kinds = {name: str(spec.get("kind")) for name, spec in layers.items()}
        absent = [name for name in kinds if name not in dict(root.named_modules())]
        if absent:
            raise _other(path, absent[0], "no such module in this network")
        binary = {name for name, kind in kinds.items() if kind in ("PackedLinear", "PackedConv")}
        ends = {name for name, kind in kinds.items() if kind == "PackedEnd"}
        for name in binary | ends:
            if not isinstance(root.get_submodule(name), LowBitLayer):
                raise _other(path, name, "it is not converted in this network")
        folded = {name for name in binary if layers[name].get("steps") is not None}
        found, refused = find_chains(root, follow(root), binary)
        for name in folded - set(found):
            raise _other(path, name, f"here its sums stay numbers ({refused[name]})")
        chains = {name: found[name] for name in folded}
        packing = Packing(
            sorted(folded),
            {name: refused.get(name, "as in the file") for name in binary - folded},
            {},
            float_bytes(root),
        )

        def tensors(name: str) -> dict[str, Tensor]:
            device = next((p.device for p in root.get_submodule(name).parameters()), torch.device("cpu"))
            return {key: state[f"{name}.{key}"].to(device) for key in layers[name]["tensors"]}

        try:
            packed = build(root, binary, ends, chains, packing, tensors)
        except KeyError as error:
            raise ConfigError(f"{path}: it does not fit this network, which needs a tensor {error} more.") from error
    for name, child in packed.named_modules():
        if isinstance(child, Packed) and child.spec() != layers.get(name):
            raise _other(path, name, f"the file says {layers.get(name)}, this network {child.spec()}")
    try:
        packed.load_state_dict(state)
    except RuntimeError as error:
        raise ConfigError(f"{path}: it does not fit this network. {error}") from error
    return packed


def _read(path: str | os.PathLike[str]) -> tuple[dict[str, dict[str, Any]], dict[str, Tensor]]:
    try:
        file = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise ConfigError(
            f"{path}: no such file. lightning_lowbit.export.packed_file.save_packed(packed, path) writes one."
        ) from error
    except Exception as error:  # whatever torch raises over a file that is cut or not its own
        raise ConfigError(f"{path}: not a file of a packed network, or a damaged one ({error}).") from error
    if not isinstance(file, dict) or file.get("format") != _FORMAT:
        raise ConfigError(
            f"{path}: not a file of a packed network: it lacks format={_FORMAT!r}, which save_packed writes."
        )
    if file.get("version") != _VERSION:
        raise ConfigError(
            f"{path}: its version is {file.get('version')!r}, expected {_VERSION}. Save it with this release."
        )
    for key in ("layers", "state"):
        if not isinstance(file.get(key), dict):
            raise ConfigError(f"{path}: damaged, it lacks {key!r}. Save it again with save_packed.")
    layers, state = file["layers"], file["state"]
    for name, spec in layers.items():
        entries = spec.get("tensors") if isinstance(spec, dict) else None
        if not isinstance(entries, dict) or not all(isinstance(e, tuple) and len(e) == 2 for e in entries.values()):
            raise ConfigError(f"{path}: damaged, the entry of {name} says {spec!r}. Save it again with save_packed.")
        for key, (dtype, shape) in entries.items():
            found = state.get(f"{name}.{key}")
            if not isinstance(found, Tensor):
                raise ConfigError(f"{path}: damaged, it lacks {name}.{key}. Save it again with save_packed.")
            if str(found.dtype) != dtype or tuple(found.shape) != tuple(shape):
                raise ConfigError(
                    f"{path}: damaged, {name}.{key}: got {found.dtype} {tuple(found.shape)}, expected {dtype} {shape}. "
                    "Save it again with save_packed."
                )
    return layers, state


def _other(path: str | os.PathLike[str], name: str, why: str) -> ConfigError:
    return ConfigError(
        f"{path}: {name}: {why}. Convert the same network with the scheme and the options of the one that was packed."
    )

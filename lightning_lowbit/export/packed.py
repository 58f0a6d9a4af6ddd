"""A binarized network as it runs: words of signs for weights and activations, integer thresholds for batch norms."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lowbit.errors import ConfigError
from lightning_lowbit.export.folding import Chain, find_chains, not_monotone, thresholds
from lightning_lowbit.export.packed_layers import (
    Packed,
    PackedConv,
    PackedEnd,
    PackedLinear,
    PackedNorm,
    Passed,
    linear_words,
)
from lightning_lowbit.graph.network import follow
from lightning_lowbit.graph.ops import COMPUTE
from lightning_lowbit.kernels.binary import weight_words
from lightning_lowbit.modules.base import Mode, switch_of
from lightning_lowbit.modules.binary import LatentSign, SignInput
from lightning_lowbit.modules.integer_layers import unsupported
from lightning_lowbit.modules.layers import LowBitConv1d, LowBitConv2d, LowBitLayer, LowBitLinear
from lightning_lowbit.modules.norm import LowBitBatchNorm
from lightning_lowbit.modules.running import RunningRange
from lightning_lowbit.numerics.affine import affine_parameters
from lightning_lowbit.numerics.exponent import pow2

__all__ = ["Packing", "build", "needs", "pack", "packing_of"]

_MOST_TERMS = 2**24  # signs that float32 adds up exactly


@dataclass
class Packing:
    """What became of a network's layers, by path.

    Attributes:
        signs: binary layers whose results stay signs.
        numbers: binary layers that give float tensors, and why.
        left: layers that are as they were, and why.
        float_bytes: of every module's own parameters and buffers in the float network.
    """

    signs: list[str] = field(default_factory=list)
    numbers: dict[str, str] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)
    float_bytes: dict[str, int] = field(default_factory=dict)

    def __str__(self) -> str:
        parts = [f"{len(self.signs) + len(self.numbers)} binary layers packed, {len(self.signs)} give signs"]
        for title, found in (("give numbers", self.numbers), ("not packed", self.left)):
            if found:
                parts.append(f"{title}: {', '.join(f'{path} ({reason})' for path, reason in found.items())}")
        return "; ".join(parts)


def pack(module: nn.Module) -> nn.Module:
    """The evaluation-mode network with packed binary layers: the same results, bit for bit.

    Binary layers hold 64 weights a word. Where only their signs are read behind a batch norm, a max pool, monotone
    activations and a flatten, all of it becomes one integer threshold a channel, and no float tensor exists between
    them. 8-bit end layers hold int8 codes. What has no packed form stays as it is; `packing_of` says why.

    Args:
        module: converted with a scheme of binary weights, and trained, or at least calibrated.
    Returns:
        a copy, for evaluation only; ``module`` is left alone.
    Raises:
        ConfigError: not converted, not calibrated, in the first of two stages, or packed already.
    """
    with torch.inference_mode(False), torch.no_grad():
        root = copy.deepcopy(module).eval()
        binary, ends, left = _sorted(root)
        _check_ready(root, binary)
        chains, refused = find_chains(root, follow(root), binary)
        for path, chain in list(chains.items()):
            reason = not_monotone(root, chain)
            if reason is not None:
                refused[path] = reason
                del chains[path]
        pixels = flat_pixels(root, chains)

        def tensors(path: str) -> dict[str, Tensor]:
            layer: Any = root.get_submodule(path)
            if isinstance(layer, LowBitBatchNorm):
                return _norm_tensors(layer)
            if path in ends:
                return _end_tensors(layer)
            return _binary_tensors(root, layer, chains.get(path), pixels.get(path, 0))

        packing = Packing(sorted(chains), refused, left, float_bytes(root))
        return build(root, binary, ends, chains, packing, tensors)


def packing_of(packed: nn.Module) -> Packing:
    """What was packed, and what was not and why.

    Raises:
        ConfigError: not a packed network.
    """
    found = packed.__dict__.get("lowbit_packing")
    if not isinstance(found, Packing):
        raise ConfigError(
            f"{type(packed).__name__} is not a packed network: lightning_lowbit.pack(module) makes one of a converted, "
            "calibrated module."
        )
    return found


def build(
    root: nn.Module, binary: set[str], ends: set[str], chains: dict[str, Chain], packing: Packing,
    tensors: Callable[[str], dict[str, Tensor]],
) -> nn.Module:  # fmt: skip
    """Put the packed modules in place, with the tensors that are given for each path."""
    switch = switch_of(root)
    switch.mode, switch.started, switch.ran, switch.tally = Mode.LOWBIT, True, None, None
    pixels, made = flat_pixels(root, chains), dict[int, nn.Module]()
    absorbed = {path: chain.producer for chain in chains.values() for path in chain.absorbed}
    for path, module in root.named_modules():
        if path in absorbed:
            made[id(module)] = Passed(path, absorbed[path])
        elif path in binary:
            made[id(module)] = _binary(path, module, tensors(path), chains.get(path), pixels.get(path, 0))
        elif path in ends:
            made[id(module)] = PackedEnd(path, module, tensors(path))
        elif needs(module):
            made[id(module)] = PackedNorm(path, tensors(path))
    for parent in list(root.modules()):
        for name, child in parent._modules.items():
            if child is not None and id(child) in made:
                parent._modules[name] = made[id(child)]
    root.__dict__["lowbit_packing"] = packing
    return root


def needs(module: nn.Module) -> bool:
    """Whether a norm that no threshold contains becomes one affine function."""
    islands = isinstance(module, LowBitBatchNorm) and module.island and module.running_mean is not None
    return islands and not _hooked(module) and module.lowbit_output is None


def flat_pixels(root: nn.Module, chains: dict[str, Chain]) -> dict[str, int]:
    """Of the linear layers that read flattened planes: how many pixels."""
    found = {}
    for chain in chains.values():
        producer: Any = root.get_submodule(chain.producer)
        if chain.flat and not isinstance(producer, nn.Linear):
            for path in chain.consumers:
                layer: Any = root.get_submodule(path)
                found[path] = layer.in_features // producer.out_channels
    return found


def float_bytes(root: nn.Module) -> dict[str, int]:
    """Bytes of every module's own state in the float network."""
    found = {}
    for path, module in root.named_modules():
        if "lowbit_" not in path:
            own = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
            found[path] = sum(tensor.nbytes for name, tensor in own if not name.startswith("lowbit_"))
    return {path: size for path, size in found.items() if size}


def _sorted(root: nn.Module) -> tuple[set[str], set[str], dict[str, str]]:
    """Paths of the layers to pack as bits, as int8, and of those to leave, with the reason."""
    binary: set[str] = set()
    ends: set[str] = set()
    left: dict[str, str] = {}
    converted = [module for module in root.modules() if isinstance(module, LowBitLayer)]
    if any(isinstance(module, Packed) for module in root.modules()):
        raise ConfigError(f"{type(root).__name__} is packed already. Pack the network that it was made from.")
    if not any(isinstance(module.lowbit_weight, LatentSign) for module in converted):
        found = "it was converted with another scheme" if converted else "it is not converted"
        raise ConfigError(
            f"{type(root).__name__}: no binary layer to pack: {found}. Convert a float network with "
            "lightning_lowbit.convert(module, 'bnn', example_input), or train it with QuantCallback('bnn')."
        )
    conversion = switch_of(root).conversion
    for path, module in root.named_modules():
        if isinstance(module, LowBitLayer):
            is_binary = isinstance(module.lowbit_weight, LatentSign)
            reason = _not_binary(module) if is_binary else _not_end(module)
            if reason is not None:
                left[path] = reason
            else:
                (binary if is_binary else ends).add(path)
        elif type(module) in COMPUTE:
            left[path] = conversion.skipped.get(path, "float") if conversion is not None else "float"
    return binary, ends, left


def _not_binary(layer: Any) -> str | None:
    if not isinstance(layer.lowbit_input, SignInput):
        return "its input is float"
    if not isinstance(layer, (LowBitLinear, LowBitConv1d, LowBitConv2d)):
        return f"{type(layer).__name__.removeprefix('LowBit')} has no packed form"
    if getattr(layer, "padding_mode", "zeros") != "zeros":
        return f"padding_mode={layer.padding_mode!r} has no packed form"
    if layer.weight.dtype != torch.float32:
        return f"its weight is {str(layer.weight.dtype).removeprefix('torch.')}"
    if layer.weight[0].numel() > _MOST_TERMS:
        return f"sums of {layer.weight[0].numel()} signs are not exact in float32"
    return "it has forward hooks" if _hooked(layer) else None


def _not_end(layer: Any) -> str | None:
    quantizers = (layer.lowbit_input, layer.lowbit_weight)
    if not all(isinstance(quantizer, RunningRange) for quantizer in quantizers):
        return "its grids have no packed form"
    if not all(quantizer.ready for quantizer in quantizers):
        return "its input was zero in calibration"
    reason = unsupported(layer)
    return reason or ("it has forward hooks" if _hooked(layer) else None)


def _hooked(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)


def _check_ready(root: nn.Module, binary: set[str]) -> None:
    for path in sorted(binary):
        layer: Any = root.get_submodule(path)
        if layer.lowbit_weight.waits and layer.lowbit_input.ready and not layer.lowbit_weight.ready:
            raise ConfigError(
                f"{path}: its weights are float, in the first of two stages. Train on until they are binary "
                f"(weights_at={layer.scheme.weights_at!r}), then pack."
            )
        if not (layer.lowbit_input.ready and layer.lowbit_weight.ready):
            raise ConfigError(
                f"{path}: neither trained nor calibrated. Train the network with QuantCallback, or give an example: "
                "lightning_lowbit.convert(module, 'bnn', example_input)."
            )


def _binary(path: str, layer: Any, tensors: dict[str, Tensor], chain: Chain | None, pixels: int) -> nn.Module:
    fold, per_channel = (None, False) if chain is None else (chain.fold(), chain.per_channel)
    if isinstance(layer, nn.Linear):
        return PackedLinear(path, layer, tensors, fold, per_channel, pixels)
    return PackedConv(path, layer, tensors, fold, per_channel)


def _binary_tensors(root: nn.Module, layer: Any, chain: Chain | None, pixels: int) -> dict[str, Tensor]:
    weight, latent = layer.weight.detach(), layer.lowbit_weight
    found: dict[str, Tensor] = {}
    if isinstance(layer, nn.Linear):
        found["words"] = linear_words(weight, pixels)
    else:
        found["words"] = weight_words(weight.unsqueeze(2) if weight.dim() == 3 else weight)
    if chain is not None:
        found["low"], found["flip"] = thresholds(root, chain)
    else:
        if latent.scaling != "none":
            scale = latent.scale(weight)
            found["scale"] = scale.reshape(-1) if scale.numel() > 1 else scale.reshape(())
        if layer.bias is not None:
            found["bias"] = layer.bias.detach().clone()
    if layer.lowbit_input.shift is not None:
        found["shift"] = layer.lowbit_input.shift.detach().clone()
    return found


def _end_tensors(layer: Any) -> dict[str, Tensor]:
    source, quantizer, bias = layer.lowbit_input, layer.lowbit_weight, layer.lowbit_bias
    grid = quantizer(layer.weight)  # first: it sets the weight's range
    unit = pow2(source.exponent() + quantizer.exponent()).to(layer.weight.dtype)
    found = {
        "weight": (grid / pow2(quantizer.exponent())).to(torch.int8),
        "step": pow2(source.exponent()),
        "unit": unit,
    }
    if layer.bias is not None and bias is not None:
        found["bias"] = (bias(layer.bias) / unit).to(torch.int64).clamp(-(2**31), 2**31 - 1).to(torch.int32)
    elif layer.bias is not None:
        found["bias"] = layer.bias.detach().clone()
    return found


def _norm_tensors(norm: Any) -> dict[str, Tensor]:
    a, b = affine_parameters(norm.running_mean, norm.running_var, norm.weight, norm.bias, norm.eps)
    return {"a": a.detach(), "b": b.detach()}

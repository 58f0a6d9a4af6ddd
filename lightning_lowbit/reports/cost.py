"""What a converted network costs on a device: bytes of its parameters, the kind and the number of its products."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_leaves

from lightning_lowbit.export.record import in_evaluation
from lightning_lowbit.modules.base import low_bit_modules
from lightning_lowbit.modules.layers import LowBitLayer
from lightning_lowbit.modules.quantizer import Quantizer

__all__ = ["bits_of", "count_products", "float_bytes", "layers_of", "product_kind", "sizes"]

_FLOAT = 32


def layers_of(module: nn.Module) -> dict[str, LowBitLayer]:
    """Converted layers by path."""
    return {path: part for path, part in low_bit_modules(module) if isinstance(part, LowBitLayer)}


def sizes(module: nn.Module) -> dict[str, int]:
    """Bytes of what each module stores on a device, by path.

    Weights and biases count with the bits that their quantizers store (``Quantizer.stored_bits``), merged batch norms
    as the bias that they leave, everything else as float32; steps and thresholds are not counted. A weight that several
    modules share counts once, with the bits of the one that needs most.
    """
    layers = layers_of(module)
    merged = {id(layer.norm) for layer in layers.values() if layer.norm is not None}
    seen: set[int] = set()
    bits = {
        path: _FLOAT * sum(tensor.numel() for tensor in _floats(part, seen)) for path, part in module.named_modules()
        if path not in layers and not isinstance(part, Quantizer) and id(part) not in merged
    }  # fmt: skip
    widest = sorted(layers.items(), key=lambda item: -bits_of(item[1].lowbit_weight))
    bits |= {path: _layer_bits(layer, seen) for path, layer in widest}
    return {path: -(-bits[path] // 8) for path, _ in module.named_modules() if bits.get(path)}


def float_bytes(module: nn.Module) -> int:
    """Bytes of the float network that was converted: parameters and statistics as float32."""
    seen: set[int] = set()
    return 4 * sum(tensor.numel() for part in module.modules() for tensor in _floats(part, seen))


def _layer_bits(layer: LowBitLayer, seen: set[int]) -> int:
    found = 0
    if id(layer.weight) not in seen:
        seen.add(id(layer.weight))
        found += layer.weight.numel() * bits_of(layer.lowbit_weight)
    channels = layer.norm.num_features if layer.norm is not None else 0 if layer.bias is None else layer.bias.numel()
    return found + channels * bits_of(layer.lowbit_bias)


def bits_of(quantizer: Quantizer | None) -> int:
    """What a value of a tensor takes; 32 where it is float."""
    return _FLOAT if quantizer is None or not quantizer.ready else quantizer.stored_bits


def _floats(part: nn.Module, seen: set[int]) -> Iterator[Tensor]:
    """A module's own tensors of the float network, each once in a network."""
    statistics = ("running_mean", "running_var") if isinstance(part, _BatchNorm) else ()
    for name, tensor in (*part.named_parameters(recurse=False), *((n, getattr(part, n)) for n in statistics)):
        if tensor is not None and "lowbit" not in name and not isinstance(part, Quantizer) and id(tensor) not in seen:
            seen.add(id(tensor))
            yield tensor


def product_kind(layer: LowBitLayer, sum_bits: int | None) -> str:
    """Bits of a layer's input and weight codes and of their sum: ``8×4→15``, ``xnor→7`` of signs, or ``float``.

    Args:
        sum_bits: what the sums need; None leaves them out.
    """
    source, weight = layer.input_grid, layer.lowbit_weight
    if source is None or weight is None or not (source.ready and weight.ready):
        return "float"
    x, w = source.grid(), weight.grid()
    factors = "xnor" if x.binary and w.binary else f"{x.bits}×{w.bits}"
    return factors if sum_bits is None else f"{factors}→{sum_bits}"


def count_products(module: nn.Module, *arguments: Any) -> dict[str, int]:
    """Multiply-accumulates of each converted layer for one sample, by path, from one forward in evaluation.

    Args:
        arguments: those of the forward; samples on axis 0.
    """
    found: dict[str, int] = {}

    def count(path: str) -> Any:
        def hook(layer: Any, inputs: Any, output: Tensor) -> None:
            # A transposed layer multiplies every input by a weight's row, others every output by one.
            rows = inputs[0] if layer.out_axis == 1 else output
            found[path] = found.get(path, 0) + rows.numel() * layer.weight[0].numel()

        return hook

    hooks = [layer.register_forward_hook(count(path)) for path, layer in layers_of(module).items()]
    try:
        with in_evaluation(module), torch.no_grad():
            module(*arguments)
    finally:
        for hook in hooks:
            hook.remove()
    samples = next(len(leaf) for leaf in tree_leaves(arguments) if isinstance(leaf, Tensor))
    return {path: count // samples for path, count in found.items()}  # a layer may see several rows of a sample

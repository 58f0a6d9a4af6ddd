"""The modules of a packed network: words of signs or int8 codes for weights, and nothing that trains."""

from __future__ import annotations

from typing import Any, Self

import torch
from torch import Tensor, nn
from torch._prims_common import suggest_memory_format

from lightning_lowbit.errors import ConfigError, InvariantError, UnsupportedModelError
from lightning_lowbit.export.bits import Bits, Fold, Step
from lightning_lowbit.graph.ops import Kind
from lightning_lowbit.kernels.binary import (
    BinaryWeight,
    pack_images,
    pack_signs,
    weight_words,
    xnor_conv2d,
    xnor_linear,
)
from lightning_lowbit.kernels.popcount import WORD
from lightning_lowbit.modules.binary import along
from lightning_lowbit.modules.binary_layers import end_result, finished
from lightning_lowbit.modules.layers import padding_of, product_settings
from lightning_lowbit.numerics.affine import affine

__all__ = ["Packed", "PackedConv", "PackedEnd", "PackedLinear", "PackedNorm", "Passed", "linear_words"]


class Packed(nn.Module):
    """What the modules of a packed network share: it is for evaluation.

    Args:
        path: where it stands.
    """

    lowbit_kind = Kind.COMPUTE

    def __init__(self, path: str) -> None:
        super().__init__()
        self.path = path
        self.training = False

    def train(self, mode: bool = True) -> Self:
        if mode:
            raise ConfigError(
                f"{self.path}: a packed network holds signs and thresholds, which do not learn. Train the network that "
                "it was packed from, and pack that again."
            )
        return super().train(mode)

    def spec(self) -> dict[str, Any]:
        """What decides its results beside its tensors, in plain types."""
        tensors = {name: (str(tensor.dtype), tuple(tensor.shape)) for name, tensor in self.named_buffers()}
        return {"kind": type(self).__name__, "tensors": tensors}


class _PackedBinary(Packed):
    """A binary layer: words for its weight, and either thresholds or what stands between dots and floats.

    Args:
        path: where it stands.
        layer: the binary layer, for its geometry.
        tensors: its state by name; words, and low and flip or scale and bias, and shift.
        fold: what the thresholds contain; None gives float tensors.
        per_channel: the fold holds for channels on axis 1 only.
    """

    words: Tensor
    low: Tensor | None
    flip: Tensor | None
    scale: Tensor | None
    bias: Tensor | None
    shift: Tensor | None
    axis = -1  # of the outputs in the result, from the end

    def __init__(
        self, path: str, layer: Any, tensors: dict[str, Tensor], fold: Fold | None, per_channel: bool = False
    ) -> None:
        super().__init__(path)
        for name in ("words", "low", "flip", "scale", "bias", "shift"):
            self.register_buffer(name, tensors.get(name))
        self.fold, self.per_channel, self.site = fold, per_channel, layer.lowbit_input.site
        self.terms = layer.weight[0].numel()
        self.outputs = layer.weight.shape[0]
        self._kept: tuple[Tensor, int, BinaryWeight] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_kept": None}  # made again from the words

    def weight_as(self, terms: int) -> BinaryWeight:
        """The words as the kernels want them, made when they have changed."""
        words = self.words
        if self._kept is None or self._kept[0] is not words or self._kept[1] != words._version:
            self._kept = words, words._version, BinaryWeight(words, terms)
        return self._kept[2]

    def shifted(self, x: Tensor) -> Tensor:
        x = x if x.dtype == torch.float64 else x.float()
        return x if self.shift is None else x + along(self.shift, x, self.site)

    def threshold(self, spare: int = 0) -> tuple[Tensor, Tensor] | None:
        if self.low is None or self.flip is None:
            return None
        return self.low + spare if spare else self.low, self.flip

    def numbers(self, dot: Tensor) -> Tensor:
        return finished(dot, self.scale, self.bias, self.axis)

    def bits(self, words: Tensor, shape: tuple[int, ...], channels_last: bool = False) -> Bits:
        assert self.fold is not None
        assert self.flip is not None
        return Bits(words, shape, self.flip, self.fold, channels_last=channels_last)

    def spec(self) -> dict[str, Any]:
        steps = None if self.fold is None else [str(step) for step in self.fold.steps]
        return {**super().spec(), "terms": self.terms, "outputs": self.outputs, "steps": steps}

    def extra_repr(self) -> str:
        return f"{self.terms} signs to {self.outputs}, {'gives floats' if self.fold is None else 'gives signs'}"


class PackedLinear(_PackedBinary):
    """A linear layer of signs.

    Args:
        pixels: of the flattened images that it reads in the order of their planes; 0 where it reads features.
    """

    def __init__(
        self, path: str, layer: Any, tensors: dict[str, Tensor], fold: Fold | None, per_channel: bool = False,
        pixels: int = 0,
    ) -> None:  # fmt: skip
        super().__init__(path, layer, tensors, fold, per_channel)
        self.pixels = pixels
        held = self.words.shape[-1] * WORD if pixels else self.terms
        self.held, self.spare = held, held - self.terms  # the last words of planes may be filled in part: agreeing bits

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # the kernels choose among libraries
    def forward(self, input: Tensor) -> Tensor:
        shape, rows = input.shape, self._read(input)
        if self.per_channel and len(shape) != 2:
            raise UnsupportedModelError(
                f"{self.path}: its input has {len(shape)} axes, and what its thresholds contain counts channels along "
                "axis 1. Flatten the axes in front of it to one: x.flatten(0, -2)."
            )
        if self.fold is not None:
            words = xnor_linear(rows, self.weight_as(self.held), self.threshold(self.spare))
            return self.bits(words, (*shape[:-1], self.outputs))
        dot = xnor_linear(rows, self.weight_as(self.held))
        dot = dot - self.spare if self.spare else dot
        return self.numbers(dot).reshape(*shape[:-1], self.outputs)

    def _read(self, x: Tensor) -> Tensor:
        if isinstance(x, Bits):
            return x.read().reshape(-1, self.words.shape[-1])
        x = self.shifted(x).reshape(-1, self.terms)
        if not self.pixels:
            return pack_signs(x)
        return pack_images(x.reshape(len(x), self.terms // self.pixels, self.pixels, 1)).flatten(1)

    def spec(self) -> dict[str, Any]:
        return {**super().spec(), "pixels": self.pixels}


class PackedConv(_PackedBinary):
    """A convolution of signs along one or two axes."""

    def __init__(
        self, path: str, layer: Any, tensors: dict[str, Tensor], fold: Fold | None, per_channel: bool = False
    ) -> None:
        super().__init__(path, layer, tensors, fold, per_channel)
        self.axes = len(layer.kernel_size)
        self.axis = -1 - self.axes
        lead = (0,) if self.axes == 1 else ()
        self.stride = (*(1 for _ in lead), *layer.stride)
        self.dilation = (*(1 for _ in lead), *layer.dilation)
        self.padding: Any = (*((0, 0) for _ in lead), *padding_of(layer))
        self.groups, self.pad_value = layer.groups, layer.scheme.pad_value
        self.channels = layer.in_channels // layer.groups
        self.weight_last = _channels_last(layer.weight)

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # the kernels choose among libraries
    def forward(self, input: Tensor) -> Tensor:
        batched = input.dim() > self.axes + 1
        if self.fold is not None and not batched:
            raise UnsupportedModelError(f"{self.path}: got one image, expected a batch. Call it with x.unsqueeze(0).")
        last = input.channels_last if isinstance(input, Bits) else _channels_last(input)
        last = self.axes == 2 and (last or self.weight_last)
        planes = input.read() if isinstance(input, Bits) else self._packed(input, batched)
        result = xnor_conv2d(
            planes, self.weight_as(self.channels), stride=self.stride, padding=self.padding, dilation=self.dilation,
            groups=self.groups, pad_value=self.pad_value, threshold=self.threshold(),
        )  # fmt: skip
        if self.fold is not None:
            size = result.shape[2:] if self.axes == 2 else result.shape[3:]
            return self.bits(result, (result.shape[0], self.outputs, *size), last)
        result = result.squeeze(2) if self.axes == 1 else result
        result = result if batched else result.squeeze(0)
        # Float code behind it may add up in the order of memory.
        return self.numbers(result.contiguous(memory_format=torch.channels_last) if last and batched else result)

    def _packed(self, x: Tensor, batched: bool) -> Tensor:
        x = self.shifted(x)
        x = x if batched else x.unsqueeze(0)
        return pack_images(x.unsqueeze(2) if self.axes == 1 else x, self.groups)

    def spec(self) -> dict[str, Any]:
        names = ("stride", "dilation", "padding", "groups", "pad_value")
        return {**super().spec(), **{name: getattr(self, name) for name in names}}


class PackedEnd(Packed):
    """A first or last layer in 8 bits: int8 weights, an int32 bias on the grid of the sums, and two steps.

    Args:
        path: where it stands.
        layer: the layer, for its geometry.
        tensors: weight, bias, step (of the input's grid) and unit (of the sums), both powers of two.
    """

    weight: Tensor
    bias: Tensor | None
    step: Tensor
    unit: Tensor

    def __init__(self, path: str, layer: Any, tensors: dict[str, Tensor]) -> None:
        super().__init__(path)
        for name in ("weight", "bias", "step", "unit"):
            self.register_buffer(name, tensors.get(name))
        self.qmax = layer.lowbit_input.qmax
        self.settings = product_settings(layer)

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # the kernels choose among libraries
    def forward(self, input: Tensor) -> Tensor:
        x = input if input.dtype == torch.float64 else input.float()
        codes = torch.round(x / self.step).clamp_(-self.qmax, self.qmax).to(torch.int8)
        return end_result(codes, self.weight, self.bias, self.unit, self.settings)

    def spec(self) -> dict[str, Any]:
        return {**super().spec(), **self.settings}


class PackedNorm(Packed):
    """A batch norm that no threshold contains: x a + b."""

    lowbit_kind = Kind.BATCH_NORM
    a: Tensor
    b: Tensor

    def __init__(self, path: str, tensors: dict[str, Tensor]) -> None:
        super().__init__(path)
        self.register_buffer("a", tensors["a"])
        self.register_buffer("b", tensors["b"])

    def forward(self, input: Tensor) -> Tensor:
        return affine(input, self.a, self.b)


class Passed(Packed):
    """In the place of a norm or a rectifier that is part of a layer's thresholds: signs pass."""

    lowbit_kind = Kind.KEEP

    def __init__(self, path: str, producer: str) -> None:
        super().__init__(path)
        self.producer = producer

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # nothing to compile
    def forward(self, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if not isinstance(input, Bits):
            raise InvariantError(
                f"{self.path}: got a tensor of numbers, but its own are part of the thresholds of {self.producer} "
                "since the network was packed. Call the packed network as a whole."
            )
        return input.passed(Step("module", (self.path,)))

    def extra_repr(self) -> str:
        return f"part of {self.producer}"


def linear_words(weight: Tensor, pixels: int) -> Tensor:
    """A linear layer's signs as words (O, words); of flattened images (C, pixels) in the order of their planes.

    >>> linear_words(torch.tensor([[1.0, -1.0, -1.0, -1.0]]), pixels=2)  # two channels of two pixels
    tensor([[2, 3]])
    """
    if not pixels:
        return weight_words(weight)
    return pack_images(weight.reshape(len(weight), -1, pixels, 1)).flatten(1)


def _channels_last(x: Tensor) -> bool:
    return x.dim() == 4 and suggest_memory_format(x) == torch.channels_last

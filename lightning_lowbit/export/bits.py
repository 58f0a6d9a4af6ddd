"""What travels between the layers of a packed network: words of signs, in the shape of the float tensor they stand for.

Between two binary layers only signs matter. Whatever a float network does there (pools, norms, activations, views) is
part of the first layer's thresholds, so that the code in between finds nothing left to compute.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_lowbit.errors import InvariantError, UnsupportedModelError
from lightning_lowbit.kernels.binary import pool_signs

__all__ = ["Bits", "Fold", "Step", "step_of"]


@dataclass(frozen=True)
class Step:
    """One operation between a layer and the layers that read its signs: a function of torch or a module of ours.

    >>> print(Step("hardtanh", (-1.0, 1.0)))
    hardtanh(-1.0, 1.0)
    """

    name: str
    settings: tuple[Any, ...] = ()

    def __str__(self) -> str:
        return f"{self.name}({', '.join(map(repr, self.settings))})"


@dataclass(frozen=True)
class Fold:
    """What a layer's thresholds contain.

    Attributes:
        path: of the layer.
        steps: in the order in which they will run, up to the layers that read the signs.
        norm: which step is the batch norm, whose slope may turn signs around; -1 without.
    """

    path: str
    steps: tuple[Step, ...]
    norm: int = -1


class Bits(Tensor):
    """A float32 tensor to everyone who asks for its shape; stored as one bit a value.

    Attributes:
        words: int64 planes (N, words, H, W) of images, (N, words, 1, L) of signals, rows (M, words) of features.
        turned: of the layer that made them, bool per channel: larger sums give -1.
        fold: the operations that its thresholds stand for; ``done`` of them have run.
        channels_last: whether the tensor in their place would lie in memory so.
    """

    words: Tensor
    turned: Tensor
    fold: Fold
    done: int
    channels_last: bool

    @staticmethod
    def __new__(
        cls, words: Tensor, shape: Iterable[int], turned: Tensor, fold: Fold, done: int = 0, channels_last: bool = False
    ) -> Bits:
        made: Bits = Tensor._make_wrapper_subclass(cls, tuple(shape), dtype=torch.float32, device=words.device)
        return made

    def __init__(
        self,
        words: Tensor,
        shape: Iterable[int],
        turned: Tensor,
        fold: Fold,
        done: int = 0,
        channels_last: bool = False,
    ) -> None:
        self.words, self.turned, self.fold, self.done, self.channels_last = words, turned, fold, done, channels_last

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]  # torch's has another form
        return f"Bits({tuple(self.shape)} of {self.fold.path}, {self.done} of {len(self.fold.steps)} steps done)"

    def passed(self, step: Step) -> Bits:
        """The same signs behind a step that the thresholds contain."""
        self._expect(step)
        return self._next(self.words, self.shape)

    def read(self) -> Tensor:
        """The words, for a layer that takes signs."""
        if self.done < len(self.fold.steps):
            raise self._refused("a binary layer")
        return self.words

    def _next(self, words: Tensor, shape: Iterable[int]) -> Bits:
        return Bits(words, shape, self.turned, self.fold, self.done + 1, self.channels_last)

    def _expect(self, step: Step) -> None:
        if self.done == len(self.fold.steps) or self.fold.steps[self.done] != step:
            raise self._refused(str(step))

    def _pooled(self, step: Step) -> Bits:
        kernel, stride, padding, dilation, ceil_mode = step.settings
        turned = self.turned if self.fold.norm > self.done else torch.zeros_like(self.turned)
        if self.dim() == 3:  # of signals: one row each
            kernel, stride, dilation, padding = (1, kernel), (1, stride), (1, dilation), (0, padding)
        words = pool_signs(self.words, turned, kernel, stride, padding, dilation, ceil_mode)
        size = words.shape[3:] if self.dim() == 3 else words.shape[2:]
        return self._next(words, (*self.shape[:2], *size))

    def _viewed(self, name: str, shape: tuple[int, ...]) -> Bits:
        flat = (self.shape[0], math.prod(self.shape[1:]))
        if shape != flat:
            raise UnsupportedModelError(
                f"{self.fold.path}: its signs pass {name} to {shape}, expected {flat}, one row a sample. Write "
                "x.flatten(1) in front of the linear layer."
            )
        return self._next(self.words, shape)

    def _refused(self, what: str) -> InvariantError:
        steps = self.fold.steps
        expected = steps[self.done] if self.done < len(steps) else "a binary layer"
        return InvariantError(
            f"{self.fold.path}: {what} got its result, of which only signs were kept; expected {expected}, as in the "
            "forward that was followed when the network was packed. Call the packed network as a whole, and with the "
            "arguments' defaults."
        )

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return _act(func, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch's stub has no defaults
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        raise next(x for x in (*args, *_inside(args)) if isinstance(x, Bits))._refused(str(func))


@torch.compiler.disable  # type: ignore[untyped-decorator]  # words are nothing to compile
def _act(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What a function of torch does to signs."""
    if func in _LOOKS:
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs)
    name = _name(func)
    bits = args[0] if args else kwargs.get("input")
    step = step_of(name, args[1:], kwargs) if isinstance(bits, Bits) else None
    if step is None or not isinstance(bits, Bits):
        raise next(x for x in (*args, *kwargs.values(), *_inside(args)) if isinstance(x, Bits))._refused(name)
    bits._expect(step)
    if step.name in ("max_pool1d", "max_pool2d"):
        return bits._pooled(step)
    if step.name == "view":
        with torch._C.DisableTorchFunctionSubclass():
            shape = func(torch.empty(bits.shape, device="meta"), *args[1:], **_without_input(kwargs)).shape
        return bits._viewed(name, tuple(shape))
    passed = bits.passed(step)
    if name == "contiguous" and "memory_format" not in kwargs:
        passed.channels_last = False
    return passed


# What only looks at a tensor's description.
_LOOKS: frozenset[Any] = frozenset({
    Tensor.size, Tensor.dim, Tensor.ndimension, Tensor.numel, Tensor.nelement, Tensor.__len__, Tensor.is_floating_point,
    Tensor.is_complex, Tensor.get_device, Tensor.__repr__, torch.numel, torch.is_floating_point, torch.is_complex,
    *(
        getattr(Tensor, name).__get__
        for name in (
            "shape", "dtype", "device", "ndim", "requires_grad", "layout", "is_cuda", "is_cpu", "is_meta", "is_mps",
            "is_sparse", "is_quantized", "grad_fn", "is_leaf", "is_nested", "is_mkldnn", "is_xpu",
        )
    ),
})  # fmt: skip

# name -> the settings that thresholds depend on, with torch's defaults; those of a view show in its result.
_SETTINGS: dict[str, dict[str, Any]] = {
    "hardtanh": {"min_val": -1.0, "max_val": 1.0},
    "clamp": {"min": None, "max": None},
    "leaky_relu": {"negative_slope": 0.01},
    "prelu": {},
    "dropout": {"p": 0.5, "training": True},
    "max_pool1d": {
        "kernel_size": None, "stride": None, "padding": 0, "dilation": 1, "ceil_mode": False, "return_indices": False,
    },
    "max_pool2d": {
        "kernel_size": None, "stride": None, "padding": 0, "dilation": 1, "ceil_mode": False, "return_indices": False,
    },
    "view": {},
    "same": {},
}  # fmt: skip
_ALIASES = {
    "clip": "clamp", "dropout1d": "dropout", "dropout2d": "dropout", "dropout3d": "dropout", "flatten": "view",
    "reshape": "view", "contiguous": "same", "float": "same", "clone": "same", "detach": "same",
}  # fmt: skip


def step_of(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Step | None:
    """The step that a function of torch is, given its arguments behind the tensor; None where it is none.

    >>> print(step_of("clamp_", (-1,), {"max": 1}), step_of("tanh", (), {}))
    clamp(-1, 1) None
    """
    name = name.rstrip("_")
    name = _ALIASES.get(name, name)
    settings = _SETTINGS.get(name)
    if settings is None:
        return None
    given = {
        **settings,
        **dict(zip(settings, args, strict=False)),
        **{k: v for k, v in kwargs.items() if k in settings},
    }
    if name == "dropout":
        return None if given["training"] else Step(name)
    if name in ("max_pool1d", "max_pool2d"):
        return None if given.pop("return_indices") else Step(name, _window(name, given))
    numbers = all(isinstance(value, (int, float)) or value is None for value in given.values())
    return Step(name, tuple(given.values())) if numbers else None


def _window(name: str, given: dict[str, Any]) -> tuple[Any, ...]:
    """Kernel, stride, padding, dilation and ceil_mode, one number or one per axis."""
    given["stride"] = given["stride"] or given["kernel_size"]
    pairs = [tuple(value) if isinstance(value, (tuple, list)) else value for value in given.values()]
    if name == "max_pool1d":
        pairs = [value[0] if isinstance(value, tuple) else value for value in pairs]
    return tuple(pairs)


def _name(func: Any) -> str:
    return str(getattr(func, "__name__", func))


def _inside(args: tuple[Any, ...]) -> list[Any]:
    """What lists among the arguments hold, as of torch.cat."""
    return [x for value in args if isinstance(value, (tuple, list)) for x in value]


def _without_input(kwargs: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in kwargs.items() if name != "input"}

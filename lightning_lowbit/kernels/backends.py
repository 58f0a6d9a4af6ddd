"""Which backend computes the integer products: asked for by argument, block or environment, used only after a probe.

Libraries do not promise exact int8 products. Without dot-product instructions the CPU's kernels add pairs of
products in 16 bits, saturate, and return wrong sums without an error. So each backend must first match `reference`
on operands made to show that, once per process and dtype of the first operand; one that does not is passed over for
the next that does.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import Tensor

from lightning_lowbit.errors import ConfigError, nearest
from lightning_lowbit.kernels import cpu, cuda, ledger, reference, simulate
from lightning_lowbit.kernels.geometry import Geometry, geometry

__all__ = ["BACKENDS", "ENVIRONMENT", "Backend", "asked", "choose", "use"]

ENVIRONMENT = "LIGHTNING_LOWBIT_BACKEND"


class Backend(Protocol):
    """Four products of int8; int32, int64, or float32 where that is exact. No operand and no result is empty."""

    def matmul(self, a: Tensor, b: Tensor) -> Tensor:
        """(M, K) times (K, N); a may be uint8."""

    def conv2d(self, x: Tensor, w: Tensor, geo: Geometry, nonnegative: bool = False) -> Tensor:
        """The convolution; x may be uint8."""

    def conv2d_input(self, err: Tensor, w: Tensor, geo: Geometry) -> Tensor:
        """Its gradient with respect to the input."""

    def conv2d_weight(self, x: Tensor, err: Tensor, geo: Geometry) -> Tensor:
        """Its gradient with respect to the weight; x may be uint8."""


BACKENDS: dict[str, Backend] = {"reference": reference, "simulate": simulate, "int8": cpu, "cuda": cuda}
_DEVICE = {"int8": "cpu", "cuda": "cuda"}
_FIRST = {"cpu": "int8", "cuda": "cuda"}

_used: list[str] = []
_choices: dict[tuple[str, str, torch.dtype], Backend] = {}


@contextmanager
def use(backend: str) -> Iterator[None]:
    """Compute the integer products inside the block with this backend.

    Args:
        backend: "auto" (the fastest that is exact here), "reference" (int64), "simulate" (float32 under a proof),
            "int8" (CPU instructions) or "cuda".

    Raises:
        ConfigError: no such backend.
    """
    _check_name(backend, "use()")
    _used.append(backend)
    try:
        yield
    finally:
        _used.pop()


def choose(device: str, backend: str | None = None, dtype: torch.dtype = torch.int8) -> Backend:
    """The backend for tensors of a device type: argument, else innermost `use`, else environment, else the fastest.

    dtype is that of the first operand; with uint8 all but `conv2d_input` are probed, and may be asked for.
    """
    name = backend or asked()
    try:
        return _choices[name, device, dtype]
    except KeyError:
        where = "backend=" if backend else "use()" if _used else ENVIRONMENT
        return _choices.setdefault((name, device, dtype), _resolve(name, device, dtype, where))


def asked() -> str:
    """The backend that the innermost `use`, else the environment, names; else "auto"."""
    return _used[-1] if _used else os.environ.get(ENVIRONMENT, "auto")


def _check_name(name: str, where: str) -> None:
    if name not in (*BACKENDS, "auto"):
        raise ConfigError(f"{where}: {name!r} is not a backend.{nearest(name, (*BACKENDS, 'auto'))}")


def _resolve(name: str, device: str, dtype: torch.dtype, where: str) -> Backend:
    _check_name(name, where)
    if _DEVICE.get(name, device) != device:
        raise ConfigError(
            f"{where}: the backend {name!r} works on {_DEVICE[name]} tensors, got {device}; "
            "ask for 'auto', or move the model"
        )
    fallbacks = ("simulate", "reference")
    if name == "auto":
        names = (*((_FIRST[device],) if device in _FIRST else ()), *fallbacks)
    else:
        names = (name, *fallbacks[fallbacks.index(name) + 1 :]) if name in fallbacks else (name, *fallbacks)
    for candidate in names:
        refusal = _refusal(candidate, device, dtype)
        if refusal is None:
            break
        ledger.refusals[_on(candidate, dtype)] = refusal
    if name not in ("auto", candidate):
        refusal = ledger.refusals[_on(name, dtype)]
        warnings.warn(
            f"the backend {name!r} is not exact on this machine ({refusal}); {candidate!r} is used "
            "instead, with the same results",
            stacklevel=4,
        )
    return BACKENDS[candidate]


def _on(name: str, dtype: torch.dtype) -> str:
    return name if dtype is torch.int8 else f"{name} on uint8"


def _refusal(name: str, device: str, dtype: torch.dtype) -> str | None:
    """Why a backend must not be used on a device; None where it matches the reference."""
    backend = BACKENDS[name]
    if backend is reference:
        return None
    with ledger.silent():
        return _differs(backend, device, dtype)


def _pair(kind: str, dtype: torch.dtype, first: tuple[int, ...], second: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """A first operand of this dtype and an int8 one, whose pairs of products leave 16 bits, or random ones."""
    if kind == "random":
        generator, codes = torch.Generator().manual_seed(577), torch.iinfo(dtype)
        a = torch.randint(codes.min, codes.max + 1, first, dtype=dtype, generator=generator)
        return a, torch.randint(-128, 128, second, dtype=torch.int8, generator=generator)
    value, other = (int(number) for number in kind.split(" x "))
    return torch.full(first, value, dtype=dtype), torch.full(second, other, dtype=torch.int8)


_KINDS = {
    torch.int8: ("127 x 127", "127 x -127", "-128 x -128", "random"),
    # 0 saturates where it is computed as -128.
    torch.uint8: ("255 x 127", "255 x -128", "0 x -128", "random"),
}
_MATRICES = ((1, 33, 3), (17, 577, 9), (64, 576, 64), (64, 577, 40))
# A narrow and a wide layer with odd sizes, one with holes and stride, one in groups.
_LAYERS = (
    geometry((2, 16, 7, 7), (24, 16, 3, 3), 1, 1),
    geometry((2, 136, 5, 5), (16, 136, 3, 3), 1, 1),
    geometry((2, 9, 9, 8), (7, 9, 3, 2), 2, 1, (1, 2)),
    geometry((2, 16, 5, 5), (16, 8, 3, 3), 1, 1, 1, 2),
)  # fmt: skip


def _differs(backend: Backend, device: str, dtype: torch.dtype) -> str | None:
    try:
        for kind in _KINDS[dtype]:
            for m, k, n in _MATRICES:
                a, b = _pair(kind, dtype, (m, k), (n, k))
                if not torch.equal(_host(backend.matmul(a.to(device), b.to(device).t())), reference.matmul(a, b.t())):
                    return f"wrong matrix product of {kind}, {m}x{k}x{n}"
            for geo in _LAYERS:
                x, w = _pair(kind, dtype, geo.input_size, geo.weight_size)
                err = _pair(kind, dtype, (1,), geo.output_size)[1]
                near = [x.to(device), w.to(device), err.to(device)]
                pairs = [
                    (backend.conv2d(near[0], near[1], geo), reference.conv2d(x, w, geo)),
                    (backend.conv2d_weight(near[0], near[2], geo), reference.conv2d_weight(x, err, geo)),
                ]
                if dtype is torch.int8:
                    err = _pair(kind, dtype, geo.output_size, (1,))[0]
                    found = backend.conv2d_input(err.to(device), near[1], geo)
                    pairs.append((found, reference.conv2d_input(err, w, geo)))
                if not all(torch.equal(_host(found), expected) for found, expected in pairs):
                    return f"wrong convolution of {kind}"
    # Private operators: a build without them, or with another signature, may raise anything.
    except Exception as error:
        return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
    return None


def _host(x: Tensor) -> Tensor:
    return x.to("cpu", torch.int64)

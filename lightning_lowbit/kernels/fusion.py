"""Run a chain of elementwise operations as if it were one pass: compiled, or over slices that stay in cache."""

from __future__ import annotations

import functools
import importlib.util
import os
import shutil
import sys
import warnings
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode

from lightning_lowbit.errors import ConfigError, nearest
from lightning_lowbit.kernels import ledger

__all__ = ["Chain", "compile_policy", "flat_as", "is_dense", "route", "run", "same_order"]

Chain = Callable[..., None]
"""``chain(numbers, constant, *tensors)`` writes in place into some of the 1-D tensors, element by element."""

ENVIRONMENT = "LIGHTNING_LOWBIT_COMPILE"
_POLICIES = ("auto", "always", "never")
_SLICE = 1 << 18  # elements per thread and pass: few calls, and the operands of one slice stay near
_COMPILE_FROM = 1 << 15  # below, entering compiled code takes longer than the slices
_COMPILE_LEAST = 64  # more than the numbers of any chain: no compiled size is mistaken for theirs

chosen_policies: list[str] = []
_entered: set[Callable[..., None]] = set()


@contextmanager
def compile_policy(policy: str) -> Iterator[None]:
    """Choose, inside the block, when the elementwise kernels are compiled; the results are equal bit for bit.

    Outside of any block the environment variable LIGHTNING_LOWBIT_COMPILE decides, and without it "auto".

    Args:
        policy: "auto" (large tensors, where a compiler is found), "always" (small ones too) or "never".

    Raises:
        ConfigError: no such policy.
    """
    chosen_policies.append(_checked(policy, "compile_policy()"))
    try:
        yield
    finally:
        chosen_policies.pop()


def _checked(policy: str, where: str) -> str:
    if policy not in _POLICIES:
        raise ConfigError(f"{where}: {policy!r} is not a policy.{nearest(policy, _POLICIES)}")
    return policy


def route(x: Tensor) -> str:
    """How a chain over x runs: "compiled", "sliced" (CPU), or "reference": by somebody else's compiler or none."""
    if torch.compiler.is_compiling() or type(x) not in (Tensor, torch.nn.Parameter) or torch._C._get_tracing_state():
        return "reference"
    policy = chosen_policies[-1] if chosen_policies else _checked(os.environ.get(ENVIRONMENT, "auto"), ENVIRONMENT)
    least = {"auto": _COMPILE_FROM, "always": _COMPILE_LEAST, "never": sys.maxsize}[policy]
    # A mode that watches operations would see none of them in compiled code.
    if x.numel() >= least and _compiler_found(x.device.type) and _get_current_dispatch_mode() is None:
        return "compiled"
    return "sliced" if x.device.type == "cpu" else "reference"


@functools.cache
def _compiler_found(device: str) -> bool:
    if device == "cpu":
        compiler = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")
        return shutil.which("cl" if sys.platform == "win32" else compiler) is not None
    return device == "cuda" and importlib.util.find_spec("triton") is not None


def is_dense(x: Tensor) -> bool:
    """Whether the elements fill one stretch of memory, in whatever order of the axes."""
    if x.is_contiguous():
        return True
    expected = 1
    for stride, size in sorted(zip(x.stride(), x.shape, strict=True)):
        if size > 1:
            if stride != expected:
                return False
            expected *= size
    return True


def same_order(x: Tensor, like: Tensor) -> bool:
    """Whether two tensors of one shape store their elements in the same order."""
    return x.stride() == like.stride() or (x.is_contiguous() and like.is_contiguous())


def flat_as(x: Tensor, like: Tensor) -> Tensor:
    """x in one dimension, in the order of ``like``'s memory (dense, same shape): a view, or a copy if x differs."""
    if not same_order(x, like):
        x = torch.empty_like(like, dtype=x.dtype).copy_(x)
    return x.as_strided((x.numel(),), (1,))


def run(
    chain: Chain,
    constant: Hashable,
    numbers: Callable[..., tuple[int, ...]],
    setting: tuple[Hashable, ...],
    shift: int | Tensor,
    tensors: Sequence[Tensor | None],
    compiled: bool,
) -> None:
    """Call ``chain`` with ``numbers(*setting, shift)`` over flat tensors of equal length.

    Args:
        constant: compiled into the loop; not a number, which torch would make a variable of the loop.
        numbers: ints that depend on the shift, the same for all shifts below 0 and from 63 on; read from a table on
            the device, so that no value of a shift is compiled in or waited for.
        tensors: 1-D of equal length, 0-dim, or None.
        compiled: as `route` says.
    """
    if compiled and _run_compiled(chain, constant, numbers, setting, shift, tensors):
        return
    row = numbers(*setting, min(max(int(shift), 0), 63))
    length = max(x.numel() for x in tensors if x is not None)
    size = _SLICE * torch.get_num_threads()
    if length <= size:
        chain(row, constant, *tensors)
        return
    for start in range(0, length, size):
        chain(row, constant, *(x[start : start + size] if x is not None and x.dim() else x for x in tensors))


def _run_compiled(
    chain: Chain,
    constant: Hashable,
    numbers: Callable[..., tuple[int, ...]],
    setting: tuple[Hashable, ...],
    shift: int | Tensor,
    tensors: Sequence[Tensor | None],
) -> bool:
    device = next(x.device for x in tensors if x is not None)
    name = f"compiled {chain.__name__.strip('_')} ({constant}) on {device.type}"
    if name in ledger.refusals:
        return False
    place = torch.as_tensor(shift, device=device).detach().clamp(0, 63).reshape(1)
    row = _table(numbers, setting, device).index_select(1, place)
    key = tuple(None if x is None else x.dtype for x in tensors)
    loop = _loop(chain, constant, key, device.type)
    try:
        if loop in _entered:
            loop(row, *tensors)
        else:
            with warnings.catch_warnings():  # torch's own, while it imports its compiler
                warnings.simplefilter("ignore")
                if _differs(loop, chain, constant, numbers, setting, tensors):
                    ledger.refusals[name] = "the compiled loop writes other bits"
                    return False
                loop(row, *tensors)
            _entered.add(loop)
    except Exception as error:  # whatever a missing or broken compiler raises; a wrong call fails in slices again
        ledger.refusals[name] = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        return False
    return True


def _differs(
    loop: Callable[..., None],
    chain: Chain,
    constant: Hashable,
    numbers: Callable[..., tuple[int, ...]],
    setting: tuple[Hashable, ...],
    tensors: Sequence[Tensor | None],
) -> bool:
    """Whether a compiled loop leaves other bits than its chain.

    torch 2.13 keeps compiled code on disk under keys without the width of vectors: what a machine with AVX-512 left
    there is wrong on one with AVX2, in every second half of 16 numbers.
    """
    generator = torch.Generator().manual_seed(577)
    operands: list[Tensor | None] = []
    for x in tensors:
        if x is None or x.dim() == 0:
            operands.append(x)
        else:
            most = 100 if x.element_size() == 1 else 10_000
            # Longer than a vector of any machine, with a rest.
            random = torch.randint(-most, most, (4 * _COMPILE_LEAST + 7,), generator=generator)
            operands.append(random.to(x.device, x.dtype))
    for shift in (0, 4, 9):
        left, right = ([x if x is None else x.clone() for x in operands] for _ in range(2))
        device = next(x.device for x in operands if x is not None)
        loop(_table(numbers, setting, device)[:, shift : shift + 1].contiguous(), *left)
        chain(numbers(*setting, shift), constant, *right)
        if not all(a is b or torch.equal(a, b) for a, b in zip(left, right, strict=True)):  # type: ignore[arg-type]
            return True
    return False


@functools.cache
def _table(numbers: Callable[..., tuple[int, ...]], setting: tuple[Any, ...], device: torch.device) -> Tensor:
    """(numbers, 64 shifts)"""
    rows = [numbers(*setting, shift) for shift in range(64)]
    dtype = torch.int32 if all(abs(value) < 2**31 for row in rows for value in row) else torch.int64
    return torch.tensor(rows, dtype=dtype, device=device).t().contiguous()


@functools.cache
def _loop(chain: Chain, constant: Hashable, dtypes: tuple[Any, ...], device: str) -> Callable[..., None]:
    """One compiled copy for each combination: sizes and shifts are arguments, so that a copy stays one."""

    def loop(row: Tensor, *tensors: Tensor | None) -> None:
        chain(row.unbind(), constant, *tensors)

    # fullgraph and isolated: beyond torch's limit of recompilations it would run op by op with no more than a line
    # in a log, and all copies would share one limit.
    # The width of vectors, named, is part of the key under which torch keeps compiled code on disk; without it a
    # machine with AVX2 may be given what one with AVX-512 left there, which is wrong on every second eight numbers.
    width = {"AVX2": 256, "AVX512": 512}.get(torch.backends.cpu.get_cpu_capability())
    options = {"cpp.simdlen": width} if device == "cpu" and width else None
    compiled: Callable[..., None] = torch.compile(  # type: ignore[call-overload]  # the overloads lack the last one
        loop, dynamic=True, fullgraph=True, isolate_recompiles=True, options=options
    )
    return compiled

"""A network against its integer program: every value that both have, code by code, on the batches of a validation.

The network's side is the forward that validation ran, watched; the program's side is its runtime. They share no
arithmetic: what is done here is to scale values by powers of two and compare them.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map

from lightning_lowbit.errors import ConfigError
from lightning_lowbit.export.lowering import lowering_of
from lightning_lowbit.export.program import IntegerProgram, ProgramError
from lightning_lowbit.export.record import in_evaluation
from lightning_lowbit.export.verify_compare import Comparison
from lightning_lowbit.export.verify_observe import Observer, fits
from lightning_lowbit.export.verify_program import parting
from lightning_lowbit.export.verify_report import Certificate, Difference

__all__ = ["Certificate", "Difference", "verify"]


def verify(
    module: nn.Module, program: IntegerProgram, batches: Iterable[Any], *, tolerance: float = 1e-3
) -> Certificate:
    """Compare a network with its program: operations with what the network lowers to, and codes batch by batch.

    Behind a float island, where two libraries may differ in the last bit, integer regions are run from the network's
    own codes and compared exactly; how many codes the program, run from the input, has other is counted.

    Args:
        module: converted, trained or calibrated; it runs in evaluation and is left in the mode that it was in.
        program: from ``lower(module, ...)``, or from its file.
        batches: tensors, tuples of the forward's arguments, or what a loader gives, (inputs, labels); a tensor is one
            batch.
        tolerance: of floats behind islands, relative to the largest value of their tensor.
    Raises:
        ConfigError: the network runs in float, the program is of another network, or a batch does not fit it.
    """
    if not isinstance(program, IntegerProgram) or not isinstance(module, nn.Module):
        raise ConfigError(
            f"verify: got a {type(module).__name__} and a {type(program).__name__}, expected verify(module, program, "
            "batches); a program's file is read by IntegerProgram.load(path)."
        )
    if not tolerance >= 0:
        raise ConfigError(f"verify: got tolerance={tolerance!r}, expected a number of 0 or more.")
    given = _arguments(program, [batches] if isinstance(batches, Tensor) else batches)
    first = next(given, None)
    if first is None:
        raise ConfigError("verify: got no batch, expected at least one. Give a loader, or a list of tensors.")
    comparison, hasher, number = Comparison(program, tolerance), hashlib.sha256(), 0
    with in_evaluation(module):
        lowering = lowering_of(module, _on_device(first, module))
        parted = parting(program, lowering.program)
        paths = [node.path for node in lowering.small.nodes]
        observe = Observer(module, program, lowering.sources)
        for number, arguments in enumerate(itertools.chain([first], given), 1):
            network, recording = observe(_on_device(arguments, module))
            _require_calls(paths, [node.path for node in recording.nodes], number - 1)
            inputs = [x.detach().cpu() for x in _tensors(arguments)]
            _feed(hasher, dict(enumerate(inputs)))
            try:
                comparison.batch(number - 1, [x.numpy() for x in inputs], network)
            except ProgramError:
                if parted is None:
                    raise
                break  # a program that differs need not run
    return _certificate(program, comparison, parted, number, _digests(module, program, hasher.hexdigest()))


def _certificate(
    program: IntegerProgram, found: Comparison, parted: Difference | None, batches: int, digests: dict[str, str]
) -> Certificate:
    ok = parted is None and found.observed is None
    return Certificate(
        ok=ok, end_to_end=ok and not found.islands, scheme=str(program.note.get("scheme")),
        model=str(program.note.get("model")), batches=batches, samples=found.samples, values=len(found.values),
        elements=found.elements, parted=parted, observed=found.observed, islands=found.islands,
        entries=found.entered(), tolerance=found.tolerance, float_error=found.float_error,
        accumulators=found.accumulators(), digests=digests,
    )  # fmt: skip


def _require_calls(expected: list[str], got: list[str], batch: int) -> None:
    if got != expected:
        pairs = itertools.zip_longest(expected, got, fillvalue="nothing")
        a, b = next((a, b) for a, b in pairs if a != b)
        raise ConfigError(
            f"batch {batch}: the network calls {b} where it called {a} when it was lowered. A program holds one way "
            "through the forward: keep branches apart from the values of a batch."
        )


# -- batches ---------------------------------------------------------------------------------------------------------
def _arguments(program: IntegerProgram, batches: Iterable[Any]) -> Iterator[tuple[Any, ...]]:
    """The forward's arguments, batch by batch; labels behind them are dropped, and so are empty batches."""
    for number, batch in enumerate(batches):
        if not isinstance(batch, (Tensor, tuple, list)):
            raise ConfigError(
                f"batch {number}: got a {type(batch).__name__}, expected a tensor, a tuple of the forward's arguments, "
                "or (inputs, labels). Give a generator that takes the inputs out of your batches."
            )
        parts = [batch] if isinstance(batch, Tensor) else list(batch)
        arguments: list[Any] = []
        while parts and len(_tensors(arguments)) < len(program.inputs):
            arguments.append(parts.pop(0))
        _require_fit(program, _tensors(arguments), number)
        if all(x.numel() for x in _tensors(arguments)):
            yield tuple(arguments)


def _require_fit(program: IntegerProgram, inputs: list[Tensor], number: int) -> None:
    shapes = [program.values[name].shape for name in program.inputs]
    wanted = ", ".join(_shape(shape) for shape in shapes)
    got = ", ".join(f"{str(x.dtype).removeprefix('torch.')} {list(x.shape)}" for x in inputs)
    if len(inputs) != len(shapes) or not all(
        x.dtype == torch.float32 and fits(x.shape, shape) for x, shape in zip(inputs, shapes, strict=True)
    ):
        raise ConfigError(
            f"batch {number}: got {got or 'no tensor'}, the program takes float32 {wanted}. Give the batches that the "
            "network's validation saw, as an iterable of them."
        )


def _shape(shape: tuple[int, ...]) -> str:
    return f"[{', '.join('N' if n == -1 else f'{-n} N' if n < 0 else str(n) for n in shape)}]"


def _tensors(arguments: Any) -> list[Tensor]:
    return [x for x in tree_flatten(arguments)[0] if isinstance(x, Tensor)]


def _on_device(arguments: tuple[Any, ...], module: nn.Module) -> tuple[Any, ...]:
    device = next((parameter.device for parameter in module.parameters()), torch.device("cpu"))
    return tuple(tree_map(lambda x: x.to(device) if isinstance(x, Tensor) else x, arguments))


# -- hashes ----------------------------------------------------------------------------------------------------------
def _digests(module: nn.Module, program: IntegerProgram, inputs: str) -> dict[str, str]:
    state = hashlib.sha256()
    _feed(state, {name: x for name, x in module.state_dict().items() if isinstance(x, Tensor)})
    return {"program": program.digest(), "module": state.hexdigest(), "inputs": inputs}


def _feed(hasher: Any, tensors: Mapping[Any, Tensor]) -> None:
    """Names, dtypes, shapes and bits."""
    for name, tensor in tensors.items():
        flat = tensor.detach().cpu().contiguous()
        hasher.update(f"{name} {str(flat.dtype).removeprefix('torch.')} {list(flat.shape)}\n".encode())
        hasher.update(np.ascontiguousarray(flat.reshape(-1).view(torch.uint8).numpy()).data)

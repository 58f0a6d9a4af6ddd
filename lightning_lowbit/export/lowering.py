"""A converted network as an integer program: recorded at two batch sizes, then written call by call."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from lightning_lowbit.errors import ConfigError, InvariantError, UnsupportedModelError, listed
from lightning_lowbit.export.builder import Held, ProgramBuilder
from lightning_lowbit.export.calls import joins, lower_call, name_of, takes_sizes
from lightning_lowbit.export.moves import BATCHES, symbolic
from lightning_lowbit.export.program import IntegerProgram
from lightning_lowbit.export.record import Node, Recording, Ref, in_evaluation, record
from lightning_lowbit.export.twins import alive, refs_of, require_same_calls, require_same_numbers, without_batch
from lightning_lowbit.modules.base import LowBitModule, Mode, low_bit_modules, switch_of
from lightning_lowbit.modules.convert import quantizers
from lightning_lowbit.modules.lowering import refuse
from lightning_lowbit.modules.quantizer import Quantizer

__all__ = ["Lowering", "lower", "lowering_of", "samples_of"]


def lower(module: nn.Module, example_input: Any = None) -> IntegerProgram:
    """The integers that a trained low-bit network computes with in evaluation, as a program without torch.

    Args:
        module: converted, trained or calibrated; a part of such a network is one too.
        example_input: a batch, or a tuple of the forward's arguments; default the module's ``example_input_array``.
            Only shapes matter, and which branches the forward takes.
            A batch of one keeps its batch axis, whatever ``squeeze()`` would do.
    Returns:
        a program whose ``run`` gives what ``module`` gives, bit for bit where no float island stands in between
        (``summary`` names them, ``verify`` proves the rest).
    Warns:
        code that takes numbers out of tensors, as an ``if`` does: the example alone says which way it goes.
    Raises:
        ConfigError: nothing is low-bit, nothing was trained or calibrated, or there is no example.
        UnsupportedModelError: a part has no integer form; the message names it and a way around.
    """
    lowering = lowering_of(module, example_input)
    if lowering.doubt:
        warnings.warn(lowering.doubt, stacklevel=2)
    return lowering.program


@torch.no_grad()
def lowering_of(module: nn.Module, example_input: Any = None) -> Lowering:
    """`lower`, with the way back from the program's values to the network's calls."""
    if not isinstance(module, nn.Module):
        raise ConfigError(f"lower: got a {type(module).__name__}, expected a converted module: lower(module, batch).")
    module = getattr(module, "_orig_mod", module)  # what torch.compile has wrapped
    _require_quantized(module)
    given = getattr(module, "example_input_array", None) if example_input is None else example_input
    if given is None:
        raise ConfigError(
            f"{type(module).__name__}: got no example input. Give a batch, lower(module, x), or set "
            "self.example_input_array."
        )
    with in_evaluation(module):
        return Lowering(module, _recorded_twice(module, given))


def samples_of(given: Any, batch: int) -> tuple[Any, ...]:
    """The arguments of a forward, tensors with so many samples: those given, repeated in turn."""
    arguments = tuple(given) if isinstance(given, (tuple, list)) else (given,)
    tensors = [value for value in tree_flatten(arguments)[0] if isinstance(value, Tensor)]
    if not tensors or any(value.dim() and not len(value) for value in tensors):
        raise ConfigError(
            f"lower: got an example of type {type(given).__name__} without samples, expected a float32 tensor with a "
            "batch, or a tuple of the forward's arguments."
        )

    def chosen(value: Any) -> Any:
        if not isinstance(value, Tensor) or value.dim() == 0 or not len(value):
            return value
        return value[torch.arange(batch, device=value.device) % len(value)]

    return tuple(tree_map(chosen, arguments))


def _recorded_twice(module: nn.Module, given: Any) -> list[Recording]:
    """At both batch sizes, the second time with other values where the network takes them."""
    small, large = (samples_of(given, n) for n in BATCHES)
    first = record(module, small)
    try:
        return [first, record(module, tree_map(_of_other_values, large))]
    except UnsupportedModelError:
        raise
    except Exception:  # a check of the user's that such values do not pass
        return [first, record(module, large)]


def _of_other_values(value: Any) -> Any:
    """Floats changed within their range, so that what a network takes from them in Python shows."""
    if not isinstance(value, Tensor) or not value.is_floating_point() or not value.dim():
        return value
    mixed = 0.6 * value + 0.4 * value.flip(tuple(range(value.dim())))
    if torch.equal(mixed, value):  # all the same, as torch.zeros is
        mixed = torch.rand(value.shape, generator=torch.Generator().manual_seed(0)).to(value)
    return mixed


def _require_quantized(module: nn.Module) -> None:
    switch = switch_of(module)
    if switch.mode is not Mode.LOWBIT or not switch.started:
        raise ConfigError(
            f"{type(module).__name__}: got a network that runs in float, expected one that was trained or calibrated "
            "in low bits. Fit it with QuantCallback(), load a low-bit checkpoint, or convert it with example_input=."
        )
    placed = [quantizer for _, quantizer in quantizers(module)]
    if placed and not any(q.ready or q.waits or not q.has_grid for q in placed):
        raise ConfigError(
            f"{placed[0].site.key}: nothing of {type(module).__name__} was calibrated. Train or calibrate it first."
        )


class Lowering:
    """One network's program.

    Attributes:
        program: what was written.
        sources: tensors of the recording (`Ref`) by the name of the value that holds them.
        doubt: what is to be said where the forward may take another way for other samples; else empty.
    """

    def __init__(self, module: nn.Module, recordings: Sequence[Recording]) -> None:
        self.module, self.small, self.large = module, *recordings
        self.scheme = next(part.scheme for _, part in low_bit_modules(module))
        require_same_calls(self.small, self.large)
        self.build = ProgramBuilder()
        self.held: dict[Ref, Any] = {}
        self.sources: dict[str, Ref] = {}
        self._enter()
        needed = alive(self.small)
        for node, twin in zip(self.small.nodes, self.large.nodes, strict=True):
            if node.index in needed:
                self._call(node, twin)
        self.program = self._leave()
        self.doubt = _doubt(list(dict.fromkeys(self.small.reads)))

    def shape(self, ref: Ref) -> tuple[int, ...]:
        return symbolic([self.small.shapes[ref], self.large.shapes[ref]], self.build.path)

    def _enter(self) -> None:
        self.inputs = []
        for ref in (ref for ref in self.small.shapes if ref.node < 0):
            if self.small.dtypes[ref] != torch.float32:
                raise UnsupportedModelError(
                    f"input {ref.position} is {self.small.dtypes[ref]}, expected float32: programs begin by quantizing "
                    "floats. Lower the part behind an embedding, or leave it out."
                )
            x = self.build.input(self.shape(ref))
            self.held[ref], self.sources[x.name] = x, ref
            self.inputs.append(x.name)

    def _call(self, node: Node, twin: Node) -> None:
        self.build.path, target = node.path, node.target
        require_same_numbers(node, twin, takes_sizes(target))
        args, kwargs = self._arguments(node, twin)
        if isinstance(target, Quantizer):
            result = self._quantizer(target, *args, **kwargs)
        elif isinstance(target, LowBitModule):
            result = target.scheme.lower(self.build, target, *args, **kwargs)
        else:
            self._require_floats(node)
            result = lower_call(self.build, node, twin, args, kwargs, self)
        results = result if isinstance(result, (tuple, list)) else (result,)
        for ref, value in zip(refs_of(node.result), results, strict=True):
            if isinstance(value, Held) and value.shape != self.shape(ref):
                raise InvariantError(
                    f"{node.path}: lowered to a tensor of shape {value.shape}, the network gives {self.shape(ref)}. "
                    "Please report it, with the model."
                )
            self.held[ref] = value
            if isinstance(value, Held) and value.count is None:
                self.sources.setdefault(value.name, ref)

    def _arguments(self, node: Node, twin: Node) -> Any:
        """Of a call, tensors as the program's; an output's size is told apart."""
        args, kwargs = tree_map(self._operand, (node.args, node.kwargs))
        args, kwargs = without_batch(twin, args, kwargs)
        args, kwargs = self._with_zeros(node, twin, args, kwargs)
        if isinstance(node.target, LowBitModule) and "input" in kwargs:
            args = (kwargs.pop("input"), *args)
        self.build.output_size = None
        if isinstance(node.target, (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)):
            self.build.output_size = args[1] if len(args) > 1 else kwargs.get("output_size")
            args, kwargs = args[:1], {}
        return args, kwargs

    def _with_zeros(self, node: Node, twin: Node, args: Any, kwargs: Any) -> Any:
        """Arguments of what joins tensors, and of ours: zeros among them become zeros of the program."""
        if not isinstance(node.target, LowBitModule) and not joins(node.target):
            return args, kwargs
        leaves, tree = tree_flatten((args, kwargs))
        others = tree_flatten((twin.args, twin.kwargs))[0]
        like = next(x for x in leaves if isinstance(x, Held))
        for index, (x, other) in enumerate(zip(leaves, others, strict=True)):
            if isinstance(x, Tensor):
                if bool(x.any()):
                    raise refuse(node.path, "it reads a tensor that the inputs do not reach", "Add it as a parameter.")
                leaves[index] = self.build.zeros(like, symbolic([x.shape, other.shape], node.path))
        return tree_unflatten(leaves, tree)

    def _require_floats(self, node: Node) -> None:
        """UnsupportedModelError where the network's own code goes over to other numbers than programs have."""
        given = {self.small.dtypes[ref] for ref in refs_of((node.args, node.kwargs))}
        for ref in refs_of(node.result):
            dtype = self.small.dtypes[ref]
            if dtype not in (torch.float32, *given) and not (dtype == torch.int64 and name_of(node.target) == "argmax"):
                raise refuse(node.path, f"it goes over to {dtype}", "Stay in float32, or lower the part before it.")

    def _quantizer(self, quantizer: Quantizer, x: Any, rectify: bool = False) -> Any:
        """One behind a module of the user's; what only stands in a quantizer's place is the scheme's to write."""
        if quantizer.has_grid:
            return self.build.snap(x, quantizer, rectify)
        return self.scheme.lower(self.build, quantizer, x, rectify)

    def _operand(self, value: Any) -> Any:
        held = self.held[value] if isinstance(value, Ref) else value
        return replace(held, word=value.word) if isinstance(held, Held) and held.word != value.word else held

    def _leave(self) -> IntegerProgram:
        self.build.path = "output"
        outputs: list[str] = []
        structure = self._structure(self.small.output, outputs)
        if not outputs:
            raise UnsupportedModelError(
                f"{type(self.module).__name__}: its forward returns no tensor that it computed."
            )
        ops = _needed(self.build.ops, outputs)
        used = {*self.inputs, *(op.output for op in ops)}
        note: dict[str, Any] = {"scheme": self.scheme.name or type(self.scheme).__name__}
        note["model"] = type(self.module).__name__
        if parts := _not_followed(self.module):
            note["not_followed"] = parts
        values = {name: value for name, value in self.build.values.items() if name in used}
        return IntegerProgram(tuple(ops), values, tuple(self.inputs), tuple(outputs), structure, note)

    def _structure(self, output: Any, outputs: list[str]) -> Any:
        """How the network puts its outputs together, each made floats at the end."""
        if isinstance(output, Ref):
            held = self.held[output]
            if held.value.dtype == "int":
                held = self.build.floats(held)
                self.sources.setdefault(held.name, output)
            if held.name not in outputs:
                outputs.append(held.name)
            return {"leaf": outputs.index(held.name)}
        if type(output) in (list, tuple):
            return {type(output).__name__: [self._structure(item, outputs) for item in output]}
        if type(output) is dict and all(isinstance(key, str) for key in output):
            return {"dict": {key: self._structure(item, outputs) for key, item in output.items()}}
        raise UnsupportedModelError(
            f"{type(self.module).__name__}: its forward returns a {type(output).__name__}, expected tensors that it "
            "computed, in tuples, lists and dicts. Return those, or lower a part of it."
        )


def _doubt(reads: list[str]) -> str:
    if not reads:
        return ""
    return (
        f"the forward takes numbers out of tensors ({listed(reads, 3)}), as an if does: the program has the calls that "
        "the example made. Other samples may need others: verify it on data that takes every way, or decide outside "
        "of forward."
    )


def _not_followed(module: nn.Module) -> list[str]:
    """Code within ``module`` that its conversion did not follow: path or class, place and reason."""
    conversion = switch_of(module).conversion
    inside = {type(module).__name__, *dict(module.named_modules())}
    # The record has float functions as well, which are no ways that a forward may take.
    parts = [note for note in getattr(conversion, "uncovered", ()) if not note.endswith(" stays float")]
    return [part for part in parts if part.partition(" ")[0] in inside]


def _needed(ops: Sequence[Any], outputs: Sequence[str]) -> list[Any]:
    """Operations that an output depends on."""
    wanted, kept = set(outputs), []
    for op in reversed(ops):
        if op.output in wanted:
            wanted.update(op.inputs)
            kept.append(op)
    return kept[::-1]

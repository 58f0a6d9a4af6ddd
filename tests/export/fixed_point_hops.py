"""A converted network's evaluation, hop by hop, against the integer operations that are to give the same numbers."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lightning_lowbit.export import fixed_point
from lightning_lowbit.export.fixed_point import IntegerUnit, encode, integer_input, integer_unit, run_unit
from lightning_lowbit.modules.elementwise import LowBitAdd, LowBitAvgPool, LowBitCat, LowBitOp, LowBitReLU
from lightning_lowbit.modules.fraclen import FraclenInput
from lightning_lowbit.modules.layers import LowBitLayer
from lightning_lowbit.modules.pooling import WINDOW, as_tuple


@dataclass(frozen=True)
class Tag:
    """What the integers know of a tensor: its label; of a mean also the sums and how many values each has."""

    label: int
    total: Tensor | None = None
    count: int | Tensor = 1


class Hops(TorchFunctionMode):
    """Follows labels through a forward; each layer and operation is computed again in integers and compared.

    Attributes:
        units: the layers' integers, by path, made once.
        seen: names of the checked modules' classes, with how often.
        backends: of the integer products.
    """

    def __init__(self, root: nn.Module, backends: tuple[str | None, ...] = ("reference", None)) -> None:
        super().__init__()
        self.root, self.backends = root, backends
        self.tags: dict[int, tuple[Tensor, Tag]] = {}  # the tensor stays alive, or its id would be another's
        self.given: dict[str, tuple[Any, ...]] = {}
        self.codes: dict[str, Tensor] = {}
        self.seen: dict[str, int] = {}
        self.checking = False
        layers = [module for module in root.modules() if isinstance(module, LowBitLayer)]
        self.units: dict[str, IntegerUnit] = {layer.path: integer_unit(layer) for layer in layers}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and not self.checking and id(result) not in self.tags:
            source = next((self.tag(arg) for arg in args if isinstance(arg, Tensor) and self.tag(arg)), None)
            if source is not None:
                self.mark(result, source)
        return result

    def tag(self, x: Tensor) -> Tag | None:
        found = self.tags.get(id(x))
        return None if found is None else found[1]

    def mark(self, x: Tensor, tag: Tag) -> None:
        self.tags[id(x)] = (x, tag)

    def run(self, x: Tensor) -> Tensor:
        """The network's evaluation; fails at the first hop that integers do not give."""
        handles = []
        for module in self.root.modules():
            if isinstance(module, (LowBitLayer, LowBitOp)):
                handles.append(module.register_forward_pre_hook(self._before, with_kwargs=True))
                handles.append(module.register_forward_hook(self._after, with_kwargs=True))
            if isinstance(module, FraclenInput):
                handles.append(module.register_forward_hook(self._quantized))
        try:
            with torch.no_grad(), self:
                result: Tensor = self.root(x)
        finally:
            for handle in handles:
                handle.remove()
        return result

    def _before(self, module: Any, args: Any, kwargs: Any) -> None:
        first = args[0] if args else next(iter(kwargs.values()))
        operands = list(first) if isinstance(first, (list, tuple)) else [x for x in args if isinstance(x, Tensor)]
        self.given[module.path] = tuple((x.clone(), self.tag(x)) for x in operands)  # it may work in place

    def _quantized(self, module: Any, args: Any, result: Tensor) -> None:
        self.codes[module.site.key] = result

    def _after(self, module: Any, args: Any, kwargs: Any, result: Tensor) -> None:
        self.checking = True
        try:
            kind, check = next((base, check) for base, check in _CHECKS.items() if isinstance(module, base))
            tag = check(self, module, args, kwargs, result)
        finally:
            self.checking = False
        self.seen[kind.__name__] = self.seen.get(kind.__name__, 0) + 1
        self.mark(result, tag)
        if getattr(module, "overwrites", False):
            assert torch.equal(args[0].double(), result.double()), f"{module.path}: its operand cannot hold the sum"
            self.mark(args[0], tag)

    def _layer(self, layer: Any, args: Any, kwargs: Any, result: Tensor) -> Tag:
        (given,), unit = self.given[layer.path], self.units[layer.path]
        codes = self._read(layer.lowbit_input, *given)
        for backend in self.backends:
            acc = run_unit(unit, codes, backend)
            assert acc.dtype == torch.int32
            assert int(acc.abs().max()) <= unit.bound
            if unit.scale is None:
                assert torch.equal(integers(result, unit.label, layer.path), acc), layer.path
            else:
                logits = (acc.double() * 2.0**-unit.label * unit.scale).to(result.dtype)
                assert torch.equal(logits, result), layer.path
        return Tag(unit.label)

    def _relu(self, op: LowBitReLU, args: Any, kwargs: Any, result: Tensor) -> Tag:
        ((x, tag),) = self.given[op.path]
        assert tag is not None
        if tag.total is not None:
            return Tag(tag.label, torch.relu(tag.total), tag.count)
        acc, found = integers(x, tag.label, op.path), integers(result, tag.label, op.path)
        clips = op.__dict__.get("rectified_by", ())
        if clips and all(q.ready and not q.signed for q in clips):  # they do its work
            assert torch.equal(found, acc), op.path
        else:
            assert torch.equal(found, fixed_point.relu6(acc, tag.label) if op.six else acc.relu()), op.path
        return tag

    def _add(self, op: LowBitAdd, args: Any, kwargs: Any, result: Tensor) -> Tag:
        (a, label_a), (b, label_b) = self._operands(op)
        total, label = fixed_point.add(a, label_a, b, label_b)
        assert torch.equal(integers(result, label, op.path), total), op.path
        return Tag(label)

    def _cat(self, op: LowBitCat, args: Any, kwargs: Any, result: Tensor) -> Tag:
        operands = self._operands(op)
        joined, label = fixed_point.concat([x for x, _ in operands], [own for _, own in operands], 1)
        assert torch.equal(integers(result, label, op.path), joined), op.path
        return Tag(label)

    def _pool(self, op: LowBitAvgPool, args: Any, kwargs: Any, result: Tensor) -> Tag:
        ((x, tag),) = self.given[op.path]
        assert tag is not None
        total, count = window_sums(op, integers(x, tag.label, op.path).long(), args[1:], kwargs)
        if isinstance(op.lowbit_output, FraclenInput):
            form = integer_input(op.lowbit_output)
            assert torch.equal(integers(result, form.fraclen, op.path), form.mean(total, tag.label, count).int())
            return Tag(form.fraclen)
        if isinstance(count, int) and op.__dict__.get("factor", 1.0) != 1.0:
            label = fixed_point.shift_mean(tag.label, count)
            assert op.__dict__["factor"] == 2.0 ** (label - tag.label) / count
            assert torch.equal(integers(result, label, op.path), total.int()), op.path
            return Tag(label)
        exact = total.double() * 2.0**-tag.label / count
        others = op.__dict__.get("read_by_others") is not None  # who get it rounded once
        assert torch.equal(result, exact.to(result.dtype) if others else exact), op.path
        return Tag(tag.label, total, count)

    def _operands(self, op: LowBitOp) -> list[tuple[Tensor, int]]:
        found = []
        for index, (x, tag) in enumerate(self.given[op.path]):
            quantizer = op._modules.get(f"lowbit_operand_{index}")
            if isinstance(quantizer, FraclenInput):
                found.append((self._read(quantizer, x, tag).int(), integer_input(quantizer).fraclen))
            else:
                assert tag is not None
                found.append((integers(x, tag.label, op.path), tag.label))
        return found

    def _read(self, quantizer: FraclenInput, x: Tensor, tag: Tag | None) -> Tensor:
        """Codes by integer operations, equal to those that evaluation multiplies."""
        form, key = integer_input(quantizer), quantizer.site.key
        if tag is None:  # the network's input
            codes = encode(x, form)
        elif tag.total is None:
            codes = form.codes(integers(x, tag.label, key), tag.label)
        else:
            count = tag.count if isinstance(tag.count, int) else tag.count.expand_as(tag.total).reshape(x.shape)
            codes = form.mean(tag.total.reshape(x.shape), tag.label, count)
        assert torch.equal(integers(self.codes[key], form.fraclen, key), codes.int()), key
        return codes


_CHECKS: dict[type, Any] = {
    LowBitLayer: Hops._layer, LowBitReLU: Hops._relu, LowBitAdd: Hops._add, LowBitCat: Hops._cat,
    LowBitAvgPool: Hops._pool,
}  # fmt: skip


def integers(x: Tensor, label: int, where: str) -> Tensor:
    """x 2^label as int32; fails where x is no multiple of 2^-label that int32 holds."""
    scaled = x.detach().double() * 2.0**label
    assert torch.equal(scaled, scaled.round()), f"{where}: not on the grid 2^-{label}"
    assert float(scaled.abs().max()) < 2**31, f"{where}: beyond int32"
    return scaled.to(torch.int32)


def window_sums(op: LowBitAvgPool, x: Tensor, args: Any, kwargs: Any) -> tuple[Tensor, int | Tensor]:
    """Sums of an average pool's windows and how many values each counts, from its definition."""
    given = {**dict(zip(WINDOW, args, strict=False)), **op.settings, **kwargs}
    if op.kind is None:
        axes = kwargs.get("dim", args[0] if args else None)
        return x.sum(axes, kwargs.get("keepdim", False)), math.prod(x.shape[axis] for axis in axes)
    dims, adaptive = op.kind
    if adaptive:
        assert set(as_tuple(given.get("output_size", args and args[0]), dims)) == {1}
        return x.sum(list(range(-dims, 0)), keepdim=True), math.prod(x.shape[-dims:])
    kernel, padding = as_tuple(given["kernel_size"], dims), as_tuple(given.get("padding", 0), dims)
    stride = as_tuple(given.get("stride") or kernel, dims)
    sides = [side for size in reversed(padding) for side in (size, size)]
    sums, ones = F.pad(x, sides), F.pad(torch.ones_like(x), sides, value=int(given.get("count_include_pad", True)))
    for axis, size, step in zip(range(-dims, 0), kernel, stride, strict=True):
        sums, ones = (t.unfold(axis, size, step).sum(-1) for t in (sums, ones))
    return sums, int(ones.max()) if ones.min() == ones.max() else ones

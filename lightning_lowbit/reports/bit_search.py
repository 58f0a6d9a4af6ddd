"""``plan_bits``: how many bits each layer gets, from what its quantization does to the outputs, under a budget."""

from __future__ import annotations

import copy
import dataclasses
import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from glob import escape
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lowbit.errors import ConfigError
from lightning_lowbit.graph.plan import Site, Union
from lightning_lowbit.modules.base import Scheme
from lightning_lowbit.modules.calibrate import calibrate
from lightning_lowbit.modules.convert import Pattern, is_converted, quantizers
from lightning_lowbit.modules.layers import LowBitLayer
from lightning_lowbit.modules.quantizer import Quantizer
from lightning_lowbit.reports.allocation import Item, allocate
from lightning_lowbit.reports.bit_plan import BitPlan, Planned, Whole
from lightning_lowbit.reports.cost import bits_of, count_products, float_bytes, layers_of, sizes
from lightning_lowbit.reports.effects import Effect
from lightning_lowbit.reports.sensitivity import measured, split, switchable
from lightning_lowbit.schemes import convert, registry, resolve

__all__ = ["plan_bits"]

_WEIGHTS, _ACTIVATIONS = "weight_bits", "act_bits"
_WHOLE = "all of them"
_LEAST_NOISE, _MOST_NOISE = 0.0, 1e12  # of outputs that are equal, or no numbers


def plan_bits(
    module: nn.Module,
    batches: Iterable[Any],
    scheme: Scheme | str = "tqt",
    *,
    size: int | float | None = None,
    bit_ops: int | float | None = None,
    widths: Sequence[int] = (2, 4, 8),
    skip: Pattern | Sequence[Pattern] = (),
    include: Pattern | Sequence[Pattern] | None = None,
    target: Callable[[Any], Tensor] | None = None,
) -> BitPlan:
    """Choose the bits of each layer: those that leave the least error in the outputs for a budget.

    The network is converted and calibrated once for each width; each tensor whose width the scheme can set alone is
    quantized alone, and what it does to the outputs is measured. ``size`` chooses widths of weights, ``bit_ops`` those
    of weights and of what layers read. Widths that the scheme holds fixed, such as those of a first layer, stay. Errors
    are taken to add up (`allocate`), and what the whole plan does is measured. Nothing is trained.

    Args:
        module: float; it is not changed.
        batches: as `sensitivity` takes them; kept in memory.
        scheme: name or instance with an option ``overrides``; its other options hold for all layers.
        size: of the parameters: bytes, or as a share (0..1) of float32.
        bit_ops: of the low-bit products, a sample (van Baalen et al., "Bayesian Bits", NeurIPS 2020): a number, or a
            share (0..1) of those with 8 x 8 bits throughout.
        widths: to choose from.
        skip, include: as `convert` takes them.
        target: gives the labels of a batch; default what stands behind the forward's arguments.
    Raises:
        ConfigError: not one budget, or one below what the fewest bits need; a scheme without widths of layers; a module
            that is converted.
    """
    chosen = resolve(scheme)
    _require(module, chosen, size, bit_ops, widths)
    options = (_WEIGHTS,) if bit_ops is None else (_WEIGHTS, _ACTIVATIONS)
    kept = [batches] if isinstance(batches, Tensor) else list(batches)
    skip, include = _paths(skip), None if include is None else _paths(include)
    with torch.random.fork_rng(devices=[]):  # a forward may draw in evaluation too
        return _searched(module, chosen, options, kept, widths, size, bit_ops, skip, include, target)


def _searched(
    module: nn.Module, chosen: Scheme, options: Sequence[str], kept: Sequence[Any], widths: Sequence[int],
    size: int | float | None, bit_ops: int | float | None, skip: tuple[str, ...], include: tuple[str, ...] | None,
    target: Callable[[Any], Tensor] | None,
) -> BitPlan:  # fmt: skip
    uniform = {width: _uniform(chosen, options, width) for width in widths}
    nets = {width: _converted(module, scheme, kept, skip, include) for width, scheme in uniform.items()}
    least = nets[min(widths)]  # where the most quantizers stand: wider tensors may pass as they come
    products = count_products(least, *split(least, kept[0], 0)[0])
    items, wholes = _measured(nets, options, products, kept, target)
    costs = _Costs(nets, _converted(module, chosen, kept, skip, include), items, products)
    most, words = costs.budget(size, bit_ops, float_bytes(least))
    cost = costs.size if bit_ops is None else costs.bit_ops

    def spent(whole: Whole) -> int:
        return whole.size if bit_ops is None else whole.bit_ops

    found = []
    for bits in _candidates(items, cost, most, sorted(widths)):
        planned = _planned(chosen, items, bits)
        net = _converted(module, planned, kept, skip, include)
        effect = measured(net, kept, {_WHOLE: switchable(net)}, target=target)[_WHOLE].effect()
        whole = Whole("plan", *_sums(net, products), effect)
        if spent(whole) <= most:
            found.append((_noise(effect), bits, planned, whole))
    # One width in the scheme's own options can round less often than the same width layer by layer.
    found += [
        (_noise(whole.effect), [width] * len(items), uniform[width], replace(whole, name="plan"))
        for width, whole in zip(widths, wholes, strict=True) if spent(whole) <= most
    ]  # fmt: skip
    if not found:
        needed = cost([min(widths)] * len(items))
        raise ConfigError(f"plan_bits: got a budget of {words}, {min(widths)} bits throughout need {needed:,.0f}.")
    _, bits, planned, whole = min(found, key=lambda one: one[0])
    return BitPlan(
        scheme=planned,
        skip=skip,
        include=include,
        rows=tuple(Planned(item, width) for item, width in zip(items, bits, strict=True)),
        wholes=(*wholes, whole),
        budget=words,
        notes=(f"budget: {words}", *_held(least, items)),
    )


def _candidates(
    items: Sequence[Item], cost: Callable[[Sequence[int]], float], most: float, widths: Sequence[int]
) -> list[list[int]]:
    """What to try: each width throughout that fits, and what it grows into."""
    found: list[list[int]] = []
    for width in widths:
        grown = allocate(items, cost, most, width)
        for bits in () if grown is None else (grown, [width] * len(items)):
            if bits not in found:
                found.append(bits)
    return found


# -- the scheme's widths -------------------------------------------------------------------------------------
def _fields(scheme: Scheme | type[Scheme]) -> set[str]:
    return {f.name for f in dataclasses.fields(scheme)} if dataclasses.is_dataclass(scheme) else set()


def _require(module: nn.Module, scheme: Scheme, size: Any, bit_ops: Any, widths: Sequence[int]) -> None:
    if is_converted(module):
        raise ConfigError(
            f"plan_bits: {type(module).__name__} is converted already. Give the float network, before convert or fit."
        )
    wanted = {"overrides", _WEIGHTS, _ACTIVATIONS}
    if not wanted <= _fields(scheme):
        able = sorted(name for name, cls in registry().items() if wanted <= _fields(cls))
        raise ConfigError(
            f"plan_bits: scheme {scheme.name!r} has one width for all layers. Those with overrides: {', '.join(able)}."
        )
    if (size is None) == (bit_ops is None):
        raise ConfigError(f"plan_bits: got size={size!r} and bit_ops={bit_ops!r}, expected one of the two.")
    given = bit_ops if size is None else size
    if not isinstance(given, (int, float)) or isinstance(given, bool) or not 0 < given < math.inf:
        raise ConfigError(f"plan_bits: got a budget of {given!r}, expected a number above 0, or a share such as 0.1.")
    if len(set(widths)) < 2:
        raise ConfigError(f"plan_bits: got widths={list(widths)!r}, expected two or more to choose from, as 2, 4, 8.")


def _uniform(scheme: Scheme, options: Sequence[str], width: int) -> Scheme:
    return scheme.replace(**dict.fromkeys(options, width))


def _planned(scheme: Scheme, items: Sequence[Item], bits: Sequence[int]) -> Scheme:
    """Exact paths first; the user's own overrides behind them, and own widths, for what was not chosen here."""
    overrides: dict[str, dict[str, Any]] = {}
    for item, width in zip(items, bits, strict=True):
        for path in item.paths:
            overrides.setdefault(escape(path), {})[item.option] = width
    own: Mapping[str, Mapping[str, Any]] = getattr(scheme, "overrides")  # noqa: B009  # of no base class
    for pattern, given in own.items():
        overrides[pattern] = {**given, **overrides.get(pattern, {})}
    return scheme.replace(overrides=overrides)


def _paths(patterns: Pattern | Sequence[Pattern]) -> tuple[str, ...]:
    several = [patterns] if isinstance(patterns, (str, type)) else list(patterns)
    if not all(isinstance(pattern, str) for pattern in several):
        raise ConfigError(f"plan_bits: got {several!r}, expected patterns of paths: a file cannot name a class.")
    return tuple(str(pattern) for pattern in several)


# -- measuring -----------------------------------------------------------------------------------------------
def _converted(module: nn.Module, scheme: Scheme, batches: Sequence[Any], skip: Any, include: Any) -> nn.Module:
    """A copy, calibrated on all batches."""
    net = copy.deepcopy(module).eval()

    def run() -> int:
        for number, batch in enumerate(batches):
            net(*split(net, batch, number)[0])
        return len(batches)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of widths that may not be chosen: the network that is trained says it again
        convert(net, scheme, skip=skip, include=include)
        calibrate(net, run)
    return net


def _measured(
    nets: Mapping[int, nn.Module],
    options: Sequence[str],
    products: Mapping[str, int],
    batches: Sequence[Any],
    target: Callable[[Any], Tensor] | None,
) -> tuple[list[Item], list[Whole]]:
    """What has a width of its own, and the networks with one width throughout.

    A quantizer that is absent at some width passes what another one rounded, and adds no error.
    """
    at = {}
    for width, net in nets.items():
        on = switchable(net)
        at[width] = {q.site.key: q for _, q in quantizers(net) if q in on}
    known = {key: quantizer for width in sorted(at, reverse=True) for key, quantizer in at[width].items()}
    free = {
        key: quantizer for key, quantizer in known.items()
        if (quantizer.site.role == "weight" or _ACTIVATIONS in options)
        and all(found[key].grid().bits == width for width, found in at.items() if key in found)
    }  # fmt: skip
    groups = _together(free)
    noise: dict[int, list[float]] = {}
    wholes = []
    for width, net in nets.items():
        runs = {str(n): {at[width][key] for key in keys if key in at[width]} for n, keys in enumerate(groups)}
        found = measured(net, batches, {_WHOLE: set(at[width].values()), **runs}, target=target)
        noise[width] = [_noise(found[str(number)].effect()) for number in range(len(groups))]
        wholes.append(Whole(f"{width} bits", *_sums(net, products), found[_WHOLE].effect()))
    items = []
    for number, keys in enumerate(groups):
        paths = tuple(dict.fromkeys(_path(free[key].site) for key in keys))
        option = _WEIGHTS if free[keys[0]].site.role == "weight" else _ACTIVATIONS
        items.append(Item(tuple(keys), paths, option, {width: noise[width][number] for width in nets}))
    return items, wholes


def _together(free: Mapping[str, Quantizer]) -> list[list[str]]:
    """Keys by width: tensors of a tie, and those that one path names in one option."""
    union = Union()
    named: dict[tuple[str, bool], list[str]] = {}
    for key, quantizer in free.items():
        named.setdefault((_path(quantizer.site), quantizer.site.role == "weight"), []).append(key)
        union.join([key, *(member.site.key for member in quantizer.group if member.site.key in free)])
    for keys in named.values():
        union.join(keys)
    found: dict[str, list[str]] = {}
    for key in free:
        found.setdefault(union.find(key), []).append(key)
    return list(found.values())


def _path(site: Site) -> str:
    """What a person calls a tensor by: the one layer that reads it, else what it comes from."""
    return site.readers[0] if len(site.readers) == 1 and not site.operations else site.path


def _noise(effect: Effect) -> float:
    if effect.sqnr is None or math.isnan(effect.sqnr):
        return _MOST_NOISE
    return _LEAST_NOISE if effect.sqnr == math.inf else min(10 ** (-effect.sqnr / 10), _MOST_NOISE)


def _sums(net: nn.Module, products: Mapping[str, int]) -> tuple[int, int]:
    """Bytes and bit operations."""
    return sum(sizes(net).values()), sum(_bit_ops(layer, products.get(p, 0)) for p, layer in layers_of(net).items())


def _bit_ops(layer: LowBitLayer, products: int) -> int:
    return products * bits_of(layer.lowbit_weight) * bits_of(layer.input_grid)


def _held(net: nn.Module, items: Sequence[Item]) -> list[str]:
    """Layers whose weights have the bits that the scheme says."""
    chosen = {key for item in items for key in item.keys}
    held = [
        f"{path} ({bits_of(layer.lowbit_weight)})" for path, layer in layers_of(net).items()
        if layer.lowbit_weight is not None and layer.lowbit_weight.site.key not in chosen
    ]  # fmt: skip
    return [f"weights on bits that the scheme's other options set: {', '.join(held)}"] if held else []


class _Costs:
    """Of widths, without converting: a layer costs what it costs where all are of that width, what is not chosen what
    it costs in ``base``.
    """

    def __init__(
        self, nets: Mapping[int, nn.Module], base: nn.Module, items: Sequence[Item], products: Mapping[str, int]
    ) -> None:
        of_key = {key: number for number, item in enumerate(items) for key in item.keys}
        self.bytes = {width: sizes(net) for width, net in nets.items()}
        self.layers = []  # path, products, numbers of the items of weight and input or their bits
        for (path, layer), own in zip(layers_of(nets[min(nets)]).items(), layers_of(base).values(), strict=True):
            both = ((layer.lowbit_weight, own.lowbit_weight), (layer.input_grid, own.input_grid))
            sides = [(None if q is None else of_key.get(q.site.key), bits_of(in_base)) for q, in_base in both]
            self.layers.append((path, products.get(path, 0), sides))
        chosen = {path for path, _, sides in self.layers if sides[0][0] is not None}
        self.rest = sum(size for path, size in sizes(base).items() if path not in chosen)

    def size(self, bits: Sequence[int]) -> float:
        """Bytes."""
        chosen = [(path, sides[0][0]) for path, _, sides in self.layers]
        return self.rest + sum(self.bytes[bits[n]].get(path, 0) for path, n in chosen if n is not None)

    def bit_ops(self, bits: Sequence[int]) -> float:
        return sum(
            products * math.prod(fixed if number is None else bits[number] for number, fixed in sides)
            for _, products, sides in self.layers
        )

    def budget(self, size: int | float | None, bit_ops: int | float | None, float_size: int) -> tuple[float, str]:
        """What may be spent, and in words."""
        if size is not None:
            most = size * float_size if isinstance(size, float) and size <= 1 else size
            return most, f"{math.floor(most):,} bytes of parameters ({most / float_size:.3f} of float32)"
        assert bit_ops is not None
        eight = 64 * sum(products for _, products, _ in self.layers)
        most = bit_ops * eight if isinstance(bit_ops, float) and bit_ops <= 1 else bit_ops
        return most, f"{math.floor(most):,} bit operations ({most / eight:.3f} of those with 8 × 8 bits)"

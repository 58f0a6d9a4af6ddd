"""What keeps a network of signs from learning, found in its data flow before a step is trained.

The rules are those of docs/bnn.md, section 5. Code that could not be followed gives no finding.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.nn.modules.loss import _Loss
from torch.nn.modules.pooling import _AdaptiveMaxPoolNd, _MaxPoolNd

from lightning_lowbit.graph.network import Call, Flow
from lightning_lowbit.graph.ops import Kind, classify, multiplies

__all__ = ["Finding", "binary_findings"]

_NORMS = (_BatchNorm, _InstanceNorm, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)
_NORM_NAMES = frozenset({"batch_norm", "instance_norm", "group_norm", "layer_norm", "rms_norm"})
_DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)  # AlphaDropout puts another value than 0
_DROPOUT_NAMES = frozenset({"dropout", "dropout_", "dropout1d", "dropout2d", "dropout3d"})
_MAX_POOLS = (_MaxPoolNd, _AdaptiveMaxPoolNd)
_MULTIPLYING = (nn.RNNBase, nn.RNNCellBase, nn.Bilinear, nn.MultiheadAttention)
_NONNEGATIVE = (nn.Sigmoid, nn.Hardsigmoid, nn.Softplus, nn.Softmax, nn.Softmax2d)
_NONNEGATIVE_NAMES = frozenset({
    "sigmoid", "sigmoid_", "hardsigmoid", "softplus", "softmax", "abs", "abs_", "square", "square_", "exp", "exp_",
})  # fmt: skip
_BOUNDED_NAMES = frozenset({"hardtanh", "hardtanh_", "clamp", "clamp_", "clamp_min", "clamp_min_", "clip", "clip_"})
_SELECTS = frozenset({"getitem", "select", "narrow", "index_select"})
_MOVES = (*_MAX_POOLS, nn.Identity, nn.Flatten)  # past which a bias per channel is still one
_MOVES_NAMES = frozenset({
    "flatten", "view", "reshape", "contiguous", "transpose", "permute", "squeeze", "unsqueeze",
})  # fmt: skip
_SIGN_KEEPING = (Kind.KEEP, Kind.RELU, Kind.ACTIVATION)  # elementwise or moves, monotonic as far as signs go
_MIXING = (Kind.ADD, Kind.AVG_POOL)


@dataclass(frozen=True)
class Finding:
    """One thing that will train badly.

    Args:
        path: module or functional call.
        what: what is wrong with it.
        fix: what to do.
    """

    path: str
    what: str
    fix: str

    def __str__(self) -> str:
        return f"{self.path}: {self.what}; {self.fix}"


def binary_findings(
    root: nn.Module, flow: Flow, binary: set[str], replaced: Iterable[str] = frozenset()
) -> list[Finding]:
    """What will keep the layers at the paths ``binary`` from learning, in the order in which the calls ran.

    Args:
        root: the network, converted or not.
        flow: its data flow, planned or not.
        binary: layers that multiply the signs of their inputs with the signs of their weights.
        replaced: names of rectifier calls in whose place the scheme puts something of both signs.
    """
    return _Lint(root, flow, binary, set(replaced)).findings()


@dataclass(frozen=True)
class _Value:
    """What is known of a call's result."""

    rectifiers: tuple[tuple[Call, bool], ...] = ()  # that made (a part of) it nonnegative; whether it only moved since
    nonnegative: bool = False  # as a whole
    dropouts: tuple[Call, ...] = ()  # passed since the last norm, layer or sum
    pools: tuple[Call, ...] = ()  # of maxima, likewise, if behind a norm
    normalized: bool = False


_UNKNOWN = _Value()
_NORM, _SIGN, _END, _OPAQUE, _MIXED = "norm", "sign", "end", "opaque", "mixed"  # what lies ahead of a value

_RECTIFIER = "never negative, so that every sign taken of its values by {} is +1"
_DROPOUT = "values dropped on the way into {} become sign(0) = +1, a constant, not an absence"
_POOL = "maxima of normalized values skew the signs at the input of {} to +1"
_FIXES = {
    _RECTIFIER: "write nn.Hardtanh in its place",
    _DROPOUT: "place it before the batch norm, or remove it",
    _POOL: "pool the sums, before the batch norm",
}
_REPLACE = 'Bnn(relu="hardtanh") or Bnn(relu="prelu") replaces it, or write nn.Hardtanh'  # a rectifier read directly


class _Lint:
    def __init__(self, root: nn.Module, flow: Flow, binary: set[str], replaced: set[str]) -> None:
        self.flow, self.binary, self.replaced = flow, binary, replaced
        self.modules = dict(root.named_modules(remove_duplicate=False))
        self.targets = {id(call): self._target(call) for call in flow.calls}
        self.values: dict[int, _Value] = {}
        for call in flow.calls:
            self.values[id(call)] = self._value(call)
        self.exits = {id(call) for call in flow.exits}
        self.whole = self._behind(flow.heads)
        self.ahead: dict[int, set[str]] = {}
        for call in reversed(flow.calls):
            self.ahead[id(call)] = self._ahead(call)

    # -- what a call is ----------------------------------------------------------------------------------------
    def _target(self, call: Call) -> Any:
        """What stands there now: a conversion may have put another module under the name."""
        return call.target if call.path is None else self.modules.get(call.alias or call.path, call.target)

    def _kind(self, call: Call) -> Kind:
        """As the target says it; a plan calls operations of float code FLOAT."""
        if call.target in ("input", "untraced") or (call.path is None and call.kind is not Kind.FLOAT):
            return call.kind
        kind = classify(self.targets[id(call)], call.args, call.kwargs)
        plain_sum = len(call.inputs) > 1 and "alpha" not in call.kwargs
        return Kind.FLOAT if kind is Kind.ADD and not plain_sum else kind

    def _is(self, call: Call, modules: tuple[type[nn.Module], ...], names: frozenset[str] = frozenset()) -> bool:
        if call.target in ("input", "untraced"):
            return False
        target = self.targets[id(call)]
        return isinstance(target, modules) if isinstance(target, nn.Module) else _name(target) in names

    def _is_norm(self, call: Call) -> bool:
        return self._kind(call) is Kind.BATCH_NORM or self._is(call, _NORMS, _NORM_NAMES)

    def _is_dropout(self, call: Call) -> bool:
        if not self._is(call, _DROPOUTS, _DROPOUT_NAMES):
            return False
        p = getattr(self.targets[id(call)], "p", None) if call.path else _argument(call, 1, "p", 0.5)
        return bool(p != 0)

    def _is_max_pool(self, call: Call) -> bool:
        name = "" if call.path is not None else _name(call.target)
        return "max_pool" in name or self._is(call, _MAX_POOLS)

    def _is_binary(self, call: Call) -> bool:
        return call.path in self.binary and not call.alone and bool(call.inputs)

    def _is_nonnegative(self, call: Call) -> bool:
        """Whether the result is >= 0 whatever comes in."""
        target = self.targets[id(call)]
        if self._kind(call) is Kind.RELU:
            return True
        if isinstance(target, nn.Hardtanh):
            return target.min_val >= 0
        if isinstance(target, nn.Threshold):
            return target.threshold >= 0 and target.value >= 0
        if self._is(call, (), _BOUNDED_NAMES):
            low = _argument(call, 1, "min_val" if "tanh" in _name(target) else "min", None)
            return isinstance(low, (int, float)) and low >= 0
        return self._is(call, _NONNEGATIVE, _NONNEGATIVE_NAMES)

    # -- forward: what a value has passed ------------------------------------------------------------------------
    def _value(self, call: Call) -> _Value:
        sources = [self.values.get(id(source), _UNKNOWN) for source in call.inputs]
        kind = self._kind(call)
        if self._is_norm(call):
            return _Value(normalized=True)
        if kind is Kind.CAT:
            return _Value(
                _union(_changed(value) for value in sources),
                bool(sources) and all(value.nonnegative for value in sources),
                _union(value.dropouts for value in sources),
                _union(value.pools for value in sources),
                any(value.normalized for value in sources),
            )
        if kind in _MIXING:
            whole = bool(sources) and all(value.nonnegative for value in sources)
            rectifiers = _union(_changed(value) for value in sources) if whole else ()
            return _Value(rectifiers, whole, normalized=any(value.normalized for value in sources))
        signs = self._signs(call, kind, sources)
        if not sources or not (kind in _SIGN_KEEPING or self._is_dropout(call)):
            return _Value(*signs)
        source = sources[0]
        dropouts = (*source.dropouts, call) if self._is_dropout(call) else source.dropouts
        pools = (*source.pools, call) if self._is_max_pool(call) and source.normalized else source.pools
        return _Value(*signs, dropouts, pools, source.normalized)

    def _signs(self, call: Call, kind: Kind, sources: list[_Value]) -> tuple[tuple[tuple[Call, bool], ...], bool]:
        """Rectifiers of a result of one tensor, and whether it is nonnegative as a whole."""
        if self._is_nonnegative(call) and call.name not in self.replaced:
            return ((call, True),), True
        if not sources or self._is(call, (nn.LogSigmoid,)):
            return (), False
        source = sources[0]
        if kind is Kind.KEEP or self._is_dropout(call):
            part = not source.nonnegative and self._is(call, (), _SELECTS)  # of a concat: which one is not known
            return () if part else source.rectifiers, source.nonnegative
        return (_changed(source), source.nonnegative) if kind in _SIGN_KEEPING else ((), False)

    # -- backward: what lies ahead of a value --------------------------------------------------------------------
    def _ahead(self, call: Call) -> set[str]:
        found: set[str] = set()
        if id(call) in self.exits:
            found.add(_END if id(call) in self.whole else _OPAQUE)
        for reader in call.readers:
            kind = self._kind(reader)
            if self._is_norm(reader):
                found.add(_NORM)
            elif self._is_binary(reader):
                found.add(_SIGN)
            elif kind is Kind.COMPUTE or self._ends(reader):
                found.add(_END)
            elif kind in (*_SIGN_KEEPING, *_MIXING, Kind.CAT) or self._is_dropout(reader):
                found |= self.ahead[id(reader)]
                if kind in _MIXING:
                    found.add(_MIXED)
            else:
                found.add(_OPAQUE)
        return found

    def _ends(self, call: Call) -> bool:
        """Whether a call multiplies like a layer, or turns a network's results into probabilities or a loss."""
        if self._is(call, (_Loss, nn.Softmax, nn.LogSoftmax, *_MULTIPLYING)) or multiplies(call.target):
            return True
        return call.path is None and _name(call.target).endswith(("softmax", "_loss", "cross_entropy"))

    def _behind(self, heads: list[Call]) -> set[int]:
        """Calls of the whole network, as opposed to those of parts whose callers were not followed."""
        stack, seen = list(heads), set[int]()
        while stack:
            call = stack.pop()
            if id(call) not in seen:
                seen.add(id(call))
                stack.extend(call.readers)
        return seen

    # -- the rules -----------------------------------------------------------------------------------------------
    def findings(self) -> list[Finding]:
        before: set[tuple[str, int]] = set()  # rule and call that stands before a sign
        read: dict[tuple[str, Any], list[str]] = {}  # rule and what was called -> layers that take the signs
        moved = set()
        for layer in filter(self._is_binary, self.flow.calls):
            value = self.values.get(id(layer.inputs[0]), _UNKNOWN)
            rectifiers = [call for call, _ in value.rectifiers]
            for rule, calls in ((_RECTIFIER, rectifiers), (_DROPOUT, value.dropouts), (_POOL, value.pools)):
                for call in calls:
                    before.add((rule, id(call)))
                    read.setdefault((rule, _identity(call)), []).append(str(layer.path))
            moved |= {_identity(call) for call, only_moved in value.rectifiers if only_moved}
        found: list[Finding] = []
        for call in self.flow.calls:
            for rule in (_RECTIFIER, _DROPOUT, _POOL):
                if (rule, id(call)) in before and (names := read.pop((rule, _identity(call)), None)):
                    replaceable = self._kind(call) is Kind.RELU and _identity(call) in moved
                    fix = _REPLACE if rule == _RECTIFIER and replaceable else _FIXES[rule]
                    found.append(Finding(call.name, rule.format(_listed(names)), fix))
            if self._is_binary(call):
                found += self._layer(call)
        return list(dict.fromkeys(found))

    def _layer(self, call: Call) -> Iterable[Finding]:
        layer, name = self.targets[id(call)], call.name
        k = layer.weight[0].numel()
        if 1 < getattr(layer, "groups", 1) == layer.in_channels:
            what = f"a depthwise binary convolution, of {k} signs a sum, which loses most by binarization"
            yield Finding(name, what, f"leave it float (the default, or skip=[{name!r}])")
        ahead = self.ahead[id(call)]
        if _SIGN in ahead or (_END in ahead and not ahead & {_NORM, _OPAQUE}):
            if k % 2 and layer.bias is None and _MIXED not in ahead:
                what = (
                    f"no normalization follows it: a sum of {k} signs is an odd integer, never inside an open window "
                    "like nn.Hardtanh's, which then passes no gradient at all"
                )
            else:
                what = (
                    f"no normalization follows it: a sum of {k} signs has a standard deviation of {math.sqrt(k):.3g}, "
                    f"so that only {math.erf(1 / math.sqrt(2 * k)):.0%} of its units lie in a window of [-1, 1]"
                )
            yield Finding(name, what, f"put nn.BatchNorm{len(getattr(layer, 'kernel_size', (1,)))}d behind it")
        norm = self._subtracts(call) if layer.bias is not None and layer.bias.requires_grad else None
        if norm is not None:
            noise = "rounding noise that an adaptive optimizer turns into steps"
            what = f"{norm} takes its bias away again, whose gradient is {noise}"
            yield Finding(name, what, "write bias=False")

    def _subtracts(self, call: Call) -> str | None:
        """The batch norm directly behind a layer that makes its bias vanish; None where something else reads it."""
        norm, stack = None, [call]
        while stack:
            value = stack.pop()
            if id(value) in self.exits:
                return None
            for reader in value.readers:
                if self._kind(reader) is Kind.BATCH_NORM or self._is(reader, (_BatchNorm,), frozenset({"batch_norm"})):
                    norm = norm or reader.name
                elif self._is_max_pool(reader) or self._is(reader, _MOVES, _MOVES_NAMES):
                    stack.append(reader)
                else:
                    return None
        return norm


def _identity(call: Call) -> Any:
    """The same for every run of a shared module, or of one line in a container that runs again."""
    return call.path if call.path is not None else (call.owner, call.key)


def _name(target: Any) -> str:
    """Of a function or method."""
    return target if isinstance(target, str) else str(getattr(target, "__name__", ""))


def _argument(call: Call, position: int, name: str, default: Any) -> Any:
    return call.kwargs.get(name, call.args[position] if len(call.args) > position else default)


def _changed(value: _Value) -> tuple[tuple[Call, bool], ...]:
    return tuple((call, False) for call, _ in value.rectifiers)


def _union(groups: Iterable[tuple[Any, ...]]) -> tuple[Any, ...]:
    return tuple(dict.fromkeys(item for group in groups for item in group))


def _listed(names: list[str]) -> str:
    *others, last = dict.fromkeys(names)
    return f"{', '.join(others)} and {last}" if others else last

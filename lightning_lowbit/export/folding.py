"""Which binary layers may hand signs to the next ones, and what their thresholds must contain."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.fx
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from lightning_lowbit.export.bits import Fold, Step, step_of
from lightning_lowbit.graph.network import Call, Flow
from lightning_lowbit.graph.rewrite import TracedForward
from lightning_lowbit.kernels.popcount import WORD
from lightning_lowbit.modules.binary import Rectifier
from lightning_lowbit.modules.binary_layers import finished
from lightning_lowbit.modules.elementwise import LowBitReLU
from lightning_lowbit.modules.norm import LowBitBatchNorm
from lightning_lowbit.numerics.affine import affine_parameters, sign_thresholds

__all__ = ["Chain", "find_chains", "not_monotone", "thresholds"]

_MODULES: dict[type[nn.Module], tuple[str, tuple[str, ...]]] = {  # class -> function of torch, settings
    nn.Hardtanh: ("hardtanh", ("min_val", "max_val")),
    nn.LeakyReLU: ("leaky_relu", ("negative_slope",)),
    nn.PReLU: ("prelu", ()),
    nn.Flatten: ("view", ()),
    nn.MaxPool1d: ("max_pool1d", ("kernel_size", "stride", "padding", "dilation", "ceil_mode", "return_indices")),
    nn.MaxPool2d: ("max_pool2d", ("kernel_size", "stride", "padding", "dilation", "ceil_mode", "return_indices")),
}
_DROPOUTS = {nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d}


@dataclass
class Chain:
    """From a binary layer to the binary layers that read its signs.

    Attributes:
        producer: path of the first.
        consumers: paths of the others, which take the same signs.
        flat: a view to one row a sample lies between.
        steps: what runs in between, for `Fold`; ``norm`` is the batch norm's place in it, or -1.
        functions: the float functions of one tensor in between, channels on axis 1.
        absorbed: paths of modules that the thresholds stand for.
        per_channel: a function has parameters along axis 1, which must be the layer's outputs.
    """

    producer: str
    consumers: list[str] = field(default_factory=list)
    flat: bool = False
    steps: list[Step] = field(default_factory=list)
    norm: int = -1
    functions: list[Callable[[Tensor], Tensor]] = field(default_factory=list)
    absorbed: list[str] = field(default_factory=list)
    per_channel: bool = False

    def fold(self) -> Fold:
        return Fold(self.producer, tuple(self.steps), self.norm)


class _Refusal(Exception):
    """Why a layer's sums stay numbers."""


def find_chains(root: nn.Module, flow: Flow, packable: set[str]) -> tuple[dict[str, Chain], dict[str, str]]:
    """Chains by the path of their first layer, and why the other layers in ``packable`` give float tensors.

    Whether the values in between are monotone functions is another question (`not_monotone`).
    """
    finder = _Finder(root, flow, packable)
    chains, refused = {}, {}
    for path in sorted(packable):
        try:
            chains[path] = finder.chain(path)
        except _Refusal as refusal:
            refused[path] = str(refusal)
    return chains, refused


class _Finder:
    def __init__(self, root: nn.Module, flow: Flow, packable: set[str]) -> None:
        self.root, self.packable = root, packable
        self.exits = {id(call) for call in flow.exits}
        self.runs: dict[Any, int] = {}  # how often a module, or a line of a container, runs
        for call in flow.calls:
            for key in {call.path, (call.owner, call.key)}:
                self.runs[key] = self.runs.get(key, 0) + 1
        self.calls = {call.path: call for call in flow.calls if call.path in packable and not call.alone}

    def chain(self, path: str) -> Chain:
        call = self.calls.get(path)
        if call is None:
            raise _Refusal("it stands in code that could not be followed")
        self._once(call)
        self._unwatched(call)
        chain = Chain(path)
        while True:
            if id(call) in self.exits or not call.readers:
                raise _Refusal("its result leaves the network")
            if all(reader.path in self.packable for reader in call.readers):
                for reader in call.readers:
                    self._unwatched(reader)
                self._check_readers(chain, call)
                return chain
            if len(call.readers) > 1:
                raise _Refusal(f"{call.name} is read by {', '.join(reader.name for reader in call.readers)}")
            call = call.readers[0]
            self._unwatched(call)
            if call.overwrites:
                raise _Refusal(f"{call.name} writes into a tensor that is read again")
            self._add(chain, call)

    # -- what stands in between ----------------------------------------------------------------------------------
    def _add(self, chain: Chain, call: Call) -> None:
        module = self._ours(call)
        if module is not None:
            self._absorb(chain, call, *module)
        elif call.path is not None:
            self._module(chain, call, call.target)
        else:
            self._function(chain, call)

    def _ours(self, call: Call) -> tuple[str, nn.Module] | None:
        """The norm or the rectifier that runs at a call, with its path."""
        path = call.path
        if path is None:
            forward = self.root.get_submodule(call.owner).__dict__.get("forward")
            name = forward.instead.get(call.key) if isinstance(forward, TracedForward) else None
            path = f"{call.owner}.{name}".lstrip(".") if name else None
        if path is None:
            return None
        module = self.root.get_submodule(path)
        return (path, module) if isinstance(module, (LowBitBatchNorm, LowBitReLU)) else None

    def _absorb(self, chain: Chain, call: Call, path: str, module: nn.Module) -> None:
        self._once(call)
        if isinstance(module, LowBitBatchNorm):
            if not module.island or module.running_mean is None or module.lowbit_output is not None:
                raise _Refusal(f"{path} is no norm with moving statistics")
            producer: Any = self.root.get_submodule(chain.producer)
            if module.num_features != producer.weight.shape[0]:
                raise _Refusal(f"{path} counts {module.num_features} channels along another axis")
            if chain.norm >= 0:
                raise _Refusal(f"{path} is a second norm")
            chain.norm, chain.per_channel = len(chain.steps), True
        else:
            rectifier = module.lowbit_output
            if rectifier is not None and not isinstance(rectifier, Rectifier):
                raise _Refusal(f"{path} has a grid of its own")
            along_rows = rectifier is not None and rectifier.site.behind == 0
            chain.per_channel |= rectifier is not None and rectifier.slope is not None and not along_rows
        self._sign_wise(chain, path)
        chain.absorbed.append(path)
        chain.steps.append(Step("module", (path,)))
        chain.functions.append(module)

    def _module(self, chain: Chain, call: Call, module: nn.Module) -> None:
        if type(module) is nn.Identity:
            return
        if isinstance(module, _DropoutNd):
            if type(module) not in _DROPOUTS or module.training:
                raise _Refusal(f"{call.name} changes values")
            chain.steps.append(Step("dropout"))
            return
        if type(module) not in _MODULES:
            raise _Refusal(f"{call.name} ({type(module).__name__}) needs its values")
        name, settings = _MODULES[type(module)]
        if isinstance(module, nn.Flatten) and (module.start_dim, module.end_dim) != (1, -1):
            raise _Refusal(f"{call.name} does not flatten to one row a sample")
        step = step_of(name, (), {key: getattr(module, key) for key in settings})
        if isinstance(module, nn.PReLU) and module.weight.numel() > 1:
            self._sign_wise(chain, call.name)
            chain.per_channel = True
        self._step(chain, call, step, module)

    def _function(self, chain: Chain, call: Call) -> None:
        function = _Elementwise(call.target, call.args[1:], dict(call.kwargs))
        name = function.name
        step = step_of(name, function.args, function.kwargs)
        if step is not None and step.name == "view":
            if not _flattens(name.rstrip("_"), call.args, call.kwargs):
                raise _Refusal(f"{call.name} does not flatten to one row a sample")
        elif step is not None and (step.name == "prelu" or _nodes((function.args, function.kwargs))):
            step = None  # it reads other tensors, or numbers that change
        self._step(chain, call, step, function)

    def _step(self, chain: Chain, call: Call, step: Step | None, function: Callable[[Tensor], Tensor]) -> None:
        if step is None:
            raise _Refusal(f"{call.name} needs its values")
        if step.name.startswith("max_pool"):
            axes = len(getattr(self.root.get_submodule(chain.producer), "kernel_size", ()))
            if chain.flat or step.name != f"max_pool{axes}d":
                raise _Refusal(f"{call.name} pools over other axes than pixels")
        chain.steps.append(step)
        if step.name == "view":
            chain.flat = True
        elif step.name not in ("dropout", "same", "max_pool1d", "max_pool2d"):
            chain.functions.append(function)

    def _sign_wise(self, chain: Chain, name: str) -> None:
        if chain.flat and not isinstance(self.root.get_submodule(chain.producer), nn.Linear):
            raise _Refusal(f"{name} has parameters for each pixel")

    # -- who reads it --------------------------------------------------------------------------------------------
    def _check_readers(self, chain: Chain, call: Call) -> None:
        producer: Any = self.root.get_submodule(chain.producer)
        linear = isinstance(producer, nn.Linear)
        outputs = producer.out_features if linear else producer.out_channels
        chain.consumers = [str(reader.path) for reader in call.readers]
        layers: list[Any] = [self.root.get_submodule(path) for path in chain.consumers]
        for path, layer in zip(chain.consumers, layers, strict=True):
            reads_rows = isinstance(layer, nn.Linear)
            if reads_rows != (linear or chain.flat) or (not reads_rows and type(layer) is not type(producer)):
                raise _Refusal(f"{path} reads its values in another order")
            if not reads_rows and layer.groups > 1 and layer.in_channels // layer.groups % WORD:
                raise _Refusal(f"{path} reads groups of {layer.in_channels // layer.groups} channels, no whole words")
            fits = layer.in_channels == outputs if not reads_rows else layer.in_features % outputs == 0
            if not fits or (linear and layer.in_features != outputs):
                raise _Refusal(f"{path} reads its values in another order")
            if chain.flat and not linear and self.runs[path] > 1:
                raise _Refusal(f"{path} runs {self.runs[path]} times, and reads flattened images once")
            if layer.lowbit_input.shift is not None:
                if len(layers) > 1:
                    raise _Refusal(f"{path} shifts what {', '.join(chain.consumers)} read")
                self._sign_wise(chain, path)
                chain.per_channel |= not reads_rows  # of rows along the last axis
                chain.functions.append(layer.lowbit_input.shifted)

    def _once(self, call: Call) -> None:
        if max(self.runs[call.path] if call.path else 0, self.runs[(call.owner, call.key)]) > 1:
            raise _Refusal(f"{call.name} runs more than once")

    def _unwatched(self, call: Call) -> None:
        """Hooks would look at numbers that are no longer there."""
        path = call.path or call.owner
        while path:
            module = self.root.get_submodule(path)
            if module._forward_hooks or module._forward_pre_hooks:
                raise _Refusal(f"{path} has forward hooks")
            path = path.rpartition(".")[0]


@dataclass(frozen=True)
class _Elementwise:
    """A functional call, or a method's, with its constant arguments."""

    target: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @property
    def name(self) -> str:
        return self.target if isinstance(self.target, str) else str(getattr(self.target, "__name__", ""))

    def __call__(self, x: Tensor) -> Tensor:
        function = getattr(type(x), self.target) if isinstance(self.target, str) else self.target
        result: Tensor = function(x, *self.args, **self.kwargs)
        return result


def _flattens(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a view asks for one row a sample: flatten(1), view(n, -1), reshape(-1, features)."""
    if name == "flatten":
        start = kwargs.get("start_dim", args[1] if len(args) > 1 else 0)
        return bool(start == 1 and kwargs.get("end_dim", args[2] if len(args) > 2 else -1) == -1)
    shape = args[1] if len(args) == 2 and isinstance(args[1], (tuple, list)) else args[1:]
    return len(shape) == 2 and not kwargs


def _nodes(structure: Any) -> bool:
    """Whether a value of the traced forward stands in it."""
    found: list[torch.fx.Node] = []
    torch.fx.node.map_arg(structure, found.append)
    return bool(found)


def not_monotone(root: nn.Module, chain: Chain) -> str | None:
    """Why the next sign is no monotone function of a sum, given the present parameters; None where it is."""
    for function in chain.functions:
        if isinstance(function, LowBitBatchNorm):
            norm: Any = function
            values = affine_parameters(norm.running_mean, norm.running_var, norm.weight, norm.bias, norm.eps)
            if not all(bool(torch.isfinite(value).all()) for value in values):
                return f"{norm.path} has parameters that are not finite"
        slope = _slope(function)
        if slope is not None and not bool(((slope >= 0) & torch.isfinite(slope)).all()):
            return "a slope behind it is negative"
    layer: Any = root.get_submodule(chain.producer)
    tensors = [layer.weight, *([] if layer.bias is None else [layer.bias])]
    if not all(bool(torch.isfinite(tensor).all()) for tensor in tensors):
        return "its parameters are not finite"
    outputs, k = layer.weight.shape[0], layer.weight[0].numel()
    extremes = [_following(root, chain)(torch.full((outputs,), dot)) for dot in (-k, k)]
    return "its values overflow" if any(bool(torch.isnan(x).any()) for x in extremes) else None


def _slope(function: Any) -> Tensor | None:
    """Of what a rectifier does to negative values; None where it has no slope."""
    rectifier = function.lowbit_output if isinstance(function, LowBitReLU) else function
    found: Tensor | None = None
    if isinstance(rectifier, Rectifier):
        found = rectifier.slope
    elif isinstance(rectifier, nn.PReLU):
        found = rectifier.weight
    elif isinstance(rectifier, nn.LeakyReLU):
        found = torch.tensor(rectifier.negative_slope)
    elif isinstance(rectifier, _Elementwise):
        step = step_of(rectifier.name, rectifier.args, rectifier.kwargs)
        found = torch.tensor(step.settings[0]) if step is not None and step.name == "leaky_relu" else None
    return found


def _following(root: nn.Module, chain: Chain) -> Callable[[Tensor], Tensor]:
    """From one sum a channel to what the next sign is taken of: scale, bias and all that follows."""
    layer: Any = root.get_submodule(chain.producer)
    weight = layer.lowbit_weight
    scale = None if weight.scaling == "none" else weight.scale(layer.weight)
    shape = (1, -1) if isinstance(layer, nn.Linear) else (1, -1, *[1] * len(layer.kernel_size))

    def values(dot: Tensor) -> Tensor:
        x = dot.to(layer.weight.device, torch.float32).reshape(shape)
        x = finished(x, scale, layer.bias, 1 - layer.weight.dim())
        for function in chain.functions:
            x = function(x)
        return x.reshape(-1).cpu()

    return values


@torch.no_grad()
def thresholds(root: nn.Module, chain: Chain) -> tuple[Tensor, Tensor]:
    """low and flip of a layer: its scale, its bias and all that follows, decided by the functions themselves."""
    layer: Any = root.get_submodule(chain.producer)
    outputs, k = layer.weight.shape[0], layer.weight[0].numel()
    values = _following(root, chain)
    low, flip = sign_thresholds(lambda dot: ~(values(dot) < 0), k, outputs)
    return low.to(layer.weight.device), flip.to(layer.weight.device)

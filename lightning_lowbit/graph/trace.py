"""One container's own forward as a torch.fx graph, every child a leaf; or why it cannot be followed."""

from __future__ import annotations

import copy
import inspect
import operator
import random
import re
import traceback
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.fx
from torch import nn

__all__ = [
    "IN_PLACE_OPERATORS",
    "CallKey",
    "Untraceable",
    "bound_arguments",
    "call_keys",
    "constants",
    "has_forward",
    "has_step",
    "location",
    "trace_container",
    "trace_step",
]

CallKey = tuple[str, int]
"""A call inside one container's forward: (what is called, occurrence of it)."""

IN_PLACE_OPERATORS = ("iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "iand", "ior", "ixor")
_ASSERTS = (torch._assert, torch.fx._symbolic_trace._assert_is_none)


@dataclass(frozen=True)
class Untraceable:
    """A container whose forward cannot be followed; what it holds is converted layer by layer."""

    path: str
    where: str  # "net.py:42 in forward"
    reason: str


class _InPlaceProxy(torch.fx.Proxy):
    """Also records that ``x += y`` changes x: torch.fx's own proxy takes it for ``x = x + y``."""


def _in_place(function: Any) -> Any:
    def method(self: torch.fx.Proxy, other: Any) -> Any:
        return self.tracer.create_proxy("call_function", function, (self, other), {})

    return method


for _name in IN_PLACE_OPERATORS:
    setattr(_InPlaceProxy, f"__{_name}__", _in_place(getattr(operator, _name)))


class _OwnForward(torch.fx.Tracer):
    """Records what a container's own code calls; the children answer for themselves."""

    record_stack_traces = True
    proxy_buffer_attributes = True  # a counter in a buffer must not count while we look

    def proxy(self, node: torch.fx.Node) -> torch.fx.Proxy:
        return _InPlaceProxy(node, self)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True


def has_forward(module: nn.Module) -> bool:
    """Whether the class says what calling it does (a bare LightningModule or ModuleList does not)."""
    forward = type(module).forward
    return forward is not nn.Module.forward and forward.__qualname__ != "LightningModule.forward"


def has_step(module: nn.Module) -> bool:
    """Whether it is a LightningModule that says how it trains."""
    step = getattr(type(module), "training_step", None)
    return step is not None and step.__qualname__ != "LightningModule.training_step"


def bound_arguments(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any] | None:
    """All arguments of a call of ``module`` by parameter name, defaults included; None if they do not fit."""
    signature = inspect.signature(type(module).forward)
    try:
        bound = signature.bind(module, *args, **kwargs)
    except TypeError:
        return None
    bound.apply_defaults()
    return dict(list(bound.arguments.items())[1:])


def constants(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments of a call that steer control flow: flags, names and None, and numbers at their defaults.

    A trace is made for their values, since a proxy in their place would take a branch of its own
    (``mask is not None`` holds for every proxy).
    """
    parameters = inspect.signature(type(module).forward).parameters
    if all(p.default is p.empty for p in parameters.values()) and not kwargs:
        return {}
    fixed = {}
    for name, value in (bound_arguments(module, args, kwargs) or {}).items():
        number = isinstance(value, (int, float)) and value == parameters[name].default
        if value is None or isinstance(value, (bool, str)) or number:
            fixed[name] = value
    return fixed


def trace_container(
    module: nn.Module, path: str = "", training: bool = False, fixed: dict[str, Any] | None = None
) -> torch.fx.Graph | Untraceable:
    """Follow ``module``'s own forward in the given mode, without data and without leaving a mark on it.

    A forward whose effect is more than its result is not followed: a recording would lose what it keeps on
    the module or logs, and would repeat for ever the random number or the tensor that it made while we
    looked.

    Args:
        fixed: values of arguments that steer control flow (``constants``); the others become proxies.
    """
    with _untouched(module, training) as effects:
        try:
            graph = _OwnForward().trace(module, concrete_args=fixed or None)
        except Exception as error:  # whatever user code raises when handed proxies
            return Untraceable(path, _last_user_frame(error, module), _reason(error))
    made = [str(n.target) for n in graph.nodes if n.op == "get_attr" and "_tensor_constant" in str(n.target)]
    if made:
        effects.append("it makes a tensor without its inputs (torch.tensor, torch.arange, torch.randn); use a buffer")
    if effects:
        return Untraceable(path, f"{type(module).__qualname__}.forward", effects[0])
    _name_parameters(graph, module)
    for node in reversed(list(graph.nodes)):  # the checks that torch.fx adds for fixed arguments
        if node.op == "call_function" and (node.target in _ASSERTS or (node.target is operator.eq and not node.users)):
            graph.erase_node(node)
    return graph


def trace_step(module: nn.Module) -> torch.fx.Graph | Untraceable:
    """Follow ``training_step`` of a LightningModule that has no forward, to learn what feeds what.

    The step is read, never rewritten: what it logs and keeps on the module is left out here and happens when it runs.
    """
    tracer = _OwnForward()
    tracer.traced_func_name = "training_step"
    behind_batch = list(inspect.signature(type(module).training_step).parameters)[2:]  # type: ignore[attr-defined]
    with _untouched(module, training=False):
        for name in ("log", "log_dict"):
            module.__dict__[name] = _log_nothing
        try:
            return tracer.trace(module, concrete_args=dict.fromkeys(behind_batch, 0))
        except Exception as error:  # whatever user code raises when handed proxies
            return Untraceable("", _last_user_frame(error, module), _reason(error))


def _reason(error: Exception) -> str:
    """Why a forward could not be recorded, in words of its author's; then those of whoever raised."""
    text = " ".join(str(error).split()).rstrip(".")[:160] or type(error).__name__
    if isinstance(error, torch.fx.proxy.TraceError):
        return f"control flow (if, while, a loop) on a tensor or its shape; torch.fx: {text}"
    if "Proxy" in text or "symbolic" in text:
        return f"it needs the value or the size of a tensor, of which only the place is known; Python: {text}"
    return text


def _name_parameters(graph: torch.fx.Graph, module: nn.Module) -> None:
    """Keep the user's parameter names: torch.fx numbers the fixed ones, and moves ``*args`` behind."""
    parameters = list(inspect.signature(type(module).forward).parameters.values())[1:]
    collecting = [p for p in parameters if p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    for node, parameter in zip(placeholders, [p for p in parameters if p not in collecting] + collecting, strict=True):
        node.meta["parameter"] = parameter.name


@contextmanager
def _untouched(module: nn.Module, training: bool) -> Iterator[list[str]]:
    """Put ``module`` back as it was, and report what its forward did besides computing."""
    attributes: dict[str, Any] = dict(module.__dict__)
    buffers, was_training = dict(module._buffers), module.training
    contents = {name: copy.copy(value) for name, value in attributes.items() if isinstance(value, (list, dict, set))}
    torch_state, python_state, numpy_state = (
        torch.get_rng_state(),
        random.getstate(),
        np.random.get_state(legacy=False),
    )
    module.__dict__.pop("forward", None)  # a forward installed by an earlier conversion
    # Nor the children that it brought: a forward that iterates over its children must not meet them.
    own = {name: child for name, child in module._modules.items() if not name.startswith("lowbit_")}
    module.__dict__["_modules"] = own
    module.training = training
    for name in ("log", "log_dict"):
        if callable(getattr(module, name, None)):
            module.__dict__[name] = _refuse_to_log
    before = dict(module.__dict__)
    effects: list[str] = []
    try:
        yield effects
        after = {name: value for name, value in module.__dict__.items() if not name.startswith("_tensor_constant")}
        changed = [name for name in after if name not in before or after[name] is not before[name]]
        changed += [n for n, kept in contents.items() if n not in _OWN_STATE and not _same(attributes[n], kept)]
        changed += [n for n, tensor in buffers.items() if module._buffers.get(n) is not tensor]
        if changed:
            effects.append(f"it keeps values on the module (self.{changed[0]})")
        drawn = not torch.equal(torch_state, torch.get_rng_state()) or python_state != random.getstate()
        if drawn or not _same_draws(numpy_state, np.random.get_state(legacy=False)):
            effects.append("it draws random numbers outside the tensors that it is given")
    finally:
        torch.set_rng_state(torch_state)
        random.setstate(python_state)
        np.random.set_state(numpy_state)
        module.__dict__.clear()
        module.__dict__.update(attributes)
        for name, kept in contents.items():
            _restore(attributes[name], kept)
        module._buffers.update(buffers)
        module.training = was_training


def _same_draws(a: Any, b: Any) -> bool:
    """Whether numpy's generator stands where it stood."""
    place = ("bit_generator", "has_gauss", "gauss")
    same = all(a[name] == b[name] for name in place) and a["state"]["pos"] == b["state"]["pos"]
    return same and np.array_equal(a["state"]["key"], b["state"]["key"])


_OWN_STATE = frozenset(vars(nn.Module()))


def _same(container: Any, kept: Any) -> bool:
    """Whether a list, dict or set holds the very objects that it held."""
    if isinstance(container, set) or len(container) != len(kept):
        return len(container) == len(kept)
    if isinstance(container, dict):
        return all(key in kept and value is kept[key] for key, value in container.items())
    return all(a is b for a, b in zip(container, kept, strict=True))


def _restore(container: Any, kept: Any) -> None:
    if _same(container, kept):
        return
    container.clear()
    container.extend(kept) if isinstance(container, list) else container.update(kept)


def _refuse_to_log(*args: Any, **kwargs: Any) -> None:
    raise RuntimeError("it logs, which a recording would leave out; log in the step that calls it")


def _log_nothing(*args: Any, **kwargs: Any) -> None:
    """In place of ``self.log`` while a step is read."""


def call_keys(graph: torch.fx.Graph) -> dict[torch.fx.Node, CallKey]:
    """Name every call of a container's graph by its target and its occurrence."""
    count: Counter[str] = Counter()
    keys = {}
    for node in graph.nodes:
        if node.op in ("call_function", "call_method", "call_module"):
            target = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "call")
            stem = target.strip("_")
            keys[node] = (stem, count[stem])
            count[stem] += 1
    return keys


def _last_user_frame(error: BaseException, module: nn.Module) -> str:
    frames = [
        f for f in traceback.extract_tb(error.__traceback__) if "/torch/" not in f.filename and f.filename != __file__
    ]
    if not frames:
        return f"{type(module).__qualname__}.forward"
    return f"{frames[-1].filename.rsplit('/', 1)[-1]}:{frames[-1].lineno} in {frames[-1].name}"


def location(node: torch.fx.Node) -> str:
    """File, line and function of the user's code that made a node."""
    frames = re.findall(r'File "([^"]+)", line (\d+), in (\S+)', node.stack_trace or "")
    for file, line, function in reversed(frames):
        if "/torch/" not in file and file != __file__:
            return f"{file.rsplit('/', 1)[-1]}:{line} in {function}"
    return ""

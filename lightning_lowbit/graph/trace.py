"""One container's own forward as a torch.fx graph, every child a leaf; or why it cannot be followed."""

from __future__ import annotations

import inspect
import operator
import re
import traceback
from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
import torch.fx
from torch import nn

__all__ = ["CallKey", "Untraceable", "call_keys", "constants", "has_forward", "location", "trace_container"]

CallKey = tuple[str, int]
"""A call inside one container's forward: (what is called, occurrence of it)."""

_ASSERTS = (torch._assert, torch.fx._symbolic_trace._assert_is_none)


@dataclass(frozen=True)
class Untraceable:
    """A container whose forward cannot be followed; what it holds is converted layer by layer."""

    path: str
    where: str  # "net.py:42 in forward"
    reason: str


class _OwnForward(torch.fx.Tracer):
    """Records what a container's own code calls; the children answer for themselves."""

    record_stack_traces = True
    proxy_buffer_attributes = True  # a counter in a buffer must not count while we look

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True


def has_forward(module: nn.Module) -> bool:
    """Whether the module's class says what calling it does (a bare LightningModule or ModuleList does not)."""
    forward = type(module).forward
    return forward.__qualname__.split(".")[0] not in ("Module", "LightningModule", "ModuleList", "ModuleDict")


def constants(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments of a call that steer control flow: flags, names and None, defaults included.

    A trace is made for their values, since a proxy in their place would take a branch of its own
    (``mask is not None`` holds for every proxy).
    """
    signature = inspect.signature(type(module).forward)
    if all(p.default is p.empty for p in signature.parameters.values()) and not kwargs:
        return {}
    try:
        bound = signature.bind(module, *args, **kwargs)
    except TypeError:
        return {}
    bound.apply_defaults()
    return {k: v for k, v in bound.arguments.items() if v is None or isinstance(v, (bool, str))}


def trace_container(
    module: nn.Module, path: str = "", training: bool = False, fixed: dict[str, Any] | None = None
) -> torch.fx.Graph | Untraceable:
    """Follow ``module``'s own forward in the given mode, without data and without leaving a mark on it.

    Args:
        fixed: values of arguments that steer control flow (``constants``); the others become proxies.
    """
    attributes, was_training = dict(module.__dict__), module.training
    buffers = dict(module._buffers)
    module.__dict__.pop("forward", None)  # a forward installed by an earlier conversion
    module.training = training
    try:
        graph = _OwnForward().trace(module, concrete_args=fixed or None)
    except Exception as error:  # whatever user code raises when handed proxies
        return Untraceable(path, _last_user_frame(error, module), " ".join(str(error).split())[:160] or type(error).__name__)
    finally:
        module.__dict__.clear()
        module.__dict__.update(attributes)
        module._buffers.update(buffers)
        module.training = was_training
    for node in reversed(list(graph.nodes)):  # the checks that torch.fx adds for fixed arguments
        if node.op == "call_function" and (node.target in _ASSERTS or (node.target is operator.eq and not node.users)):
            graph.erase_node(node)
    return graph


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
    frames = [f for f in traceback.extract_tb(error.__traceback__) if "/torch/" not in f.filename and f.filename != __file__]
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

"""A container's forward with some of its calls led through low-bit modules: same code, same names, same object.

The forward that torch.fx recorded is written back as Python on the instance. The module keeps its class, its
children and its keys, hooks on it and on every child still run, and what torch.compile sees is plain Python.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
import torch.fx
from torch import nn

from lightning_lowbit.errors import UnsupportedModelError
from lightning_lowbit.graph.trace import CallKey, Untraceable, call_keys, constants, trace_container

__all__ = ["TracedForward"]


class TracedForward:
    """Callable to put in ``module.__dict__["forward"]``.

    Args:
        module: the container.
        path: its path, for messages.
        instead: calls to replace, with the name of the child that takes the same arguments.
        after: calls whose result then passes a child.
    """

    def __init__(self, module: nn.Module, path: str, instead: dict[CallKey, str], after: dict[CallKey, str]) -> None:
        self.module, self.path, self.instead, self.after = module, path, instead, after
        parameters = list(inspect.signature(type(module).forward).parameters.values())[1:]
        self.steered = any(p.default is not p.empty or p.kind is p.VAR_KEYWORD for p in parameters)
        self.functions: dict[Any, Any] = {}
        self.compiled = False
        self.__signature__ = inspect.signature(type(module).forward).replace(parameters=parameters)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        variant: Any = self.module.training
        fixed: dict[str, Any] = {}
        if self.steered:
            fixed = constants(self.module, args, kwargs)
            variant = (variant, *fixed.items())
        function = self.functions.get(variant)
        if function is None:
            function = self.functions[variant] = self._write(fixed)
        return function(self.module, *args, **kwargs)

    def compile(self) -> None:
        """Compile the written functions from now on."""
        if not self.compiled:
            self.compiled, self.functions = True, {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "functions": {}}  # written again from the class's code when first called

    @torch.compiler.disable  # tracing happens once, before the graph that dynamo looks at
    def _write(self, fixed: dict[str, Any]) -> Any:
        graph = trace_container(self.module, self.path, self.module.training, fixed)
        if isinstance(graph, Untraceable):
            raise UnsupportedModelError(
                f"{self.path or type(self.module).__name__}: called with {fixed or 'other arguments'}, its forward cannot be "
                f"followed ({graph.where}: {graph.reason}), so its functional operations would stay off the grid. Convert "
                f"with skip=['{self.path}'], or take the branch out of forward."
            )
        for node, key in call_keys(graph).items():
            if key in self.instead:
                node.op, node.target = "call_module", self.instead[key]
            elif key in self.after:
                with graph.inserting_after(node):
                    passed = graph.call_module(self.after[key], (node,))
                node.replace_all_uses_with(passed, delete_user_cb=lambda user, new=passed: user is not new)
        code = graph.python_code("self")
        namespace = dict(code.globals)
        exec(compile(code.src, f"<lightning_lowbit forward of {type(self.module).__name__}>", "exec"), namespace)
        written = namespace["forward"]
        return torch.compile(written) if self.compiled else written

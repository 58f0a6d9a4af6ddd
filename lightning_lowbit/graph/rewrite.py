"""A container's forward with some of its calls led through low-bit modules: same code, same names, same
object.

The forward that torch.fx recorded is written back as Python on the instance. The module keeps its class, its
children and its keys, hooks on it and on every child still run, and what torch.compile sees is plain Python.
"""

from __future__ import annotations

import functools
import inspect
import keyword
import operator
import unicodedata
from typing import Any

import torch
import torch.fx
from torch import nn

from lightning_lowbit.errors import UnsupportedModelError
from lightning_lowbit.graph.network import placed_calls
from lightning_lowbit.graph.trace import (
    CallKey,
    Untraceable,
    bound_arguments,
    call_keys,
    constants,
    location,
    trace_container,
)

__all__ = ["TracedForward"]


class TracedForward:
    """Callable to put in ``module.__dict__["forward"]``.

    Args:
        module: the container.
        path: its path, for messages.
        instead: calls to replace, with the name of the child that takes the same arguments.
        after: calls whose result then passes a child.
        planned: the calls of the forwards that the plan was made for, one tuple per variant.
    """

    def __init__(
        self, module: nn.Module, path: str, instead: dict[CallKey, str], after: dict[CallKey, str],
        planned: set[tuple[CallKey, ...]],
    ) -> None:  # fmt: skip
        self.module, self.path, self.instead, self.after, self.planned = module, path, instead, after, planned
        parameters = list(self.__signature__.parameters.values())
        self.steered = any(p.default is not p.empty or p.kind is p.VAR_KEYWORD for p in parameters)
        self.functions: dict[Any, tuple[Any, list[str]]] = {}
        self.compiled = False

    @property
    def __signature__(self) -> inspect.Signature:
        signature = inspect.signature(type(self.module).forward)
        return signature.replace(parameters=list(signature.parameters.values())[1:])

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not self.steered:
            function, _ = self._function(self.module.training, {})
            return function(self.module, *args, **kwargs)
        bound = bound_arguments(self.module, args, kwargs)
        if bound is None:
            return type(self.module).forward(self.module, *args, **kwargs)  # raises Python's own TypeError
        fixed = constants(self.module, args, kwargs)
        function, parameters = self._function((self.module.training, *fixed.items()), fixed)
        positional: list[Any] = []
        keywords: dict[str, Any] = {}
        for name in parameters:
            kind = self.__signature__.parameters[name].kind
            if kind is inspect.Parameter.VAR_KEYWORD:
                keywords = bound.get(name, {})
            elif kind is inspect.Parameter.VAR_POSITIONAL:
                positional.extend(bound.get(name, ()))
            else:
                positional.append(bound[name])
        return function(self.module, *positional, **keywords)

    def _function(self, variant: Any, fixed: dict[str, Any]) -> tuple[Any, list[str]]:
        if variant not in self.functions:
            self.functions[variant] = self._write(fixed)
        return self.functions[variant]

    def compile(self) -> None:
        """Compile the written functions from now on."""
        if not self.compiled:
            self.compiled, self.functions = True, {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "functions": {}}  # written again from the class's code when first called

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # dynamo looks at what comes out
    def _write(self, fixed: dict[str, Any]) -> tuple[Any, list[str]]:
        graph = trace_container(self.module, self.path, self.module.training, fixed)
        if isinstance(graph, Untraceable):
            self._refuse(fixed, f"cannot be followed ({graph.where}: {graph.reason})")
        elif placed_calls(graph) not in self.planned:
            self._refuse(fixed, f"makes other calls than the one that was planned ({self._first_new(graph)})")
        assert isinstance(graph, torch.fx.Graph)
        for node, key in call_keys(graph).items():
            if key in self.instead:
                node.op, node.target = "call_module", self.instead[key]
            elif key in self.after:
                with graph.inserting_after(node):
                    passed = graph.call_module(self.after[key], (node,))
                node.replace_all_uses_with(passed, delete_user_cb=functools.partial(operator.is_not, passed))
        parameters = [str(node.meta["parameter"]) for node in graph.nodes if node.op == "placeholder"]
        places = _placeholders(graph)
        code = graph.python_code("self")
        namespace, source = dict(code.globals), code.src
        for place, access in places.items():
            source = source.replace(f"self.{place}", access)
        exec(compile(source, f"<lightning_lowbit forward of {type(self.module).__name__}>", "exec"), namespace)
        written = namespace["forward"]
        return (torch.compile(written) if self.compiled else written), parameters

    def _first_new(self, graph: torch.fx.Graph) -> str:
        """Where the forward leaves the plan."""
        nodes = {key: node for node, key in call_keys(graph).items()}
        known = {key for variant in self.planned for key in variant}
        new = [key for key in placed_calls(graph) if key not in known]
        return f"{new[0][0]} in {location(nodes[new[0]])}" if new else "some are left out"

    def _refuse(self, fixed: dict[str, Any], why: str) -> None:
        given = ", ".join(f"{name}={value!r}" for name, value in fixed.items()) or "these arguments"
        path = self.path or type(self.module).__name__
        raise UnsupportedModelError(
            f"{path}: with {given} in {'training' if self.module.training else 'evaluation'}, its forward "
            f"{why}; functional operations would stay off the grid unseen. The plan is made for the "
            "arguments' defaults and for the calls in the network's own code. Convert with "
            f"skip=['{path}'], or make the branch a module."
        )


def _placeholders(graph: torch.fx.Graph) -> dict[str, str]:
    """Give modules whose names are no Python a placeholder in ``graph``; by placeholder, the code that stands for it.

    Names such as keys of a ModuleDict may come from a checkpoint's hyperparameters, and torch.fx writes them as code.
    """
    found: dict[str, str] = {}
    for node in graph.nodes:
        if node.op in ("call_module", "get_attr") and not all(map(_is_name, node.target.split("."))):
            place = f"lowbit_place_{len(found)}_"
            found[place] = functools.reduce(
                lambda code, part: f"getattr({code}, {part!a})", node.target.split("."), "self"
            )
            node.target = place
    return found


def _is_name(part: str) -> bool:
    plain = part.isidentifier() and not keyword.iskeyword(part) and unicodedata.normalize("NFKC", part) == part
    return plain and not part.startswith("lowbit_place_")

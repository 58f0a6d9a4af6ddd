"""What a network does with a batch, call by call: low-bit modules and torch's own layers whole, functions by name.

It is the very forward that a validation runs: hooks watch it and change nothing.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_map

from lightning_lowbit.errors import UnsupportedModelError
from lightning_lowbit.graph.ops import is_leaf
from lightning_lowbit.modules.base import LowBitModule
from lightning_lowbit.modules.carrier import Carrier
from lightning_lowbit.modules.quantizer import Quantizer

__all__ = ["Node", "Recording", "Ref", "in_evaluation", "record"]


@dataclass(frozen=True)
class Ref:
    """A tensor of a recording: output ``position`` of call ``node``; node -1 are the network's inputs.

    ``word``: bits of the integers that it is kept in where a call reads it, 0 of floats.
    """

    node: int
    position: int
    word: int = field(default=0, compare=False)


@dataclass(eq=False)
class Node:
    """One call.

    Attributes:
        path: of the module, or the function's name behind the path of the module whose code calls it.
        target: the module, or the function.
        args, kwargs: what it was given, tensors as `Ref`; tensors that do not depend on the inputs as they are.
        result: what came out, tensors as `Ref`.
    """

    index: int
    path: str
    target: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    result: Any = None


@dataclass
class Recording:
    """All calls in their order, the tensors' shapes and dtypes, and what the network returned (tensors as `Ref`).

    ``reads``: places where Python took a number from a tensor, as an ``if`` does; such code may take another way.
    """

    nodes: list[Node] = field(default_factory=list)
    shapes: dict[Ref, tuple[int, ...]] = field(default_factory=dict)
    dtypes: dict[Ref, torch.dtype] = field(default_factory=dict)
    output: Any = None
    reads: list[str] = field(default_factory=list)


# What gives Python a number or a truth value.
_READS = frozenset({"__bool__", "__float__", "__index__", "__int__", "item", "tolist"})
# What takes a shape from a tensor and nothing else: the result is a constant.
_ONLY_SHAPES = frozenset({
    "zeros_like", "ones_like", "full_like", "empty_like", "new_zeros", "new_ones", "new_full", "new_empty",
})  # fmt: skip

_ALONE = threading.Lock()  # what watches a network is seen by all threads

Watch = Callable[[Ref, Tensor], None]


@contextmanager
def in_evaluation(module: nn.Module) -> Iterator[None]:
    """A network in evaluation mode, each of its parts left in the mode that it was in."""
    training = [part for part in module.modules() if part.training]
    module.eval()
    try:
        yield
    finally:
        for part in training:
            part.training = True


@torch.inference_mode(False)
@torch.no_grad()
def record(module: nn.Module, inputs: Sequence[Any], watch: Watch | None = None) -> Recording:
    """Run ``module`` on ``inputs`` in evaluation and write down what it calls.

    Args:
        module: converted, in evaluation mode.
        inputs: positional arguments of its forward.
        watch: is shown every tensor that a call gives, before anybody writes into it.
    """
    if module.training:
        raise UnsupportedModelError(f"{type(module).__name__}: got a module in training mode. Call eval() on it first.")
    inputs = tree_map(lambda x: x.clone() if isinstance(x, Tensor) and x.is_inference() else x, tuple(inputs))
    with _ALONE:
        return _recorded(module, inputs, watch)


def _recorded(module: nn.Module, inputs: Sequence[Any], watch: Watch | None) -> Recording:
    recorder = _Recorder(module, watch)
    known = 0
    for tensor in tree_flatten(inputs)[0]:
        if isinstance(tensor, Tensor):
            recorder.keep(tensor, Ref(-1, known))
            known += 1
    with recorder.watching(), torch.compiler.set_stance("force_eager"), recorder:
        result = module(*inputs)
    recorder.recording.output = recorder.refs(result)
    return recorder.recording


class _Recorder(TorchFunctionMode):
    def __init__(self, root: nn.Module, watch: Watch | None) -> None:
        super().__init__()
        self.watch, self.recording = watch, Recording()
        self.modules = list(root.modules())
        self.paths = {id(module): path for path, module in root.named_modules()}
        self.leaves = {id(module) for module in root.modules() if _is_leaf(module)}
        self.owners: list[str] = []  # modules whose code runs, innermost last
        self.depth = 0  # leaves that run
        self.known: dict[int, Ref] = {}
        self.alive: list[Tensor] = []  # so that no id is given twice
        self.versions: dict[Ref, tuple[Tensor, int]] = {}

    # -- tensors ---------------------------------------------------------------------------------------------------
    def keep(self, tensor: Tensor, ref: Ref) -> None:
        self.known[id(tensor)] = ref
        self.alive.append(tensor)
        self.recording.shapes[ref], self.recording.dtypes[ref] = tuple(tensor.shape), tensor.dtype
        if not isinstance(tensor, Carrier):
            self.versions[ref] = tensor, tensor._version
        if self.watch is not None:
            self.watch(ref, tensor)

    def refs(self, structure: Any) -> Any:
        """A structure with known tensors as refs."""
        return tree_map(self._ref, structure)

    def _ref(self, value: Any) -> Any:
        ref = self.known.get(id(value)) if isinstance(value, Tensor) else None
        if ref is None:
            return value
        tensor, version = self.versions.get(ref, (None, 0))
        if tensor is not None and tensor._version != version:
            name = self.recording.nodes[ref.node].path if ref.node >= 0 else "the input"
            raise UnsupportedModelError(
                f"{name}: its result was written to in place through a view, and is read again afterwards. Write out "
                "of place there (x = x + y for x += y)."
            )
        return replace(ref, word=8 * value.payload.element_size()) if isinstance(value, Carrier) else ref

    # -- calls -----------------------------------------------------------------------------------------------------
    def call(self, path: str, target: Any, operands: tuple[Any, Any], result: Any) -> None:
        """Write down a call, unless no known tensor goes in or no tensor comes out."""
        given = [x for x in tree_flatten(operands)[0] if isinstance(x, Ref)]
        made = [x for x in tree_flatten(result)[0] if isinstance(x, Tensor)]
        if not given or not made or getattr(target, "__name__", "") in _ONLY_SHAPES:
            return
        node = Node(len(self.recording.nodes), path, target, *operands)
        self.recording.nodes.append(node)
        for position, tensor in enumerate(made):
            self.keep(tensor, Ref(node.index, position))
        node.result = self.refs(result)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.depth or torch.compiler.is_compiling():
            return func(*args, **kwargs)
        before = self.refs((args, kwargs))
        self.depth += 1
        try:
            result = func(*args, **kwargs)
        finally:
            self.depth -= 1
        name = str(getattr(func, "__name__", func))
        name = str(func.__self__.__name__) if name == "__get__" and hasattr(func, "__self__") else name
        owner = self.owners[-1] if self.owners else ""
        if name in _READS and any(isinstance(x, Ref) for x in tree_flatten(before)[0]):
            self.recording.reads.append(_place(sys._getframe(1)))
        self.call(f"{owner}.{name}".lstrip("."), func, before, result)
        return result

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Hooks on all modules; a carrier that becomes a plain tensor stays the same value."""
        plain, entered = Carrier.plain, []

        here = threading.get_ident()

        def aliased(carrier: Carrier) -> Tensor:
            if threading.get_ident() != here:
                return plain(carrier)
            self.depth += 1
            try:
                tensor = plain(carrier)
            finally:
                self.depth -= 1
            ref = self.known.get(id(carrier))
            if ref is not None:
                self.known[id(tensor)] = ref
                self.alive.append(tensor)
            return tensor

        def enter(module: nn.Module, args: Any) -> None:
            if threading.get_ident() != here:
                return
            if id(module) in self.leaves:
                entered.append(None if self.depth else (self.refs(args), [id(x) for x in tree_flatten(args)[0]]))
                self.depth += 1
            elif not self.depth:
                self.owners.append(self.paths.get(id(module), ""))

        def leave(module: nn.Module, args: Any, kwargs: Any, result: Any) -> None:
            if threading.get_ident() != here:
                return
            if id(module) in self.leaves:
                self.depth -= 1
                before = entered.pop()
                if before is not None:
                    path, (given, ids) = self.paths[id(module)], before
                    if ids != [id(x) for x in tree_flatten(args)[0]]:
                        raise UnsupportedModelError(
                            f"{path}: a forward_pre_hook changes what it is given, unseen by whoever records calls. Do "
                            "that in the forward, or remove the hook."
                        )
                    self.call(path, module, (given, self.refs(kwargs)), result)
            elif not self.depth:
                self.owners.pop()

        watched = [module for module in self.modules if not isinstance(module, torch.jit.ScriptModule)]
        hooks = [module.register_forward_pre_hook(enter, prepend=True) for module in watched]
        hooks += [module.register_forward_hook(leave, prepend=True, with_kwargs=True) for module in watched]
        Carrier.plain = aliased  # type: ignore[assignment, method-assign]  # for as long as it is watched
        try:
            yield
        finally:
            Carrier.plain = plain  # type: ignore[method-assign]
            for hook in hooks:
                hook.remove()


def _place(frame: Any) -> str:
    """File, line and function of the innermost code that is not torch's."""
    while "torch" in Path(frame.f_code.co_filename).parts and frame.f_back is not None:
        frame = frame.f_back
    return f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno} in {frame.f_code.co_name}"


def _is_leaf(module: nn.Module) -> bool:
    """What is one call: ours, and layers of torch that hold nothing of ours."""
    if isinstance(module, (LowBitModule, Quantizer)):
        return True
    return is_leaf(module) and not any(isinstance(child, LowBitModule) for child in module.modules())

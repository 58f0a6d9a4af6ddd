"""The optimizer step: the scheme's update rule beside the user's optimizer, under any precision plugin."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from lightning.pytorch.plugins.precision import Precision
from torch import Tensor, nn

from lightning_lowbit.modules.base import LowBitModule, StepContext, UpdateRule, low_bit_modules, switch_of
from lightning_lowbit.modules.convert import quantizers
from lightning_lowbit.modules.layers import LowBitLayer
from lightning_lowbit.modules.quantizer import Quantizer

__all__ = ["LowBitPrecision", "low_bit", "lowbit_step", "owned_modules", "rule_of"]

_RULES: WeakKeyDictionary[nn.Module, UpdateRule | None] = WeakKeyDictionary()
_STEPS: WeakKeyDictionary[nn.Module, int] = WeakKeyDictionary()


def rule_of(model: nn.Module, renew: bool = False) -> UpdateRule | None:
    """The update rule of a converted network, made when it is first asked for (or anew)."""
    if renew or model not in _RULES:
        scheme = next((module.scheme for _, module in low_bit_modules(model)), None)
        _RULES[model] = None if scheme is None else scheme.update_rule(_holders(model))
    return _RULES[model]


def _holders(model: nn.Module) -> dict[str, nn.Module]:
    """Low-bit modules by path, and the user's own whose result a quantizer stands behind."""
    return {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, LowBitModule)
        or (not isinstance(module, Quantizer) and any(isinstance(child, Quantizer) for child in module.children()))
    }


def owned_modules(model: nn.Module, optimizer: torch.optim.Optimizer) -> set[str]:
    """Paths of the low-bit modules that step with ``optimizer``: the layers whose weight it holds.

    Norms and operations go with the layer that stands nearest to them (the longest common path).
    """
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    modules = _holders(model)  # one walk: this runs in every step
    # A pruned layer's weight is computed; the parameter behind it has this name in torch.
    layers = {
        path: id(getattr(m, "weight_orig", m.weight)) in held
        for path, m in modules.items()
        if isinstance(m, LowBitLayer)
    }
    if all(layers.values()):
        return set(modules)

    def common(a: str, b: str) -> int:
        parts = zip(a.split("."), b.split("."), strict=False)
        return next((n for n, (x, y) in enumerate(parts) if x != y), min(a.count("."), b.count(".")) + 1)

    return {p for p in modules if layers.get(p, layers[max(layers, key=lambda q: common(p, q))])}


def lowbit_step(
    model: nn.Module, optimizer: torch.optim.Optimizer, closure: Callable[[], Any] | None = None,
    context: StepContext | None = None, step: Callable[..., Any] | None = None,
) -> Any:  # fmt: skip
    """One optimizer step of a converted network: backward, the user's optimizer, the scheme's update rule.

    Args:
        model: a converted module.
        optimizer: the user's; thresholds and integer weights are not its business.
        closure: computes the loss and its gradients; None if they are there already.
        context: step counter and reductions; None counts the calls and stays in this process.
        step: how the optimizer steps, default ``optimizer.step``.
    Returns:
        what the optimizer's step returns.
    """
    switch = switch_of(model)
    switch.managed = True
    rule = rule_of(model)
    if context is None:
        context = StepContext(_STEPS.get(model, 0), None)
        _STEPS[model] = context.step + 1

    in_optimizer = {id(p) for group in optimizer.param_groups for p in group["params"]}  # in a Trainer it has none
    every = {id(p): p for _, q in quantizers(model) for p in q.parameters(recurse=False)}
    own = {key: parameter for key, parameter in every.items() if key in in_optimizer}
    held: dict[int, Tensor | None] = {}

    def after_backward() -> Any:
        result = closure() if closure is not None else None
        if rule is not None and switch.started:
            rule.before_step(optimizer, context)
            for key, parameter in own.items():  # an optimizer over all parameters must not step them too
                held[key], parameter.grad = parameter.grad, None
        return result

    result = (step or optimizer.step)(after_backward)
    if rule is not None and switch.started:
        for key, gradient in held.items():
            own[key].grad = gradient
        rule.step(owned_modules(model, optimizer), context)
    return result


class LowBitPrecision(Precision):
    """Explicit form for ``Trainer(plugins=[LowBitPrecision()])``; QuantCallback puts one in place by itself.

    It keeps full precision outside low-bit layers, as Lightning's default plugin does.
    """

    precision = "32-true"


def low_bit(base: Any, model: nn.Module, context: Callable[[], StepContext]) -> Any:
    """``base`` (a precision plugin of either Lightning namespace) with the update rule in its step.

    The class is made from the plugin's own, so that Lightning's checks by class and its clipping still hold.
    It keeps the qualified name, under which checkpoints store the plugin's state.
    """
    kind: Any = type(base)
    plugin: Any = object.__new__(_class_for(kind))
    plugin.__dict__.update(base.__dict__)
    plugin.__dict__.update(lowbit_model=model, lowbit_context=context, lowbit_steps=0)
    return plugin


@functools.cache
def _class_for(base: Any) -> Any:
    def optimizer_step(self: Any, optimizer: Any, model: Any, closure: Any, **kwargs: Any) -> Any:
        self.lowbit_steps += 1
        scaler: Any = getattr(self, "scaler", None)
        context: StepContext = self.lowbit_context()
        scaling = scaler is not None and scaler.is_enabled()
        if scaling:
            context = dataclasses.replace(context, grad_scale=scaler.get_scale())

        def step(after_backward: Callable[[], Any]) -> Any:
            if not scaling:
                return base.optimizer_step(self, optimizer, model=model, closure=after_backward, **kwargs)
            loss = after_backward()
            kind = base if _has_gradients(optimizer) else Precision  # a scaler refuses to step where there are none
            return kind.optimizer_step(self, optimizer, model=model, closure=lambda: loss, **kwargs)

        return lowbit_step(self.lowbit_model, optimizer, closure, context, step)

    def evaluation_context(name: str) -> Any:
        @contextmanager
        def context(self: Any) -> Iterator[None]:
            """Evaluation leaves autocast, so that its numbers do not depend on the training precision."""
            device = next((p.device.type for p in self.lowbit_model.parameters()), "cpu")
            with getattr(base, name)(self), torch.autocast(device, enabled=False):
                yield

        return context

    def clip_grad_by_value(self: Any, optimizer: Any, clip_val: float) -> None:
        if _has_gradients(optimizer):  # torch refuses to clip none
            base.clip_grad_by_value(self, optimizer, clip_val)

    def reduce(self: Any) -> Any:
        plain: Any = object.__new__(base)
        state = {k: v for k, v in self.__dict__.items() if not k.startswith("lowbit_")}
        plain.__dict__.update(state)
        return _restore, (plain,)

    contexts = ("val_step_context", "test_step_context", "predict_step_context")
    return type(
        base.__name__,
        (base,),
        {
            "optimizer_step": optimizer_step,
            "clip_grad_by_value": clip_grad_by_value,
            "__reduce__": reduce,
            "__qualname__": base.__qualname__,
            "__module__": base.__module__,
            **{name: evaluation_context(name) for name in contexts},
        },
    )


def _has_gradients(optimizer: Any) -> bool:
    """Whether any parameter has one: those of integer layers never do."""
    return any(p.grad is not None for group in optimizer.param_groups for p in group["params"])


def _restore(plain: Any) -> Any:
    """A pickled plugin comes back as the one that was there before; the next fit puts ours in its place."""
    return plain

"""WAGEUBN's update: gradients of a constant range, momentum that closes in integers, formats that follow the data."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from lightning_lowbit.errors import ConfigError, InvariantError
from lightning_lowbit.modules.base import LowBitModule, StepContext, UpdateRule
from lightning_lowbit.modules.error_gate import ErrorQuantizer
from lightning_lowbit.modules.fixed_norm import NormGrids
from lightning_lowbit.modules.widths import WidthQuantizer
from lightning_lowbit.numerics.constant import constant_codes, constant_quantize, uniform_draws
from lightning_lowbit.numerics.momentum import (
    integer_step_,
    learning_rate_code,
    momentum_code,
    recover,
    store,
)
from lightning_lowbit.numerics.noise import combine
from lightning_lowbit.numerics.shift import max_abs
from lightning_lowbit.schemes.step_advice import Notices, lr_notice
from lightning_lowbit.schemes.values import Values
from lightning_lowbit.schemes.wageubn_parameters import Stored, stored_parameters

if TYPE_CHECKING:
    from lightning_lowbit.schemes.wageubn import Wageubn

__all__ = ["ClosedRule"]

_LARGEST_GRADIENT = 2**24  # codes of gradients of norms and biases, which are not brought to a range


@dataclass(frozen=True)
class _Taken:
    gradient: Tensor
    lr: float
    momentum: float
    weight_decay: float


class ClosedRule(UpdateRule):
    """Quantizes gradients that are summed already, and steps the parameters it stores in place of the user's optimizer.

        g    = CQ(grad + decay w)          weights;  Q(grad) of gamma, beta and biases, which do not decay
        acc  = mom acc_q + g
        w    = w - lr acc
        acc_q = Q(acc)

    Learning rate, momentum and weight decay are those of the optimizer's group that holds the parameter. A step with a
    gradient, an error or an activation that is not finite on any process is left out, the user's own parameters
    included, and counted.

    Args:
        scheme: its options.
        modules: by path, the low-bit modules and those of the user's that hold a quantizer.

    Attributes:
        masters: by parameter name, codes of stored weights, int32.
        accumulators: by parameter name, codes of momentum, int16 (int32 of gamma, beta and biases).
        skipped: steps left out.
    """

    inert: ClassVar[dict[str, str]] = {
        "gradient_clip_val": "gradients are brought to one range, dr; layers and norms in low bits",
    }

    def __init__(self, scheme: Wageubn, modules: dict[str, nn.Module]) -> None:
        self.scheme, self.format = scheme, scheme.update_format
        self.stored = stored_parameters(modules)
        self.places = {name: place for place, name in enumerate(self.stored)}
        self.names = {id(entry.parameter): name for name, entry in self.stored.items()}
        held = [child for module in modules.values() for child in module.children()]
        self.norms = [child for child in held if isinstance(child, NormGrids)]
        self.widths = [child for child in held if isinstance(child, WidthQuantizer) and child.leader is child]
        self.gates = [
            child.gate for child in held if isinstance(child, (ErrorQuantizer, WidthQuantizer)) and child.gate
        ]
        self.switch = next(module.switch for module in modules.values() if isinstance(module, LowBitModule))
        self.dr = Values("dr", scheme.dr or (128,))
        self.begun = True
        self.masters: dict[str, Tensor] = {}
        self.accumulators: dict[str, Tensor] = {}
        self.taken: dict[str, _Taken] = {}
        self.skipped = 0
        self._stepped: list[str] = []  # parameters with a gradient in this step
        self._drawn: dict[str, tuple[int, int]] = {}  # step and number of a parameter's last update
        self.notices = Notices(self.format)

    def before_batch(self, continues: bool) -> None:
        """What was met since the last step and is no part of this one: an evaluation, a batch that was given up."""
        if continues:
            return
        self.switch.run.nonfinite = 0
        for quantizer in self.widths:
            quantizer.width[-3:] = 0.0

    def milestone(self, what: str, reached: bool, when: int) -> None:
        if self.dr.follow(what, reached):
            return
        if what == "quantize_norms":
            for norm in self.norms:
                norm.switch_on(reached)
        elif what == "quantize_errors":
            for gate in self.gates:
                gate.on = reached
        elif what == "quantize_gradients":
            self.begun = reached
        elif what == "freeze_widths":
            for quantizer in self.widths:
                quantizer.rule.freeze(quantizer.width, reached or quantizer.form.integer is not None)

    # -- one step -----------------------------------------------------------------------------------------
    @torch.no_grad()
    def before_step(self, optimizer: torch.optim.Optimizer, context: StepContext) -> None:
        self.taken.clear()
        self._stepped = []
        if self._finds_nonfinite(optimizer, context):
            self._skip(optimizer, context)
            return
        self._stepped = [name for name, parameter in self._held(optimizer) if parameter.grad is not None]
        if self.begun and self.scheme.update == "integer":
            self._take(optimizer, context)
        elif self.begun and self.scheme.gradients:
            for name, parameter in self._held(optimizer):
                if self.stored[name].weight and parameter.grad is not None:
                    gradient, draws = parameter.grad, self._draws(name, parameter.grad, context)
                    value, _ = constant_quantize(gradient, draws, dr=self.dr.now, bits=self.format.gradient)
                    gradient.copy_(value * context.grad_scale)

    def _held(self, optimizer: torch.optim.Optimizer) -> list[tuple[str, nn.Parameter]]:
        every = [p for group in optimizer.param_groups for p in group["params"]]
        return [(self.names[id(p)], p) for p in every if id(p) in self.names]

    def _finds_nonfinite(self, optimizer: torch.optim.Optimizer, context: StepContext) -> bool:
        """Whether any process met a value that is none, in this step's gradients, errors or activations."""
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        found = [~torch.isfinite(max_abs(_numbers(g))) for g in gradients]
        found += [~torch.isfinite(q.width[-1]) for q in self.widths]  # their reach
        errors, self.switch.run.nonfinite = self.switch.run.nonfinite, 0
        device = found[0].device if found else torch.device("cpu")
        count = torch.stack(found).sum() if found else torch.zeros((), dtype=torch.int64)
        return bool(context.reduce_max((count + torch.as_tensor(errors, device=device)).to(torch.int64)) > 0)

    def _skip(self, optimizer: torch.optim.Optimizer, context: StepContext) -> None:
        self.skipped += 1
        every = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        if context.grad_scale != 1.0:  # a gradient scaler looks for its scale this way, in the gradients
            told = next((p.grad for p in every if p.grad is not None), None)
            if told is not None:
                (told._values() if told.is_sparse else told).fill_(torch.inf)
            return
        for parameter in every:
            parameter.grad = None
        self.notices.warn(
            "skipped",
            f"step {context.step}: NaN or infinite values in gradients, errors or activations. The step is left out "
            "and counted (skipped_steps); look at the batch, the loss and the learning rate.",
        )

    def _take(self, optimizer: torch.optim.Optimizer, context: StepContext) -> None:
        for group in optimizer.param_groups:
            momentum = self.scheme.momentum
            momentum = float(group.get("momentum", 0.25)) if momentum is None else momentum
            lr = float(group["lr"]) * self.scheme.lr_scale
            decay = 0.0 if group.get("decoupled_weight_decay") else float(group.get("weight_decay", 0.0))
            taken = False
            for parameter in group["params"]:
                name = self.names.get(id(parameter))
                if name is None or parameter.grad is None:
                    continue
                gradient = -parameter.grad if group.get("maximize") else parameter.grad
                self.taken[name], parameter.grad, taken = _Taken(gradient, lr, momentum, decay), None, True
            if taken:
                self.notices.of_group(group, lr, momentum)
                self._tell_reach(group, momentum, context)

    def _tell_reach(self, group: dict[str, Any], momentum: float, context: StepContext) -> None:
        """Behind a third of the run, where a warm-up is over: how far the largest rate so far carries weights."""
        steps = context.total_steps
        if steps is None or context.step < steps * 0.35 or not self.notices.first("reach"):
            return
        ours = [self.stored[self.names[id(p)]] for p in group["params"] if id(p) in self.names]
        spread = [float(e.parameter.detach().std()) * 2.0**-e.power for e in ours if e.weight]
        enough = (2.0, 5.0) if self.scheme.weight_range == "fit" else (8.0, 30.0)
        words = lr_notice(spread, self.notices.largest, momentum, self.dr.now, self.format, steps, *enough)
        self.notices.tell("carries", words)

    @torch.no_grad()
    def step(self, owned: set[str], context: StepContext) -> None:
        offsets: dict[Any, list[str]] = defaultdict(list)
        for name in sorted(self.taken):
            taken, entry = self.taken[name], self.stored[name]
            if entry.weight:
                self._update(name, entry, taken, context)
            else:
                offsets[taken.lr, taken.momentum, entry.parameter.device, entry.parameter.dtype].append(name)
        for (lr, momentum, *_), names in offsets.items():
            self._update_offsets(names, lr, momentum, context)
        self.taken.clear()
        if self.scheme.update == "fake" and self.begun:
            for entry in (self.stored[name] for name in self._stepped):
                codes = recover(entry.parameter * 2.0**-entry.power, self.format, self._bits(entry))
                entry.parameter.copy_(store(codes, self.format) * 2.0**entry.power)
        self._follow(context)

    def _update(self, name: str, entry: Stored, taken: _Taken, context: StepContext) -> None:
        gradient = taken.gradient.to_dense() if taken.gradient.is_sparse else taken.gradient
        if taken.weight_decay:
            gradient = gradient.add(entry.parameter.detach(), alpha=taken.weight_decay * context.grad_scale)
        codes, _ = constant_codes(gradient, self._draws(name, gradient, context), dr=self.dr.now)
        if self.scheme.check and int(codes.abs().max()) >= self.dr.now:
            raise InvariantError(f"{name}: quantized gradients reach {int(codes.abs().max())}, expected below dr.")
        master, acc = self._master(name, entry), self._accumulator(name, entry)
        lr, momentum = learning_rate_code(taken.lr, self.format), momentum_code(taken.momentum, self.format)
        integer_step_(master, acc, codes, lr, momentum, self.format, self._bits(entry))
        entry.parameter.copy_(self._shown(entry, master))

    def _update_offsets(self, names: list[str], lr: float, momentum: float, context: StepContext) -> None:
        """Gammas, betas and biases in one go: they are many and small."""
        entries = [self.stored[name] for name in names]
        values = [entry.parameter.detach().reshape(-1) for entry in entries]
        known = [self.masters.get(name) for name in names]
        flat = None if None in known else torch.cat([codes.reshape(-1) for codes in known if codes is not None])
        if flat is None or not torch.equal(store(flat, self.format).to(values[0].dtype), torch.cat(values)):
            flat = torch.cat(
                [self._master(name, entry).reshape(-1) for name, entry in zip(names, entries, strict=True)]
            )
        accs = [self._accumulator(name, entry) for name, entry in zip(names, entries, strict=True)]
        acc = torch.cat([values.reshape(-1) for values in accs])
        gradient = torch.cat([self.taken[name].gradient.reshape(-1) for name in names]) / context.grad_scale
        codes = torch.round(gradient.to(torch.float64) * 2.0 ** (self.format.gradient - 1))
        codes = codes.clamp_(-_LARGEST_GRADIENT, _LARGEST_GRADIENT).to(torch.int32)
        rates = learning_rate_code(lr, self.format), momentum_code(momentum, self.format)
        integer_step_(flat, acc, codes, *rates, self.format, None)
        sizes, shown = [value.numel() for value in values], store(flat, self.format)
        for name, entry, *parts in zip(
            names, entries, *(torch.split(part, sizes) for part in (flat, acc, shown)), strict=True
        ):
            master, kept, value = (part.view_as(entry.parameter) for part in parts)
            self.masters[name], self.accumulators[name] = master.clone(), kept.clone()
            entry.parameter.copy_(value)

    def _accumulator(self, name: str, entry: Stored) -> Tensor:
        if name not in self.accumulators:
            # Where the widths close, it never exceeds the largest gradient.
            narrow = entry.weight and self.format.closes
            zeros = torch.zeros_like(entry.parameter, dtype=torch.int16 if narrow else torch.int32)
            self.accumulators[name] = zeros
        return self.accumulators[name]

    def _draws(self, name: str, like: Tensor, context: StepContext) -> Tensor | None:
        """Uniform numbers, the same on all processes: of the seed, the step and the parameter's place."""
        if self.scheme.rounding == "nearest":
            return None
        injected = self.switch.run.injected
        if injected is not None:
            return injected(name, "gradient", 1, like.numel()).reshape(like.shape).to(like.device)
        step, times = self._drawn.get(name, (context.step, 0))
        times = times + 1 if step == context.step else 1
        self._drawn[name] = context.step, times
        again = (times,) if times > 1 else ()  # several updates in one batch, each with numbers of its own
        return uniform_draws(combine(self.scheme.seed, context.step, self.places[name], *again), like)

    def _master(self, name: str, entry: Stored) -> Tensor:
        """Stored codes. Where somebody else has written to the parameter (a load, a hook) they begin at its values."""
        known = self.masters.get(name)
        if known is None or not torch.equal(self._shown(entry, known), entry.parameter):
            value = entry.parameter.detach() * 2.0**-entry.power
            known = recover(value, self.format, self._bits(entry))
            if entry.weight and self.begun:
                self._tell_clipped(name, value)
            most = self.format.stored_limit(None) * 2.0 ** (1 - self.format.weight)
            if not entry.weight and float(value.abs().max()) > most:
                raise ConfigError(
                    f"{name}: got a value of {float(value.abs().max()):g}, expected at most {most:g}, which is what "
                    f"{self.format.weight} stored bits hold. Take fewer stored_bits, leave the layer float with skip=, "
                    "or take update='fake'."
                )
            self.masters[name] = known
        return known

    def _tell_clipped(self, name: str, value: Tensor) -> None:
        beyond = int((value.abs() >= 1.0).sum())
        if not beyond or self.scheme.weight_range == "one":
            return
        words = (
            f"{name}: {beyond} of {value.numel()} weights are beyond the range that it has had since its calibration, "
            "and are clipped to it"
        )
        if self.scheme.quantize_gradients == 0:
            self.notices.warn(f"clipped {name}", f"{words}. Load weights first, then calibrate.")
        else:  # the user's optimizer has moved them until now
            self.notices.tell(f"clipped {name}", words)

    def _bits(self, entry: Stored) -> int | None:
        """The bits of a weight whose stored codes end with them; None of what has no such end."""
        return None if entry.quantizer is None or not self.scheme.clip_stored else entry.quantizer.bits

    def _shown(self, entry: Stored, master: Tensor) -> Tensor:
        return store(master, self.format).mul_(2.0**entry.power).to(entry.parameter.dtype)

    def _follow(self, context: StepContext) -> None:
        """Integer bits of all activations, by what this step saw on all processes."""
        for rule, members in _by_rule(self.widths).items():
            states = torch.stack([quantizer.width for quantizer in members])
            if context.world > 1:
                rule.reduce(
                    states, lambda tensor, op: {"sum": context.reduce_sum, "max": context.reduce_max}[op](tensor)
                )
            rule.commit(states)
            for quantizer, state, integer in zip(members, states, states[:, 0].round().tolist(), strict=True):
                quantizer.width.copy_(state)
                quantizer.keep(int(integer))
        if context.world > 1 and self.norms:
            guards = context.reduce_max(torch.stack([norm.guard for norm in self.norms]))
            for norm, guard in zip(self.norms, guards, strict=True):
                norm.guard.copy_(guard)

    # -- reports and state --------------------------------------------------------------------------------
    def news(self) -> list[str]:
        return self.notices.take()

    def notes(self) -> list[str]:
        return [f"{self.skipped} steps were left out: something in them was not finite"] if self.skipped else []

    def logged(self) -> dict[str, float]:
        return {"dr": float(self.dr.now), "skipped_steps": float(self.skipped)}

    def state_dict(self) -> dict[str, Any]:
        return {
            "masters": {name: codes.clone() for name, codes in self.masters.items()},
            "accumulators": {name: codes.clone() for name, codes in self.accumulators.items()},
            "skipped": self.skipped,
        }

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        if not state:
            return
        unknown = sorted(state["masters"].keys() - self.stored.keys())
        if unknown:
            raise ConfigError(
                f"{unknown[0]}: the checkpoint holds its stored weight, this network has no such low-bit parameter. "
                "Load into the code that was trained, with the same skip= and include=."
            )
        self.skipped = state["skipped"]
        for name, codes in state["masters"].items():
            entry = self.stored[name]
            self.masters[name] = codes.clone().to(entry.parameter.device)
            if not torch.equal(self._shown(entry, self.masters[name]), entry.parameter):
                self.notices.warn(name, f"{name}: the checkpoint's weight differs from its integers, which are taken.")
                entry.parameter.copy_(self._shown(entry, self.masters[name]))
        for name, codes in state["accumulators"].items():
            self.accumulators[name] = codes.clone().to(self.stored[name].parameter.device)


def _numbers(gradient: Tensor) -> Tensor:
    """The real numbers of a gradient of whatever kind: the user's own parameters may be sparse or complex."""
    values = gradient.coalesce().values() if gradient.is_sparse else gradient
    return torch.view_as_real(values) if values.is_complex() else values


def _by_rule(widths: list[WidthQuantizer]) -> dict[Any, list[WidthQuantizer]]:
    """Quantizers under one rule: decided in one go."""
    found: dict[Any, list[WidthQuantizer]] = {}
    for quantizer in widths:
        found.setdefault(quantizer.rule, []).append(quantizer)
    return found

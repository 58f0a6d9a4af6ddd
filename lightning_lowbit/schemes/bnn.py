"""BNN: signs in place of numbers (Courbariaux, Hubara et al., arXiv:1602.02830; XNOR-Net, Bi-Real Net, ReActNet, Bop).

A binary layer multiplies signs with signs, so that its sums are counts of agreeing bits; latent weights in float learn
through the signs, and batch norms stay float.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import Tensor, nn

from lightning_lowbit.errors import ConfigError
from lightning_lowbit.graph.network import Flow
from lightning_lowbit.graph.ops import Kind
from lightning_lowbit.graph.plan import Plan
from lightning_lowbit.modules.base import Milestone, Moment, Scheme, Site, UpdateRule
from lightning_lowbit.modules.binary import LatentSign, Rectifier, Replacement, SignInput
from lightning_lowbit.modules.binary_layers import binary_layer, binary_norm, integer_end
from lightning_lowbit.modules.binary_lint import binary_findings
from lightning_lowbit.modules.binary_lowering import lower_binary
from lightning_lowbit.modules.layers import LowBitLayer
from lightning_lowbit.modules.lowering import Builder
from lightning_lowbit.modules.moments import check_moment
from lightning_lowbit.modules.norm import LowBitBatchNorm, has_seen_data
from lightning_lowbit.modules.quantizer import Quantizer
from lightning_lowbit.modules.running import RunningRange
from lightning_lowbit.modules.thresholds import BiasQuantizer
from lightning_lowbit.numerics.binary import ScaleGrad, Ste
from lightning_lowbit.schemes.options import check_choice

__all__ = ["Bnn"]

End = Literal["float", "float_input", "binary", "int8"]


@dataclass(frozen=True)
class Bnn(Scheme):
    """Binary weights and inputs; float batch norms, biases and end layers.

    Args:
        ste: what stands in for the derivative of an input's sign: identity, htanh (1 within [-1, 1]), approx
            (Bi-Real), swish (BNN+), annealed (IR-Net) or progressive.
        weight_ste: the same for the sign of a latent weight.
        scale: what a weight's signs are multiplied with: none, max (of the tensor) or channel_mean (XNOR-Net).
        scale_grad: gradient that passes a channel_mean: unit (as in Bi-Real), alpha (as in larq) or full.
        stochastic: draw signs in training, of activations (but under ste="progressive"), of weights or of both.
        first: the first layer (by data flow): float, float_input (binary weights), binary, or int8.
        last: the last layer, likewise.
        depthwise: depthwise convolutions: float or binary.
        pad_value: what stands around a binary layer's input: 0 as in the float network, or 1.
        relu: a rectifier whose result a binary layer reads: keep (all signs are +1: said once), hardtanh, prelu or
            rprelu (ReActNet).
        shift: learn a shift per channel in front of every input's sign (RSign, ReActNet).
        shift_init: where shifts begin: zero (as published), or mean (minus the channel's mean in calibration), with
            which a sign keeps something of a rectifier's result; auto is mean for weights that come from elsewhere.
        weights_at: when weights become binary: 0 at once, or later, after a first stage of binary inputs and float
            weights; fractions count from the start of quantization.
        latent_std: standard deviation to which weights are rescaled, tensor by tensor, when they become latent; no sign
            changes. None leaves them; "auto" is 0.3 for weights that come from elsewhere (init_from=, batch norms
            that have seen data) or from a first stage, None else.
        update: latent (the user's optimizer moves latent weights, clipped to [-1, 1]) or bop (no latents: a sign flips
            when the mean of its gradients says so).
        bop_gamma: how fast that mean forgets.
        bop_threshold: how large it must be for a flip.
        clip_bias: clip binary layers' biases to [-1, 1] too, as code of 2017 did.
        param_lr: Adam's rate for shifts and slopes, which fall along a cosine.
        detect_nan: raise in training where a NaN would become +1; costs one pass over every input.
        seed: of stochastic signs.
    """

    name: ClassVar[str] = "bnn"

    ste: Ste = "htanh"
    weight_ste: Ste = "identity"
    scale: Literal["none", "max", "channel_mean"] = "none"
    scale_grad: ScaleGrad = "alpha"
    stochastic: Literal["none", "activations", "weights", "both"] = "none"
    first: End = "float"
    last: End = "float"
    depthwise: Literal["float", "binary"] = "float"
    pad_value: Literal[0, 1] = 0
    relu: Replacement = "keep"
    shift: bool = False
    shift_init: Literal["auto", "zero", "mean"] = "auto"
    weights_at: Moment = 0
    latent_std: float | Literal["auto"] | None = "auto"
    update: Literal["latent", "bop"] = "latent"
    bop_gamma: float = 1e-4
    bop_threshold: float = 1e-8
    clip_bias: bool = False
    param_lr: float = 1e-3
    detect_nan: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        for option in (
            "ste", "weight_ste", "scale", "scale_grad", "stochastic", "first", "last", "depthwise", "pad_value", "relu",
            "shift_init", "update",
        ):  # fmt: skip
            check_choice(type(self), option, getattr(self, option))
        if self.weight_ste in ("progressive", "annealed"):
            raise ConfigError(
                f"Bnn(weight_ste={self.weight_ste!r}): it anneals the signs of activations (ste=). Take identity, "
                "htanh, approx or swish for weights."
            )
        if self.weights_at is None:
            raise ConfigError(
                "Bnn(weights_at=None): weights that never become binary. Give a moment, or 0 for at once."
            )
        check_moment("Bnn: weights_at", self.weights_at)
        if self.shift_init == "mean" and not self.shift:
            raise ConfigError(f"Bnn(shift_init={self.shift_init!r}) without shift=True: there is no shift to begin.")
        for option, low, high in (
            ("bop_gamma", 0, 1),
            ("bop_threshold", 0, float("inf")),
            ("param_lr", 0, float("inf")),
        ):
            if not low <= getattr(self, option) <= high:
                raise ConfigError(f"Bnn({option}={getattr(self, option)!r}): expected a number from {low} to {high}.")
        std = self.latent_std
        known = 0 < std < float("inf") if isinstance(std, (int, float)) else std in ("auto", None)
        if not known:
            raise ConfigError(f"Bnn(latent_std={std!r}): expected a positive number, 'auto' or None.")
        if self.update == "bop" and (self.scale != "none" or self.stochastic in ("weights", "both") or self.weights_at):
            raise ConfigError(
                "Bnn(update='bop'): its weights are signs and nothing else; leave scale='none', stochastic='none' or "
                "'activations', and weights_at=0."
            )

    # -- the seam ----------------------------------------------------------------------------------------------
    def adapted_to(self, root: nn.Module, pretrained: bool) -> Bnn:
        seen = pretrained or any(has_seen_data(module) for module in root.modules())
        trained = seen or bool(self.weights_at)  # by the first stage
        return self._decided(0.3 if trained else None, "mean" if seen and self.shift else "zero")

    def like(self, other: Scheme) -> Bnn:
        return self._decided(other.latent_std, other.shift_init) if isinstance(other, Bnn) else self

    def _decided(self, latent_std: float | str | None, shift_init: str) -> Bnn:
        return self.replace(
            latent_std=latent_std if self.latent_std == "auto" else self.latent_std,
            shift_init=shift_init if self.shift_init == "auto" else self.shift_init,
        )

    def leaves_float(self, site: Site, module: nn.Module) -> str | None:
        if not isinstance(module, (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)):
            return f"{type(module).__name__} has no binary form"
        if hasattr(module, "weight_orig"):
            return "it is pruned, and a binary weight has no zero"
        if self.policy(site) == "float":
            end = "first" if site.first else "last" if site.last else "depthwise"
            return f"{end} layer, by {end}='float'"
        return None

    def tied(self, root: nn.Module, flow: Flow, plan: Plan) -> list[list[str]]:
        return [tie for tie in plan.ties if tie[0].endswith(".lowbit_weight")]  # signs have no step to share

    def policy(self, site: Site) -> str:
        """float, float_input, binary or int8: what becomes of the layer that a site belongs to."""
        if site.first:
            return self.first
        if site.last:
            return self.last
        return self.depthwise if site.depthwise else "binary"

    def quantizer(self, site: Site) -> Quantizer | None:
        made: SignInput | LatentSign | None = None
        if site.role in ("output", "operand") and site.op == "relu":
            read = site.multiplied and self.policy(site) == "binary"
            return Rectifier(site, self.relu) if read and self.relu != "keep" else None
        if site.role not in ("input", "weight", "bias"):
            return None
        policy = self.policy(site)
        if policy == "int8":
            return BiasQuantizer(site, 32, own=False) if site.role == "bias" else RunningRange(site)
        if site.role == "input" and policy == "binary":
            stochastic = self.stochastic in ("activations", "both")
            made = SignInput(site, self.ste, stochastic, self.shift_init if self.shift else None, self.detect_nan)
        elif site.role == "weight":
            stochastic = self.stochastic in ("weights", "both")
            made = LatentSign(site, self.weight_ste, self.scale, self.scale_grad, stochastic, bool(self.weights_at))
        if made is not None:
            made.__dict__["scheme"] = self
        return made

    def batch_norm(self, site: Site, norm: nn.Module) -> str:
        return "island"

    def forward(self, layer: Any, x: Tensor) -> Tensor:
        if not layer.switch.quantizing:
            return layer.quantized(x)  # type: ignore[no-any-return]  # calibration: float
        return binary_layer(layer, x) if isinstance(layer.lowbit_weight, LatentSign) else integer_end(layer, x)

    def compute(self, layer: Any, *operands: Any, **settings: Any) -> Tensor:
        if isinstance(layer, LowBitBatchNorm):
            return binary_norm(layer, *operands)
        return layer.op(*operands, **settings)  # type: ignore[no-any-return]

    def lower(self, build: Builder, module: Any, *operands: Any, **settings: Any) -> Any:
        return lower_binary(build, module, *operands, **settings)

    def findings(self, root: nn.Module, flow: Flow, plan: Plan) -> list[str]:
        binary = {layer.path for layer in plan.layers if _reads_signs(root.get_submodule(layer.path))}
        replaced = {op.call.name for op in plan.ops if _replaces(root.get_submodule(op.path))}
        if self.shift and self.shift_init == "mean":  # signs are taken about a rectifier's mean
            replaced |= {call.name for call in flow.calls if call.kind is Kind.RELU}
        return [str(finding) for finding in binary_findings(root, flow, binary, replaced)]

    def update_rule(self, modules: dict[str, nn.Module]) -> UpdateRule:
        from lightning_lowbit.schemes.bnn_training import BopRule, LatentRule

        return (BopRule if self.update == "bop" else LatentRule)(self, modules)

    def milestones(self) -> tuple[Milestone, ...]:
        return (Milestone(self.weights_at, "binarize_weights"),) if self.weights_at else ()

    def activation_bits(self) -> int:
        return 16  # sums of signs: bfloat16 counts to 256 only


def _reads_signs(layer: nn.Module) -> bool:
    return isinstance(layer, LowBitLayer) and isinstance(layer.lowbit_input, SignInput)


def _replaces(op: nn.Module) -> bool:
    return isinstance(getattr(op, "lowbit_output", None), Rectifier)

"""BNN's golden vectors: signs, straight-through estimators, layers, losses, thresholds, and whole trajectories."""

from __future__ import annotations

import math
from unittest.mock import patch

import torch
import torch.nn.functional as F
from schemes.vector_table import Comparison, Kind, VectorFile
from torch import Tensor, nn

from lightning_lowbit.kernels import pack_signs, xnor_matmul
from lightning_lowbit.modules.hinge import hinge_loss
from lightning_lowbit.numerics.affine import affine, affine_parameters, sign_thresholds
from lightning_lowbit.numerics.binary import (
    binarize,
    binary_sign,
    probability_sign,
    progressive_width,
    scaled_sign,
    swish_slope,
)
from lightning_lowbit.plugins.precision import lowbit_step
from lightning_lowbit.schemes import convert
from lightning_lowbit.schemes.bnn import Bnn

PROMISED = 6  # steps of a trajectory that must agree; behind them one flipped sign changes everything
CLOSE = {"rtol": 1e-5, "atol": 1e-6}


def backward(y: Tensor, x: Tensor, g: Tensor) -> Tensor:
    return torch.autograd.grad(y, x, g)[0]


# -- signs ---------------------------------------------------------------------------------------------------
def check_det(v: Comparison) -> None:
    x, g, scale = v["x"].requires_grad_(), v["grad_out"], v["scale"]
    signs = binary_sign(x.detach())
    zero = x.detach() == 0
    v.exact("y_spec", signs)
    v.exact("zero_mask", zero)
    for key in ("y_ref", "y_ref_2019"):  # torch.sign: a third value at 0
        v.exact(key, torch.sign(x))
    v.exact("scale", x.detach().abs().max())
    vanished = x.detach() / scale == 0  # the published code divides first: small values join the zeros
    v.exact("y_ref_scaled", torch.where(vanished, 0.0, scaled_sign(x.detach(), scale)))
    v.exact("grad_in_ref", backward(binarize(x, "identity"), x, g))
    v.exact("grad_htanh_closed", backward(binarize(x, "htanh"), x, g))
    v.exact("grad_htanh_open", backward(F.hardtanh(x), x, g))
    v.exact("grad_blog_clamp", g.clamp(-1, 1))
    v.notes.append(f"{int(zero.sum())} zeros of {x.numel()} values")


def check_stochastic(v: Comparison) -> None:
    x, u, scale = v["x"], v["u"], v["scale"]
    for key in ("y", "y_2019"):
        v.exact(key, probability_sign(x, u))
    v.exact("scale", x.abs().max())
    v.exact("y_scaled", scaled_sign(x, scale, u=u))
    v.close("p", ((x + 1) / 2).clamp(0, 1), **CLOSE)


def check_ste(v: Comparison) -> None:
    x, g = v["x"].requires_grad_(), v["grad_out"]
    v.exact("approx_sign_y", binarize(x, "approx"))
    v.exact("bireal_y", torch.sign(x))
    for key in ("approx_sign_grad", "bireal_grad"):
        v.close(key, backward(binarize(x, "approx"), x, g), **CLOSE)
    for match in v.matching(r"swish_beta(\d+)_grad"):
        v.close(match[0], g * swish_slope(x.detach(), beta=float(match[1])), **CLOSE)
        if match[1] == "5":
            v.close(match[0], backward(binarize(x, "swish"), x, g), **CLOSE)
    for match in v.matching(r"progressive_T(\d+)_y"):
        width = 1 - int(match[1]) / 100
        y = binarize(x, "progressive", torch.tensor(1.0 if width == 0 else -math.log(width, 4) / 10))
        # The published ramp never ends: at T = 1 its width is 1e-7. Ours ends in the sign.
        v.close(match[0], (x / 1e-7).clamp(-1, 1) if width == 0 else y, **CLOSE)
        v.close(match[0].replace("_y", "_grad"), backward(y, x, g), **CLOSE)
    widths = torch.stack([progressive_width(s, torch.ones(())) for s in v["progressive_schedule_s"].float()])
    v.close("progressive_schedule_T", 1 - widths, atol=1e-6)


# -- layers --------------------------------------------------------------------------------------------------
def layer_of(v: Comparison, **options: object) -> nn.Module:
    """The file's layer as the package converts it, in training, with the file's latent weight."""
    weight = v["latent"]
    bias = v["bias"] if "bias" in v.arrays else torch.empty(0)
    if weight.dim() == 2:
        layer: nn.Module = nn.Linear(weight.shape[1], weight.shape[0], bias=bias.numel() > 0)
    else:
        settings = {name: v.count(name) for name in ("stride", "padding", "dilation", "groups") if name in v.arrays}
        channels = weight.shape[1] * settings.get("groups", 1)
        layer = nn.Conv2d(channels, weight.shape[0], weight.shape[2:], bias=bias.numel() > 0, **settings)  # type: ignore[arg-type]
    net = nn.Sequential(layer)
    binarized = bool(v["binarize_input"]) if "binarize_input" in v.arrays else False
    convert(net, Bnn(ste="identity", first="binary" if binarized else "float_input", **options), v["x"])  # type: ignore[arg-type]
    with torch.no_grad():
        layer.weight.copy_(weight)  # type: ignore[operator, union-attr]
        if bias.numel():
            layer.bias.copy_(bias)  # type: ignore[operator, union-attr]
    return net.train()


def compare_layer(v: Comparison, net: nn.Module) -> None:
    x = v["x"].requires_grad_()
    y = net(x)
    y.backward(v["grad_out"])
    v.close("y", y, **CLOSE)
    v.close("grad_x", x.grad, **CLOSE)
    v.close("grad_latent", net[0].weight.grad, **CLOSE)  # type: ignore[index]
    if "grad_bias" in v.arrays:
        bias = net[0].bias  # type: ignore[index]
        v.close("grad_bias", torch.empty(0) if bias is None else bias.grad, **CLOSE)
    net.eval()
    with torch.no_grad():
        v.close("y", net(v["x"]), **CLOSE)  # bare signs, then the scale


def check_layer(v: Comparison) -> None:
    compare_layer(v, layer_of(v))


def check_conv(v: Comparison) -> None:
    check_layer(v)
    with torch.no_grad():
        padded = layer_of(v, pad_value=1)(v["x"])
        v.close("y_pad_one", padded, **CLOSE)
        v.close("pad_correction", (padded - layer_of(v)(v["x"]))[:1], rtol=1e-5, atol=1e-4)


def check_channel_scale(v: Comparison) -> None:
    """Bi-Real's layer: its input is real here, its latent gradient is masked and not multiplied by alpha."""
    net = layer_of(v, scale="channel_mean", scale_grad="unit", weight_ste="htanh")
    v.close("alpha", net[0].lowbit_weight.scale(v["latent"]).flatten(), **CLOSE)  # type: ignore[index, union-attr, operator]
    compare_layer(v, net)


# -- losses, bits, thresholds --------------------------------------------------------------------------------
def check_hinge(v: Comparison) -> None:
    z, label = v["input"].requires_grad_(), v["label"]
    target = F.one_hot(label, z.shape[1]) * 2.0 - 1
    v.exact("target", target)
    for ending, squared in (("", False), ("_squared", True)):
        for given in (label, target):
            loss = hinge_loss(z, given, squared=squared)
            v.close(f"loss{ending}", loss, **CLOSE)
            v.close(f"grad{ending}", torch.autograd.grad(loss, z)[0], **CLOSE)


def check_popcount(v: Comparison) -> None:
    for match in v.matching(r"K(\d+)_a"):
        k, name = int(match[1]), f"K{match[1]}"
        words = [pack_signs(v[f"{name}_{side}"].to(torch.int8)) for side in "ab"]
        for side, packed in zip("ab", words, strict=True):
            v.exact(f"{name}_{side}_packed", packed.numpy().view("uint64"))
        dot = xnor_matmul(*words, k)
        v.exact(f"{name}_dot", dot)
        v.exact(f"{name}_popcount", torch.div(k - dot, 2, rounding_mode="floor"))


def check_thresholds(v: Comparison) -> None:
    """Thresholds on the sum of signs, as thresholds on the count of differing bits: p <= (K - low) / 2."""
    k, dots, bias = v.count("K"), v["dot"], v["bias"].double()
    gamma, beta, mean, var = (v[name].double() for name in ("gamma", "beta", "mean", "var"))
    eps = v.number("eps")

    def norm(dot: Tensor) -> Tensor:
        return gamma * (dot.double() + bias - mean) / torch.sqrt(var + eps) + beta

    exact = torch.stack([norm(dot) for dot in dots])
    v.close("bn_float64", exact, atol=1e-9)
    v.exact("positive", exact >= 0)
    v.exact("near_tie", exact.abs() < 1e-5)
    low, flip = sign_thresholds(lambda dot: norm(dot) >= 0, k, len(gamma))
    below = torch.div(k - low, 2, rounding_mode="floor")
    v.exact("positive", (v["popcount"][:, None] <= below) != flip)
    given, given_flip = v["threshold"], v["flip"].bool()
    constant = (given == -1) | (given == k)  # written in two ways each: the sign counts
    v.exact("threshold", torch.where(constant, given, below))
    v.exact("flip", torch.where(constant, given_flip, flip))
    always = (given == k) != given_flip
    assert torch.equal(flip[constant], always[constant])
    assert bool((low[constant] == k + 1).all())
    a, b = affine_parameters(v["mean"] - v["bias"], v["var"], v["gamma"], v["beta"], eps)
    v.close("bn_float32_torch", affine(dots[:, None].float().expand(-1, len(gamma)), a, b), rtol=1e-5, atol=1e-5)


# -- trajectories --------------------------------------------------------------------------------------------
class Net(nn.Module):
    """fc1 - bn1 - htanh - fc2 - bn2 - htanh - fc3, norms and biases as the file has them."""

    def __init__(self, v: Comparison) -> None:
        super().__init__()
        for name in ("fc1", "fc2", "fc3"):
            outputs, inputs = v.arrays[f"init.{name}.weight"].shape
            setattr(self, name, nn.Linear(inputs, outputs, bias=f"init.{name}.bias" in v.arrays))
        for name, layer in (("bn1", self.fc1), ("bn2", self.fc2)):
            norm = nn.BatchNorm1d(layer.out_features) if f"init.{name}.weight" in v.arrays else nn.Identity()
            setattr(self, name, norm)
        self.act1, self.act2 = nn.Hardtanh(), nn.Hardtanh()

    def forward(self, x: Tensor) -> Tensor:
        x = self.act1(self.bn1(self.fc1(x)))
        logits: Tensor = self.fc3(self.act2(self.bn2(self.fc2(x))))
        return logits


def optimizer_of(name: str, net: nn.Module) -> torch.optim.Optimizer:
    if name.startswith("adam"):
        return torch.optim.Adam(net.parameters(), lr=0.2)
    decay = 1e-2 if "wd" in name else 0.0
    return torch.optim.SGD(net.parameters(), lr=0.3 if "bias" in name else 0.5, momentum=0.9, weight_decay=decay)


def check_trajectory(name: str, v: Comparison) -> None:
    net = Net(v)
    convert(net, Bnn(ste="identity", first="binary", clip_bias=True), v["X"][0])
    with torch.no_grad():
        for key, value in net.state_dict().items():
            if f"init.{key}" in v.arrays:
                value.copy_(v[f"init.{key}"])
    net.train()
    optimizer = optimizer_of(name, net)
    zeros: list[int] = []
    parted: dict[str, int] = {}
    for act in (net.act1, net.act2):
        act.register_forward_hook(lambda module, args, y: zeros.append(int((y == 0).sum())))
    seen: dict[str, list[float]] = {"loss": [], "n_clipped": [], "n_zero_activations": []}
    for t, (x, y) in enumerate(zip(v["X"], v["Y"], strict=True)):
        optimizer.zero_grad()
        zeros.clear()
        loss = F.cross_entropy(net(x), y)
        loss.backward()
        compare_state(v, t, "grad", {key: p.grad for key, p in net.named_parameters()}, parted)
        if "noclip" in name:  # the code of 2023: nobody clips what is latent
            optimizer.step()
        else:
            lowbit_step(net, optimizer)
        clipped = [p.detach().flatten() for layer in (net.fc1, net.fc2) for p in layer.parameters()]
        latents = torch.cat([net.fc1.weight.detach().flatten(), net.fc2.weight.detach().flatten()])
        seen["loss"].append(loss.item())
        seen["n_clipped"].append(int((torch.cat(clipped).abs() == 1).sum()))
        seen["n_zero_activations"].append(sum(zeros))
        compare_state(v, t, "step", net.state_dict(), parted)
    for key, values in seen.items():
        want = v[key].double()
        torch.testing.assert_close(torch.tensor(values[:PROMISED]).double(), want[:PROMISED], rtol=1e-5, atol=1e-6)
        v.done.add(key)
        agree = torch.isclose(torch.tensor(values).double(), want, rtol=1e-4, atol=1e-5)
        v.notes.append(f"{key} agrees for {int(agree.long().cumprod(0).sum())} of {len(want)} steps")
    v.done.add("min_abs_latent")  # behind the last step, where a flip may have moved it
    v.notes.append(f"smallest latent {float(latents.abs().min()):.3g}, there {v.number('min_abs_latent'):.3g}")
    v.notes.append(f"first flipped sign behind step {PROMISED - 1}: {parted or 'none'}")
    with torch.no_grad():
        v.tail("eval_logits", net.eval()(v["X"][0]))


def compare_state(v: Comparison, t: int, kind: str, state: dict[str, Tensor | None], parted: dict[str, int]) -> None:
    """Every array of a step; behind the promised ones, the first step at which a sign has flipped is noted."""
    for key, value in state.items():
        place = f"{kind}{t}.{key}"
        if place not in v.arrays or value is None:
            continue
        if t < PROMISED:
            v.close(place, value, **CLOSE)
            continue
        v.done.add(place)
        if not torch.equal(binary_sign(v[place].float()), binary_sign(value.float())):
            parted.setdefault(kind, t)


def check_sign0(v: Comparison) -> None:
    """The published sign, with its third value."""
    with patch("lightning_lowbit.numerics.binary.binary_sign", torch.sign):
        check_trajectory("sgd", v)


TRAJECTORY = {
    r"X|Y|init\..*": Kind.INPUT,
    r"(grad|step)[0-5]\..*": Kind.OUTPUT,
    r"(grad|step)\d+\..*": Kind.TAIL,
    "eval_logits|min_abs_latent": Kind.TAIL,
    "loss|n_.*": Kind.OUTPUT,
}
QUIRKS = {**TRAJECTORY, r"(grad|step)[0-5]\..*": Kind.QUIRK, "loss|n_.*": Kind.QUIRK}
LAYER = {"x|latent|bias|grad_out|stride|padding|dilation|groups|binarize_input": Kind.INPUT, ".*": Kind.OUTPUT}


def trajectory(name: str) -> VectorFile:
    return VectorFile(QUIRKS if "noclip" in name else TRAJECTORY, lambda v: check_trajectory(name, v))


FILES = {
    "binarize_det": VectorFile(
        {"x|grad_out": Kind.INPUT, "y_ref.*|grad_htanh_open|grad_blog_clamp": Kind.QUIRK, ".*": Kind.OUTPUT}, check_det
    ),
    "binarize_stochastic": VectorFile({"x|u": Kind.INPUT, ".*": Kind.OUTPUT}, check_stochastic),
    "ste_family": VectorFile(
        {"x|grad_out|progressive_schedule_s": Kind.INPUT, "bireal_y|progressive_T100_y": Kind.QUIRK, ".*": Kind.OUTPUT},
        check_ste,
    ),
    **{f"linear_{n}": VectorFile(LAYER, check_layer) for n in range(3)},
    **{f"conv_{n}": VectorFile(LAYER, check_conv) for n in range(4)},
    "conv_channel_scale": VectorFile(LAYER, check_channel_scale),
    "hinge": VectorFile({"input|label": Kind.INPUT, ".*": Kind.OUTPUT}, check_hinge),
    "xnor_popcount": VectorFile({r"K\d+_[ab]": Kind.INPUT, ".*": Kind.OUTPUT}, check_popcount),
    "bn_sign_threshold": VectorFile(
        {"K|gamma|beta|mean|var|bias|eps|popcount|dot": Kind.INPUT, ".*": Kind.OUTPUT}, check_thresholds
    ),
    **{
        f"train_{name}": trajectory(name)
        for name in ("adam_org_clip", "sgd_bias_org_clip", "sgd_head_noclip", "sgd_org_clip", "sgd_wd_org_clip")
    },
    "train_sgd_org_clip_sign0": VectorFile(QUIRKS, check_sign0),
}

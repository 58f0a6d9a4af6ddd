"""Who computes whose quantizer: layers with their norms and rectifiers, in every way that users write them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from schemes.jacinto_nets import (
    Wired,
    chain,
    clips,
    converted,
    images,
    layers,
    merged_by,
    off,
    reach,
    report_of,
    rule,
    seen,
)
from torch import Tensor, nn

from lightning_lowbit.modules.base import Tally
from lightning_lowbit.modules.clipped import ClipQuantizer
from lightning_lowbit.schemes import convert


def between(function: Callable[[Tensor], Tensor], norm: bool = True) -> nn.Module:
    """A function between a convolution (with norm) and another."""

    def forward(self: Any, x: Tensor) -> Tensor:
        x = self.a(x)
        y: Tensor = self.b(function(self.bn(x) if norm else x))
        return y

    torch.manual_seed(0)
    net = Wired(forward, a=nn.Conv2d(3, 8, 3), bn=nn.BatchNorm2d(8), b=nn.Conv2d(8, 4, 1))
    if not norm:
        del net.bn
    return net


def faithful(net: nn.Module, x: Tensor | None = None, **options: Any) -> Any:
    """Convert to 14 bits, where evaluation is the float network's but for little."""
    x = images() if x is None else x
    want = seen(net, x)(x)
    convert(net, "jacinto", x, bits=14, **options)
    assert off(net.eval()(x), want) < 2e-3
    return net


RECTIFIERS: dict[str, Callable[[Tensor], Tensor]] = {
    "F.relu": F.relu,
    "torch.relu": torch.relu,
    "x.relu()": lambda x: x.relu(),
    "x.relu_()": lambda x: x.relu_(),
    "F.relu(inplace)": lambda x: F.relu(x, inplace=True),
    "relu6": F.relu6,
}


@pytest.mark.parametrize("norm", [True, False], ids=["norm", "no_norm"])
@pytest.mark.parametrize("name", RECTIFIERS)
def test_a_rectifier_in_any_spelling_is_its_layer_s(name: str, norm: bool) -> None:
    net = faithful(between(RECTIFIERS[name], norm))
    assert merged_by(net) == {"a": "lowbit_relu.lowbit_output", "b": "b.lowbit_output"}
    assert clips(net)["lowbit_relu.lowbit_output"].flag is False
    assert net.a.group.six == (name == "relu6")
    assert net.a.pattern.endswith("relu6" if name == "relu6" else "relu") or "relu" in net.a.pattern


@pytest.mark.parametrize("inplace", [True, False], ids=["inplace", "new"])
@pytest.mark.parametrize("make", [nn.ReLU, nn.ReLU6])
def test_a_rectifier_module_is_its_layer_s(make: Any, inplace: bool) -> None:
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), make(inplace), nn.Conv2d(8, 4, 1))
    assert merged_by(faithful(net)) == {"0": "2.lowbit_output", "3": "3.lowbit_output"}


def test_relu6_ends_at_6_in_training_and_evaluation() -> None:
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU6(), nn.Conv2d(8, 4, 1))
    with torch.no_grad():
        net[0].weight.mul_(10)
    faithful(net)
    for mode in (True, False):
        found: list[Tensor] = []
        hook = net[1].register_forward_hook(lambda m, a, y, found=found: found.append(y))
        net.train(mode)(images())
        hook.remove()
        assert found[0].max() == 6
    assert clips(net)["1.lowbit_output"].limits().high == 8


@pytest.mark.parametrize("bounds", [None, (-2.0, 2.0), (0.0, 6.0)], ids=str)
def test_hardtanh_is_a_fixed_range(bounds: Any) -> None:
    net = faithful(between(F.hardtanh if bounds is None else lambda x: F.hardtanh(x, *bounds)))
    quantizer = clips(net)["lowbit_activation.lowbit_output"]
    assert quantizer.fixed == (bounds or (-1.0, 1.0))
    assert merged_by(net) == {"a": None, "b": "b.lowbit_output"}  # its sums reach the clip as they are


def test_a_clamp_makes_no_range() -> None:
    net = faithful(between(lambda x: torch.clamp(x, -64504.0, 64504.0)))
    quantizer = clips(net)["lowbit_activation.lowbit_output"]
    assert quantizer.fixed is None
    assert quantizer.limits().high < 100


@pytest.mark.parametrize("name", ["silu", "gelu", "sigmoid", "leaky_relu", "tanh"])
def test_other_activations_have_a_grid_of_their_own(name: str) -> None:
    net = faithful(between(getattr(F, name)))
    quantizer = clips(net)["lowbit_activation.lowbit_output"]
    assert net.b.input_grid is quantizer
    assert quantizer.signed == (name != "sigmoid")


@pytest.mark.parametrize("name", ["identity", "dropout", "max_pool", "avg_pool"])
def test_modules_between_norm_and_rectifier(name: str) -> None:
    made = {"identity": nn.Identity(), "dropout": nn.Dropout(0.3), "max_pool": nn.MaxPool2d(2),
            "avg_pool": nn.AvgPool2d(2)}[name]  # fmt: skip
    net = faithful(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), made, nn.ReLU(), nn.Conv2d(8, 4, 1)))
    assert layers(net)["0"].norm is net[1]
    # A mean reads codes; what is only selected or dropped goes on unrounded to the rectifier's quantizer.
    ends = {"identity": "3.lowbit_output", "dropout": None, "max_pool": None, "avg_pool": "1.lowbit_output"}
    assert merged_by(net)["0"] == ends[name]
    assert [key for key in clips(net) if key.startswith(("0.lowbit_output", "1."))] == (
        ["1.lowbit_output"] if name == "avg_pool" else []
    )


def test_a_layer_alone_and_one_behind_a_sum() -> None:
    def forward(self: Any, x: Tensor) -> Any:
        x = self.a(x)
        return self.out(F.relu(self.bn(self.b(x)) + x))

    torch.manual_seed(0)
    net = faithful(Wired(
        forward, a=nn.Conv2d(3, 8, 3), b=nn.Conv2d(8, 8, 1), bn=nn.BatchNorm2d(8), out=nn.Conv2d(8, 4, 1)
    ))  # fmt: skip
    assert merged_by(net) == {"a": "a.lowbit_output", "b": "bn.lowbit_output", "out": "out.lowbit_output"}
    assert not clips(net)["lowbit_relu.lowbit_output"].fused  # it quantizes the sum
    assert len(clips(net)["a.lowbit_output"].group) == 1  # addends have each their own grid


MERGED: dict[str, tuple[Callable[[], nn.Module], Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(6, 8), lambda: nn.BatchNorm1d(8), (32, 6)),
    "conv1d": (lambda: nn.Conv1d(6, 8, 3), lambda: nn.BatchNorm1d(8), (8, 6, 9)),
    "conv2d": (lambda: nn.Conv2d(6, 8, 3), lambda: nn.BatchNorm2d(8), (8, 6, 5, 5)),
    "conv3d": (lambda: nn.Conv3d(6, 8, 2), lambda: nn.BatchNorm3d(8), (4, 6, 4, 4, 4)),
    "sync": (lambda: nn.Conv2d(6, 8, 3), lambda: nn.SyncBatchNorm(8), (8, 6, 5, 5)),
    "depthwise": (lambda: nn.Conv2d(6, 12, 3, groups=6), lambda: nn.BatchNorm2d(12), (8, 6, 5, 5)),
    "transpose1d": (lambda: nn.ConvTranspose1d(6, 8, 3, groups=2), lambda: nn.BatchNorm1d(8), (8, 6, 5)),
    "transpose2d": (
        lambda: nn.ConvTranspose2d(6, 8, 3, 2, groups=2, bias=False), lambda: nn.BatchNorm2d(8), (4, 6, 5, 5),
    ),
}  # fmt: skip


@pytest.mark.parametrize("per_channel", ["none", "all"])
@pytest.mark.parametrize("kind", MERGED)
def test_layers_of_every_kind_merge_their_norm(kind: str, per_channel: str) -> None:
    layer, norm, shape = MERGED[kind]
    torch.manual_seed(0)
    net = faithful(nn.Sequential(layer(), norm(), nn.ReLU()), images(*shape), per_channel=per_channel)
    assert merged_by(net) == {"0": "2.lowbit_output"}
    assert net[0].norm is net[1]
    before = net[1].running_mean.clone()
    net.train()(images(*shape, gain=2.0)).sum().backward()
    assert not torch.equal(net[1].running_mean, before)
    assert net[0].weight.grad.abs().sum() > 0


def test_a_layer_whose_result_is_seen_before_its_norm_keeps_both_apart() -> None:
    def forward(self: Any, x: Tensor) -> Any:
        x = self.a(x)
        return self.b(F.relu(self.bn(x))) + self.c(x)

    torch.manual_seed(0)
    net = faithful(Wired(
        forward, a=nn.Conv2d(3, 8, 3), bn=nn.BatchNorm2d(8), b=nn.Conv2d(8, 4, 1), c=nn.Conv2d(8, 4, 1)
    ))  # fmt: skip
    assert net.a.norm is None
    assert merged_by(net)["a"] == "a.lowbit_output"
    assert not clips(net)["lowbit_relu.lowbit_output"].fused


def test_a_norm_before_its_layer_stays_float_and_freezes_with_the_others() -> None:
    net = nn.Sequential(nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 4, 1))
    faithful(net)
    assert type(net[0]) is nn.BatchNorm2d
    assert not clips(net)["1.lowbit_output"].fused
    assert net[2].norm is net[3]
    counts = []
    for frozen in (True, False):
        reach(net.train(), "freeze_batch_norm", reached=frozen)
        before = int(net[0].num_batches_tracked), int(net[3].num_batches_tracked)
        net(images())
        counts.append((int(net[0].num_batches_tracked) - before[0], int(net[3].num_batches_tracked) - before[1]))
    assert counts == [(0, 0), (1, 1)]


def test_a_layer_called_twice_quantizes_what_each_call_reads_and_gives() -> None:
    def forward(self: Any, x: Tensor) -> Any:
        x = F.relu(self.a(x))
        return self.out(F.relu(self.shared(F.relu(self.shared(x)))))

    torch.manual_seed(0)
    net = faithful(Wired(
        forward, a=nn.Conv2d(3, 8, 1), shared=nn.Conv2d(8, 8, 3, padding=1), out=nn.Conv2d(8, 4, 1)
    ))  # fmt: skip
    assert merged_by(net)["shared"] is None
    rectifiers = [quantizer for key, quantizer in clips(net).items() if key.startswith("lowbit_relu")]
    assert len({id(quantizer) for quantizer in rectifiers}) == 3


@pytest.mark.parametrize("order", ["unsigned_first", "signed_first"])
def test_members_of_a_concat_share_a_grid_and_a_rectifier_still_rectifies(order: str) -> None:
    def forward(self: Any, x: Tensor) -> Any:
        parts = [F.relu(self.an(self.a(x))), self.b(x)]
        return self.out(torch.cat(parts if order == "unsigned_first" else parts[::-1], 1))

    torch.manual_seed(0)
    net = faithful(Wired(
        forward, a=nn.Conv2d(3, 4, 1), an=nn.BatchNorm2d(4), b=nn.Conv2d(3, 4, 1), out=nn.Conv2d(8, 4, 1)
    ))  # fmt: skip
    a, b = clips(net)["lowbit_relu.lowbit_output"], clips(net)["b.lowbit_output"]
    with torch.no_grad():
        a.clips.mul_(5)  # the widest decides for both
    assert str(a.grid()) == str(b.grid())
    assert a.signed
    assert b.signed
    want = float(a.limits().high)
    assert want >= 5 * float(b.clips.abs().max()) / 4
    for mode in (True, False):
        found: list[Tensor] = []
        hook = net.lowbit_relu.register_forward_hook(lambda m, x, y, found=found: found.append(y))
        net.train(mode)(images())
        hook.remove()
        assert found[0].min() == 0


def test_a_rectifier_with_a_signed_grid_still_rectifies() -> None:
    net = faithful(chain(), overrides={"2": {"signed": True}})
    assert clips(net)["2.lowbit_output"].grid().signed
    found: list[Tensor] = []
    net[2].register_forward_hook(lambda m, x, y: found.append(y))
    net.train()(images())
    net.eval()(images())
    assert [float(y.detach().min()) for y in found] == [0.0, 0.0]


def test_squeeze_and_excitation() -> None:
    def forward(self: Any, x: Tensor) -> Any:
        x = F.relu(self.a(x))
        gate = torch.sigmoid(self.up(F.relu(self.down(F.adaptive_avg_pool2d(x, 1)))))
        return self.out(x * gate)

    torch.manual_seed(0)
    net = faithful(Wired(
        forward, a=nn.Conv2d(3, 8, 3), down=nn.Conv2d(8, 2, 1), up=nn.Conv2d(2, 8, 1), out=nn.Conv2d(8, 4, 1)
    ))  # fmt: skip
    assert net.out.input_grid is clips(net)["out.lowbit_input"]  # a product is quantized where a layer reads it
    assert net.down.input_grid is clips(net)["lowbit_avg_pool.lowbit_output"]


@pytest.mark.parametrize("quantize_in", [True, False])
@pytest.mark.parametrize("quantize_out", [True, False])
def test_the_ends_of_a_network(quantize_in: bool, quantize_out: bool) -> None:
    net = converted(chain(), quantize_in=quantize_in, quantize_out=quantize_out)
    found = clips(net)
    assert ("0.lowbit_input" in found, "8.lowbit_output" in found) == (quantize_in, quantize_out)
    assert any("no quantizer on what 0 reads" in note for note in report_of(net).notes) != quantize_in
    assert (net[0].lowbit_bias is not None) == quantize_in  # without a grid of products there is no bias on it


def test_a_mean_that_is_the_result_is_not_rounded_where_results_are_not() -> None:
    make = lambda: nn.Sequential(  # noqa: E731
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 5, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    )
    for quantize_out in (True, False):
        net = converted(make(), quantize_out=quantize_out)
        assert ("3.lowbit_output" in clips(net)) == quantize_out


@pytest.mark.parametrize("options", [{}, {"act_round": "half_even"}, {"bits": 4}, {"bias": "tidl"}], ids=str)
def test_fused_and_unfused_evaluation_are_equal(options: dict[str, Any]) -> None:
    net = converted(chain(), **options)
    apart = copy.deepcopy(net)
    for path, layer in layers(apart).items():
        end = layer.group.end
        assert isinstance(end, ClipQuantizer)
        if end.site.path != path:  # not a layer's own
            layer.group.end, end.fused = None, False
    x = images(seed=3)
    with torch.no_grad():
        assert torch.equal(net(x), apart(x))
    assert torch.equal(net(x), apart(x))  # also where gradients are recorded


def test_what_a_rectifier_cuts_off_is_no_saturation() -> None:
    net = converted(chain())
    net[0].switch.tally = tally = Tally()
    with torch.no_grad():
        net(images())
    net[0].switch.tally = None
    shares = [tally.share(f"{path}.lowbit_output") for path in "25"]
    assert all(share is not None and share < 0.02 for share in shares)


def test_every_quantizer_and_norm_is_the_rule_s() -> None:
    """What the rule does not find would never freeze, nor be shared by processes."""
    net = converted(nn.Sequential(
        nn.BatchNorm2d(3), nn.Conv2d(3, 8, 3), nn.SiLU(), nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8), nn.ReLU(),
        nn.AvgPool2d(2), nn.Conv2d(8, 4, 1), nn.Sigmoid(), nn.Conv2d(4, 4, 1),
    ))  # fmt: skip
    assert {id(q) for q in rule(net).ranges} == {id(q) for q in clips(net).values()}
    assert [id(norm) for norm in rule(net).norms] == [id(net[0])]

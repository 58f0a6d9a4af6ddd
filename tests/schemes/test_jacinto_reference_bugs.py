"""What the published code does wrong, row by row of the specification's table: ours does not."""

from __future__ import annotations

import copy
import warnings
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
    labels,
    layers,
    merged_by,
    off,
    reach,
    report_of,
    seen,
)
from torch import Tensor, nn

from lightning_lowbit.numerics.percentile import percentile_range
from lightning_lowbit.schemes import convert


def test_row_1_ranges_freeze_by_schedule_and_not_by_eval_or_train_calls() -> None:
    net = converted(chain())
    for _ in range(50):
        net.eval()
        net.train()
    before = {key: q.clips.clone() for key, q in clips(net).items()}
    net.train()(images(gain=3.0))
    assert [key for key, q in clips(net).items() if torch.equal(q.clips, before[key])] == []
    for frozen in (True, False, True, False):
        reach(net, "freeze_ranges", reached=frozen)
        before = {key: q.clips.clone() for key, q in clips(net).items()}
        net.eval()(images(gain=9.0))
        net.train()(images(gain=9.0))
        moved = [key for key, q in clips(net).items() if not torch.equal(q.clips, before[key])]
        assert len(moved) == (0 if frozen else len(before))


def test_row_2_the_first_batch_s_range_is_replaced_by_the_second_s() -> None:
    net = converted(chain())
    quantizer = clips(net)["0.lowbit_input"]
    quantizer.batches.fill_(-1.0)
    batches = [images(seed=seed, gain=1.0 + seed) for seed in range(4)]
    ranges = [percentile_range(batch, 0.01) for batch in batches]
    want = [ranges[0], ranges[1], (ranges[1] + ranges[2]) / 2, (ranges[1] + ranges[2] + ranges[3]) / 3]
    for batch, expected in zip(batches, want, strict=True):
        net.train()(batch)
        torch.testing.assert_close(quantizer.clips, expected, rtol=1e-6, atol=0)
    assert float(quantizer.batches) == 3


def test_row_3_a_norm_without_scale_has_the_scale_1() -> None:
    make = lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8, affine=False), nn.ReLU())  # noqa: E731
    net = seen(make(), images())
    want = net(images())
    convert(net, "jacinto", images(), bits=12)
    assert net[0].norm is net[1]
    assert off(net(images()), want) < 2e-3
    net.train()(images()).sum().backward()
    assert net[0].weight.grad.abs().sum() > 0


def dead() -> tuple[Any, Tensor]:
    """Channel 2 looks at an input that is always nil."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 4, 1))
    x = images()
    x[:, 0] = 0
    with torch.no_grad():
        net[0].weight[2, 1:] = 0
    seen(net, x)
    net[1].running_var[2] = 0
    return net, x


def test_row_4_a_dead_channel_leaves_the_range_to_the_others() -> None:
    net, x = dead()
    want, errors = net(x), {}
    for how in ("constant", "merge"):
        other = copy.deepcopy(net)
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            convert(other, "jacinto", x, dead_channels=how, constrain_weights=False)
        errors[how] = off(other(x), want)
        said = [str(w.message) for w in told if "1 of 8 channels have no variance" in str(w.message)]
        assert (how == "merge") or said
    assert errors["constant"] < 0.06
    assert errors["merge"] > 5 * errors["constant"]


def test_row_4_training_a_dead_channel_stays_finite() -> None:
    net, x = dead()
    with warnings.catch_warnings(record=True):
        warnings.simplefilter("always")
        convert(net, "jacinto", x)
    for _ in range(3):
        y = net.train()(x)
        y.square().sum().backward()
    assert bool(y.isfinite().all())
    assert all(bool(p.grad.isfinite().all()) for p in net.parameters())


@pytest.mark.parametrize("bias", ["tidl", "tidl_scale", "int32", "own"])
@pytest.mark.parametrize("per_channel", ["depthwise", "all"])
def test_row_5_scales_per_channel_go_with_every_bias_rule_and_linear_layers(per_channel: str, bias: str) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=8), nn.BatchNorm2d(8), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4),
    )  # fmt: skip
    want = seen(net, images())(images())
    convert(net, "jacinto", images(), per_channel=per_channel, bias=bias, bits=10)
    assert off(net(images()), want) < 0.05
    shapes = {path: layer.lowbit_weight.grid().axis for path, layer in layers(net).items()}
    every = per_channel == "all"
    assert shapes == {"0": 0 if every else None, "3": 0, "8": 0 if every else None}
    net.train()(images()).sum().backward()


@pytest.mark.parametrize(
    ("layer", "norm", "shape"),
    [(lambda: nn.Linear(6, 8), nn.BatchNorm1d, (32, 6)), (lambda: nn.Conv1d(6, 8, 3), nn.BatchNorm1d, (8, 6, 9)),
     (lambda: nn.Conv3d(6, 8, 2), nn.BatchNorm3d, (4, 6, 4, 4, 4)),
     (lambda: nn.ConvTranspose2d(6, 8, 2), nn.SyncBatchNorm, (4, 6, 4, 4))],
    ids=["linear", "conv1d", "conv3d", "transposed_sync"],
)  # fmt: skip
def test_row_6_norms_of_all_dimensions_are_merged(layer: Any, norm: Any, shape: tuple[int, ...]) -> None:
    net = converted(nn.Sequential(layer(), norm(8), nn.ReLU()), images(*shape))
    assert net[0].norm is net[1]
    assert merged_by(net) == {"0": "2.lowbit_output"}


def test_row_7_transposed_convolutions_with_groups_merge_each_output_s_own_scale() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.ConvTranspose2d(6, 12, 3, 2, groups=3), nn.BatchNorm2d(12), nn.ReLU())
    x = images(4, 6, 5, 5)
    seen(net, x)
    with torch.no_grad():
        net[1].weight.copy_(torch.linspace(0.25, 3, 12))
    want = net(x)
    for per_channel in ("none", "all"):
        other = copy.deepcopy(net)
        convert(other, "jacinto", x, bits=14, per_channel=per_channel)
        assert off(other(x), want) < 1e-3


@pytest.mark.parametrize("padding", ["reflect", "circular", "replicate", "same"])
def test_row_8_the_quantized_path_pads_as_the_layer_does(padding: str) -> None:
    torch.manual_seed(0)
    same = padding == "same"
    conv = nn.Conv2d(
        3, 8, 3, dilation=2 if same else 1, padding="same" if same else 1, padding_mode="zeros" if same else padding
    )
    net = nn.Sequential(conv, nn.BatchNorm2d(8), nn.ReLU())
    want = seen(net, images())(images())
    convert(net, "jacinto", images(), bits=14)
    assert off(net(images()), want) < 1e-3


def test_row_9_a_fixed_range_stays_fixed() -> None:
    net = converted(nn.Sequential(nn.Conv2d(3, 8, 3), nn.Hardtanh(-2, 2), nn.Conv2d(8, 4, 1)))
    quantizer = clips(net)["1.lowbit_output"]
    for gain in (50.0, 0.01, 0.01):
        net.train()(images(gain=gain))
    assert quantizer.clips.tolist() == [-2, 2]
    assert (float(quantizer.limits().low), float(quantizer.limits().high)) == (-2, 2)


def test_row_10_a_layer_called_twice_counts_a_batch_once_and_is_on_its_grid() -> None:
    def forward(self: Any, x: Tensor) -> Any:
        return self.out(self.shared(self.shared(F.relu(self.stem(x)))))

    torch.manual_seed(0)
    net = converted(Wired(
        forward, stem=nn.Conv2d(3, 4, 1), shared=nn.Conv2d(4, 4, 1), out=nn.Conv2d(4, 2, 1)
    ), bits=4)  # fmt: skip
    quantizer = net.shared.lowbit_output
    found: list[Tensor] = []
    net.shared.register_forward_hook(lambda m, a, y: found.append(y.detach()))
    for mode in (False, True):
        before = {key: float(q.batches) for key, q in clips(net).items()}
        net.train(mode)(images(seed=2))
        assert {key: float(q.batches) - before[key] for key, q in clips(net).items()} == dict.fromkeys(before, mode)
    assert len(found) == 4
    step = 2.0 ** int(quantizer.exponent())
    assert all(torch.equal(y, (y / step).round() * step) for y in found[2:])
    assert all(len(y.unique()) <= 16 for y in found)
    assert any("shared" in note for note in report_of(net).notes)


def test_row_11_a_layer_that_feeds_its_norm_and_more_is_quantized_alone() -> None:
    def forward(self: Any, x: Tensor) -> Any:
        x = self.a(x)
        return self.b(F.relu(self.bn(x)) + x)

    torch.manual_seed(0)
    net = Wired(forward, a=nn.Conv2d(3, 8, 3), bn=nn.BatchNorm2d(8), b=nn.Conv2d(8, 4, 1))
    want = seen(net, images())(images())
    convert(net, "jacinto", images(), bits=12)
    assert off(net(images()), want) < 1e-2
    assert net.a.norm is None
    assert {"a.lowbit_output", "lowbit_relu.lowbit_output"} <= set(clips(net))
    assert type(net.bn) is nn.BatchNorm2d


def test_row_12_a_norm_before_its_layer_is_float_and_its_result_quantized() -> None:
    net = converted(nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)))
    found: list[Tensor] = []
    net[1].lowbit_input.register_forward_hook(lambda m, a, y: found.append(y))
    net.eval()(images())
    step = 2.0 ** int(net[1].lowbit_input.exponent())
    assert torch.equal(found[0] / step, (found[0] / step).round())
    assert layers(net)["1"].norm is net[2]


class Softmax(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.softmax(x, 1)


@pytest.mark.parametrize("make", [nn.SiLU, nn.GELU, nn.Sigmoid, Softmax])
def test_row_13_results_of_other_activations_are_quantized_by_the_sign_of_their_data(make: Any) -> None:
    net = converted(nn.Sequential(nn.Conv2d(3, 8, 3), make(), nn.Conv2d(8, 4, 1)))
    grid = net[2].input_grid
    assert grid is not None
    assert grid.signed == (make in (nn.SiLU, nn.GELU))
    read: list[Tensor] = []
    quantizer = net[2].lowbit_input or net[1].lowbit_output
    quantizer.register_forward_hook(lambda m, a, y: read.append(y.detach()))
    net.eval()(images())
    step = 2.0 ** int(grid.exponent())
    assert torch.equal(read[0] / step, (read[0] / step).round())
    assert len(read[0].unique()) > 8


@pytest.mark.parametrize("make", [lambda: nn.Dropout(0.5), lambda: nn.Dropout2d(0.5), nn.Identity])
def test_row_14_dropout_before_a_rectifier_changes_nothing_in_evaluation(make: Any) -> None:
    results = []
    for middle in ([], [make()]):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), *middle, nn.ReLU(), nn.Conv2d(8, 4, 1))
        torch.manual_seed(1)
        for module in (net[0], net[-1]):
            nn.init.normal_(module.weight, std=0.2)
            nn.init.zeros_(module.bias)
        convert(net.eval(), "jacinto", images())
        assert len(clips(net)) == 3  # input, rectifier, result: none at what drops or hands on
        results.append(net(images(seed=4)))
    assert torch.equal(*results)


def test_row_15_layers_that_read_floats_are_named() -> None:
    report = convert(chain(), "jacinto", images(), quantize_in=False, avgpool="float")
    assert [note for note in report.notes if "0, 8" in note] == ["no quantizer on what 0, 8 read"]
    assert convert(chain(), "jacinto", images()).notes == []


@pytest.mark.parametrize("behind", ["norm", "sum"])
def test_row_16_rectifiers_in_place_have_the_gradients_of_others(behind: str) -> None:
    def forward(self: Any, x: Tensor) -> Any:
        x = self.bn(self.a(x)) + self.d(x) if behind == "sum" else self.bn(self.a(x))
        y = F.relu(x, inplace=self.inplace)
        return self.b(y) + self.c(y if not self.inplace else x)  # in place, x is what y is

    found = []
    for inplace in (False, True):
        torch.manual_seed(0)
        net = Wired(
            forward, a=nn.Conv2d(3, 8, 3), bn=nn.BatchNorm2d(8), b=nn.Conv2d(8, 4, 1), c=nn.Conv2d(8, 4, 1),
            **({"d": nn.Conv2d(3, 8, 3)} if behind == "sum" else {}),
        )  # fmt: skip
        net.inplace = inplace  # type: ignore[assignment]  # a flag
        converted(net)
        y = net.train()(images())
        y.square().sum().backward()
        found.append([y, *(p.grad for p in net.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_row_17_the_floor_of_the_inverse_is_not_in_the_float_path() -> None:
    """A channel whose factor is below the norm's eps has the gradient that the float network gives it."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8, eps=0.01), nn.Conv2d(8, 4, 1))
    seen(net, images())
    with torch.no_grad():
        net[1].weight[1], net[1].weight[2] = 1e-3, -1e-3
    twin = copy.deepcopy(net)
    gradients = []
    for ste in ("float", "quantized"):
        other = copy.deepcopy(net)
        convert(other, "jacinto", images(), bits=15, range_shrink=0.0, ste_weights=ste)
        with torch.no_grad():
            for quantizer in clips(other).values():
                quantizer.clips.mul_(2)
        other.train()(images()).square().sum().backward()
        gradients.append(other[0].weight.grad)
    twin.train()(images()).square().sum().backward()
    for gradient in gradients:
        for channel in (1, 2):
            assert off(gradient[channel], twin[0].weight.grad[channel]) < 0.02


@pytest.mark.parametrize("value", [0.7, 0.0, -3.0])
def test_row_18_constant_tensors_have_a_range(value: float) -> None:
    net = converted(chain())
    quantizer = clips(net)["0.lowbit_input"]
    quantizer.batches.fill_(0.0)
    net.train()(torch.full((8, 3, 8, 8), value))
    assert quantizer.clips.tolist() == pytest.approx([value, value])


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")], ids=str)
def test_row_18_a_batch_that_is_not_finite_moves_no_range_and_is_told_once(bad: float) -> None:
    net = converted(chain())
    quantizer = clips(net)["0.lowbit_input"]
    x = images()
    x[0, 0, 0, 0] = bad
    before = quantizer.clips.clone()
    for _ in range(2):
        net.train()(x)
    assert torch.equal(quantizer.clips, before)
    with pytest.warns(UserWarning, match=r"0.lowbit_input: NaN or infinite values in 2 training batches"):
        quantizer.settle(reset=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        quantizer.settle(reset=True)
    net.train()(images(gain=2.0))
    assert not torch.equal(quantizer.clips, before)


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        return F.relu(self.a(x)), {"more": self.b(x)}


def test_row_19_every_tensor_of_a_nested_result_is_quantized() -> None:
    def forward(self: Any, x: Tensor) -> Any:
        first, rest = self.pair(x)
        return self.out(first), self.tail(rest["more"]), rest

    torch.manual_seed(0)
    net: Any = Wired(forward, pair=Pair(), out=nn.Conv2d(4, 2, 1), tail=nn.Conv2d(4, 2, 1))
    convert(net, "jacinto", images())
    first, second, rest = net.eval()(images())
    assert merged_by(net) == {
        "pair.a": "pair.lowbit_relu.lowbit_output", "pair.b": "pair.b.lowbit_output", "out": "out.lowbit_output",
        "tail": "tail.lowbit_output",
    }  # fmt: skip
    assert net.tail.input_grid is clips(net)["pair.b.lowbit_output"]
    assert "tail.lowbit_input" not in clips(net)
    for path, y in (("out", first), ("tail", second), ("pair.b", rest["more"])):
        step = 2.0 ** int(clips(net)[f"{path}.lowbit_output"].exponent())
        assert torch.equal(y / step, (y / step).round())
    loss = F.cross_entropy(net.train()(images())[0].mean((2, 3)), labels() % 2)
    loss.backward()
    assert net.pair.a.weight.grad.abs().sum() > 0

"""What Jacinto's networks declare is what they are: grids of joined tensors, wide biases, claims of the report."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import Tensor, nn

from lightning_lowbit.errors import ConfigError
from lightning_lowbit.modules.clipped import ClipQuantizer
from lightning_lowbit.modules.merged import dead_channels
from lightning_lowbit.reports.summary import summarize
from lightning_lowbit.schemes import convert


class Overlapping(nn.Module):
    """Two concats that share a member, as in feature pyramids; every branch with a range of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Conv2d(3, 4, 1) for _ in range(3))
        self.d, self.e = nn.Conv2d(8, 4, 1), nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        a, b, c = F.relu(self.a(x)), F.relu(self.b(x)), F.relu(self.c(x))
        return self.d(torch.cat([a, b], 1)) + self.e(torch.cat([b, c], 1))


def overlapping(**options: object) -> nn.Module:
    torch.manual_seed(0)
    net = Overlapping().eval()
    with torch.no_grad():
        net.a.weight.mul_(20)
        net.c.weight.mul_(0.05)
    convert(net, "jacinto", torch.randn(4, 3, 5, 5), **options)
    return net


def reads_its_grid(layer: nn.Module, net: nn.Module) -> bool:
    read: list[Tensor] = []
    handle = layer.register_forward_pre_hook(lambda module, args: read.append(args[0]))
    with torch.no_grad():
        net(torch.randn(2, 3, 5, 5))
    handle.remove()
    return bool(layer.input_grid.grid().contains(read[0]))


def test_concats_that_share_a_member_share_one_grid() -> None:
    net = overlapping()
    assert reads_its_grid(net.d, net)
    assert reads_its_grid(net.e, net)


def test_joined_tensors_have_one_width() -> None:
    with pytest.raises(ConfigError, match=r"lowbit_relu \(4\), lowbit_relu_1 \(8\).*they are joined"):
        overlapping(overrides={"lowbit_relu": {"act_bits": 4}})
    net = overlapping(overrides={"lowbit_relu*": {"act_bits": 4}})
    assert net.d.input_grid.grid().bits == 4
    assert reads_its_grid(net.d, net)


@pytest.mark.parametrize("scheme", ["jacinto", "tqt"])
def test_a_bias_beyond_32_bits_of_its_products_is_kept(scheme: str) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 1)).eval()
    with torch.no_grad():
        net[2].bias.fill_(50.0)
    x = torch.randn(64, 16)
    expected = net(x)
    convert(net, scheme, x, bits=16)
    assert torch.allclose(net(x), expected, rtol=1e-3)


def claim(net: nn.Module, **options: object) -> str:
    convert(net.eval(), "jacinto", torch.randn(4, 3, 6, 6), **options)
    (line,) = [note for note in summarize(net).notes if note.startswith("evaluation integer-exact")]
    return line


def test_layers_that_read_floats_are_no_integers() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
    assert "1 layers read floats (4 first)" in claim(net, preset="reference")
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 1))
    assert "1 layers read floats (0 first)" in claim(net, quantize_in=False)
    assert ": yes" in claim(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 1)))


def test_a_batch_norm_before_its_layer_is_no_integer() -> None:
    assert "1 float batch norm" in claim(nn.Sequential(nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 2, 1)))


def test_one_scale_a_channel_is_proved_exact_too() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.ConvTranspose2d(4, 6, 2, groups=2))
    with torch.no_grad():
        net[0].weight.mul_(torch.tensor([1.0, 0.2, 0.04, 3.0]).reshape(4, 1, 1, 1))
    assert ": yes" in claim(net, per_channel="all")


def test_the_sum_of_two_grids_declares_the_finer_step() -> None:
    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            return F.relu(self.a(x) + self.b(x))

    torch.manual_seed(0)
    net = Sum().eval()
    with torch.no_grad():
        net.a.weight.mul_(30)
    convert(net, "jacinto", torch.randn(4, 3, 5, 5))
    a, b = net.a.lowbit_output.grid(), net.b.lowbit_output.grid()
    assert a.exponent > b.exponent
    grid = summarize(net)["lowbit_add.sum"].grid
    assert grid.exponent == b.exponent
    sums: list[Tensor] = []
    net.lowbit_add.register_forward_hook(lambda module, args, output: sums.append(output))
    net(torch.randn(2, 3, 5, 5) * 2)
    assert grid.contains(sums[0])


def test_most_channels_of_a_layer_may_be_dead() -> None:
    assert dead_channels(torch.tensor([0.0, 0.0, 0.0, 0.5, 0.3])).tolist() == [True, True, True, False, False]
    assert dead_channels(torch.tensor([0.0, 0.0])).tolist() == [False, False]
    assert dead_channels(torch.tensor([1e-9, 0.5, 0.3])).tolist() == [True, False, False]


def test_only_outliers_of_a_weight_are_clipped() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 1)).eval()
    with torch.no_grad():
        net[1].running_var.copy_(torch.tensor([1.0, 1.0, 1.0, 0.0]))
        net[0].weight[0, 0, 0, 0] = 40.0
    before = net[0].weight.clone()
    with pytest.warns(UserWarning, match="merged weights up to 40"), pytest.warns(UserWarning, match="no variance"):
        convert(net, "jacinto", torch.randn(4, 3, 6, 6))
    changed = (net[0].weight != before).nonzero().tolist()
    assert changed == [[0, 0, 0, 0]]


def test_each_quantizer_of_a_tie_counts_its_own_batches() -> None:
    net = overlapping().train()
    net(torch.randn(2, 3, 5, 5))
    counts = {m.site.key: float(m.batches) for m in net.modules() if isinstance(m, ClipQuantizer)}
    assert set(counts.values()) == {1.0}


def test_a_batchs_own_ranges_are_for_tensors_that_stand_alone() -> None:
    net = overlapping(batch_ranges=True).train()
    net(torch.randn(2, 3, 5, 5) * 3)
    first, joined = net.a.lowbit_input, net.get_submodule("lowbit_relu.lowbit_output")
    assert first.used is not None
    assert joined.used is None


def test_a_checkpointed_block_with_fixed_ranges_runs_again() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Hardtanh(), nn.Conv2d(4, 2, 1)).eval()
    convert(net, "jacinto", torch.randn(4, 3, 6, 6), batch_ranges=True)
    net.train()[0].switch.managed = True
    x = torch.randn(4, 3, 6, 6)
    y = torch.utils.checkpoint.checkpoint(net, x, use_reentrant=False)
    y.sum().backward()
    assert float(net[0].weight.grad.abs().sum()) > 0


def test_every_batch_is_looked_at_from_another_row() -> None:
    net = nn.Sequential(nn.Conv2d(1, 1, 1)).eval()
    convert(net, "jacinto", torch.zeros(1, 1, 8, 8), range_subsample=2, range_shrink=0.0, quantize_out=False)
    watched, x = net.train()[0].lowbit_input, torch.zeros(1, 1, 8, 8)
    x[:, :, 1::2] = 5.0  # rows that batches with an odd number see
    with torch.no_grad():
        seen = []
        for number in range(4):
            watched.batches.fill_(number)
            seen.append(float(watched.range_of(x)[1]))
    assert seen == [0.0, 5.0, 0.0, 5.0]


def test_values_that_are_no_numbers_are_counted() -> None:
    x = torch.randn(4, 3, 6, 6)
    x[0, 0, 0, :3] = float("nan")
    with pytest.raises(ConfigError, match=r"0\.lowbit_input: 3 NaN or infinite values in calibration"):
        convert(nn.Sequential(nn.Conv2d(3, 4, 3)).eval(), "jacinto", x)


def test_weights_that_give_way_to_their_bias_are_proved_on_their_own_grid() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)).eval()
    with torch.no_grad():
        net[2].bias.fill_(900.0)
    convert(net, "jacinto", torch.randn(16, 4), bias="tidl_scale")
    weight = net[2].lowbit_weight
    assert weight.grid().contains(weight.quantize(net[2].weight.detach()))
    assert weight.grid().exponent > -7

"""TQT through the seam: which bits go where, what is trained in each mode, when thresholds freeze."""

from __future__ import annotations

import dataclasses
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_lowbit.errors import ConfigError
from lightning_lowbit.modules.base import StepContext, float_mode, low_bit_modules, switch_of
from lightning_lowbit.modules.calibrate import calibrate
from lightning_lowbit.modules.convert import quantizers
from lightning_lowbit.modules.thresholds import ThresholdQuantizer
from lightning_lowbit.numerics.exponent import pow2
from lightning_lowbit.plugins.precision import lowbit_step, rule_of
from lightning_lowbit.schemes import convert, resolve
from lightning_lowbit.schemes.tqt import Tqt


class Net(nn.Module):
    """conv-BN-ReLU, a residual block, a pool and a linear layer: every role once."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.conv3 = nn.Conv2d(8, 8, 3, padding=1)
        self.fc = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.relu(self.bn2(self.conv2(x)) + x)
        x = F.relu(self.conv3(x))
        return self.fc(F.adaptive_avg_pool2d(x, 1).flatten(1))


@pytest.fixture
def batch() -> Tensor:
    return torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def network(**options: object) -> Net:
    torch.manual_seed(1)
    net = Net()
    with torch.no_grad():
        for _ in range(3):
            net(torch.randn(16, 3, 8, 8))  # running statistics worth folding
    convert(net, Tqt(**options))  # type: ignore[arg-type]
    return net


def calibrated(batch: Tensor, **options: object) -> Net:
    net = network(**options)
    calibrate(net, lambda: (net(batch), 1)[1])
    return net


def bits(net: nn.Module) -> dict[str, int]:
    return {q.site.key: q.bits for _, q in quantizers(net) if isinstance(q, ThresholdQuantizer)}


def context(step: int, total: int | None = 100) -> StepContext:
    return StepContext(step, total, lambda t: t, lambda t: t)


def test_bits_go_where_the_paper_puts_them(batch: Tensor) -> None:
    found = bits(calibrated(batch, bits=4))
    assert found["conv1.lowbit_weight"] == found["fc.lowbit_weight"] == 8  # first and last layer
    assert found["conv2.lowbit_weight"] == found["conv3.lowbit_weight"] == 4
    assert found["conv1.lowbit_input"] == 8  # the network's input
    assert found["lowbit_relu.lowbit_output"] == found["bn2.lowbit_output"] == 8  # operands of the sum
    assert found["conv2.lowbit_input"] == 4  # reads one of them
    assert found["lowbit_relu_1.lowbit_output"] == 4  # behind the sum, read by a layer only
    assert found["lowbit_relu_2.lowbit_output"] == found["lowbit_avg_pool.lowbit_output"] == 8
    assert "conv3.lowbit_input" not in found  # its input is on that grid already


def test_operand_bits_four_needs_no_second_quantizer(batch: Tensor) -> None:
    found = bits(calibrated(batch, bits=4, operand_bits=4))
    assert found["lowbit_relu.lowbit_output"] == 4
    assert "conv2.lowbit_input" not in found


def test_overrides_by_pattern(batch: Tensor) -> None:
    found = bits(calibrated(batch, bits=4, overrides={"conv[23]": {"weight_bits": 6}, "*relu_1": {"act_bits": 5}}))
    assert found["conv2.lowbit_weight"] == found["conv3.lowbit_weight"] == 6
    assert found["lowbit_relu_1.lowbit_output"] == 5


def test_a_sum_has_one_step_and_one_threshold(batch: Tensor) -> None:
    net = calibrated(batch)
    made = {q.site.key: q for _, q in quantizers(net)}
    a, b = made["lowbit_relu.lowbit_output"], made["bn2.lowbit_output"]
    assert a.log2_t is b.log2_t
    assert not a.signed
    assert b.signed
    assert int(a.exponent()) == int(b.exponent())


@pytest.mark.parametrize("width", [2, 3, 5, 8, 12, 16])
def test_all_widths_stay_on_their_grids(batch: Tensor, width: int) -> None:
    net = calibrated(batch, bits=width, operand_bits=width, input_bits=width, first_last_weight_bits=width)
    with torch.no_grad():
        for _, module in low_bit_modules(net):
            quantizer = getattr(module, "lowbit_weight", None)
            if quantizer is not None:
                weight, _ = module.eval().effective(module.weight)
                assert quantizer.grid().contains(quantizer(weight))
    assert torch.isfinite(net(batch)).all()


@pytest.mark.parametrize("option", ["weight_bits", "act_bits", "operand_bits", "first_last_weight_bits"])
@pytest.mark.parametrize("width", [1, 17, 0, 4.0, True])
def test_widths_out_of_range_are_refused(option: str, width: object) -> None:
    with pytest.raises(ConfigError, match=rf"{option}={width!r}.*2 to 16"):
        Tqt(**{option: width})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"mode": "retrain"}, "not one of 'static', 'retrain_wt'"),
        ({"weight_init": "kl"}, "Did you mean 'klj'"),
        ({"overrides": {"a": {"weight_bit": 4}}}, "Did you mean 'weight_bits'"),
        ({"overrides": {"a": {"weight_bits": 1}}}, "overrides"),
    ],
)
def test_wrong_options_name_the_right_ones(options: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        Tqt(**options)  # type: ignore[arg-type]


def test_unknown_option_by_name() -> None:
    with pytest.raises(ConfigError, match="Did you mean 'weight_bits'"):
        resolve("tqt", weight_bit=4)


def test_bits_is_a_shorthand_that_later_changes_override() -> None:
    assert dataclasses.replace(Tqt(bits=4), act_bits=8) == Tqt(weight_bits=4, act_bits=8)


@pytest.mark.parametrize("init", ["mse", "max", "3sd", "klj", "percentile"])
def test_every_initialization_keeps_the_function(batch: Tensor, init: str) -> None:
    net = calibrated(batch, weight_init=init, act_init=init)
    with float_mode(net):
        expected = net.eval()(batch)
    error = (net(batch) - expected).norm() / expected.norm()
    assert 0 < error < 0.15


def test_mse_start_errs_least_on_every_weight(batch: Tensor) -> None:
    def errors(init: str) -> list[float]:
        net = calibrated(batch, bits=4, weight_init=init).eval()
        layers = [net.conv1, net.conv2, net.conv3, net.fc]
        weights = [layer.effective(layer.weight)[0].detach() for layer in layers]
        return [float((layer.lowbit_weight(w) - w).detach().norm()) for layer, w in zip(layers, weights, strict=True)]

    best, others = errors("mse"), [errors(init) for init in ("max", "3sd", "klj", "percentile")]
    assert all(a <= b for other in others for a, b in zip(best, other, strict=True))
    assert any(a < b for other in others for a, b in zip(best, other, strict=True))


@pytest.mark.parametrize(
    ("options", "bias_grid"),
    [({}, "int32"), ({"bias": "own"}, "int16"), ({"acc_bits": 16}, "int16"), ({"bias": "float"}, None)],
)
def test_bias_and_accumulator(batch: Tensor, options: dict[str, object], bias_grid: str | None) -> None:
    net = calibrated(batch, **options).eval()
    layer = net.conv2
    if bias_grid is None:
        assert layer.lowbit_bias is None
    else:
        assert str(layer.lowbit_bias.grid()).startswith(bias_grid)
    unit = int(layer.accumulator_exponent())
    if "acc_bits" in options:  # a right shift, and the bias on the accumulator's scale (section 4)
        assert int(layer.lowbit_accumulator.exponent()) >= unit
        assert int(layer.lowbit_bias.exponent()) == int(layer.lowbit_accumulator.exponent())
    elif bias_grid == "int32":
        assert int(layer.lowbit_bias.exponent()) == unit
        codes = layer.lowbit_bias(layer.effective(layer.weight)[1]).double() / pow2(torch.tensor(unit), torch.float64)
        assert torch.equal(codes, codes.round())
    with float_mode(net):
        expected = net(batch)
    assert (net(batch) - expected).norm() / expected.norm() < 0.1


@pytest.mark.parametrize("mode", ["static", "retrain_wt", "retrain_wt_th", "retrain_th"])
def test_modes_train_what_they_say(batch: Tensor, mode: str) -> None:
    net = calibrated(batch, mode=mode, bits=4)
    net.train()
    before = {k: v.clone() for k, v in net.named_parameters()}
    hidden = {id(p) for _, q in quantizers(net) for p in q.parameters()}
    optimizer = torch.optim.SGD([p for p in net.parameters() if id(p) not in hidden], lr=0.1, weight_decay=0.1)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = net(batch).square().mean()
        loss.backward()
        return loss

    for step in range(3):
        lowbit_step(net, optimizer, closure, context(step))
    moved = {k for k, v in net.named_parameters() if not torch.equal(v, before[k])}
    thresholds = {k for k in moved if k.endswith("log2_t")}
    assert bool(thresholds) == (mode in ("retrain_wt_th", "retrain_th"))
    assert bool(moved - thresholds) == (mode in ("retrain_wt_th", "retrain_wt"))


def test_thresholds_freeze_one_after_the_other_and_all_in_time(batch: Tensor) -> None:
    net = calibrated(batch, bits=4)
    net.train()
    rule = rule_of(net)
    assert rule is not None
    rule.milestone("freeze_ranges", True, 10)
    rule.milestone("ranges_frozen", True, 30)
    hidden = {id(p) for _, q in quantizers(net) for p in q.parameters()}
    optimizer = torch.optim.SGD([p for p in net.parameters() if id(p) not in hidden], lr=0.01)
    counts, exponents = [], []
    for step in range(40):

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = net(batch).square().mean()
            loss.backward()
            return loss

        lowbit_step(net, optimizer, closure, context(step, 40))
        trained = [q for _, q in quantizers(net) if q.log2_t is not None]
        counts.append(sum(float(q.frozen) > 0.5 for q in trained))
        exponents.append([float(q.log2_t.detach()) for q in trained])
    assert counts[9] == 0
    assert 0 < counts[20] < len(trained)
    assert counts[29] == counts[-1] == len(trained)
    assert exponents[30] == exponents[-1]


def test_a_threshold_of_a_tie_gets_both_gradients(batch: Tensor) -> None:
    net = calibrated(batch).eval()
    made = {q.site.key: q for _, q in quantizers(net)}
    shared = made["bn2.lowbit_output"]
    net(batch).square().sum().backward()
    both = shared.log2_t.grad.clone()
    parts = []
    for key in ("bn2.lowbit_output", "lowbit_relu.lowbit_output"):
        own = nn.Parameter(shared.log2_t.detach().clone())
        made[key].log2_t = own
        net.zero_grad(set_to_none=True)
        net(batch).square().sum().backward()
        parts.append(own.grad)
        made[key].log2_t = shared.log2_t
    assert torch.allclose(both, parts[0] + parts[1], rtol=1e-4)
    assert parts[0].abs() > 0
    assert parts[1].abs() > 0


def test_a_dead_tensor_stays_open_and_the_next_calibration_sets_it(batch: Tensor) -> None:
    net = network()
    with torch.no_grad():
        net.conv3.weight.zero_()
        net.conv3.bias.fill_(-1.0)  # a dead ReLU
    still_open = calibrate(net, lambda: (net(batch), 1)[1])
    assert "lowbit_relu_2.lowbit_output" in still_open
    assert "conv3.lowbit_weight" in still_open
    assert torch.isfinite(net(batch)).all()
    with torch.no_grad():
        net.conv3.weight.normal_()
        net.conv3.bias.zero_()
    assert calibrate(net, lambda: (net(batch), 1)[1]) == []


def test_calibration_twice_gives_the_same_grids(batch: Tensor) -> None:
    net = calibrated(batch)
    first = {k: str(q.grid()) for k, q in quantizers(net)}
    calibrate(net, lambda: (net(batch), 1)[1])
    assert {k: str(q.grid()) for k, q in quantizers(net)} == first


def test_nan_in_calibration_data_is_refused_by_site(batch: Tensor) -> None:
    net = network()
    batch[0, 0, 0, 0] = float("nan")
    with pytest.raises(ConfigError, match=r"conv1\.lowbit_input: 1 NaN"):
        calibrate(net, lambda: (net(batch), 1)[1])
    assert not switch_of(net).started


def test_empty_batch_has_gradient_zero(batch: Tensor) -> None:
    net = calibrated(batch).eval()
    net(batch[:0]).sum().backward()
    assert float(net.conv1.lowbit_input.log2_t.grad) == 0.0


def test_paper_recipe_scales_with_the_batch_size() -> None:
    assert Tqt.paper(24).freeze_thresholds == "1000 steps"
    assert Tqt.paper(48).lr_step == 500
    assert Tqt.paper(24, bits=4).weight_bits == 4


def test_label_free_brings_the_network_nearer_to_float(batch: Tensor) -> None:
    from lightning_lowbit.modules.reconstruct import blocks, reconstruct

    net = calibrated(batch, bits=3, mode="label_free").eval()
    with float_mode(net):
        expected = net(batch)
    before = (net(batch) - expected).norm()
    errors = reconstruct(net, lambda: (net(batch), 1)[1], steps=100, lr=1e-3, threshold_lr=1e-2)
    assert set(errors) == {block.path for block in blocks(net)}
    assert all(after <= start for start, after in errors.values())
    assert (net(batch) - expected).norm() < 0.8 * before


def test_training_without_the_update_rule_is_said_once(batch: Tensor) -> None:
    net = calibrated(batch).train()
    with pytest.warns(UserWarning, match="lowbit_step"):
        net(batch).sum().backward()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        net(batch).sum().backward()


def test_a_managed_network_trains_without_a_word(batch: Tensor) -> None:
    net = calibrated(batch).train()
    optimizer = torch.optim.SGD([net.conv1.weight], lr=0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lowbit_step(net, optimizer, lambda: net(batch).sum().backward())

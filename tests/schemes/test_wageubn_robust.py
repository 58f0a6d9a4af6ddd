"""WAGEUBN where networks, optimizers and settings are unlike those of a textbook."""

from __future__ import annotations

import copy
import itertools
import re
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from schemes.conformance import differing
from schemes.wageubn_nets import (
    Wired,
    chain,
    converted,
    draws,
    finite,
    images,
    labels,
    leave,
    norms,
    reach,
    rule,
    sgd,
    state,
    step,
    weights,
    widths,
)
from torch import Tensor, nn

from lightning_lowbit import Wageubn, convert, lowbit_step
from lightning_lowbit.errors import ConfigError, UnsupportedModelError
from lightning_lowbit.modules.base import StepContext, switch_of
from lightning_lowbit.modules.convert import quantizers
from lightning_lowbit.modules.thresholds import ThresholdQuantizer
from lightning_lowbit.numerics.constant import uniform_draws
from lightning_lowbit.numerics.noise import combine


def linear(*features: int, between: Any = nn.ReLU) -> Any:
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for n, (a, b) in enumerate(itertools.pairwise(features)):
        layers += [nn.Linear(a, b)] if n == 0 else [between(), nn.Linear(a, b)]
    return nn.Sequential(*layers)


def told_of(net: Any, optimizer: Any, x: Tensor, **options: Any) -> list[str]:
    """Warnings and news of a step."""
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        step(net, optimizer, x, **options)
    return [str(w.message) for w in told] + rule(net).news()


# -- dropout -------------------------------------------------------------------------------------------------
def dropped(how: str) -> Any:
    """Reads a rectified convolution as it is (``plain``), and behind a dropout (``layer``)."""

    def forward(net: Any, x: Tensor) -> Tensor:
        x = F.relu(net.conv(x))
        x = (net.pool(x) if how == "behind a pool" else x[:, :, :1, :1]).flatten(1)
        y = F.dropout(x, 0.5, net.training) if how == "function" else net.drop(x)
        total: Tensor = net.layer(y) + net.plain(x)
        return total

    torch.manual_seed(0)
    net = Wired(
        forward, conv=nn.Conv2d(3, 8, 3), pool=nn.AdaptiveAvgPool2d(1), drop=nn.Dropout(0.5), layer=nn.Linear(8, 4),
        plain=nn.Linear(8, 4),
    )  # fmt: skip
    with torch.no_grad():
        net.conv.weight.abs_()
        net.conv.bias.fill_(0.2)
    return net


@pytest.mark.parametrize("how", ["module", "function", "behind a pool"])
def test_what_a_dropout_scales_has_a_format_of_its_own(how: str) -> None:
    x = images(64, 3, 8, 8).abs()
    net = converted(dropped(how), x)
    own, shared = net.layer.input_grid, net.plain.input_grid
    assert own is net.layer.lowbit_input
    assert shared is not own
    assert shared.site.path != "plain"
    seen: list[Tensor] = []
    net.layer.register_forward_hook(lambda m, args, y: seen.append(args[0].detach()))
    for _ in range(3):
        step(net, sgd(net, 0.0), x)
    limit = own.format.limits[1] * 2.0**-own.format.fraction
    assert float((seen[-1] > limit).float().mean()) < 0.01


# -- second derivatives --------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["layer", "norm", "rectifier"])
def test_a_second_derivative_is_refused_by_name(name: str) -> None:
    """Also where it comes first, and nothing behind it asks for a gradient."""
    kind = {"layer": nn.Linear(8, 8), "norm": nn.BatchNorm1d(8), "rectifier": nn.ReLU()}[name]
    net, x = converted(nn.Sequential(nn.Linear(6, 8), kind, nn.Linear(8, 2)), images(8, 6))[:2], images(8, 6)
    x.requires_grad_()
    with pytest.raises(UnsupportedModelError, match=rf"{'batch_norm' if name == 'norm' else '1'}.*create_graph=True"):
        torch.autograd.grad(net(x).sum(), x, create_graph=True)


# -- sparse gradients ----------------------------------------------------------------------------------------
def words_in(sparse: bool = True) -> Any:
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(10, 8, sparse=sparse), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))


@pytest.mark.parametrize("update", ["integer", "fake", "float"])
def test_an_embedding_with_sparse_gradients_trains_as_with_dense_ones(update: Any) -> None:
    found = []
    for sparse in (True, False):
        net = converted(words_in(sparse), torch.arange(8), update=update)
        before = net[0].weight.detach().clone()
        step(net, torch.optim.SGD(net.parameters(), 0.5), torch.arange(8))
        assert rule(net).skipped == 0
        assert bool((net[0].weight.detach() != before)[:8].any())
        found.append(state(net))
    assert differing(*found) == []


def test_a_sparse_gradient_that_is_not_finite_leaves_the_step_out() -> None:
    net = converted(words_in(), torch.arange(8))

    def closure() -> Tensor:
        loss = F.cross_entropy(net(torch.arange(8)), labels())
        loss.backward()
        net[0].weight.grad = net[0].weight.grad * torch.inf
        return loss

    with pytest.warns(UserWarning, match="skipped_steps"):
        lowbit_step(net, torch.optim.SGD(net.parameters(), 0.5), closure)
    assert rule(net).skipped == 1
    assert finite(net)


# -- in-place code -------------------------------------------------------------------------------------------
IN_PLACE: dict[str, Any] = {
    "ReLU": nn.ReLU, "LeakyReLU": lambda inplace: nn.LeakyReLU(0.2, inplace), "Hardswish": nn.Hardswish,
}  # fmt: skip


@pytest.mark.parametrize("kind", IN_PLACE)
@pytest.mark.parametrize("layer", [nn.ConvTranspose2d, nn.Conv2d], ids=["transposed", "conv"])
def test_in_place_code_behind_rounded_errors_has_the_bits_of_copies(kind: str, layer: Any) -> None:
    found = []
    for inplace in (False, True):
        torch.manual_seed(0)
        net = nn.Sequential(
            nn.Conv2d(3, 6, 3), nn.ReLU(), layer(6, 6, 3), IN_PLACE[kind](inplace=inplace),
            nn.Dropout(0.25, inplace=inplace), nn.Conv2d(6, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        )  # fmt: skip
        net, x = converted(net), images().requires_grad_()
        torch.manual_seed(1)
        F.cross_entropy(net(x), labels()).backward()
        found.append([x.grad, *(p.grad for p in net.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


# -- a quantizer behind a user's own module ------------------------------------------------------------------
def test_a_quantizer_behind_an_activation_in_front_of_a_float_layer_is_the_rule_s() -> None:
    net = linear(6, 8, 8, 4)
    net[3] = nn.Hardtanh(-8.0, 8.0)
    x = images(16, 6)
    convert(net, Wageubn(width_patience=2), x)
    net.train()
    quantizer = widths(net)["3.lowbit_output"]
    assert quantizer in rule(net).widths
    assert quantizer.gate in rule(net).gates
    before = quantizer.integer
    for _ in range(3):
        step(net, sgd(net, 0.0), 6 * x)
    grown = quantizer.integer
    assert grown > before
    reach(net, "freeze_widths")
    for _ in range(3):
        step(net, sgd(net, 0.0), x / 64)
    assert quantizer.integer == grown
    leave(net, "freeze_widths", "quantize_errors")
    assert not quantizer.gate.on
    with pytest.warns(UserWarning, match="skipped_steps"):
        step(net, sgd(net), x / 0.0)


@pytest.mark.parametrize("activation", [nn.LeakyReLU, nn.Hardtanh, nn.Sigmoid])
def test_a_threshold_behind_a_user_s_activation_is_trained(activation: Any) -> None:
    net = linear(6, 8, 4, between=activation)
    convert(net, "tqt", images(16, 6))
    threshold = dict(quantizers(net))["1.lowbit_output"]
    assert isinstance(threshold, ThresholdQuantizer)
    before = threshold.log2_t.detach().clone()
    step(net.train(), sgd(net), images(16, 6))
    assert not torch.equal(threshold.log2_t, before)


# -- widths of weights ---------------------------------------------------------------------------------------
def test_sixteen_bit_weights_use_all_of_their_range() -> None:
    net = linear(4, 4, 4)
    with torch.no_grad():
        net[0].weight.fill_(0.1)[0, 0] = 0.9999
    net = converted(net, images(8, 4), weight_bits=16, weight_range="one")
    step(net, sgd(net, 0.0), images(8, 4))
    weight = net[0].weight.detach()
    assert float(weight[0, 0]) == round(0.9999 * 2**23) / 2**23
    assert float(weights(net)["0.lowbit_weight"].quantize(weight)[0, 0]) == 32765 / 2**15


def test_four_bit_weights_stop_where_their_codes_do() -> None:
    net = converted(linear(4, 4, 4), images(8, 4), weight_bits=4, weight_range="one")
    for _ in range(200):
        step(net, sgd(net, 0.99, 0.75), images(8, 4), lambda y: -y.sum())
        largest = float(net[2].weight.detach().max())
        if largest >= 7 / 8:
            break
    assert largest == 7 / 8
    assert int(weights(net)["2.lowbit_weight"].saturated(net[2].weight)) > 0


def test_a_bias_that_stored_codes_do_not_hold_is_refused_by_name() -> None:
    for value, fits in ((100.0, True), (300.0, False)):
        net = linear(4, 4, 4)
        with torch.no_grad():
            net[0].bias.fill_(value)
        net = converted(net, images(8, 4))
        if fits:
            step(net, sgd(net, 0.0), images(8, 4))
            assert bool((net[0].bias == value).all())
        else:
            with pytest.raises(ConfigError, match=r"0\.bias: got a value of 300, expected at most 128.*stored_bits"):
                step(net, sgd(net, 0.0), images(8, 4))


@pytest.mark.parametrize("bits", [29, 31])
def test_stored_bits_leave_a_gamma_room_to_grow(bits: int) -> None:
    with pytest.raises(ConfigError, match=rf"stored_bits={bits}\): expected an integer from 16 to 28"):
        Wageubn(stored_bits=bits, gradient_bits=16, lr_bits=bits - 15, accumulator_bits=14)
    net = converted(chain(), stored_bits=28, gradient_bits=16, lr_bits=13, accumulator_bits=14)
    step(net, sgd(net, 0.5, 0.0), images(), lambda y: -(2.0**12) * net[3].weight.sum() + 0.0 * y.sum())
    assert bool((net[3].weight > 7.9).all())


# -- formats of what is joined ------------------------------------------------------------------------------
class Joined(nn.Module):
    """Two rectified convolutions side by side, read by a third."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3), nn.Conv2d(8, 4, 3)
        self.r, self.q, self.pool = nn.ReLU(), nn.ReLU(), nn.AdaptiveAvgPool2d(1)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.pool(self.c(torch.cat([self.r(self.a(x)), self.q(self.b(x))], 1))).flatten(1)
        return y


@pytest.mark.parametrize("which", ["r", "q"])
def test_a_format_given_for_one_counts_for_all_that_is_joined(which: str) -> None:
    net = converted(Joined(), overrides={which: {"act_format": (8, 5)}}, width_patience=1)
    for _ in range(3):
        step(net, sgd(net), images())
    found = [widths(net)[f"{name}.lowbit_output"].format for name in "rq"]
    assert [(f.total, f.integer) for f in found] == [(8, 5)] * 2


def test_two_formats_for_what_is_joined_are_refused_by_path() -> None:
    given = {"r": {"act_format": (8, 5)}, "q": {"act_format": (8, 4)}}
    with pytest.raises(ConfigError, match=r"r, q: tensors that are joined have one format"):
        converted(Joined(), overrides=given)
    converted(Joined(), overrides={**given, "q": given["r"]})


# -- the update ----------------------------------------------------------------------------------------------
def test_each_update_in_a_batch_has_noise_of_its_own() -> None:
    net = converted(chain(), seed=3)
    held, like = rule(net), net[2].weight
    first, second = (held._draws("2.weight", like, StepContext(7, None)) for _ in range(2))
    third = held._draws("2.weight", like, StepContext(8, None))
    again = rule(converted(chain(), seed=3))._draws("2.weight", like, StepContext(8, None))
    assert torch.equal(first, uniform_draws(combine(3, 7, held.places["2.weight"]), like))
    assert not torch.equal(first, second)
    assert torch.equal(third, again)


@pytest.mark.parametrize(
    ("options", "narrow"),
    [
        ({}, True),
        ({"exact": False, "gradient_bits": 8, "accumulator_bits": 16, "dr": 1024}, False),
        ({"exact": False, "gradient_bits": 8, "accumulator_bits": 15}, False),
    ],
    ids=["closes", "wide", "sums up"],
)
def test_accumulators_hold_what_they_add_up(options: dict[str, Any], narrow: bool) -> None:
    net = converted(chain(), rounding="nearest", **options)
    for _ in range(1 if narrow else 8):
        step(net, sgd(net, 1 / 512, 0.75), images())
    found = {name: acc for name, acc in rule(net).accumulators.items() if rule(net).stored[name].weight}
    assert {acc.dtype for acc in found.values()} == {torch.int16 if narrow else torch.int32}
    assert (max(int(acc.abs().max()) for acc in found.values()) > 2**15) == (not narrow)
    assert rule(net).accumulators["3.weight"].dtype == torch.int32


def test_a_frozen_parameter_is_not_put_on_the_stored_grid() -> None:
    net = converted(chain(), update="fake")
    with torch.no_grad():
        net[0].weight.mul_(1.0 + 2.0**-20)
    net[0].weight.requires_grad_(False)
    net[2].weight.grad = None
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    step(net, torch.optim.SGD([p for p in net.parameters() if p.requires_grad], 0.1), images())
    assert torch.equal(net[0].weight, before["0.weight"])
    assert not torch.equal(net[2].weight, before["2.weight"])


def test_decay_that_the_optimizer_decouples_is_not_applied_and_named() -> None:
    found = []
    for make, options in ((torch.optim.Adam, {}), (torch.optim.AdamW, {"weight_decay": 0.5})):
        net = converted(chain())
        switch_of(net).run.injected = draws
        said = told_of(net, make(net.parameters(), 0.125, **options), images())
        assert any(re.match("betas, weight_decay of the optimizer: unknown", words) for words in said) == bool(options)
        found.append(state(net))
    assert differing(*found) == []


def test_weights_that_are_loaded_behind_calibration_and_clipped_are_named() -> None:
    net, other = converted(chain()), chain()
    with torch.no_grad():
        other[2].weight.mul_(8.0)
    net.load_state_dict(other.state_dict(), strict=False)
    beyond = int((other[2].weight.abs() >= 2.0 ** weights(net)["2.lowbit_weight"].power).sum())
    said = [words for words in told_of(net, sgd(net, 0.0), images()) if "beyond the range" in words]
    assert len(said) == 1
    assert f"2.weight: {beyond} of 576 weights" in said[0]
    assert not any("beyond" in words for words in told_of(net, sgd(net, 0.0), images()))


def test_a_warm_up_is_not_taken_for_the_run_s_learning_rate() -> None:
    for warm, told in ((True, 0), (False, 1)):
        net = converted(chain())
        optimizer, said = sgd(net, 0.004), []
        for number in range(0, 1000, 50):
            optimizer.param_groups[0]["lr"] = 0.5 if warm and 100 <= number < 300 else 0.004
            said += told_of(net, optimizer, images(), context=StepContext(number, 1000))
        assert sum("learning rate 0.004 carries a weight" in words for words in said) == told


# -- batch norm ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("samples", "guard"), [(2, 4), (1024, 5)])
def test_evaluation_bounds_normalized_values_by_four_bits_at_least(samples: int, guard: int) -> None:
    net = converted(nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 4)), images(64, 6))
    step(net, sgd(net, 0.0), images(samples, 6))
    assert float(norms(net)["1"].guard) == guard


def test_an_empty_batch_moves_no_statistics() -> None:
    net = converted(chain())
    step(net, sgd(net), images())
    before = {name: value.clone() for name, value in net[3].named_buffers()}
    net(images()[:0])
    assert all(torch.equal(value, before[name]) for name, value in net[3].named_buffers())
    assert net.eval()(images()[:0]).shape == (0, 4)


@pytest.mark.parametrize(
    ("kind", "world", "guard"), [(nn.SyncBatchNorm, 1, 4), (nn.SyncBatchNorm, 8, 5), (nn.BatchNorm1d, 8, 4)]
)
def test_a_norm_counts_the_values_that_its_statistics_are_of(kind: Any, world: int, guard: int) -> None:
    net = converted(nn.Sequential(nn.Linear(6, 5), kind(5), nn.ReLU(), nn.Linear(5, 3)), images(32, 6))
    run = switch_of(net).run
    run.world, run.reduce_sum = world, lambda tensor: tensor * world
    net(images(128, 6))
    assert float(norms(net)["1"].guard) == guard
    if guard == 5:
        assert net(images(1, 6)).shape == (1, 3)
    else:
        with pytest.raises(ValueError, match="more than one value per channel"):
            net(images(1, 6))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_network_in_another_type_evaluates(dtype: torch.dtype) -> None:
    net = chain()
    net = converted(net, images(32, 3, 40, 40))
    step(net, sgd(net), images(32, 3, 40, 40))  # 2^15.4 values of a channel
    want = copy.deepcopy(net).eval()(images(4, 3, 40, 40))
    y = net.to(dtype).eval()(images(4, 3, 40, 40).to(dtype))
    torch.testing.assert_close(y.float(), want, rtol=0.02, atol=0.02)
    assert widths(net)["0.lowbit_input"].integer == 3

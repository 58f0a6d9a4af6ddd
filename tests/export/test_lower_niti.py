"""NITI as an integer program: the program's numbers are those of the network's evaluation, bit for bit."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from export.layered import Net
from export.random_graphs import random_batch, random_net
from hypothesis import given, settings
from hypothesis import strategies as st
from schemes.niti_nets import fit, images, loader
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lightning_lowbit import convert
from lightning_lowbit.errors import UnsupportedModelError
from lightning_lowbit.export.lowering import lower
from lightning_lowbit.modules.elementwise import LowBitAdd
from lightning_lowbit.numerics.integer_affine import integer_affine
from lightning_lowbit.numerics.rounding import Rounding, round_to
from lightning_lowbit.schemes.niti import Niti


def conv(i: int = 3, o: int = 3, kernel: int = 3, **options: Any) -> nn.Module:
    return nn.Conv2d(i, o, kernel, **options)


class Unfollowed(nn.Module):
    """Tracing stops at the branch: its functions see carriers and floats, and what it gives is an exact sum."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.rectify = conv(), conv(kernel=1), True

    def forward(self, x: Tensor) -> Tensor:
        a: Tensor = self.a(x)
        return a + self.b(F.relu(a) if self.rectify else a) if x.detach().numpy().size else a


def loud(layer: Any, factor: float) -> nn.Module:
    with torch.no_grad():
        layer.weight *= factor
    return layer  # type: ignore[no-any-return]


IMAGE, SIGNAL, WORDS = (3, 8, 8), (3, 9), (5, 6)
NETS: dict[str, tuple[tuple[int, ...], Callable[[], nn.Module]]] = {
    "residual": (IMAGE, lambda: Net(
        lambda m, x: m.c((y := F.relu(m.n(m.a(x)))) + m.b(y)), a=conv(padding=1), n=nn.BatchNorm2d(3),
        b=loud(conv(padding=1), 9.0), c=conv(3, 2),
    )),
    "concat": (IMAGE, lambda: Net(
        lambda m, x: m.c(torch.cat([m.a(x), m.b(x), x], 1)), a=loud(conv(padding=1), 30.0), b=conv(padding="same"),
        c=conv(9, 2),
    )),
    "concat with the input": (IMAGE, lambda: Net(
        lambda m, x: m.c(torch.cat([m.a(x), x], 1)), a=loud(conv(padding=1), 0.1), c=conv(6, 2),
    )),
    "stack": (IMAGE, lambda: Net(
        lambda m, x: m.c(torch.stack([m.a(x), F.relu(m.b(x))], 2).flatten(1, 2)), a=conv(), b=loud(conv(), 5.0),
        c=conv(6, 2),
    )),
    "max pools": (IMAGE, lambda: nn.Sequential(
        conv(), nn.MaxPool2d(3, 2, 1, ceil_mode=True), conv(3, 4, 1), nn.AdaptiveMaxPool2d(3), conv(4, 2, 1),
    )),
    "average pools": (IMAGE, lambda: nn.Sequential(
        conv(padding=1), nn.AvgPool2d(3, 2, 1), conv(3, 3, 1), nn.AvgPool2d(3, 2, 1, True, False), conv(3, 3, 1),
        nn.AdaptiveAvgPool2d(2),
    )),
    "pools of other windows": (IMAGE, lambda: Net(
        lambda m, x: F.adaptive_avg_pool2d(m.b(F.avg_pool2d(m.a(x), 2, divisor_override=7)), (2, 1)),
        a=conv(padding=1), b=conv(padding=1),
    )),
    "groups": (IMAGE, lambda: nn.Sequential(
        conv(3, 6, groups=3, padding=1, stride=2), nn.BatchNorm2d(6), nn.ReLU6(), conv(6, 4, 2, groups=2, dilation=2),
    )),
    "signal": (SIGNAL, lambda: nn.Sequential(
        nn.Conv1d(3, 4, 3, padding=1), nn.BatchNorm1d(4), nn.ReLU(), nn.MaxPool1d(2), nn.Conv1d(4, 4, 2, bias=False),
        nn.AdaptiveAvgPool1d(2), nn.Flatten(), nn.Linear(8, 2),
    )),
    "words": (WORDS, lambda: nn.Sequential(nn.Linear(6, 7), nn.ReLU(), nn.Dropout(0.3), nn.Linear(7, 2))),
    "norm of features": ((6,), lambda: nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 2))),
    "outputs": (IMAGE, lambda: Net(
        lambda m, x: {"a": (y := F.relu(m.a(x))), "b": (m.b(y).mean((2, 3)), m.b(y).mean(-1, keepdim=True))},
        a=conv(), b=conv(),
    )),
    "sum of shapes": (IMAGE, lambda: Net(
        lambda m, x: m.c(m.a(x) + m.b(x).mean((2, 3), keepdim=True)), a=conv(), b=conv(), c=conv(3, 2, 1),
    )),
    "moves that carriers do not make": (IMAGE, lambda: Net(
        lambda m, x: m.b(F.interpolate(F.relu(m.a(x)), scale_factor=2)).repeat(1, 2, 1, 1), a=conv(), b=conv(3, 2, 1),
    )),
    "floats of codes": (IMAGE, lambda: Net(
        lambda m, x: m.c(F.avg_pool2d(y := F.relu(m.a(x).repeat(1, 2, 1, 1)), 2)) + m.c(y + m.b(x))[:, :, ::2, ::2],
        a=conv(), b=conv(3, 6), c=conv(6, 2, 1),
    )),
    "unfollowed": (IMAGE, lambda: Net(lambda m, x: m.c(m.u(x)), u=Unfollowed(), c=conv(3, 2, 1))),
    "rectified unfollowed": (IMAGE, lambda: Net(lambda m, x: m.c(F.relu6(m.u(x))), u=Unfollowed(), c=conv(3, 2, 1))),
    "sum with unfollowed": (IMAGE, lambda: Net(
        lambda m, x: m.c(m.a(x) + F.relu(m.u(x))), u=Unfollowed(), a=loud(conv(), 50.0), c=conv(3, 2, 1),
    )),
    "concat with unfollowed": (IMAGE, lambda: Net(
        lambda m, x: m.c(torch.cat([m.a(x), F.relu(m.u(x))], 1)), u=Unfollowed(), a=loud(conv(), 50.0), c=conv(6, 2, 1),
    )),
}  # fmt: skip


def converted(name: str, scheme: Niti | None = None, **options: Any) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    shape, make = NETS[name]
    net, x = make().eval(), torch.randn(7, *shape)
    for norm in (module for module in net.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)):
        for p in (norm.running_mean, norm.weight, norm.bias):
            nn.init.normal_(p)  # type: ignore[arg-type]
        nn.init.uniform_(norm.running_var, 0.1, 3.0)  # type: ignore[arg-type]
    convert(net, scheme or Niti(), x, **options)
    return net.eval(), x


def differing(net: nn.Module, program: Any, x: Tensor) -> list[int]:
    """Batch sizes at which the program gives something else."""
    found = []
    for batch in (1, 3, 7):
        with torch.no_grad():
            wanted = tree_leaves(net(x[:batch]))
        got = tree_leaves(program.run(x[:batch]))
        same = [np.array_equal(a, b.numpy()) and a.shape == b.shape for a, b in zip(got, wanted, strict=True)]
        found += [batch] * (not all(same))
    return found


def functions(program: Any) -> list[str]:
    return [op.attributes["function"] for op in program.ops if op.kind == "island"]


@pytest.mark.parametrize("norms", ["fold", "island"])
@pytest.mark.parametrize("name", NETS)
def test_program_is_evaluation(name: str, norms: Any) -> None:
    net, x = converted(name, Niti(norms=norms))
    program = lower(net, x)
    assert not functions(program)
    assert differing(net, program, 3 * x) == []


@pytest.mark.parametrize("name", ["residual", "average pools", "unfollowed"])
def test_program_of_a_network_calibrated_on_zeros(name: str) -> None:
    torch.manual_seed(0)
    shape, make = NETS[name]
    net = make().eval()
    convert(net, Niti(), torch.zeros(2, *shape))
    assert differing(net, lower(net, torch.zeros(2, *shape)), torch.randn(7, *shape)) == []


def test_part_of_a_network() -> None:
    net, x = converted("signal")
    part: Any = net[:4]  # type: ignore[index]
    assert differing(part, lower(part, x), x) == []


def coarser(layer: Any, bits: int) -> int:
    """Weight and results worth 2^bits as much; the exponent of the results' codes."""
    codes = layer.lowbit_weight.codes()
    layer.lowbit_weight.block_exponent += bits
    layer.lowbit_weight.store(codes)
    layer.lowbit_accumulator.frozen += bits
    return int(layer.lowbit_accumulator.frozen) - 7


@pytest.mark.parametrize("joined", ["residual", "concat"])
@pytest.mark.parametrize("apart", [18, 25])
def test_exponents_far_apart(joined: str, apart: int) -> None:
    """Beyond 22 bits the finer summand gives up its lowest ones before the sum."""
    net, x = converted(joined)
    coarser(net.b, apart)
    for ranges in (module.lowbit_accumulator for module in net.modules() if isinstance(module, LowBitAdd)):
        ranges.frozen.fill_(4.0)  # type: ignore[operator, union-attr]  # so that small sums count
    program = lower(net, x)
    assert differing(net, program, x) == []
    kinds = [op.kind for op in program.ops if op.path == "lowbit_add"]
    assert joined == "concat" or kinds[0] == ("add" if apart <= 22 else "requantize")


def test_sums_that_evaluation_reads_as_float32() -> None:
    """20 bits apart float32 loses the finer summand, which would have decided ties."""
    net, x = converted("sum of shapes")
    coarser(net.b, 20)
    mean, total = (getattr(net, name).lowbit_accumulator for name in ("lowbit_avg_pool", "lowbit_add"))
    mean.frozen += 20
    total.frozen.copy_(mean.frozen + 1)
    program = lower(net, x)
    assert functions(program) == ["add"]
    assert differing(net, program, x) == []


def test_wide_sums_that_evaluation_reads_as_float32() -> None:
    net, x = converted("unfollowed")
    step = coarser(net.u.b, 22)  # type: ignore[union-attr]
    net.c.lowbit_input.frozen.fill_(step + 8.0)  # type: ignore[operator, union-attr]
    assert differing(net, lower(net, x), x) == []


def test_means_of_floats_round_to_even() -> None:
    net, x = converted("floats of codes")
    net.lowbit_avg_pool.lowbit_accumulator.frozen += 3  # type: ignore[operator, union-attr]  # so that there are ties
    assert differing(net, lower(net, x), x) == []


def test_codes_that_arrive_where_floats_were_planned_stay() -> None:
    net, x = converted("unfollowed")
    net.u.b.lowbit_input.frozen += 3  # type: ignore[operator, union-attr]
    net.u.rectify = False  # type: ignore[union-attr]
    assert differing(net, lower(net, x), x) == []


def test_exponents_that_leave_float32_are_moved_back() -> None:
    net, x = converted("words")
    layer: Any = net[0]  # type: ignore[index]
    layer.lowbit_weight.block_exponent.fill_(119.0)
    layer.lowbit_accumulator.frozen.fill_(130.0)
    program = lower(net, x)
    assert max(value.exponent for value in program.values.values() if value.dtype == "int") == 123
    assert differing(net, program, x) == []


def test_sums_beyond_int32() -> None:
    """70,000 products and the largest bias pass 2^31: evaluation and program add them all the same."""
    net, x = nn.Linear(70_000, 1), torch.ones(2, 70_000)
    model = nn.Sequential(net).eval()
    convert(model, Niti(), x)
    layer: Any = model[0]
    layer.lowbit_weight.store(torch.full((1, 70_000), 127, dtype=torch.int8))
    exponent = layer.lowbit_weight.exponent() + layer.lowbit_input.exponent()
    layer.lowbit_bias.block_exponent.copy_(exponent + 15)
    layer.lowbit_bias.store(torch.full((1,), 32767, dtype=torch.int16))
    layer.lowbit_accumulator.frozen.copy_(exponent + 32)
    program = lower(model, x)
    code = 127 * 127 * 70_000 + (32767 << 15)
    assert code > 2**31
    codes, unit = program.run(x, integers=True)
    assert float(model(x)[0]) == round(code / 2**25) * 2.0 ** float(exponent + 25)
    assert np.array_equal(np.asarray(codes) * 2.0**unit, model(x).detach().numpy())


def test_two_steps_of_a_fit() -> None:
    module, run, _ = fit(Niti(seed=3), max_epochs=1, limit_train_batches=2)
    assert isinstance(run, pl.Trainer)
    x = images()[0][:7]
    module.eval()
    assert differing(module, lower(module, x), x) == []
    assert len(list(loader())) > 2  # the fit ended within its epoch


def test_a_layer_behind_a_skipped_one_trains_and_lowers() -> None:
    net = Net(
        lambda m, x: m.c(F.relu(m.b(F.relu(m.a(x))))), a=conv(), b=nn.ConvTranspose2d(3, 3, 2), c=conv(3, 2, 1)
    )  # fmt: skip
    x = torch.randn(4, *IMAGE)
    report = convert(net, Niti(), x)
    assert report.notes == ["floats are quantized anew where c reads them"]
    loss = net.train()(x).square().mean()
    loss.backward()
    program = lower(net.eval(), x)
    assert functions(program) == ["conv_transpose", "relu"]
    with torch.no_grad():
        torch.testing.assert_close(torch.as_tensor(program.run(x)), net(x), atol=2e-2, rtol=0)


def test_a_norm_behind_a_skipped_layer_is_a_float_island() -> None:
    net = nn.Sequential(conv(), nn.ConvTranspose2d(3, 3, 2), nn.BatchNorm2d(3), conv(3, 2, 1))
    x = torch.randn(4, *IMAGE)
    convert(net, Niti(norms="island"), x)
    program = lower(net.eval(), x)
    assert functions(program) == ["conv_transpose", "affine"]
    with torch.no_grad():
        torch.testing.assert_close(torch.as_tensor(program.run(x)), net(x), atol=2e-2, rtol=0)


@pytest.mark.parametrize(("scheme", "words"), [
    (Niti(act_rounding="stochastic"), "a: it rounds with act_rounding='stochastic'"),
    (Niti(act_rounding="pseudo_stochastic"), "act_rounding='half_away'"),
], ids=["stochastic", "pseudo-stochastic"])  # fmt: skip
def test_other_roundings_are_refused(scheme: Niti, words: str) -> None:
    net, x = converted("residual", scheme)
    with pytest.raises(UnsupportedModelError, match=words):
        lower(net, x)


def test_wrapping_sums_are_refused_where_they_could_wrap() -> None:
    net, x = converted("words", Niti(preset="reference"))
    assert differing(net, lower(net, x), x) == []  # every layer shifts
    net[0].lowbit_accumulator.frozen.fill_(-149.0)  # type: ignore[index, operator, union-attr]
    with pytest.raises(UnsupportedModelError, match=r"0: preset='reference' wraps its sums, .* preset='recommended'"):
        lower(net, x)


def test_statistics_of_the_batch_are_refused() -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4, track_running_stats=False), nn.Linear(4, 2)).eval()
    x = torch.randn(7, 4)
    convert(net, Niti(), x)
    with pytest.raises(UnsupportedModelError, match=r"1: it normalizes by the statistics of each batch"):
        lower(net, x)


@settings(max_examples=25)
@given(st.integers(0, 2**32 - 1), st.integers(1, 4), st.sampled_from(["fold", "island"]))
def test_random_graphs(seed: int, blocks: int, norms: Any) -> None:
    net, shape = random_net(random.Random(seed), "niti", blocks=blocks)
    x = random_batch(shape, 7, seed)
    convert(net, Niti(norms=norms), x)
    program = lower(net.eval(), x)
    assert functions(program) or differing(net, program, x) == []  # float layers add in any order


@settings(max_examples=60)
@given(st.integers(0, 2**32 - 1), st.floats(-12, 12), st.sampled_from([0.0, 1.0]))
def test_integers_of_a_line(seed: int, scale: float, dyadic: float) -> None:
    """Also of slopes that leave a code or none between the ends, of ties, and of channels that are constant."""
    generator = torch.Generator().manual_seed(seed)
    slope, offset = torch.randn(2, 9, generator=generator).double() * torch.tensor([[2.0**scale], [16.0]])
    slope = torch.where(torch.arange(9) % 3 == 0, (slope * 4).round() / 4, slope) if dyadic else slope
    slope[1], offset[1:4] = 0.1, torch.tensor([0.0, 0.5, 400.0])
    q = torch.arange(-128, 128)
    codes = round_to(q[:, None] * slope + offset, Rounding.HALF_AWAY).clamp(-127, 127).long()
    found = integer_affine(q, codes, slope, offset)
    assert found is not None
    m, b, s = found
    acc = q[:, None] * m + b
    assert int(acc.abs().max()) < 2**61
    rounded = acc.sign() * ((acc.abs() + ((1 << s) >> 1)) >> s)
    assert torch.equal(rounded.clamp(-127, 127), codes)


def test_integers_of_ties_and_of_steep_lines() -> None:
    """0.1 * 5 is a tie in float64, beside which 0.1 lies: every channel has to be nudged to its side of its own."""
    slope = torch.cat([0.1 * torch.arange(1, 40, 2).double(), torch.tensor([1000.0, -1000.0, 1000.0]).double()])
    offset = torch.cat([torch.zeros(20), torch.tensor([5.0, -5.0, -995.0])]).double()
    q = torch.arange(8)
    codes = round_to(q[:, None] * slope + offset, Rounding.HALF_AWAY).clamp(-127, 127).long()
    found = integer_affine(q, codes, slope, offset)
    assert found is not None
    m, b, s = found
    assert torch.equal(round_to((q[:, None] * m + b) / 2.0**s, Rounding.HALF_AWAY).clamp(-127, 127).long(), codes)

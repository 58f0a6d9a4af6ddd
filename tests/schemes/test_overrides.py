"""``overrides`` by path, over the schemes: what a layer reads, what an activation gives, and nothing in vain."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_lowbit import lower
from lightning_lowbit.demos import DigitsCnn
from lightning_lowbit.errors import ConfigError
from lightning_lowbit.export.verify import verify
from lightning_lowbit.modules.convert import quantizers
from lightning_lowbit.schemes import convert, resolve

Given = dict[str, dict[str, Any]]


def act(**widths: int) -> Given:
    return {path: {"act_bits": bits} for path, bits in widths.items()}


def converted(net: nn.Module, scheme: str, overrides: Given, **options: Any) -> nn.Module:
    convert(net, resolve(scheme, overrides=overrides, **options))
    return net


def widths(net: nn.Module) -> dict[str, int]:
    roles = ("input", "output", "operand", "weight", "result")
    return {q.site.key: q.grid().bits for _, q in quantizers(net) if q.site.role in roles}


def changed(scheme: str, overrides: Given, **options: Any) -> dict[str, int]:
    """Bits that are others than without overrides: by path those of results, with ``.in`` and ``.w`` the others."""
    before = widths(converted(DigitsCnn(), scheme, {}, **options))
    after = widths(converted(DigitsCnn(), scheme, overrides, **options))
    assert before.keys() <= after.keys()
    short = {".lowbit_output": "", ".lowbit_input": ".in", ".lowbit_weight": ".w"}
    found = {}
    for key, bits in after.items():
        if bits != before.get(key):
            slot = next(slot for slot in short if key.endswith(slot))
            found[key.removesuffix(slot) + short[slot]] = bits
    return found


# relu1 forks to conv2 and the sum of bn3 and relu1, which relu3 rectifies; conv4 and its rectifier feed pool and fc.
@pytest.mark.parametrize(
    ("scheme", "overrides", "expected"),
    [
        ("tqt", act(conv1=4), {"conv1.in": 4}),
        ("tqt", act(conv2=4), {"conv2.in": 4}),
        ("tqt", act(conv3=4), {"relu2": 4}),
        ("tqt", act(conv3=10), {"relu2": 10}),
        ("tqt", act(conv4=4, relu3=4), {"relu3": 4}),
        ("tqt", act(conv4=4, relu3=6), {"relu3": 6, "conv4.in": 4}),
        ("tqt", act(fc=5), {"pool": 5}),
        ("tqt", act(relu1=6, bn3=5, relu4=4, pool=3), {"relu1": 6, "bn3": 5, "relu4": 4, "pool": 3}),
        ("tqt", {"relu1": {"operand_bits": 6}, "*1": {"act_bits": 4}}, {"relu1": 6, "conv1.in": 4}),
        ("tqt", {"conv1": {"weight_bits": 4}, "*": {"weight_bits": 6}}, {"conv1.w": 4, "fc.w": 6} | {
            f"conv{n}.w": 6 for n in (2, 3, 4)
        }),
        ("jacinto", act(conv1=4), {"conv1.in": 4}),
        ("jacinto", act(conv3=4), {"relu2": 4}),
        ("jacinto", act(conv4=10), {"relu3": 10}),
        ("jacinto", act(fc=5), {"pool": 5, "fc": 5}),
        ("jacinto", act(relu1=6, bn3=5), {"relu1": 6, "bn3": 5}),
        ("jacinto", act(conv2=8), {}),
        ("wageubn", act(conv3=4), {"relu2": 4}),
        ("wageubn", act(relu1=6, conv4=5), {"relu1": 6, "relu3": 5}),
        ("wageubn", {"conv3": {"act_format": (6, 1)}}, {"relu2": 6}),
        ("f8net", act(conv2=4, conv3=6), {"conv2.in": 4, "conv3.in": 6}),
    ],
)  # fmt: skip
def test_what_a_path_names(scheme: str, overrides: Given, expected: dict[str, int]) -> None:
    assert changed(scheme, overrides) == expected


class Fork(nn.Module):
    """Two layers read ``r``; ``e`` reads the rectified results of both, joined."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.e = nn.Linear(4, 6), nn.Linear(6, 5), nn.Linear(6, 5), nn.Linear(10, 3)
        self.r, self.s, self.t = nn.ReLU(), nn.ReLU(), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        x = self.r(self.a(x))
        y: Tensor = self.e(torch.cat([self.s(self.b(x)), self.t(self.c(x))], 1))
        return y


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (act(conv3=8), {"relu2": 8}),
        (act(relu2=8), {"relu2": 8}),  # conv3 reads it as it comes
        (act(fc=8), {}),
        (act(fc=9), {"pool": 9}),
        (act(conv1=6), {"conv1.in": 6}),
        ({"conv3": {"acc_bits": 16}}, {}),
    ],
)
def test_tqt_on_four_bits(overrides: Given, expected: dict[str, int]) -> None:
    assert changed("tqt", overrides, bits=4) == expected


def test_a_tensor_takes_the_widest_of_its_readers_in_tqt() -> None:
    wide = widths(converted(Fork(), "tqt", act(b=10)))
    assert wide["r.lowbit_output"] == 10
    assert wide["c.lowbit_input"] == 8
    assert "b.lowbit_input" not in wide
    narrow = widths(converted(Fork(), "tqt", act(b=4)))
    assert narrow["r.lowbit_output"] == 8
    assert narrow["b.lowbit_input"] == 4
    both = widths(converted(Fork(), "tqt", act(b=4, c=6)))
    assert both["r.lowbit_output"] == 6
    assert both["b.lowbit_input"] == 4
    assert "c.lowbit_input" not in both


@pytest.mark.parametrize("scheme", ["jacinto", "wageubn"])
def test_readers_through_a_concat_name_what_it_joins(scheme: str) -> None:
    options = {"first_last": "int8"} if scheme == "wageubn" else {}
    found = widths(converted(Fork(), scheme, act(e=5), **options))
    assert found["s.lowbit_output"] == found["t.lowbit_output"] == 5
    assert widths(converted(Fork(), scheme, act(b=5, c=5), **options))["r.lowbit_output"] == 5


def test_an_accumulator_that_only_overrides_name_is_there() -> None:
    made = {q.site.key: q for _, q in quantizers(converted(DigitsCnn(), "tqt", {"conv3": {"acc_bits": 14}}))}
    assert made["conv3.lowbit_accumulator"].grid().bits == made["conv3.lowbit_bias"].grid().bits == 14
    assert "conv2.lowbit_accumulator" not in made
    assert resolve("tqt", overrides=act(conv3=12)).activation_bits() == 12


@pytest.mark.parametrize(
    ("scheme", "overrides", "options"),
    [
        ("tqt", {**act(conv2=4, conv3=6, bn3=6), "fc": {"act_bits": 5, "weight_bits": 3}}, {}),
        ("tqt", {**act(conv3=8, relu1=6), "conv4": {"acc_bits": 12}}, {"bits": 4}),
        ("jacinto", {**act(conv3=6, relu1=4, fc=5), "conv4": {"weight_bits": 4, "act_bits": 7}}, {}),
        ("wageubn", {**act(conv3=6, relu1=4), "conv4": {"weight_bits": 4, "act_format": (7, 1)}},
         {"first_last": "int8", "io": "strict"}),
        ("f8net", {**act(conv1=6, fc=4), "conv2": {"act_bits": 5, "weight_bits": 4}}, {"rescale": "none"}),
    ],
)  # fmt: skip
def test_a_program_of_mixed_widths_is_exact(scheme: str, overrides: Given, options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    net, x = DigitsCnn(), torch.rand(8, 1, 8, 8)
    net(x)
    convert(net.eval(), resolve(scheme, overrides=overrides, **options), x)
    assert verify(net, lower(net, x), [x]).ok


@pytest.mark.parametrize(
    ("scheme", "overrides", "message"),
    [
        ("tqt", act(conv2=10), r"10 bits for what conv2 reads, which is relu1 on 8 bits.*'relu1': {'act_bits': 10}"),
        ("tqt", act(relu2=4, conv3=6), r"6 bits for what conv3 reads, which is relu2 on 4 bits"),
        ("tqt", {"relu2": {"weight_bits": 4}}, r"'relu2'.*path of what has weight_bits. Did you mean 'conv3'"),
        ("tqt", {"fc": {"operand_bits": 4}}, r"'fc'.*path of what has operand_bits. Did you mean 'pool'"),
        ("tqt", {"conv2": {"input_bits": 4}}, r"'conv2'.*path of what has input_bits. Did you mean 'conv1'"),
        ("tqt", {"relu1": {"operand_bits": 6, "act_bits": 4}}, r"'act_bits': ...}}\): it acts on nothing there"),
        ("tqt", {"conv*": {"weight_bits": 4}, "conv3": {"weight_bits": 6}}, r"'conv3'.*patterns in front of it"),
        ("jacinto", act(conv2=4), r"act_bits of conv2 \(4\), lowbit_add \(8\), which all read relu1.*{'relu1': "),
        ("jacinto", act(relu2=4, conv3=6), r"'conv3'.*conv3 reads relu2, which 'relu2' gives act_bits=4"),
        ("jacinto", {"conv3": {"range": 2.0}}, r"path of what has range. Did you mean 'relu2'"),
        ("jacinto", {"relu2": {"weight_bits": 4}}, r"path of what has weight_bits. Did you mean 'conv3'"),
        ("wageubn", act(conv2=4), r"act_bits of conv2 \(4\), lowbit_add \(8\), which all read relu1"),
        ("wageubn", act(bn3=4), r"'bn3'.*path of what has act_bits"),
        ("wageubn", {"relu3": {"act_format": (10, 3), "act_bits": 6}}, r"'act_bits': ...}}\): it acts on nothing"),
        ("f8net", act(relu2=4), r"'relu2'.*path of what has act_bits. Did you mean 'conv3'"),
        ("f8net", {"relu2": {"weight_bits": 4}}, r"path of what has weight_bits. Did you mean 'conv3'"),
    ],
)
def test_what_would_do_nothing_is_refused(scheme: str, overrides: Given, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        converted(DigitsCnn(), scheme, overrides)


@pytest.mark.parametrize("scheme", ["tqt", "jacinto", "wageubn"])
def test_joined_tensors_of_two_widths_are_refused(scheme: str) -> None:
    with pytest.raises(ConfigError, match=r"bits of s \(4\), t \(8\), expected one width"):
        converted(Fork(), scheme, act(s=4), **({"first_last": "int8"} if scheme == "wageubn" else {}))


def test_readers_that_disagree_are_named() -> None:
    with pytest.raises(ConfigError, match=r"act_bits of b \(4\), c \(8\), which all read r"):
        converted(Fork(), "jacinto", act(b=4))
    assert widths(converted(Fork(), "jacinto", act(b=8)))["r.lowbit_output"] == 8  # as it is anyway

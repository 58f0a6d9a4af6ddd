"""Widths under a budget: what is measured is what was planned, the budget holds, files come back as they were."""

from __future__ import annotations

import copy
import dataclasses
import functools
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lightning_lowbit.errors import ConfigError
from lightning_lowbit.modules.convert import quantizers
from lightning_lowbit.reports.allocation import Item, allocate
from lightning_lowbit.reports.bit_plan import BitPlan, read_plan
from lightning_lowbit.reports.bit_search import plan_bits
from lightning_lowbit.reports.cost import count_products, layers_of
from lightning_lowbit.reports.sensitivity import sensitivity
from lightning_lowbit.reports.summary import summarize
from lightning_lowbit.schemes import convert
from lightning_lowbit.schemes.tqt import Tqt

SCHEMES = ["tqt", "jacinto", "wageubn", "f8net"]
WIDTHS = (2, 4, 8)


class Net(nn.Module):
    """A residual block, whose input two layers read, and one layer far more sensitive than others."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, 8, 3, padding=1)
        self.wide = nn.Conv2d(8, 32, 3, padding=1)
        self.back = nn.Conv2d(32, 8, 3, padding=1)
        self.fine = nn.Conv2d(8, 8, 1)
        self.fc = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.stem(x).relu()
        y = (self.back(self.wide(y).relu()) * 0.2 + y).relu()
        out: Tensor = self.fc(self.fine(y).relu().mean((2, 3)))
        return out


def float_net() -> nn.Module:
    torch.manual_seed(0)
    return Net().eval()


def labeled_batches() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [(torch.rand(8, 2, 6, 6, generator=generator), torch.arange(8) % 4) for _ in range(2)]


@functools.cache
def planned(scheme: str, option: str = "bit_ops", budget: float = 0.3) -> BitPlan:
    return plan_bits(float_net(), labeled_batches(), scheme, **{option: budget})  # type: ignore[arg-type]


def as_planned(plan: BitPlan) -> nn.Module:
    net = float_net()
    convert(net, **plan.arguments(), example_input=torch.cat([batch for batch, _ in labeled_batches()]))
    return net


@pytest.mark.parametrize("option", ["size", "bit_ops"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_plan_keeps_its_budget_and_beats_every_width_throughout_that_does(scheme: str, option: str) -> None:
    budget = {"size": 0.2, "bit_ops": 0.3}[option] if scheme != "wageubn" else 0.4
    plan = planned(scheme, option, budget)
    *uniform, found = plan.wholes
    net = as_planned(plan)
    products = count_products(net, labeled_batches()[0][0])
    assert [whole.name for whole in plan.wholes] == ["2 bits", "4 bits", "8 bits", "plan"]
    assert found.size == summarize(net).size
    bits = {path: (layer.lowbit_weight, layer.input_grid) for path, layer in layers_of(net).items()}
    each = (
        products[p] * w.grid().bits * x.grid().bits for p, (w, x) in bits.items() if w is not None and x is not None
    )
    assert found.bit_ops == sum(each)
    share = (
        found.size / summarize(net).float_size if option == "size" else found.bit_ops / (64 * sum(products.values()))
    )
    assert share <= budget
    cheaper = [whole for whole in uniform if getattr(whole, option) <= getattr(found, option)]
    assert cheaper
    assert all((found.effect.sqnr or 0) >= (whole.effect.sqnr or 0) for whole in cheaper)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_tensor_has_the_bits_of_its_row(scheme: str) -> None:
    plan = planned(scheme)
    found = {q.site.key: q for _, q in quantizers(as_planned(plan)) if q.has_grid}
    assert {row.item.option for row in plan.rows} == {"weight_bits", "act_bits"}
    assert len({row.bits for row in plan.rows}) > 1
    for row in plan.rows:
        for key in row.item.keys:
            assert key not in found or found[key].grid().bits == row.bits, key  # absent: it passes as it comes


def test_noise_of_a_tensor_is_its_own_sensitivity() -> None:
    plan = planned("tqt", "size", 0.2)
    net = float_net()
    convert(net, Tqt(weight_bits=4), torch.cat([batch for batch, _ in labeled_batches()]))
    alone = float_net()
    convert(alone, Tqt(weight_bits=4, act_bits=16, input_bits=16, operand_bits=16), labeled_batches()[0][0])
    (row,) = [row for row in plan.rows if row.item.paths == ("fine",)]
    with_inputs = sensitivity(alone, labeled_batches())["fine"].effect.sqnr  # 16 bits in front change nothing visible
    assert row.item.decibels(4) == f"{with_inputs:.1f} dB"
    assert sensitivity(net, labeled_batches())["fine"].effect.sqnr != with_inputs


def test_planning_changes_nothing() -> None:
    net = float_net().train()
    before, state = copy.deepcopy(net.state_dict()), torch.get_rng_state()
    plan_bits(net, labeled_batches(), size=0.3)
    assert net.training
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_file_comes_back_as_the_plan(scheme: str, tmp_path: Path) -> None:
    plan = planned(scheme)
    plan.save(tmp_path / "plan.yaml")
    assert read_plan(tmp_path / "plan.yaml") == plan.arguments()
    lines = (tmp_path / "plan.yaml").read_text(encoding="utf-8").splitlines()
    assert lines[0] == f"# Bits of each layer for at most {plan.budget}. Edit it, and pass it on:"
    row = next(row for row in plan.rows if row.item.option == "weight_bits")
    assert f"    weight_bits: {row.bits}  # " + ", ".join(f"{b}: {row.item.decibels(b)}" for b in WIDTHS) in lines


def test_options_skips_and_own_overrides_are_kept(tmp_path: Path) -> None:
    scheme = Tqt(act_round="half_up", first_last_weight_bits=4, overrides={"wide": {"act_bits": 6, "weight_bits": 6}})
    plan = plan_bits(float_net(), labeled_batches(), scheme, size=0.25, skip="fine", include=["*"])
    found = plan.scheme
    assert isinstance(found, Tqt)
    assert (found.act_round, found.first_last_weight_bits, found.act_bits) == ("half_up", 4, 8)
    assert found.overrides["wide"] == {"act_bits": 6, "weight_bits": 6}  # on 6 bits at any width: not for us to choose
    assert not [row for row in plan.rows if "wide" in row.item.paths]
    plan.save(tmp_path / "plan.yaml")
    arguments = read_plan(tmp_path / "plan.yaml")
    assert arguments == {"scheme": found, "skip": ["fine"], "include": ["*"]}


def test_paths_with_wildcards_name_themselves(tmp_path: Path) -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parts = nn.ModuleDict({"a[1]": nn.Linear(6, 6), "a1": nn.Linear(6, 6), "b": nn.Linear(6, 2)})

        def forward(self, x: Tensor) -> Tensor:
            for part in self.parts.values():
                x = part(x).relu()
            return x

    torch.manual_seed(0)
    plan = plan_bits(Odd().eval(), [torch.randn(4, 6)], Tqt(first_last_weight_bits=2), size=0.2)
    plan.save(tmp_path / "plan.yaml")
    assert read_plan(tmp_path / "plan.yaml") == plan.arguments()
    assert "  parts.a[[]1]:" in (tmp_path / "plan.yaml").read_text().splitlines()


def test_prints(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    plan = planned("tqt")
    plan.show()
    ruled = str.maketrans("", "", "─-")
    assert capsys.readouterr().out.translate(ruled).split() == str(plan).translate(ruled).split()
    assert "weights on bits that the scheme's other options set: stem (8), fc (8)" in str(plan)
    assert max(map(len, str(plan).splitlines())) <= 100


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"scheme": "niti", "size": 0.5}, "scheme 'niti' has one width for all layers.*f8net, jacinto, tqt, wageubn"),
    ({}, "got size=None and bit_ops=None, expected one of the two"),
    ({"size": 0.5, "bit_ops": 0.5}, "got size=0.5 and bit_ops=0.5, expected one of the two"),
    ({"size": 10}, r"got a budget of 10 bytes of parameters \(0.001 of float32\), 2 bits throughout need [\d,]+"),
    ({"bit_ops": -1}, "got a budget of -1"),
    ({"size": 0.5, "widths": [4, 4]}, r"got widths=\[4, 4\], expected two or more"),
    ({"size": 0.5, "widths": [1, 4]}, "weight_bits=1"),
    ({"size": 0.5, "skip": nn.Linear}, "a file cannot name a class"),
]


@pytest.mark.parametrize(("arguments", "words"), WRONG, ids=[words[:24] for _, words in WRONG])
def test_wrong_arguments_are_named(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        plan_bits(float_net(), labeled_batches(), **arguments)


def test_a_converted_network_is_refused() -> None:
    net = float_net()
    convert(net, "tqt")
    with pytest.raises(ConfigError, match="Net is converted already"):
        plan_bits(net, labeled_batches(), size=0.5)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("[1, 2]", "expected a mapping with 'scheme: tqt'"),
        ("scheme: tqt\nscheme.overides: {}", "Tqt has no option 'overides'.*overrides"),
        ("scheme: tqtt", "no scheme is called 'tqtt'"),
        ("a: b: c", "Give a file that BitPlan.save wrote"),
    ],
)
def test_a_file_that_is_no_plan_is_named(content: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "plan.yaml").write_text(content)
    with pytest.raises(ConfigError, match=words):
        read_plan(tmp_path / "plan.yaml")
    with pytest.raises(ConfigError, match=r"none\.yaml"):
        read_plan(tmp_path / "none.yaml")


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_allocation_spends_no_more_and_leaves_nothing_that_fits(data: st.DataObject) -> None:
    noises = st.fixed_dictionaries({width: st.floats(0, 1) for width in WIDTHS})
    items = [Item((str(n),), (str(n),), "weight_bits", data.draw(noises)) for n in range(data.draw(st.integers(1, 4)))]
    numbers = [data.draw(st.integers(1, 100)) for _ in items]

    def cost(bits: Any) -> float:
        return float(sum(number * width for number, width in zip(numbers, bits, strict=True)))

    most = data.draw(st.integers(1, 9 * sum(numbers)))
    bits = allocate(items, cost, most, 2)
    if cost([2] * len(items)) > most:
        assert bits is None
        return
    assert bits is not None
    assert cost(bits) <= most
    for number, item in enumerate(items):
        for wider in (width for width in WIDTHS if width > bits[number]):
            changed = [*bits[:number], wider, *bits[number + 1 :]]
            assert cost(changed) > most or item.noise[wider] >= item.noise[bits[number]]


class Folded(nn.Module):
    """Tokens become rows of one layer: four a sample."""

    def __init__(self) -> None:
        super().__init__()
        self.token, self.head = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.token(x.reshape(-1, 6)).relu().reshape(len(x), 4, 8).mean(1)
        out: Tensor = self.head(y)
        return out


def test_rows_of_a_sample_are_counted() -> None:
    net = Folded().eval()
    convert(net, "tqt", torch.randn(5, 24))
    assert count_products(net, torch.randn(5, 24)) == {"token": 4 * 48, "head": 24}


WORDS = ["on", "no", "null", "1e3", "None", "a b", "ü", "😀", "{x}", "#", "-", "12"]


def test_any_name_and_number_comes_back(tmp_path: Path) -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parts = nn.ModuleDict({name: nn.Linear(3, 3) for name in WORDS})
            for name in ("on", "null"):
                self.add_module(name, nn.Linear(3, 3))

        def forward(self, x: Tensor) -> Tensor:
            for part in (*self.parts.values(), self.get_submodule("on"), self.get_submodule("null")):
                x = torch.relu(part(x))
            return x

    torch.manual_seed(0)
    scheme = Tqt(threshold_lr=1e-5, first_last_weight_bits=2, freeze_thresholds="500 steps")
    plan = plan_bits(Named().eval(), [torch.rand(4, 3)], scheme, size=0.5, skip=["parts.#"], widths=[4, 8])
    assert {path for row in plan.rows for path in row.item.paths} >= {"on", "null", "parts.😀", "parts.{x}"}
    plan.save(tmp_path / "plan.yaml")
    assert read_plan(tmp_path / "plan.yaml") == plan.arguments()


@dataclasses.dataclass(frozen=True)
class Mine(Tqt):
    """Somebody's own, which no entry point names."""

    name: ClassVar[str] = "mine"


def test_a_scheme_of_ones_own_is_named_by_its_class(tmp_path: Path) -> None:
    plan = plan_bits(float_net(), labeled_batches()[:1], Mine(), size=0.3, widths=[4, 8])
    plan.save(tmp_path / "plan.yaml")
    assert f"scheme: {Mine.__module__}.Mine" in (tmp_path / "plan.yaml").read_text().splitlines()
    assert type(read_plan(tmp_path / "plan.yaml")["scheme"]) is Mine


def test_what_is_not_chosen_keeps_the_schemes_own_width() -> None:
    scheme = Tqt(weight_bits=6, act_bits=5, first_last_weight_bits=6)
    plan = plan_bits(float_net(), labeled_batches()[:1], scheme, size=0.2, widths=[2, 4, 8])
    net = as_planned(plan)
    bits = {path: layer.lowbit_weight.grid().bits for path, layer in layers_of(net).items() if layer.lowbit_weight}
    assert (bits["stem"], bits["fc"]) == (6, 6)
    assert plan.scheme.act_bits == 5  # type: ignore[attr-defined]  # a Tqt

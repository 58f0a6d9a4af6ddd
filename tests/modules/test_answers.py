"""A scheme of somebody else's that answers wrongly is refused where it is asked, by class and site."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from lightning_lowbit import Scheme, Tqt, convert
from lightning_lowbit.cli.schemes import schemes
from lightning_lowbit.errors import ConfigError
from lightning_lowbit.modules.base import Site
from lightning_lowbit.modules.quantizer import Quantizer
from lightning_lowbit.numerics.grid import Grid
from lightning_lowbit.schemes import resolve


class Eighths(Quantizer):
    """int8 codes of eighths; ``factor`` and ``samples`` break it."""

    def __init__(self, site: Site, factor: float = 1.0, samples: int | None = None) -> None:
        super().__init__(site)
        self.factor, self.samples = factor, samples

    def exponent(self) -> Tensor:
        return torch.tensor(-3, dtype=torch.int32)

    def grid(self) -> Grid:
        return Grid(8, -3)

    def quantize(self, x: Tensor, rectify: bool = False) -> Tensor:
        return (x * 8).round().clamp(-128, 127)[: self.samples] / 8 * self.factor


class Formless(Quantizer):
    def quantize(self, x: Tensor, rectify: bool = False) -> Tensor:
        return x.round()


def answer(site: Site, what: str) -> Any:
    broken = site.role == ("input" if what.endswith("tensor") else "weight")
    made = {
        "number": 3, "class": Eighths, "formless": Formless(site),  # type: ignore[abstract]  # what is tested
        "off": Eighths(site, 1.1), "off tensor": Eighths(site, 1.1), "shape": Eighths(site, samples=1),
    }  # fmt: skip
    return made.get(what, Eighths(site)) if broken else None


@dataclass(frozen=True)
class Answering(Scheme):
    name: ClassVar[str] = "answering"

    what: str = "right"
    norm: str = "fold"

    def quantizer(self, site: Site) -> Any:
        return answer(site, self.what)

    def batch_norm(self, site: Site, norm: nn.Module) -> str:
        return self.norm


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 2)).eval()


REFUSED = {
    "number": "0.lowbit_weight: Answering.quantizer() gives 3 (int), expected a Quantizer",
    "class": "0.lowbit_weight: Answering.quantizer() gives the class Eighths, expected a Quantizer",
    "formless": "0.lowbit_weight: Answering.quantizer() gives a Formless, which has no exponent() and no grid()",
    "off": "0.lowbit_weight: Eighths.quantize() gives values that are not on int8·2^-3 [-16, 15.9], which its grid() "
    "declares, -0.4125 for one: quantize() and grid() of Answering disagree",
    "off tensor": "0.lowbit_input: Eighths.quantize() gives values that are not on int8·2^-3",
    "shape": "0.lowbit_weight: Eighths.quantize() of Answering gives [1, 1, 3, 3] for a tensor of shape [4, 1, 3, 3]",
}


@pytest.mark.parametrize("what", REFUSED)
def test_a_wrong_quantizer(what: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(REFUSED[what])):
        convert(net(), Answering(what), torch.rand(3, 1, 4, 4))


@pytest.mark.parametrize("what", ["right", "right tensor"])
def test_a_right_one_is_looked_at_once(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    looked: list[int] = []
    monkeypatch.setattr(Grid, "contains", lambda grid, x: looked.append(x.numel()) or True)  # type: ignore[func-returns-value]
    module, x = net(), torch.rand(3, 1, 4, 4)
    convert(module, Answering(what), x)
    module(x)
    assert looked == ([36, 32] if what == "right" else [16, 16])  # two weights; one sample of each tensor
    assert not any(part._forward_hooks for part in module.modules())


def test_a_wrong_word_for_a_batch_norm() -> None:
    with pytest.raises(ConfigError, match=r"^1: Answering.batch_norm\(\) gives 'folded'.* Did you mean 'fold'\?"):
        convert(net(), Answering(norm="folded"))


def test_a_class_that_cannot_be_used(capsys: pytest.CaptureFixture[str]) -> None:
    class Bare(Scheme):
        name: ClassVar[str] = "bare"

    @dataclass(frozen=True)
    class Taken(Scheme):
        name: ClassVar[str] = "tqt"

    class Nameless(Tqt):
        pass

    refused: dict[type[Scheme], str] = {
        Bare: r"Bare is no dataclass.*@dataclass\(frozen=True\) above class Bare",
        Taken: r"Taken has the name 'tqt', taken by lightning_lowbit.schemes.tqt.Tqt",
        Nameless: r"Nameless inherits the name 'tqt', taken by lightning_lowbit.schemes.tqt.Tqt",
    }
    for cls, reason in refused.items():
        with pytest.raises(ConfigError, match=reason):
            resolve(cls())
    with pytest.raises(ConfigError, match=refused[Bare]):
        schemes(["bare"])
    assert capsys.readouterr().out == ""


def test_a_class_stands_for_its_defaults_and_may_be_defined_anew() -> None:
    def define() -> type[Scheme]:  # as a cell of a notebook does that is run twice
        @dataclass(frozen=True)
        class Anew(Scheme):
            name: ClassVar[str] = "anew"
            bits: int = 4

        return Anew

    first, second = define(), define()
    second.__module__ = "imported.once_more"  # as python -m makes of a module that somebody imports
    assert isinstance(resolve(second()), second)
    assert resolve(first, bits=3) == first(bits=3)  # type: ignore[arg-type,call-arg]  # a class; its field

"""Hashes stand for names, types, shapes and bits and for nothing else; two certificates part at one place."""

from __future__ import annotations

import hashlib
import json
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from schemes.toy_integer import ToyInteger
from torch import Tensor, nn

from lightning_lowbit import Tqt, convert
from lightning_lowbit.errors import ConfigError
from lightning_lowbit.modules.base import UpdateRule, switch_of
from lightning_lowbit.reports.certificate import (
    compare,
    digest,
    layer_hashes,
    layer_state,
    network_limits,
    read_certificate,
    record,
)


# -- hashing -------------------------------------------------------------------------------------------------
def test_the_bytes_that_are_hashed_are_these() -> None:
    """Written out, so that no later version hashes something else under the same format."""
    codes = torch.tensor([[1, -2], [3, 300]], dtype=torch.int16)
    expected = (
        b"mapping 2\n"
        b"7 str 'a'\n" + b"tensor int16 [2, 2]\n" + bytes([1, 0, 254, 255, 3, 0, 44, 1])
        + b"7 str 'b'\n" + b"sequence 3\n" + b"5 int 7\n" + b"9 float 0.5\n" + b"13 NoneType None\n"
    )  # fmt: skip
    assert digest({"b": (7, 0.5, None), "a": codes}) == hashlib.sha256(expected).hexdigest()


WEIGHT = torch.arange(-60, 60, dtype=torch.int8).reshape(2, 3, 4, 5)
SAME = {
    "channels last": WEIGHT.contiguous(memory_format=torch.channels_last),
    "transposed twice": WEIGHT.transpose(0, 3).contiguous().transpose(0, 3),
    "a slice of more": torch.cat([WEIGHT, WEIGHT])[:2],
    "offset": torch.cat([WEIGHT, WEIGHT])[2:],
    "parameter": nn.Parameter(WEIGHT, requires_grad=False),
    "every other": WEIGHT.repeat_interleave(2, dim=3)[..., ::2],
}
OTHER = {
    "one code": WEIGHT.clone().index_fill_(0, torch.tensor(0), 1),
    "dtype": WEIGHT.to(torch.int16),
    "same bytes, dtype": WEIGHT.view(torch.uint8),
    "shape": WEIGHT.reshape(3, 2, 4, 5),
}


@pytest.mark.parametrize("same", SAME.values(), ids=SAME)
def test_strides_do_not_count(same: Tensor) -> None:
    assert digest({"weight": same}) == digest({"weight": WEIGHT})


@pytest.mark.parametrize("other", OTHER.values(), ids=OTHER)
def test_bits_dtype_and_shape_count(other: Tensor) -> None:
    assert digest({"weight": other}) != digest({"weight": WEIGHT})


def test_a_big_endian_machine_hashes_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """There the elements' bytes lie the other way round: the same numbers, byte-swapped in memory."""
    values = torch.tensor([1.5, -2.25, 1e-30], dtype=torch.float32)
    swapped = torch.from_numpy(values.numpy().byteswap())
    here = digest(values)
    monkeypatch.setattr("lightning_lowbit.reports.certificate.sys.byteorder", "big")
    assert digest(swapped) == here


def test_every_dtype_and_empty_tensors_are_hashed() -> None:
    dtypes = (torch.bool, torch.uint8, torch.int8, torch.int64, torch.float16, torch.bfloat16, torch.float64)
    tensors = [torch.ones(3, dtype=dtype) for dtype in (*dtypes, torch.complex64)]
    tensors += [torch.zeros(0), torch.zeros(0, 2), torch.zeros(())]
    assert len({digest(tensor) for tensor in tensors}) == len(tensors)


def test_the_order_of_a_mapping_does_not_count_and_its_names_do() -> None:
    a, b = torch.ones(2), torch.zeros(2)
    assert digest({"a": a, "b": b}) == digest(OrderedDict([("b", b), ("a", a)]))
    assert digest({"a": a, "b": b}) != digest({"a": b, "b": a})
    assert digest({"a": {}, "b": 1}) != digest({"a": {"b": 1}})
    assert digest({"1": a}) != digest({1: a})
    assert digest([a, b]) != digest([b, a])


def test_what_has_no_canonical_bytes_is_refused() -> None:
    with pytest.raises(TypeError, match="got a set"):
        digest({"a": {1, 2}})


# -- of a network ---------------------------------------------------------------------------------------------
class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(6, 8, bias=False), nn.Linear(8, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.second(torch.relu(self.first(x)))
        return y


class Masters(UpdateRule):
    def __init__(self) -> None:
        self.masters = {"first.weight": torch.zeros(8, 6, dtype=torch.int16)}

    def step(self, owned: set[str], context: Any) -> None: ...

    def state_dict(self) -> dict[str, Any]:
        return {"masters": self.masters}


@pytest.fixture
def net() -> Any:
    module = Net()
    convert(module, ToyInteger())
    return module


def test_one_entry_for_each_layer_with_state_and_one_for_the_rule(net: Any) -> None:
    rule = Masters()
    before = layer_hashes(net, rule)
    assert list(before) == ["first", "second", "update_rule"]  # a rectifier holds nothing
    with torch.no_grad():
        net.second.weight[0, 0] += 2.0 ** float(net.second.lowbit_exponent)
    after = layer_hashes(net, rule)
    assert [name for name in before if before[name] != after[name]] == ["second"]
    rule.masters["first.weight"][7, 5] += 1
    assert [name for name in before if layer_hashes(net, rule)[name] != after[name]] == ["update_rule"]
    assert list(layer_hashes(net, None)) == ["first", "second"]


def test_a_layer_that_names_its_integers_is_known_by_them_alone(net: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert sorted(layer_state(net.first)) == ["lowbit_exponent", "weight"]
    codes = torch.ones(8, 6, dtype=torch.int8)
    monkeypatch.setattr(type(net.first), "integer_state", lambda self: {"weight": codes})
    before = layer_hashes(net, None)["first"]
    assert before == digest({"weight": codes})
    with torch.no_grad():
        net.first.weight.zero_()
    assert layer_hashes(net, None)["first"] == before


def test_a_low_bit_module_inside_another_is_an_entry_of_its_own(net: Any) -> None:
    net.first.add_module("inner", net.second)
    assert sorted(layer_state(net.first)) == ["lowbit_exponent", "weight"]


def test_what_limits_a_network_is_named() -> None:
    class Mixed(Net):
        def __init__(self) -> None:
            super().__init__()
            self.head, self.norm = nn.Linear(3, 2), nn.LayerNorm(3)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.head(self.norm(super().forward(x)))
            return y

    mixed = Mixed()
    convert(mixed, Tqt(), skip="head")
    limits = network_limits(mixed)
    assert limits[0].startswith("scheme tqt trains with float gradients")
    assert "float layer, not hashed: head (by skip=)" in limits
    assert "float by nature, not hashed: norm (LayerNorm)" in limits


def test_an_integer_network_has_no_limit_until_a_float_error_arrives(net: Any) -> None:
    assert network_limits(net) == []
    switch_of(net).run.float_errors.add("second")
    (limit,) = network_limits(net)
    assert limit.startswith("float errors enter at second")


# -- comparing ------------------------------------------------------------------------------------------------
def certificate(*records: dict[str, Any], **header: Any) -> dict[str, Any]:
    return {"format": 1, "version": "0", "scheme": "toy", "seed": 0, "limits": [], **header, "records": list(records)}


def at(step: int, moment: str = "step", **layers: str) -> dict[str, Any]:
    return record(step // 8, step, moment, {"first": "a", "second": "b", **layers})


def test_equal_certificates_agree() -> None:
    found = compare(certificate(at(4), at(8)), certificate(at(4), at(8)))
    assert (found.compared, found.parting, found.alone) == (2, None, (0, 0))
    assert str(found) == "agree: 2 records compared, up to step 8 (epoch 1)"


def test_the_first_step_and_layer_are_named() -> None:
    a = certificate(at(4), at(8), at(12), seed=0)
    b = certificate(at(4), at(8, second="x"), at(12, first="y", second="x"), seed=1, limits=["a loader of its own"])
    found = compare(a, b)
    assert found.parting is not None
    assert (found.parting["step"], found.layers, found.compared) == (8, ["second"], 2)
    assert str(found).splitlines() == [
        "part at step 8 (epoch 1): second; equal up to step 4 (epoch 0)",
        "seed: 0 in A, 1 in B",
        "limit of B: a loader of its own",
    ]


def test_layers_are_named_in_the_order_of_the_network() -> None:
    found = compare(certificate(at(4, extra="q")), certificate(at(4, second="x", first="y")))
    assert found.layers == ["first", "second", "extra"]
    assert "first (and 2 others: second, extra); no common record before" in str(found)


def test_only_common_moments_are_compared_in_their_order() -> None:
    a = certificate(at(4), at(8), at(8, "epoch_end", first="settled"), at(16, "epoch_end"))
    b = certificate(at(8, "epoch_end", first="other"), at(16, "epoch_end", first="other"), at(8))
    found = compare(a, b)
    assert found.parting is not None
    assert (found.parting["at"], found.agreed, found.alone) == ("epoch_end", at(8), (1, 0))
    assert "part at step 8 (the end of epoch 1)" in str(found)
    assert "1 record only in A" in str(found)


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (certificate(at(5), at(10)), "A has 1 record of steps 4 to 4, B has 2 records of steps 5 to 10"),
        (certificate(at(4, "epoch_end")), "no record of both is of the same moment"),
        (certificate(), "B has no record"),
    ],
)
def test_no_common_step_is_an_error(other: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        compare(certificate(at(4)), other)


# -- files ----------------------------------------------------------------------------------------------------
def test_json_and_checkpoint_hold_the_same(tmp_path: Path) -> None:
    whole = certificate(at(4), at(8))
    (tmp_path / "a.json").write_text(json.dumps(whole), encoding="utf-8")
    torch.save({"state_dict": {}, "callbacks": {"TrainingCertificate": whole}}, tmp_path / "b.ckpt")
    assert read_certificate(tmp_path / "a.json") == read_certificate(tmp_path / "b.ckpt") == whole


def damaged(change: str, value: Any) -> bytes:
    entry = {**at(4), change: value}
    return json.dumps(certificate(entry)).encode()


TEXT = json.dumps(certificate(at(4))).encode()
BAD = {
    "empty": (b"", "neither JSON nor a checkpoint"),
    "cut off": (TEXT[:-9], "cut off"),
    "bytes": (b"\xff\xfe\x00", "neither JSON nor a checkpoint"),
    "deep": (b"[" * 100_000, "neither JSON nor a checkpoint"),
    "cut checkpoint": (b"PK\x03\x04broken", "cannot be read as tensors and plain types"),
    "a list": (b"[1]", "another kind of file"),
    "other JSON": (b'{"records": []}', "another kind of file"),
    "later format": (TEXT.replace(b'"format": 1', b'"format": 9'), "format 9"),
    "altered hash": (TEXT.replace(b'"first": "a"', b'"first": "c"'), "record 0 is damaged"),
    "a record of text": (json.dumps({**certificate(), "records": ["x"]}).encode(), "record 0 is damaged"),
    "step of text": (damaged("step", "4"), "record 0 is damaged"),
    "unknown moment": (damaged("at", "noon"), "record 0 is damaged"),
    "hash of a number": (damaged("layers", {"first": 3}), "record 0 is damaged"),
    "no sum": (damaged("state", None), "record 0 is damaged"),
}


@pytest.mark.parametrize(("content", "words"), BAD.values(), ids=BAD)
def test_a_file_that_is_no_certificate_is_refused_by_name(tmp_path: Path, content: bytes, words: str) -> None:
    path = tmp_path / "bad.json"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=words) as caught:
        read_certificate(path)
    assert "bad.json" in str(caught.value)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"callbacks": {}}, "holds none. Train with"),
        ({"state_dict": {}}, "holds none. Train with"),
        (torch.zeros(2), "holds none. Train with"),
        ({"callbacks": {"Mine": Path("x")}}, "cannot be read as tensors and plain types"),
    ],
)
def test_a_checkpoint_without_a_certificate_is_refused(tmp_path: Path, content: Any, words: str) -> None:
    torch.save(content, tmp_path / "a.ckpt")
    with pytest.raises(ConfigError, match=words):
        read_certificate(tmp_path / "a.ckpt")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.json.*no such file"):
        read_certificate(tmp_path / "nowhere.json")

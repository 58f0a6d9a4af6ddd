"""Whole programs: batches, outputs, pixels, and the inputs that are refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from export.runtime_codes import codes, equal

from lightning_lowbit.export import runtime
from lightning_lowbit.export.runtime import (
    ROUNDINGS,
    Array,
    Op,
    Program,
    ProgramError,
    Value,
    pixel_table,
    quantize,
    quantize_pixels,
    run,
    trace,
)


def test_moves_that_multiply_the_batch() -> None:
    values = [Value("x", (-1, 4), "float32"), Value("y", (-2, 2), "float32")]
    program = Program(
        (Op("reshape", "r", ("x",), "y", {"shape": [-2, 2]}),), {v.name: v for v in values}, ("x",), ("y",)
    )
    x = np.arange(12, dtype=np.float32).reshape(3, 4)
    assert np.array_equal(run(program, x), x.reshape(6, 2))


def network(axis: int = 1) -> Program:
    """uint8-sized images, a convolution, and two outputs: numbers behind their units, and classes."""
    generator = np.random.default_rng(6)
    values = [
        Value("x", (-1, 2, 4, 4), "float32"), Value("q", (-1, 2, 4, 4), "int", -128, 127, -5),
        Value("c", (-1, 3, 2, 2), "int", -(1 << 20), 1 << 20, -9), Value("f", (-1, 12), "int", -(1 << 20), 1 << 20, -9),
        Value("y", (-1, 12), "float32"), Value("k", (-1,), "int64"), Value("s", (-1, 12), "float32"),
    ]  # fmt: skip
    window = {"stride": [2, 2], "padding": [[0, 1], [0, 1]], "dilation": [1, 1], "groups": 1}
    ops = (
        Op("quantize", "in", ("x",), "q", {"exponent": -5, "rounding": "half_even", "low": -128, "high": 127}),
        Op("conv", "conv", ("q",), "c", window, {"weight": codes(generator, (3, 2, 3, 3)).astype(np.int8)}),
        Op("reshape", "flat", ("c",), "f", {"shape": [-1, 12]}),
        Op("dequantize", "out", ("f",), "y", {"factor": None, "precision": "float32", "count": None}),
        Op("argmax", "class", ("f",), "k", {"axis": 1, "keepdims": False}),
        Op("island", "soft", ("y",), "s", {"function": "softmax", "axis": axis}),
    )
    structure = {"dict": {"logits": {"leaf": 0}, "rest": {"tuple": [{"leaf": 1}]}}}
    return Program(ops, {value.name: value for value in values}, ("x",), ("y", "k"), structure)


def images(count: int = 5) -> Array:
    return np.random.default_rng(7).normal(size=(count, 2, 4, 4)).astype(np.float32)


def test_outputs_are_put_together() -> None:
    out = run(network(), images())
    assert list(out) == ["logits", "rest"]
    assert isinstance(out["rest"], tuple)
    assert out["logits"].dtype == np.float32
    assert np.array_equal(out["rest"][0], out["logits"].argmax(1))
    whole = run(network(), images(), integers=True)
    found, exponent = whole["logits"]
    assert (found.dtype, exponent) == (np.int64, -9)
    assert np.array_equal((found * 2.0**-9).astype(np.float32), out["logits"])
    assert np.array_equal(whole["rest"][0], out["rest"][0])


def test_torch_tensors_give_the_same() -> None:
    given_ = torch.from_numpy(images()).requires_grad_()
    assert np.array_equal(run(network(), given_)["logits"], run(network(), images())["logits"])


@pytest.mark.parametrize("count", [0, 1, 5])
def test_a_batch_equals_its_samples(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    whole = run(network(), images(count))["logits"]
    calls = []
    conv = runtime.KINDS["conv"]
    monkeypatch.setitem(runtime.KINDS, "conv", lambda k, x: calls.append(len(x)) or conv(k, x))
    monkeypatch.setattr(runtime, "_CHUNK", 250)
    assert np.array_equal(run(network(), images(count))["logits"], whole)
    assert calls == {0: [0], 1: [1], 5: [2, 2, 1]}[count]
    assert whole.shape == (count, 12)


def test_what_mixes_samples_gets_all_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime, "_CHUNK", 1)
    program = Program(**{**vars(network(axis=0)), "outputs": ("s",), "structure": {"leaf": 0}})
    assert np.allclose(run(program, images()).sum(0), 1)


def test_pixels_are_looked_up() -> None:
    generator = np.random.default_rng(8)
    pixels = generator.integers(0, 256, (3, 4, 4, 2), np.uint8)
    mean, std = [0.4914, 0.25], [0.2023, 0.31]
    normalized = (torch.from_numpy(pixels).permute(0, 3, 1, 2) / 255 - torch.tensor(mean).view(2, 1, 1)) / torch.tensor(
        std
    ).view(2, 1, 1)
    expected = run(network(), normalized)["logits"]
    assert np.array_equal(run(network(), pixels, pixels=(mean, std))["logits"], expected)
    noted = Program(**{**vars(network()), "note": {"pixels": [mean, std]}})
    assert np.array_equal(run(noted, pixels)["logits"], expected)
    assert np.array_equal(
        run(network(), pixels, pixels=(0.5, 0.25))["logits"],
        run(network(), pixels, pixels=([0.5, 0.5], [0.25, 0.25]))["logits"],
    )


def test_pixels_are_for_what_quantizes_them() -> None:
    """Anything else would read the axes in another order."""
    values = {name: Value(name, (-1, 4, 4, 4), "float32") for name in ("x", "y")}
    program = Program((Op("reshape", "same", ("x",), "y", {"shape": [-1, 4, 4, 4]}),), values, ("x",), ("y",))
    with pytest.raises(ProgramError, match="got uint8"):
        run(program, np.zeros((1, 4, 4, 4), np.uint8), pixels=(0.5, 0.5))


def test_pixel_table_is_the_formula_of_floats() -> None:
    mean, std = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
    p = torch.arange(256).view(256, 1) / 255
    for rule in ROUNDINGS:
        expected = quantize(((p - torch.tensor(mean)) / torch.tensor(std)).numpy(), -6, rule)
        equal(pixel_table(mean, std, -6, rule), expected)
    everything = np.arange(768, dtype=np.uint8).reshape(1, 16, 16, 3)
    table = pixel_table(mean, std, -6)
    expected = np.moveaxis(table[everything, [0, 1, 2]], -1, 1)
    equal(quantize_pixels(everything, table), expected)


REFUSED = {
    "float64": (lambda: [images().astype(np.float64)], r"got float64 \[5, 2, 4, 4\], expected float32 \[N, 2, 4, 4\]"),
    "shape": (lambda: [images()[:, :1]], r"got float32 \[5, 1, 4, 4\], expected float32 \[N, 2, 4, 4\]"),
    "one sample": (lambda: [images()[0]], r"got float32 \[2, 4, 4\], expected float32 \[N, 2, 4, 4\]"),
    "two inputs": (lambda: [images(), images()], "got 2 inputs, expected 1"),
    "none": (list, "got 0 inputs, expected 1"),
    "pixels without a mean": (lambda: [np.zeros((1, 4, 4, 2), np.uint8)], r"got uint8 .* pixels=\(mean, std\)"),
    "NaN": (lambda: [images() * np.float32(np.nan)], r"in \(quantize\): got NaN"),
    "bfloat16": (lambda: [torch.zeros(1, 2, 4, 4).bfloat16()], "input 0: .*expected float32"),
    "words": (lambda: [["a", [1]]], "input 0: .*expected float32"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_inputs_that_are_refused(name: str) -> None:
    inputs, message = REFUSED[name]
    with pytest.raises(ProgramError, match=message):
        run(network(), *inputs())


def test_inputs_of_one_batch() -> None:
    values = [Value(name, (-1, 2), "float32") for name in ("a", "b", "y")]
    program = Program(
        (Op("concat", "c", ("a", "b"), "y", {"axis": 0}),), {v.name: v for v in values}, ("a", "b"), ("y",)
    )
    with pytest.raises(ProgramError, match=r"got batches of \[2, 3\]"):
        run(program, np.zeros((2, 2), np.float32), np.zeros((3, 2), np.float32))


def test_floats_have_no_integers() -> None:
    program = Program(**{**vars(network()), "outputs": ("s",), "structure": {"leaf": 0}})
    with pytest.raises(ProgramError, match="float island"):
        run(program, images(), integers=True)


def test_given_values_are_not_computed() -> None:
    taken = np.arange(-32, 32).reshape(2, 2, 4, 4)
    found = trace(network(), images(2), given={"q": taken})
    assert found["q"] is taken
    assert list(found) == ["x", "q", "c", "f", "y", "k", "s"]
    assert np.array_equal(found["c"], trace(network(), taken.astype(np.float32) / 32)["c"])
    with pytest.raises(ProgramError, match=r"given \['other'\]"):
        trace(network(), images(2), given={"other": taken})


def test_an_operation_that_does_not_fit_is_named() -> None:
    program = network()
    wrong = Program(**{**vars(program), "values": {**program.values, "c": Value("c", (-1, 9, 2, 2), "int", -9, 9)}})
    with pytest.raises(ProgramError, match=r"conv \(conv\): got shape \(5, 3, 2, 2\), expected \(-1, 9, 2, 2\)"):
        run(wrong, images())

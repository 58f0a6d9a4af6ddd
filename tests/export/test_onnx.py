"""ONNX files: settings, refusals, the form for TI's tools, and networks of every scheme."""

from __future__ import annotations

import subprocess
import sys
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

onnx = pytest.importorskip("onnx", reason="needs the extra onnx")
pytest.importorskip("onnxruntime", reason="needs the extra onnx")

from export.onnx_programs import Writer, branches  # noqa: E402  # after the packages that it needs

from lightning_lowbit import Bnn, F8Net, Jacinto, Niti, Tqt, Wageubn, convert  # noqa: E402
from lightning_lowbit.errors import ConfigError, UnsupportedModelError  # noqa: E402
from lightning_lowbit.export.onnx import export_onnx  # noqa: E402
from lightning_lowbit.export.onnx_checks import session  # noqa: E402
from lightning_lowbit.export.runtime import run  # noqa: E402


@pytest.mark.parametrize("form", ["qdq", "clip"])
@pytest.mark.parametrize("kind", ["threshold", "normalize", "island"])
def test_what_has_no_float_form_is_refused_by_path(tmp_path, form, kind):
    w = Writer(33)
    x = w.codes(4)
    if kind == "threshold":
        y = w.dequantize(w.threshold(x, np.int16([1, 2, 3, 4]), np.uint8([0, 0, 1, 1])))
    elif kind == "normalize":
        names = ("fraction_in", "mean_fraction", "s_fraction", "xhat_fraction", "out_fraction", "product_fraction")
        ones = {name: np.ones(4, np.int64) for name in ("mean", "s", "gamma", "beta")}
        values = dict.fromkeys(names, 5)
        y = w.dequantize(w.op("normalize", [x], w.value(x.shape, -200, 200, -5), ones, "norm", **values, limit=None))
    else:
        z = w.dequantize(x)
        y = w.op("island", [z], w.value(z.shape, dtype="float32"), path="act", function="tanh")
    with pytest.raises(UnsupportedModelError, match=rf"^\w+ \({kind}\): form='{form}'"):
        export_onnx(w.program(y), tmp_path / "net.onnx", form)


@pytest.mark.parametrize("opset", [9, 11])
def test_clip_form(tmp_path, opset):
    """Its floats are the program's within what the rounding of the activations moves."""
    w = Writer(40)
    program, path = w.program(branches(w)), tmp_path / "net.onnx"
    report = export_onnx(program, path, "clip", opset)
    assert "clipped, not rounded" in str(report)
    model = onnx.load(path)
    clips = [node for node in model.graph.node if node.op_type == "Clip"]
    assert len(clips) == sum(op.kind in ("quantize", "requantize", "divide") for op in program.ops)
    if opset == 9:
        ranges = [(node.attribute[0].f, node.attribute[1].f) for node in clips]
        assert all(len(node.input) == 1 for node in clips)
    else:
        constants = {tensor.name: float(onnx.numpy_helper.to_array(tensor)) for tensor in model.graph.initializer
                     if not tensor.dims}  # fmt: skip
        ranges = [tuple(constants[name] for name in node.input[1:]) for node in clips]
    assert set(ranges[0]) == {-4.0, 127 / 32}
    samples = w.samples(8)
    got = session(path.read_bytes()).run(None, {"input": samples[0]})[0]
    want = run(program, *samples)
    assert np.abs(got - want).max() < 0.05 * np.abs(want).max()
    assert not np.array_equal(got, want)


def test_ranges_for_tidl(tmp_path):
    """The fields of the public description, read back with protobuf's rules for text."""
    w = Writer(41)
    export_onnx(w.program(branches(w)), tmp_path / "net.onnx", "clip")
    text = (tmp_path / "net.prototxt").read_text()
    tensors = {name for node in onnx.load(tmp_path / "net.onnx").graph.node for name in node.output}
    layers = text.split("layers {")[1:]
    assert f"num_layers: {len(layers)}\n" in text
    assert {layer.split('"')[1] for layer in layers} <= tensors
    assert text.count("{") == text.count("}")
    first, conv = layers[0], layers[1]
    assert "TIDL_DataLayer" in first
    assert "min: -4.0\n" in first
    assert "max: 3.96875\n" in first
    assert "scale: 32.0\n" in first
    assert "TIDL_ConvolutionLayer" in conv
    assert conv.count("value: ") == 8
    assert "size: 8\n" in conv
    assert "element_type: 0\n" in conv.split("weights")[0], "unsigned after the rectifier"


@pytest.mark.parametrize("form", ["qdq", "integer", "clip"])
def test_the_same_program_gives_the_same_bytes(tmp_path, form):
    data = []
    for name in ("a.onnx", "b.onnx"):
        w = Writer(42)
        export_onnx(w.program(branches(w), note={"scheme": "tqt"}), tmp_path / name, form)
        data.append((tmp_path / name).read_bytes())
    assert data[0] == data[1]
    model = onnx.load(tmp_path / "a.onnx")
    notes = {entry.key: entry.value for entry in model.metadata_props}
    assert model.producer_name == "lightning-lowbit"
    assert notes["lightning_lowbit.form"] == form
    assert '"scheme": "tqt"' in notes["lightning_lowbit.note"]
    assert len(notes["lightning_lowbit.program"]) == 64


@pytest.mark.parametrize(
    ("form", "opset"), [("qdq", 13), ("qdq", 20), ("integer", 13), ("integer", 20), ("clip", 10), ("clip", 12)]
)
def test_oldest_and_newest_opsets(tmp_path, form, opset):
    w = Writer(44)
    report = export_onnx(w.program(branches(w)), tmp_path / "net.onnx", form, opset, samples=w.samples())
    assert onnx.load(tmp_path / "net.onnx").opset_import[0].version == opset
    if form != "clip":
        assert "equal to the program" in str(report)


def test_unknown_settings_and_a_missing_package(tmp_path, monkeypatch):
    w = Writer(43)
    program, path = w.program(w.dequantize(w.codes(4))), tmp_path / "net.onnx"
    for settings_, words in (
        ({"form": "q"}, "form: got 'q', expected one of qdq, integer, clip"),
        ({"opset": 9}, "opset: got 9, form='qdq' is written in opset 13 to 20"),
        ({"weight_type": "int4"}, "weight_type: got 'int4'"),
        ({"samples": [1, 2]}, "samples: got 2 inputs, expected 1"),
    ):
        with pytest.raises(ConfigError, match=words):
            export_onnx(program, path, **settings_)
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(ConfigError, match=r"needs the package 'onnx'.*lightning-lowbit\[onnx\]"):
        export_onnx(program, path)
    assert not list(tmp_path.iterdir())


def test_importing_the_exporter_imports_no_onnx():
    code = (
        "import sys, lightning_lowbit.export.onnx; sys.exit(bool({'onnx', 'onnxruntime', 'torch'} & set(sys.modules)))"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 8, 3, padding=1, groups=2), nn.BatchNorm2d(8)
        self.fc = nn.Linear(8, 5)

    def forward(self, x):
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.max_pool2d(F.relu(self.bn2(self.conv2(x)) + x), 2)
        return self.fc(F.adaptive_avg_pool2d(x, 1).flatten(1))


def chain(act):
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), act(), nn.Conv2d(8, 8, 3, padding=1),
        nn.BatchNorm2d(8), act(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(72, 5),
    )  # fmt: skip


SCHEMES = {
    "tqt": (Net, Tqt()),
    "tqt 4 bits": (Net, Tqt(weight_bits=4, act_bits=4)),
    "jacinto": (Net, Jacinto()),
    "f8net": (Net, F8Net()),
    "niti": (Net, Niti()),
    "wageubn": (partial(chain, nn.ReLU), Wageubn(io="strict", first_last="int8")),
    "bnn": (partial(chain, nn.Hardtanh), Bnn(first="int8", last="int8")),
}


@pytest.mark.parametrize("name", SCHEMES)
def test_networks_of_every_scheme(tmp_path, name):
    """Lowered and run by ONNX Runtime: the bits of the module's own evaluation."""
    make, scheme = SCHEMES[name]
    torch.manual_seed(0)
    net, x = make(), torch.randn(16, 3, 6, 6)
    net(x)
    convert(net.eval(), scheme, example_input=x)
    export_onnx(net, tmp_path / "net.onnx", "integer", example_input=x)
    got = session((tmp_path / "net.onnx").read_bytes()).run(None, {"input": x.numpy()})[0]
    np.testing.assert_array_equal(got, net(x).detach().numpy())
    if name.startswith(("tqt", "f8net")):
        report = export_onnx(net, tmp_path / "net.onnx", example_input=x, samples=x)
        assert "equal to the program" in str(report)

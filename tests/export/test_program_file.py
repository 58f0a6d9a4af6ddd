"""The file of an integer program: what it keeps, every kind of damage, and a run without this package."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_lowbit.export import program as program_module
from lightning_lowbit.export import runtime
from lightning_lowbit.export.program import IntegerProgram, digest, write_atomically
from lightning_lowbit.export.runtime import Op, ProgramError, Value


def network(island: bool = False) -> IntegerProgram:
    """Images, a convolution whose channels have steps of their own, a linear layer; at will a float function."""
    generator = np.random.default_rng(6)
    values = [
        Value("x", (-1, 2, 4, 4), "float32"), Value("q", (-1, 2, 4, 4), "int", -128, 127, -5),
        Value("c", (-1, 3, 2, 2), "int", -300000, 300000, (-9, -8, -9), 1),
        Value("r", (-1, 3, 2, 2), "int", 0, 255, -3), Value("f", (-1, 12), "int", 0, 255, -3),
        Value("l", (-1, 5), "int", -9000, 9000, -9), Value("y", (-1, 5), "float32"), Value("s", (-1, 5), "float32"),
    ]  # fmt: skip
    window = {"stride": (2, 2), "padding": [[0, 1], [0, 1]], "dilation": [1, 1], "groups": 1}
    rule = {"rounding": "half_even", "low": 0, "high": 255}
    weight, bias = generator.integers(-99, 99, (3, 2, 3, 3)), generator.integers(-9999, 9999, 3)
    ops = [
        Op("quantize", "in", ("x",), "q", {"exponent": -5, "rounding": "half_up", "low": -128, "high": 127}),
        Op("conv", "conv", ("q",), "c", window, {"weight": weight.astype(np.int8), "bias": bias.astype(np.int32)}),
        Op("requantize", "relu", ("c",), "r", {"shift": [6, 5, 6], "axis": np.int64(1), **rule}),
        Op("reshape", "flat", ("r",), "f", {"shape": [-1, 12]}),
        Op("linear", "fc", ("f",), "l", {}, {"weight": generator.integers(-2, 2, (5, 12)).astype(np.int8)}),
        Op("dequantize", "out", ("l",), "y", {"factor": None, "precision": "float32", "count": None}),
    ]
    if island:
        ops.append(Op("island", "soft", ("y",), "s", {"function": "softmax", "axis": 1}))
    kept = {value.name: value for value in values[: None if island else -1]}
    structure = {"dict": {"scores": {"list": [{"leaf": 0}]}}}
    note = {"scheme": "tqt", "pixels": [[0.5, 0.4], [0.25, 0.2]], "odd": float(np.float32(0.1))}
    return IntegerProgram(tuple(ops), kept, ("x",), ("s" if island else "y",), structure, note)


def images(count: int = 3) -> Any:
    return np.random.default_rng(7).normal(size=(count, 2, 4, 4)).astype(np.float32)


@pytest.mark.parametrize("island", [False, True])
def test_a_file_gives_the_program_back(tmp_path: Path, island: bool) -> None:
    program, path = network(island), tmp_path / "net.lowbit"
    program.save(path)
    loaded = IntegerProgram.load(path)
    assert type(loaded) is IntegerProgram
    assert (loaded.values, loaded.inputs, loaded.outputs) == (program.values, program.inputs, program.outputs)
    assert (loaded.structure, loaded.note) == (program.structure, program.note)
    for op, other in zip(loaded.ops, program.ops, strict=True):
        assert (op.kind, op.path, op.inputs, op.output) == (other.kind, other.path, other.inputs, other.output)
        assert op.attributes == json.loads(json.dumps(dict(other.attributes), default=int))
        assert {k: (v.dtype, v.tolist()) for k, v in op.constants.items()} == {
            k: (v.dtype, v.tolist()) for k, v in other.constants.items()
        }
    assert loaded.digest() == program.digest() == digest(runtime.load(path))
    assert np.array_equal(loaded(images())["scores"][0], program.run(images())["scores"][0])
    loaded.save(tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == path.read_bytes()
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["again", "net.lowbit"]


def test_the_digest_tells_programs_apart() -> None:
    program = network()
    weight = program.ops[1].constants["weight"].copy()
    weight[0, 0, 0, 0] += 1
    others = [
        program.replace_op(1, replace(program.ops[1], constants={**program.ops[1].constants, "weight": weight})),
        program.replace_op(2, replace(program.ops[2], attributes={**program.ops[2].attributes, "high": 254})),
        replace(program, note={}),
        replace(program, values={**program.values, "r": replace(program.values["r"], exponent=-2)}),
    ]
    assert len({program.digest(), network().digest(), *(other.digest() for other in others)}) == 5
    assert program.ops[1].constants["weight"][0, 0, 0, 0] == weight[0, 0, 0, 0] - 1


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("program") / "net"
    network().save(path)
    return path.read_bytes()


def refused(tmp_path: Path, data: bytes, message: str = "") -> None:
    path = tmp_path / "damaged.lowbit"
    path.write_bytes(data)
    for load in (runtime.load, IntegerProgram.load):
        with pytest.raises(ProgramError, match=message) as caught:
            load(path)
        assert str(path) in str(caught.value)
        assert "IntegerProgram.save(path)" in str(caught.value)


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_every_byte_counts(tmp_path_factory: pytest.TempPathFactory, file: bytes, data: st.DataObject) -> None:
    at, bits = data.draw(st.integers(0, len(file) - 1)), data.draw(st.integers(1, 255))
    folder = tmp_path_factory.mktemp("flip")
    refused(folder, file[:at] + bytes([file[at] ^ bits]) + file[at + 1 :], "cut or changed")
    refused(folder, file[:at], "cut or changed")


def rewritten(file: bytes, change: Callable[[dict[str, Any], dict[str, Any]], None], seal: bool = True) -> bytes:
    """The file with other contents, sealed as if they were meant."""
    with np.load(io.BytesIO(file)) as archive:
        members = {name: archive[name] for name in archive.files}
    document = json.loads(members.pop("program.json").tobytes())
    change(document, members)
    members["program.json"] = np.frombuffer(json.dumps(document).encode(), np.uint8)
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as archive:
        for name, array in members.items():
            member = io.BytesIO()
            np.lib.format.write_array(member, np.asarray(array), allow_pickle=True)
            archive.writestr(f"{name}.npy", member.getvalue())
        archive.comment = b"0" * runtime.SEAL
    whole = data.getvalue()[: -runtime.SEAL]
    return whole + (sha256(whole).hexdigest().encode() if seal else b"0" * runtime.SEAL)


def signed(
    change: Callable[[dict[str, Any], dict[str, Any]], None],
) -> Callable[[dict[str, Any], dict[str, Any]], None]:
    """The change, with a hash that fits it."""

    def both(document: dict[str, Any], members: dict[str, Any]) -> None:
        change(document, members)
        document["sha256"] = runtime.digest(document, members)

    return both


FORGED: dict[str, tuple[Callable[[dict[str, Any], dict[str, Any]], Any], str]] = {
    "a weight": (lambda d, m: m.update(c1=m["c1"] + 1), "do not fit their sha256"),
    "a shift": (lambda d, m: d["ops"][2]["attributes"].update(shift=[6, 6, 6]), "do not fit their sha256"),
    "a member is missing": (lambda d, m: m.pop("c1"), "sha256"),
    "a member is missing, hashed": (signed(lambda d, m: m.pop("c1")), "c1"),
    "pickled": (lambda d, m: m.update(c1=np.array([{}], object)), "allow_pickle=False"),
    "another format": (signed(lambda d, m: d.update(format=2)), "got format 2 .* expected 1"),
    "another kind": (signed(lambda d, m: d["ops"][0].update(kind="warp")), r"\['warp'\]"),
    "another field": (signed(lambda d, m: d["values"][0].update(odd=1)), "odd"),
    "no ops": (lambda d, m: d.pop("ops"), "ops"),
    "no list": (lambda d, m: d.update(ops=7), "iterable"),
}


@pytest.mark.parametrize("name", FORGED)
def test_forged_files(tmp_path: Path, file: bytes, name: str) -> None:
    change, message = FORGED[name]
    refused(tmp_path, rewritten(file, change), message)


def test_a_rewritten_archive_is_not_sealed(tmp_path: Path, file: bytes) -> None:
    refused(tmp_path, rewritten(file, lambda d, m: None, seal=False), "cut or changed")


@pytest.mark.parametrize("data", [b"", b"PK", b"\x80\x04K\x01.", b"text"], ids=["empty", "PK", "pickle", "text"])
def test_other_files(tmp_path: Path, data: bytes) -> None:
    refused(tmp_path, data, "not the file of a program")


def test_no_file(tmp_path: Path) -> None:
    for path in (tmp_path / "none", tmp_path):
        with pytest.raises(ProgramError, match=str(path)):
            IntegerProgram.load(path)


def test_an_error_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "net"
    network().save(path)
    before = path.read_bytes()
    with pytest.raises(TypeError, match="plain JSON, got set"):
        replace(network(), note={"odd": {1}}).save(path)

    def full(*_: Any) -> None:
        raise OSError("no space")

    monkeypatch.setattr(program_module.os, "replace", full)
    with pytest.raises(OSError, match="no space"):
        network(island=True).save(path)
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["net"]


def test_a_file_can_be_read_by_others(tmp_path: Path) -> None:
    mask = os.umask(0o022)
    try:
        write_atomically(tmp_path / "net", b"data")
    finally:
        os.umask(mask)
    assert (tmp_path / "net").stat().st_mode & 0o777 == 0o644


def alone(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Python in isolated mode, in a folder where this package is not."""
    code = (
        "import runpy, sys; sys.argv = sys.argv[1:]\n"
        "try: runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "finally: print(sorted({'torch', 'lightning', 'lightning_lowbit'} & {*sys.modules}), file=sys.stderr)"
    )
    command = [sys.executable, "-I", "-c", code, *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize("island", [False, True])
def test_the_runtime_runs_alone(tmp_path: Path, island: bool) -> None:
    program = network(island)
    program.save(tmp_path / "net.lowbit", with_runtime=True)
    assert (tmp_path / "runtime_float.py").exists() == island
    np.save(tmp_path / "x.npy", images())
    done = alone(tmp_path, "runtime.py", "net.lowbit", "x.npy", "y.npy")
    assert (done.returncode, done.stderr) == (0, "[]\n")
    expected = program.run(images())["scores"][0]
    assert np.array_equal(np.load(tmp_path / "y.npy"), expected)
    said = done.stdout.splitlines()
    assert said[0] == "output 0: float32 [3, 5], written to y.npy"
    assert said[1].split() == ["sample", "0:", *(f"{v:.6g}" for v in expected[0][:-1]),
                               f"{expected[0][-1]:.6g},", "argmax", str(expected[0].argmax())]  # fmt: skip


def test_the_runtime_shows_a_short_look(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    values = {name: Value(name, (-1, 9), "float32") for name in ("x", "y")}
    ops = (Op("reshape", "r", ("x",), "y", {"shape": [-1, 9]}),)
    IntegerProgram(ops, values, ("x",), ("y", "x"), {"list": [{"leaf": 0}, {"leaf": 1}]}).save(tmp_path / "net")
    np.save(tmp_path / "x.npy", np.full((7, 9), -1.23456789e-30, np.float32))
    assert runtime.main([str(tmp_path / name) for name in ("net", "x.npy")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert (lines[0], lines[5]) == ("output 0: float32 [7, 9]", "  ... 3 more")
    assert lines[4] == "  sample 3: " + "-1.23457e-30 " * 5 + "..., argmax 0"
    assert runtime.main([str(tmp_path / name) for name in ("net", "x.npy", "out")]) == 0
    assert f", written to {tmp_path / 'out.npz'} as arr_1" in capsys.readouterr().out
    assert np.load(tmp_path / "out.npz")["arr_1"].shape == (7, 9)


def test_the_runtime_takes_pixels_alone(tmp_path: Path) -> None:
    shutil.copy(runtime.__file__, tmp_path / "copy.py")
    network().save(tmp_path / "net.lowbit")
    pixels = np.random.default_rng(8).integers(0, 256, (2, 4, 4, 2), np.uint8)
    np.save(tmp_path / "x.npy", pixels)
    assert alone(tmp_path, "copy.py", "net.lowbit", "x.npy", "y.npy").returncode == 0
    x = (pixels / np.float32(255) - np.float32([0.5, 0.4])) / np.float32([0.25, 0.2])
    expected = network().run(np.moveaxis(x, -1, 1))["scores"][0]
    assert np.array_equal(np.load(tmp_path / "y.npy"), expected)


def test_what_the_lone_runtime_refuses(tmp_path: Path) -> None:
    shutil.copy(runtime.__file__, tmp_path / "runtime.py")
    network(island=True).save(tmp_path / "net.lowbit")
    np.save(tmp_path / "x.npy", images())
    np.save(tmp_path / "wide.npy", images().astype(np.float64))
    (tmp_path / "cut.lowbit").write_bytes((tmp_path / "net.lowbit").read_bytes()[:-1])
    said = {
        ("net.lowbit", "x.npy", "y.npy"): "soft (island): a float island needs runtime_float.py beside runtime.py",
        ("net.lowbit", "wide.npy", "y.npy"): "got float64 [3, 2, 4, 4], expected float32",
        ("cut.lowbit", "x.npy", "y.npy"): "cut or changed. Copy it again, or write it anew",
        ("net.lowbit", "none.npy", "y.npy"): "none.npy",
        ("net.lowbit",): "python runtime.py program.lowbit input.npy",
    }
    for arguments, message in said.items():
        done = alone(tmp_path, "runtime.py", *arguments)
        assert done.returncode == (1 if len(arguments) == 3 else 2)
        assert message in done.stderr
        assert "Traceback" not in done.stderr
    assert not (tmp_path / "y.npy").exists()


def test_importing_the_runtime_imports_no_torch() -> None:
    code = (
        "import lightning_lowbit, lightning_lowbit.export.runtime, lightning_lowbit.export.program, sys; "
        "print({'torch', 'lightning', 'pytorch_lightning'} & {*sys.modules})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "set()\n"


def test_summary() -> None:
    summary = network().summary()
    assert summary.islands == ()
    assert summary.macs == {"conv": 12 * 18, "linear": 60}
    assert summary.bytes == 54 + 12 + 60
    assert (summary.ops, summary.accumulator_bits, summary.accumulator) == (6, 20, "int32")
    assert str(summary).splitlines()[0] == "no float islands: integers from quantize to dequantize"
    row = next(line.split() for line in str(summary).splitlines() if line.startswith("conv"))
    assert row == ["conv", "conv", "[N,", "3,", "2,", "2]", "int20·2^-9..-8", "216", "66", "20"]
    assert "widest sum: 20 bits, int32 suffices" in str(summary)
    assert str(network(island=True).summary()).startswith("float island: soft (softmax)\npath")
    narrow = replace(network(), values={**network().values, "c": Value("c", (-1, 3, 2, 2), low=0, high=32768)})
    assert (narrow.summary().accumulator_bits, narrow.summary().accumulator) == (17, "int32")  # two's complement
    narrow = replace(narrow, values={**narrow.values, "c": Value("c", (-1, 3, 2, 2), low=-32768, high=32767)})
    assert (narrow.summary().accumulator_bits, narrow.summary().accumulator) == (16, "int16")


def changed(index: int, **fields: Any) -> Callable[[IntegerProgram], Any]:
    return lambda program: program.replace_op(index, replace(program.ops[index], **fields))


def with_value(key: str, **fields: Any) -> Callable[[IntegerProgram], Any]:
    return lambda p: replace(p, values={**p.values, key: replace(p.values[key], **fields)})


UNFIT: dict[str, tuple[Callable[[IntegerProgram], Any], str]] = {
    "kind": (changed(1, kind="warp"), r"operation 1, conv \(warp\): unknown kind"),
    "order": (lambda p: replace(p, ops=(p.ops[1], p.ops[0], *p.ops[2:])), "reads q, which nothing before it makes"),
    "twice": (lambda p: replace(p, ops=(p.ops[0], *p.ops)), "makes q, expected a value that nothing else makes"),
    "attribute": (changed(2, attributes={"shift": 1}), r"relu \(requantize\): lacks axis, rounding, low, high"),
    "constant": (changed(4, constants={}), r"fc \(linear\): lacks weight"),
    "rounding": (changed(0, attributes={"exponent": 0, "rounding": "up", "low": 0, "high": 1}), "got rounding 'up'"),
    "function": (changed(6, attributes={"function": "warp"}), "unknown function 'warp'"),
    "inputs": (changed(4, inputs=("f", "f")), "got 2 inputs, expected 1"),
    "shifts": (changed(3, kind="add", attributes={"left": []}), "got 0 left shifts, expected 1"),
    "count": (
        changed(2, kind="divide", attributes={"shift": 1, "rounding": "floor", "low": 0, "high": 1}),
        "lacks count",
    ),
    "numerator": (
        changed(2, kind="divide", attributes={"shift": -60, "rounding": "floor", "low": 0, "high": 1, "count": 2}),
        "leave int64",
    ),
    "output": (lambda p: replace(p, outputs=("z",)), r"outputs \['z'\]: nothing makes them"),
    "input": (lambda p: replace(p, inputs=("z",)), r"inputs \['z'\]: expected a value"),
    "spare value": (lambda p: replace(p, values={**p.values, "z": Value("z", ())}), r"values \['z'\]: nothing makes"),
    "structure": (lambda p: replace(p, structure={"leaf": 1}), "expected each of 1 outputs once"),
    "no structure": (lambda p: replace(p, structure=[0]), "expected each of 1 outputs once"),
    "bounds": (with_value("c", high=1 << 63), "value c: got bounds -300000..9223372036854775808"),
    "reversed bounds": (with_value("r", low=256), "value r: got bounds 256..255"),
    "dtype": (with_value("c", dtype="int32"), "value c: got dtype 'int32'"),
    "axis": (with_value("c", axis=None), "value c: got an exponent for each channel"),
    "name": (with_value("c", name="d"), "value c: got the name 'd'"),
}


@pytest.mark.parametrize("name", UNFIT)
def test_operations_that_do_not_fit_together(name: str) -> None:
    change, message = UNFIT[name]
    with pytest.raises(ProgramError, match=message):
        change(network(island=True))

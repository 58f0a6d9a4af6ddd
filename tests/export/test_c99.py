"""A network in C gives the integers of the numpy runtime, for every kind of op."""

from __future__ import annotations

import random
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from export.c99_harness import COMPILER, OPTIMIZED, SANITIZED, Ends, compiled, differences, executed
from export.c99_networks import NETWORKS
from export.c99_programs import Net
from export.random_graphs import SCHEMES, random_batch, random_net

from lightning_lowbit import convert, lower
from lightning_lowbit.errors import ConfigError, UnsupportedModelError
from lightning_lowbit.export import runtime
from lightning_lowbit.export.c99 import export_c
from lightning_lowbit.export.runtime import Program, ProgramError

needs_compiler = pytest.mark.skipif(COMPILER is None, reason="no C compiler on the PATH")


def samples_of(program: Program, many: int, seed: int = 0) -> list[np.ndarray[Any, Any]]:
    """Floats over the range of the codes and beyond, half of them on ties; infinities and the smallest numbers."""
    rng, made = np.random.default_rng(seed), []
    for name in program.inputs:
        op = next(op for op in Ends(program).entries if op.inputs[0] == name)
        low, high = op.attributes["low"], op.attributes["high"]
        shape = (many, *program.values[name].shape[1:])
        v = rng.uniform(1.2 * low - 2, 1.2 * high + 2, shape)
        v = np.where(rng.random(shape) < 0.5, np.round(2 * v) / 2, v)
        x = np.ldexp(v, op.attributes["exponent"]).astype(np.float32)
        edges = np.float32([np.inf, -np.inf, 0.0, -0.0, 1e-45, -1e-45, 3e38, -3e38])
        flat = x.reshape(-1)
        flat[: min(len(edges), len(flat))] = edges[: len(flat)]
        made.append(x)
    return made


@needs_compiler
@pytest.mark.parametrize("flags", [OPTIMIZED, SANITIZED], ids=["optimized", "sanitized"])
@pytest.mark.parametrize("network", NETWORKS)
def test_every_kind_gives_the_integers_of_the_runtime(network: str, flags: list[str], tmp_path: Path) -> None:
    program = NETWORKS[network]()
    file = tmp_path / "network.c"
    report = export_c(program, file)
    assert report.ops == sum(op.kind not in ("quantize", "dequantize") for op in program.ops)
    driver = tmp_path / "driver.c"
    driver.write_text(Ends(program).driver(file))
    binary = compiled([driver], [*flags, "-DLOWBIT_NO_MAIN"], tmp_path / "driver")
    inputs = samples_of(program, 40)
    code, written = executed(binary, Ends(program).stream(inputs))
    assert code == 0
    assert not differences(program, inputs, written)


def small() -> Program:
    """An image of 3 channels, a convolution, logits and their class."""
    net = Net(3)
    x = net.codes(3, 5, 4, exponent=-5)
    y = net.requantize(net.conv(x, net.ints(-127, 127, 6, 3, 3, 3), net.ints(-99, 99, 6)), 7, 0, 255)
    logits = net.linear(net.same("reshape", y, shape=[-1, 36]), net.ints(-127, 127, 4, 36))
    net.out(logits)
    net.out(net.op("argmax", logits, dtype="int64", axis=1, keepdims=False))
    return net.program(version="0 */ nothing ends here /*")


@needs_compiler
def test_the_header_is_enough_for_another_program(tmp_path: Path) -> None:
    """Sizes, exponents and functions; the file itself may be read behind it."""
    program, text = small(), ""
    report = export_c(program, tmp_path / "net.c", name="tiny")
    assert report.header == tmp_path / "net.h"
    codes = program.values[next(op.inputs[0] for op in program.ops if op.kind == "dequantize")]
    numbers = {"input_size": 60, "output_0_size": 4, "output_1_size": 1, "input_exponent": -5}
    numbers["output_0_exponent"] = int(codes.exponent)  # type: ignore[arg-type]  # one of all channels
    for name, number in numbers.items():
        text += f"    if (tiny_{name} != {number}) return 1;\n"
    text += (
        "    static int8_t x[tiny_input_size];\n    static int32_t y[tiny_output_0_size];\n    static int64_t k[1];\n"
    )
    text += "    tiny_run_codes(x, y, k);\n"
    driver, both = tmp_path / "driver.c", tmp_path / "both.c"
    driver.write_text(f'#include "net.h"\nint main(void)\n{{\n{text}    return 0;\n}}\n')
    both.write_text(
        f'#include "net.h"\n#include "net.c"\n#include "net.h"\nint main(void)\n{{\n{text}    return 0;\n}}\n'
    )
    flags = [*OPTIMIZED, "-DLOWBIT_NO_MAIN"]
    assert executed(compiled([driver, tmp_path / "net.c"], flags, tmp_path / "a")) == (0, b"")
    assert executed(compiled([both], flags, tmp_path / "b")) == (0, b"")
    assert "tiny_output_1_exponent" not in (tmp_path / "net.h").read_text()  # of a class


def test_codes_behind_a_factor_have_no_exponent(tmp_path: Path) -> None:
    net = Net()
    net.out(net.op("dequantize", net.codes(6), dtype="float32", factor=0.3, precision="float32", count=None))
    export_c(net.program(), tmp_path / "net.c")
    text = (tmp_path / "net.h").read_text()
    assert ("network_input_exponent" in text, "network_output_exponent" in text) == (True, False)


def test_a_header_of_somebody_else_is_left(tmp_path: Path) -> None:
    (tmp_path / "net.h").write_text("#define MINE\n")
    with pytest.raises(ProgramError, match="another file of that name"):
        export_c(small(), tmp_path / "net.c")
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("net.h", "#define MINE\n")]
    (tmp_path / "net.h").unlink()
    export_c(small(), tmp_path / "net.c")
    export_c(small(), tmp_path / "net.c")  # over its own


@needs_compiler
@pytest.mark.parametrize("given", [None, "batch"], ids=["drawn", "given"])
def test_main_checks_the_file(given: str | None, tmp_path: Path) -> None:
    program = small()
    file = tmp_path / "net.c"
    export_c(program, file, name="tiny", test_input=samples_of(program, 5)[0] if given else None)
    assert ("drawn at random" in file.read_text()) == (given is None)
    assert executed(compiled([file], OPTIMIZED, tmp_path / "a")) == (0, b"ok\n")


@needs_compiler
def test_main_tells_the_first_difference(tmp_path: Path) -> None:
    program = small()
    file = tmp_path / "net.c"
    export_c(program, file)
    text = file.read_text()
    start = text.index("{\n", text.index(" expected_0[4]")) + 2
    end = text.index(",", start)
    number = int(text[start:end])
    file.write_text(f"{text[:start]}{number + 1}{text[end:]}")
    code, said = executed(compiled([file], OPTIMIZED, tmp_path / "a"))
    assert (code, said.decode()) == (1, f"got_0[0]: got {number}, expected {number + 1}\n")


@needs_compiler
def test_pixels_are_looked_up(tmp_path: Path) -> None:
    program, file, pixels = small(), tmp_path / "network.c", ([0.5, 0.4, 0.6], [0.2, 0.25, 0.3])
    export_c(program, file, main=False, pixels=pixels)
    assert "LOWBIT_NO_MAIN\n" not in file.read_text()
    driver = tmp_path / "driver.c"
    driver.write_text(
        f'#include "{file}"\n#include <stdio.h>\nint main(void)\n{{\n    static uint8_t pixels[60];\n'
        "    static int32_t logits[4];\n    static int64_t best[1];\n"
        "    while (fread(pixels, 1, 60, stdin) == 60) {\n        network_run_pixels(pixels, logits, best);\n"
        "        fwrite(logits, 4, 4, stdout);\n    }\n    return 0;\n}\n"
    )
    images = np.random.default_rng(1).integers(0, 256, (30, 5, 4, 3), dtype=np.uint8)
    _, written = executed(compiled([driver], SANITIZED, tmp_path / "driver"), images.tobytes())
    (codes, _), _ = runtime.run(program, images, pixels=pixels, integers=True)
    assert np.array_equal(np.frombuffer(written, np.int32).reshape(30, 4), codes)


@needs_compiler
def test_pixels_wait_for_their_last_reader(tmp_path: Path) -> None:
    """The codes are read once more, by another shape, when all other buffers have been in use."""
    net, file = Net(), tmp_path / "network.c"
    x = net.codes(2, 4, 4)
    again = net.same("reshape", x, shape=[-1, 32])
    y = net.requantize(net.requantize(net.conv(x, net.ints(-9, 9, 8, 2, 1, 1)), 3), 1, axis=None)
    y = net.linear(net.same("reshape", y, shape=[-1, 128]), net.ints(-9, 9, 32, 128))
    net.out(net.add([net.requantize(y, 6), again], [0, 0]))
    pixels = ([0.5, 0.4], [0.1, 0.1])
    export_c(net.program(), file, pixels=pixels)
    driver = tmp_path / "driver.c"
    driver.write_text(
        f'#include "{file}"\n#include <stdio.h>\nint main(void)\n{{\n    static uint8_t pixels[32];\n'
        "    static int16_t sums[32];\n    while (fread(pixels, 1, 32, stdin) == 32) {\n"
        "        network_run_pixels(pixels, sums);\n        fwrite(sums, 2, 32, stdout);\n    }\n    return 0;\n}\n"
    )
    images = np.random.default_rng(1).integers(0, 256, (9, 4, 4, 2), dtype=np.uint8)
    _, written = executed(compiled([driver], [*SANITIZED, "-DLOWBIT_NO_MAIN"], tmp_path / "driver"), images.tobytes())
    (codes, _) = runtime.run(net.program(), images, pixels=pixels, integers=True)[0]
    assert np.array_equal(np.frombuffer(written, np.int16).reshape(9, 32), codes)


def test_what_is_quantized_alike_is_one_input(tmp_path: Path) -> None:
    net = Net()
    x = net.input(5)
    for rounding in ("half_up", "half_even", "half_up"):
        net.out(net.quantize(x, rounding=rounding))
    export_c(net.program(), tmp_path / "network.c")
    text = (tmp_path / "network.c").read_text()
    assert (
        "run_codes(const int8_t *input_0, const int8_t *input_1, int8_t *out_0, int8_t *out_1, int8_t *out_2);" in text
    )


@needs_compiler
def test_nan_is_the_lowest_code(tmp_path: Path) -> None:
    net = Net()
    net.out(net.codes(3, low=-100, high=90))
    program, file, driver = net.program(), tmp_path / "network.c", tmp_path / "driver.c"
    export_c(program, file)
    driver.write_text(Ends(program).driver(file))
    binary = compiled([driver], [*SANITIZED, "-DLOWBIT_NO_MAIN"], tmp_path / "driver")
    _, written = executed(binary, np.float32([np.nan, 1.0, -np.nan]).tobytes())
    assert Ends(program).split(written, 1)[0][0].tolist() == [[-100, 16, -100]]


def test_the_file_needs_no_library_and_computes_without_floats(tmp_path: Path) -> None:
    export_c(NETWORKS["residual"](), tmp_path / "network.c")
    text = (tmp_path / "network.c").read_text()
    functions = re.findall(r"^(?:static )?\w+ (\w+)\([^;{]*\)\n{\n(.*?)\n}\n", text, re.MULTILINE | re.DOTALL)
    floats = [name for name, body in functions if re.search("float|double", body)]
    assert set(floats) == {"round_float_half_even_i32", "network_quantize_input", "network_dequantize_output_0"}
    assert [line for line in text.split("\n") if line.startswith("#include")] == [
        "#include <stdint.h>", "#include <string.h>", "#include <stdio.h>",
    ]  # fmt: skip
    assert "alloc(" not in text
    assert all("v >= 0 ? v >> n : -1 - ((-1 - v) >> n)" in line for line in text.split("\n") if ">>" in line)


def test_the_same_program_gives_the_same_bytes(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        export_c(small(), tmp_path / folder / "network.c")
    assert (tmp_path / "a" / "network.c").read_bytes() == (tmp_path / "b" / "network.c").read_bytes()


def test_sizes_are_told(tmp_path: Path) -> None:
    net = Net()
    net.out(net.linear(net.codes(10), net.ints(-127, 127, 4, 10), net.ints(-9, 9, 4)))
    report = export_c(net.program(), tmp_path / "network.c", main=False)
    assert (report.flash, report.ram, report.ops, report.calls) == (4 * 10 + 4 * 4, 4 * 4, 1, 1)
    assert "RAM (static buffers)              16 bytes (arena_32 16)" in str(report)


def chain(length: int) -> Program:
    net = Net()
    x = net.codes(4, 6, 6)
    for _ in range(length):
        x = net.requantize(net.conv(x, net.ints(-9, 9, 4, 4, 3, 3), padding=[[1, 1], [1, 1]]), 5)
    net.out(x)
    return net.program()


def test_a_chain_of_any_length_needs_two_buffers(tmp_path: Path) -> None:
    lengths = {n: export_c(chain(n), tmp_path / "network.c").ram for n in (1, 2, 3, 9)}
    row = 6 * 4
    assert lengths == {1: 144 + row, 2: 288 + row, 3: 288 + row, 9: 288 + row}


def test_elementwise_steps_write_over_what_nobody_reads(tmp_path: Path) -> None:
    net = Net()
    x = net.codes(50)
    y = net.requantize(x, 1)
    for kept in (False, True):
        z = net.add([y, net.requantize(x, 2)], [0, 0])
        net.out(net.requantize(z, 1))
        if kept:
            net.out(y)
        # Two operands, with the sum on one of them; then both outputs and y, with the second sum on its own operand.
        assert export_c(net.program(), tmp_path / "network.c").ram == (150 if kept else 100)


def island() -> Program:
    net = Net()
    x = net.codes(6)
    floats = net.op("dequantize", x, dtype="float32", factor=None, precision="float32", count=None)
    net.out(net.quantize(net.op("island", floats, dtype="float32", function="tanh")))
    return net.program()


def unread() -> Program:
    program = island()
    return replace(program, note={**program.note, "not_followed": ["Net (net.py:3 in forward): control flow"]})


def float_stretch() -> Program:
    net = Net()
    floats = net.op("dequantize", net.codes(6), dtype="float32", factor=None, precision="float32", count=None)
    net.out(net.quantize(floats, exponent=-2))
    return net.program()


def overflow() -> Program:
    net = Net()
    net.out(net.op("requantize", net.codes(6, low=-(2**30), high=2**30), (0, 1), shift=-40, axis=None,
                   rounding="floor", low=0, high=1))  # fmt: skip
    return net.program()


@pytest.mark.parametrize(
    ("build", "path", "said"),
    [
        (island, "net.island2", "float island.*ONNX refuses islands too"),
        (
            unread,
            "net.island2",
            r"Not followed: Net \(net.py:3 in forward\): control flow. Layers called there stay float",
        ),
        (float_stretch, "net.quantize2", "C takes floats at the network's inputs only"),
        (overflow, "net.requantize1", "64 bits|wider"),
    ],
    ids=["island", "island for a reason", "float stretch", "overflow"],
)
def test_what_has_no_integer_form_is_refused_by_path(build: Any, path: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match=f"^{path}: .*({said})"):
        export_c(build(), tmp_path / "network.c")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"name": "2nd net"}, "cannot begin the name"),
        ({"pixels": ([0.1, 0.2], [0.5, 0.5])}, "with 1 or 3 numbers each"),
        ({"pixels": 3}, "expected .mean, std."),
    ],
    ids=["name", "channels", "no pair"],
)
def test_bad_options_are_refused(options: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=said):
        export_c(small(), tmp_path / "network.c", **options)
    assert not list(tmp_path.iterdir())


def test_a_module_is_no_program(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="expected a program: lower"):
        export_c(object(), tmp_path / "network.c")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"the place of the header\. Give .*network\.c"):
        export_c(small(), tmp_path / "network.h")


def test_nothing_is_left_behind_where_writing_fails(tmp_path: Path) -> None:
    taken = tmp_path / "network.c"
    taken.mkdir()
    with pytest.raises(ValueError, match="expected the path of a file"):
        export_c(small(), taken)
    assert [path.name for path in tmp_path.iterdir()] == ["network.c"]


@needs_compiler
@pytest.mark.parametrize("scheme", ["tqt", "f8net", "jacinto"])
def test_a_lowered_network_gives_the_same_integers_in_c(scheme: str, tmp_path: Path) -> None:
    net, shape = random_net(random.Random(2), scheme)
    batch = random_batch(shape, 4)
    convert(net, SCHEMES[scheme], batch)
    program = lower(net, batch)
    export_c(program, tmp_path / "network.c")
    driver = tmp_path / "driver.c"
    driver.write_text(Ends(program).driver(tmp_path / "network.c"))
    inputs = [random_batch(shape, 64, 1).numpy()]
    binary = compiled([driver], [*OPTIMIZED, "-DLOWBIT_NO_MAIN"], tmp_path / "driver")
    assert not differences(program, inputs, executed(binary, Ends(program).stream(inputs))[1])

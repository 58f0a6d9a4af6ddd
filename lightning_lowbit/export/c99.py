"""A network as one C99 file, and its header: integers between its inputs and outputs, no libraries, no heap."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lightning_lowbit.errors import ConfigError, UnsupportedModelError
from lightning_lowbit.export.c99_ends import dequantize_function, pixel_loop, quantize_function
from lightning_lowbit.export.c99_graph import Step, elements, integers_inside, one_sample, steps_of
from lightning_lowbit.export.c99_header import FIRST, exponent_of, header
from lightning_lowbit.export.c99_kernels import Source, ctype, indented, literal, tag
from lightning_lowbit.export.c99_moves import MOVES
from lightning_lowbit.export.c99_plan import Plan, arena, planned, storage_of
from lightning_lowbit.export.c99_products import PRODUCTS, scratch
from lightning_lowbit.export.c99_stages import stage_of
from lightning_lowbit.export.program import require_ours, write_atomically
from lightning_lowbit.export.runtime import Op, Program, trace

__all__ = ["CReport", "export_c"]


@dataclass(frozen=True)
class CReport:
    """What an exported file needs.

    Args:
        path: the file.
        header: its declarations, beside it.
        flash: bytes of its constants; the test vector is not counted.
        ram: bytes of its static buffers.
        buffers: name and bytes of each of them.
        ops: integer ops of the program.
        calls: functions that a run calls for them, after elementwise ops were joined to the sums that they rescale.
    """

    path: Path
    header: Path
    flash: int
    ram: int
    buffers: Mapping[str, int]
    ops: int
    calls: int

    def __str__(self) -> str:
        buffers = ", ".join(f"{name} {size:,}" for name, size in self.buffers.items()) or "none"
        return (
            f"{self.path.name}, {self.header.name}: {self.ops} integer ops in {self.calls} calls\n"
            f"  flash (constants)       {self.flash:>12,} bytes\n"
            f"  RAM (static buffers)    {self.ram:>12,} bytes ({buffers})"
        )


def export_c(
    program: Program,
    path: str | os.PathLike[str],
    *,
    test_input: Any = None,
    name: str = "network",
    main: bool = True,
    pixels: Any = None,
) -> CReport:
    """Write ``program`` as C99 that computes its integers for one sample, bit for bit, and a header beside it.

    The file has ``<name>_quantize_input`` (float32 to codes), ``<name>_run_codes`` (integers only),
    ``<name>_dequantize_output`` (codes to float32) and, with ``pixels``, ``<name>_run_pixels``. Where there are several
    inputs or outputs, a number follows. The buffers are static: one run at a time. The header, ``path`` with the suffix
    ``.h``, declares them, with sizes and exponents of the codes; the file itself needs no header.

    Args:
        path: written as a whole or not at all.
        test_input: float32 for which ``main`` checks the codes; its first sample is taken, of several inputs a tuple.
            None draws codes.
        main: whether to write the check; ``-DLOWBIT_NO_MAIN`` leaves it out as well.
        pixels: (mean, std) for each channel: the network takes uint8 pixels [H, W, C] by a table of 256 codes. None:
            ``program.note["pixels"]``, if it is there.

    Raises:
        UnsupportedModelError: a float island or another op without integer form, by its path.
        ConfigError: no program, a name that C does not take, a path that is the header's, ``pixels`` that do not fit.
        ProgramError: another header of that name is there.
    """
    if not isinstance(program, Program):
        raise ConfigError(f"export_c: got {type(program).__name__}, expected a program: lower(module, example_input).")
    if not re.fullmatch(r"[A-Za-z]\w*", name, re.ASCII):
        raise ConfigError(f"export_c: name={name!r} cannot begin the name of a C function; use letters, digits and _.")
    path = Path(path)
    beside = path.with_suffix(".h")
    if path == beside:
        raise ConfigError(f"export_c: {path} is the place of the header. Give {path.with_suffix('.c')}.")
    require_ours(beside, FIRST.encode())
    writer = _Writer(program, name, program.note.get("pixels") if pixels is None else pixels)
    vector = writer.check(test_input) if main else ""
    write_atomically(path, writer.text(path.name, vector).encode())
    write_atomically(beside, f"{FIRST}: declarations of {path.name}. */\n{writer.header}\n".encode())
    sizes = (writer.source.flash, sum(writer.buffers.values()), writer.buffers)
    return CReport(path, beside, *sizes, len(writer.inner), len(writer.calls))


class _Writer:
    """The parts of one file."""

    def __init__(self, program: Program, name: str, pixels: Any) -> None:
        self.program, self.name, self.source = integers_inside(program), name, Source()
        self.values = values = one_sample(self.program.values)
        ops = self.program.ops
        self.entries = [op for op in ops if op.kind == "quantize"]
        self.inner = [op for op in ops if op.kind not in ("quantize", "dequantize")]
        makers = {op.output: op for op in ops}
        # Of each output the value that holds its codes, and the op that makes floats of them.
        self.ends = [
            (end.inputs[0] if end is not None and end.kind == "dequantize" else output, end)
            for output in self.program.outputs
            for end in [makers.get(output)]
        ]
        self._refuse_floats()
        steps = steps_of(self.program, values)
        given = dict(zip((op.output for op in self.entries), self._names("input", self.entries), strict=True))
        held = [op.output for op in self.entries] if pixels is not None else []
        self.plan: Plan = planned(steps, values, given, held, [codes for codes, _ in self.ends])
        self.calls = [call for step in steps if (call := self._call(step)) is not None]
        rows = dict[str, int]()
        for dtype, length in filter(None, (scratch(step, values) for step in steps)):
            rows[dtype] = max(rows.get(dtype, 0), length)
        self.arrays = [(ctype(dtype), arena(dtype), size) for dtype, size in self.plan.arenas.items() if size]
        self.arrays += [(ctype(dtype), f"row_{tag(dtype)}", size) for dtype, size in sorted(rows.items())]
        self.buffers = {label: size * int(re.sub(r"\D", "", kind)) // 8 for kind, label, size in self.arrays}
        self.functions = self._functions(pixels)
        self.header = self._header()

    def _refuse_floats(self) -> None:
        for op in self.inner:
            if op.kind != "argmax" and any(self.values[name].dtype != "int" for name in op.inputs):
                raise UnsupportedModelError(
                    f"{op.path}: {op.kind} reads numbers that are no codes; C computes with codes between quantize and "
                    "dequantize only. Lower the network from a layer that quantizes its input."
                )
            if op.kind not in (*PRODUCTS, *MOVES, "divide", "normalize", "requantize", "reshape", "threshold"):
                raise UnsupportedModelError(f"{op.path}: {op.kind} has no form in C. Update lightning_lowbit.")
        for codes, _ in self.ends:
            if self.values[codes].dtype == "float32":
                raise UnsupportedModelError(
                    f"{codes}: an output that no integer op makes. Leave it out of the outputs."
                )

    def _names(self, stem: str, things: Sequence[object]) -> list[str]:
        return [stem] if len(things) == 1 else [f"{stem}_{k}" for k in range(len(things))]

    def _call(self, step: Step) -> str | None:
        kind = None if step.base is None else step.base.kind
        if kind == "reshape":
            return None
        stages = [stage_of(op, self.values, self.source) for op in step.stages]
        write = PRODUCTS[kind] if kind in PRODUCTS else MOVES[kind]
        text = write(step, self.values, stages, self.source)
        places = {f"x{k}" if k else "x": self.plan.places[name] for k, name in enumerate(step.inputs)}
        shape = "x".join(map(str, self.values[step.output].shape))
        path = _comment(f"{step.path}: {', '.join(op.kind for op in (step.base, *step.stages) if op)} -> {shape}")
        return f"/* {path} */\n{text.format(**places, y=self.plan.places[step.output])}"

    def _functions(self, pixels: Any) -> list[str]:
        """The functions that others call, in the order in which they are written."""
        name, values, source = self.name, self.values, self.source
        inputs, outputs = self._names("input", self.entries), self._names("out", self.ends)
        functions = []
        for label, op in zip(inputs, self.entries, strict=True):
            functions.append(quantize_function(f"{name}_quantize_{label}", op, values[op.output], source))
        given = [f"const {ctype(values[op.output].storage)} *{i}" for i, op in zip(inputs, self.entries, strict=True)]
        taken = [f"{ctype(storage_of(values[c]))} *{o}" for o, (c, _) in zip(outputs, self.ends, strict=True)]
        copies = [
            f"memcpy({o}, {self.plan.places[c]}, {self._size(c)} * sizeof *{o});"
            for o, (c, _) in zip(outputs, self.ends, strict=True)
        ]
        body = indented("\n".join([*self.calls, *copies]), 1)
        functions.append(f"void {name}_run_codes({', '.join(given + taken)})\n{{\n{body}\n}}")
        for label, (codes, end) in zip(self._names("output", self.ends), self.ends, strict=True):
            if end is not None and end.kind == "dequantize":
                functions.append(dequantize_function(f"{name}_dequantize_{label}", end, values[codes], source))
        if pixels is not None:
            functions.append(self._run_pixels(pixels, taken, outputs))
        return functions

    def _run_pixels(self, pixels: Any, taken: Sequence[str], outputs: Sequence[str]) -> str:
        if len({op.inputs[0] for op in self.entries}) != 1:
            raise ConfigError(f"{self.name}: pixels= is for networks of one input, got {len(self.program.inputs)}.")
        places = [self.plan.places[f"{op.output}:held"] for op in self.entries]
        loops = [
            pixel_loop(op, self.values[op.output], pixels, place, self.source)
            for op, place in zip(self.entries, places, strict=True)
        ]
        body = indented("\n".join([*loops, f"{self.name}_run_codes({', '.join([*places, *outputs])});"]), 1)
        return f"void {self.name}_run_pixels(const uint8_t *nhwc, {', '.join(taken)})\n{{\n{body}\n}}"

    def _header(self) -> str:
        ends: list[tuple[str, str, Op | None]] = []
        ends += [
            (label, op.output, None) for label, op in zip(self._names("input", self.entries), self.entries, strict=True)
        ]
        ends += [(label, *end) for label, end in zip(self._names("output", self.ends), self.ends, strict=True)]
        numbers = {f"{label}_size": self._size(codes) for label, codes, _ in ends}
        for label, codes, op in ends:
            exponent = exponent_of(self.values[codes], op)
            if exponent is not None:
                numbers[f"{label}_exponent"] = exponent
        return header(self.name, numbers, [function.partition("\n")[0] for function in self.functions])

    def _size(self, value: str) -> int:
        return elements(self.values[value].shape)

    def check(self, test_input: Any) -> str:
        """``main``: a sample's codes, and what the numpy runtime makes of them."""
        arrays = trace(self.program, *self._sample(test_input))
        tables, compared = [], []
        inputs = self._names("test_input", self.entries)
        for label, op in zip(inputs, self.entries, strict=True):
            tables.append(_table(label, self.values[op.output].storage, arrays[op.output]))
        outputs, expected = self._names("got", self.ends), self._names("expected", self.ends)
        for out, want, (codes, _) in zip(outputs, expected, self.ends, strict=True):
            dtype = storage_of(self.values[codes])
            tables.append(_table(want, dtype, arrays[codes]))
            tables.append(f"static {ctype(dtype)} {out}[{self._size(codes)}];")
            compared.append(_COMPARED.format(size=self._size(codes), got=out, expected=want))
        call = f"{self.name}_run_codes({', '.join([*inputs, *outputs])});"
        origin = "drawn at random, since no test_input was given" if test_input is None else "test_input's first sample"
        return _MAIN.format(origin=origin, tables="\n".join(tables), call=call, compared="".join(compared))

    def _sample(self, test_input: Any) -> list[NDArray[Any]]:
        """One sample of every input, float32; codes drawn between the bounds of the quantize where none is given."""
        shapes = [self.values[name].shape for name in self.program.inputs]
        if test_input is None:
            generator, drawn = np.random.default_rng(0), []
            for name, shape in zip(self.program.inputs, shapes, strict=True):
                codes = next((self.values[op.output] for op in self.entries if op.inputs[0] == name), None)
                low, high, exponent = (0, 0, 0) if codes is None else (codes.low, codes.high, codes.exponent)
                numbers = generator.integers(low, high, shape, endpoint=True)
                drawn.append(np.ldexp(numbers, np.asarray(exponent)).astype(np.float32))
            return drawn
        many = list(test_input) if isinstance(test_input, (tuple, list)) else [test_input]
        plain = [np.asarray(x.detach().cpu()) if hasattr(x, "detach") else np.asarray(x) for x in many]
        return [x[: shape[0]] for x, shape in zip(plain, shapes, strict=False)] + plain[len(shapes) :]

    def text(self, file: str, check: str) -> str:
        """The whole file."""
        source = self.source
        notes = [f"{key}: {value}" for key, value in self.program.note.items() if isinstance(value, (str, int, float))]
        head = _HEAD.format(
            name=self.name,
            file=_comment(file),
            header=_comment(Path(file).with_suffix(".h").name),
            notes="".join(f"\n * {_comment(note)}" for note in notes),
            flash=f"{source.flash:,}",
            ram=f"{sum(self.buffers.values()):,}",
        )
        parts = [
            head,
            self.header,
            "#include <string.h>",
            *source.helpers.values(),
            *source.functions.values(),
            *(table for _, table in source.tables.values()),
            "\n".join(f"static {kind} {label}[{size}];" for kind, label, size in self.arrays),
            *self.functions,
            check,
        ]
        return "\n\n".join(part for part in parts if part) + "\n"


def _comment(text: str) -> str:
    """Text that can stand in a comment: one line, and nothing that ends or opens one."""
    return re.sub(r"\s+", " ", text).replace("*/", "* /").replace("/*", "/ *").replace("\\", "/")


def _table(label: str, dtype: str, numbers: NDArray[Any]) -> str:
    text = ",".join(literal(int(n)) for n in numbers.ravel())
    lines = re.sub(r"(.{90,}?,)", r"\1\n", text)
    return f"static const {ctype(dtype)} {label}[{numbers.size}] = {{\n{lines}\n}};"


_HEAD = """/* {file}: {name}, a network in integers, one sample at a time; written by lightning_lowbit.{notes}
 *
 * flash: {flash} bytes of constants; RAM: {ram} bytes of static buffers (one run at a time).
 * A test that prints "ok":   cc -std=c99 -O2 {file} -o {name} && ./{name}
 * Inside another program:    cc -std=c99 -O2 -DLOWBIT_NO_MAIN -c {file}, and #include "{header}".
 */"""

_COMPARED = """
    for (int32_t i = 0; i < {size}; ++i) {{
        if ({got}[i] != {expected}[i]) {{
            printf("{got}[%ld]: got %lld, expected %lld\\n", (long)i, (long long){got}[i], (long long){expected}[i]);
            return 1;
        }}
    }}"""

_MAIN = """#ifndef LOWBIT_NO_MAIN
#include <stdio.h>

/* The test vector: codes of the input ({origin}), and what they give. */
{tables}

int main(void)
{{
    {call}{compared}
    printf("ok\\n");
    return 0;
}}
#endif"""

"""``export`` and ``verify``: a trained network's integers as files, and whether they are its integers."""

from __future__ import annotations

import dataclasses
import itertools
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule

from lightning_lowbit.cli.network import (
    REFUSALS,
    STAGES,
    add_network,
    batches,
    first_batch,
    line_of,
    network,
    told,
    with_config,
)
from lightning_lowbit.cli.parser import LowBitParser
from lightning_lowbit.errors import ConfigError, InvariantError
from lightning_lowbit.export.c99 import export_c
from lightning_lowbit.export.c99_header import FIRST
from lightning_lowbit.export.lowering import lowering_of
from lightning_lowbit.export.onnx import export_onnx
from lightning_lowbit.export.program import IntegerProgram, require_ours
from lightning_lowbit.export.verify import verify as verify_program
from lightning_lowbit.reports.certificate import compare, read_certificate
from lightning_lowbit.reports.table import wrapped

__all__ = ["EXPORT_HELP", "VERIFY_HELP", "export", "verify"]

EXPORT_HELP = "Write the integers of a trained network as files: a program for numpy, ONNX, C."
VERIFY_HELP = "Say whether a program has its network's integers, or whether two runs of training hold the same bits."

SUFFIXES = {"program": ".lowbit", "onnx": ".onnx", "qdq": "_qdq.onnx", "clip": "_clip.onnx", "c": ".c"}


# -- export ----------------------------------------------------------------------------------------------------------
def export(words: list[str]) -> int:
    """Run ``lightning-lowbit export``: all files are written, or none.

    Returns:
        exit status: 0, or 1 where a form cannot hold the network, with the reason on stderr.
    """
    args = _export_parser().parse_args(with_config(words), defaults=False)
    return told(lambda: _export(args))


def _export_parser() -> LowBitParser:
    parser = LowBitParser(prog="lightning-lowbit export", description=EXPORT_HELP)
    add_network(parser)
    forms = "program (numpy alone), onnx (integers), qdq (ONNX for int8 kernels), clip (ONNX for TI's tools), c (C99)"
    parser.add_argument("--to", nargs="+", choices=list(SUFFIXES), required=True, help=f"One or more of: {forms}.")
    parser.add_argument(
        "--output", type=str, required=True,
        help="The file. For several forms, or without a suffix, the name that each form completes: "
        + ", ".join(f"NAME{suffix}" for suffix in SUFFIXES.values()) + ".",
    )  # fmt: skip
    parser.add_argument(
        "--input_shape", nargs="+", type=int,
        help="Of the input, its batch first: 1 3 32 32. Else the model's example_input_array, or a batch of --data.",
    )  # fmt: skip
    parser.add_argument(
        "--with_runtime", action="store_true",
        help="Of program: runtime.py beside it, which runs it with numpy alone; for islands runtime_float.py, too.",
    )  # fmt: skip
    parser.add_argument("--opset", type=int, help="Of ONNX files; each form has a default.")
    parser.add_argument(
        "--weight_type", choices=["int8", "uint8"], help="Of qdq; uint8 is exact on x86 without VNNI, and slower with."
    )
    parser.add_argument(
        "--allow_inexact", action="store_true",
        help="Write qdq even where it rounds otherwise than the network; needs --data, on which it is measured.",
    )  # fmt: skip
    parser.add_argument("--name", type=str, help="What names in C begin with (network).")
    pair = tuple[float | list[float], float | list[float]]
    parser.add_argument(
        "--pixels", type=pair, help="[mean, std], numbers or lists: C then takes uint8 images [H, W, C] as well."
    )
    return parser


def _export(args: Any) -> list[str]:
    targets = _targets(args.to, args.output, args.ckpt)
    module = network(args)
    batch = None if args.get("data") is None else first_batch(args, module)
    program = _lowered(module, args.get("input_shape"), batch)
    _require_ours(program, targets, bool(args.get("with_runtime")))
    samples = batch if batch is None or len(batch) > 1 else batch[0]
    folder = next(iter(targets.values())).parent
    # Beside their places, so that they can be moved there when all of them exist.
    with tempfile.TemporaryDirectory(prefix=".lowbit-", dir=folder) as staging:
        reports = [_write(form, program, Path(staging), path, args, samples) for form, path in targets.items()]
        for written in sorted(Path(staging).iterdir()):
            os.replace(written, folder / written.name)
    return reports


def _targets(forms: Sequence[str], output: str, ckpt: str) -> dict[str, Path]:
    """Form -> file."""
    forms, path = list(dict.fromkeys(forms)), Path(output)
    if len(forms) > 1 and path.suffix in (".lowbit", ".onnx", ".c"):
        raise ConfigError(
            f"--output {output}: one file for {len(forms)} forms ({', '.join(forms)}). Give a name without suffix, "
            f"{path.with_suffix('')}: each form completes it."
        )
    whole = len(forms) == 1 and bool(path.suffix)
    found = {form: path if whole else path.with_name(path.name + SUFFIXES[form]) for form in forms}
    for target in found.values():
        if target.is_dir() or not target.parent.is_dir():
            raise ConfigError(f"--output {target}: expected the path of a file, in a folder that exists.")
        if target.exists() and Path(ckpt).exists() and target.samefile(ckpt):
            raise ConfigError(f"--output {target}: that is the checkpoint. Give another name.")
    return found


def _require_ours(program: IntegerProgram, targets: dict[str, Path], with_runtime: bool) -> None:
    """ProgramError where a file that stands beside a form would replace one of somebody else's."""
    if "c" in targets:
        require_ours(targets["c"].with_suffix(".h"), FIRST.encode())
    if with_runtime and "program" not in targets:
        raise ConfigError("--with_runtime: it is for --to program, which is not among the forms.")
    for source in program.runtime_files() if with_runtime else ():
        require_ours(targets["program"].with_name(source.name), source.read_bytes().splitlines()[0])


def _lowered(module: LightningModule, shape: list[int] | None, batch: tuple[Any, ...] | None) -> IntegerProgram:
    example: Any = None
    if shape is not None:
        if min(shape) < 1:
            raise ConfigError(f"--input_shape {_spaced(shape)}: expected sizes of 1 or more, the batch first.")
        example = torch.zeros(shape)
    elif module.example_input_array is None:
        if batch is None:
            raise ConfigError(
                f"--input_shape: got none, and {type(module).__name__} has no example_input_array. Give the shape of "
                "a batch, as in --input_shape 1 3 32 32, or --data."
            )
        example = batch
    try:
        lowering = lowering_of(module, example)
    except (InvariantError, *REFUSALS):
        raise
    except Exception as error:  # of the user's forward
        given, way = "its example", ""
        if shape is not None:
            given = f"--input_shape {_spaced(shape)}"
            way = " The batch comes first, as in 1 3 32 32 (N C H W), and is made 2 to see what depends on it."
        raise ConfigError(
            f"{given}: the forward of {type(module).__name__} fails on it: {line_of(error)}{way}"
        ) from error
    said = [f"not followed: {part}" for part in lowering.program.note.get("not_followed", [])]
    print(*(f"warning: {words}\n" for words in [*said, lowering.doubt] if words), sep="", end="", file=sys.stderr)
    return lowering.program


def _write(form: str, program: IntegerProgram, staging: Path, target: Path, args: Any, samples: Any) -> str:
    """One file; gives what is to be said of it."""
    path = staging / target.name
    if form == "program":
        beside = bool(args.get("with_runtime"))
        program.save(path, with_runtime=beside)
        size = f"{path.name}: {len(program.ops)} operations, {path.stat().st_size:,} bytes"
        runs = f"python {target.with_name('runtime.py')} {target} input.npy output.npy"
        return f"{size}\n  " + (f"run it: {runs}" if beside else "--with_runtime writes what runs it without torch")
    if form == "c":
        name, pixels = args.get("name") or "network", args.get("pixels")
        return str(export_c(program, path, test_input=samples, name=name, pixels=pixels))
    options: dict[str, Any] = {"opset": args.get("opset")}
    if form == "qdq":
        options |= {"allow_inexact": bool(args.get("allow_inexact")), "samples": samples}
        options |= {"weight_type": args.get("weight_type") or "int8"}
    report = export_onnx(program, path, "integer" if form == "onnx" else form, **options)
    return str(dataclasses.replace(report, path=Path(path.name)))  # not where it lies for the moment


# -- verify ----------------------------------------------------------------------------------------------------------
def verify(words: list[str]) -> int:
    """Run ``lightning-lowbit verify``: of a program where ``--program`` is given, else of two certificates of training.

    Returns:
        exit status: 0 where everything agrees, 1 where it does not.
    Raises:
        ConfigError, ProgramError: what cannot be compared.
    """
    parser = _verify_parser()
    args = parser.parse_args(with_config(words), defaults=False)
    given = {name for name, _ in args.items(branches=True) if "." not in name}
    certificates = args.get("certificate") or []
    if "program" not in given:
        if len(certificates) != 2 or given != {"certificate"}:
            parser.error("expected --program FILE --ckpt FILE --model CLASS, or --certificate A B and nothing else")
        found = compare(*map(read_certificate, certificates))
        print(*wrapped(str(found).splitlines()), sep="\n")
        return int(found.parting is not None)
    if not {"ckpt", "model"} <= given or len(certificates) > 1:
        parser.error("--program needs --ckpt FILE and --model CLASS, and takes one --certificate, the file to write")
    certificate = _verified(args, Path(certificates[0]) if certificates else None)
    print(*wrapped(str(certificate).splitlines()), sep="\n")
    return int(not certificate.ok)


def _verify_parser() -> LowBitParser:
    parser = LowBitParser(prog="lightning-lowbit verify", description=VERIFY_HELP)
    parser.add_argument("--program", type=str, help="The file that export --to program wrote.")
    add_network(parser, required=False)
    parser.add_argument("--split", choices=list(STAGES), help="Whose batches are compared (val).")
    parser.add_argument("--batches", type=int, help="At most so many; else all.")
    parser.add_argument(
        "--certificate", nargs="+", type=str, metavar="FILE",
        help="With --program the file for the certificate (JSON). Without, two runs of training to compare: "
        "certificate.json, or a checkpoint, of either.",
    )  # fmt: skip
    return parser


def _verified(args: Any, output: Path | None) -> Any:
    if output is not None and (output.is_dir() or not output.parent.is_dir()):
        raise ConfigError(f"--certificate {output}: expected the path of a file, in a folder that exists.")
    if args.get("batches", 1) < 1:
        raise ConfigError(f"--batches {args.batches}: expected 1 or more.")
    if not Path(args.program).is_file():
        raise ConfigError(f"--program {args.program}: no such file.")
    program = IntegerProgram.load(args.program)
    module = network(args)
    certificate = verify_program(module, program, itertools.islice(batches(args, module), args.get("batches")))
    if output is not None:
        certificate.save(output)
    return certificate


def _spaced(shape: Sequence[int]) -> str:
    return " ".join(map(str, shape))

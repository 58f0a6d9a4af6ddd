"""Integer programs as files and reports; `runtime` runs them, without this package where it must."""

from __future__ import annotations

import io
import json
import os
import tempfile
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from hashlib import sha256
from pathlib import Path
from typing import Any, Self

import numpy as np

from lightning_lowbit.export import runtime
from lightning_lowbit.export.program_check import check
from lightning_lowbit.export.program_summary import ProgramSummary, summarized
from lightning_lowbit.export.runtime import Array, Op, Program, ProgramError, Value

__all__ = [
    "IntegerProgram",
    "Op",
    "Program",
    "ProgramError",
    "ProgramSummary",
    "Value",
    "digest",
    "require_ours",
    "write_atomically",
]


@dataclass(frozen=True, eq=False)
class IntegerProgram(Program):
    """A network as integers: `run` gives what its evaluation gives.

    Raises:
        ProgramError: the operations do not fit together.
    """

    def __post_init__(self) -> None:
        check(self)

    def run(self, *inputs: Any, integers: bool = False, pixels: Any = None) -> Any:
        """See `runtime.run`."""
        return runtime.run(self, *inputs, integers=integers, pixels=pixels)

    def __call__(self, *inputs: Any, integers: bool = False, pixels: Any = None) -> Any:
        return self.run(*inputs, integers=integers, pixels=pixels)

    def trace(self, *inputs: Any, given: Mapping[str, Array] | None = None, pixels: Any = None) -> dict[str, Array]:
        """See `runtime.trace`."""
        return runtime.trace(self, *inputs, given=given, pixels=pixels)

    def replace_op(self, index: int, op: Op) -> Self:
        """A copy with another operation in one place."""
        return replace(self, ops=(*self.ops[:index], op, *self.ops[index + 1 :]))

    def digest(self) -> str:
        """The sha256 that tells programs apart; it stands in the file."""
        return digest(self)

    def summary(self) -> ProgramSummary:
        """Islands, operations, bytes, products and how wide sums become; it prints as a table."""
        return summarized(self)

    def save(self, path: str | os.PathLike[str], with_runtime: bool = False) -> None:
        """Write one file, whole or not at all; the same program gives the same bytes.

        Args:
            with_runtime: copy ``runtime.py`` beside it, and ``runtime_float.py`` for float islands, so that
                ``python runtime.py program.lowbit input.npy`` runs it where only numpy is installed.
        """
        path = Path(path)
        write_atomically(path, _packed(self))
        if with_runtime:
            for source in self.runtime_files():
                _copy_beside(source, path.parent / source.name)

    def runtime_files(self) -> list[Path]:
        """What runs it where this package is not."""
        names = ["runtime.py"] + ["runtime_float.py"] * any(op.kind == "island" for op in self.ops)
        return [Path(runtime.__file__).with_name(name) for name in names]

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """A program from its file; see `runtime.load` for what is refused."""
        loaded = runtime.load(path)
        try:
            return cls(**{field.name: getattr(loaded, field.name) for field in fields(loaded)})
        except ProgramError as error:
            raise ProgramError(f"{path}: {error}") from error


def _copy_beside(source: Path, copy: Path) -> None:
    """A runtime's file, over an older copy of it but over nothing else."""
    ours = source.read_bytes()
    if copy.exists() and os.path.samefile(source, copy):
        return
    require_ours(copy, ours.splitlines()[0])
    write_atomically(copy, ours)


def require_ours(path: Path, first: bytes) -> None:
    """ProgramError where a file that is written beside another would replace one that does not begin like ours."""
    if path.exists() and not (path.is_file() and path.read_bytes().startswith(first)):
        raise ProgramError(f"{path}: there is another file of that name. Write into a folder of its own.")


def digest(program: Program) -> str:
    """The sha256 of a program: of what its file says and of its constants, not of the file."""
    return runtime.digest(*_described(program))


def write_atomically(path: str | os.PathLike[str], data: bytes) -> None:
    """Write a file whole or not at all: an error leaves what was there, and nothing beside it."""
    path = Path(path)
    if path.is_dir() or not path.parent.is_dir():
        raise ProgramError(f"{path}: expected the path of a file, in a folder that exists.")
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        os.chmod(name, 0o666 & ~_umask())
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _described(program: Program) -> tuple[dict[str, Any], dict[str, Array]]:
    """The document of a file without its hash, and the constants by their names there."""
    members: dict[str, Array] = {}
    ops = []
    for op in program.ops:
        names = {}
        for name, array in sorted(op.constants.items()):
            names[name] = f"c{len(members)}"
            members[names[name]] = np.ascontiguousarray(array)
        ops.append(
            {
                "kind": op.kind,
                "path": op.path,
                "inputs": op.inputs,
                "output": op.output,
                "attributes": dict(sorted(op.attributes.items())),
                "constants": names,
            }
        )
    order = (*program.inputs, *(op.output for op in program.ops))
    document = {
        "format": runtime.FORMAT,
        "note": program.note,
        "inputs": program.inputs,
        "outputs": program.outputs,
        "structure": program.structure,
        "values": [{f.name: getattr(program.values[name], f.name) for f in fields(Value)} for name in order],
        "ops": ops,
    }
    # Through JSON once: tuples become lists and numpy's numbers Python's, as they will be read.
    return json.loads(json.dumps(document, default=_plain)), members


def _plain(value: Any) -> Any:
    if isinstance(value, np.ndarray | np.generic):
        return value.tolist()
    raise TypeError(f"a program's attributes and note are plain JSON, got {type(value).__name__}: {value!r}")


def _packed(program: Program) -> bytes:
    document, members = _described(program)
    document["sha256"] = runtime.digest(document, members)
    text = np.frombuffer(json.dumps(document).encode(), np.uint8)
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w", zipfile.ZIP_STORED) as archive:
        for name, array in {"program.json": text, **members}.items():
            member = io.BytesIO()
            np.lib.format.write_array(member, array, version=(1, 0), allow_pickle=False)
            # ZipInfo's own date is that of 1980: the same program gives the same bytes on every day.
            archive.writestr(zipfile.ZipInfo(f"{name}.npy"), member.getvalue())
        archive.comment = b"0" * runtime.SEAL
    whole = data.getvalue()[: -runtime.SEAL]
    return whole + sha256(whole).hexdigest().encode()

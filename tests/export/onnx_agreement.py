"""ONNX Runtime beside the program: bits."""

from __future__ import annotations

import numpy as np
import onnx

from lightning_lowbit.export.onnx import export_onnx
from lightning_lowbit.export.onnx_checks import session
from lightning_lowbit.export.runtime import run


def agree(tmp_path, writer, *values, form="integer", **options):
    """Export, run with and without ONNX Runtime's own rewriting, and compare the bits with the program's."""
    program, path = writer.program(*values), tmp_path / "net.onnx"
    report = export_onnx(program, path, form, **options)
    samples = writer.samples()
    wanted = run(program, *samples)
    wanted = wanted if isinstance(wanted, tuple) else (wanted,)
    names = [info.name for info in onnx.load(path).graph.input]
    for optimize in (True, False):
        found = session(path.read_bytes(), optimize=optimize).run(None, dict(zip(names, samples, strict=True)))
        for got, want in zip(found, wanted, strict=True):
            assert got.dtype == want.dtype
            np.testing.assert_array_equal(got, want)
    assert any(want.any() for want in wanted), "all zero: this proves nothing"
    return report

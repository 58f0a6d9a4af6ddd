"""Every scheme's page says which function computes an equation, and which golden vectors hold it: so it is."""

from __future__ import annotations

import importlib
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from schemes.vector_table import Comparison
from test_readme import rows

import lightning_lowbit

ROOT = Path(__file__).parents[1]
VECTORS = ROOT / "tests" / "vectors"
PACKAGE = Path(lightning_lowbit.__file__).parent
SCHEMES = sorted(path.name for path in VECTORS.iterdir() if path.is_dir())
HEADING = re.compile(r"^## ((?:\d+\. )?From equation to vector)$", re.MULTILINE)


def page(scheme: str) -> str:
    return (ROOT / "docs" / f"{scheme}.md").read_text()


def table(scheme: str) -> list[tuple[list[str], str, list[str]]]:
    """Functions, their file and the names of vectors, row by row."""
    (heading,) = HEADING.findall(page(scheme))
    return [
        (re.findall(r"`(.*?)`", functions), file.strip("`"), re.findall(r"`(.*?)`", vectors))
        for _, functions, file, vectors in rows(page(scheme), heading)
    ]


def calls_of(scheme: str, name: str) -> set[tuple[str, str]]:
    """File and name of what is called in the package while a file of vectors is compared."""
    calls = set()

    def note(frame: Any, event: str, _: Any) -> None:
        if frame.f_code.co_filename.startswith(str(PACKAGE)):
            file = Path(frame.f_code.co_filename).relative_to(PACKAGE).as_posix()
            calls.add((file, frame.f_code.co_qualname))

    with np.load(VECTORS / scheme / f"{name}.npz", allow_pickle=False) as file:
        comparison = Comparison({key: file[key] for key in file.files})
    check = importlib.import_module(f"schemes.vectors_{scheme}").FILES[name].check
    before = sys.gettrace()
    sys.settrace(note)  # calls alone: nobody is asked to trace lines
    try:
        check(comparison)
    finally:
        sys.settrace(before)
    return calls


@pytest.mark.parametrize("scheme", SCHEMES)
def test_functions_are_where_the_page_says_and_are_called_for_their_vectors(scheme: str) -> None:
    called: dict[str, set[tuple[str, str]]] = {}
    for functions, file, (first, *_) in table(scheme):
        assert functions
        if first.endswith(".py") or "*" in first:  # a test of its own, or whole networks, which take seconds
            module = importlib.import_module("lightning_lowbit." + file.removesuffix(".py").replace("/", "."))
            assert all(hasattr(module, function) for function in functions)
            continue
        called[first] = called.get(first) or calls_of(scheme, first)
        missing = {(file, function) for function in functions} - called[first]
        assert not missing, first


@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_file_of_vectors_stands_on_the_page(scheme: str) -> None:
    named = {name for *_, vectors in table(scheme) for name in vectors}
    for name in named:
        assert (ROOT / name).exists() if name.endswith(".py") else list((VECTORS / scheme).glob(f"{name}.npz")), name
    behind = re.split(HEADING, page(scheme))[-1]
    spelled = named | set(re.findall(r"`(\w+)`", behind))
    held = {path.stem for name in spelled for path in (VECTORS / scheme).glob(f"{name}.npz")}
    assert held == {path.stem for path in (VECTORS / scheme).glob("*.npz")}

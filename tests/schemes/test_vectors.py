"""Golden vectors of every scheme: each array classed, each output computed anew and compared.

A scheme adds ``vectors_<scheme>.py`` beside this file, with ``FILES``, and a folder of .npz under
``tests/vectors``. ``LOWBIT_VECTORS`` names another parent folder, with other seeds, shapes and lengths.
"""

from __future__ import annotations

import importlib
import os
from pathlib import Path

import numpy as np
import pytest
from schemes.vector_table import Comparison, Kind, VectorFile

HERE = Path(__file__).parent
OVERRIDE = os.environ.get("LOWBIT_VECTORS")
VECTORS = Path(OVERRIDE) if OVERRIDE else HERE.parent / "vectors"
MOST_EXCLUDED = 0.05
TABLES: dict[str, dict[str, VectorFile]] = {
    path.stem.removeprefix("vectors_"): importlib.import_module(f"schemes.{path.stem}").FILES
    for path in sorted(HERE.glob("vectors_*.py"))
}


def stored(scheme: str) -> list[str]:
    return sorted(path.stem for path in (VECTORS / scheme).glob("*.npz"))


CASES = [pytest.param(scheme, name, id=f"{scheme}-{name}") for scheme in TABLES for name in stored(scheme)]


def kinds_of(table: VectorFile, keys: list[str]) -> dict[str, Kind]:
    """Every key's kind; fails by name on a key that the table does not class."""
    kinds = {key: table.kind(key) for key in keys}
    unknown = [key for key, kind in kinds.items() if kind is None]
    assert not unknown, f"keys that no pattern classes: {unknown}"
    return {key: kind for key, kind in kinds.items() if kind is not None}


def account(table: VectorFile, arrays: dict[str, np.ndarray]) -> str:
    """Run a file's check; fails if an output or a quirk was left out, else says what was compared."""
    kinds = kinds_of(table, list(arrays))
    comparison = Comparison(arrays)
    table.check(comparison)
    owed = {key for key, kind in kinds.items() if kind in (Kind.OUTPUT, Kind.QUIRK, Kind.TAIL)}
    assert owed == comparison.done, (
        f"never compared: {sorted(owed - comparison.done)}; "
        f"compared and not classed as output, quirk or tail: {sorted(comparison.done - owed)}"
    )
    numbers = [f"{sum(k is kind for k in kinds.values())} {kind}" for kind in Kind]
    return "; ".join([", ".join(numbers), *comparison.notes])


@pytest.mark.parametrize(("scheme", "name"), CASES)
def test_vectors(scheme: str, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    table = TABLES[scheme].get(name)
    assert table is not None, f"{VECTORS / scheme / name}.npz has no table; known: {sorted(TABLES[scheme])}"
    with np.load(VECTORS / scheme / f"{name}.npz", allow_pickle=False) as file:
        arrays = {key: file[key] for key in file.files}
    line = account(table, arrays)
    with capsys.disabled():
        print(f"\n{scheme}/{name}: {line}", end=" ")


@pytest.mark.parametrize("scheme", TABLES)
def test_a_scheme_s_files_are_all_there_and_few_outputs_are_excluded(scheme: str) -> None:
    if OVERRIDE and not stored(scheme):
        pytest.skip(f"{OVERRIDE} has no folder {scheme}")
    assert stored(scheme) == sorted(TABLES[scheme])
    kinds: list[Kind] = []
    for name in stored(scheme):
        with np.load(VECTORS / scheme / f"{name}.npz", allow_pickle=False) as file:
            kinds += kinds_of(TABLES[scheme][name], list(file.files)).values()
    outputs, excluded = kinds.count(Kind.OUTPUT), kinds.count(Kind.EXCLUDED)
    assert outputs > 0
    assert excluded <= MOST_EXCLUDED * (outputs + excluded), f"{excluded} excluded, {outputs} compared"


def test_every_folder_of_vectors_has_a_table() -> None:
    folders = {path.name for path in VECTORS.iterdir() if path.is_dir()}
    if OVERRIDE:
        assert folders & set(TABLES), f"{OVERRIDE} holds none of {sorted(TABLES)}"
    else:
        assert folders == set(TABLES)


class TestTheHarness:
    """What it must not let pass."""

    keys = {"x": Kind.INPUT, "y": Kind.OUTPUT}  # noqa: RUF012
    arrays = {"x": np.float64([1, 2]), "y": np.float64([2, 4])}  # noqa: RUF012

    def test_a_right_result_passes(self) -> None:
        line = account(VectorFile(self.keys, lambda v: v.exact("y", 2 * v["x"])), self.arrays)
        assert line.startswith("1 input, 1 output, 0 quirk")

    def test_an_unclassed_key_fails(self) -> None:
        with pytest.raises(AssertionError, match=r"no pattern classes: \['z'\]"):
            account(VectorFile(self.keys, lambda v: v.exact("y", 2 * v["x"])), {**self.arrays, "z": np.zeros(1)})

    def test_an_output_left_out_fails(self) -> None:
        with pytest.raises(AssertionError, match=r"never compared: \['y'\]"):
            account(VectorFile(self.keys, lambda v: None), self.arrays)

    def test_an_input_compared_with_itself_fails(self) -> None:
        def check(v: Comparison) -> None:
            v.exact("y", 2 * v["x"])
            v.exact("x", v["x"])

        with pytest.raises(AssertionError, match=r"not classed as output, quirk or tail: \['x'\]"):
            account(VectorFile(self.keys, check), self.arrays)

    @pytest.mark.parametrize("got", [np.float64([2, 4.0001]), np.float64([2, np.nan]), np.float64([2])])
    def test_a_wrong_result_fails(self, got: np.ndarray) -> None:
        for check in (lambda v: v.exact("y", got), lambda v: v.close("y", got, rtol=1e-6)):
            with pytest.raises(AssertionError, match="y: "):
                account(VectorFile(self.keys, check), self.arrays)

    def test_a_tail_is_reported_up_to_its_first_flip(self) -> None:
        table = VectorFile({"w": Kind.TAIL}, lambda v: v.tail("w", np.float64([[1, 1], [1, 1], [-1, 1]])))
        assert "signs agree for 2 of 3 steps" in account(table, {"w": np.ones((3, 2))})

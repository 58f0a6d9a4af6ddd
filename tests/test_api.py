"""The public surface: short, written down, and free of charge until it is used."""

from __future__ import annotations

import ast
import importlib.metadata
import re
import subprocess
import sys
from pathlib import Path

import pytest

import lightning_lowbit

API = Path(__file__).parents[1] / "docs" / "api.md"


def test_all_is_what_the_document_lists() -> None:
    section = API.read_text(encoding="utf-8").partition("## From `lightning_lowbit`")[2].partition("\n## ")[0]
    listed = re.findall(r"^\| `(\w+)` \|", section, flags=re.MULTILINE)
    assert sorted(listed) == sorted(lightning_lowbit.__all__)


@pytest.mark.parametrize("name", lightning_lowbit.__all__)
def test_every_name_imports(name: str) -> None:
    value = getattr(lightning_lowbit, name)
    assert value.__name__ == name
    assert value.__module__.startswith("lightning_lowbit.")


@pytest.mark.parametrize("module", ["demos", "errors", "schemes"])
def test_names_listed_for_a_module_exist(module: str) -> None:
    pattern = rf"^\| `lightning_lowbit\.{module}` \| (.*) \|$"
    row = re.search(pattern, API.read_text(encoding="utf-8"), re.MULTILINE)
    assert row is not None
    names = re.findall(r"`(\w+)`", row[1])
    assert names
    value = importlib.import_module(f"lightning_lowbit.{module}")
    assert [name for name in names if not hasattr(value, name)] == []


def test_type_checkers_see_what_runs() -> None:
    """The imports under TYPE_CHECKING name the same modules as the table that serves them."""
    source = Path(lightning_lowbit.__file__).read_text(encoding="utf-8")
    seen = {
        alias.name: (node.module or "").removeprefix("lightning_lowbit.")
        for block in ast.parse(source).body
        if isinstance(block, ast.If)  # TYPE_CHECKING
        for node in block.body
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("lightning_lowbit.")
        for alias in node.names
    }
    assert seen == lightning_lowbit._HOME
    assert sorted(seen) == sorted(lightning_lowbit.__all__)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'Nonesuch'"):
        lightning_lowbit.Nonesuch  # noqa: B018  # the access is the test


def test_dir_lists_names_before_they_are_loaded() -> None:
    assert set(lightning_lowbit.__all__) <= set(dir(lightning_lowbit))


def test_importing_the_root_imports_neither_torch_nor_lightning() -> None:
    heavy = ("torch", "lightning", "pytorch_lightning", "torchmetrics", "numpy")
    program = f"import sys, lightning_lowbit; print(sorted(set({heavy!r}) & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "[]"


def test_the_console_script_and_its_extra_are_declared() -> None:
    (script,) = importlib.metadata.entry_points(group="console_scripts", name="lightning-lowbit")
    assert script.value == "lightning_lowbit.cli:main"
    assert "cli" in importlib.metadata.metadata("lightning-lowbit").get_all("Provides-Extra", [])

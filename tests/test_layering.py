"""Imports may only point down the list; Lightning is known from `plugins` upward."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import lightning_lowbit

ORDER = (
    "numerics", "kernels", "graph", "modules", "schemes", "export", "reports",
    "plugins", "callbacks", "integrations", "cli", "demos",
)  # fmt: skip
PACKAGE = "lightning_lowbit"
ROOT = Path(lightning_lowbit.__file__).parent
LIGHTNING = ("lightning", "lightning_fabric", "pytorch_lightning")


def imports(path: Path, root: Path) -> Iterator[tuple[int, str]]:
    """Line and dotted name of each import, wherever it stands; relative ones are resolved."""
    package = (PACKAGE, *path.relative_to(root).parts[:-1])
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            stem = ".".join(part for part in (base, node.module) if part)
            yield from ((node.lineno, f"{stem}.{alias.name}") for alias in node.names)


def objection(mine: str, name: str, exports: dict[str, str]) -> str | None:
    """Why a file of layer ``mine`` must not import ``name``; None where it may."""
    top, *rest = name.split(".")
    if top in LIGHTNING:
        return None if mine in ORDER[ORDER.index("plugins") :] else f"{mine} must not know Lightning"
    if top != PACKAGE:
        return None
    if not rest:
        return "below the root nobody imports the root itself"
    # A name that the root re-exports counts as the module that it comes from.
    layer = exports.get(rest[0], rest[0]).partition(".")[0]
    if layer == "errors":
        return None
    if layer not in ORDER:
        return f"{rest[0]} is neither a layer nor a public name"
    if mine not in ORDER or ORDER.index(layer) > ORDER.index(mine):
        return f"{mine} stands below {layer}"
    return None


def violations(root: Path, exports: dict[str, str]) -> list[str]:
    """One line for each import that points up and each file outside the order."""
    found = []
    for path in sorted(root.rglob("*.py")):
        where = path.relative_to(root)
        mine = where.parts[0].removesuffix(".py")
        if mine == "__init__":
            continue  # the root re-exports from every layer
        if mine not in (*ORDER, "errors"):
            found.append(f"{where}: {mine} has no place in the order")
            continue
        for line, name in imports(path, root):
            if reason := objection(mine, name, exports):
                found.append(f"{where}:{line} imports {name}: {reason}")
    return found


def test_imports_point_down() -> None:
    wrong = violations(ROOT, lightning_lowbit._HOME)
    assert not wrong, "\n".join(wrong)


def test_the_package_was_read() -> None:
    """A wrong ROOT would make the test above pass on nothing."""
    layers = {path.relative_to(ROOT).parts[0].removesuffix(".py") for path in ROOT.rglob("*.py")}
    assert {"numerics", "modules", "schemes", "plugins", "callbacks", "cli", "demos", "errors"} <= layers


EXPORTS = {"QuantCallback": "callbacks.quant", "Scheme": "modules.base"}
BAD = {
    "upward": ("graph/a.py", "import lightning_lowbit.modules.base", "graph stands below modules"),
    "upward relative": ("modules/a.py", "from ..schemes import tqt", "modules stands below schemes"),
    "upward in a function": (
        "graph/a.py", "def f():\n    import lightning_lowbit.plugins.rng", "graph stands below plugins",
    ),
    "upward for a type": (
        "modules/a.py",
        "if TYPE_CHECKING:\n    from lightning_lowbit.callbacks.quant import QuantCallback",
        "modules stands below callbacks",
    ),
    "re-export from above": (
        "modules/a.py", "from lightning_lowbit import QuantCallback", "modules stands below callbacks",
    ),
    "the root itself": ("callbacks/a.py", "import lightning_lowbit", "nobody imports the root itself"),
    "the root by dots": ("callbacks/a.py", "from .. import Unheard", "neither a layer nor a public name"),
    "all of the root": ("cli.py", "from lightning_lowbit import *", "neither a layer nor a public name"),
    "unknown name": ("cli.py", "from lightning_lowbit.helpers import x", "helpers is neither a layer nor"),
    "Lightning too low": ("reports/a.py", "from lightning.pytorch import Trainer", "must not know Lightning"),
    "Lightning's other name": ("export/a.py", "import pytorch_lightning", "must not know Lightning"),
    "errors know nobody": ("errors.py", "import lightning_lowbit.numerics", "errors stands below numerics"),
    "file outside the order": ("helpers.py", "import math", "helpers has no place in the order"),
}  # fmt: skip
GOOD = {
    "downward": ("schemes/a.py", "from lightning_lowbit.numerics.grid import Grid"),
    "own folder": ("graph/a.py", "from . import trace\nfrom .patterns import Site"),
    "errors from the bottom": ("numerics/a.py", "from lightning_lowbit.errors import ConfigError"),
    "downward for a type": (
        "callbacks/a.py",
        "if TYPE_CHECKING:\n    from lightning_lowbit.modules.base import Scheme",
    ),
    "re-export from below": ("plugins/a.py", "from lightning_lowbit import Scheme"),
    "Lightning from plugins up": ("plugins/a.py", "import lightning.pytorch as pl"),
    "foreign": ("numerics/a.py", "import torch, math\nfrom lightning_utilities import x"),
}


def tree(root: Path, file: str, source: str) -> Path:
    path = root / file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(source, encoding="utf-8")
    return root


@pytest.mark.parametrize(("file", "source", "reason"), BAD.values(), ids=BAD)
def test_a_bad_import_is_found(tmp_path: Path, file: str, source: str, reason: str) -> None:
    found = violations(tree(tmp_path, file, source), EXPORTS)
    assert len(found) == 1
    assert found[0].startswith(file)
    assert reason in found[0]


@pytest.mark.parametrize(("file", "source"), GOOD.values(), ids=GOOD)
def test_a_good_import_is_left_alone(tmp_path: Path, file: str, source: str) -> None:
    assert violations(tree(tmp_path, file, source), EXPORTS) == []

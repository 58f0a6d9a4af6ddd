"""``schemes``: what each scheme quantizes and exports, and what its options mean, from the classes themselves."""

from __future__ import annotations

import dataclasses
import inspect
import re
import shutil
import sys
import textwrap
import typing
from collections.abc import Sequence
from typing import Any, cast

from lightning_lowbit.cli.measured import measured
from lightning_lowbit.cli.parser import LowBitParser
from lightning_lowbit.cli.settings import import_path, requires_options, scheme_class
from lightning_lowbit.modules.base import Scheme
from lightning_lowbit.schemes import registry, require_usable

__all__ = ["SCHEMES_HELP", "schemes"]

SCHEMES_HELP = "List the schemes that quant.scheme knows by name: what they quantize and export; or one's options."
HEAD = ("scheme", "weights", "activations", "biases", "errors", "norms", "exported to")
FOOT = (
    "Bits of codes, and what `export --to` writes, of a small residual network converted at the defaults; 8..18 are "
    "the narrowest and the widest of several tensors, folded norms are merged into the layers before them. "
    "`lightning-lowbit schemes NAME` explains the options of one; `quant.scheme: float` converts nothing."
)
KEY_OPTIONS = 6
_ENTRY = re.compile(r"    (\w+): (.*)")  # of "Args:" in a docstring: a name and its meaning


def schemes(words: list[str]) -> int:
    """Run ``lightning-lowbit schemes [NAME]``.

    Returns:
        exit status 0.
    Raises:
        ConfigError: no scheme is called so; it names the nearest. A class that cannot be used as a scheme.
    """
    parser = LowBitParser(prog="lightning-lowbit schemes", description=SCHEMES_HELP)
    parser.add_argument(
        "name", nargs="?", type=str, help="A scheme whose options are listed: its name, or its class path."
    )
    name = parser.parse_args(words).name
    if name is None:
        _overview()
    else:
        _options(scheme_class(name))
    return 0


def _overview() -> None:
    rows, notes = [], []
    for name, cls in sorted(registry().items()):
        found = measured(cls)
        forms = " ".join(found.forms) or "-"
        rows.append((name, found.weights, found.activations, found.biases, found.errors, found.norms, forms))
        lines = [*_about(cls), f"scheme: {import_path(cls)}", f"update: {found.update}", _key_options(cls)]
        notes.append((name, lines + [f"not exported: {found.note}"] * bool(found.note)))
    _table(HEAD, rows)
    indent = 2 + max(len(name) for name, _ in notes)
    for name, lines in notes:
        print()
        for row, line in enumerate(lines):
            _paragraph(line, "" if row else name, indent)
    print()
    _paragraph(FOOT, "", 0)


def _about(cls: type[Scheme]) -> list[str]:
    """The paper, and what it is."""
    paper = (getattr(sys.modules.get(cls.__module__), "__doc__", None) or "").partition("\n")[0]
    summary = (inspect.getdoc(cls) or "").partition("\n")[0]
    return [line for line in (paper, summary) if line]


def _key_options(cls: type[Scheme]) -> str:
    """The first options, which are those that matter most, with the values that they take."""
    values = [f"{name}={value!r}" for name, _, value, _ in _fields(cls) if value is not None]
    more = " ..." if len(values) > KEY_OPTIONS else ""
    return f"defaults: {' '.join(values[:KEY_OPTIONS])}{more}" if values else "no options"


def _options(cls: type[Scheme]) -> None:
    """Everything that is to be said of one scheme; ConfigError of a class that cannot be used as one."""
    require_usable(cls)
    for line in (f"scheme: {import_path(cls)}", *_about(cls)):
        _paragraph(line, "", 0)
    print()
    meanings = _meanings(cls)
    rows = []
    for name, default, value, choices in _fields(cls):
        given = default if value is None or repr(value) == default else f"{default} ({value!r})"
        meaning = meanings.get(name, "")
        unsaid = [choice for choice in choices if choice.strip("'") not in meaning]
        rows.append((name, given, " ".join([meaning, *([f"[{' | '.join(choices)}]"] * bool(unsaid))])))
    _table(("option", "default", "what it does"), rows)


def _fields(cls: type[Scheme]) -> list[tuple[str, str, Any, list[str]]]:
    """Name, default, the value that it leads to (None where that is open), and the values to choose from."""
    if not hasattr(cls, "__dataclass_fields__"):  # an installed one whose author forgot it; the table says so
        return []
    # Every concrete scheme is a dataclass, which the type of the base class cannot say.
    fields = [field for field in dataclasses.fields(cast("Any", cls)) if field.init]
    made = None if requires_options(cls) else cls()
    try:
        hints = typing.get_type_hints(cls)
    except NameError:  # a type that is imported for checkers alone
        hints = {}
    return [
        (field.name, _default(field), getattr(made, field.name, None), _choices(hints.get(field.name)))
        for field in fields
    ]


def _default(field: dataclasses.Field[Any]) -> str:
    if field.default_factory is not dataclasses.MISSING:
        return repr(field.default_factory())
    return "(required)" if field.default is dataclasses.MISSING else repr(field.default)


def _choices(hint: Any) -> list[str]:
    if typing.get_origin(hint) is typing.Literal:
        return [repr(choice) for choice in typing.get_args(hint)]
    return [choice for part in typing.get_args(hint) for choice in _choices(part)]


def _meanings(cls: type[Scheme]) -> dict[str, str]:
    """Option -> its text under "Args:" in the class's docstring."""
    found: dict[str, str] = {}
    name = ""
    for line in (inspect.getdoc(cls) or "").partition("Args:\n")[2].splitlines():
        if not line.startswith("    "):
            break
        if entry := _ENTRY.fullmatch(line):
            name, found[entry[1]] = entry[1], entry[2]
        elif name:
            found[name] += f" {line.strip()}"
    return found


# -- printing --------------------------------------------------------------------------------------------------------
def _width() -> int:
    return shutil.get_terminal_size().columns


def _paragraph(text: str, name: str, indent: int) -> None:
    print(textwrap.fill(text, _width(), initial_indent=f"{name:<{indent}}", subsequent_indent=" " * indent))


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Columns as wide as they need, the last one wrapped; with rules and color where rich is installed."""
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)][:-1]
    widths = [min(width, 24) for width in widths]
    widths.append(max(16, _width() - sum(widths) - 2 * len(widths)))
    try:
        from rich import box
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        for row in (head, ["-" * width for width in widths], *rows):
            cells = [textwrap.wrap(cell, width) or [""] for cell, width in zip(row, widths, strict=True)]
            for number in range(max(map(len, cells))):
                line = [cell[number] if number < len(cell) else "" for cell in cells]
                print("  ".join(f"{text:<{w}}" for text, w in zip(line, widths, strict=True)).rstrip())
        return
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    for name, width in zip(head, widths, strict=True):
        table.add_column(name, width=width, style="bold" if name == head[0] else None)
    for row in rows:
        table.add_row(*(cell.replace("[", r"\[") for cell in row))
    Console(width=_width()).print(table, highlight=False)

"""Lightning's parser, whose errors are one sentence: the option, what it got, what was expected, the nearest name."""

from __future__ import annotations

import difflib
import importlib
import re
from typing import Any, NoReturn

from lightning.pytorch import Callback, LightningDataModule, LightningModule
from lightning.pytorch.cli import LightningArgumentParser
from lightning.pytorch.loggers import Logger
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from lightning_lowbit.errors import nearest

__all__ = ["DEMOS", "LowBitParser"]

DEMOS = "lightning_lowbit.demos"
KINDS = {cls.__name__: cls for cls in (LightningModule, LightningDataModule, Callback, Logger, Optimizer, LRScheduler)}
"""What the command line takes a class for."""

MOST = 32  # names in a list that is read

# What jsonargparse says; the group is the name that it does not know.
UNKNOWN_OPTION = re.compile(
    r"Option '([^']+)' is not accepted$|does not accept option '([^']+)'$|unrecognized arguments: --([\w.]+)"
)
UNKNOWN_SUBCOMMAND = re.compile(r"argument subcommand: invalid choice: '([^']+)' \(choose from (.*)\)")
UNKNOWN_CHOICE = re.compile(r"invalid choice: '([^']+)' \(choose from (.*)\)")
REQUIRED = re.compile(r"^the following arguments are required: (?:\w+\.)?(\w+)$")

# Of its tree of what it tried, one try an alternative of the type: the key, and why each was no good.
KEY = re.compile(r'\AParser key "([^"]+)":\s')
OF_CLASS = re.compile(r"Problem with given class_path '([^']+)':\s+(.*?)(?=\n\s*- |\n\s*Given value|\Z)", re.DOTALL)
NOT_IMPORTED = re.compile(r"Expected a dot import path string: (.*)")
OTHER_CLASS = re.compile(r"(?:not correspond to a|Not a valid) subclass of (\w+)")
TYPE = re.compile(r"Expected an? (.+?)(?:\. Got value: .*)?$", re.MULTILINE)
GOT = re.compile(r"(?:Got value|Given value): (.*)")
NO_FILE = re.compile(r'Unable to load config "([^"]*)"')
NAMED_KIND = re.compile(r"\.(" + "|".join(KINDS) + r")\b")


class LowBitParser(LightningArgumentParser):
    """Lightning's parser; what is wrong is said in a sentence, without the list of all options above it."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Exit with status 2 and say why; the parser of a nested class hands it to the one around it."""
        message = _sentence(message + self._hint(message, ex))
        if not self.exit_on_error:
            super().error(message, ex)
        parser = getattr(ex, "subcommand_parser", None) or self
        self.exit(2, f"error: {message}\nFor the usage: {parser.prog.replace(' [options]', '')} --help\n")

    def _hint(self, message: str, ex: Exception | None) -> str:
        if match := UNKNOWN_SUBCOMMAND.search(message):
            near = nearest(match[1], re.findall(r"'(\w+)'", match[2]))
            return "." + (near if "mean" in near else " The command comes first: lightning-lowbit fit ...")
        if match := UNKNOWN_CHOICE.search(message):
            near = nearest(match[1], re.findall(r"'(\w+)'", match[2]))
            return "." + (near if "mean" in near else "")  # all of them stand there already
        if match := UNKNOWN_OPTION.search(message):
            # An option of a nested class is reported by that class's own parser, which comes here first.
            parser = getattr(ex, "subcommand_parser", None) or self
            options = [text[2:] for action in parser._actions for text in action.option_strings]
            word = next(group for group in match.groups() if group)
            known = [name for name in options if name and not name.endswith(("help", "print_shtab"))]
            if difflib.get_close_matches(word, ["class_path", "init_args"], n=1):
                known += ["class_path", "init_args"]
            near = nearest(word, known)
            return "." + (near if "mean" in near or 0 < len(known) <= MOST else "")
        return ""


def _sentence(message: str) -> str:
    """jsonargparse's tree as ``key: what it got, what was expected``; what is not of that form stays as it is."""
    if match := REQUIRED.search(message):
        return f"--{match[1]}: expected, and not given."
    match = KEY.match(message)
    if match is None:
        return message
    key, text = match[1], message[match.end() :]
    got = [value.strip() for value in GOT.findall(text)]
    kind = next(iter(NAMED_KIND.findall(text)), "class")
    if found := OF_CLASS.search(text):
        return _in_class(key, found[1], " ".join(found[2].split()), kind)
    if found := NOT_IMPORTED.search(text):
        return f"{key}: {_unknown_class(found[1].strip(), kind)}"
    if found := OTHER_CLASS.search(text):
        value = got[-1] if got else "this"
        return f"{key}: {value} is no {found[1]}. Expected a class path, or class_path: and init_args: of one."
    if found := NO_FILE.search(text):
        return f"{key}: {found[1]!r} is no file. Expected one with the options of {key}, or --{key}.NAME VALUE."
    if (types := TYPE.findall(text)) and got:
        choices = [choice for name in types if name.startswith("typing.Literal") for choice in _choices(name)]
        plain = [_type(name) for name in types if not name.startswith("typing.Literal")]
        expected = " or ".join(dict.fromkeys([", ".join(choices)] * bool(choices) + plain))
        near = nearest(got[-1], [choice.strip("'") for choice in choices]) if choices else ""
        return f"{key}: got {got[-1]!r}, expected {expected}.{near if 'mean' in near else ''}"
    return message


def _in_class(key: str, path: str, text: str, kind: str) -> str:
    """What is wrong with an option of a class, or with the class."""
    name = path.rpartition(".")[2]
    if match := re.fullmatch(r"Option '([^']+)' is not accepted\.?(.*)", text):
        return f"{key}: {name} has no option {match[1]!r}.{match[2]}"
    if match := re.match(r"--(\w+): expected, and not given", text):
        return f"{key}: {name} needs {match[1]!r}. Give --{key}.{match[1]} VALUE."
    if match := re.match(r"([\w.]+): (?=got |.* is no )", text):  # a sentence of the class's own parser
        return f"{key}.{text}"
    if "has no attribute" in text:
        return f"{key}: {text.rstrip('.')}.{nearest(name, _imported(kind))}"
    if text.startswith("No module named"):
        return f"{key}: {path!r}: {text.rstrip('.')}. Expected it installed, in the current folder or on PYTHONPATH."
    return f"{key}: {name}: {text}"


def _unknown_class(name: str, kind: str) -> str:
    if name in {each for other in KINDS for each in _imported(other)}:
        return f"{name} is no {kind}."
    near = difflib.get_close_matches(name, _imported(kind), n=1)
    ours = importlib.import_module(DEMOS).__all__
    return f"{name} is no {kind} imported so far: give its full path.{nearest(name, near or ours)}"


def _imported(kind: str) -> list[str]:
    """Names of the classes of a kind that the command line knows without their modules."""
    found: list[Any] = [KINDS[kind]] if kind in KINDS else list(KINDS.values())
    for cls in found:
        found += [each for each in cls.__subclasses__() if each not in found]
    return sorted({cls.__name__ for cls in found})


def _choices(literal: str) -> list[str]:
    return [part.strip() for part in literal.partition("[")[2].rstrip("]").split(",")]


def _type(text: str) -> str:
    """``<class 'NoneType'>`` as YAML writes it, and other types without their modules."""
    name = re.sub(r"<class '([^']+)'>", r"\1", text)
    return "null" if name == "NoneType" else re.sub(r"\b(?:\w+\.)+(?=\w)", "", name)

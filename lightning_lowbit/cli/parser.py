"""Lightning's parser, with an answer to a misspelt name."""

from __future__ import annotations

import difflib
import importlib
import re
from typing import NoReturn

from lightning.pytorch import Callback, LightningDataModule, LightningModule
from lightning.pytorch.cli import LightningArgumentParser
from lightning.pytorch.loggers import Logger
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from lightning_lowbit.errors import nearest

__all__ = ["DEMOS", "LowBitParser"]

DEMOS = "lightning_lowbit.demos"

# What jsonargparse says of a name that it does not know; the group is the name.
UNKNOWN_OPTION = re.compile(
    r"Option '([^']+)' is not accepted$|does not accept option '([^']+)'$|unrecognized arguments: --([\w.]+)"
)
UNKNOWN_SUBCOMMAND = re.compile(r"invalid choice: '([^']+)' \(choose from (.*)\)")
UNKNOWN_CHOICE = re.compile(r"Expected a typing\.Literal\[(.*?'.*?)\]\. Got value: (\w+)")
UNKNOWN_CLASS = re.compile(r"Expected a dot import path string: (\w+)$", re.MULTILINE)


class LowBitParser(LightningArgumentParser):
    """Lightning's parser; an unknown name comes back with the nearest one that exists."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print the usage and ``message``, with a hint where a name is unknown, and exit with status 2."""
        super().error(message + self._hint(message, ex), ex)

    def _hint(self, message: str, ex: Exception | None) -> str:
        if match := UNKNOWN_SUBCOMMAND.search(message):
            return "." + nearest(match[1], re.findall(r"'(\w+)'", match[2]))
        if match := UNKNOWN_CLASS.search(message):
            ours, known = importlib.import_module(DEMOS).__all__, _imported_classes()
            near = difflib.get_close_matches(match[1], known, n=1)
            return f"\n  {match[1]} is no class imported so far: give its full path." + nearest(match[1], near or ours)
        if match := UNKNOWN_CHOICE.search(message):
            return f"\n  {match[2]}:" + nearest(match[2], re.findall(r"'([^']+)'", match[1]))
        if match := UNKNOWN_OPTION.search(message):
            # An option of a nested class is reported by that class's own parser, which comes here first.
            parser = getattr(ex, "subcommand_parser", None) or self
            options = [text[2:] for action in parser._actions for text in action.option_strings]
            word = next(group for group in match.groups() if group)
            known = [name for name in options if name and not name.endswith("help")]
            return "." + nearest(word, known) if known else ""
        return ""


def _imported_classes() -> list[str]:
    """Names that the command line takes for a model, data, a callback, a logger, an optimizer or its schedule."""
    found: list[type] = [LightningModule, LightningDataModule, Callback, Logger, Optimizer, LRScheduler]
    for cls in found:
        below: list[type] = cls.__subclasses__()
        found += [each for each in below if each not in found]
    return sorted({cls.__name__ for cls in found})

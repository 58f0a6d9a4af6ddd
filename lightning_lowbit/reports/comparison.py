"""The table of a comparison: what one network is worth, and costs, under several schemes."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING, Any

from lightning_lowbit.errors import ConfigError, nearest
from lightning_lowbit.export.program import write_atomically
from lightning_lowbit.reports import page
from lightning_lowbit.reports.plots import Point, accuracy_against_size, new_figure
from lightning_lowbit.reports.table import Columns, setbacks, show, text

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["SUFFIXES", "Comparison", "Row", "Trial", "checked_output", "outcome"]

FIGURES = (".png", ".svg", ".pdf")
SUFFIXES = (".html", ".json", ".md", *FIGURES)
"""Of the files that a comparison can be written to."""

_TITLE = "Accuracy against size"
_REFUSED = "refused"
_NOTHING = "validation logs nothing"
_HEAD = ("row", "float", "calibrated", "trained", "±", "KiB", "ratio", "step", "exact", "repeats", "")
_COLUMNS = Columns(
    _HEAD,
    kept=1,
    shortest={0: 16},  # whichever part is cut, a scheme's name stays
    right=frozenset({"float", "calibrated", "trained", "±", "KiB", "ratio", "step"}),
    mark=_REFUSED,
    least={"ratio": "ratio", "repeats": "repeats", "step": "step", "exact": "exact", "±": "±"},
    begins=True,
)


@dataclass(frozen=True)
class Trial:
    """One network that was trained, or refused, from one seed.

    Attributes:
        name: of its row.
        options: what differs from the defaults, as text.
        metrics: the user's own validation metrics by stage: "float" before quantization, "calibrated", "trained".
        size, float_size: bytes of the parameters as a device stores them, and of the float network's.
        step: time of a training step over that of the float network's; None where it was not measured.
        epoch_seconds: wall time of the fit over its epochs.
        exact: whether its integer program computed what evaluation computed; None of a float network.
        repeats: whether training gives the same bits on any machine.
        why: of what is not exact and does not repeat, why a step was not measured, and what the fit warned of.
        checkpoint: the best one that the fit wrote; "" without.
        refused: why there is no result; "" where there is.
    """

    name: str
    seed: int | None = None
    options: str = ""
    metrics: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    size: int = 0
    float_size: int = 0
    step: float | None = None
    epoch_seconds: float | None = None
    exact: bool | None = None
    repeats: bool = False
    why: Mapping[str, str] = field(default_factory=dict)
    checkpoint: str = ""
    refused: str = ""


@dataclass(frozen=True)
class Row:
    """The trials of one name: a line of the table.

    Attributes:
        metric: whose values stand in it.
    """

    trials: tuple[Trial, ...]
    metric: str

    @property
    def done(self) -> list[Trial]:
        return [trial for trial in self.trials if not trial.refused]

    def values(self, stage: str) -> list[float]:
        """Of the metric, a seed each."""
        found = [trial.metrics.get(stage, {}).get(self.metric) for trial in self.done]
        return [value for value in found if value is not None]

    def value(self, stage: str) -> float | None:
        """Mean over the seeds."""
        values = self.values(stage)
        return mean(values) if values else None

    @property
    def setbacks(self) -> list[str]:
        """What to say where training lost accuracy that the calibrated network has."""
        stages = {stage: self.value(stage) for stage in ("calibrated", "trained")}
        return setbacks({stage: {self.metric: value} for stage, value in stages.items() if value is not None})

    def cells(self) -> tuple[str, ...]:
        name = self.trials[0].name
        if not self.done:
            return (name, *[""] * (len(_HEAD) - 2), _REFUSED)
        first, trained = self.done[0], self.values("trained")
        steps = [trial.step for trial in self.done if trial.step is not None]
        missing = len(self.trials) - len(self.done)
        return (
            name,
            *(self._shown(self.value(stage)) for stage in ("float", "calibrated", "trained")),
            self._shown((max(trained) - min(trained)) / 2, unit="") if len(trained) > 1 else "",
            f"{first.size / 1024:.1f}",
            f"{first.size / first.float_size:.2f}" if first.float_size else "",
            f"{mean(steps):.2f}×" if steps else "",
            "-" if first.exact is None else "yes" if all(trial.exact for trial in self.done) else "no",
            "yes" if all(trial.repeats for trial in self.done) else "no",
            f"{missing} of {len(self.trials)} seeds {_REFUSED}" if missing else "",
        )

    def _shown(self, value: float | None, unit: str = " %") -> str:
        if value is None:
            return ""
        return f"{100 * value:.2f}{unit}" if _is_share(self.metric, value) else f"{value:.4g}"


@dataclass(frozen=True)
class Comparison:
    """Networks side by side: prints as a table, a line a name, in the order in which they were run.

    Attributes:
        trials: one a name and seed.
        title: what was compared.
        asked: the metric in the table; None takes the first that is called an accuracy, else the first there is.
    """

    trials: tuple[Trial, ...]
    title: str = "Comparison"
    asked: str | None = None

    def __str__(self) -> str:
        return text(self.rows, self.words, columns=_COLUMNS)

    def show(self) -> None:
        """Print it; with color where rich is installed."""
        show(self.rows, self.words, {}, _COLUMNS)

    def __getitem__(self, name: str) -> Row:
        for row in self.rows:
            if row.trials[0].name == name:
                return row
        raise KeyError(f"{name!r}; rows: {', '.join(row.trials[0].name for row in self.rows)}")

    @property
    def metric(self) -> str:
        """The metric in the table; "" where none was logged."""
        if self.asked in self.logged:
            return self.asked
        return next((name for name in self.logged if "acc" in name.lower()), (self.logged or [""])[0])

    @property
    def logged(self) -> list[str]:
        """All metrics by name."""
        return sorted({name for trial in self.trials for values in trial.metrics.values() for name in values})

    @property
    def rows(self) -> list[Row]:
        names, metric = dict.fromkeys(trial.name for trial in self.trials), self.metric
        return [Row(tuple(trial for trial in self.trials if trial.name == name), metric) for name in names]

    @property
    def ok(self) -> bool:
        """Whether no trial was refused, and validation logs the metric that was asked for."""
        return not any(trial.refused for trial in self.trials) and self.asked in (None, *self.logged)

    @property
    def words(self) -> list[str]:
        """What the table means, and why it says no."""
        seeds = list(dict.fromkeys(trial.seed for trial in self.trials))
        lines = [
            f"{self.metric}: of validation; float before quantization, then calibrated, then trained"
            + f". Means of seeds {', '.join(map(str, seeds))}; ± of trained, half the distance of its extremes"
            * (len(seeds) > 1)
            if self.metric
            else _NOTHING,
            "KiB: parameters as a device stores them, and their ratio to float32",
            "exact: the integer program was run on a batch of validation and gave the codes of the network. "
            "repeats: training gives the same bits on any machine",
        ]
        if any(trial.step is not None for trial in self.trials):
            lines.append("step: CPU time of a training step over that of float, one thread, all rows in turn")
        if self.asked is not None and self.asked not in self.logged:
            lines.append(self.unlogged(self.asked))
        lines += [f"{row.trials[0].name}: {words}" for row in self.rows for words in row.setbacks]
        firsts = [(row.done or row.trials)[0] for row in self.rows]
        lines += [f"{first.name}: {first.options}" for first in firsts if first.options]
        reasons: dict[tuple[str, str], list[str]] = {}
        for first in firsts:
            for reason in first.why.items():
                reasons.setdefault(reason, []).append(first.name)
        lines += [f"{', '.join(names)}, {what}: {why}" for (what, why), names in reasons.items()]
        for trial in self.trials:
            seed = f", seed {trial.seed}" * (len(seeds) > 1)
            lines += [f"{trial.name}{seed}, {_REFUSED}: {trial.refused}"] if trial.refused else []
        return lines

    def unlogged(self, name: str) -> str:
        """That there is no such metric."""
        return f"{name}: validation does not log it.{nearest(name, self.logged)}" if self.logged else _NOTHING

    @property
    def points(self) -> list[Point]:
        """Of the rows whose metric is a share, for `accuracy_against_size`."""
        found = []
        for row in self.rows:
            value = row.value("trained")
            if value is not None and row.done[0].size and _is_share(row.metric, value):
                found.append(Point(row.trials[0].name, row.done[0].size, value, row.done[0].exact))
        return found

    def to_json(self) -> dict[str, Any]:
        """Plain types; a number that is none, of a fit that diverged, is null."""
        content = {"title": self.title, "metric": self.metric, "trials": [asdict(trial) for trial in self.trials]}
        loaded: dict[str, Any] = json.loads(json.dumps(content), parse_constant=lambda _: None)
        return loaded

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Comparison:
        """What `to_json` gave."""
        trials = tuple(Trial(**trial) for trial in content["trials"])
        return cls(trials, content["title"], content["metric"] or None)

    def to_markdown(self) -> str:
        """A table of pipes, and what it means below."""
        names, rows = self._kept()
        lines = [names, [":--" if name not in _COLUMNS.right else "--:" for name in names], *rows]
        table = ["| " + " | ".join(cell.replace("|", r"\|") for cell in line) + " |" for line in lines]
        return "\n".join([*table, "", *(f"- {words}" for words in self.words), ""])

    def to_html(self) -> str:
        """One page without scripts, links or anything to load; its plot needs matplotlib."""
        rows = [row.cells() for row in self.rows]
        warned = [number for number, row in enumerate(rows) if row[-1].endswith(_REFUSED)]
        plot = [page.figure(self.figure(), _TITLE, 1)] if self.points else []
        parts = [
            page.section("Rows", [page.table(_HEAD, rows, _COLUMNS.right, warned)]),
            page.section("What they mean", [page.listed(self.words)]),
            page.section(_TITLE, plot),
        ]
        return page.page(self.title, [part for part in parts if part])

    def figure(self) -> Figure:
        """Accuracy against size.

        Raises:
            ConfigError: no row has an accuracy; matplotlib is not installed.
        """
        return accuracy_against_size(self.points)

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write it in the form that the file's suffix names, one of SUFFIXES; a file of that name is replaced.

        Raises:
            ConfigError: another suffix.
        """
        path = checked_output(path)
        if path.suffix in FIGURES:
            self.figure().savefig(path)
            return path
        form = {".html": self.to_html, ".md": self.to_markdown}.get(path.suffix)
        content = json.dumps(self.to_json(), indent=2) + "\n" if form is None else form()
        write_atomically(path, content.encode())
        return path

    def with_steps(self, ratios: Mapping[str, float], why: Mapping[str, str]) -> Comparison:
        """The same with times of steps, by name: of the first seed's trial that was not refused."""
        trials = list(self.trials)
        for name in {*ratios, *why}:
            place = next((n for n, trial in enumerate(trials) if trial.name == name and not trial.refused), None)
            if place is not None:
                reasons = {**trials[place].why, **({"step": why[name]} if name in why else {})}
                trials[place] = replace(trials[place], step=ratios.get(name), why=reasons)
        return replace(self, trials=tuple(trials))

    def _kept(self) -> tuple[list[str], list[list[str]]]:
        """Head and rows without the columns that are empty throughout."""
        rows = [row.cells() for row in self.rows]
        kept = [n for n in range(len(_HEAD)) if n == 0 or any(row[n] for row in rows)]
        return [_HEAD[n] for n in kept], [[row[n] for n in kept] for row in rows]


def checked_output(path: str | os.PathLike[str]) -> Path:
    """A file that a comparison can be written to.

    Raises:
        ConfigError: another suffix, a folder that is not there, or a plot is wanted and matplotlib not installed.
    """
    found = Path(path)
    if found.suffix not in SUFFIXES:
        raise ConfigError(f"--output {found}: expected a file that ends in one of {', '.join(SUFFIXES)}.")
    if found.is_dir() or not found.absolute().parent.is_dir():
        raise ConfigError(f"--output {found}: expected the path of a file, in a folder that exists.")
    if found.suffix in (".html", *FIGURES):
        new_figure(1.0)
    return found


def _is_share(name: str, value: float) -> bool:
    return "acc" in name.lower() and 0 <= value <= 1


def outcome(trial: Trial, asked: str | None = None) -> str:
    """A line on one trial, for whoever waits."""
    if trial.refused:
        return f"{_REFUSED}: {trial.refused}"
    found = Comparison((trial,), asked=asked)
    missing = "" if asked is None or asked in found.logged else f" ({found.unlogged(asked)})"
    return f"{found.metric} {found.rows[0].cells()[3]}{missing}" if found.metric else _NOTHING

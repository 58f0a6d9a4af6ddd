"""start=, Freeze, FoldBatchNorm and Calibrate: what happens at which step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from plugins.lifecycle_nets import QUIET, loader, quantized, seeded_net, trainer

from lightning_lowbit import Calibrate, FoldBatchNorm, Freeze, QuantCallback, Tqt
from lightning_lowbit.errors import ConfigError
from lightning_lowbit.modules.convert import quantizers

pytestmark = QUIET


def history(folder: Path, *callbacks: Any, **options: Any) -> tuple[list[bool], list[bool], list[int]]:
    """Per trained batch: quantized? batch norm frozen? how many thresholds were frozen?"""
    net = seeded_net()
    found: tuple[list[bool], list[bool], list[int]] = ([], [], [])

    def on_train_batch_end(*args: Any) -> None:
        found[0].append(quantized(net))
        found[1].append(net.body.conv1.norm_frozen)
        found[2].append(sum(bool(q.frozen) for _, q in quantizers(net) if getattr(q, "log2_t", None) is not None))

    net.on_train_batch_end = on_train_batch_end
    trainer(folder, *callbacks, **options).fit(net, loader(), loader())
    return found


@pytest.mark.parametrize(
    ("start", "step"),
    [(0, 0), (0.0, 0), (0.25, 3), (1, 6), ("4 steps", 4), ("1 step", 1), (None, 3)],
    ids=repr,
)
def test_start_takes_fractions_epochs_and_steps(tmp_path: Path, start: Any, step: int) -> None:
    started, _, _ = history(tmp_path, QuantCallback(start=start))
    assert started == [False] * step + [True] * (12 - step)


@pytest.mark.parametrize("start", [1.5, -1, True, "soon", "5", "-3 steps", 1.0])
def test_what_is_no_moment_is_refused(start: Any) -> None:
    with pytest.raises(ConfigError, match=r"start=.*expected a fraction of the run"):
        QuantCallback(start=start)


@pytest.mark.parametrize("start", ["12 steps", 2])
def test_a_start_that_the_run_does_not_reach_is_refused(tmp_path: Path, start: Any) -> None:
    with pytest.raises(ConfigError, match=r"start=.* means step 12, this run ends after 12 steps"):
        history(tmp_path, QuantCallback(start=start))


@pytest.mark.parametrize("first", [True, False], ids=["before QuantCallback", "behind it"])
def test_freeze_and_fold_replace_the_schemes_moments_wherever_they_stand(tmp_path: Path, first: bool) -> None:
    settings = [Freeze("5 steps"), FoldBatchNorm("2 steps")]
    callback = QuantCallback(start=0)
    callbacks = [*settings, callback] if first else [callback, *settings]
    _, norms, thresholds = history(tmp_path, *callbacks)
    assert norms == [False] * 2 + [True] * 10
    total = max(thresholds)
    assert total > 3
    assert thresholds == [0] * 5 + [total] * 7


def test_freeze_until_spreads_it(tmp_path: Path) -> None:
    _, _, thresholds = history(tmp_path, QuantCallback(start=0), Freeze("3 steps", until="9 steps"))
    assert thresholds[:3] == [0] * 3
    assert 0 < thresholds[4] < thresholds[-1]
    assert thresholds[8] == thresholds[-1]


def test_none_never_freezes(tmp_path: Path) -> None:
    _, norms, thresholds = history(tmp_path, QuantCallback(start=0), Freeze(None), FoldBatchNorm(None))
    assert norms == [False] * 12
    assert thresholds == [0] * 12


def test_fractions_of_the_scheme_count_from_the_start_and_those_of_the_user_from_the_beginning(
    tmp_path: Path,
) -> None:
    _, norms, _ = history(tmp_path, QuantCallback(Tqt(freeze_batch_norm=0.5), start=0.5))
    assert norms == [False] * 9 + [True] * 3
    _, norms, _ = history(tmp_path, QuantCallback(start=0.5), FoldBatchNorm(0.5))
    assert norms == [False] * 6 + [True] * 6


@pytest.mark.parametrize(
    "setting", [Freeze(0.5), FoldBatchNorm(0.5), Calibrate(batches=1)], ids=lambda s: type(s).__name__
)
def test_a_setting_without_a_quant_callback_is_refused(tmp_path: Path, setting: Any) -> None:
    with pytest.raises(ConfigError, match=r"there is none. Add QuantCallback\(\)"):
        trainer(tmp_path, setting).fit(seeded_net(), loader())


@pytest.mark.filterwarnings(r"ignore:.*would never act")
def test_short_runs_on_purpose_warn_and_go_on(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="means step 500, this run ends after"):
        trainer(tmp_path, QuantCallback(start="500 steps"), fast_dev_run=2).fit(seeded_net(), loader(), loader())


def test_what_a_scheme_does_not_schedule_is_refused_by_name(tmp_path: Path) -> None:
    run = trainer(tmp_path, QuantCallback("niti"), Freeze(1))
    with pytest.raises(ConfigError, match=r"schedules nothing of that name, but mu\[0\]=5, .*Leave the callback out"):
        run.fit(seeded_net(), loader())


def test_an_end_of_freezing_is_refused_where_all_ranges_freeze_at_once(tmp_path: Path) -> None:
    trainer(tmp_path, QuantCallback("jacinto", start=0), Freeze("5 steps")).fit(seeded_net(), loader(), loader())
    with pytest.raises(ConfigError, match=r"ranges_frozen=.*schedules nothing of that name"):
        history(tmp_path, QuantCallback("jacinto", start=0), Freeze("5 steps", until="8 steps"))

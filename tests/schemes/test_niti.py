"""NITI's options, and what they do in a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from schemes.niti_nets import (
    Steps,
    convert_body,
    differing,
    fit,
    on_grid,
    weight_codes,
)  # fmt: skip
from torch import nn

from lightning_lowbit import (
    Niti,
)
from lightning_lowbit.errors import ConfigError
from lightning_lowbit.plugins.precision import rule_of

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*exists and is not empty"),
    pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint need to be provided"),
]


# -- options ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"mu": 8}, "mu=8.*from -8 to 7"),
        ({"mu": (5, -9)}, "mu=-9.*from -8 to 7"),
        ({"mu": 2.5}, "mu"),
        ({"mu": (5, 4, 3, 2)}, "4 values and 3 moments"),
        ({"mu_at": ("a while",)}, "mu_at"),
        ({"accumulate_bits": 9}, "accumulate_bits=9.*from 0 to 8"),
        ({"momentum": 16}, "momentum=16.*from 0 to 15"),
        ({"momentum": True}, "momentum=True.*integer"),
        ({"frozen_shifts": 0}, "frozen_shifts=0.*from 1"),
        ({"recipe": "scrach"}, "recipe='scrach'.*'scratch'"),
        ({"norms": "keep"}, "norms='keep'.*'fold', 'island'"),
        ({"act_rounding": "nearest"}, "act_rounding='nearest'.*'half_away'"),
        ({"init": "kaiming"}, "init='kaiming'.*'xavier'"),
        ({"dropout": "none"}, "dropout='none'.*'shared'"),
        ({"preset": "paper"}, "preset='paper'.*'reference'"),
    ],
    ids=str,
)
def test_refusals_name_the_option_what_it_got_and_what_is_expected(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        Niti(**options)


def test_recipes_decide_what_is_open() -> None:
    assert (Niti().schedule, Niti().master_bits) == ((5, 4, 3), 0)
    fine = Niti(recipe="finetune")
    assert (fine.schedule, fine.master_bits) == ((-2, -3, -4), 8)
    assert (Niti(recipe="finetune", mu=3, accumulate_bits=4).schedule, Niti(mu=3).master_bits) == ((3,), 0)


@pytest.mark.parametrize(("seen", "pretrained", "want"), [
    (False, False, ("scratch", "island")), (True, False, ("finetune", "fold")), (False, True, ("finetune", "fold")),
])  # fmt: skip
def test_a_network_that_has_seen_data_is_fine_tuned(seen: bool, pretrained: bool, want: tuple[str, str]) -> None:
    net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2))
    if seen:
        net(torch.randn(2, 1, 4, 4))
    adapted = Niti().adapted_to(net, pretrained)
    assert (adapted.recipe, adapted.norms) == want
    chosen = Niti(recipe="scratch", norms="island").adapted_to(net, pretrained)
    assert (chosen.recipe, chosen.norms) == ("scratch", "island")
    assert (Niti().like(adapted).recipe, Niti().like(adapted).norms) == want


# -- mu --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("options", "want"), [
    ({}, [5] * 6 + [4] * 3 + [3] * 3),
    ({"mu": (4, 1), "mu_at": (0, 1)}, [4] * 6 + [1] * 6),
    ({"mu": (4, 4, 2), "mu_at": (0, "2 steps", "5 steps")}, [4] * 5 + [2] * 7),
    ({"mu": 2}, [2] * 12),
])  # fmt: skip
def test_mu_follows_its_schedule_and_bounds_the_update(options: dict[str, Any], want: list[int]) -> None:
    steps = Steps()
    net, *_ = fit(Niti(**options), [steps])
    assert steps.mu == want
    assert all(0 < moved <= 2**mu for moved, mu in zip(steps.moves, steps.mu, strict=True))
    assert on_grid(net)


@pytest.mark.parametrize("interval", ["step", "epoch"])
def test_mu_is_logged_where_learning_rates_are(tmp_path: Path, interval: str) -> None:
    logger = CSVLogger(tmp_path)
    monitor = pl.callbacks.LearningRateMonitor(interval)
    _, run, _ = fit(callbacks=[monitor], logger=logger, log_every_n_steps=1)
    logged = [row["mu"] for row in logger.experiment.metrics if "mu" in row] or _column(logger, "mu")
    assert logged == ([5] * 6 + [4] * 3 + [3] * 3 if interval == "step" else [5, 3])
    assert float(run.callback_metrics["mu"]) == 3


def _column(logger: CSVLogger, name: str) -> list[float]:
    lines = (Path(logger.log_dir) / "metrics.csv").read_text().splitlines()
    place = lines[0].split(",").index(name)
    return [float(line.split(",")[place]) for line in lines[1:] if line.split(",")[place]]


def test_offsets_move_the_layers_that_they_name() -> None:
    class Each(Steps):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
            now = dict(weight_codes(pl_module))
            self.moves.append([int((now[p].codes().int() - w.int()).abs().max()) for p, w in self.before.items()])  # type: ignore[arg-type]

    steps = Each()
    fit(Niti(mu=4, mu_offsets={"body.0": -3}), [steps])
    first, last = (max(moves) for moves in zip(*steps.moves, strict=True))  # type: ignore[call-overload]
    assert first <= 2 < 8 <= last <= 16


# -- what else acts on the update ------------------------------------------------------------------------------
def test_momentum_keeps_sixteenths_of_the_last_update() -> None:
    plain, still = fit(Niti(mu=2))[0], fit(Niti(mu=2, momentum=15))
    assert differing(plain, still[0])
    rule = still[2].rule
    assert {key: value.dtype for key, value in rule.kept.items()} == dict.fromkeys(
        ["body.0.bias", "body.0.weight", "body.5.bias", "body.5.weight"], torch.int16
    )
    assert on_grid(still[0])


def test_weight_decay_pulls_the_weights_in() -> None:
    scheme = Niti(mu=6, grad_rounding="half_away")
    plain, decayed = (fit(scheme.replace(weight_decay=flag), max_epochs=4)[0] for flag in (False, True))
    sums = [sum(float(q.codes().abs().sum()) for _, q in weight_codes(net)) for net in (plain, decayed)]
    assert differing(plain, decayed)
    assert sums[1] < sums[0]


@pytest.mark.parametrize("which", ["act_rounding", "err_rounding", "grad_rounding"])
@pytest.mark.parametrize("rounding", ["pseudo_stochastic", "stochastic"])
def test_roundings_act_and_come_again(which: str, rounding: str) -> None:
    default = fit(Niti(grad_rounding="half_away"), max_epochs=1)[0]
    scheme = Niti(**{"grad_rounding": "half_away", which: rounding})
    one, two = (fit(scheme, max_epochs=1)[0] for _ in range(2))
    assert differing(one, two) == []
    assert differing(one, default)
    other_seed = fit(scheme.replace(seed=1), max_epochs=1)[0]
    assert differing(one, other_seed)  # of the loss, at least


def test_wide_weights_accumulate_below_a_code_and_resume_bit_equal(tmp_path: Path) -> None:
    scheme = Niti(recipe="finetune", momentum=3, mu=0)
    saver = pl.callbacks.ModelCheckpoint(tmp_path, "{step}", save_top_k=-1, every_n_train_steps=1)
    whole, _, callback = fit(scheme, [saver], enable_checkpointing=True)
    masters = callback.rule.masters
    assert {value.dtype for value in masters.values()} == {torch.int16}
    assert any((value % 256 != 0).any() for value in masters.values())
    for path, q in weight_codes(whole):
        off = masters[f"{path}.weight"].int() - 256 * q.codes().int()
        assert off.abs().max() <= 256
    for step in (1, 5, 6, 9):
        again, _, resumed = fit(scheme, ckpt_path=tmp_path / f"step={step}.ckpt")
        assert differing(whole, again) == []
        assert all(torch.equal(resumed.rule.masters[key], value) for key, value in masters.items())
        assert all(torch.equal(resumed.rule.kept[key], value) for key, value in callback.rule.kept.items())
        assert resumed.rule.state_dict()["silent"] == callback.rule.state_dict()["silent"]


def test_a_checkpoint_s_wide_weights_of_an_unknown_layer_are_refused() -> None:
    net = convert_body(Niti(recipe="finetune"))[0]
    with pytest.raises(ConfigError, match="nowhere: the checkpoint holds its wide weight"):
        rule_of(net).load_state_dict({"masters": {"nowhere.weight": torch.zeros(1)}, "kept": {}, "silent": {}})  # type: ignore[union-attr]


def test_xavier_draws_weights_anew_from_the_seed() -> None:
    def first(**options: Any) -> Any:
        return convert_body(Niti(**options), seed=int(options.get("seed", 0)) + 5)[0]

    one, two, other = first(init="xavier"), first(init="xavier"), first(init="xavier", seed=1)
    kept = first()
    assert torch.equal(one[0].weight, two[0].weight)
    assert not torch.equal(one[0].weight, other[0].weight)
    for layer, old in zip((one[0], one[5]), (kept[0], kept[5]), strict=True):
        assert int(layer.lowbit_weight.codes().abs().max()) == 127
        assert not torch.equal(layer.weight, old.weight)
        assert torch.equal(layer.bias, old.bias)
    assert differing(fit(Niti(init="xavier"))[0], fit(Niti(init="xavier"))[0]) == []

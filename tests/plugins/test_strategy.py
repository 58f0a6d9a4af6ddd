"""Strategies that bring the life cycle: no callback needed, the strings in both namespaces, what is refused."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from plugins.lifecycle_nets import (
    NAMESPACES,
    QUIET,
    assert_equal_states,
    loader,
    net_class,
    quantized,
    seeded_net,
    states,
    trainer,
)
from schemes.toy_integer import ToyInteger
from schemes.toy_ranks import Net as ToyNet
from schemes.toy_ranks import data as toy_data

from lightning_lowbit import Freeze, LowBitDDPStrategy, LowBitStrategy, QuantCallback, Tqt, cli
from lightning_lowbit.errors import ConfigError
from lightning_lowbit.plugins.lifecycle import Lifecycle
from lightning_lowbit.plugins.registration import register_strategies
from lightning_lowbit.plugins.strategy import strategies_of

pytestmark = QUIET


def fitted(folder: Path, *callbacks: Any, namespace: str = NAMESPACES[0], **options: Any) -> tuple[Any, Any]:
    net, run = seeded_net(namespace), trainer(folder, *callbacks, namespace=namespace, **options)
    run.fit(net, loader(), loader())
    return net, run


# -- who leads -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("namespace", NAMESPACES)
@pytest.mark.parametrize("place", ["object", "object and callback", "string and callback"])
def test_a_strategy_trains_as_the_callback_does(tmp_path: Path, namespace: str, place: str) -> None:
    scheme = Tqt(bits=4)
    expected, plain = fitted(tmp_path, QuantCallback(scheme, start=0, skip=["body.fc"]), namespace=namespace)
    strategy, _ = strategies_of(namespace)
    callbacks = [] if place == "object" else [QuantCallback(scheme, start=0, skip=["body.fc"])]
    options = {
        "object": lambda: strategy(scheme, start=0, skip=["body.fc"]),
        "object and callback": strategy,
        "string and callback": lambda: "lowbit",
    }
    net, run = fitted(tmp_path, *callbacks, namespace=namespace, strategy=options[place]())
    assert type(run.strategy) is strategy
    assert run.callbacks[0] is run.strategy.lifecycle
    assert [type(c) for c in run.callbacks if isinstance(c, Lifecycle)] == [QuantCallback if callbacks else Lifecycle]
    assert quantized(net)
    assert_equal_states(states(net), states(expected))
    assert run.strategy.lifecycle.metrics == plain.callbacks[0].metrics != {}
    assert run.validate(net, loader(), verbose=False) == plain.validate(expected, loader(), verbose=False)
    assert sum(isinstance(c, Lifecycle) for c in run.callbacks) == 1


def test_the_public_names_are_lightning_pytorchs() -> None:
    assert strategies_of("lightning.pytorch") == (LowBitStrategy, LowBitDDPStrategy)
    theirs = strategies_of("pytorch_lightning")
    assert not set(theirs) & {LowBitStrategy, LowBitDDPStrategy}
    assert [c.__name__ for c in theirs] == ["LowBitStrategy", "LowBitDDPStrategy"]


def test_settings_find_the_strategys_life_cycle(tmp_path: Path) -> None:
    freeze = Freeze(at="5 steps")
    _, run = fitted(tmp_path, freeze, strategy=LowBitStrategy("tqt", start=0))
    assert run.strategy.lifecycle.replaced["freeze_ranges"].when == "5 steps"
    assert run.callbacks.index(run.strategy.lifecycle) < run.callbacks.index(freeze)


def test_a_callback_that_the_module_brings(tmp_path: Path) -> None:
    """Lightning drops a callback whose subclass configure_callbacks returns: nobody's scheme may vanish so."""

    class Own(net_class()):  # type: ignore[misc]  # made at run time
        def configure_callbacks(self) -> Any:
            return [QuantCallback("tqt", start=0)]

    net = Own()
    run = trainer(tmp_path, strategy="lowbit")
    run.fit(net, loader())
    assert quantized(net)
    assert isinstance(run.strategy.lifecycle, QuantCallback)
    with pytest.raises(ConfigError, match="two schemes are given, both Tqt"):
        trainer(tmp_path, strategy=LowBitStrategy(Tqt(bits=4))).fit(Own(), loader())


def test_a_strategy_serves_a_second_trainer(tmp_path: Path) -> None:
    auto: dict[str, Any] = {"accelerator": "auto", "devices": 1}  # Lightning allows it nothing else
    strategy, net = LowBitStrategy("tqt", start=0), seeded_net()
    trainer(tmp_path, strategy=strategy, **auto).fit(net, loader())
    run = trainer(tmp_path, strategy=strategy, **auto)
    assert run.validate(net, loader(), verbose=False)
    assert run.callbacks[0] is strategy.lifecycle
    adopting = LowBitStrategy()
    for _ in range(2):
        trainer(tmp_path, QuantCallback("tqt"), strategy=adopting, **auto).validate(net, loader(), verbose=False)
    with pytest.raises(ConfigError, match="no scheme is given"):  # the callbacks were those Trainers' own
        trainer(tmp_path, strategy=adopting, **auto).validate(net, loader(), verbose=False)


def test_an_integer_scheme(tmp_path: Path) -> None:
    """Also in bits: without a callback the same run as with one."""
    ends = []
    for callbacks, strategy in (([], LowBitStrategy(ToyInteger())), ([QuantCallback(ToyInteger())], "auto")):
        net = ToyNet()
        trainer(tmp_path, *callbacks, strategy=strategy).fit(net, toy_data())
        ends.append(states(net))
    assert_equal_states(*ends)


# -- checkpoints -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("resumed_by", ["strategy", "callback"])
def test_resume_without_a_callback_is_bit_equal(tmp_path: Path, resumed_by: str) -> None:
    pl = importlib.import_module(NAMESPACES[0])

    def keep() -> Any:
        return pl.callbacks.ModelCheckpoint(dirpath=tmp_path, filename="{epoch}", save_top_k=-1)

    whole, _ = fitted(tmp_path, keep(), strategy=LowBitStrategy(Tqt(bits=4), start=0), max_epochs=3)
    file = tmp_path / "epoch=0.ckpt"
    spec = torch.load(file, weights_only=True)["lightning_lowbit"]
    assert spec["scheme"] == "tqt"
    assert spec["run"]["schedule"]["begin"] == 0
    leads, strategy = (
        ([], LowBitStrategy("tqt")) if resumed_by == "strategy" else ([QuantCallback("tqt")], "auto")
    )  # by name: the bits come from the file
    again = seeded_net(seed=5)
    torch.manual_seed(99)
    run = trainer(tmp_path, *leads, keep(), strategy=strategy, max_epochs=3)
    run.fit(again, loader(), loader(), ckpt_path=file)
    assert run.callbacks[0].scheme == Tqt(bits=4)
    assert_equal_states(states(again), states(whole))


# -- refusals --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("namespace", NAMESPACES)
@pytest.mark.parametrize("name", ["lowbit", "lowbit_ddp"])
def test_no_scheme_at_all_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, namespace: str, name: str
) -> None:
    run = trainer(tmp_path, namespace=namespace, strategy=name, devices=1)
    net = seeded_net(namespace)
    for variable in ("MASTER_ADDR", "MASTER_PORT", "NODE_RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.setenv(variable, "")  # so that what the launcher puts there is taken away again
        monkeypatch.delenv(variable)
    with pytest.raises(ConfigError, match=rf"strategy='{name}'\): no scheme .*scheme='tqt'.*QuantCallback\('tqt'\)"):
        run.fit(net, loader())
    assert not torch.distributed.is_initialized()


def test_two_schemes_are_both_named(tmp_path: Path) -> None:
    run = trainer(tmp_path, QuantCallback("tqt"), strategy=LowBitStrategy(ToyInteger()))
    with pytest.raises(ConfigError, match=r"two schemes are given, ToyInteger\(.*\) and Tqt\("):
        run.fit(seeded_net(), loader())


@pytest.mark.parametrize("namespace", NAMESPACES)
def test_two_devices_need_the_other_strategy(tmp_path: Path, namespace: str) -> None:
    for strategy in ("lowbit", strategies_of(namespace)[0]("tqt")):
        with pytest.raises(ConfigError, match=r"devices=2, num_nodes=1\).*strategy='lowbit_ddp'"):
            trainer(tmp_path, QuantCallback(), namespace=namespace, strategy=strategy, devices=2)
    with pytest.raises(ConfigError, match=r"num_nodes=3\).*lowbit_ddp"):
        trainer(tmp_path, namespace=namespace, strategy="lowbit", devices=1, num_nodes=3)


BAD: dict[str, tuple[Any, dict[str, Any], str]] = {
    "unknown scheme": (LowBitStrategy, {"scheme": "tqtt"}, "Did you mean 'tqt'"),
    "unknown option": (LowBitStrategy, {"scheme": "tqt", "calibrate_batch": 2}, "Did you mean 'calibrate_batches'"),
    "of the other": (LowBitStrategy, {"scheme": "tqt", "static_graph": True}, "LowBitStrategy has no option 'static_"),
    "unknown to DDP": (LowBitDDPStrategy, {"find_unused_params": True}, "Did you mean 'find_unused_parameters'"),
    "wrong value": (LowBitStrategy, {"scheme": "tqt", "calibrate_batches": 0}, "expected at least 1"),
    "no scheme": (LowBitDDPStrategy, {"skip": ["fc"]}, r"LowBitDDPStrategy\(skip\): options of a scheme"),
    "spawn": (LowBitDDPStrategy, {"start_method": "spawn"}, "launched by spawn hand back a float module"),
    "fork": (LowBitDDPStrategy, {"scheme": "tqt", "start_method": "fork"}, "launched by fork hand back"),
    "hook": (LowBitDDPStrategy, {"ddp_comm_hook": print}, r"ddp_comm_hook=\.\.\.\): it changes how"),
    "averaging": (LowBitDDPStrategy, {"model_averaging_period": 4}, "model_averaging_period="),
}


@pytest.mark.parametrize(("cls", "options", "reason"), BAD.values(), ids=BAD)
def test_a_bad_option_is_refused_by_name(cls: Any, options: dict[str, Any], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        cls(**options)


def test_options_for_lightning_pass_through(tmp_path: Path) -> None:
    ddp = LowBitDDPStrategy("tqt", process_group_backend="gloo", static_graph=True, find_unused_parameters=True)
    assert ddp.process_group_backend == "gloo"
    assert ddp._ddp_kwargs == {"static_graph": True, "find_unused_parameters": True}
    run = trainer(tmp_path, strategy=LowBitStrategy("tqt", device="meta"))
    assert run.strategy.root_device == torch.device("meta")
    assert trainer(tmp_path, strategy=LowBitStrategy("tqt")).strategy.root_device == torch.device("cpu")


# -- the strings -----------------------------------------------------------------------------------------------
PROGRAMS = {
    "Lightning first": "import {0}.strategies as s, lightning_lowbit",
    "QuantCallback imports it": (
        "import lightning_lowbit; from lightning_lowbit import QuantCallback; import {0}.strategies as s; "
        "QuantCallback()"
    ),
    "a strategy": "import lightning_lowbit, {0}.strategies as s; lightning_lowbit.LowBitStrategy",
    "the module of a callback": (
        "import lightning_lowbit, {0}.strategies as s; import lightning_lowbit.callbacks.quant"
    ),
    "the command line": "import lightning_lowbit, {0}.strategies as s; import lightning_lowbit.cli",
}


@pytest.mark.parametrize("namespace", NAMESPACES)
def test_the_strings_are_registered_in_every_order_of_imports(namespace: str) -> None:
    """One process forks a child for each order, so that torch, with all of it that Lightning uses, is imported once."""
    orders = [program.format(namespace) for program in PROGRAMS.values()]
    program = (
        "import os, torch._dynamo, torchmetrics\n"
        f"for first in {orders!r}:\n"
        "    if os.fork() == 0:\n"
        "        exec(first)\n"
        "        got = [type(s.StrategyRegistry.get(n)).__mro__[1].__module__ for n in ('lowbit', 'lowbit_ddp')]\n"
        "        os.write(1, f'{got}\\n'.encode()); os._exit(0)\n"  # one write: print's two may interleave
        f"assert [os.wait()[1] for _ in range({len(orders)})] == [0] * {len(orders)}\n"
    )
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program], capture_output=True, text=True, timeout=180, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    expected = [f"{namespace}.strategies.single_device", f"{namespace}.strategies.ddp"]
    assert done.stdout.splitlines() == [str(expected)] * len(PROGRAMS)


def test_registering_leaves_what_stands_there() -> None:
    registry = importlib.import_module("lightning.pytorch.strategies").StrategyRegistry
    theirs = {"strategy": object, "init_params": {}, "description": "somebody's"}
    before = dict(registry)
    try:
        registry["lowbit"] = theirs
        del registry["lowbit_ddp"]
        register_strategies()
        assert registry["lowbit"] is theirs
        assert isinstance(registry.get("lowbit_ddp"), LowBitDDPStrategy)
    finally:
        registry.update(before)


def test_the_command_line_takes_the_string(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    built: list[Any] = []
    monkeypatch.setattr(cli.LowBitCLI, "after_fit", lambda self: built.append(self.trainer), raising=False)
    cli.main([
        "fit", "--model", "DigitsCnn", "--data", "DigitsData", "--quant.scheme", "tqt", "--trainer.strategy", "lowbit",
        "--trainer.accelerator", "cpu", "--trainer.devices", "1", "--trainer.logger", "false",
        "--trainer.enable_progress_bar", "false", "--trainer.enable_model_summary", "false",
        "--trainer.fast_dev_run", "2",
    ])  # fmt: skip
    (run,) = built
    assert isinstance(run.strategy, LowBitStrategy)
    assert isinstance(run.strategy.lifecycle, QuantCallback)
    assert quantized(run.lightning_module)

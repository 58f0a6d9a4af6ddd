"""From a Trainer's callback list to a low-bit network, and everything taken off again at the end."""

from __future__ import annotations

import copy
import functools
import pickle
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
from torch import nn

from lightning_lowbit import QuantCallback, Tqt, float_mode
from lightning_lowbit.errors import ConfigError
from lightning_lowbit.modules.base import Mode, low_bit_modules, switch_of
from lightning_lowbit.modules.convert import is_converted, quantizers

pytestmark = QUIET
BUILT = ("init", "setup", "configure_model")


@pytest.mark.parametrize("namespace", NAMESPACES)
@pytest.mark.parametrize("built", BUILT)
def test_callback_alone_trains_a_low_bit_network(tmp_path: Path, namespace: str, built: str) -> None:
    net, callback = seeded_net(namespace, built), QuantCallback()
    trainer(tmp_path, callback, namespace=namespace).fit(net, loader(shuffle=True), loader())
    assert quantized(net)
    assert [path for path, m in low_bit_modules(net) if isinstance(m, (nn.Conv2d, nn.Linear))] == [
        "body.conv1", "body.conv2", "body.fc",
    ]  # fmt: skip
    assert set(callback.metrics) == {"float", "calibrated", "trained"}
    optimized = {id(p) for g in net.configure_optimizers().param_groups for p in g["params"]}
    assert id(net.body.conv1.weight) in optimized  # the very parameters, not copies


@pytest.mark.parametrize("built", BUILT)
def test_parameters_keep_names_identity_and_optimizer(tmp_path: Path, built: str) -> None:
    net = seeded_net(built=built)
    names = [name for name, _ in seeded_net(built="init").named_parameters()]
    run = trainer(tmp_path, QuantCallback(start=0))
    run.fit(net, loader())
    parameters = dict(net.named_parameters())
    assert [name for name in parameters if "lowbit" not in name] == names
    owned = {id(p) for group in run.optimizers[0].param_groups for p in group["params"]}
    assert owned == {id(parameters[name]) for name in names}


@pytest.mark.parametrize(("start", "step"), [(0.5, 6), (0, 0)])
def test_validate_before_fit_calibrates_and_fit_from_scratch_begins_float(
    tmp_path: Path, start: float, step: int
) -> None:
    net, callback = seeded_net(), QuantCallback(start=start)
    trainer(tmp_path, callback).validate(net, loader(seed=3), verbose=False)  # other data than the fit's
    assert quantized(net)
    trained = trainer(tmp_path, callback)
    seen: list[bool] = []

    def record(*args: Any) -> None:
        seen.append(quantized(net))

    net.on_train_batch_end = record
    torch.manual_seed(1)
    trained.fit(net, loader(), loader())
    del net.on_train_batch_end
    assert seen == [False] * step + [True] * (12 - step)
    untouched = seeded_net()
    torch.manual_seed(1)
    trainer(tmp_path, QuantCallback(start=start)).fit(untouched, loader(), loader())
    assert_equal_states(states(net), states(untouched))


@pytest.mark.parametrize("namespace", NAMESPACES)
def test_two_callbacks_are_refused(tmp_path: Path, namespace: str) -> None:
    with pytest.raises(ConfigError, match="2 QuantCallbacks, expected one"):
        trainer(tmp_path, QuantCallback(), QuantCallback(), namespace=namespace).fit(seeded_net(namespace), loader())


@pytest.mark.parametrize("same", [True, False], ids=["same callback", "new callback"])
def test_second_fit_on_the_same_module_goes_on_where_the_first_ended(tmp_path: Path, same: bool) -> None:
    net, callback = seeded_net(), QuantCallback(start=None)
    trainer(tmp_path, callback).fit(net, loader(), loader())
    before, at_start = states(net), []
    frozen = [float(q.frozen) for _, q in quantizers(net)]
    assert 1.0 in frozen
    net.on_train_batch_start = lambda *args: at_start or at_start.append((quantized(net), states(net)))
    second = callback if same else QuantCallback(start=None)
    trainer(tmp_path, second, max_epochs=1).fit(net, loader(), loader())
    began_quantized, began = at_start[0]
    assert began_quantized
    assert_equal_states(
        {k: v for k, v in began.items() if "frozen" not in k},
        {k: v for k, v in before.items() if "frozen" not in k},
    )
    assert all(float(value) == 0 for key, value in began.items() if "frozen" in key)  # its milestones are this run's
    assert set(second.metrics) == {"trained"}


def test_a_second_fit_can_ask_for_a_float_start(tmp_path: Path) -> None:
    net, seen = seeded_net(), []
    trainer(tmp_path, QuantCallback(start=0)).fit(net, loader(), loader())
    net.on_train_batch_end = lambda *args: seen.append(quantized(net))
    trainer(tmp_path, QuantCallback(start="2 steps"), max_epochs=1).fit(net, loader(), loader())
    assert seen == [False] * 2 + [True] * 4


def _leftovers(net: Any, run: Any) -> list[str]:
    found = [name for name in vars(net) if name in _HOOKS]
    if hasattr(run.strategy.precision_plugin, "lowbit_model"):
        found.append("precision")
    loops = (run.fit_loop, run.fit_loop.epoch_loop)
    return found + [
        name for loop in loops for name, value in vars(loop).items() if isinstance(value, functools.partial)
    ]


_HOOKS = (
    "configure_model",
    "on_load_checkpoint",
    "on_save_checkpoint",
    "configure_optimizers",
    "log",
    "optimizers",
)


@pytest.mark.parametrize(
    ("when", "error", "namespace"),  # every pair occurs
    [
        ("training_step", ValueError, NAMESPACES[0]), ("training_step", KeyboardInterrupt, NAMESPACES[1]),
        ("validation_step", ValueError, NAMESPACES[1]), ("validation_step", KeyboardInterrupt, NAMESPACES[0]),
        ("calibration", ValueError, NAMESPACES[0]), ("calibration", KeyboardInterrupt, NAMESPACES[1]),
    ],
)  # fmt: skip
def test_after_an_interruption_all_is_undone_and_the_module_copies_pickles_and_fits(
    tmp_path: Path, namespace: str, when: str, error: type[BaseException]
) -> None:
    net = seeded_net(namespace)
    run = trainer(tmp_path, QuantCallback(start=0.5), namespace=namespace)
    plugin = run.strategy.precision_plugin
    calls = 0

    def fail(*args: Any) -> Any:
        nonlocal calls
        calls += 1
        here = switch_of(net).mode is Mode.OBSERVE if when == "calibration" else calls > 8
        if not here:
            return getattr(type(net), name)(net, *args)
        raise error("stop")

    name = "validation_step" if when == "validation_step" else "training_step"
    setattr(net, name, fail)
    with pytest.raises((error, SystemExit)):
        run.fit(net, loader(), loader())
    delattr(net, name)
    assert run.strategy.precision_plugin is plugin
    assert _leftovers(net, run) == []
    assert net.training or when == "validation_step"
    twin = pickle.loads(pickle.dumps(copy.deepcopy(net)))
    assert_equal_states(states(net), states(twin))
    twin.train()
    trainer(tmp_path, QuantCallback(start=0), namespace=namespace).fit(twin, loader(), loader())
    assert quantized(twin)


def test_after_fit_all_is_undone_and_copies_compute_the_same(tmp_path: Path) -> None:
    net = seeded_net()
    run = trainer(tmp_path, QuantCallback(start=0))
    plugin = run.strategy.precision_plugin
    run.fit(net, loader(), loader())
    assert run.strategy.precision_plugin is plugin
    assert _leftovers(net, run) == []
    x = loader().dataset[0][0][None]
    net.eval()
    for twin in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert torch.equal(net(x), twin(x))
        before = net(x)
        with torch.no_grad():
            twin.body.conv1.weight.mul_(-1)  # the copy reads its own parameters
        assert torch.equal(net(x), before)
        assert not torch.equal(twin(x), before)
        assert switch_of(twin) is not switch_of(net)


def test_ties_survive_copies(tmp_path: Path) -> None:
    net = seeded_net()
    trainer(tmp_path, QuantCallback(start=0)).fit(net, loader())
    for twin in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        shared = [
            {q.site.key for q in leader.group}
            for _, leader in quantizers(twin)
            if leader.group[0] is leader and len(leader.group) > 1
        ]
        assert shared
        for _, quantizer in quantizers(twin):
            assert all(member.log2_t is quantizer.log2_t for member in quantizer.group if hasattr(member, "same_grid"))
            assert any(member is quantizer for member in quantizer.group)


def test_a_module_in_eval_mode_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"handed to fit in eval mode.*Call module.train\(\) first"):
        trainer(tmp_path, QuantCallback()).fit(seeded_net().eval(), loader())


@pytest.mark.filterwarnings(r"ignore:Found 1 module\(s\) in eval mode")  # Lightning says it without a name
def test_parts_in_eval_mode_are_left_and_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    net = seeded_net()
    net.body.bn1.eval()
    before = net.body.bn1.running_mean.clone()
    with caplog.at_level("INFO", logger="lightning.pytorch.utilities.rank_zero"):
        trainer(tmp_path, QuantCallback(start=0)).fit(net, loader(), loader())
    assert "in eval mode and left so: body.bn1" in caplog.text
    assert not net.body.bn1.training
    assert net.body.bn2.training
    assert torch.equal(net.body.bn1.running_mean, before)


def test_a_user_optimizer_step_is_called_and_thresholds_step_beside_it(tmp_path: Path) -> None:
    class Own(net_class()):  # type: ignore[misc]  # the class is made at run time
        calls = 0

        def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
            type(self).calls += 1
            optimizer.step(closure=optimizer_closure)

    torch.manual_seed(0)
    net = Own()
    trainer(tmp_path, QuantCallback(start=0)).fit(net, loader())
    plain = seeded_net()
    trainer(tmp_path, QuantCallback(start=0)).fit(plain, loader())
    assert Own.calls == 12
    assert_equal_states(states(net), states(plain))
    # The calibrated start is the middle of a bin; a trained threshold has left it.
    assert float(net.body.conv1.lowbit_weight.log2_t.detach()) % 1 != 0.5


@pytest.mark.filterwarnings("ignore")  # dynamo and inductor warn while they import and trace
def test_compile_trains_the_same_network(tmp_path: Path) -> None:
    results = []
    for compiled in (False, True):
        net = seeded_net()
        net.body.dropout.p = 0.0  # inductor draws other masks
        trainer(tmp_path, QuantCallback(Tqt(freeze_batch_norm=0), start=0, compile=compiled), max_epochs=1).fit(
            net, loader(samples=16)
        )
        results.append(net.losses)
    assert results[1] == pytest.approx(results[0], abs=1e-4)
    assert is_converted(net)


def test_float_mode_is_the_float_network(tmp_path: Path) -> None:
    net = seeded_net()
    trainer(tmp_path, QuantCallback(start=0)).fit(net, loader())
    plain = seeded_net()
    plain.load_state_dict({k: v for k, v in net.state_dict().items() if "lowbit" not in k})
    x = torch.randn(5, 1, 6, 6)
    with float_mode(net.eval()):
        assert torch.equal(net(x), plain.eval()(x))

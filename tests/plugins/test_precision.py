"""The precision plugin: mixed precision in training, full precision in evaluation, its own class kept."""

from __future__ import annotations

import copy
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
    quantized,
    seeded_net,
    states,
    trainer,
)

from lightning_lowbit import LowBitPrecision, QuantCallback, Tqt
from lightning_lowbit.errors import ConfigError
from lightning_lowbit.plugins.precision import low_bit, owned_modules

pytestmark = QUIET


@pytest.mark.parametrize("namespace", NAMESPACES)
@pytest.mark.parametrize(("bits", "skip"), [(8, ()), (12, ()), (8, ("body.fc",))], ids=str)
def test_validation_under_bf16_mixed_equals_32_true_bit_for_bit(
    tmp_path: Path, namespace: str, bits: int, skip: tuple[str, ...]
) -> None:
    net = seeded_net(namespace)
    scheme = Tqt(bits=bits)
    mixed = trainer(tmp_path, QuantCallback(scheme, skip, start=0), namespace=namespace, precision="bf16-mixed")
    mixed.fit(net, loader(), loader())
    twin = copy.deepcopy(net)
    full = trainer(tmp_path, QuantCallback(scheme, skip), namespace=namespace).validate(twin, loader(), verbose=False)
    again = trainer(tmp_path, QuantCallback(scheme, skip), namespace=namespace, precision="bf16-mixed")
    assert again.validate(net, loader(), verbose=False) == full
    assert {"val_loss": float(mixed.callback_metrics["val_loss"])} == full[0]
    predicted = [
        torch.cat(
            trainer(tmp_path, QuantCallback(scheme, skip), namespace=namespace, precision=p).predict(net, loader())
        )
        for p in ("bf16-mixed", "32-true")
    ]
    assert predicted[0].dtype is torch.float32
    assert torch.equal(*predicted)


@pytest.mark.parametrize(("bits", "dtype"), [(8, torch.bfloat16), (12, torch.float32)])
def test_training_above_8_bits_leaves_autocast(tmp_path: Path, bits: int, dtype: torch.dtype) -> None:
    net, seen = seeded_net(), []
    net.on_after_backward = lambda: seen.append(net.__dict__["out"].dtype)
    forward = type(net).forward

    def keep(x: torch.Tensor) -> torch.Tensor:
        net.__dict__["out"] = forward(net, x)
        return net.__dict__["out"]  # type: ignore[no-any-return]

    net.forward = keep
    scheme = Tqt(bits=bits)
    trainer(tmp_path, QuantCallback(scheme, start=0, include=["body.*"]), precision="bf16-mixed", max_epochs=1).fit(
        net, loader()
    )
    assert set(seen) == {dtype}


@pytest.mark.parametrize("precision", ["16-true", "bf16-true"])
def test_half_precision_parameters_are_refused(tmp_path: Path, precision: str) -> None:
    with pytest.raises(ConfigError, match=f"precision='{precision}'"):
        trainer(tmp_path, QuantCallback(), precision=precision).fit(seeded_net(), loader())


def test_64_bits(tmp_path: Path) -> None:
    net = seeded_net()
    trainer(tmp_path, QuantCallback(start=0), precision="64-true").fit(net, loader(), loader())
    assert quantized(net)
    assert net.body.conv1.weight.dtype is torch.float64
    assert net(loader().dataset[0][0][None].double()).dtype is torch.float64


def test_the_plugin_keeps_class_name_and_state_of_the_one_that_was_there(tmp_path: Path) -> None:
    base = trainer(tmp_path, precision="bf16-mixed").precision_plugin
    net = seeded_net()
    ours = low_bit(base, net, lambda: None)  # type: ignore[arg-type, return-value]  # never called
    assert isinstance(ours, type(base))
    assert type(ours).__qualname__ == type(base).__qualname__
    assert ours.precision == "bf16-mixed"
    thawed = pickle.loads(pickle.dumps(ours))
    assert type(thawed) is type(base)
    assert vars(thawed).keys() == vars(base).keys()


def test_the_explicit_form_does_the_same(tmp_path: Path) -> None:
    results = []
    for plugins in ([], [LowBitPrecision()]):
        net = seeded_net()
        torch.manual_seed(1)
        trainer(tmp_path, QuantCallback(start=0), plugins=plugins).fit(net, loader())
        results.append(states(net))
    assert_equal_states(*results)


def test_layers_step_with_the_optimizer_of_their_weight(tmp_path: Path) -> None:
    net = seeded_net()
    trainer(tmp_path, QuantCallback(start=0), max_epochs=1).fit(net, loader())
    everything: Any = torch.optim.SGD(net.parameters(), 0.1)
    assert {"body.conv1", "body.bn2", "body.relu2", "body.fc"} <= owned_modules(net, everything)
    head: Any = torch.optim.SGD(net.body.fc.parameters(), 0.1)
    assert owned_modules(net, head) == {"body.fc"}

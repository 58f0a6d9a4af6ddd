"""The ways a low-bit network leaves and enters files, with a Trainer, without one, and from float weights."""

from __future__ import annotations

import importlib
import textwrap
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from launch import run_code
from plugins.lifecycle_nets import (
    NAMESPACES,
    QUIET,
    Body,
    assert_equal_states,
    loader,
    net_class,
    quantized,
    seeded_net,
    states,
    trainer,
)
from torch import Tensor, nn

from lightning_lowbit import Calibrate, QuantCallback, Tqt, convert, float_state_dict, load_from_checkpoint
from lightning_lowbit.errors import ConfigError
from lightning_lowbit.modules.convert import is_converted
from lightning_lowbit.modules.revert import revert
from lightning_lowbit.plugins.checkpoint import KEY, initialize_from, keep_record
from lightning_lowbit.schemes import registry

pytestmark = QUIET


def outputs(net: Any) -> Tensor:
    with torch.no_grad():
        return torch.cat([net(x) for x, _ in loader()])


def saver(folder: Path, namespace: str = NAMESPACES[0], **options: Any) -> Any:
    pl = importlib.import_module(namespace)
    return pl.callbacks.ModelCheckpoint(folder, "best", monitor="val_loss", **options)


# How a network is built, what a file holds, and the namespace: every pair of the three occurs.
WAYS = [
    pytest.param(built, weights_only, NAMESPACES[other], id=f"{built}-{'weights' if weights_only else 'whole'}-{other}")
    for built, weights_only, other in (
        ("init", False, 0), ("init", True, 1), ("configure_model", False, 1), ("configure_model", True, 0),
        ("setup", False, 0), ("setup", True, 1),
    )
]  # fmt: skip


@pytest.mark.parametrize(("built", "weights_only", "namespace"), WAYS)
def test_a_checkpoint_serves_test_best_and_a_fresh_trainer(
    tmp_path: Path, namespace: str, weights_only: bool, built: str
) -> None:
    net = seeded_net(namespace, built)
    run = trainer(
        tmp_path,
        QuantCallback(start=0),
        saver(tmp_path, namespace, save_weights_only=weights_only),
        namespace=namespace,
    )
    run.fit(net, loader(), loader())
    tested = run.test(net, loader(), ckpt_path="best", verbose=False)
    assert tested[0]["test_loss"] == pytest.approx(float(run.checkpoint_callback.best_model_score))
    predicted = torch.cat(run.predict(net, loader(), ckpt_path="best"))
    fresh = seeded_net(namespace, built, seed=5)
    again = trainer(tmp_path, QuantCallback(), namespace=namespace)
    assert again.test(fresh, loader(), ckpt_path=tmp_path / "best.ckpt", verbose=False) == tested
    assert torch.equal(torch.cat(again.predict(fresh, loader())), predicted)


def test_predict_in_a_fresh_process_equals(tmp_path: Path) -> None:
    net = seeded_net()
    trainer(tmp_path, QuantCallback(start=0), saver(tmp_path)).fit(net, loader(), loader())
    expected = torch.cat(trainer(tmp_path, QuantCallback()).predict(net, loader(), ckpt_path=tmp_path / "best.ckpt"))
    script = f"""
        from pathlib import Path
        import torch
        torch.set_num_threads(1)
        from plugins.lifecycle_nets import loader, seeded_net, trainer
        from lightning_lowbit import QuantCallback
        folder = Path({str(tmp_path)!r})
        run = trainer(folder, QuantCallback())
        out = run.predict(seeded_net(seed=3), loader(), ckpt_path=folder / "best.ckpt")
        torch.save(torch.cat(out), folder / "out.pt")
    """
    run_code(textwrap.dedent(script))
    assert torch.equal(torch.load(tmp_path / "out.pt", weights_only=True), expected)


@pytest.mark.parametrize(("built", "weights_only", "namespace"), WAYS[:4])
def test_load_from_checkpoint_needs_no_callback(tmp_path: Path, namespace: str, weights_only: bool, built: str) -> None:
    net = seeded_net(namespace, built)
    trainer(
        tmp_path,
        QuantCallback(start=0),
        saver(tmp_path, namespace, save_weights_only=weights_only),
        namespace=namespace,
    ).fit(net, loader(), loader())
    trainer(tmp_path, QuantCallback(), namespace=namespace).validate(
        net, loader(), ckpt_path=tmp_path / "best.ckpt", verbose=False
    )
    loaded = load_from_checkpoint(net_class(namespace, built), tmp_path / "best.ckpt")
    assert type(loaded) is net_class(namespace, built)
    assert_equal_states(states(loaded), states(net))
    plain_class = net_class(namespace, built)
    trainer(tmp_path, namespace=namespace, max_epochs=1).fit(plain := plain_class(), loader())
    torch.save({"state_dict": plain.state_dict(), "pytorch-lightning_version": "2.6.6"}, tmp_path / "plain.ckpt")
    assert loaded.training == plain_class.load_from_checkpoint(tmp_path / "plain.ckpt").training
    net.eval()
    loaded.eval()
    assert torch.equal(outputs(loaded), outputs(net))
    assert quantized(loaded)


def test_everything_in_the_file_loads_with_weights_only(tmp_path: Path) -> None:
    net = seeded_net()
    scheme = Tqt(bits=4, overrides={"body.conv2": {"weight_bits": 8}})
    trainer(tmp_path, QuantCallback(scheme, start=0, skip=[nn.Linear]), saver(tmp_path)).fit(net, loader(), loader())
    file = torch.load(tmp_path / "best.ckpt", weights_only=True)
    assert file[KEY]["scheme"] == "tqt"
    assert file[KEY]["options"]["weight_bits"] == 4
    assert file[KEY]["layers"] == ["body.conv1", "body.conv2"]
    assert all("lowbit" in key for key in set(file["state_dict"]) - set(seeded_net().state_dict()))
    resumed = trainer(tmp_path, QuantCallback(scheme, start=0, skip=[nn.Linear]), max_epochs=2)
    resumed.fit(seeded_net(), loader(), loader(), ckpt_path=tmp_path / "best.ckpt")  # torch.load(weights_only=True)


def test_a_missing_low_bit_key_is_an_error(tmp_path: Path) -> None:
    net = seeded_net()
    trainer(tmp_path, QuantCallback(start=0), saver(tmp_path)).fit(net, loader(), loader())
    file = torch.load(tmp_path / "best.ckpt", weights_only=True)
    del file["state_dict"]["body.conv1.lowbit_weight.log2_t"]
    torch.save(file, tmp_path / "cut.ckpt")
    with pytest.raises(RuntimeError, match=r"Missing key.*lowbit_weight.log2_t"):
        trainer(tmp_path, QuantCallback()).test(seeded_net(), loader(), ckpt_path=tmp_path / "cut.ckpt")
    with pytest.raises(RuntimeError, match=r"Missing key.*lowbit_weight.log2_t"):
        load_from_checkpoint(type(net), tmp_path / "cut.ckpt")


def test_other_layers_than_in_the_file_are_refused_by_path(tmp_path: Path) -> None:
    trainer(tmp_path, QuantCallback(start=0), saver(tmp_path)).fit(seeded_net(), loader(), loader())
    with pytest.raises(ConfigError, match=r"body\.fc\S*: the checkpoint has"):
        trainer(tmp_path, QuantCallback(skip=["body.fc"])).test(
            seeded_net(), loader(), ckpt_path=tmp_path / "best.ckpt"
        )


@pytest.mark.parametrize("call", ["validate", "test", "predict"])
@pytest.mark.parametrize("source", ["own batches", "Calibrate"])
def test_a_float_checkpoint_is_completed_and_calibrated_for_evaluation(tmp_path: Path, call: str, source: str) -> None:
    plain = seeded_net()
    run = trainer(tmp_path, saver(tmp_path))
    run.fit(plain, loader(), loader())
    fresh = seeded_net(seed=4)
    before = torch.load(tmp_path / "best.ckpt", weights_only=True)["state_dict"]
    neighbors = [Calibrate(loader(seed=3), batches=2)] if source == "Calibrate" else []
    getattr(trainer(tmp_path, QuantCallback(), *neighbors), call)(fresh, loader(), ckpt_path=tmp_path / "best.ckpt")
    assert quantized(fresh)
    assert_equal_states(float_state_dict(fresh), before)


def test_a_float_checkpoint_does_not_resume(tmp_path: Path) -> None:
    trainer(tmp_path, saver(tmp_path)).fit(seeded_net(), loader(), loader())
    with pytest.raises(ConfigError, match=r"is a float checkpoint: it initializes, it does not resume.*init_from="):
        trainer(tmp_path, QuantCallback()).fit(seeded_net(), loader(), loader(), ckpt_path=tmp_path / "best.ckpt")


def test_load_from_checkpoint_of_a_float_file_is_the_float_module(tmp_path: Path) -> None:
    plain = seeded_net()
    trainer(tmp_path, saver(tmp_path)).fit(plain, loader(), loader())
    loaded = load_from_checkpoint(type(plain), tmp_path / "best.ckpt")
    assert not is_converted(loaded)


def test_float_state_dict_loads_into_the_plain_class(tmp_path: Path) -> None:
    net = seeded_net()
    trainer(tmp_path, QuantCallback(start=0)).fit(net, loader())
    plain = seeded_net(seed=8)
    plain.load_state_dict(float_state_dict(net))  # strict
    assert all(torch.equal(value, net.state_dict()[key]) for key, value in plain.state_dict().items())


PREFIXES = ("", "module.", "_orig_mod.", "model.", "net.", "module._orig_mod.", "body.", "model.body.")


@pytest.mark.parametrize("prefix", PREFIXES, ids=lambda p: p or "none")
@pytest.mark.parametrize("wrapped", ["", "state_dict", "model"])
def test_init_from_strips_prefixes_of_wrappers(tmp_path: Path, prefix: str, wrapped: str) -> None:
    torch.manual_seed(11)
    body = Body()
    state = {f"{prefix}{key}": value for key, value in body.state_dict().items()}
    torch.save({wrapped: state, "epoch": 3} if wrapped else state, tmp_path / "float.pt")
    net = seeded_net()
    initialize_from(tmp_path / "float.pt", net)
    assert_equal_states(states(net.body), states(body))


@pytest.mark.parametrize("built", ["init", "setup", "configure_model"])
def test_init_from_starts_at_once_from_the_weights(tmp_path: Path, built: str) -> None:
    torch.manual_seed(11)
    torch.save(Body().state_dict(), tmp_path / "float.pt")
    net, first = seeded_net(built=built), {}

    def on_train_batch_start(*args: Any) -> None:
        first.update(
            {}
            if first
            else {
                "body": {k: v.clone() for k, v in float_state_dict(net.body).items()},
                "quantized": quantized(net),
            }
        )

    net.on_train_batch_start = on_train_batch_start
    trainer(tmp_path, QuantCallback(init_from=str(tmp_path / "float.pt")), max_epochs=1).fit(net, loader(), loader())
    assert first["quantized"]
    assert_equal_states(first["body"], torch.load(tmp_path / "float.pt", weights_only=True))


def test_one_callback_initializes_every_module_that_it_meets(tmp_path: Path) -> None:
    torch.save(Body().state_dict(), tmp_path / "float.pt")
    callback = QuantCallback(init_from=str(tmp_path / "float.pt"))
    for seed in (1, 2):
        net = seeded_net(seed=seed)
        trainer(tmp_path, callback).validate(net, loader(), verbose=False)
        assert_equal_states(float_state_dict(net.body), torch.load(tmp_path / "float.pt", weights_only=True))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda s: s.pop("conv2.weight"), "1 missing in the file: body.conv2.weight"),
        (lambda s: s.update(extra=torch.ones(2)), "1 unexpected in the file: extra"),
        (
            lambda s: s.update({"fc.weight": torch.ones(5, 16)}),
            r"of another shape: body.fc.weight \(5, 16\) for \(3, 16\)",
        ),
    ],
    ids=["missing", "unexpected", "shape"],
)
def test_init_from_loads_all_or_nothing(tmp_path: Path, change: Any, said: str) -> None:
    state = dict(Body().state_dict())
    change(state)
    torch.save(state, tmp_path / "float.pt")
    net = seeded_net()
    before = states(net)
    with pytest.raises(ConfigError, match=said):
        initialize_from(tmp_path / "float.pt", net)
    assert_equal_states(states(net), before)


def test_init_from_takes_a_low_bit_checkpoint_as_float_weights(tmp_path: Path) -> None:
    net = seeded_net()
    trainer(tmp_path, QuantCallback(start=0), saver(tmp_path)).fit(net, loader(), loader())
    fresh = seeded_net(seed=2)
    initialize_from(tmp_path / "best.ckpt", fresh)
    saved = torch.load(tmp_path / "best.ckpt", weights_only=True)["state_dict"]
    assert_equal_states(states(fresh), {key: value for key, value in saved.items() if "lowbit" not in key})


@pytest.mark.parametrize("content", [b"", b"no checkpoint", b"PK\x03\x04cut"])
def test_files_that_are_no_checkpoints_are_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "float.pt").write_bytes(content)
    with pytest.raises(ConfigError, match=r"init_from='.*float.pt'"):
        initialize_from(tmp_path / "float.pt", seeded_net())
    with pytest.raises(ConfigError, match="no such file"):
        initialize_from(tmp_path / "absent.pt", seeded_net())


@pytest.mark.parametrize("namespace", NAMESPACES)
@pytest.mark.parametrize("way", ["behind fit", "loaded, without a callback", "state dict alone"])
def test_weights_saved_when_no_run_is_on_hold_the_record(tmp_path: Path, namespace: str, way: str) -> None:
    net, path = seeded_net(namespace), tmp_path / "after.ckpt"
    run = trainer(tmp_path, QuantCallback(Tqt(bits=4), start=0, skip=["body.fc"]), namespace=namespace)
    run.fit(net, loader())
    run.save_checkpoint(path, weights_only=True)
    if way == "loaded, without a callback":
        again = trainer(tmp_path, namespace=namespace)
        again.predict(load_from_checkpoint(type(net), path), loader())
        again.save_checkpoint(path, weights_only=True)
    elif way == "state dict alone":
        torch.save({"state_dict": net.state_dict(), "pytorch-lightning_version": "2.6.6"}, path)
    assert "optimizer_states" not in torch.load(path, weights_only=True)
    loaded = load_from_checkpoint(type(net), path)
    assert_equal_states(states(loaded), states(net))
    assert torch.equal(outputs(loaded.eval()), outputs(net.eval()))
    other = seeded_net(namespace, seed=1)
    trainer(tmp_path, QuantCallback(skip=["body.fc"]), namespace=namespace).predict(other, loader(), ckpt_path=path)
    assert_equal_states(states(other), states(net))


def test_low_bit_weights_without_a_record_load_through_a_trainer_and_say_so_without_one(tmp_path: Path) -> None:
    net, path = seeded_net(), tmp_path / "bare.ckpt"
    trainer(tmp_path, QuantCallback(start=0)).fit(net, loader())
    torch.save({"state_dict": dict(net.state_dict()), "pytorch-lightning_version": "2.6.6"}, path)
    with pytest.raises(ConfigError, match=r"bare\.ckpt.*without the record of their conversion.*QuantCallback"):
        load_from_checkpoint(type(net), path)
    other = seeded_net(seed=1)
    trainer(tmp_path, QuantCallback()).predict(other, loader(), ckpt_path=path)
    assert_equal_states(states(other), states(net))


def test_the_record_leaves_with_the_conversion() -> None:
    net = seeded_net()
    convert(net, "tqt", torch.zeros(2, 1, 6, 6))
    keep_record(net)
    keep_record(net)
    assert len(net._state_dict_hooks) == 1
    assert net.state_dict()._metadata[""][KEY]["scheme"] == "tqt"
    revert(net)
    assert KEY not in net.state_dict()._metadata[""]


@pytest.mark.parametrize("scheme", sorted(registry()))
def test_a_loaded_module_is_taken_by_a_callback_as_it_is(tmp_path: Path, scheme: str) -> None:
    """Layers that the file has in float, by the scheme or by skip=, are no reason to convert the others anew."""
    net, path = seeded_net(), tmp_path / "whole.ckpt"
    left = "body.fc" if scheme in ("bnn", "wageubn") else "body.conv2"  # those leave it float by themselves
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what a scheme thinks of this network
        run = trainer(tmp_path, QuantCallback(scheme, start=0, skip=[left]), max_steps=2)
        run.fit(net, loader(), loader())
        run.save_checkpoint(path)
        loaded = load_from_checkpoint(type(net), path)
        trainer(tmp_path, QuantCallback(scheme)).validate(loaded, loader(seed=3), verbose=False)
    assert_equal_states(states(loaded), states(net))
    assert torch.equal(outputs(loaded.eval()), outputs(net.eval()))

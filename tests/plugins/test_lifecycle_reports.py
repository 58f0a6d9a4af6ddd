"""What users of Lightning's former QuantizationAwareTraining reported, each as a test that names the report.

Numbers are issues of Lightning-AI/pytorch-lightning.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint, ModelPruning
from plugins.lifecycle_nets import (
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
from torch.utils.data import DataLoader, TensorDataset

from lightning_lowbit import QuantCallback, load_from_checkpoint
from lightning_lowbit.errors import ConfigError
from lightning_lowbit.modules.convert import is_converted, quantizers

pytestmark = QUIET


class Keywords(net_class()):  # type: ignore[misc]  # made at run time
    """Its forward takes keyword arguments, one of them required."""

    def forward(self, x: Tensor, *, scale: float, offset: float = 0.0) -> Tensor:
        logits: Tensor = self.body(x * scale + offset)
        return logits

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0], scale=2.0, offset=0.5), batch[1])

    validation_step = test_step = predict_step = None  # type: ignore[assignment]


@pytest.mark.parametrize("issue", [15862, 7926])
def test_keyword_arguments_reach_forward(tmp_path: Path, issue: int) -> None:
    """#15862, #7926: the wrapped forward passed positional arguments only."""
    torch.manual_seed(0)
    net = Keywords()
    trainer(tmp_path, QuantCallback(start=0)).fit(net, loader())
    assert quantized(net)
    x = loader().dataset[:4][0]
    net.eval()
    assert not torch.equal(net(x, scale=1.0), net(x, scale=2.0))
    assert not torch.equal(net(x, scale=1.0), net(x, scale=1.0, offset=3.0))


def test_12896_test_with_a_checkpoint_path_after_fit(tmp_path: Path) -> None:
    """#12896: after fit the module had quantized keys that the checkpoint could not fill."""
    net = seeded_net()
    run = trainer(tmp_path, QuantCallback(start=0), ModelCheckpoint(tmp_path, "last"))
    run.fit(net, loader(), loader())
    (tested,) = run.test(net, loader(), ckpt_path=run.checkpoint_callback.best_model_path, verbose=False)
    assert quantized(net)
    assert tested["test_loss"] == pytest.approx(float(run.validate(net, loader(), verbose=False)[0]["val_loss"]))


def test_6457_load_from_checkpoint_of_a_quantized_module(tmp_path: Path) -> None:
    """#6457: "unexpected key(s) in state_dict" for every observer; torch's message names ours."""
    net = seeded_net()
    trainer(tmp_path, QuantCallback(start=0), ModelCheckpoint(tmp_path, "last")).fit(net, loader(), loader())
    with pytest.raises(RuntimeError, match=r"Unexpected key.*lowbit"):
        net_class().load_from_checkpoint(tmp_path / "last.ckpt")
    assert_equal_states(states(load_from_checkpoint(net_class(), tmp_path / "last.ckpt")), states(net))


@pytest.mark.parametrize("permanent", [True, False])
def test_11047_pruning_together_with_quantization(tmp_path: Path, permanent: bool) -> None:
    """#11047: pruning renames weights, and the quantization callback did not find them again."""
    net = seeded_net()
    prune = ModelPruning("l1_unstructured", amount=0.5, make_pruning_permanent=permanent, verbose=0)
    callback = QuantCallback(start=0)
    run = trainer(tmp_path, callback, prune, ModelCheckpoint(tmp_path, "last"), max_epochs=3)
    run.fit(net, loader(), loader())
    assert quantized(net)
    layer = net.body.conv2
    weight = layer.lowbit_weight(layer.effective(torch.zeros(1))[0])
    assert float((weight == 0).float().mean()) > 0.4  # zero is on every grid: pruned stays pruned
    assert callback.rule is not None
    moved = {
        q.site.key
        for _, q in quantizers(net)
        if getattr(q, "log2_t", None) is not None and float(q.log2_t.detach()) % 1 != 0.5
    }
    assert moved
    average = callback.rule.state_dict()["optimizer"]
    assert all(float(state["step"]) > 6 for state in average.values() if state)  # stepped after the first pruning, too
    assert sum(bool(state) for state in average.values()) > 3


def test_11047_pruned_norms_are_folded_as_they_are_now(tmp_path: Path) -> None:
    """#11047: pruning renews a norm's weight in the norm's forward, behind the folded layer's."""
    net = seeded_net()
    prune = ModelPruning(
        "l1_unstructured",
        amount=0.5,
        parameters_to_prune=[(net.body.bn1, "weight")],
        make_pruning_permanent=False,
    )
    run = trainer(tmp_path, QuantCallback(start=0), prune, max_epochs=2)
    run.fit(net, loader())
    norm = net.body.bn1
    net.eval()
    x = loader().dataset[:4][0]
    first = net(x)
    with torch.no_grad():
        norm.weight_orig.mul_(3.0)
        changed = net(x)
        assert not torch.equal(changed, first)
        assert torch.equal(net(x), changed)


def test_8507_observers_move_neither_in_validation_nor_in_the_sanity_check(tmp_path: Path) -> None:
    """#8507: observers collected ranges of validation and sanity-check batches."""
    net = seeded_net()
    seen: list[dict[str, Tensor]] = []
    net.on_validation_start = lambda: seen.append(states(net))
    net.on_validation_end = lambda: seen.append(states(net))
    x, y = loader().dataset.tensors
    extreme = DataLoader(TensorDataset(1000 * x, y), 8)
    trainer(tmp_path, QuantCallback(start=0), num_sanity_val_steps=2).fit(net, loader(), extreme)
    for before, after in zip(seen[::2], seen[1::2], strict=True):
        assert_equal_states(before, after)
    assert all(float(q.log2_t.detach()) < 5 for _, q in quantizers(net) if getattr(q, "log2_t", None) is not None)


@pytest.mark.parametrize("built", ["setup", "configure_model"])
def test_models_built_late_are_converted(tmp_path: Path, built: str) -> None:
    """Layers that setup or configure_model builds did not exist when the callback looked for them."""
    net = seeded_net(built=built)
    assert net.body is None
    trainer(tmp_path, QuantCallback(start=0)).fit(net, loader())
    assert quantized(net)


def test_a_module_without_layers_is_refused(tmp_path: Path) -> None:
    class Empty(net_class(built="setup")):  # type: ignore[misc]  # made at run time
        def setup(self, stage: str) -> None:
            self.body = nn.Flatten()

        def configure_optimizers(self) -> None:
            return None

    with pytest.raises(ConfigError, match="nothing to convert"):
        trainer(tmp_path, QuantCallback()).fit(Empty(), loader())


@pytest.mark.filterwarnings("ignore:.*configure_optimizers.*returned")
def test_14447_the_network_is_converted_between_reading_a_checkpoint_and_loading_its_weights(
    tmp_path: Path,
) -> None:
    """#14447: no hook stands between the two, so quantized weights met a float module."""
    net = seeded_net(built="configure_model")
    trainer(tmp_path, QuantCallback(start=0), ModelCheckpoint(tmp_path, "last")).fit(net, loader(), loader())

    class Late(net_class()):  # type: ignore[misc]  # made at run time
        seen: ClassVar[dict[str, bool]] = {}

        def __init__(self) -> None:
            super().__init__()
            self.body = None

        def configure_model(self) -> None:
            self.body = self.body or Body()

        def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            self.seen["converted"] = is_converted(self)
            self.seen["loaded"] = torch.equal(checkpoint["state_dict"]["body.fc.weight"], self.body.fc.weight)

    fresh = Late()
    trainer(tmp_path, QuantCallback()).validate(fresh, loader(), ckpt_path=tmp_path / "last.ckpt", verbose=False)
    assert Late.seen == {"converted": True, "loaded": False}
    assert_equal_states(states(fresh), states(net))

"""Networks, loops and files that users bring to NITI."""

from __future__ import annotations

import copy
import io
import pickle
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from schemes.niti_nets import (
    Net,
    Steps,
    Validated,
    convert_body,
    differing,
    fit,
    images,
    loader,
    on_grid,
    trainer,
    weights,
)  # fmt: skip
from torch import Tensor, nn

from lightning_lowbit import (
    Niti,
    convert,
    float_state_dict,
    load_from_checkpoint,
    lowbit_step,
    summarize,
)
from lightning_lowbit.modules.base import low_bit_modules, switch_of
from lightning_lowbit.modules.block import BlockRange
from lightning_lowbit.modules.carrier import plain
from lightning_lowbit.modules.convert import quantizers
from lightning_lowbit.modules.integer_layers import collect

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*exists and is not empty"),
    pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint need to be provided"),
]


# -- who is updated --------------------------------------------------------------------------------------------
def test_a_step_moves_exactly_the_layers_of_its_optimizer() -> None:
    class Two(Net):
        def __init__(self) -> None:
            super().__init__(nn.ModuleDict({
                "a": nn.Linear(36, 36), "b": nn.Linear(36, 3)
            }))  # fmt: skip
            self.automatic_optimization = False
            self.moved: list[list[str]] = []

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.body["b"](torch.relu(self.body["a"](x.flatten(1))))  # type: ignore[index]
            return y

        def training_step(self, batch: list[Tensor], batch_idx: int) -> None:  # type: ignore[override]
            before = weights(self)
            optimizer = self.optimizers()[batch_idx % 2]  # type: ignore[index]
            optimizer.zero_grad()
            self.manual_backward(F.cross_entropy(self(batch[0]), batch[1]))
            optimizer.step()
            self.moved.append(sorted({name.split(".")[1] for name in differing(before, self)}))

        def configure_optimizers(self) -> Any:
            return [torch.optim.SGD(self.body[k].parameters(), 0.1) for k in "ab"]  # type: ignore[index]

    net, *_ = fit(net=Two, max_epochs=1)
    assert net.moved[-6:] == [["a"], ["b"]] * 3
    assert not any(net.moved[:-6])  # calibration runs the step too


def test_frozen_parameters_stand_still_and_pass_errors_on() -> None:
    def net() -> Net:
        made = Net()
        made.body[5].requires_grad_(False)  # type: ignore[index]
        made.body[0].bias.requires_grad_(False)  # type: ignore[index, union-attr]
        return made

    before: dict[str, Tensor] = {}
    keep = pl.callbacks.LambdaCallback(on_train_batch_start=lambda t, m, *a: before or before.update(weights(m)))
    after, *_ = fit(net=net, callbacks=[keep])
    assert differing(before, after) == ["body.0.weight"]


@pytest.mark.parametrize("kind", ["shared weight", "layer called twice"])
def test_what_is_used_twice_is_updated_once_from_both_gradients(kind: str) -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.out = nn.Linear(36, 36), nn.Linear(36, 36), nn.Linear(36, 3)
            if kind == "shared weight":
                self.b.weight = self.a.weight
            else:
                self.b = self.a

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.out(torch.relu(self.b(torch.relu(self.a(x.flatten(1))))))
            return y

    steps = Steps()
    net, *_ = fit(Niti(mu=3), [steps], net=lambda: Net(Twice()))
    assert all(0 < moved <= 8 for moved in steps.moves)
    assert torch.equal(net.body.a.weight, net.body.b.weight)
    assert torch.equal(net.body.a.lowbit_weight.codes(), net.body.b.lowbit_weight.codes())
    assert on_grid(net)


# -- micro-batches and shifts ----------------------------------------------------------------------------------
def test_micro_batches_add_up_to_the_integer_sum() -> None:
    net, x, y = convert_body(Niti(mu=4))
    switch_of(net).managed = True
    net[4].p = 0.0
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    sums: list[dict[str, Any]] = []
    for part in (slice(0, 8), slice(8, 24)):
        (F.cross_entropy(net(x[part]), y[part]) / 2).backward()
        sums.append(dict(net[5].gathered))
        net[5].gathered.clear()
    (a, ea), (b, eb) = (found["weight"] for found in sums)
    finest = min(int(ea), int(eb))
    want = a.long() * 2 ** (int(ea) - finest) + b.long() * 2 ** (int(eb) - finest)
    copied = copy.deepcopy(net)
    for model, parts in ((net, sums), (copied, sums[::-1])):
        for found in parts:
            for name, (acc, exponent) in found.items():
                collect(model[5], name, acc, exponent)
        assert torch.equal(model[5].gathered["weight"][0].long(), want)
    lowbit_step(net, optimizer)
    assert net[5].gathered == {}


def test_accumulation_steps_once_with_all_gradients() -> None:
    whole = fit(data=loader(batch=8), accumulate_grad_batches=3)
    assert whole[1].global_step == 4
    assert on_grid(whole[0])
    assert differing(whole[0], fit(data=loader(batch=8), accumulate_grad_batches=3)[0]) == []


def test_frozen_shifts_are_renewed_every_few_steps() -> None:
    seen: list[list[float]] = []

    class Ranges(pl.Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
            ranges = [q for _, q in quantizers(pl_module) if isinstance(q, BlockRange)]
            seen.append([float(q.frozen) for q in ranges])

    growing = images()[0] * 2.0 ** (torch.arange(44) // 8)[:, None, None, None]
    net, *_ = fit(Niti(frozen_shifts=3, mu=4), [Ranges()], data=loader(growing))
    changes = [index for index in range(1, 12) if seen[index] != seen[index - 1]]
    assert changes
    assert all(index % 3 == 2 for index in changes)
    # Evaluation uses the same ranges.
    net.eval()
    ranges = [float(q.frozen) for _, q in quantizers(net) if isinstance(q, BlockRange)]
    net(growing[:8])
    assert ranges == [float(q.frozen) for _, q in quantizers(net) if isinstance(q, BlockRange)]
    assert torch.equal(plain(net(growing[:2])), plain(net(growing[:8]))[:2])


# -- networks that users bring ---------------------------------------------------------------------------------
def test_images_of_bytes() -> None:
    class Bytes(Net):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x / 255)

    x = (images()[0] * 40 + 128).clamp(0, 255).to(torch.uint8)
    net, *_ = fit(net=Bytes, data=loader(x))
    assert switch_of(net).run.float_errors == set()
    with torch.no_grad():
        assert net.eval()(x).shape == (44, 3)


class Scale(nn.Module):
    """Float code of the user's with a parameter of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x * self.scale)


@pytest.mark.parametrize("place", ["in front", "between", "behind"])
@pytest.mark.parametrize("layer", [Scale, nn.GELU, lambda: nn.LayerNorm(36)], ids=["own", "GELU", "LayerNorm"])
def test_float_layers_anywhere(place: str, layer: Any) -> None:
    parts = {
        "in front": lambda: [nn.Flatten(), layer(), nn.Linear(36, 36), nn.ReLU(), nn.Linear(36, 3)],
        "between": lambda: [nn.Flatten(), nn.Linear(36, 36), layer(), nn.Linear(36, 3)],
        "behind": lambda: [nn.Flatten(), nn.Linear(36, 36), nn.ReLU(), nn.Linear(36, 36), layer()],
    }[place]
    before: dict[str, Tensor] = {}
    keep = pl.callbacks.LambdaCallback(on_train_batch_start=lambda t, m, *a: before or before.update(weights(m)))
    net, *_ = fit(net=lambda: Net(nn.Sequential(*parts())), callbacks=[keep])
    assert differing(before, net) == list(before)  # float parameters and integer ones alike
    assert on_grid(net)
    errors = {"in front": set(), "between": {"body.1"}, "behind": {"body.3"}}[place]
    assert switch_of(net).run.float_errors == errors or place != "in front"


def test_layers_that_are_left_out_stay_float_and_train() -> None:
    before: dict[str, Tensor] = {}
    keep = pl.callbacks.LambdaCallback(on_train_batch_start=lambda t, m, *a: before or before.update(weights(m)))
    net, *_ = fit(quant={"skip": ["body.5"]}, callbacks=[keep])
    assert type(net.body[5]) is nn.Linear
    assert differing(before, net) == list(before)
    assert "body.5 (by skip=)" in str(switch_of(net).conversion)


def test_a_forward_that_nobody_can_follow() -> None:
    class Branching(Net):
        def forward(self, x: Tensor) -> Tensor:
            x = self.body[1](self.body[0](x))  # type: ignore[index]
            if float(x.detach().abs().sum()) < 0:
                x = x * 2
            x = F.max_pool2d(x, 2)
            y: Tensor = self.body[5](x.flatten(1))  # type: ignore[index]
            return y

    net, *_ = fit(net=Branching)
    assert on_grid(net)
    assert "not followed" in str(switch_of(net).conversion)


# -- reports, files, loops -------------------------------------------------------------------------------------
def test_the_summary_reads() -> None:
    net, *_ = fit()
    summary = summarize(net)
    text = str(summary)
    assert "2 of 2 layers low-bit, scheme niti" in text
    assert "training bit-identical on any machine: yes" in text
    assert "int8·2^" in text
    assert summary["body.0.weight"].grid.bits == 8  # type: ignore[union-attr]
    assert max(map(len, text.splitlines())) < 200


def test_float_weights_and_checkpoints_hold_the_integers(tmp_path: Path) -> None:
    net, run, _ = fit(net=Validated, val=loader())
    run.save_checkpoint(tmp_path / "net.ckpt")
    x = images()[0]
    with torch.no_grad():
        want = plain(net.eval()(x))
        plain_net = Net()
        plain_net.load_state_dict(float_state_dict(net))
        torch.testing.assert_close(plain_net.eval()(x), want, atol=0.1, rtol=0)
        loaded = load_from_checkpoint(Net, tmp_path / "net.ckpt")
        assert torch.equal(plain(loaded.eval()(x)), want)
        assert torch.equal(plain(pickle.loads(pickle.dumps(net.body))(x)), want)
        file = io.BytesIO()
        torch.save(net.body, file)
        file.seek(0)
        assert torch.equal(plain(torch.load(file, weights_only=False)(x)), want)
        assert torch.equal(plain(copy.deepcopy(net)(x)), want)


def test_a_plain_loop_does_what_the_trainer_does() -> None:
    trained, *_ = fit(Niti(mu=4), net=lambda: Net(_quiet()), max_epochs=1)
    torch.manual_seed(0)
    net = _quiet()
    convert(net, Niti(mu=4), images()[0])
    net.train()
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    for number, (x, y) in enumerate(loader()):
        switch_of(net).run.batch = number
        # As under the callback, random numbers belong to paths.
        for path, module in low_bit_modules(net):
            module.path = f"body.{path}"

        def closure(x: Tensor = x, y: Tensor = y) -> Tensor:
            loss = F.cross_entropy(net(x), y)
            loss.backward()
            return loss

        lowbit_step(net, optimizer, closure)
    assert differing(trained.body, net) == []


def _quiet() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(36, 3))


def test_training_without_the_rule_warns_once() -> None:
    net, x, y = convert_body()
    with pytest.warns(UserWarning, match="without its update rule.*lowbit_step"):
        F.cross_entropy(net(x), y).backward()


def test_it_learns() -> None:
    net, *_ = fit(max_epochs=12)
    assert sum(net.losses[-6:]) < 0.6 * sum(net.losses[:6])


def test_fine_tuning_goes_on_where_float_training_ended() -> None:
    x, y = images()
    torch.manual_seed(0)
    float_net = Net()
    trainer(max_epochs=12).fit(float_net, loader())

    def loss(net: Net) -> float:
        return float(F.cross_entropy(net.eval()(x), y).detach())

    tuned, *_ = fit(Niti(recipe="finetune"), net=lambda: Net(copy.deepcopy(float_net.body).train()), max_epochs=6)
    spoiled, *_ = fit(Niti(recipe="scratch"), net=lambda: Net(copy.deepcopy(float_net.body).train()), max_epochs=1)
    assert loss(tuned) < loss(float_net) < loss(spoiled)

"""BNN through its seam: options, policies of the ends, latents, stages, Bop, noise and norms."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import EMAWeightAveraging
from schemes.conformance import trainer as quiet_trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_lowbit import Bnn, QuantCallback, convert, load_from_checkpoint, lowbit_step, summarize
from lightning_lowbit.errors import ConfigError
from lightning_lowbit.modules.base import switch_of
from lightning_lowbit.modules.binary import LatentSign, Rectifier, SignInput
from lightning_lowbit.numerics.binary import binary_sign
from lightning_lowbit.plugins.precision import rule_of
from lightning_lowbit.schemes.bnn_training import BopRule, LatentRule


class Net(pl.LightningModule):
    """Four layers, norms behind the first three; ``act`` between them."""

    def __init__(self, act: type[nn.Module] = nn.Hardtanh, optimizer: str = "adam", bias: bool = False) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(1, 6, 3, padding=1, bias=bias), nn.BatchNorm2d(6), act(),
            nn.Conv2d(6, 8, 3, padding=1, stride=2, bias=bias), nn.BatchNorm2d(8), act(),
            nn.Flatten(), nn.Linear(8 * 9, 10, bias=bias), nn.BatchNorm1d(10), act(), nn.Linear(10, 3),
        )  # fmt: skip
        self.kind = optimizer

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.net(x)
        return y

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        if self.kind == "sgd":
            return torch.optim.SGD(self.parameters(), lr=0.5, momentum=0.9, weight_decay=1e-3)
        return torch.optim.Adam(self.parameters(), lr=0.1, weight_decay=1e-3)


def net(seed: int = 0, **options: Any) -> Net:
    torch.manual_seed(seed)
    return Net(**options)


def data(samples: int = 24) -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(samples, 1, 6, 6, generator=generator)
    return DataLoader(TensorDataset(x, (x.mean((1, 2, 3)) > 0).long()), batch_size=6)


def trainer(*callbacks: Any, **options: Any) -> pl.Trainer:
    return quiet_trainer(*callbacks, **{"max_epochs": 2, **options})


def converted(seed: int = 0, **options: Any) -> Net:
    module = net(seed)
    convert(module, "bnn", data().dataset[:6][0], **options)
    return module


def binary_layers(module: nn.Module) -> list[Any]:
    return [m for m in module.modules() if isinstance(getattr(m, "lowbit_weight", None), LatentSign)]


# -- options and policies ------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"ste": "hardtanh"}, "ste='hardtanh'.*htanh"),
        ({"first": "int4"}, "first='int4'"),
        ({"weight_ste": "annealed"}, "anneals the signs of activations"),
        ({"latent_std": 0.0}, "latent_std=0.0"),
        ({"latent_std": "some"}, "latent_std='some'"),
        ({"bop_gamma": 2.0}, "bop_gamma=2.0"),
        ({"update": "bop", "scale": "channel_mean"}, "its weights are signs and nothing else"),
        ({"weights_at": 1.5}, "weights_at"),
        ({"pad_value": 2}, "pad_value=2"),
        ({"weights_at": None}, "never become binary"),
        ({"shift_init": "mean"}, "without shift=True"),
        ({"latent_std": float("inf")}, "latent_std=inf"),
    ],
    ids=[
        "ste",
        "first",
        "weight_ste",
        "zero_std",
        "word_std",
        "gamma",
        "bop",
        "moment",
        "pad",
        "never",
        "no_shift",
        "inf",
    ],
)
def test_a_wrong_option_says_what_is_allowed(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        Bnn(**options)


def test_the_ends_stay_float_by_graph_order_and_say_so() -> None:
    result = convert(net(), "bnn")
    assert [layer.path for layer in result.layers] == ["net.3", "net.7"]
    assert result.skipped == {
        "net.0": "first layer, by first='float'", "net.10": "last layer, by last='float'",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("policy", "kinds"),
    [("binary", (SignInput, LatentSign)), ("float_input", (type(None), LatentSign)), ("int8", ("int8", "int8"))],
    ids=["binary", "float_input", "int8"],
)
def test_the_ends_follow_their_policy(policy: str, kinds: tuple[Any, Any]) -> None:
    module = converted(first=policy, last=policy)
    for layer in (module.net[0], module.net[10]):
        for quantizer, kind in zip((layer.lowbit_input, layer.lowbit_weight), kinds, strict=True):  # type: ignore[union-attr]
            if isinstance(kind, str):
                assert str(quantizer.grid()).startswith(kind)  # type: ignore[union-attr, operator]
            else:
                assert isinstance(quantizer, kind)


def test_nothing_left_to_binarize_is_refused_with_the_reasons() -> None:
    with pytest.raises(ConfigError, match="1 first layer, by first='float', 1 last layer"):
        convert(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)), "bnn")


def test_depthwise_and_transposed_layers_stay_float_with_their_reason() -> None:
    module = nn.Sequential(
        nn.Conv2d(1, 4, 1), nn.Conv2d(4, 4, 3, groups=4), nn.Conv2d(4, 4, 1), nn.ConvTranspose2d(4, 4, 2),
        nn.Conv2d(4, 2, 1),
    )  # fmt: skip
    result = convert(module, "bnn")
    assert result.skipped["1"] == "depthwise layer, by depthwise='float'"
    assert result.skipped["3"] == "ConvTranspose2d has no binary form"
    forced = convert(nn.Sequential(nn.Conv2d(1, 4, 1), nn.Conv2d(4, 4, 3, groups=4), nn.Conv2d(4, 2, 1)), "bnn",
                     depthwise="binary")  # fmt: skip
    assert [layer.path for layer in forced.layers] == ["1"]


@pytest.mark.filterwarnings("ignore:.*LeafSpec", "ignore:.*does not have many workers")
def test_what_trains_badly_is_warned_of_once_and_stands_in_the_report() -> None:
    module = net(act=nn.ReLU)
    with pytest.warns(UserWarning, match=r"train badly[\s\S]*net\.2.*hardtanh") as caught:
        trainer(QuantCallback("bnn"), max_epochs=1).fit(module, data())
    assert sum("train badly" in str(w.message) for w in caught) == 1
    assert any(note.startswith("trains badly: net.2") for note in summarize(module).notes)


def test_the_report_claims_no_more_than_integer_sums() -> None:
    module = net(act=nn.ReLU)
    convert(module, "bnn", data().dataset[:6][0], first="int8", last="int8", relu="prelu")
    (claim,) = [note for note in summarize(module).notes if note.startswith("evaluation integer-exact")]
    assert claim == ("evaluation integer-exact: no: 3 float batch norms between integer sums; 2 float activations")


# -- layers --------------------------------------------------------------------------------------------------
def test_evaluation_adds_up_signs_and_then_scales() -> None:
    module = converted(scale="channel_mean").eval()
    layer: Any = module.net[7]
    x = torch.randn(5, 72)
    dot = F.linear(binary_sign(x).double(), binary_sign(layer.weight).double())
    assert torch.equal(layer(x), dot.float() * layer.weight.abs().mean(1, dtype=torch.float64).float())


def test_a_window_stands_in_front_of_every_binary_layer() -> None:
    layer: Any = converted().train().net[7]
    x = torch.linspace(-2, 2, 72).expand(3, 72).clone().requires_grad_()
    layer(x).sum().backward()
    assert torch.equal(x.grad != 0, (x.abs() <= 1) & (x.grad != 0))  # type: ignore[operator]
    assert bool((x.grad[x.abs() > 1] == 0).all())  # type: ignore[index]
    assert bool((x.grad != 0).any())  # type: ignore[union-attr]


def test_linear_takes_any_number_of_axes() -> None:
    layer: Any = converted(scale="max").eval().net[7]
    x = torch.randn(2, 3, 72)
    assert torch.equal(layer(x), layer(x.reshape(6, 72)).reshape(2, 3, 10))


def test_padding_with_ones_and_with_zeros() -> None:
    x = torch.randn(2, 6, 6, 6)
    for value in (0, 1):
        layer: Any = converted(pad_value=value).eval().net[3]
        padded = F.pad(binary_sign(x), (1, 1, 1, 1), value=float(value))
        assert torch.equal(layer(x), F.conv2d(padded, binary_sign(layer.weight), stride=2))


def test_evaluation_leaves_autocast_and_training_keeps_whole_sums() -> None:
    module = converted()
    x = torch.randn(6, 1, 6, 6)
    want = module.eval()(x)
    with torch.autocast("cpu", torch.bfloat16):
        layer: Any = module.net[7]
        got = layer(torch.randn(4, 72))
        assert got.dtype == torch.float32
        assert layer.train()(torch.randn(4, 72)).dtype == torch.float32
    assert torch.equal(module.eval()(x), want)


def test_int8_ends_add_up_integers_whatever_their_number() -> None:
    """3000 products of 8 bits leave the integers that float32 counts."""
    torch.manual_seed(1)
    module = nn.Sequential(nn.Linear(3000, 16, bias=True), nn.BatchNorm1d(16), nn.Linear(16, 16), nn.Linear(16, 2))
    x = torch.rand(4, 3000) * 0.5 + 7.4
    with torch.no_grad():
        module[0].weight.copy_(torch.rand(16, 3000) * 0.05 + 0.93)  # type: ignore[union-attr, operator]
    convert(module, "bnn", x, first="int8")
    layer: Any = module.eval()[0]
    unit = 2.0 ** float(layer.lowbit_input.exponent() + layer.lowbit_weight.exponent())
    sums = F.linear(layer.lowbit_input(x).double(), layer.lowbit_weight(layer.weight).double())
    exact = ((sums + layer.lowbit_bias(layer.bias).double()) / unit).round()
    assert exact.abs().max().item() > 2**24
    assert torch.equal(layer(x), exact.float() * torch.tensor(unit))


def test_an_int8_weight_that_moved_is_evaluated_on_its_new_range_at_once() -> None:
    module, x = converted(first="int8").eval(), torch.randn(4, 1, 6, 6)
    module(x)
    with torch.no_grad():
        module.net[0].weight.mul_(4)  # type: ignore[union-attr, operator]
    layer: Any = module.net[0]
    first, second = layer(x), layer(x)
    assert torch.equal(first, second)


def test_detect_nan_names_the_layer() -> None:
    layer: Any = converted(detect_nan=True).train().net[7]
    with pytest.raises(ConfigError, match=r"net\.7\.lowbit_input: got NaN"):
        layer(torch.full((2, 72), float("nan")))
    layer.eval()(torch.full((2, 72), float("nan")))


def test_evaluation_inside_training_does_not_touch_latents() -> None:
    module = converted(update="latent")
    before = copy.deepcopy(module.state_dict())
    module.eval()(torch.randn(6, 1, 6, 6))
    assert all(torch.equal(before[key], value) for key, value in module.state_dict().items())


def test_a_shared_weight_has_one_latent() -> None:
    torch.manual_seed(0)
    module = nn.Sequential(*(nn.Linear(5, 5) for _ in range(4)))
    module[2].weight = module[1].weight
    convert(module, "bnn", torch.randn(4, 5))
    optimizer = torch.optim.SGD(module.parameters(), lr=10.0)
    module(torch.randn(4, 5)).square().sum().backward()
    lowbit_step(module, optimizer)
    assert module[2].weight is module[1].weight
    assert module[1].weight.abs().max().item() <= 1  # type: ignore[operator, arg-type]


# -- rectifiers, shifts and norms ----------------------------------------------------------------------------
@pytest.mark.parametrize("kind", ["hardtanh", "prelu", "rprelu"])
def test_a_rectifier_that_a_sign_reads_is_replaced_and_no_other(kind: str) -> None:
    module = net(act=nn.ReLU)
    convert(module, "bnn", data().dataset[:6][0], relu=kind)
    replaced = [
        name for name, m in module.net.named_children() if isinstance(getattr(m, "lowbit_output", None), Rectifier)
    ]
    assert replaced == ["2", "5"]  # the last one is read by a float layer
    assert switch_of(module).conversion.findings == []
    x = torch.linspace(-2, 2, 6 * 4).reshape(1, 6, 2, 2)
    y: Tensor = module.net[2](x)
    want = x.clamp(-1, 1) if kind == "hardtanh" else torch.where(x > 0, x, 0.25 * x)
    assert torch.equal(y, want)
    channels = [p.numel() for p in module.net[2].lowbit_output.parameters()]  # type: ignore[union-attr]
    assert channels == {"hardtanh": [], "prelu": [6], "rprelu": [6, 6, 6]}[kind]


def test_shifts_and_slopes_learn_though_the_user_s_optimizer_never_sees_them() -> None:
    module = net(act=nn.ReLU)
    trainer(QuantCallback(Bnn(relu="rprelu", shift=True))).fit(module, data())
    seen = {id(p) for group in module.optimizers().param_groups for p in group["params"]}  # type: ignore[union-attr]
    ours = {name: p for name, p in module.named_parameters() if "lowbit" in name}
    assert (
        sorted(name.rpartition(".")[2] for name in ours)
        == ["after"] * 2 + ["before"] * 2 + ["shift"] * 2 + ["slope"] * 2
    )
    for name, parameter in ours.items():
        assert id(parameter) not in seen
        assert not torch.equal(parameter, torch.full_like(parameter, 0.25 if name.endswith("slope") else 0.0)), name


def test_a_shift_may_begin_at_the_mean_so_that_a_rectifier_leaves_two_signs() -> None:
    module, x = net(act=nn.ReLU), data().dataset[:6][0]
    with torch.no_grad():
        inputs = module.eval().net[:3](x)
    convert(module, "bnn", x, shift=True, shift_init="mean")
    layer: Any = module.net[3]
    torch.testing.assert_close(layer.lowbit_input.shift, -inputs.mean((0, 2, 3)))
    signs = layer.lowbit_input(inputs)
    assert bool((signs == -1).any(0).any(-1).any(-1).all())
    assert switch_of(module).conversion.findings == []


def test_a_norm_is_one_affine_function_in_evaluation_and_torch_s_own_in_training() -> None:
    module = converted()
    norm: Any = module.net[4]
    with torch.no_grad():
        norm.running_mean.normal_()
        norm.weight.normal_()
    twin = nn.BatchNorm2d(8)
    twin.load_state_dict(norm.state_dict())
    x = torch.randint(-9, 9, (4, 8, 3, 3)).float()
    a = (norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()).float().reshape(8, 1, 1)
    torch.testing.assert_close(norm.eval()(x), twin.eval()(x))
    b = (
        norm.bias.double()
        - norm.running_mean.double() * norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()
    )
    assert torch.equal(norm(x), x * a + b.float().reshape(8, 1, 1))
    assert torch.equal(norm.train()(x), twin.train()(x))


@pytest.mark.parametrize("tokens", [5, 8], ids=["other", "equal"])
@pytest.mark.parametrize("kind", ["prelu", "rprelu"])
def test_slopes_and_shifts_go_along_features_wherever_they_stand(kind: str, tokens: int) -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.Linear(8, 3))
    x = torch.randn(6, tokens, 4)
    convert(module, "bnn", x, relu=kind, shift=True)
    op: Any = module[1]
    with torch.no_grad():
        op.lowbit_output.slope.copy_(torch.linspace(0, 1, 8))
    y = torch.randn(6, tokens, 8)
    assert torch.equal(op(y), torch.where(y > 0, y, torch.linspace(0, 1, 8) * y))
    assert torch.equal(module(x), torch.stack([module(sample) for sample in x]))


def test_one_image_is_a_batch_of_one() -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(2, 6, 1), nn.Conv2d(6, 6, 3, padding=1), nn.Conv2d(6, 6, 3), nn.Conv2d(6, 2, 1))
    x = torch.randn(4, 2, 6, 6)
    convert(module, "bnn", x, scale="channel_mean", shift=True, first="int8", last="int8")
    with torch.no_grad():
        module[1].lowbit_input.shift.normal_()  # type: ignore[union-attr, operator]
        assert torch.equal(module.eval()(x[0]), module(x[:1])[0])


def test_an_input_without_a_negative_value_is_warned_of() -> None:
    module = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))
    with pytest.warns(UserWarning, match=r"0\.lowbit_input: the network's input has no negative value.*int8"):
        convert(module, "bnn", torch.rand(6, 4), first="binary")


# -- latents and stages --------------------------------------------------------------------------------------
def test_latents_are_clipped_behind_every_step_and_biases_are_not() -> None:
    for clip in (False, True):
        module = net(bias=True)
        convert(module, "bnn", data().dataset[:6][0], clip_bias=clip)
        with torch.no_grad():
            module.net[3].bias.fill_(3.0)  # type: ignore[union-attr, operator]
        optimizer = torch.optim.SGD(module.parameters(), lr=100.0)
        F.cross_entropy(module(torch.randn(6, 1, 6, 6)), torch.tensor([0, 1, 2, 0, 1, 2])).backward()
        lowbit_step(module, optimizer)
        for layer in binary_layers(module):
            assert layer.weight.abs().max().item() == 1
        assert (module.net[3].bias.abs().max().item() <= 1) is clip  # type: ignore[union-attr, operator, arg-type]
        assert module.net[0].weight.abs().max().item() > 1  # type: ignore[union-attr, operator, arg-type]  # float


def test_a_checkpoint_holds_latents_and_foreign_ones_are_clipped(tmp_path: Path) -> None:
    module = net()
    run = trainer(QuantCallback("bnn"))
    run.fit(module, data())
    run.save_checkpoint(tmp_path / "end.ckpt")
    saved = torch.load(tmp_path / "end.ckpt")["state_dict"]["net.3.weight"]
    assert torch.equal(saved, module.net[3].weight)  # type: ignore[arg-type]
    assert int((saved.abs() < 1).sum()) > 0
    state = {key: value * 7 if key == "net.3.weight" else value for key, value in module.state_dict().items()}
    module.load_state_dict(state)
    assert module.net[3].weight.abs().max().item() == 1  # type: ignore[union-attr, operator, arg-type]


@pytest.mark.filterwarnings("ignore:You're using the WeightAveraging callback")
def test_averaging_averages_latents_not_signs() -> None:
    module, average = net(), EMAWeightAveraging(decay=0.5)
    seen: list[Tensor] = []

    class Note(pl.Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
            seen.append(pl_module.net[3].weight.detach().clone())

    trainer(QuantCallback("bnn"), average, Note(), max_epochs=1).fit(module, data())
    want = seen[0]
    for latent in seen[1:]:
        want = 0.5 * want + 0.5 * latent
    torch.testing.assert_close(module.net[3].weight.detach(), want)  # type: ignore[union-attr, operator]


def test_pretrained_weights_become_latents_without_a_change_of_function() -> None:
    """Rescaled by one positive number a tensor: no sign changes, and a scale takes the number back."""
    plain, rescaled = (converted(scale="channel_mean", latent_std=std).eval() for std in (None, 0.2))
    for a, b in zip(binary_layers(plain), binary_layers(rescaled), strict=True):
        assert b.weight.std(correction=0).item() == pytest.approx(0.2, rel=1e-5)
        assert torch.equal(binary_sign(a.weight), binary_sign(b.weight))
        torch.testing.assert_close(a.lowbit_weight.scale(a.weight), b.lowbit_weight.scale(b.weight))
    x = torch.randn(4, 1, 6, 6)
    torch.testing.assert_close(plain(x), rescaled(x))


def test_auto_rescales_only_what_has_been_trained() -> None:
    fresh, seen = net(), net()
    seen(torch.randn(6, 1, 6, 6))  # its norms have met data
    assert Bnn().adapted_to(fresh, False).latent_std is None
    assert Bnn().adapted_to(fresh, True).latent_std == 0.3
    assert Bnn().adapted_to(seen, False).latent_std == 0.3
    assert Bnn(weights_at=0.5).adapted_to(fresh, False).latent_std == 0.3
    assert Bnn(latent_std=0.1).adapted_to(seen, False).latent_std == 0.1


class Watch(pl.Callback):
    """What a run looks like around the beginning of its second stage."""

    def __init__(self) -> None:
        self.ready: list[bool] = []
        self.decay: list[float] = []
        self.moments: list[int] = []
        self.tracked: list[int] = []
        self.spread: list[float] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        layer, optimizer = pl_module.net[3], trainer.optimizers[0]
        self.ready.append(layer.lowbit_weight.ready)
        self.decay.append(optimizer.param_groups[0]["weight_decay"])
        self.moments.append(int(optimizer.state[layer.weight]["step"]))
        self.tracked.append(int(pl_module.net[4].num_batches_tracked))
        self.spread.append(layer.weight.std().item())


def test_the_second_stage_begins_as_published() -> None:
    watch, module = Watch(), net()
    trainer(QuantCallback(Bnn(weights_at=0.5, latent_std=0.3)), watch).fit(module, data())
    assert watch.ready == [False] * 4 + [True] * 4
    assert watch.decay == [1e-3] * 4 + [0.0] * 4
    assert watch.moments == [1, 2, 3, 4, 1, 2, 3, 4]
    assert watch.tracked == [1, 2, 3, 4, 1, 2, 3, 4]


def test_statistics_are_those_of_the_second_stage_alone() -> None:
    module = converted(weights_at=0.5)
    rule = rule_of(module)
    assert isinstance(rule, LatentRule)
    norm: Any = module.train().net[8]
    with torch.no_grad():
        norm.running_mean.fill_(1e6)
    rule.milestone("binarize_weights", True, 3)
    first, second = torch.randn(6, 10), torch.randn(6, 10)
    norm(first)
    torch.testing.assert_close(norm.running_mean, first.mean(0))
    norm(second)
    torch.testing.assert_close(norm.running_mean, (first.mean(0) + second.mean(0)) / 2)
    for _ in range(20):
        norm(second)
    old = norm.running_mean.clone()
    norm(first)
    torch.testing.assert_close(norm.running_mean, 0.9 * old + 0.1 * first.mean(0))


def test_before_its_time_a_weight_is_real_and_its_input_is_not() -> None:
    module = converted(weights_at=0.5).eval()
    layer: Any = module.net[7]
    x = torch.randn(4, 72)
    torch.testing.assert_close(layer(x), F.linear(binary_sign(x), layer.weight))


def test_a_further_fit_stays_in_the_second_stage() -> None:
    module, watch = net(), Watch()
    scheme = Bnn(weights_at=0.5)
    trainer(QuantCallback(scheme)).fit(module, data())
    trainer(QuantCallback(scheme), watch).fit(module, data())
    assert watch.ready == [True] * 8
    assert watch.moments == [1, 2, 3, 4, 5, 6, 7, 8]


@pytest.mark.filterwarnings("ignore:You're using the WeightAveraging callback")
def test_averages_begin_anew_with_the_second_stage(tmp_path: Path) -> None:
    module = net()
    run = trainer(QuantCallback(Bnn(weights_at=0.5, latent_std=0.3)), EMAWeightAveraging(decay=0.999))
    run.fit(module, data())
    run.save_checkpoint(tmp_path / "end.ckpt")
    state = torch.load(tmp_path / "end.ckpt")["state_dict"]
    assert float(state["net.3.lowbit_weight.initialized"]) == 1.0
    assert float(state["net.3.lowbit_weight.gain"]) == pytest.approx(module.net[3].lowbit_weight.gain.item())  # type: ignore[union-attr]
    again = load_from_checkpoint(Net, tmp_path / "end.ckpt").eval()
    x = torch.randn(4, 1, 6, 6)
    assert torch.equal(again(x), module.eval()(x))


def test_layers_that_share_a_latent_share_its_gain() -> None:
    torch.manual_seed(0)
    module = nn.Sequential(*(nn.Linear(5, 5) for _ in range(4)))
    module[2].weight = module[1].weight
    before = module[1].weight.detach().abs().mean(1)  # type: ignore[operator]
    convert(module, "bnn", torch.randn(4, 5), scale="channel_mean", latent_std=0.1)
    for layer in (module[1], module[2]):
        torch.testing.assert_close(layer.lowbit_weight.scale(layer.weight).flatten(), before)  # type: ignore[union-attr, operator]


def test_a_batch_that_is_not_finite_leaves_the_range_as_it_was() -> None:
    layer: Any = converted(first="int8").train().net[0]
    before = layer.lowbit_input.largest.clone()
    layer(torch.full((2, 1, 6, 6), float("inf")))
    layer(torch.full((2, 1, 6, 6), float("nan")))
    assert torch.equal(layer.lowbit_input.largest, before)


def test_double_precision_runs_with_int8_ends() -> None:
    module = net()
    trainer(QuantCallback(Bnn(first="int8", last="int8")), precision="64-true").fit(module, data())
    assert module.eval()(torch.randn(2, 1, 6, 6, dtype=torch.float64)).dtype == torch.float64


# -- Bop -----------------------------------------------------------------------------------------------------
def test_bop_flips_by_its_rule_and_the_user_s_optimizer_moves_no_sign() -> None:
    module = converted(update="bop", bop_gamma=0.5, bop_threshold=1e-3)
    rule, layer = rule_of(module), module.net[7]
    assert isinstance(rule, BopRule)
    assert bool((layer.weight.abs() == 1).all())  # type: ignore[union-attr, operator]
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.1, weight_decay=0.5)
    signs, mean = layer.weight.detach().clone(), torch.zeros(10, 72)  # type: ignore[union-attr, operator]
    flips = 0
    for step in range(4):
        optimizer.zero_grad()
        generator = torch.Generator().manual_seed(step)
        x, y = torch.randn(6, 1, 6, 6, generator=generator), torch.tensor([0, 1, 2, 0, 1, 2])
        F.cross_entropy(module(x), y).backward()
        mean = 0.5 * mean + 0.5 * layer.weight.grad  # type: ignore[operator]
        flip = mean * signs > 1e-3
        flips += int(flip.sum())
        signs = torch.where(flip, -signs, signs)
        lowbit_step(module, optimizer)
        assert torch.equal(layer.weight, signs)  # type: ignore[arg-type]
    assert flips > 0


def test_bop_skips_a_step_without_finite_gradients() -> None:
    module = converted(update="bop", bop_gamma=1.0)
    layer: Any = module.net[7]
    before = layer.weight.detach().clone()
    layer.weight.grad = torch.full_like(layer.weight, float("nan"))
    lowbit_step(module, torch.optim.SGD(module.parameters(), lr=0.1))
    assert torch.equal(layer.weight, before)


# -- noise ---------------------------------------------------------------------------------------------------
def test_weights_draw_one_noise_on_all_ranks_and_activations_their_samples() -> None:
    module = converted(stochastic="both", latent_std=0.5).train()
    layer, run = module.net[7], switch_of(module).run
    x = torch.randn(6, 72) * 0.3
    weight, whole = layer.lowbit_weight(layer.weight), layer.lowbit_input(x)  # type: ignore[union-attr, operator]
    run.world = 2
    for run.rank in (0, 1):
        assert torch.equal(layer.lowbit_weight(layer.weight), weight)  # type: ignore[union-attr, operator]
        assert torch.equal(layer.lowbit_input(x[run.rank :: 2]), whole[run.rank :: 2])  # type: ignore[union-attr, operator]
    run.batch += 1
    assert not torch.equal(layer.lowbit_weight(layer.weight), weight)  # type: ignore[union-attr, operator]
    assert torch.equal(layer.eval().lowbit_input(x), binary_sign(x))  # type: ignore[union-attr, operator]


def test_annealing_goes_from_the_first_step_to_the_last_and_is_kept(tmp_path: Path) -> None:
    module = net()
    run = trainer(QuantCallback(Bnn(ste="annealed")))
    run.fit(module, data())
    assert float(module.net[3].lowbit_input.progress) == 1.0  # type: ignore[union-attr, arg-type]
    run.save_checkpoint(tmp_path / "end.ckpt")
    assert float(torch.load(tmp_path / "end.ckpt")["state_dict"]["net.3.lowbit_input.progress"]) == 1.0

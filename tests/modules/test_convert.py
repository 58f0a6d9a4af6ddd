"""What is converted, what is refused by name, and what the conversion leaves alone."""

from __future__ import annotations

import copy
import pickle
import warnings
from typing import Any

import lightning.pytorch as L
import pytest
import torch
import torch.nn.functional as F
from modules.watch import watch
from modules.zoo import Transformer, images
from torch import Tensor, nn

from lightning_lowbit import Tqt, convert, float_mode, summarize
from lightning_lowbit.errors import ConfigError, UnsupportedModelError
from lightning_lowbit.modules.base import low_bit_modules, switch_of
from lightning_lowbit.modules.layers import LowBitLayer
from lightning_lowbit.modules.revert import revert


def ran(net: nn.Module, *args: Any, **kwargs: Any) -> set[str]:
    """Paths of the layers that one call runs."""
    switch = switch_of(net)
    switch.ran = set()
    net(*args, **kwargs)
    found, switch.ran = switch.ran, None
    return found


def converted(net: nn.Module) -> list[str]:
    return [path for path, module in low_bit_modules(net) if isinstance(module, LowBitLayer)]


# -- roots and selection -----------------------------------------------------------------------------------
def test_a_bare_layer_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"Linear: the module itself is one layer.*nn.Sequential"):
        convert(nn.Linear(2, 2))


def test_converting_twice_is_refused_and_changes_nothing() -> None:
    net = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2))
    convert(net, "tqt", torch.randn(4, 2))
    before = pickle.dumps(net)
    with pytest.raises(ConfigError, match="converted already"):
        convert(net, "tqt")
    assert pickle.dumps(net) == before


def test_patterns() -> None:
    def net() -> nn.Module:
        return nn.Sequential(
            nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU()), nn.Sequential(nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4,
            1)), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2),
        )  # fmt: skip

    def layers(**options: Any) -> list[str]:
        each = net()
        report = convert(each, "tqt", images(), **options)
        assert sorted(layer.path for layer in report.layers) == sorted(converted(each))
        assert sorted([*converted(each), *report.skipped]) == ["0.0", "1.0", "1.1", "4"]
        return converted(each)

    assert layers() == ["0.0", "1.0", "1.1", "4"]
    assert layers(skip=["1"]) == ["0.0", "4"]
    assert layers(skip=["1.*"], include=["1", "4"]) == ["4"]
    assert layers(skip=[nn.Linear]) == ["0.0", "1.0", "1.1"]
    assert layers(include=[nn.Linear, "?.0"]) == ["0.0", "1.0", "4"]
    with pytest.raises(ConfigError, match=r"skip: 'fc' matches no module"):
        layers(skip=["fc"])
    with pytest.raises(ConfigError, match=r"include: .*Conv3d.* matches no module"):
        layers(include=[nn.Conv3d])
    with pytest.raises(ConfigError, match=r"nothing to convert.*4 layers \(4 by skip=\)"):
        layers(skip=["*"])


class ScaledLinear(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.weight * 2, self.bias)


def test_what_is_left_float_is_listed_once_with_its_reason() -> None:
    torch.manual_seed(0)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.rnn = nn.Embedding(7, 4), nn.GRU(4, 4, batch_first=True)
            self.norm, self.plain = nn.LayerNorm(4), nn.Linear(4, 4)
            self.normed = nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)  # the old form, which many networks still have
                self.old = nn.utils.weight_norm(nn.Linear(4, 4))
            self.own, self.lazy = ScaledLinear(4, 4), nn.LazyLinear(3)
            self.soft = nn.Softmax(-1)

        def forward(self, x: Tensor) -> Tensor:
            x = self.norm(self.rnn(self.embed(x))[0][:, -1])
            return self.soft(self.lazy(self.own(self.old(self.normed(self.plain(x))))))

    net, x = Net(), torch.randint(0, 7, (3, 5))
    report = convert(net, "tqt", x)
    assert converted(net) == ["plain"]
    assert report.float_by_nature == {
        "Embedding": ["embed"], "GRU": ["rnn"], "LayerNorm": ["norm"], "Softmax": ["soft"],
    }  # fmt: skip
    assert report.skipped.keys() == {"normed", "old", "own", "lazy"}
    assert "weight is computed" in report.skipped["normed"]
    assert "weight is computed" in report.skipped["old"]
    assert "subclass" in report.skipped["own"]
    assert "lazy" in report.skipped["lazy"]
    assert str(summarize(net)).count("Embedding (1)") == 1
    assert "integer-exact: no" in str(summarize(net))


def test_only_lazy_layers() -> None:
    with pytest.raises(ConfigError, match="run one batch first"):
        convert(nn.Sequential(nn.LazyLinear(3), nn.ReLU()))


# -- attention -----------------------------------------------------------------------------------------------
def test_attention_is_refused_by_name_and_accepted_by_skip() -> None:
    with pytest.raises(
        UnsupportedModelError, match=r"^encoder.layers.0.self_attn: .*skip=\['encoder.layers.0.self_attn'\]"
    ):
        convert(Transformer())
    net = Transformer()
    report = convert(net, skip=["*.self_attn"])
    assert report.skipped["encoder.layers.0.self_attn.out_proj"] == "by skip="
    assert len(converted(net)) == 6


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")  # of the float encoder
@pytest.mark.parametrize("masked", [False, True])
def test_encoder_evaluates_through_its_low_bit_layers(masked: bool) -> None:
    torch.manual_seed(0)
    net, x = Transformer(), torch.randn(4, 5, 3)
    plain = copy.deepcopy(net).eval()
    mask = torch.zeros(4, 5, dtype=torch.bool)
    mask[:, 3:] = masked
    convert(net, Tqt(bits=4), (x, mask) if masked else x, skip=[nn.MultiheadAttention])
    net.eval()
    with torch.no_grad():
        given = (x, mask) if masked else (x,)
        assert ran(net, *given) == set(converted(net))
        assert not torch.equal(net(*given), plain(*given))
        with float_mode(net):  # the fused path is taken as before: the same bits
            assert torch.equal(net(*given), plain(*given))
        twin = pickle.loads(pickle.dumps(net))
        assert torch.equal(twin(*given), net(*given))
        revert(net)
        assert torch.equal(net(*given), plain(*given))
    assert net.encoder.layers[0].activation_relu_or_gelu == plain.encoder.layers[0].activation_relu_or_gelu
    assert "forward" not in vars(net.encoder.layers[0])


# -- ties ----------------------------------------------------------------------------------------------------
class Ties(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Conv2d(3, 3, 3, padding=1) for _ in range(3))
        self.act = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        signed, unsigned = self.a(x), self.act(self.b(x))
        return self.c(torch.cat([signed + unsigned, self.act(self.c(x))], 2))


def test_an_add_shares_the_step_a_concat_the_whole_grid() -> None:
    torch.manual_seed(0)
    net, x = Ties(), images()
    convert(net, "tqt", x)
    rows = summarize(net)
    signed, unsigned = rows["a.output"].grid, rows["lowbit_relu.output"].grid
    assert (signed.signed, unsigned.signed) == (True, False)
    assert signed.exponent == unsigned.exponent
    joined = [rows["lowbit_add.output"].grid, rows["lowbit_relu_1.output"].grid]
    assert joined[0] == joined[1]
    assert joined[0].signed  # one of them is negative somewhere
    named = {frozenset(tie) for tie in rows.ties}
    assert frozenset({"a.lowbit_output", "lowbit_relu.lowbit_output"}) in named
    assert frozenset({"lowbit_add.lowbit_output", "lowbit_relu_1.lowbit_output"}) in named


def test_layers_with_one_weight_share_its_threshold() -> None:
    torch.manual_seed(0)

    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.mid, self.b = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
            self.b.weight = self.a.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.b(F.relu(self.mid(F.relu(self.a(x)))))

    net, x = Tied(), torch.randn(6, 4)
    report = convert(net, Tqt(bits=4), x)
    assert ["a.lowbit_weight", "b.lowbit_weight"] in report.ties
    assert net.a.lowbit_weight.log2_t is net.b.lowbit_weight.log2_t
    assert net.a.lowbit_weight.grid() == net.b.lowbit_weight.grid()
    assert net.mid.lowbit_weight.log2_t is not net.a.lowbit_weight.log2_t
    twin = copy.deepcopy(net)
    assert twin.a.lowbit_weight.log2_t is twin.b.lowbit_weight.log2_t


# -- batch norms that are not folded -----------------------------------------------------------------------
class Norms(nn.Module):
    def __init__(self, how: str) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)
        self.bn = nn.BatchNorm2d(3, track_running_stats=how != "untracked")
        self.how = how

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "first":
            return self.b(self.a(self.bn(x)))
        if self.how == "shared":
            return self.bn(self.b(self.bn(self.a(x))))
        if self.how == "twice":
            x = self.a(x)
            return self.b(self.bn(x) + x)
        return self.b(F.relu(self.bn(self.a(x))))


@pytest.mark.parametrize("how", ["first", "shared", "twice", "untracked"])
def test_norms_that_stay(how: str) -> None:
    torch.manual_seed(0)
    net, x = Norms(how), images()
    report = convert(net, "tqt", x)
    assert type(net.bn) is nn.BatchNorm2d
    assert all(layer.batch_norm is None for layer in report.layers)
    net.eval()
    if how != "untracked":
        assert watch(net, summarize(net), x).off == []
    net.train()(x).sum().backward()


# -- hooks, several networks, Lightning ----------------------------------------------------------------------
def test_hooks_of_the_user_run_on_everything() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 4, 1),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Sequential(nn.Conv2d(4, 4, 1), nn.SiLU()),
        nn.AvgPool2d(2),
    )
    x, calls = images(), []
    parts = {path: module for path, module in net.named_modules() if path}

    def note(path: str, kind: str) -> Any:
        return lambda *args: calls.append((path, kind))

    for path, module in parts.items():
        module.register_forward_hook(note(path, "forward"))
        module.register_forward_pre_hook(note(path, "before"))
        module.register_full_backward_hook(note(path, "backward"))
    convert(net, "tqt", x)
    late = dict(net.named_modules())["2"].register_forward_hook(note("2", "late"))
    calls.clear()
    net(x.requires_grad_()).sum().backward()
    assert {path for path, kind in calls if kind == "forward"} == parts.keys()
    assert {path for path, kind in calls if kind == "before"} == parts.keys()
    assert {path for path, kind in calls if kind == "backward"} == parts.keys()
    assert ("2", "late") in calls
    late.remove()
    calls.clear()
    revert(net)
    net(x)
    assert {path for path, kind in calls if kind == "forward"} == parts.keys()
    assert ("2", "late") not in calls


def test_a_hook_on_a_shared_rectifier_runs_at_each_call() -> None:
    from modules.zoo import SharedReluBlock

    net, calls = nn.Sequential(SharedReluBlock()), []
    net[0].relu.register_forward_hook(lambda *args: calls.append(1))
    convert(net, "tqt", images(channels=4))
    calls.clear()
    net(images(channels=4))
    assert len(calls) == 2


class Gan(L.LightningModule):
    """No forward of its own; two networks, each with functional operations."""

    def __init__(self) -> None:
        super().__init__()
        self.generator = Player(3, 5)
        self.discriminator = Player(5, 1)
        self.loss = nn.BCEWithLogitsLoss()


class Player(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.a, self.b, self.out = nn.Linear(inputs, 8), nn.Linear(8, 8), nn.Linear(8, outputs)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.a(x))
        return self.out(F.relu(self.b(x)) + x)


def test_lightning_module_without_forward_and_two_networks() -> None:
    torch.manual_seed(0)
    net, x = Gan(), torch.randn(8, 3)
    from lightning_lowbit.modules.calibrate import calibrate

    report = convert(net)
    assert report.uncovered == []
    assert len(converted(net)) == 6
    calibrate(net, lambda: (net.discriminator(net.generator(x)), 1)[1])
    net.eval()
    rows = summarize(net)
    assert rows["generator.a.input"].grid.signed
    assert rows["discriminator.lowbit_add.sum"].grid is not None
    watched = watch(net.generator, rows, x)
    assert watched.off == []
    assert watched.seen == {"compute": 3, "add": 1}
    assert net.generator.out.lowbit_weight is not None
    assert [layer.first for layer in report.layers] == [True, False, False, True, False, False]
    assert [layer.last for layer in report.layers] == [False, False, True, False, False, True]


def test_wrapping_lightning_module_follows_its_network() -> None:
    class Wrapped(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = Player(3, 2)

        def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
            return self.net(x) * scale

    module = Wrapped()
    report = convert(module, "tqt", torch.randn(4, 3))
    assert report.uncovered == []
    assert [layer.first for layer in report.layers] == [True, False, False]
    assert [layer.last for layer in report.layers] == [False, False, True]


def test_the_report_says_in_a_line_what_became_low_bit() -> None:
    net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.LayerNorm(8), nn.Linear(8, 2))
    report = convert(net, "tqt", skip=["3"])
    assert str(report) == "1 of 2 layers low-bit; skipped: 3 (by skip=); float by nature: LayerNorm (1)"


class StepOnly(L.LightningModule):
    """No forward: what feeds what stands in training_step alone."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4)
        self.conv2, self.bn2, self.relu = nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.ReLU()
        self.other, self.fc = nn.Linear(2, 4), nn.Linear(4, 3)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        (x, extra), y = batch
        x = self.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))))
        loss = F.cross_entropy(self.fc(x.mean((2, 3)) + self.other(extra)), y)
        self.log("loss", loss)
        return loss


def test_a_training_step_tells_what_feeds_what_and_is_not_rewritten() -> None:
    torch.manual_seed(0)
    net = StepOnly()
    report = convert(net, "tqt")
    layers = {layer.path: layer for layer in report.layers}
    assert layers["conv1"].batch_norm == "bn1"
    assert layers["conv2"].pattern == "conv2d+bn+relu"
    assert [p for p, layer in layers.items() if layer.first] == ["conv1", "other"]
    assert [p for p, layer in layers.items() if layer.last] == ["fc"]
    assert "forward" not in net.__dict__
    assert not [name for name, _ in net.named_children() if name.startswith("lowbit_")]
    assert any("StepOnly.training_step) stays float" in note for note in report.uncovered)
    from lightning_lowbit.modules.calibrate import calibrate

    net.log = lambda *args, **kwargs: None  # type: ignore[method-assign]  # there is no trainer
    batch = ((torch.randn(8, 1, 8, 8), torch.randn(8, 2)), torch.randint(3, (8,)))
    assert calibrate(net, lambda: (net.training_step(batch, 0), 1)[1]) == []
    assert not net.conv2.lowbit_input.signed  # type: ignore[union-attr]  # behind F.relu: the data say so
    assert net.other.lowbit_input.log2_t is not net.conv1.lowbit_input.log2_t  # type: ignore[union-attr]

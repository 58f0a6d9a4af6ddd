"""A carrier is a float32 tensor to everyone who looks: what stays integer, what becomes float, what is refused."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torchmetrics
from modules.integer_twin import Origin, Watch, carrier, codes, low, send_back
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_lowbit.errors import UnsupportedModelError
from lightning_lowbit.modules.carrier import Carrier, apply, carry

MODES: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "grad": torch.enable_grad, "no_grad": torch.no_grad, "inference": torch.inference_mode,
}  # fmt: skip
MOVES: dict[str, Callable[[Tensor], Tensor]] = {
    "view": lambda x: x.view(2, -1),
    "reshape": lambda x: x.reshape(6, 16),
    "flatten": lambda x: x.flatten(1),
    "nn.Flatten": nn.Flatten(),
    "select": lambda x: x[0],
    "slice": lambda x: x[:, 1:, ::2],
    "narrow": lambda x: x.narrow(1, 0, 2),
    "permute": lambda x: x.permute(0, 2, 3, 1),
    "transpose": lambda x: x.transpose(1, 2),
    "unsqueeze": lambda x: x.unsqueeze(1),
    "squeeze": lambda x: x[:1].squeeze(0),
    "contiguous": lambda x: x.permute(0, 2, 3, 1).contiguous(),
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "pad": lambda x: F.pad(x, (1, 1, 0, 2)),
    "flip": lambda x: x.flip(1),
    "roll": lambda x: x.roll(1, 2),
    "unflatten": lambda x: x.unflatten(1, (1, 3)),
    "pixel_unshuffle": lambda x: F.pixel_unshuffle(x, 2),
    "float": lambda x: x.float(),
    "to": lambda x: x.to("cpu", torch.float32),
    "clone": lambda x: x.clone(),
    "option A shortcut": lambda x: F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 1, 1), "constant", 0),
}
FLOATS: dict[str, Callable[[Tensor], Tensor]] = {
    "negation": lambda x: -x,
    "product": lambda x: x * 2,
    "sum with a number": lambda x: x + 1,
    "difference": lambda x: x - x.flip(0),
    "scaled sum": lambda x: torch.add(x, x, alpha=3),
    "softmax": lambda x: x.softmax(1),
    "max": lambda x: x.max(1).values,
    "comparison": lambda x: x > 0,
    "mask": lambda x: x[x > 0],
    "where": lambda x: torch.where(x > 0, x, x.new_zeros(())),
    "interpolate": lambda x: F.interpolate(x, scale_factor=2),
    "pad with ones": lambda x: F.pad(x, (1, 1), value=1.0),
    "reflected pad": lambda x: F.pad(x, (1, 1, 1, 1), mode="reflect"),
    "half": lambda x: x.half(),
    "double": lambda x: x.double(),
    "argmax": lambda x: x.argmax(1),
}


@pytest.mark.parametrize("inside", [True, False], ids=["made inside", "made outside"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", MOVES)
def test_moves_keep_the_codes_and_the_exponent(name: str, mode: str, inside: bool) -> None:
    x = carrier(codes(2, 3, 4, 4), -5)
    with MODES[mode]():
        x = carrier(codes(2, 3, 4, 4), -5) if inside else x
        moved, want = MOVES[name](x), MOVES[name](x.plain())
    assert type(moved) is Carrier
    assert moved.payload.dtype is torch.int8
    assert int(moved.exponent) == -5
    assert torch.equal(moved.plain(), want)
    assert (moved.stride(), moved.dtype) == (want.stride(), torch.float32)


@pytest.mark.parametrize("name", MOVES)
def test_errors_go_back_through_moves_as_codes(name: str) -> None:
    x, kept = carrier(codes(2, 3, 4, 4), -5, grad=True), []
    y = MOVES[name](apply(Watch, x, kept))
    err = codes(*y.shape, seed=1)
    send_back(y, err, -9)
    (back,) = kept
    assert type(back) is Carrier
    assert int(back.exponent) == -9
    p = x.plain().detach().requires_grad_()
    MOVES[name](p).backward(err.float() * 2.0**-9)
    assert torch.equal(back.plain(), p.grad)  # type: ignore[arg-type]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", FLOATS)
def test_anything_else_gives_exact_float_values(name: str, mode: str) -> None:
    x = carrier(codes(2, 3, 4, 4), -5)
    with MODES[mode]():
        result = FLOATS[name](x)
        assert type(result) is Tensor
        assert torch.equal(result, FLOATS[name](x.plain()))


def test_float_gradients_come_back_to_a_carrier() -> None:
    x = carrier(codes(2, 3), -5, grad=True)
    (x * x).sum().backward()
    assert torch.equal(x.grad, 2 * x.plain())  # type: ignore[arg-type]


def test_sums_are_exact_in_any_order() -> None:
    parts = [carrier(codes(50, seed=n), exponent) for n, exponent in enumerate((-20, -4, -9, -12, -20))]
    want = sum(part.plain().double() for part in parts)
    for order in ([0, 1, 2, 3, 4], [4, 3, 2, 1, 0], [2, 0, 4, 1, 3]):
        total = parts[order[0]]
        for index in order[1:]:
            total = total + parts[index]  # type: ignore[assignment]
        assert type(total) is Carrier
        assert int(total.exponent) == -20
        assert torch.equal(total.payload.double() * 2.0**-20, want)  # type: ignore[arg-type]


def test_errors_of_a_tensor_that_forks_are_added_exactly() -> None:
    x, kept = carrier(codes(2, 8), grad=True), []
    y = apply(Watch, x, kept)
    a, b, c = y.flatten(), y.view(4, 4), y.flip(1)
    errs = [codes(*part.shape, seed=n) for n, part in enumerate((a, b, c))]
    torch.autograd.backward([a, b, c], [carrier(err, e) for err, e in zip(errs, (-9, -14, -11), strict=True)])
    (back,) = kept
    assert type(back) is Carrier
    want = errs[0].double().view(2, 8) * 32 + errs[1].double().view(2, 8) + errs[2].double().flip(1) * 8
    assert torch.equal(back.payload.double() * 2.0 ** (int(back.exponent) + 14), want)


IN_PLACE: dict[str, Callable[[Tensor], Any]] = {
    "+=": lambda x: x.add_(1), "*=": lambda x: x.mul_(2), "zero_": lambda x: x.zero_(), "relu_": torch.relu_,
    "copy_": lambda x: x.copy_(torch.zeros(x.shape)), "x[0] = 1": lambda x: x.__setitem__(0, 1.0),
    "clamp_": lambda x: x.clamp_(0), "relu(inplace)": lambda x: F.relu(x, inplace=True),
}  # fmt: skip


@pytest.mark.parametrize("name", IN_PLACE)
def test_writing_in_place_is_refused_by_the_makers_name(name: str) -> None:
    x = carrier(codes(2, 3), origin=Origin(path="body.conv1"))
    with pytest.raises(UnsupportedModelError, match=r"body\.conv1: aten::\w+ writes .* in place.*out of place.*skip="):
        IN_PLACE[name](x)


def test_whoever_reads_memory_sees_float_values() -> None:
    x = carrier(codes(2, 3), -5)
    p = x.plain()
    assert (x.numpy() == p.numpy()).all()
    assert x.tolist() == p.tolist()
    assert (x[0, 0].item(), float(x[0, 0]), int(x[0, 0] * 32)) == (p[0, 0].item(),) * 2 + (int(x.payload[0, 0]),)
    assert f"{x[0, 0]:.4f}" == f"{p[0, 0]:.4f}"
    assert repr(x) == repr(p)
    assert bool(x[0, 0] != 0)
    assert (x.is_floating_point(), x.element_size(), x.shape) == (True, 4, (2, 3))
    assert type(torch.zeros_like(x)) is Tensor


def test_copies_and_files_hold_float_values() -> None:
    x = carrier(codes(2, 3), -5)
    file = io.BytesIO()
    torch.save({"y": x}, file)
    file.seek(0)
    for other in (copy.deepcopy(x), pickle.loads(pickle.dumps(x)), torch.load(file)["y"], copy.deepcopy([x])[0]):
        assert type(other) is Tensor
        assert torch.equal(other, x.plain())


def test_metrics_take_carriers() -> None:
    logits, target = carrier(codes(6, 3)), torch.tensor([0, 1, 2, 0, 1, 2])
    for metric in (torchmetrics.classification.MulticlassAccuracy(3), torchmetrics.classification.MulticlassAUROC(3)):
        assert metric(logits, target) == type(metric)(3)(logits.plain(), target)
    assert torch.equal(logits.argmax(1), logits.plain().argmax(1))
    mean = torchmetrics.MeanMetric()
    mean.update(logits)
    assert mean.compute() == pytest.approx(float(logits.plain().mean()))


@pytest.mark.parametrize("call", [
    lambda x, t: F.cross_entropy(x, t), lambda x, t: F.cross_entropy(input=x, target=t),
    lambda x, t: nn.CrossEntropyLoss()(x, t),
], ids=["positional", "by name", "module"])  # fmt: skip
def test_the_loss_is_the_integer_one_however_it_is_called(call: Any) -> None:
    x, kept = carrier(codes(4, 3), grad=True), []
    call(apply(Watch, x, kept), torch.tensor([0, 1, 2, 0])).backward()
    assert type(kept[0]) is Carrier


def test_exponents_beyond_float32_are_moved_and_counted() -> None:
    origin = Origin()
    for exponent, inside in ((-150, -149), (-149, -149), (120, 120), (300, 120)):
        made = carry(codes(2), torch.tensor(exponent, dtype=torch.int32), origin)
        assert int(made.exponent) == inside
    assert int(origin.switch.run.clamped) == 2


# -- in a network ----------------------------------------------------------------------------------------------
class Net(nn.Module):
    def __init__(self, through: Any = None) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 4, 3, padding=1)
        self.block = nn.Sequential(
            nn.Conv2d(4, 4, 3, padding=1), nn.ReLU(), nn.Dropout(0.5), nn.Conv2d(4, 4, 3, padding=1)
        )
        self.fc = nn.Linear(64, 3)
        self.through = through

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        x = self.block(x) if self.through is None else self.through(self.block, x)
        y: Tensor = self.fc(x.flatten(1))
        return y


def gathered(through: Any) -> Iterator[Tensor]:
    torch.manual_seed(0)
    images = torch.randn(4, 1, 4, 4)
    net = low(Net(), images)
    net.through = through
    F.cross_entropy(net(images), torch.tensor([0, 1, 2, 0])).backward()
    for module in net.modules():
        for acc, exponent in getattr(module, "gathered", {}).values():
            yield from (acc, exponent)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")  # when the network's forward is followed
@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing_gives_the_same_integers(reentrant: bool) -> None:
    again = list(gathered(lambda block, x: checkpoint(block, x, use_reentrant=reentrant)))
    plain_run = list(gathered(None))
    assert len(again) == 16
    assert all(torch.equal(a, b) for a, b in zip(again, plain_run, strict=True))


def test_hooks_of_the_user_see_float_values() -> None:
    seen: dict[str, Tensor] = {}
    x = torch.randn(2, 1, 4, 4)
    net = Net()
    net.block[0].register_forward_hook(lambda m, args, y: seen.update({"input": args[0], "output": y}))
    net = low(net, x)  # type: ignore[assignment]
    net.block[0].register_full_backward_hook(lambda m, gi, go: seen.update({"error": go[0]}))
    F.cross_entropy(net(x), torch.tensor([0, 1])).backward()
    for value in seen.values():
        assert value.dtype is torch.float32
        assert float(value.detach().abs().max()) == abs(value.numpy(force=True)).max() > 0
    assert seen.keys() == {"input", "output", "error"}
    # What a hook reads is what the layer computes with.
    layer: Any = net.block[0]
    want = F.conv2d(seen["input"] * 1.0, layer.weight, layer.bias, padding=1)
    torch.testing.assert_close(seen["output"] * 1.0, want, atol=float(want.detach().abs().max()) / 100, rtol=0)


def test_a_float_mode_in_between_is_seen_too() -> None:
    """Predictions kept from training, put together in inference mode."""
    x = torch.randn(2, 1, 4, 4)
    net = low(Net(), x)
    kept = [net(x).detach() for _ in range(2)]
    with torch.inference_mode():
        assert torch.cat(kept).shape == (4, 3)
        assert torch.stack([y[0] for y in kept]).shape == (2, 3)

"""What Jacinto's backward sees: variants, memory, checkpointed blocks, mixed precision, copies."""

from __future__ import annotations

import copy
import pickle
import shutil
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from schemes.jacinto_nets import chain, clips, converted, images, labels, layers, off, reach, seen, train
from torch import Tensor, nn
from torch.nn.utils.prune import l1_unstructured
from torch.utils.checkpoint import checkpoint

from lightning_lowbit import convert
from lightning_lowbit.modules.calibrate import calibrate
from lightning_lowbit.modules.clipped import ClipQuantizer
from lightning_lowbit.modules.layers import LowBitLayer
from lightning_lowbit.modules.revert import revert

VARIANTS = ("float", "quantized", "folded")


def gradients(net: nn.Module, x: Tensor | None = None) -> dict[str, Tensor]:
    net.zero_grad()
    F.cross_entropy(net.train()(images() if x is None else x), labels()).backward()
    return {name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("frozen", [False, True], ids=["live", "frozen"])
def test_variants_agree_on_the_last_layer_alone(frozen: bool) -> None:
    """A layer's weight gradient does not depend on its own weight."""
    found = {}
    for variant in VARIANTS:
        net = converted(chain(), bits=8 if frozen else 4, ste_weights=variant)
        if frozen:
            reach(net, "freeze_batch_norm", "freeze_ranges")
        found[variant] = gradients(net)
    for variant in ("quantized", "folded"):
        equal = {name for name in found["float"] if torch.equal(found["float"][name], found[variant][name])}
        assert equal == {"8.weight", "8.bias"}
    # Constant statistics: both differentiate the same product. Live ones: the batch's terms are missing in one.
    apart = off(found["quantized"]["3.weight"], found["folded"]["3.weight"])
    assert apart < 1e-4 if frozen else apart > 0.1


@pytest.mark.parametrize("variant", VARIANTS)
def test_values_and_state_do_not_depend_on_the_backward(variant: Any) -> None:
    results = []
    for ste in ("float", variant):
        net = converted(chain(), ste_weights=ste)
        y = net.train()(images(seed=3, gain=1.5))
        results.append([y, *net.state_dict().values()])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("quantize_out", [True, False], ids=["codes_out", "sums_out"])
def test_training_gives_evaluation_s_values_once_all_stands_still(variant: Any, quantize_out: bool) -> None:
    net = converted(chain(), ste_weights=variant, quantize_out=quantize_out)
    reach(net, "freeze_batch_norm", "freeze_ranges")
    x = images(seed=3)
    training = net.train()(x)
    with torch.no_grad():
        assert torch.equal(training, net.eval()(x))
        assert torch.equal(training, net.train()(x))
    assert torch.equal(training, net.eval()(x))


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_quantized_path_keeps_nothing_for_the_backward(variant: Any) -> None:
    kept, tensors = [], []
    x = torch.randn(4, 8, 16, 16)
    for low in (False, True):
        net = chain()[3:6]
        if low:
            convert(net, "jacinto", x, ste_weights=variant, quantize_in=False)
        packed: list[Tensor] = []

        def pack(t: Tensor, packed: list[Tensor] = packed) -> Tensor:
            packed.append(t)
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            net.train()(x.clone().requires_grad_())
        kept.append(sum({t.untyped_storage().data_ptr(): t.numel() * t.element_size() for t in packed}.values()))
        tensors.append(len(packed))
    assert kept[1] <= 1.6 * kept[0]
    assert tensors[1] == tensors[0]  # convolution, norm and clip; no second convolution


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "hooks"])
@pytest.mark.parametrize("options", [
    {}, {"ste_weights": "quantized"}, {"ste_weights": "folded"}, {"bn_value": "batch"}, {"batch_ranges": True},
    {"preset": "reference"}, {"range_subsample": 2},
], ids=str)  # fmt: skip
def test_a_checkpointed_block_counts_a_batch_once(options: dict[str, Any], reentrant: bool) -> None:
    found = []
    for again in (False, True):
        net = converted(chain(), **options).train()
        for quantizer in clips(net).values():
            quantizer.batches.fill_(5.0)
        for step in range(2):
            x = images(seed=step, gain=2.0 + 4 * step).requires_grad_()
            net.zero_grad()
            y = checkpoint(net[:6], x, use_reentrant=reentrant) if again else net[:6](x)
            F.cross_entropy(net[6:](y), labels()).backward()
        gradient = [p.grad for p in net.parameters()]
        found.append([x.grad, *gradient, *net.state_dict().values()])
    assert len(found[0]) == len(found[1])
    assert [n for n, (a, b) in enumerate(zip(*found, strict=True)) if not torch.equal(a, b)] == []


@pytest.mark.parametrize("variant", VARIANTS)
def test_values_are_computed_in_float32_under_autocast(variant: Any) -> None:
    net = converted(chain(), ste_weights=variant)
    reach(net, "freeze_batch_norm", "freeze_ranges")
    want = net.train()(images(seed=3))
    with torch.autocast("cpu", torch.bfloat16):
        got = net(images(seed=3))
    assert got.dtype == torch.float32
    assert torch.equal(got, want)
    got.sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in net.parameters())


def test_values_lie_on_grids_while_norms_are_live_under_autocast() -> None:
    net = converted(chain())
    found: dict[str, Tensor] = {}
    for path in ("2", "5", "8"):
        net.get_submodule(path).register_forward_hook(lambda m, a, y, path=path: found.update({path: y.detach()}))
    with torch.autocast("cpu", torch.bfloat16):
        net.train()(images(seed=3))
    for path, y in found.items():
        step = 2.0 ** int(clips(net)[f"{path}.lowbit_output"].exponent())
        assert y.dtype == torch.float32
        assert torch.equal(y / step, (y / step).round())


def test_a_frozen_part_has_no_gradients_and_its_ranges_follow() -> None:
    net = converted(chain())
    net[:3].requires_grad_(False)
    before = {key: quantizer.clips.clone() for key, quantizer in clips(net).items()}
    assert set(gradients(net, images(gain=2.0))) == {"3.weight", "4.weight", "4.bias", "8.weight", "8.bias"}
    assert [key for key, quantizer in clips(net).items() if torch.equal(quantizer.clips, before[key])] == []


def test_kept_in_evaluation_mode_means_kept() -> None:
    net = converted(chain()).train()
    net[:6].eval()
    before = {key: value.clone() for key, value in net.state_dict().items()}
    net(images(gain=2.0)).sum().backward()
    moved = {key.split(".")[0] for key, value in net.state_dict().items() if not torch.equal(value, before[key])}
    assert moved == {"6", "8"}


# -- copies --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_a_copy_is_whole_and_its_own(how: str) -> None:
    net = train(converted(chain()))
    twin: Any = copy.deepcopy(net) if how == "deepcopy" else pickle.loads(pickle.dumps(net))
    own = {id(module) for module in twin.modules()}
    for layer in twin.modules():
        if isinstance(layer, LowBitLayer):
            assert {id(layer.group.end), id(layer.input_grid)} <= own
            assert layer.norm is None or id(layer.norm) in own
    state = {key: value.clone() for key, value in net.state_dict().items()}
    train(twin, gain=3.0)
    assert [key for key, value in net.state_dict().items() if not torch.equal(value, state[key])] == []
    assert all(not torch.equal(q.clips, clips(net)[key].clips) for key, q in clips(twin).items())


def test_reverting_leaves_the_float_network_and_nothing_else() -> None:
    net = train(converted(chain()))
    layer, weights = net[0], dict(net.named_parameters())
    revert(net)
    assert [type(module) for module in net] == [type(module) for module in chain()]
    assert {name: id(p) for name, p in net.named_parameters()} == {name: id(p) for name, p in weights.items()}
    plain = chain()
    plain.load_state_dict(net.state_dict())
    assert torch.equal(net.eval()(images()), plain.eval()(images()))
    assert not any(isinstance(value, ClipQuantizer) for value in vars(layer).values())
    assert "group" not in layer.__dict__
    convert(net, "jacinto", images())


@pytest.mark.filterwarnings("ignore")  # of torch's own compiler
def test_a_compiled_forward_gives_the_same_bits_and_is_traced_once() -> None:
    results = []
    for compiled in (False, True):
        torch._dynamo.reset()
        net = converted(chain()[:5]).train()
        graphs: list[Any] = []

        def count(graph: Any, inputs: Any, graphs: list[Any] = graphs) -> Any:
            graphs.append(graph)
            return graph

        run = torch.compile(net, backend=count) if compiled else net
        made = []
        for step in range(3):
            run(images(seed=step, gain=1.5)).square().sum().backward()
            made.append(len(graphs))
        assert made[1] == made[2]
        results.append([*net.state_dict().values(), *(p.grad for p in net.parameters())])
        assert all(layer.group.end is not None for layer in layers(net).values())
    assert [n for n, (a, b) in enumerate(zip(*results, strict=True)) if not torch.allclose(a, b, 1e-5, 1e-6)] == []


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
@pytest.mark.filterwarnings("ignore")  # of torch's own compiler
def test_a_compiled_forward_calibrates_as_an_eager_one() -> None:
    found = []
    for compiled in (False, True):
        torch._dynamo.reset()  # type: ignore[no-untyped-call]  # torch does not type it
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(4, 2))
        convert(net, "jacinto")
        run = torch.compile(net) if compiled else net
        calibrate(net, lambda run=run: len([run(images(8, 4, seed=seed, gain=1.0 + seed)) for seed in range(4)]))
        found.append([*net.state_dict().values()])
        assert {float(quantizer.batches) for quantizer in clips(net).values()} == {3}
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_a_pruned_layer_s_outliers_are_clipped_for_good() -> None:
    net = seen(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 1)), images())
    with torch.no_grad():
        net[0].weight[0, 0, 0, 0] = 100.0
    l1_unstructured(net[0], "weight", 0.1)
    with pytest.warns(UserWarning, match="0: merged weights up to 100.*clipped to"):
        convert(net, "jacinto", images())
    net(images())
    assert float(net[0].weight.detach().abs().max()) < 30
    assert float(net[0].weight_orig.detach().abs().max()) < 30

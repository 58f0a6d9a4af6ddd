"""Certificates: equal where network and program are, and every small mistake found where it is."""

from __future__ import annotations

import functools
import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from export.program_faults import faults
from export.random_graphs import SCHEMES, random_batch, random_net
from export.verified_nets import Gated, Net, images, made
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_lowbit import IntegerProgram, QuantCallback, convert, float_mode, lower
from lightning_lowbit.errors import ConfigError, UnsupportedModelError
from lightning_lowbit.export import runtime, runtime_float, verify_compare
from lightning_lowbit.export.program import ProgramError
from lightning_lowbit.export.runtime import KINDS
from lightning_lowbit.export.verify import verify
from lightning_lowbit.modules.lowering import Snap
from lightning_lowbit.modules.thresholds import ThresholdQuantizer
from lightning_lowbit.numerics.rounding import Rounding

OF_SCHEME = {"threshold": "bnn", "normalize": "wageubn"}  # whose programs hold such kinds; else tqt's


@functools.cache
def example(kind: str) -> tuple[nn.Module, IntegerProgram, tuple[int, ...], int]:
    """A random network whose program has such an operation, one sample's shape, and the operation's number.

    The operation is one that can hold a fault.
    """
    scheme = OF_SCHEME.get(kind, "tqt")
    for number in range(100):
        net, shape = random_net(random.Random(number), scheme, islands=kind == "island")
        convert(net, SCHEMES[scheme], net.example)
        program = lower(net, random_batch(shape, 1))
        places = [place for place, op in enumerate(program.ops) if op.kind == kind and any(faults(op))]
        if places:
            return net, program, shape, places[0]
    raise AssertionError(f"no program of 100 has {kind}")


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_every_fault_is_found_in_its_operation(kind: str) -> None:
    net, program, shape, place = example(kind)
    batch = random_batch(shape, 3, 9) * 2
    right = program.run(batch, integers=True)
    tried = 0
    for name, wrong in faults(program.ops[place]):
        try:
            faulty = program.replace_op(place, wrong)
        except ProgramError:  # which cannot even be written
            continue
        tried += 1
        certificate = verify(net, faulty, [batch])
        assert not certificate.ok, name
        found = certificate.difference
        assert found is not None
        assert (found.op, found.kind, found.path) == (place, kind, program.ops[place].path), name
        outputs = runs(faulty, batch)
        changed = outputs is not None and repr(outputs) != repr(right)
        assert not changed or certificate.observed is not None, f"{name} changes the outputs and no value was different"
        assert certificate.observed is None or certificate.observed.op >= place, name
    assert tried, f"no fault of {kind} can be written"


def runs(program: IntegerProgram, batch: Tensor) -> Any:
    try:
        with np.errstate(all="ignore"):
            return program.run(batch, integers=True)
    except ProgramError:
        return None


def test_values_and_ends_are_compared_too() -> None:
    net, program = made()
    place = next(place for place, op in enumerate(program.ops) if op.kind == "conv")
    name = program.ops[place].output
    for field, wrong in (("exponent", program.values[name].exponent + 1), ("high", program.values[name].high - 1)):
        values = {**program.values, name: replace(program.values[name], **{field: wrong})}
        found = verify(net, replace(program, values=values), [images(2)]).difference
        assert found is not None
        assert (found.op, found.what) == (place, f"its result's {field}")
    found = verify(net, replace(program, structure={"list": [{"leaf": 0}]}), [images(2)]).difference
    assert found is not None
    assert (found.op, found.what) == (-1, "structure")


def test_a_mistake_in_the_lowering_shows_in_the_codes(monkeypatch: pytest.MonkeyPatch) -> None:
    net, _ = made()
    right = ThresholdQuantizer.as_snap

    def wrong(self: ThresholdQuantizer) -> Snap:
        return replace(right(self), rounding=Rounding.FLOOR) if self.site.key.startswith("lowbit_relu") else right(self)

    monkeypatch.setattr(ThresholdQuantizer, "as_snap", wrong)
    program = lower(net, images(1))
    certificate = verify(net, program, [images(4, 1), images(4, 2)])
    assert not certificate.ok
    assert certificate.parted is None  # the network lowers to the same mistake
    found = certificate.observed
    assert found is not None
    assert program.ops[found.op].attributes["rounding"] == "floor"
    assert (found.what, found.batch) == ("codes", 0)
    assert found.expected == found.got + 1
    got = program.trace(images(4, 1))[found.value]
    assert got[(found.sample, *found.index)] == found.got


def test_equal_and_what_it_says() -> None:
    net, program = made()
    certificate = verify(net, program, [images(5, 1), images(2, 2)])
    assert certificate.ok
    assert certificate.end_to_end
    assert (certificate.batches, certificate.samples) == (2, 7)
    sources = [op for op in program.ops if op.kind in ("quantize", "conv", "linear", "dequantize")]
    assert certificate.values >= len(sources)
    text = str(certificate)
    assert text.startswith("EQUAL: program and network have the same codes from the float input to the float output")
    assert "7 samples in 2 batches" in text
    assert certificate.digests["program"][:12] in text


def test_sums_seen_lie_within_those_proved() -> None:
    net, program = made()
    batches = [images(4, 1), images(4, 2) * 3]
    certificate = verify(net, program, batches)
    assert [each.path for each in certificate.accumulators] == ["conv1", "conv2", "fc"]
    for each in certificate.accumulators:
        name = next(op.output for op in program.ops if op.path == each.path and op.kind in ("conv", "linear"))
        sums = [program.trace(x)[name] for x in batches]
        assert each.seen_low == min(int(x.min()) for x in sums)
        assert each.seen_high == max(int(x.max()) for x in sums)
        assert each.low <= each.seen_low <= each.seen_high <= each.high
        assert each.bits == program.values[name].bits


def test_batches_in_pieces_are_the_same_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    net, program = made()
    place = next(place for place, op in enumerate(program.ops) if op.kind == "requantize")
    op = program.ops[place]
    faulty = program.replace_op(place, replace(op, attributes={**op.attributes, "high": 3}))
    batch = torch.cat([images(5) * 0, images(2)])  # the first samples do not show it
    for some in (program, faulty):
        whole = verify(net, some, [batch])
        monkeypatch.setattr(verify_compare, "_AT_ONCE", 1)
        assert verify(net, some, [batch]) == whole
        monkeypatch.undo()
    assert whole.observed is not None
    assert whole.observed.sample is not None
    assert whole.observed.sample >= 5


def test_a_program_from_a_file(tmp_path: Path) -> None:
    net, program = made()
    program.save(tmp_path / "net.lowbit")
    loaded = IntegerProgram.load(tmp_path / "net.lowbit")
    assert verify(net, loaded, images(2)) == verify(net, program, images(2))


# -- float islands -----------------------------------------------------------------------------------------------------
def test_islands_bound_what_is_proved() -> None:
    net, program = made(Gated())
    certificate = verify(net, program, [images(4, 1)])
    assert certificate.ok
    assert not certificate.end_to_end
    assert certificate.islands
    assert 0 <= certificate.float_error < 1e-6
    entry = certificate.entries[0]
    assert entry.seen
    assert entry.elements == 4 * 4 * 6 * 6
    assert "in every integer region" in str(certificate)
    assert "codes flipped" in str(certificate)


def test_flipped_codes_are_counted_and_regions_stay_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    net, program = made(Gated())
    exact = runtime_float.FUNCTIONS["sigmoid"]
    other = {**runtime_float.FUNCTIONS, "sigmoid": lambda *given: exact(*given) + runtime.np.float32(1e-4)}
    monkeypatch.setattr(runtime, "_functions", lambda path: other)
    certificate = verify(net, program, [images(4, 1)])
    assert certificate.ok
    assert certificate.entries[0].flipped > 0
    assert 1e-5 < certificate.float_error < 1e-3
    strict = verify(net, program, [images(4, 1)], tolerance=1e-6)
    assert not strict.ok
    assert strict.observed is not None
    assert strict.observed.what == "values"
    assert strict.observed.kind == "island"


def test_a_mistake_where_integers_begin_again_is_no_flip(monkeypatch: pytest.MonkeyPatch) -> None:
    net, _ = made(Gated())
    right = ThresholdQuantizer.as_snap

    def wrong(self: ThresholdQuantizer) -> Snap:
        return replace(right(self), high=60) if "activation" in self.site.key else right(self)

    monkeypatch.setattr(ThresholdQuantizer, "as_snap", wrong)
    certificate = verify(net, lower(net, images(1)), [images(4, 1)])
    assert certificate.parted is None
    assert certificate.observed is not None
    assert (certificate.observed.kind, certificate.observed.got) == ("quantize", 60)
    assert certificate.observed.expected > 60


def test_codes_beyond_a_float_s_bits_count_as_either_neighbor() -> None:
    codes = np.array([2**24 + 1, 2**24 + 1, 2**24 + 1, 2**24 + 1, 2**24 + 2, 2**24 + 2, 5])
    floats = np.float32([2**24, 2**24 + 2, 2**24 + 4, 2**24 - 1, 2**24 + 2, 2**24, 6])
    assert verify_compare.other_codes(codes, floats).tolist() == [False, False, True, True, False, True, True]
    assert verify_compare.other_codes(codes, floats.astype(np.float64)).tolist() == [
        True,
        True,
        True,
        True,
        False,
        True,
        True,
    ]


def test_after_a_fit_on_the_loader_of_its_validation() -> None:
    class Digits(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = Net()

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x)

        def training_step(self, batch: Any, index: int) -> Tensor:
            return F.cross_entropy(self(batch[0]), batch[1])

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), 0.05)

    torch.manual_seed(0)
    loader = DataLoader(TensorDataset(images(16), torch.arange(16) % 3), batch_size=8)
    module = Digits()
    Trainer(
        accelerator="cpu", max_epochs=1, callbacks=[QuantCallback("tqt")], logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    ).fit(module, loader)  # fmt: skip
    assert verify(module, lower(module, images(1)), loader).end_to_end


# -- inputs ------------------------------------------------------------------------------------------------------------
def loaded() -> Iterator[Any]:
    yield from DataLoader(TensorDataset(images(4), torch.zeros(4, dtype=torch.long)), batch_size=2)


def test_batches_of_every_form() -> None:
    net, program = made()
    forms: list[Any] = [images(4), list(images(4).split(2)), loaded(), [(images(4),)], [[images(4), torch.zeros(4)]]]
    digests = []
    for form in forms:
        certificate = verify(net, program, form)
        assert certificate.ok
        assert certificate.samples == 4
        digests.append((certificate.batches, certificate.digests["inputs"]))
    assert len({digest for batches, digest in digests if batches == 1}) == 1
    assert len({digest for batches, digest in digests if batches == 2}) == 1
    assert verify(net, program, [images(0), images(2)]).batches == 1


def test_two_inputs() -> None:
    class Two(Net):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return super().forward(x) + self.fc(F.relu(self.conv1(y)).mean((2, 3)))

    torch.manual_seed(0)
    net = Two().eval()
    convert(net, "tqt", (images(4), images(4, 1)))
    program = lower(net, (images(1), images(1)))
    assert verify(net, program, [(images(2, 3), images(2, 4)), (images(2), images(2), torch.zeros(2))]).ok


@pytest.mark.parametrize(
    ("batches", "words"),
    [
        ([], "got no batch"),
        ([{"image": images(2)}], "batch 0: got a dict"),
        ([images(2), images(2).double()], r"batch 1: got float64 \[2, 3, 6, 6\], the program takes float32 \[N, 3, "),
        ([images(2)[:, :2]], r"got float32 \[2, 2, 6, 6\]"),
        ([()], "got no tensor"),
    ],
    ids=["none", "dict", "float64", "channels", "empty-tuple"],
)  # fmt: skip
def test_batches_that_do_not_fit(batches: list[Any], words: str) -> None:
    net, program = made()
    with pytest.raises(ConfigError, match=words):
        verify(net, program, batches)


def test_another_network_is_no_difference_but_an_error() -> None:
    _, program = made()
    other, _ = made(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3)))
    with pytest.raises(ConfigError, match=r"operation \d+ is .* the network's is .* lower the network again"):
        verify(other, program, [images(2)])


def test_other_weights_are_a_difference() -> None:
    net, program = made()
    with torch.no_grad():
        net.get_parameter("conv2.weight")[0, 0, 0, 0] += 0.05
    certificate = verify(net, program, [images(2)])
    assert certificate.parted is not None
    assert (certificate.parted.path, certificate.parted.what) == ("conv2", "constant weight")
    assert certificate.parted.index == (0, 0, 0, 0)


def test_a_network_in_float_is_refused() -> None:
    net, program = made()
    with float_mode(net), pytest.raises(ConfigError, match="runs in float"):
        verify(net, program, [images(2)])


def test_ways_that_depend_on_values_are_refused() -> None:
    class Branching(Net):
        limit = 1e9

        def forward(self, x: Tensor) -> Tensor:
            x = self.conv1(x)
            if float(x.detach().max()) > self.limit:
                x = F.relu(x)
            return self.fc(self.conv2(x).mean((2, 3)))

    with pytest.warns(UserWarning, match=r"takes numbers out of tensors \(test_verify.py:\d+ in forward\)"):
        net, program = made(Branching())
    largest = float(net.conv1(images(2)).detach().max())
    Branching.limit = 2 * largest  # lowering's own batches stay below
    with pytest.raises((ConfigError, UnsupportedModelError), match=r"calls|branches"):
        verify(net, program, [images(2), -images(2) * 5, images(2) * 5])


def test_a_network_is_left_as_it_was() -> None:
    net, program = made()
    net.train()
    net.get_submodule("bn1").eval()
    modes = [part.training for part in net.modules()]
    state = {name: x.clone() for name, x in net.state_dict().items()}
    generator = torch.get_rng_state()
    assert verify(net, program, [images(2)]).ok
    assert [part.training for part in net.modules()] == modes
    assert all(torch.equal(x, state[name]) for name, x in net.state_dict().items())
    assert torch.equal(generator, torch.get_rng_state())
    assert not any(part._forward_hooks for part in net.modules())

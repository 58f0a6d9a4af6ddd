"""Every registered scheme meets the same obligations; a new one is tested here without a new line."""

from __future__ import annotations

import ast
import copy
import importlib
import pickle
import pkgutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from launch import run_script
from schemes.conformance import (
    BATCH,
    STEPS,
    Case,
    Net,
    SaveAt,
    cases,
    copy_of,
    differing,
    each_call,
    images,
    loader,
    net,
    trainer,
)
from torch import Tensor, nn

import lightning_lowbit
from lightning_lowbit import lower, schemes, verify
from lightning_lowbit.callbacks.quant import QuantCallback
from lightning_lowbit.errors import ConfigError, UnsupportedModelError
from lightning_lowbit.modules.base import Scheme, Site, float_mode, switch_of
from lightning_lowbit.modules.convert import quantizers
from lightning_lowbit.modules.elementwise import LowBitAdd, LowBitAvgPool
from lightning_lowbit.modules.layers import LowBitLayer
from lightning_lowbit.modules.quantizer import Quantizer
from lightning_lowbit.modules.thresholds import ThresholdQuantizer
from lightning_lowbit.plugins.checkpoint import float_state_dict, initialize_from, read_scheme
from lightning_lowbit.plugins.loading import load_from_checkpoint
from lightning_lowbit.schemes import convert, find, registry, resolve

SCRIPT = Path(__file__).with_name("conformance.py")
CASES = cases()
MIDDLE = STEPS // 2 + 1  # in the second epoch
# Rows without a program, and why; rows whose programs have float stretches (all others are integers end to end).
REFUSED = {
    "jacinto-bn_value=batch-preset=WC8_AT8-freeze_ranges=0.5": "conv1: the scale of its weights is no power of two",
    "jacinto-preset=reference-freeze_batch_norm=0.3-freeze_ranges=None-range_shrink=0.0": "pool: its means are float",
    "wageubn": "lowbit_add: it reads sums that need more than the 24 bits of float32",
}
WITH_ISLANDS = ("bnn-", "wageubn-bits=5", "wageubn-preset=authors")


@dataclass
class Trained:
    case: Case
    module: Net
    before: dict[str, Tensor]
    checkpoint: Path
    after: Path


@pytest.fixture(scope="module", params=CASES, ids=str)
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """One fit a row; the tests take copies of what it left."""
    module, path = net(), tmp_path_factory.mktemp("run") / "middle.ckpt"
    before = copy_of(module)
    torch.manual_seed(5)
    fit, after = trainer(request.param.callback(), SaveAt(path, MIDDLE)), path.with_name("after.ckpt")
    fit.fit(module, loader(shuffle=True), loader())
    fit.save_checkpoint(after)
    return Trained(request.param, module, before, path, after)


@pytest.fixture
def trained(run: Trained) -> Net:
    return copy.deepcopy(run.module).eval()


# -- the registry --------------------------------------------------------------------------------------------
def defining_schemes() -> dict[str, str]:
    """Class name -> file, for every class of the folder that names Scheme as its base."""
    found = {}
    for path in Path(schemes.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef) and any(ast.unparse(base) == "Scheme" for base in node.bases):
                found[node.name] = path.name
    return found


def test_every_scheme_of_the_folder_is_registered_and_public() -> None:
    classes = {cls.__name__: name for name, cls in registry().items()}
    found = defining_schemes()
    assert found
    assert set(found) <= set(classes)
    for cls, file in found.items():
        assert classes[cls] == file.removesuffix(".py")
        assert getattr(lightning_lowbit, cls) is registry()[classes[cls]]


def test_every_registered_scheme_is_a_row() -> None:
    assert {case.scheme for case in CASES} == set(registry())
    assert {module.name for module in pkgutil.iter_modules(schemes.__path__)} >= {case.scheme for case in CASES}


# -- obligations ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize("case", CASES, ids=str)
def test_converts_in_place_and_keeps_parameters_and_their_names(case: Case) -> None:
    module = net()
    parameters, layers = dict(module.named_parameters()), dict(module.named_modules())
    result = convert(module, resolve(case.scheme, **case.options))
    by_rule = {path for path, reason in result.skipped.items() if "layer, by" in reason}  # a scheme may spare the ends
    assert sorted([*(layer.path for layer in result.layers), *by_rule]) == ["conv1", "conv2", "conv3", "fc"]
    assert {layer.path for layer in result.layers} >= {"conv2", "conv3"}
    after = dict(module.named_parameters())
    assert all(after[name] is parameter for name, parameter in parameters.items())
    assert all(
        module.get_submodule(path) is layer for path, layer in layers.items() if path.startswith(("conv", "bn", "fc"))
    )
    assert all("lowbit" in name for name in module.state_dict().keys() - net().state_dict().keys())


@pytest.mark.parametrize("case", CASES, ids=str)
def test_loads_float_weights_and_gives_them_back(case: Case, tmp_path: Path) -> None:
    plain = net(seed=3)
    torch.save(plain.state_dict(), tmp_path / "float.pt")
    module = net()
    convert(module, resolve(case.scheme, **case.options))
    initialize_from(tmp_path / "float.pt", module)
    assert differing(float_state_dict(module), copy_of(plain)) == []
    net().load_state_dict(float_state_dict(module), strict=True)


def test_trains_and_the_error_reaches_the_first_layer(run: Trained) -> None:
    after = copy_of(run.module)
    for name, value in run.before.items():
        if name.endswith(".weight"):
            assert not torch.equal(after[name], value), name
        assert bool(torch.isfinite(after[name]).all()), name
    assert all(quantizer.ready or not quantizer.has_grid for _, quantizer in quantizers(run.module))


def test_resume_is_bit_equal(run: Trained) -> None:
    module = net(seed=9)
    torch.manual_seed(77)
    trainer(run.case.callback()).fit(module, loader(shuffle=True), loader(), ckpt_path=run.checkpoint)
    assert differing(copy_of(module), copy_of(run.module)) == []


def test_a_checkpoint_loads_without_a_trainer(run: Trained) -> None:
    module = load_from_checkpoint(Net, run.checkpoint).eval()
    saved = torch.load(run.checkpoint)["state_dict"]
    assert type(module) is Net
    assert differing(copy_of(module), saved) == []
    assert differing(copy_of(run.module), saved) != []


def test_a_checkpoint_saved_after_the_fit_loads(run: Trained) -> None:
    assert differing(copy_of(load_from_checkpoint(Net, run.after)), copy_of(run.module)) == []


def test_pickles_and_copies_and_the_copy_is_independent(run: Trained, trained: Net) -> None:
    x = images(1)
    want, state = trained(x), copy_of(trained)
    for other in (pickle.loads(pickle.dumps(trained)), copy.deepcopy(trained)):
        assert torch.equal(other(x), want)
        trainer(run.case.callback(), max_epochs=1).fit(other.train(), loader(), loader())
        assert not torch.equal(other.eval()(x), want)
        assert differing(copy_of(trained), state) == []


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    run_script(SCRIPT, folder, ranks=2)
    return folder


@pytest.mark.parametrize("number", range(len(CASES)), ids=[str(case) for case in CASES])
def test_survives_two_ranks_fed_different_data(two_ranks: Path, number: int) -> None:
    first, second = (torch.load(two_ranks / f"{number}-{rank}.pt") for rank in (0, 1))
    # Moving statistics follow each rank's own last batch, as under torch's DDP.
    assert [key for key in differing(first, second) if ".running_" not in key] == []
    assert differing(first, copy_of(net())) != []


def test_stays_on_its_grids_in_evaluation(trained: Net) -> None:
    """What a quantizer gives lies on the grid that it declares, and so does what layers and sums read."""
    off: list[str] = []
    seen: set[str] = set()

    def check(path: str, quantizer: Quantizer | None, x: Tensor) -> None:
        seen.add(path)
        if quantizer is not None and quantizer.has_grid and not quantizer.grid().contains(x):
            off.append(path)

    def note(module: nn.Module, args: Any, output: Tensor) -> None:
        if isinstance(module, Quantizer):
            check(module.site.key, module, output)
        elif isinstance(module, LowBitLayer) and module.lowbit_input is None:
            check(f"{module.path} reads", module.input_grid, args[0])
        elif isinstance(module, (LowBitAdd, LowBitAvgPool)):
            own = any(name.startswith("lowbit_operand") for name in module._modules)
            for index, (quantizer, x) in enumerate(zip(module.operand_grids, args, strict=False)):
                if not own:
                    check(f"{module.path} reads {index}", quantizer, x)

    hooks = each_call(trained, lambda m: isinstance(m, (Quantizer, LowBitLayer, LowBitAdd, LowBitAvgPool)), note)
    trained(images(1) * 3)  # also beyond the calibrated range
    for hook in hooks:
        hook.remove()
    assert off == []
    # Weights, sums and errors of integer layers are codes inside them; whoever reads a result checks it here.
    integer = trained.conv2.scheme.proves_sums(trained.conv2)
    inside = ("weight", "bias", "accumulator", "sum", "error") if integer else ()
    assert {q.site.key for _, q in quantizers(trained) if q.site.role not in inside} <= seen


def test_validation_moves_nothing(run: Trained) -> None:
    module = copy.deepcopy(run.module).train()
    state, modes = copy_of(module), [m.training for m in module.modules()]
    torch.manual_seed(13)
    rng = torch.get_rng_state()
    trainer(run.case.callback()).validate(module, loader(), verbose=False)
    assert differing(copy_of(module), state) == []
    assert torch.equal(torch.get_rng_state(), rng)
    assert [m.training for m in module.modules()] == modes


def test_a_batch_equals_its_samples_one_by_one(trained: Net) -> None:
    x = images(1)
    together, alone = trained(x), torch.cat([trained(sample) for sample in x[:, None]])
    if switch_of(trained).conversion.skipped:  # a float layer's sums depend on how many are added up at once
        torch.testing.assert_close(together, alone)
    else:
        assert torch.equal(together, alone)


def test_float_mode_is_the_float_network(trained: Net) -> None:
    plain, x = net().eval(), images(1, BATCH)
    plain.load_state_dict(float_state_dict(trained), strict=True)
    with float_mode(trained):
        assert torch.equal(trained(x), plain(x))
    assert not torch.equal(trained(x), plain(x))


def test_exports_bit_equal(run: Trained, trained: Net) -> None:
    x = images(1)
    name = str(run.case)
    if name in REFUSED:
        with pytest.raises(UnsupportedModelError, match=REFUSED[name]):
            lower(trained, x)
        return
    program = lower(trained, x)
    certificate = verify(trained, program, [x, images(2, 3)])
    assert certificate.ok, str(certificate)
    islands = [op.path for op in program.ops if op.kind == "island"]
    assert certificate.end_to_end is (not islands)
    assert bool(islands) is name.startswith(WITH_ISLANDS)
    if not islands:
        assert torch.equal(torch.as_tensor(program.run(x.numpy())), trained(x))


# -- schemes from outside ------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Plain(Scheme):
    """A scheme as somebody else would write it: weights on a grid, everything else float."""

    name: ClassVar[str] = "plain-weights"

    bits: int = 6

    def quantizer(self, site: Site) -> Quantizer | None:
        return ThresholdQuantizer(site, self.bits, "max", trainable=False) if site.role == "weight" else None


def test_a_class_that_is_imported_is_found_by_name(tmp_path: Path) -> None:
    assert find("plain-weights") is Plain
    assert find(f"{Plain.__module__}.{Plain.__qualname__}") is Plain
    assert resolve("plain-weights", bits=3) == Plain(3)
    assert "plain-weights" not in registry()
    module, path = net(), tmp_path / "plain.ckpt"
    trainer(QuantCallback("plain-weights"), SaveAt(path, STEPS)).fit(module, loader(), loader())
    spec = torch.load(path)["lightning_lowbit"]
    assert read_scheme(spec) == Plain()
    again = load_from_checkpoint(Net, path).eval()
    assert torch.equal(again(images(1)), module.eval()(images(1)))


def test_an_entry_point_is_found_by_name_and_cannot_replace_a_built_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "outside_scheme.py").write_text(
        "from dataclasses import dataclass\n"
        "from typing import ClassVar\n"
        "from lightning_lowbit.modules.base import Scheme\n"
        "@dataclass(frozen=True)\n"
        "class Outside(Scheme):\n"
        "    name: ClassVar[str] = 'outside'\n"
        "    bits: int = 5\n"
    )
    folder = tmp_path / "outside-1.0.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: outside\nVersion: 1.0\n")
    (folder / "entry_points.txt").write_text(
        "[lightning_lowbit.schemes]\noutside = outside_scheme:Outside\ntqt = outside_scheme:Outside\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    assert registry()["outside"].__name__ == "Outside"
    assert QuantCallback("outside").scheme.bits == 5  # type: ignore[attr-defined]  # its field
    assert registry()["tqt"].__name__ == "Tqt"


def test_a_name_from_a_file_is_not_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "never_imported.py").write_text("raise SystemExit('imported')\n")
    monkeypatch.syspath_prepend(tmp_path)
    spec = {"format": 1, "version": "1", "scheme": "never_imported.Scheme", "options": {}}
    with pytest.raises(ConfigError, match=r"no scheme is called 'never_imported\.Scheme'"):
        read_scheme(spec)
    assert "never_imported" not in sys.modules

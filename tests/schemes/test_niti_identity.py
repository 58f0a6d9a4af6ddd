"""One SHA-256 of all integers, whatever computes them: backend, instruction set, threads, processes, a kill between.

Not among the promises: accumulating gradients of small batches, each with shifts of its own, is another computation
than one large batch.
"""

from __future__ import annotations

import functools
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from launch import held_to, run_script
from plugins.lifecycle_nets import QUIET
from schemes.niti_identity import KILLED_AT, SAMPLES, SAVED_EVERY, STEPS_AN_EPOCH, VARIANTS, Outcome, data, train
from torch import Tensor

from lightning_lowbit import kernels
from lightning_lowbit.kernels import fusion, ledger
from lightning_lowbit.kernels.requantize import compile_policy

pytestmark = [*QUIET, pytest.mark.filterwarnings("ignore:the backend 'int8' is not exact on this machine")]

SCRIPT = Path(__file__).with_name("niti_identity.py")
LAST = 2 * STEPS_AN_EPOCH
EAGER = {"LIGHTNING_LOWBIT_COMPILE": "never"}  # compiling takes longer than a run
CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
Baseline = Callable[[str], Outcome]


@pytest.fixture(scope="module")
def baseline() -> Baseline:
    """The run in this process, on one thread, by the backend that is chosen here."""
    runs: dict[str, Outcome] = {}

    def run(variant: str = "plain") -> Outcome:
        if variant not in runs:
            runs[variant] = train(variant=variant)[1]
        return runs[variant]

    return run


def assert_same(run: Outcome, expected: Outcome, but_for: str | None = None) -> None:
    """All integers behind every step that both took; a failure names the first step and what parts there.

    Args:
        but_for: last part of the names that count at the end only.
    """
    assert max(run.steps) == max(expected.steps) == LAST
    for step, state in sorted(run.steps.items()):
        assert state.keys() == expected.steps[step].keys()
        apart = [name for name, value in state.items() if value != expected.steps[step][name]]
        apart = [name for name in apart if name.rpartition(".")[2] != but_for]
        assert not apart, f"first parts behind step {step}: {apart}"
    assert run.end == expected.end
    assert run.sha256 == expected.sha256


def outcome(folder: Path, name: str, rank: int = 0) -> Outcome:
    return Outcome(**torch.load(folder / f"{name}-{rank}.pt", weights_only=True))


# -- what the baseline is ----------------------------------------------------------------------------------------
@pytest.mark.parametrize("variant", ["plain", "island"])
def test_every_integer_moves_and_no_error_is_float(baseline: Baseline, variant: str) -> None:
    run = baseline(variant)
    assert run.float_errors == set()
    first, last = run.steps[1], run.steps[LAST]
    for layer in ("conv1", "conv2", "conv3", "fc"):
        assert first[f"{layer}.lowbit_weight codes"] != last[f"{layer}.lowbit_weight codes"]
        assert first[f"{layer}.lowbit_bias codes"] != last[f"{layer}.lowbit_bias codes"]
    assert not all(SAMPLES % divisor == 0 for divisor in (2, 4, 16))


def test_another_seed_parts(baseline: Baseline) -> None:
    """The hash sees what it should: without this all tests below could hold of anything."""
    other = train(seed=1)[1]
    assert other.sha256 != baseline("plain").sha256
    assert other.steps[1]["fc.lowbit_weight codes"] != baseline("plain").steps[1]["fc.lowbit_weight codes"]


# -- what computes -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("variant", ["plain", "island"])
@pytest.mark.parametrize("backend", ["reference", "simulate", "int8"])
def test_backends(baseline: Baseline, backend: str, variant: str) -> None:
    with kernels.use(backend):
        assert_same(train(variant=variant)[1], baseline(variant))


@CUDA
@pytest.mark.parametrize("variant", ["plain", "island"])
def test_gpu(baseline: Baseline, variant: str) -> None:
    assert_same(train(variant=variant, accelerator="gpu", devices=1)[1], baseline(variant))


@pytest.mark.parametrize("isa", ["AVX2", "AVX512_CORE"])
def test_instruction_sets(baseline: Baseline, tmp_path: Path, isa: str) -> None:
    """No dot products of int8; torch's own loops, and those that it compiles for large tensors, are held down too."""
    runs = ("plain=auto:plain", "island=auto:island")
    held = {"ATEN_CPU_CAPABILITY": {"AVX2": "avx2", "AVX512_CORE": "avx512"}[isa], "ONEDNN_MAX_CPU_ISA": isa}
    said = run_script(SCRIPT, tmp_path, *runs, LIGHTNING_LOWBIT_COMPILE="auto", ONEDNN_VERBOSE="1", **held)
    assert held_to(isa, said) or not torch.backends.mkldnn.is_available()
    assert_same(outcome(tmp_path, "plain"), baseline("plain"))
    assert_same(outcome(tmp_path, "island"), baseline("island"))


@pytest.mark.parametrize(("threads", "variant"), [(1, "plain"), (2, "plain"), (4, "plain"), (2, "island")])
def test_threads(baseline: Baseline, threads: int, variant: str) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert_same(train(variant=variant)[1], baseline(variant))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("policy", ["never", "always"])
def test_eager_and_compiled_kernels(baseline: Baseline, policy: str) -> None:
    with compile_policy(policy):
        assert_same(train(compile=policy == "always")[1], baseline("plain"))


def test_a_compiled_loop_with_other_bits_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(row: Tensor, *tensors: Tensor | None) -> None:
        assert tensors[0] is not None
        tensors[0].fill_(1)

    monkeypatch.setattr(fusion, "_loop", lambda *key: wrong)
    monkeypatch.setattr(fusion, "_entered", set())
    monkeypatch.setattr(ledger, "refusals", {})
    with compile_policy("always"):
        codes = kernels.requantize(torch.arange(-500, 500, dtype=torch.int32), 2)
    assert codes.unique().numel() == 251
    assert any("other bits" in why for why in ledger.refusals.values())


# -- how many processes ------------------------------------------------------------------------------------------
PROCESSES = {2: ("ddp", *VARIANTS), 4: ("ddp", "plain", "island")}


@pytest.fixture(scope="module")
def processes(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Path]:
    """The folder of all runs with so many processes, of which there is one group."""

    @functools.cache
    def started(world: int) -> Path:
        folder = tmp_path_factory.mktemp(f"{world}ranks")
        runs = ["ddp=ddp:plain", *(f"{name}=lowbit_ddp:{name}" for name in PROCESSES[world][1:])]
        run_script(SCRIPT, folder, *runs, "--devices", world, ranks=world, **EAGER)
        return folder

    return started


@pytest.mark.parametrize(("world", "run"), [(world, run) for world, runs in PROCESSES.items() for run in runs])
def test_processes(baseline: Baseline, processes: Callable[[int], Path], world: int, run: str) -> None:
    expected = baseline("plain" if run == "ddp" else run)
    for rank in range(world):
        # Static ranges are what all processes have seen only when they are renewed.
        assert_same(outcome(processes(world), run, rank), expected, but_for="seen" if run == "static" else None)


def test_two_nodes_that_torchrun_starts(baseline: Baseline, tmp_path: Path) -> None:
    run_script(SCRIPT, tmp_path, "nodes=lowbit_ddp:plain", "--nodes", 2, ranks=2, **EAGER)
    for rank in (0, 1):
        assert_same(outcome(tmp_path, "nodes", rank), baseline("plain"))


# -- when --------------------------------------------------------------------------------------------------------
def test_killed_in_mid_epoch_and_resumed(baseline: Baseline, tmp_path: Path) -> None:
    run_script(SCRIPT, tmp_path, "killed=auto:plain", code=-signal.SIGKILL, **EAGER)
    assert not (tmp_path / "killed-0.pt").exists()
    last = tmp_path / f"step={KILLED_AT // SAVED_EVERY * SAVED_EVERY}.ckpt"
    assert STEPS_AN_EPOCH < KILLED_AT // SAVED_EVERY * SAVED_EVERY < LAST
    assert last == max(tmp_path.glob("*.ckpt"), key=lambda path: int(path.stem.partition("=")[2]))
    resumed = train(tmp_path / "resumed", ckpt_path=last)[1]
    assert min(resumed.steps) == KILLED_AT // SAVED_EVERY * SAVED_EVERY + 1
    # A checkpoint takes over the ranges that evaluation uses, so the whole run must save as often, step by step.
    assert_same(resumed, train(tmp_path / "whole")[1])
    assert resumed.sha256 == baseline("plain").sha256


@pytest.mark.parametrize("variant", ["plain", "island"])
def test_a_batch_predicts_what_its_samples_predict_one_by_one(variant: str) -> None:
    net, _ = train(variant=variant)
    images = data(50, 1200).tensors[0]
    with torch.no_grad():
        together, alone = net(images) + 0.0, torch.cat([net(image[None]) + 0.0 for image in images])
    assert together.unique().numel() > 50
    assert torch.equal(together, alone)

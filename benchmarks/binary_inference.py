"""Products of packed signs beside float32 and int8: matrix products and 3x3 convolutions of binary layers.

    python benchmarks/binary_inference.py [--parts matmul conv mlp] [--rounds 15] [--json FILE]

One thread's CPU time, candidates in turn; ratios of medians over the rounds and of the best. Weights are prepared
beforehand, as a layer keeps them: words, and for int8 a contiguous (N, K) or channels_last weight.

matmul: `words` has both operands packed and gives int32; `bits` gives the signs of thresholds, weight panels kept.
conv: float images to float sums. float32 is the faster of contiguous and channels_last memory; int8 takes signs to
int8 first; `binary` packs first; `bits` has words in and out, as between two binary layers.
mlp: a whole network, 784-3x6144-10 with 8-bit first and last layers, packed, beside the float32 network.

With glibc, freed memory stays with the process: else the candidate after one with large scratch pays for its pages.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import platform
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from timing import Timing, alternate
from torch import Tensor, nn

from lightning_lowbit import kernels
from lightning_lowbit.export.packed import pack
from lightning_lowbit.export.packed_sizes import packed_sizes
from lightning_lowbit.kernels.binary import (
    BinaryWeight,
    pack_images,
    pack_signs,
    weight_words,
    xnor_conv2d,
    xnor_linear,
    xnor_matmul,
)
from lightning_lowbit.schemes import convert

# M, K, N
MATRICES = ((4096, 1024, 1024), (1024, 6144, 6144), (16, 6144, 6144), (1, 6144, 6144))
# N, C, height and width, O
LAYERS = ((16, 128, 32, 128), (8, 256, 14, 256), (1, 256, 14, 256), (16, 64, 32, 64))
# Widths of a network, and its batches with how many calls of each are timed together: a network that is asked again
# and again finds in the caches what fits there.
MLP, CALLS = (784, 6144, 6144, 6144, 10), {1: 60, 16: 15, 256: 2}

# Of the columns of `row`.
FORMS = ("9.3f", "9.1f", "9.1f") * 2 + ("6.0f",)

Steps = dict[str, Callable[[], object]]
Row = dict[str, float]


# Parameters of glibc's mallopt.
TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3


def random(*size: int) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(sum(size)))


def codes(x: Tensor) -> Tensor:
    return torch.where(x < 0, -1, 1).to(torch.int8)


def thresholds(outputs: int) -> tuple[Tensor, Tensor]:
    return torch.zeros(outputs, dtype=torch.int32), torch.arange(outputs) % 2 == 0


def matrix_steps(m: int, k: int, n: int) -> Steps:
    x, w = random(m, k), random(n, k)
    a, b, weight = pack_signs(x), pack_signs(w), BinaryWeight(weight_words(w), k)
    x_codes, w_codes, limits = codes(x), codes(w).t(), thresholds(n)
    same("words", xnor_matmul(a, b, k), kernels.int8_matmul(x_codes, w_codes))
    return {
        "float32": lambda: x @ w.t(),
        "int8": lambda: kernels.int8_matmul(x_codes, w_codes),
        "words": lambda: xnor_matmul(a, b, k),
        "bits": lambda: xnor_linear(a, weight, limits),
    }


def layer_steps(batch: int, channels: int, side: int, outputs: int) -> Steps:
    x, w = random(batch, channels, side, side), random(outputs, channels, 3, 3)
    x_last, w_last = (of.contiguous(memory_format=torch.channels_last) for of in (x, w))
    weight, planes = BinaryWeight(weight_words(w), channels), pack_images(x)
    w_codes, limits = codes(w_last), thresholds(outputs)

    def int8() -> Tensor:
        return kernels.int8_conv2d(codes(x_last), w_codes, padding=1, exact_float=True).to(torch.float32)

    def binary() -> Tensor:
        return xnor_conv2d(pack_images(x), weight, padding=1)

    same("binary", binary(), int8())
    return {
        "float32": lambda: F.conv2d(x, w, padding=1),
        "float32, channels_last": lambda: F.conv2d(x_last, w_last, padding=1),
        "int8": int8,
        "binary": binary,
        "bits": lambda: xnor_conv2d(planes, weight, padding=1, threshold=limits),
    }


def same(name: str, found: Tensor, expected: Tensor) -> None:
    if not torch.equal(found, expected):
        raise SystemExit(f"{name}: other values than int8; a time would mean nothing")


def row(name: str, times: dict[str, Timing], products: int) -> Row:
    """Of one candidate: milliseconds, its speed in that of float32 and of int8, billions of operations a second.

    Medians; and as "best" from the fastest round of each, which the load of other processes moves less.
    """
    own, int8 = times[name], times["int8"]
    floats = [timing for key, timing in times.items() if key.startswith("float32")]
    return {
        "ms": own.median_ms,
        "of float32": min(timing.median_ms for timing in floats) / own.median_ms,
        "of int8": int8.median_ms / own.median_ms,
        "best ms": own.min_ms,
        "best of float32": min(timing.min_ms for timing in floats) / own.min_ms,
        "best of int8": int8.min_ms / own.min_ms,
        "best GOPS": 2e-6 * products / own.min_ms,
    }


def measure(steps: Steps, products: int, rounds: int) -> dict[str, Row]:
    times = alternate(steps, rounds)
    return {name: row(name, times, products) for name in steps}


def packed_mlp(rounds: int) -> dict[str, Row]:
    """A packed network and the float32 network of its shape, in turn; sizes of both."""

    def network() -> nn.Sequential:
        layers: list[nn.Module] = []
        for inputs, outputs in pairwise(MLP):
            layers += [nn.Linear(inputs, outputs, bias=False), nn.BatchNorm1d(outputs), nn.Hardtanh()]
        return nn.Sequential(*layers[:-2])

    floats, net = network().eval(), network()
    convert(net, "bnn", random(16, MLP[0]), first="int8", last="int8")
    packed, results = pack(net), {}
    print(packed_sizes(packed))
    print(f"{'network':22} {'batch':>5} {'float32 ms':>11} {'packed ms':>10} {'x float32':>10}")
    for batch, calls in CALLS.items():
        x = random(batch, MLP[0])
        with torch.inference_mode():
            same("packed", packed(x), net.eval()(x))
            times = alternate(
                {
                    name: partial(repeated, module, x, calls)
                    for name, module in (("float32", floats), ("packed", packed))
                },
                rounds,
            )
        found = {name: timing.median_ms / calls for name, timing in times.items()}
        results[f"mlp {batch}"] = {**found, "of float32": 1 / times["packed"].ratio}
        label = "-".join(map(str, MLP))
        cells = f"{found['float32']:11.3f} {found['packed']:10.3f} {1 / times['packed'].ratio:10.1f}"
        print(f"{label:22} {batch:5} {cells}")
    return results


def repeated(module: nn.Module, x: Tensor, calls: int) -> None:
    for _ in range(calls):
        module(x)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=["matmul", "conv", "mlp"], default=["matmul", "conv", "mlp"])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if platform.libc_ver()[0] == "glibc":
        for parameter in (TRIM_THRESHOLD, MMAP_THRESHOLD):
            ctypes.CDLL(None).mallopt(parameter, 2**30)
    results: dict[str, dict[str, Row]] = {}
    print(f"{'':45} {'median':^27}   {'best':^34}")
    print(f"{'shape':22} {'row':22}", *[f"{head:>9}" for head in ("ms", "x float32", "x int8") * 2], f"{'GOPS':>6}")
    for part in [part for part in arguments.parts if part != "mlp"]:
        for shape in MATRICES if part == "matmul" else LAYERS:
            label = f"{part} {'x'.join(map(str, shape))}"
            if part == "matmul":
                steps, products = matrix_steps(*shape), shape[0] * shape[1] * shape[2]
            else:
                steps, products = layer_steps(*shape), shape[0] * shape[1] * shape[2] ** 2 * shape[3] * 9
            results[label] = measure(steps, products, arguments.rounds)
            for name, found in results[label].items():
                cells = [f"{value:{form}}" for value, form in zip(found.values(), FORMS, strict=True)]
                print(f"{label:22} {name:22}", *cells)
    networks = packed_mlp(arguments.rounds) if "mlp" in arguments.parts else {}
    print(kernels.backend_report())
    if arguments.json:
        arguments.json.write_text(json.dumps({**results, **networks}, indent=1))


if __name__ == "__main__":
    main()

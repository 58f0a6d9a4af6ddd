"""Products of packed signs beside float32 and int8: matrix products and 3x3 convolutions of binary layers.

    python benchmarks/binary_inference.py [--parts matmul conv] [--rounds 15] [--json FILE]

One thread's CPU time, candidates in turn; ratios are medians over rounds. Weights are prepared beforehand, as a layer
keeps them: words, and for int8 a contiguous (N, K) or channels_last weight.

matmul: `words` has both operands packed and gives int32; `bits` gives the signs of thresholds, weight panels kept.
conv: float images to float sums. float32 is the faster of contiguous and channels_last memory; int8 takes signs to
int8 first; `binary` packs first; `bits` has words in and out, as between two binary layers.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from timing import Timing, alternate
from torch import Tensor

from lightning_lowbit import kernels
from lightning_lowbit.kernels.binary import (
    BinaryWeight,
    pack_images,
    pack_signs,
    weight_words,
    xnor_conv2d,
    xnor_linear,
    xnor_matmul,
)

# M, K, N
MATRICES = ((4096, 1024, 1024), (1024, 6144, 6144), (16, 6144, 6144), (1, 6144, 6144))
# N, C, height and width, O
LAYERS = ((16, 128, 32, 128), (8, 256, 14, 256), (1, 256, 14, 256), (16, 64, 32, 64))

Steps = dict[str, Callable[[], object]]
Row = dict[str, float]


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
    """Milliseconds of one candidate, how many times faster than the others it is, and billions of operations a second."""
    own = times[name]
    floats = min(timing.median_ms for key, timing in times.items() if key.startswith("float32"))
    return {
        "ms": own.median_ms,
        "of float32": floats / own.median_ms,
        "of int8": times["int8"].median_ms / own.median_ms,
        "GOPS": 2e-6 * products / own.median_ms,
    }


def measure(steps: Steps, products: int, rounds: int) -> dict[str, Row]:
    times = alternate(steps, rounds)
    return {name: row(name, times, products) for name in steps}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=["matmul", "conv"], default=["matmul", "conv"])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    results: dict[str, dict[str, Row]] = {}
    print(f"{'shape':22} {'row':24} {'ms':>9} {'x float32':>10} {'x int8':>8} {'GOPS':>8}")
    for part in arguments.parts:
        for shape in MATRICES if part == "matmul" else LAYERS:
            label = f"{part} {'x'.join(map(str, shape))}"
            if part == "matmul":
                steps, products = matrix_steps(*shape), shape[0] * shape[1] * shape[2]
            else:
                steps, products = layer_steps(*shape), shape[0] * shape[1] * shape[2] ** 2 * shape[3] * 9
            results[label] = measure(steps, products, arguments.rounds)
            for name, found in results[label].items():
                cells = f"{found['ms']:9.3f} {found['of float32']:10.1f} {found['of int8']:8.1f} {found['GOPS']:8.0f}"
                print(f"{label:22} {name:24} {cells}")
    print(kernels.backend_report())
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()

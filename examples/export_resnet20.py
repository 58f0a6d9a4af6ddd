"""A fine-tuned ResNet-20's integers over all test images: PyTorch, numpy, ONNX Runtime and C, and their accuracy.

    python examples/export_resnet20.py --checkpoint lightning_logs/.../epoch=0-step=390.ckpt --data.root cifar10.zip

The checkpoint is a low-bit one, as a fit of ``configs/resnet20_tqt.yaml`` leaves it.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from cifar import CifarData
from export_and_run import c99, numpy_alone, onnx_runtime
from resnet import LitResNet

import lightning_lowbit as lowbit


def test_images(root: str, cache: str | None, limit: int | None) -> tuple[torch.Tensor, torch.Tensor]:
    """All test images as the network reads them, [N, 3, 32, 32], and their labels."""
    data = CifarData(root, cache=cache)
    data.setup("test")
    batches = [data.on_after_batch_transfer(batch, 0) for batch in data.test_dataloader()]
    images, labels = (torch.cat(parts)[:limit].contiguous() for parts in zip(*batches, strict=True))
    return images, labels


def main(argv: list[str] | None = None) -> dict[str, tuple[float, int]]:
    """Accuracy, and how many images have the network's very integers, for each who computes them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True)
    parser.add_argument("--data.root", dest="root", required=True)
    parser.add_argument("--data.cache", dest="cache")
    parser.add_argument("--limit", type=int, help="test images, all of them by default")
    parser.add_argument("--folder", type=Path, default=Path("resnet20"))
    args = parser.parse_args(argv)
    args.folder.mkdir(parents=True, exist_ok=True)
    model = lowbit.load_from_checkpoint(LitResNet, args.checkpoint).eval()
    x, labels = test_images(args.root, args.cache, args.limit)
    program = lowbit.lower(model, x[:2])
    print(program.summary(), lowbit.verify(model, program, x[:500].split(250)), sep="\n")
    with torch.no_grad():
        wanted = torch.cat([model(part) for part in x.split(500)]).numpy()

    def in_parts(compute: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
        return np.concatenate([compute(part.numpy()) for part in x.split(1000)])

    found = {
        "PyTorch": wanted,
        "numpy alone": in_parts(lambda part: numpy_alone(program, part, args.folder)),
        "ONNX Runtime, integers": in_parts(lambda part: onnx_runtime(program, part, args.folder, "integer")),
        "C99": c99(program, x.numpy(), args.folder),
    }
    rows = {}
    for who, logits in found.items():
        accuracy = 100 * float((logits.argmax(1) == labels.numpy()).mean())
        rows[who] = accuracy, int((logits == wanted).all(axis=1).sum())
        print(f"{who:<24}{accuracy:6.2f} % correct, {rows[who][1]:,} of {len(wanted):,} images with the same integers")
    return rows


if __name__ == "__main__":
    main()

"""Weights and activations of one bit: train an MLP, pack 64 signs into a word, multiply by XNOR and popcount.

python examples/binary_xnor.py --hidden 1024
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import torch
from binary_nets import BinaryClassifier, mlp
from lightning.pytorch import Trainer, seed_everything

from lightning_lowbit import Bnn, QuantCallback, pack
from lightning_lowbit.demos import DigitsData
from lightning_lowbit.export.packed_file import save_packed


def milliseconds(run: Callable[[], object], rounds: int = 20) -> float:
    """The shortest of some rounds, behind a first one that is not counted."""
    run()
    took = []
    for _ in range(rounds):
        begin = time.perf_counter()
        run()
        took.append(time.perf_counter() - begin)
    return 1000 * min(took)


def main(argv: list[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--hidden", type=int, default=1024, help="width of the three hidden layers")
    parser.add_argument("--file", type=Path, default=Path("digits.packed"))
    args = parser.parse_args(argv)
    seed_everything(0)
    torch.set_num_threads(1)
    model, data = BinaryClassifier(lr=0.003, loss="squared_hinge"), DigitsData()
    model.net = mlp(64, args.hidden)
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    quant = QuantCallback(Bnn(first="int8", last="int8"))
    Trainer(max_epochs=args.epochs, accelerator="cpu", callbacks=[quant], **quiet).fit(model, data)

    packed = pack(model.eval())
    assert data.val_set is not None
    images, labels = data.val_set.tensors
    with torch.inference_mode():
        logits = packed(images)
        right = 100 * float((logits.argmax(1) == labels).float().mean())
        equal = int((logits == model(images)).all(1).sum())
        plain = mlp(64, args.hidden).eval()  # the same network in float32
        times = [milliseconds(lambda net=net: net(images)) for net in (plain, packed)]
    print()
    sizes = save_packed(packed, args.file)  # prints what each layer takes
    print(f"\n{right:.2f} % correct, {equal} of {len(images)} images with the very logits of the unpacked network")
    print(f"{times[0]:.2f} ms in float32, {times[1]:.2f} ms packed: {times[0] / times[1]:.1f} times faster, one thread")
    return {"right": right, "equal": equal, "smaller": sizes.binary.float32 / sizes.binary.stored}


if __name__ == "__main__":
    main()

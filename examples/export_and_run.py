"""Train on digits in low bits (``--scheme tqt``), lower, and let numpy, C and ONNX Runtime compute the test set."""

import argparse
import ctypes
import subprocess
import sys
from pathlib import Path

import numpy as np
from lightning.pytorch import Trainer, seed_everything

import lightning_lowbit as lowbit
from lightning_lowbit import Bnn, F8Net, IntegerProgram, Jacinto, Niti, QuantCallback, Tqt, Wageubn
from lightning_lowbit.demos import DigitsCnn, DigitsData

SCHEMES = {  # rate and options; the binary network keeps float islands, its residual sum and what stands around it
    "tqt": (0.02, Tqt()), "f8net": (0.05, F8Net()), "wageubn": (0.4, Wageubn(io="strict", first_last="int8")),
    "jacinto": (0.02, Jacinto()), "niti": (0.05, Niti()), "bnn": (0.1, Bnn(first="int8", last="int8", relu="prelu")),
}  # fmt: skip


def numpy_alone(program: IntegerProgram, images: np.ndarray, folder: Path) -> np.ndarray:
    program.save(folder / "digits.lowbit", with_runtime=True)
    np.save(folder / "images.npy", images)
    files = ["runtime.py", "digits.lowbit", "images.npy", "logits.npy"]
    subprocess.run([sys.executable, "-I", *files], cwd=folder, check=True, stdout=subprocess.DEVNULL)
    return np.load(folder / "logits.npy")


def c99(program: IntegerProgram, images: np.ndarray, folder: Path) -> np.ndarray:
    lowbit.export_c(program, folder / "digits.c", test_input=images)
    subprocess.run(["cc", "-std=c99", "-O2", "-fPIC", "-shared", "digits.c", "-o", "digits.so"], cwd=folder, check=True)
    c = ctypes.CDLL(str((folder / "digits.so").resolve()))
    assert c.main() == 0, "the file's own check failed"
    codes, sums, logits = np.empty(images[0].size, np.int64), np.empty(10, np.int64), np.empty((len(images), 10), "f4")
    for image, row in zip(images, logits, strict=True):
        x, q, s, y = (ctypes.c_void_p(array.ctypes.data) for array in (image, codes, sums, row))
        c.network_quantize_input(x, q), c.network_run_codes(q, s), c.network_dequantize_output(s, y)
    return logits


def onnx_runtime(program: IntegerProgram, images: np.ndarray, folder: Path, form: str) -> np.ndarray:
    import onnxruntime

    lowbit.export_onnx(program, folder / f"{form}.onnx", form=form, weight_type="uint8")  # exact without VNNI too
    return onnxruntime.InferenceSession(folder / f"{form}.onnx").run(None, {"input": images})[0]


def main(argv: list[str] | None = None) -> dict[str, str]:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--scheme", choices=SCHEMES, default="tqt")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--folder", type=Path, default=Path("digits"))
    args = parser.parse_args(argv)
    args.folder.mkdir(parents=True, exist_ok=True)
    seed_everything(0)
    rate, scheme = SCHEMES[args.scheme]
    model, data = DigitsCnn(lr=rate), DigitsData()
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    Trainer(max_epochs=args.epochs, accelerator="cpu", callbacks=[QuantCallback(scheme)], **quiet).fit(model, data)
    program = lowbit.lower(model.eval(), model.example_input_array)
    print(program.summary(), lowbit.verify(model, program, data.test_dataloader()), sep="\n")
    x, labels = data.val_set.tensors
    wanted, rows = model(x).detach().numpy(), {}
    ways = {"the network, PyTorch": lambda *_: wanted, "the program, numpy alone": numpy_alone, "C99": c99}
    ways |= {f"ONNX Runtime, {form}": lambda *to, form=form: onnx_runtime(*to, form) for form in ("integer", "qdq")}
    for who, compute in ways.items():
        try:
            logits = compute(program, x.numpy(), args.folder)
            right, equal = (logits.argmax(1) == labels.numpy()).mean(), (logits == wanted).all(axis=1).sum()
            rows[who] = f"{100 * right:.2f} % correct, {equal} of {len(wanted)} images with the same integers"
        except (ValueError, OSError, ImportError) as error:  # no such form, no compiler, no ONNX Runtime
            rows[who] = f"- {error}"[:110]
    print("", *(f"{who:<26}{row}" for who, row in rows.items()), sep="\n")
    return rows


if __name__ == "__main__":
    main()

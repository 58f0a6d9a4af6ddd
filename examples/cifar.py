"""CIFAR-10 in memory: decoded once to uint8, augmented a whole batch at a time, no worker processes.

50,000 images are 154 MB of uint8, so the training set fits beside any network of this size; cropping,
flipping and normalizing a batch of 128 takes about a millisecond, and workers would only compete for cores.
"""

from __future__ import annotations

import io
import zipfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
MEAN = (0.485, 0.456, 0.406)  # of the public checkpoint, for RGB in [0, 1]
STD = (0.229, 0.224, 0.225)
SIZE, PAD = 32, 4


class Images(NamedTuple):
    """``pixels`` uint8 [N, 32, 32, 3] (RGB, channel last) and ``labels`` int64 [N]."""

    pixels: Tensor
    labels: Tensor


def _decode(named: Iterable[tuple[str, bytes]]) -> Images:
    """Decode ``(<split>/<class>/<file>, bytes)``; the class index is the class's place in the alphabet."""
    from PIL import Image

    index = {name: i for i, name in enumerate(CLASSES)}
    pixels, labels = [], []
    for name, data in named:
        with Image.open(io.BytesIO(data)) as image:
            flat = torch.frombuffer(bytearray(image.convert("RGB").tobytes()), dtype=torch.uint8)
        pixels.append(flat.view(SIZE, SIZE, 3))
        labels.append(index[Path(name).parent.name])
    return Images(torch.stack(pixels), torch.tensor(labels))


def _from_zip(path: Path, split: str) -> Images:
    with zipfile.ZipFile(path) as archive:
        names = sorted(n for n in archive.namelist() if n.startswith(f"{split}/") and not n.endswith("/"))
        return _decode((n, archive.read(n)) for n in names)


def _from_binary(folder: Path, split: str) -> Images:
    """The authors' binary version: records of one label byte and 3072 pixel bytes, channels first."""
    pattern = "data_batch_*.bin" if split == "train" else "test_batch.bin"
    records = b"".join(p.read_bytes() for p in sorted(folder.glob(pattern)))
    rows = torch.frombuffer(bytearray(records), dtype=torch.uint8).view(-1, 1 + 3 * SIZE * SIZE)
    pixels = rows[:, 1:].view(-1, 3, SIZE, SIZE).permute(0, 2, 3, 1).contiguous()
    return Images(pixels, rows[:, 0].long())


def load_images(root: str | Path, split: str, cache: str | Path | None = None) -> Images:
    """Read one split of CIFAR-10.

    Args:
        root: a zip file with ``train/<class>/*.jpg`` and ``test/<class>/*.jpg``, a folder with one such zip,
            or the folder ``cifar-10-batches-bin`` of the authors' binary version.
        split: ``"train"`` or ``"test"``.
        cache: folder in which the decoded images of a zip are kept; None decodes every time (about 7 s).

    Raises:
        FileNotFoundError: ``root`` holds none of the three.
    """
    root = Path(root).expanduser()
    if (root / "test_batch.bin").is_file():
        return _from_binary(root, split)
    zips = [root] if root.is_file() else sorted(root.glob("*cifar10*.zip"))
    if len(zips) != 1:
        raise FileNotFoundError(
            f"--data.root {root}: expected a zip of train/<class>/*.jpg and test/<class>/*.jpg, a folder "
            f"with one *cifar10*.zip, or the folder cifar-10-batches-bin; found {len(zips)} zip files and no "
            "test_batch.bin"
        )
    if cache is None:
        return _from_zip(zips[0], split)
    # The size in the name keeps one cache folder apart for different copies of the data.
    kept = Path(cache).expanduser() / f"{zips[0].stem}_{zips[0].stat().st_size}_{split}.pt"
    if not kept.is_file():
        kept.parent.mkdir(parents=True, exist_ok=True)
        torch.save(tuple(_from_zip(zips[0], split)), kept)
    return Images(*torch.load(kept, weights_only=True))


def _shift_right(z: Tensor, n: int) -> Tensor:
    """Logical shift of int64: torch's own is arithmetic."""
    return (z >> n) & ((1 << (64 - n)) - 1)


def mix64(z: Tensor) -> Tensor:
    """SplitMix64's finalizer (Steele, Lea, Flood 2014) on int64, which wraps as uint64 does: a bijection that
    makes neighboring counters look independent.

    >>> mix64(torch.tensor([0, 1, 2])).tolist()
    [0, 6238072747940578789, -2606959012126976886]
    """
    z = (z ^ _shift_right(z, 30)) * (0xBF58476D1CE4E5B9 - (1 << 64))
    z = (z ^ _shift_right(z, 27)) * (0x94D049BB133111EB - (1 << 64))
    return z ^ _shift_right(z, 31)


def draw(sample: Tensor, seed: int, epoch: int) -> tuple[Tensor, Tensor, Tensor]:
    """Crop offsets ``y``, ``x`` in 0..8 and a flip flag per sample, a pure function of (seed, sample, epoch).

    So an image is cropped the same way whatever the batch size, the order, the rank or the step at which a
    resumed run starts again.
    """
    key = mix64(mix64(torch.tensor(seed)) + epoch).to(sample.device)
    bits = mix64(mix64(key + 1) + sample)
    offsets = 2 * PAD + 1
    return _shift_right(bits, 40) % offsets, (_shift_right(bits, 16) & 0xFFFFFF) % offsets, (bits & 1).bool()


def augment(pixels: Tensor, sample: Tensor, seed: int, epoch: int) -> Tensor:
    """Pad by 4 black pixels, crop 32x32, flip every other image: uint8 [B, 32, 32, 3] in and out."""
    y, x, flip = draw(sample, seed, epoch)
    padded = F.pad(pixels, (0, 0, PAD, PAD, PAD, PAD))
    windows = padded.unfold(1, SIZE, 1).unfold(2, SIZE, 1)  # a view, [B, 9, 9, 3, 32, 32]
    cropped = windows.permute(0, 1, 2, 4, 5, 3)[torch.arange(len(sample), device=sample.device), y, x]
    return torch.where(flip.view(-1, 1, 1, 1), cropped.flip(2), cropped)


def normalize(pixels: Tensor) -> Tensor:
    """uint8 [B, 32, 32, 3] to float32 [B, 3, 32, 32]; permuting last makes it channels_last at no cost."""
    mean = torch.tensor(MEAN, device=pixels.device).mul_(255)
    std = torch.tensor(STD, device=pixels.device).mul_(255)
    return pixels.float().sub_(mean).div_(std).permute(0, 3, 1, 2)


class CifarSet(Dataset[Any]):
    """Hands out whole batches of raw pixels; the training set adds the sample numbers that key the crops."""

    def __init__(self, images: Images, train: bool) -> None:
        self.images, self.train = images, train

    def __len__(self) -> int:
        return len(self.images.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, ...]:
        return tuple(part[0] for part in self.__getitems__([index]))

    def __getitems__(self, indices: Sequence[int]) -> tuple[Tensor, ...]:
        sample = torch.as_tensor(indices)
        batch = self.images.pixels[sample], self.images.labels[sample]
        return (*batch, sample) if self.train else batch


def whole_batches(batch: Any) -> Any:
    """Collate nothing: ``__getitems__`` already returns a batch."""
    return batch


class CifarData(LightningDataModule):
    """CIFAR-10 with random crop and flip; the test images serve as validation set.

    Args:
        root: where the images are, see :func:`load_images`.
        batch_size: images per training step; the last incomplete batch is dropped.
        seed: with sample and epoch, the key of the augmentation.
        cache: folder for the decoded images, None decodes at every start.
        eval_batch_size: images per validation step.
    """

    def __init__(
        self,
        root: str,
        batch_size: int = 128,
        seed: int = 0,
        cache: str | None = None,
        eval_batch_size: int = 500,
    ) -> None:
        super().__init__()
        self.root, self.cache = root, cache
        self.batch_size, self.eval_batch_size, self.seed = batch_size, eval_batch_size, seed
        self.train_set: CifarSet | None = None
        self.test_set: CifarSet | None = None

    def setup(self, stage: str) -> None:
        if self.test_set is None:
            self.test_set = CifarSet(load_images(self.root, "test", self.cache), train=False)
        if self.train_set is None:  # also for validate: calibration draws from it
            self.train_set = CifarSet(load_images(self.root, "train", self.cache), train=True)

    def train_dataloader(self) -> DataLoader[Any]:
        assert self.train_set is not None
        return DataLoader(self.train_set, self.batch_size, shuffle=True, drop_last=True, collate_fn=whole_batches)

    def val_dataloader(self) -> DataLoader[Any]:
        assert self.test_set is not None
        return DataLoader(self.test_set, self.eval_batch_size, collate_fn=whole_batches)

    def test_dataloader(self) -> DataLoader[Any]:
        return self.val_dataloader()

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> tuple[Tensor, Tensor]:
        # Here and not in the dataset: this hook knows the trainer's epoch, also in a resumed run and when
        # workers fetch ahead, and pixels travel to a device as bytes.
        pixels, labels, *sample = batch
        if sample:
            epoch = 0 if self.trainer is None else self.trainer.current_epoch
            pixels = augment(pixels, sample[0], self.seed, epoch)
        return normalize(pixels), labels

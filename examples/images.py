"""Images by class, split into a training and a test set: digits, or a folder of your own."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

TEST_SHARE = 0.2
SPLIT_SEED = 0  # the same test set in every run, whatever the seed of the training
ENDINGS = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp"}


@dataclass(frozen=True)
class Images:
    """Normalized float images (N, channels, height, width) and the number of each one's class."""

    train_x: torch.Tensor
    train_t: torch.Tensor
    test_x: torch.Tensor
    test_t: torch.Tensor
    class_names: list[str]
    mean: list[float]
    std: list[float]

    @property
    def channels(self) -> int:
        return self.train_x.shape[1]

    @property
    def size(self) -> int:
        return self.train_x.shape[-1]


def load_images(folder: str | None, size: int) -> Images:
    """The images of a folder; with none, scikit-learn's handwritten digits."""
    return digits() if folder is None else image_folder(folder, size)


def digits() -> Images:
    """1,797 scans of handwritten digits, 8 by 8 pixels, grey."""
    data = load_digits()
    x = torch.from_numpy(data.images).float().unsqueeze(1) / 16
    return _split(x, torch.from_numpy(data.target).long(), [str(n) for n in data.target_names])


def image_folder(folder: str, size: int) -> Images:
    """A folder with one subfolder a class, resized to `size` by `size`, RGB, all in memory.

    A file that is no image is left out with a warning.
    """
    root = Path(folder)
    if not root.is_dir():
        raise SystemExit(f"{folder} is not a folder")
    images: list[torch.Tensor] = []
    labels: list[int] = []
    names: list[str] = []
    broken: list[str] = []
    for inner in sorted(p for p in root.iterdir() if p.is_dir()):
        found = []
        for file in sorted(p for p in inner.rglob("*") if p.suffix.lower() in ENDINGS):
            try:
                found.append(_read(file, size))
            except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
                broken.append(f"{file} cannot be read as an image ({error})")
                warnings.warn(f"{broken[-1]}: it is left out", stacklevel=2)
        if len(found) == 1:
            raise SystemExit(
                f"{inner} has one image only: a class needs one to train and one to test"
            )
        if found:
            images += found
            labels += [len(names)] * len(found)
            names.append(inner.name)
    if len(names) < 2:
        raise SystemExit(
            f"{folder} must hold one subfolder of images for each of two classes or more"
            + "".join(f"\n{problem}" for problem in broken)
        )
    return _split(torch.stack(images), torch.tensor(labels), names)


def _read(file: Path, size: int) -> torch.Tensor:
    with Image.open(file) as image:
        pixels = np.asarray(image.convert("RGB").resize((size, size)), dtype=np.float32)
    return torch.from_numpy(pixels).permute(2, 0, 1) / 255


def _split(x: torch.Tensor, t: torch.Tensor, names: list[str]) -> Images:
    """Split with the same share of each class, and normalize by the training set."""
    n_test = max(len(names), round(TEST_SHARE * len(t)))
    train, test = map(
        torch.from_numpy,
        train_test_split(
            np.arange(len(t)), test_size=n_test, stratify=t.numpy(), random_state=SPLIT_SEED
        ),
    )
    mean = x[train].mean(dim=(0, 2, 3))
    std = x[train].std(dim=(0, 2, 3)).clamp_min(1e-6)
    x = (x - mean.view(-1, 1, 1)) / std.view(-1, 1, 1)
    return Images(x[train], t[train], x[test], t[test], names, mean.tolist(), std.tolist())


def shift(x: torch.Tensor, pixels: int) -> torch.Tensor:
    """Move each image by up to some pixels in a random direction; its border fills what is new."""
    n, _, height, width = x.shape
    padded = torch.nn.functional.pad(x, (pixels,) * 4, mode="replicate")
    down, right = torch.randint(0, 2 * pixels + 1, (2, n, 1))
    rows = (down + torch.arange(height)).unsqueeze(2)
    columns = (right + torch.arange(width)).unsqueeze(1)
    image = torch.arange(n).view(n, 1, 1)
    # The channels end up last where indices stand on both sides of a slice.
    return padded[image, :, rows, columns].permute(0, 3, 1, 2).contiguous()

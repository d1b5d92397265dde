"""The pictures of a training: its loss, and what the network says of some test images."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import torch

from images import Images

ROWS, COLUMNS = 4, 8


def plot_loss(losses: Sequence[float], accuracies: Sequence[float], path: Path) -> None:
    """The loss of every step, and the test accuracy after every epoch."""
    figure, left = plt.subplots(figsize=(8, 4.5), layout="constrained")
    steps = len(losses) // max(1, len(accuracies))
    smooth, mean = [], losses[0]
    for loss in losses:
        mean += 0.2 * (loss - mean)
        smooth.append(mean)
    epochs = [(i + 1) / steps for i in range(len(losses))]
    left.plot(epochs, losses, color="tab:blue", alpha=0.25)
    left.plot(epochs, smooth, color="tab:blue")
    left.set(xlabel="epoch", yscale="log")
    left.set_ylabel("training loss", color="tab:blue")
    right = left.twinx()
    right.plot(range(1, len(accuracies) + 1), accuracies, "o-", color="tab:orange", markersize=4)
    right.set_ylabel("test accuracy (%)", color="tab:orange")
    right.set_title(f"test accuracy {accuracies[-1]:.1f} %")
    figure.savefig(path, dpi=120)


def plot_rounds(
    losses: Sequence[float], validation_losses: Sequence[float], steps: int, path: Path
) -> None:
    """Training and validation loss after rounds of so many steps."""
    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    done = [steps * (i + 1) for i in range(len(losses))]
    axes.plot(done, losses, "o-", color="tab:blue", label="training, mean of the round")
    axes.plot(done, validation_losses, "o-", color="tab:orange", label="validation")
    axes.set(xlabel="step", ylabel="loss", title=f"validation loss {validation_losses[-1]:.2f}")
    axes.legend()
    figure.savefig(path, dpi=120)


def plot_predictions(images: Images, predictions: torch.Tensor, path: Path) -> None:
    """Some test images with what the network says, red where it is wrong; wrong ones first."""
    wrong = predictions != images.test_t
    chosen = torch.argsort(~wrong, stable=True)[: ROWS * COLUMNS].tolist()
    mean, std = (torch.tensor(v).view(-1, 1, 1) for v in (images.mean, images.std))
    names = images.class_names
    figure, axes = plt.subplots(ROWS, COLUMNS, figsize=(11, 6.6), layout="constrained")
    for axis in axes.flat:
        axis.set_axis_off()
    for axis, i in zip(axes.flat, chosen, strict=False):
        picture = (images.test_x[i] * std + mean).clamp(0, 1).permute(1, 2, 0)
        axis.imshow(picture, cmap="gray_r", vmin=0, vmax=1)
        said, true = names[predictions[i]], names[images.test_t[i]]
        axis.set_title(
            f"{said}, is {true}" if wrong[i] else said, color="red" if wrong[i] else "black"
        )
    figure.suptitle(f"{int(wrong.sum())} of {len(wrong)} test images wrong, in red")
    figure.savefig(path, dpi=120)


def show() -> None:
    """Open the pictures in windows, where there is a display."""
    if matplotlib.get_backend().lower() != "agg":
        plt.show()

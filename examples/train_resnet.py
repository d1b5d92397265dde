"""Train a residual network over Dask workers, and save it as plain torch.

python examples/train_resnet.py                      # handwritten digits, on this machine
python examples/train_resnet.py --data photos/       # your images, one subfolder a class
python examples/train_resnet.py --scheduler-address tcp://host:8786   # on your cluster
"""

from __future__ import annotations

import argparse
import copy
import functools
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from distributed import Client
from torch import nn
from torch.optim.lr_scheduler import OneCycleLR
from torch.utils.data import DataLoader, TensorDataset, default_collate

import plots
import resnet
import taskgrad as tg
from images import Images, load_images, shift
from taskgrad.plan.placement import contiguous


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Train a residual network over Dask workers.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--depth", type=int, default=14, choices=resnet.BLOCKS, help="layers of the network")
    add("--width", type=int, help="channels after the stem (64 from depth 50 on, else 16)")
    add("--workers", type=int, default=2, help="worker processes to start on this machine")
    add("--scheduler-address", help="use the workers of this Dask cluster instead")
    add("--device", default="cpu", help="torch device of each worker: cpu or cuda")
    add("--data", metavar="FOLDER", help="a folder of images, one subfolder a class")
    add("--size", type=int, default=64, help="resize the images of --data to this")
    add("--epochs", type=int, default=20, help="times through the training images")
    add("--batch", type=int, default=128, help="images a step")
    add("--microbatches", type=int, default=4, help="parts of a batch that are on the way at once")
    add("--lr", type=float, default=4e-3, help="the highest learning rate: it rises, then falls")
    add("--seed", type=int, default=0, help="of the first weights and the order of the images")
    add("--out", type=Path, default=Path("runs/resnet"), help="folder for what is saved")
    return parser.parse_args()


def connect(args: argparse.Namespace) -> Client:
    """A client of the cluster at --scheduler-address, or of a new one on this machine."""
    if args.scheduler_address is None:
        return tg.local_cluster(n_workers=args.workers)
    client = Client(args.scheduler_address)
    client.upload_file(resnet.__file__)  # its workers may run where this folder is not
    return client


class Losses(tg.Callback):
    """Notes the loss of every step. To read it here would wait for the step."""

    def __init__(self) -> None:
        self.noted: list[Any] = []

    def on_step(self, trainer: tg.Trainer, loss: Any) -> None:
        self.noted.append(loss)


def flattened(module: nn.Module) -> list[nn.Module]:
    """The layers of containers in containers, in order, as a chain counts them."""
    if type(module) is not nn.Sequential:
        return [module]
    return [layer for child in module for layer in flattened(child)]


def balanced(model: nn.Module, x: torch.Tensor, n_workers: int) -> list[int]:
    """The worker of each layer, so that all take about as long for these images.

    A copy of each layer is timed here, on one thread. By itself a chain balances bytes, which says
    little where the first layers have few weights and large images.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    seconds = []
    for layer in flattened(copy.deepcopy(model).train()):
        runs = []
        for _ in range(5):
            given = x.detach().requires_grad_()
            start = time.perf_counter()
            out = layer(given.clone())  # it may write into its input
            out.sum().backward()
            runs.append(time.perf_counter() - start)
        seconds.append(min(runs))
        x = out
    torch.set_num_threads(threads)
    return contiguous(seconds, n_workers)


def accuracy(scores: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """Percent of the images whose own class has the highest score."""
    return 100 * (scores.argmax(dim=1) == t).float().mean()


def loaders(images: Images, batch: int) -> tuple[DataLoader, DataLoader]:
    """Batches to train on, shuffled and each image moved a little, and batches to test on."""

    def moved(samples: list[Any]) -> tuple[torch.Tensor, torch.Tensor]:
        x, t = default_collate(samples)
        return shift(x, pixels=images.size // 8), t

    train = TensorDataset(images.train_x, images.train_t)
    test = TensorDataset(images.test_x, images.test_t)
    batch = min(batch, len(train))
    return (
        DataLoader(train, batch, shuffle=True, drop_last=True, collate_fn=moved),
        DataLoader(test, batch),
    )


def main() -> None:
    args = parse_arguments()
    torch.manual_seed(args.seed)
    images = load_images(args.data, args.size)
    arguments: dict[str, Any] = {
        "depth": args.depth,
        "n_classes": len(images.class_names),
        "in_channels": images.channels,
        "width": args.width or (64 if args.depth >= 50 else 16),
        "small_images": images.size <= 32,
    }
    model = resnet.resnet(**arguments)

    client = connect(args)
    print("dashboard:", client.dashboard_link)
    some = images.train_x[: max(1, args.batch // args.microbatches)]
    placement = balanced(model, some, len(client.nthreads()))
    chain = tg.GraphChain(model, client=client, device=args.device, placement=placement)
    print(chain.placement)
    train, test = loaders(images, args.batch)
    noted = Losses()
    trainer = tg.Trainer(
        chain,
        F.cross_entropy,
        torch.optim.AdamW,
        microbatches=args.microbatches,
        schedule="zb_h2",  # the shortest bubbles
        lr_scheduler=functools.partial(
            OneCycleLR, max_lr=args.lr, total_steps=args.epochs * len(train)
        ),
        seed=args.seed,
        callbacks=[noted],
    )
    start = time.perf_counter()
    history = trainer.fit(train, args.epochs, test, metrics={"accuracy": accuracy})
    seconds = time.perf_counter() - start
    losses = [loss.item() for loss in noted.noted]
    bubble = statistics.median(loss.report["bubble"] for loss in noted.noted)
    accuracies = [epoch["val_accuracy"] for epoch in history]
    scores = torch.cat(list(trainer.predict(images.test_x.split(args.batch))))
    trained = chain.eval().to_module().cpu()  # the network itself again, nothing of Dask in it
    client.close()
    print(f"test accuracy: {accuracies[-1]:.2f} % after {seconds:.0f} s; bubble {bubble:.0%}")

    args.out.mkdir(parents=True, exist_ok=True)
    torch.save(
        {
            "state_dict": trained.state_dict(),
            "arguments": arguments,  # of resnet.resnet
            "class_names": images.class_names,
            "mean": images.mean,
            "std": images.std,
            "size": images.size,
            "data": None if args.data is None else str(Path(args.data).resolve()),
        },
        args.out / "model.pt",
    )
    metrics = {
        "test_accuracy": accuracies[-1],
        "seconds": seconds,
        "steps": len(losses),
        "losses": losses,
        "bubble": bubble,
        "accuracies": accuracies,
    }
    (args.out / "metrics.json").write_text(json.dumps(metrics, indent=1))
    plots.plot_loss(losses, accuracies, args.out / "loss.png")
    plots.plot_predictions(images, scores.argmax(dim=1), args.out / "predictions.png")
    for name in ("loss.png", "predictions.png", "model.pt", "metrics.json"):
        print("saved", args.out / name)
    plots.show()


if __name__ == "__main__":  # each worker is a new process that imports this file
    main()

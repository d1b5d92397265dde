"""Train a residual network over Dask workers, and save it as plain torch.

python examples/train_resnet.py                      # handwritten digits, on this machine
python examples/train_resnet.py --data photos/       # your images, one subfolder a class
python examples/train_resnet.py --scheduler-address tcp://host:8786   # on your cluster
"""

from __future__ import annotations

import argparse
import functools
import json
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from distributed import Client
from tqdm import tqdm

import plots
import resnet
import taskgrad as tg
from images import Images, load_images, shift


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
    add("--lr", type=float, default=2e-3, help="learning rate; a tenth of it in the last quarter")
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


def train_step(
    chain: tg.GraphChain, optimizer: tg.Optimizer, x: torch.Tensor, t: torch.Tensor, parts: int
) -> float:
    """One step of the optimizer; returns the loss.

    The layers of one worker need the outputs of another's. So that all have something to do, the
    batch goes through in parts: while one part is in the later layers, the next is in the first.
    """
    losses = [
        tg.spawn(F.cross_entropy, chain(x_part), t_part)
        for x_part, t_part in zip(x.chunk(parts), t.chunk(parts), strict=True)
    ]
    loss = sum(losses[1:], losses[0]) / len(losses)  # still a thunk: nothing has run
    loss.backward()  # forward and backward, on the workers
    optimizer.step()
    optimizer.zero_grad()
    with torch.no_grad():
        return float(tg.collect(loss))


def predict(chain: tg.GraphChain, x: torch.Tensor, batch: int) -> torch.Tensor:
    """The class that the network gives each image."""
    chain.eval()
    with torch.no_grad():
        scores = tg.collect([chain(part) for part in x.split(batch)])
    chain.train()
    return torch.cat(scores).argmax(dim=1)


def accuracy(predictions: torch.Tensor, t: torch.Tensor) -> float:
    """Percent of the predictions that are right."""
    return 100 * (predictions == t).float().mean().item()


def train(
    chain: tg.GraphChain, images: Images, args: argparse.Namespace
) -> tuple[list[float], list[float]]:
    """Train; returns the loss of each step and the test accuracy after each epoch."""
    losses: list[float] = []
    accuracies: list[float] = []
    batch = min(args.batch, len(images.train_t))
    steps = len(images.train_t) // batch
    optimizer = tg.Optimizer(chain, functools.partial(torch.optim.AdamW, lr=args.lr))
    chain.train()
    with tqdm(total=args.epochs * steps, unit="step") as bar:
        for epoch in range(args.epochs):
            if epoch == args.epochs - args.epochs // 4:
                gentle = functools.partial(torch.optim.AdamW, lr=args.lr / 10)
                optimizer = tg.Optimizer(chain, gentle)
            order = torch.randperm(len(images.train_t))
            for chosen in order[: steps * batch].split(batch):
                x = shift(images.train_x[chosen], pixels=images.size // 8)
                loss = train_step(chain, optimizer, x, images.train_t[chosen], args.microbatches)
                losses.append(loss)
                bar.update()
                bar.set_postfix(epoch=epoch + 1, loss=f"{loss:.3f}")
            accuracies.append(accuracy(predict(chain, images.test_x, batch), images.test_t))
    return losses, accuracies


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
    chain = tg.GraphChain(model, client=client, device=args.device)
    print(chain.placement)
    start = time.perf_counter()
    losses, accuracies = train(chain, images, args)
    seconds = time.perf_counter() - start
    predictions = predict(chain, images.test_x, args.batch)
    trained = chain.eval().to_module().cpu()  # the network itself again, nothing of Dask in it
    client.close()
    print(f"test accuracy: {accuracies[-1]:.2f} % after {seconds:.0f} s")

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
        "accuracies": accuracies,
    }
    (args.out / "metrics.json").write_text(json.dumps(metrics, indent=1))
    plots.plot_loss(losses, accuracies, args.out / "loss.png")
    plots.plot_predictions(images, predictions, args.out / "predictions.png")
    for name in ("loss.png", "predictions.png", "model.pt", "metrics.json"):
        print("saved", args.out / name)
    plots.show()


if __name__ == "__main__":  # each worker is a new process that imports this file
    main()

"""Train a small GPT over Dask workers on Python's own source code, and let it write some.

python examples/train_gpt.py                 # on this machine
python examples/train_gpt.py --blocks 8 --width 256 --steps 5000   # takes longer, writes better
python examples/train_gpt.py --scheduler-address tcp://host:8786   # on your cluster
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from distributed import Client
from torch.optim.lr_scheduler import LambdaLR

import gpt
import plots
import taskgrad as tg
from sources import decode, encode, load_sources

CONTEXT = 64  # tokens that the network looks back
ROUNDS = 10  # times that it is validated
PROMPT = "\n\n\ndef"


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Train a small GPT over Dask workers on Python's own source code.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--tokens", type=int, default=1024, help="different tokens that the text is written in")
    add("--blocks", type=int, default=4, help="blocks of attention")
    add("--width", type=int, default=128, help="numbers for each token; a multiple of 32")
    add("--workers", type=int, default=2, help="worker processes to start on this machine")
    add("--scheduler-address", help="use the workers of this Dask cluster instead")
    add("--device", default="cpu", help="torch device of each worker: cpu or cuda")
    add("--steps", type=int, default=800, help="steps of the optimizer")
    add("--batch", type=int, default=32, help=f"windows of {CONTEXT} tokens a step")
    add("--microbatches", type=int, default=4, help="parts of a batch that are on the way at once")
    add("--lr", type=float, default=3e-3, help="the highest learning rate")
    add("--amp", choices=["bf16", "fp16"], help="compute in this precision where it is enough")
    add(
        "--checkpoint",
        default="never",
        choices=["never", "always", "except_last"],
        help="run forwards again in the backward instead of keeping what they computed",
    )
    add("--temperature", type=float, default=0.7, help="how daring it writes; 1 is as it learned")
    add("--length", type=int, default=200, help="how many tokens it writes at the end")
    add("--seed", type=int, default=0, help="of the first weights, the windows and the writing")
    add("--out", type=Path, default=Path("runs/gpt"), help="folder for what is saved")
    return parser.parse_args()


def connect(args: argparse.Namespace) -> Client:
    """A client of the cluster at --scheduler-address, or of a new one on this machine."""
    if args.scheduler_address is None:
        return tg.local_cluster(n_workers=args.workers)
    client = Client(args.scheduler_address)
    client.upload_file(gpt.__file__)  # its workers may run where this folder is not
    return client


class Windows:
    """Batches of random windows of a text; the target of each token is the one after it."""

    def __init__(self, tokens: torch.Tensor, batch: int, batches: int) -> None:
        self.tokens = tokens
        self.batch = batch
        self.batches = batches

    def __len__(self) -> int:
        return self.batches

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for _ in range(self.batches):
            start = torch.randint(len(self.tokens) - CONTEXT, (self.batch, 1))
            window = self.tokens[start + torch.arange(CONTEXT + 1)]
            yield window[:, :-1], window[:, 1:]


def token_loss(scores: torch.Tensor, following: torch.Tensor) -> torch.Tensor:
    """Cross entropy, the mean over all tokens."""
    return F.cross_entropy(scores.flatten(0, 1), following.flatten())


def warm_up_then_cosine(step: int, warmup: int, steps: int) -> float:
    """The learning rate of a step, as a share of the highest: up in a line, down in a curve."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.55 + 0.45 * math.cos(math.pi * (step - warmup) / (steps - warmup))


def add_token(
    text: torch.Tensor, scores: torch.Tensor, temperature: float, seed: int
) -> torch.Tensor:
    """The text and one more token, drawn at random by its score."""
    chances = (scores[:, -1].float().cpu() / temperature).softmax(dim=1)
    drawn = torch.multinomial(chances, 1, generator=torch.Generator().manual_seed(seed))
    return torch.cat([text.cpu(), drawn], dim=1)


def write(
    chain: tg.GraphChain, start: torch.Tensor, length: int, temperature: float, seed: int
) -> torch.Tensor:
    """Go on with a text, token by token.

    The text is a thunk, and so is each longer one: all of it is one graph, which the workers run by
    themselves. Only what is written comes here.
    """
    text = start.unsqueeze(0)
    chain.eval()
    with torch.no_grad():  # so no tape is kept
        for i in range(length):
            text = tg.spawn(add_token, text, chain(text), temperature, seed + i)
        return tg.collect(text)[0]


class Author(tg.Callback):
    """Shows after every round what the network writes by then."""

    def __init__(self, args: argparse.Namespace, vocabulary: list[str]) -> None:
        self.vocabulary = vocabulary
        self.start = encode(PROMPT, vocabulary)
        self.options = {"temperature": args.temperature, "seed": args.seed}

    def write(self, chain: tg.GraphChain, length: int) -> str:
        return decode(write(chain, self.start, length, **self.options), self.vocabulary)

    def on_epoch(self, trainer: tg.Trainer, epoch: int, results: dict[str, float]) -> None:
        text = self.write(trainer.chain, 20).strip()
        print(f"validation loss {results['val_loss']:.3f}, writes {text!r}", flush=True)


def main() -> None:
    args = parse_arguments()
    torch.manual_seed(args.seed)
    sources = load_sources(args.tokens)
    arguments: dict[str, Any] = {
        "n_tokens": len(sources.vocabulary),
        "context": CONTEXT,
        "width": args.width,
        "blocks": args.blocks,
        "heads": args.width // 32,
    }
    rounds = min(ROUNDS, args.steps)
    train = Windows(sources.train, args.batch, args.steps // rounds)
    validation = list(Windows(sources.validation, args.batch, 8))  # the same every time
    steps = rounds * len(train)

    client = connect(args)
    print("dashboard:", client.dashboard_link)
    chain = tg.GraphChain(gpt.gpt(**arguments), client=client, device=args.device)
    print(chain.placement)
    author = Author(args, sources.vocabulary)
    trainer = tg.Trainer(
        chain,
        token_loss,
        functools.partial(torch.optim.AdamW, lr=args.lr, betas=(0.9, 0.95), weight_decay=0.1),
        param_groups={"*norm*": {"weight_decay": 0.0}, "*.bias": {"weight_decay": 0.0}},
        lr_scheduler=functools.partial(
            LambdaLR,
            lr_lambda=functools.partial(warm_up_then_cosine, warmup=1 + steps // 20, steps=steps),
        ),
        clip_norm=1.0,
        microbatches=args.microbatches,
        amp=args.amp,
        checkpoint=args.checkpoint,
        seed=args.seed,
        callbacks=[author],
    )
    start = time.perf_counter()
    history = trainer.fit(train, rounds, validation)
    seconds = time.perf_counter() - start
    text = author.write(chain, args.length)
    trained = chain.to_module().cpu()  # the network itself again, nothing of Dask in it
    client.close()
    print(text)
    print(f"validation loss: {history[-1]['val_loss']:.3f} after {seconds:.0f} s")

    args.out.mkdir(parents=True, exist_ok=True)
    torch.save(
        {
            "state_dict": trained.state_dict(),
            "arguments": arguments,  # of gpt.gpt
            "vocabulary": sources.vocabulary,
        },
        args.out / "model.pt",
    )
    losses = [results["loss"] for results in history]
    validation_losses = [results["val_loss"] for results in history]
    metrics = {
        "loss": losses[-1],
        "validation_loss": validation_losses[-1],
        "seconds": seconds,
        "steps": steps,
        "losses": losses,
        "validation_losses": validation_losses,
        "text": text,
    }
    (args.out / "metrics.json").write_text(json.dumps(metrics, indent=1))
    plots.plot_rounds(losses, validation_losses, len(train), args.out / "loss.png")
    for name in ("loss.png", "model.pt", "metrics.json"):
        print("saved", args.out / name)
    plots.show()


if __name__ == "__main__":  # each worker is a new process that imports this file
    main()

"""Train a model of Hugging Face's transformers over Dask workers, and let it write Python.

python examples/train_huggingface.py                 # shaped as Llama, on this machine
python examples/train_huggingface.py --model gpt2 --blocks 8 --steps 2000
python examples/train_huggingface.py --steps 20 --check   # has it the bits of plain torch?

The model is transformers' own class, with random weights. Nothing of it is written for workers.
"""

from __future__ import annotations

import argparse
import ast
import functools
import itertools
import json
import math
import statistics
import textwrap
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from distributed import Client
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from tokenizers.trainers import BpeTrainer
from torch.optim.lr_scheduler import LambdaLR
from transformers import BatchEncoding, PreTrainedModel, PreTrainedTokenizerFast

import plots
import taskgrad as tg
from sources import load_texts

CONTEXT = 64  # tokens of a row at most
ROUNDS = 5  # times that it is validated
PROMPT = "def "
CLIP = 1.0  # the norm of all gradients at most
END, PADDING = 0, 1  # tokens


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Train a model of transformers over Dask workers on Python's own functions.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--model", choices=["llama", "gpt2"], default="llama", help="whose shape the model has")
    add("--tokens", type=int, default=1024, help="different tokens that the text is written in")
    add("--blocks", type=int, default=4, help="blocks of attention")
    add("--width", type=int, default=128, help="numbers for each token; a multiple of 32")
    add("--workers", type=int, default=2, help="worker processes to start on this machine")
    add("--scheduler-address", help="use the workers of this Dask cluster instead")
    add("--device", default="cpu", help="torch device of each worker: cpu or cuda")
    add("--steps", type=int, default=400, help="steps of the optimizer")
    add("--batch", type=int, default=16, help=f"functions, of up to {CONTEXT} tokens, a step")
    add("--microbatches", type=int, default=4, help="parts of a batch that are on the way at once")
    add("--lr", type=float, default=3e-3, help="the highest learning rate")
    add("--temperature", type=float, default=0.7, help="how daring it writes; 1 is as it learned")
    add("--length", type=int, default=100, help="how many tokens it writes at the end")
    add("--seed", type=int, default=0, help="of the first weights, the batches and the writing")
    add(
        "--check",
        action="store_true",
        help="train in plain torch, too: all weights have to be equal, bit for bit",
    )
    add("--out", type=Path, default=Path("runs/huggingface"), help="folder for what is saved")
    return parser.parse_args()


def functions(texts: list[str]) -> list[str]:
    """The source code of every function and method in these modules."""
    found = []
    for text in texts:
        lines = text.splitlines()
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                found.append(textwrap.dedent("\n".join(lines[node.lineno - 1 : node.end_lineno])))
    return found


def train_tokenizer(texts: list[str], n_tokens: int) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer: bytes, and the most frequent pairs of what is a token already."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<end>", "<padding>"]
    bpe.train_from_iterator(
        texts,
        BpeTrainer(
            vocab_size=n_tokens,
            special_tokens=special,
            initial_alphabet=alphabet,
            show_progress=False,
        ),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token=special[END], pad_token=special[PADDING]
    )


def make_model(args: argparse.Namespace) -> PreTrainedModel:
    """A model of transformers with random weights; its head is tied to its embeddings."""
    tokens = {
        "vocab_size": args.tokens,
        "bos_token_id": END,
        "eos_token_id": END,
        "pad_token_id": PADDING,
    }
    if args.model == "gpt2":
        config = transformers.GPT2Config(
            **tokens,
            n_positions=2 * CONTEXT,
            n_embd=args.width,
            n_layer=args.blocks,
            n_head=args.width // 32,
            embd_pdrop=0.0,
            resid_pdrop=0.0,
            attn_pdrop=0.0,
        )
    else:
        config = transformers.LlamaConfig(
            **tokens,
            max_position_embeddings=2 * CONTEXT,
            hidden_size=args.width,
            intermediate_size=3 * args.width,
            num_hidden_layers=args.blocks,
            num_attention_heads=args.width // 32,
            tie_word_embeddings=True,
        )
    return transformers.AutoModelForCausalLM.from_config(config)


class Batches:
    """Batches of random functions, as a tokenizer pads them: about as wide as the longest row."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast,
        texts: list[str],
        batch: int,
        batches: int,
        seed: int,
    ) -> None:
        self.tokenizer = tokenizer
        ends = [text + tokenizer.eos_token for text in texts]
        self.rows = tokenizer(ends, truncation=True, max_length=CONTEXT)["input_ids"]
        self.batch = batch
        self.batches = batches
        self.random = torch.Generator().manual_seed(seed)

    def __len__(self) -> int:
        return self.batches

    def __iter__(self) -> Iterator[BatchEncoding]:
        for _ in range(self.batches):
            chosen = torch.randint(len(self.rows), (self.batch,), generator=self.random)
            rows = {"input_ids": [self.rows[i] for i in chosen]}
            # Adds the attention mask. Of widths there are few: each new one takes a capture.
            batch = self.tokenizer.pad(rows, pad_to_multiple_of=32, return_tensors="pt")
            padding = batch["attention_mask"] == 0
            batch["labels"] = batch["input_ids"].masked_fill(padding, -100)
            yield batch


def warm_up_then_cosine(step: int, warmup: int, steps: int) -> float:
    """The learning rate of a step, as a share of the highest: up in a line, down in a curve."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.55 + 0.45 * math.cos(math.pi * (step - warmup) / (steps - warmup))


class Progress(tg.Callback):
    """Notes the loss of every step and when it was there; tells of every round."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.times = [time.perf_counter()]

    def on_step(self, trainer: tg.Trainer, loss: Any) -> None:
        self.losses.append(loss.item())
        self.times.append(time.perf_counter())

    def on_epoch(self, trainer: tg.Trainer, epoch: int, results: dict[str, float]) -> None:
        print(f"loss {results['loss']:.3f}, validation loss {results['val_loss']:.3f}", flush=True)


def rate(times: list[float], batch: int) -> float:
    """Samples a second of a step in the middle, from when each of them was done."""
    return batch / statistics.median(b - a for a, b in itertools.pairwise(times))


class Plain:
    """The same training in plain torch: the microbatches of a batch one after the other."""

    def __init__(self, model: PreTrainedModel, optimizer: Any, scheduler: Any) -> None:
        self.model = model
        self.optimizer = optimizer(model.parameters())
        self.scheduler = scheduler(self.optimizer)
        self.losses: list[float] = []
        self.times = [time.perf_counter()]

    def fit(self, batches: Iterable[BatchEncoding], microbatches: int) -> None:
        self.model.train()
        for batch in batches:
            cut = (tensor.tensor_split(microbatches) for tensor in batch.values())
            parts = [dict(zip(batch, part, strict=True)) for part in zip(*cut, strict=True)]
            counts = [predicted(part) for part in parts]
            total = 0.0
            for part, count in zip(parts, counts, strict=True):
                loss = self.model(**part).loss
                share = count / sum(counts)
                loss.backward(torch.full_like(loss, share))
                total += loss.item() * share
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), CLIP)
            self.optimizer.step()
            self.scheduler.step()
            self.optimizer.zero_grad()
            self.losses.append(total)
            self.times.append(time.perf_counter())

    @torch.no_grad()
    def evaluate(self, batches: list[BatchEncoding]) -> float:
        self.model.eval()
        losses = [predicted(batch) * self.model(**batch).loss.item() for batch in batches]
        return sum(losses) / sum(map(predicted, batches))


def predicted(batch: Any) -> int:
    """What a loss is a mean over: tokens but padding and the first of each row."""
    return int((batch["labels"][:, 1:] != -100).sum())


def write(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, args: argparse.Namespace
) -> str:
    """Have transformers go on with the prompt."""
    torch.manual_seed(args.seed)
    written = model.eval().generate(
        **tokenizer(PROMPT, return_tensors="pt"),
        do_sample=True,
        temperature=args.temperature,
        max_new_tokens=min(args.length, CONTEXT),
    )
    return tokenizer.decode(written[0], skip_special_tokens=True)


def connect(args: argparse.Namespace) -> Client:
    """A client of the cluster at --scheduler-address, or of a new one on this machine."""
    if args.scheduler_address is None:
        return tg.local_cluster(n_workers=args.workers)
    return Client(args.scheduler_address)


def main() -> None:
    args = parse_arguments()
    torch.manual_seed(args.seed)
    torch.set_num_threads(1)  # as the workers have: the same operations give the same bits
    texts, held_out = (functions(modules) for modules in load_texts())
    tokenizer = train_tokenizer(texts, args.tokens)
    rounds = min(ROUNDS, args.steps)
    train = Batches(tokenizer, texts, args.batch, args.steps // rounds, args.seed)
    validation = list(Batches(tokenizer, held_out, args.batch, 4, args.seed))  # the same each time
    steps = rounds * len(train)
    model = make_model(args)
    optimizer = functools.partial(
        torch.optim.AdamW, lr=args.lr, betas=(0.9, 0.95), weight_decay=0.1
    )
    scheduler = functools.partial(
        LambdaLR,
        lr_lambda=functools.partial(warm_up_then_cosine, warmup=1 + steps // 20, steps=steps),
    )

    client = connect(args)
    print("dashboard:", client.dashboard_link)
    chain = tg.GraphChain(model, client=client, device=args.device, example_inputs=validation[0])
    print(chain.placement)
    progress = Progress()
    trainer = tg.Trainer(
        chain,
        None,  # the model computes its loss, from the labels of the batch
        optimizer,
        loss_weight="labels",  # a mean over tokens, however they lie in microbatches
        lr_scheduler=scheduler,
        clip_norm=CLIP,
        microbatches=args.microbatches,
        callbacks=[progress],
    )
    start = time.perf_counter()
    history = trainer.fit(train, rounds, validation)
    seconds = time.perf_counter() - start
    trained = chain.to_module().cpu()  # transformers' own class again, nothing of Dask in it
    trained.save_pretrained(args.out / "model")
    tokenizer.save_pretrained(args.out / "model")
    client.close()
    text = write(trained, tokenizer, args)
    print(text)
    losses = [results["loss"] for results in history]
    validation_losses = [results["val_loss"] for results in history]
    metrics = {
        "loss": losses[-1],
        "validation_loss": validation_losses[-1],
        "seconds": seconds,
        "samples_per_second": rate(progress.times, args.batch),
        "steps": steps,
        "step_losses": progress.losses,
        "losses": losses,
        "validation_losses": validation_losses,
        "text": text,
    }
    print(
        f"validation loss: {validation_losses[-1]:.3f} after {seconds:.0f} s, "
        f"{metrics['samples_per_second']:.0f} samples/s over workers of one thread"
    )

    if args.check:
        train.random.manual_seed(args.seed)  # the same batches
        plain = Plain(model, optimizer, scheduler)
        for _ in range(rounds):
            plain.fit(train, args.microbatches)
        theirs = plain.model.state_dict()
        unequal = [n for n, v in trained.state_dict().items() if not torch.equal(v, theirs[n])]
        assert not unequal, f"other bits than plain torch's: {unequal}"
        plain_metrics = {
            "validation_loss": plain.evaluate(validation),
            "samples_per_second": rate(plain.times, args.batch),
            "step_losses": plain.losses,
        }
        metrics["plain_torch"] = plain_metrics
        print(
            f"plain torch in one process: validation loss {plain_metrics['validation_loss']:.3f}, "
            f"{plain_metrics['samples_per_second']:.0f} samples/s with one thread\n"
            f"all {len(theirs)} weights are equal, bit for bit"
        )

    (args.out / "metrics.json").write_text(json.dumps(metrics, indent=1))
    plots.plot_rounds(losses, validation_losses, len(train), args.out / "loss.png")
    for name in ("loss.png", "model", "metrics.json"):
        print("saved", args.out / name)
    plots.show()


if __name__ == "__main__":  # each worker is a new process that imports this file
    main()

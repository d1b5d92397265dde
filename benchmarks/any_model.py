"""What a model costs that is followed: GPT-2 of transformers against its blocks as a Sequential.

Both train over two worker processes of one thread with the same placement, in turns within one run:
`gpt2_step_vs_sequential` is a step of 12 blocks of width 256 on 16 rows of 128 tokens in four
microbatches. `capture_24_blocks` is following the forward of 24 blocks for the first time,
`call_again_24_blocks` making the calls of one whose structure was seen before; its rival is the
same blocks as a Sequential, called with as many arguments.
"""

from __future__ import annotations

import copy
import functools
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

import taskgrad as tg
from benchmarks._report import Report, arguments

ROUNDS, STEPS, CALLS = 12, 5, 200
ROWS, LENGTH, VOCABULARY = 16, 128, 512


class Embed(nn.Module):
    """What GPT-2 does before its blocks."""

    def __init__(self, model: GPT2LMHeadModel) -> None:
        super().__init__()
        inner = model.transformer
        self.wte, self.wpe, self.drop = inner.wte, inner.wpe, inner.drop

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        positions = torch.arange(tokens.shape[1], device=tokens.device)[None]
        return self.drop(self.wte(tokens) + self.wpe(positions))


def gpt2(blocks: int) -> GPT2LMHeadModel:
    torch.manual_seed(0)
    config = GPT2Config(
        n_layer=blocks, n_embd=256, n_head=4, vocab_size=VOCABULARY, n_positions=LENGTH,
        bos_token_id=0, eos_token_id=0, use_cache=False,
    )  # fmt: skip
    return GPT2LMHeadModel(config)


def as_sequential(model: GPT2LMHeadModel) -> nn.Sequential:
    model = copy.deepcopy(model)
    inner = model.transformer
    return nn.Sequential(Embed(model), *inner.h, inner.ln_f, model.lm_head)


def token_loss(scores: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """As GPT-2 computes it itself: each token is predicted from those before it."""
    labels = F.pad(labels, (0, 1), value=-100)[:, 1:]
    return F.cross_entropy(scores.flatten(0, 1).float(), labels.flatten(), ignore_index=-100)


def seconds(run: Callable[[], Any], times: int) -> float:
    start = time.perf_counter()
    for _ in range(times):
        run()
    return (time.perf_counter() - start) / times


def steps(report: Report, tokens: torch.Tensor) -> None:
    model, sgd = gpt2(12), functools.partial(torch.optim.SGD, lr=0.01)
    batch = {"input_ids": tokens, "labels": tokens}
    chain = tg.GraphChain(model, example_inputs=batch)
    worker_of = {row.layer: row.worker for row in chain.placement}
    blocks = [worker_of[f"transformer.h.{i}"] for i in range(12)]
    placement = [blocks[0], *blocks, blocks[-1], blocks[-1]]
    plain = tg.GraphChain(as_sequential(model), placement=placement)
    followed = tg.Trainer(chain, None, sgd, microbatches=4)
    listed = tg.Trainer(plain, token_loss, sgd, microbatches=4)

    def turn(trainer: tg.Trainer, *given: Any) -> float:
        start = time.perf_counter()
        for _ in range(STEPS):
            trainer.step(*given)
        trainer.wait()
        return (time.perf_counter() - start) / STEPS

    ours, theirs = [], []
    for i in range(ROUNDS + 1):
        pair = turn(followed, batch), turn(listed, tokens, tokens)
        if i:  # the first one compiles
            ours.append(pair[0])
            theirs.append(pair[1])
    report.figure("gpt2_step", ours)
    report.figure("sequential_step", theirs)
    report.ratio("gpt2_step_vs_sequential", ours, theirs)


def calls(report: Report, tokens: torch.Tensor) -> None:
    model, captures, again, listed = gpt2(24), [], [], []
    mask = torch.ones_like(tokens)
    mask[0, LENGTH // 2 :] = 0
    batch = {"input_ids": tokens, "attention_mask": mask}
    for _ in range(5):
        chain = tg.GraphChain(model)
        captures.append(seconds(lambda chain=chain: chain(**batch), 1))
    plain = tg.GraphChain(as_sequential(model))
    for _ in range(ROUNDS):
        again.append(seconds(lambda: chain(**batch), CALLS))
        listed.append(seconds(lambda: plain(tokens), CALLS))
    report.figure("capture_24_blocks", captures)
    report.figure("call_again_24_blocks", again)
    report.figure("sequential_call_24_blocks", listed)


def main() -> None:
    """Measure, print, write."""
    options, report = arguments("any_model", __doc__), Report("any_model")
    client = tg.local_cluster(n_workers=2, dashboard_address=":0")
    tokens = torch.randint(1, VOCABULARY, (ROWS, LENGTH))
    try:
        calls(report, tokens)
        steps(report, tokens)
    finally:
        report.finish(options.json)
        client.close()


if __name__ == "__main__":
    main()

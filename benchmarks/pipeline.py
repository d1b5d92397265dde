"""A training step over several workers: taskgrad's Trainer against torch.distributed.pipelining.

Both cut the same model at the same layers, over as many processes of one thread, and take each
batch in as many microbatches: two processes and four microbatches, but for `empty_8_workers`, and
ResNet-50 also in two and three. (torch needs microbatches of one size, and so takes no three.)
torch's processes communicate over gloo. On each side the schedule and number of microbatches with
the shortest step count, of 1F1B and GPipe there. torch is measured as a user runs it, and once more
with our workers' settings of the allocator. Plain torch does the same batch at once, in one process
with one thread and with two, the latter likewise once more. `two_batches_at_once` are two processes
of one thread, each with a batch of its own: half of their time is what the machine needs for a
batch where nothing ever waits. A step is forward, loss, backward and SGD with momentum. All take
turns within one run, and a turn has five steps or more, with no barrier between them.

`resnet50` has batches of 16 images, `resnet50_batch_32` of 32. `main_job` is the network of `make
train` with its batches of 128 digits. The `mlp_` rows have eight linear layers, with sizes for
steps of about so long. `empty_8_workers` has sixteen tiny linear layers, eight microbatches and
eight processes: nothing to compute, so what a step costs besides.

Where we lose: on short steps (`mlp_10ms`, `main_job`) what a step costs besides its arithmetic, for
the driver and in Python on the workers, is a larger part than torch's. Against torch's own two
threads on the same two cores two workers lose as long as they have a batch in parts that are too
small for torch to be as fast as with all of it. On one thread torch takes oneDNN for 1x1
convolutions from 16 samples on, and a slower way for fewer. How much slower depends on the machine:
a sample of ResNet-50 takes 16 % longer in a microbatch of 4 than in a batch of 16 on one, 34 % on
another. There `resnet50_vs_two_threads` was 1.35, and two processes that never wait for each other
would have needed 1.2; with batches of 32 in two microbatches it was 0.73 (1.19 with our allocator
settings on both sides). So: microbatches of 16 samples or more.
"""

from __future__ import annotations

from benchmarks._cases import MLPS, make
from benchmarks._report import Report, arguments
from benchmarks._sides import ROUNDS, Side, free_port, measure, opened, ours, plain, ranks

# With plain torch, and without.
WITH_PLAIN = ("resnet50", "resnet50_batch_32", "transformer", "main_job")
ROWS = (*WITH_PLAIN, *MLPS, "empty_8_workers")


def main() -> None:
    """Measure, print, write."""
    options = arguments("pipeline", __doc__, rows=ROWS, rounds=ROUNDS)
    report = Report("pipeline")
    try:
        for row in options.rows:
            sides = {"ours": Side(ours(row))}
            for side, keep in {"torch": False, "torch_our_allocator": True}.items():
                sides[side] = Side(ranks(row, "127.0.0.1", free_port(), keep_memory=keep))
            if row in WITH_PLAIN:
                sides["one_thread"] = Side(plain(row, 1))
                for side, keep in {"two_threads": False, "two_threads_our_allocator": True}.items():
                    sides[side] = Side(plain(row, 2, keep_memory=keep), threads=2)
                sides["two_batches_at_once"] = Side(plain(row, 1) * 2)
            with opened(sides):
                measure(report, row, make(row), sides, options.rounds)
    finally:
        report.finish(options.json)


if __name__ == "__main__":
    main()

"""On a GPU: the tests of `pytest -m cuda`, then training steps against plain torch.

`bash benchmarks/gpu.sh` runs this on a machine that has torch with CUDA and perhaps nothing else.
ResNet-50 (batches of 64 images of 224x224) and a transformer of GPT-2 small's shape (batches of 8
texts of 1024 tokens) are trained in bfloat16 autocast: by plain torch on the GPU, all at once; by
taskgrad with one worker on it, all at once, and with two workers, in four microbatches; and by
torch.distributed.pipelining where there are two GPUs (NCCL refuses two ranks on one, and gloo sends
no tensors of a GPU). The sides take turns. A step of one worker may take at most 1.05 times plain
torch's. The bytes between host and device are computed from the shapes; peak memory is that of
torch's allocator, of all workers together.

Nothing is begun for which the time is short, and what has not ended in time is stopped.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks._report import Report, describe, machine, scale, versions
from benchmarks._sides import Side, free_port

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "runs"
BAR = 1.05
BUDGET_S = 450.0
SMALL_BUDGET_S = 95.0
# What the tests may take of it, and what has to be left for a row to be begun.
TESTS_SHARE = 0.4
ROW_SHARE = 0.15


def main() -> int:
    """Test, measure, print, write; returns the exit status."""
    parser = argparse.ArgumentParser(prog="bash benchmarks/gpu.sh", description=__doc__)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--small", action="store_true", help="small models, the quick tests")
    parser.add_argument("--budget", type=float, metavar="SECONDS", help="for all of it")
    parser.add_argument("--json", type=Path, default=RESULTS / "gpu.json", metavar="PATH")
    parser.add_argument("--page", type=Path, default=RESULTS / "gpu.md", metavar="PATH")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("torch sees no GPU here; --device cpu --small tries the script without one")
    end = time.monotonic() + (options.budget or (SMALL_BUDGET_S if options.small else BUDGET_S))
    report = Report("gpu")
    notes: list[str] = []
    tests = run_tests(options.device, options.small, (end - time.monotonic()) * TESTS_SHARE)
    print(f"tests     {tests}", flush=True)
    least = (end - time.monotonic()) * ROW_SHARE
    try:
        for case in ("resnet_small", "gpt_small") if options.small else ("resnet50", "gpt2"):
            if end - time.monotonic() < least:
                notes.append(f"{case}: not begun, as the time was short")
                continue
            try:
                measure(report, case, options.device, end, 2 if options.small else 10, notes)
            except RuntimeError as error:
                notes.append(f"{case}: {error}")
    finally:
        results = report.finish() | {"device": device_name(options.device), "tests": tests}
        results |= {"notes": notes, "bar": bars(report)}
        for path in (options.json, options.page):
            path.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(results, indent=2) + "\n")
        options.page.write_text(page(results))
    for note in [*notes, *results["bar"]]:
        print(note)
    print(f"wrote {options.json} and {options.page}")
    return int(not tests.startswith("passed") or bool(notes))


def run_tests(device: str, small: bool, seconds: float) -> str:
    """How the tests ended, in words: "passed: ..." if all did."""
    command = [sys.executable, "-m", "pytest", "-q", "-m", "cuda and not long" if small else "cuda"]
    command += ["-p", "no:cacheprovider", "tests/test_cuda_values.py"]
    command += [] if small else ["tests/test_cuda_training.py"]
    variables = {**os.environ, "TASKGRAD_TEST_DEVICE": device}
    with subprocess.Popen(
        command, cwd=ROOT, env=variables, stdout=subprocess.PIPE, text=True
    ) as process:
        stop = threading.Timer(seconds, process.terminate)
        stop.start()
        assert process.stdout is not None
        lines = []
        for line in process.stdout:
            lines.append(line.rstrip())
            print(line, end="", flush=True)
        status = process.wait()
        late = not stop.is_alive()
        stop.cancel()
    if late:
        return f"stopped after {seconds:.0f} s"
    last = lines[-1].strip("= ") if lines else f"no output, exit status {status}"
    return f"{'passed' if status == 0 else 'failed'}: {last}"


def measure(
    report: Report, case: str, device: str, end: float, most: int, notes: list[str]
) -> None:
    """Let the sides of one model take turns, once at least and until their share of time is over.

    RuntimeError if a side ended, or was stopped at the end of all time.
    """
    now = time.monotonic()
    enough = now + (end - now) * (0.8 if case.startswith("gpt") else 0.4)
    commands = {
        "plain": [["plain", case, device]],
        "one_worker": [["ours", case, device, "1"]],
        "two_workers": [["ours", case, device, "2"]],
    }
    if device == "cpu" or torch.cuda.device_count() > 1:
        address = f"tcp://127.0.0.1:{free_port()}"
        commands["pipelining"] = [["rank", case, device, str(i), address] for i in range(2)]
    else:
        notes.append(f"{case}: no torch.distributed.pipelining, which needs two GPUs")
    found: dict[str, list[float]] = {name: [] for name in commands}
    with contextlib.ExitStack() as stack:
        threads = max(1, (os.cpu_count() or 1) // 4)
        sides = {}
        for name, one in commands.items():
            sides[name] = Side(one, threads=threads, module="benchmarks._gpu_sides")
            stack.callback(sides[name].close)
        stack.enter_context(_stopped_at(end, sides))
        for side in sides.values():
            side.ready()
        seconds = {name: side.step("", 3) for name, side in sides.items()}  # the first are slow
        steps = {name: max(2, min(20, int(1 / s))) for name, s in seconds.items()}
        rounds, took = 0, 0.0
        while not rounds or (rounds < most and time.monotonic() + took < enough):
            began = time.monotonic()
            for name in reversed(sides) if rounds % 2 else sides:
                found[name].append(sides[name].step("", steps[name]))
            rounds, took = rounds + 1, time.monotonic() - began
        for name, side in sides.items():
            report.figure(f"{case}_{name}", found[name])
            report.value(f"{case}_{name}_peak", side.step("peak", 0) / 2**20, "MiB")
            if name != "pipelining":
                traffic = side.step("traffic", 0) / 2**20
                report.value(f"{case}_{name}_host_device", traffic, "MiB a step")
    for name in ("one_worker", "two_workers"):
        report.ratio(f"{case}_{name}_vs_plain", found[name], found["plain"])
    if "pipelining" in found:
        report.ratio(f"{case}_vs_pipelining", found["two_workers"], found["pipelining"])
    report.show()


@contextlib.contextmanager
def _stopped_at(end: float, sides: dict[str, Side]) -> Any:
    """Kill the processes of these sides if the block has not ended by then."""

    def stop() -> None:
        for side in sides.values():
            for process in side.processes:
                process.kill()

    timer = threading.Timer(max(0.0, end - time.monotonic()), stop)
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def bars(report: Report) -> list[str]:
    """For each model whether one worker kept the bar."""
    found = []
    for name, ratio in report.ratios.items():
        if name.endswith("one_worker_vs_plain"):
            kept = "keeps" if ratio["median"] <= BAR else "misses"
            found.append(f"{name}: {ratio['median']:.3f} {kept} the bar of {BAR}")
    return found


def device_name(device: str) -> str:
    """The GPU, its memory and the version of CUDA; or the CPU."""
    if device == "cpu":
        return "cpu"
    about = torch.cuda.get_device_properties(0)
    count = torch.cuda.device_count()
    memory = f"{about.total_memory / 2**30:.0f} GiB"
    return f"{count} x {about.name}, {memory}, CUDA {torch.version.cuda}"


def page(results: dict[str, Any]) -> str:
    """The results as a section of docs/gpu.md."""
    packages = ", ".join(f"{k} {v}" for k, v in versions().items())
    lines = [
        "## Figures",
        "",
        f"Measured on: {results['device']}; {describe(machine())}; {packages}.",
        "",
        f"Tests: {results['tests']}.",
        "",
        *(f"- {line}" for line in [*results["bar"], *results["notes"]]),
        "",
        "| ratio or figure | median | lowest | highest | measured |",
        "| --- | --- | --- | --- | --- |",
    ]
    for key, row in {**results["ratios"], **results["figures"]}.items():
        factor, unit = scale(row) if "unit" in row else (1.0, "")
        cells = [f"{row[k] * factor:.4g} {unit}".strip() for k in ("median", "min", "max")]
        lines.append(f"| {key} | {' | '.join(cells)} | {row['n']} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())

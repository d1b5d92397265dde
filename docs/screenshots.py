"""Take the pictures of docs/dashboard.md: the Dask dashboard while a small chain trains.

    python docs/screenshots.py                 # all of them
    python docs/screenshots.py task-stream     # one

Needs the ``docs`` and ``dashboard`` extras and a Chromium: the system's, or the one that
``playwright install chromium`` fetches. Training goes on in a second thread, over two workers on
this machine, for as long as pictures are taken.
"""

from __future__ import annotations

import argparse
import gc
import shutil
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from playwright.sync_api import Page, sync_playwright
from torch import nn

import taskgrad as tg

IMAGES = Path(__file__).parent / "images"
MICROBATCHES = 4
PLACEMENT = [0, 1, 0, 1]
CHROMIUM_ARGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


class Block(nn.Module):
    """Two convolutions and a skip: a layer of some milliseconds."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, channels, 3, padding=1)
        self.second = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x + self.second(self.first(x).relu())).relu()


class Head(nn.Module):
    """Scores of ten classes."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.scores = nn.Linear(channels * 64, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.scores(nn.functional.adaptive_avg_pool2d(x, 8).flatten(1))


def network() -> nn.Module:
    """A small image network of four layers; the dashboard shows their names."""
    return nn.Sequential(
        OrderedDict(
            first=nn.Conv2d(3, 16, 3, padding=1),
            body=Block(16),
            narrow=Block(16),
            head=Head(16),
        )
    )


def mean_loss(losses: list[torch.Tensor]) -> torch.Tensor:
    """The mean over the microbatches."""
    return torch.stack(losses).mean()


class Training(threading.Thread):
    """Train until `stop` is set."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.stop = threading.Event()
        self.go = threading.Event()
        self.go.set()
        self.idle = threading.Event()
        self.batch = 16
        self.steps: list[float] = []
        """How long each step took, in seconds."""

    def run(self) -> None:
        """Each step is one graph of several microbatches, then an update on every worker."""
        torch.manual_seed(0)
        chain = tg.GraphChain(network(), placement=PLACEMENT)
        optimizer = tg.Optimizer(chain, partial(torch.optim.SGD, lr=0.05))

        def step() -> None:
            losses = []
            for _ in range(MICROBATCHES):
                images = torch.randn(self.batch, 3, 32, 32)
                labels = torch.randint(10, (self.batch,))
                losses.append(tg.spawn(nn.functional.cross_entropy, chain(images), labels))
            tg.spawn(mean_loss, losses).backward()
            optimizer.step()
            optimizer.zero_grad()

        while not self.stop.is_set():
            self.idle.set()
            self.go.wait()
            self.idle.clear()
            start = time.perf_counter()
            step()
            self.steps.append(time.perf_counter() - start)

    def pause(self) -> None:
        """Let the running step end, and the workers free its values."""
        self.go.clear()
        self.idle.wait()
        time.sleep(1)

    def one_step(self) -> None:
        """Start one step and no other."""
        self.idle.clear()
        self.go.set()
        time.sleep(0.05)
        self.go.clear()

    def wait_for(self, steps: int) -> None:
        """Until this many more steps are done."""
        wanted = len(self.steps) + steps
        while self.is_alive() and len(self.steps) < wanted:
            time.sleep(0.05)
        if not self.is_alive():
            raise RuntimeError("training stopped early; its error is above")


# In Bokeh a range that was "updated interactively" no longer follows the data.
_SHOW_LAST = """ms => {
    const all = [...Bokeh.documents[0]._all_models.values()]
    const figure = all.find(model => model.type === "Figure")
    const tasks = all.find(model => model.data && model.data.duration).data
    let end = 0
    for (let i = 0; i < tasks.start.length; i++)
        end = Math.max(end, tasks.start[i] + tasks.duration[i] / 2)
    figure.x_range.have_updated_interactively = true
    figure.x_range.setv({start: end - ms, end: end + ms / 50})
}"""
# Where on the page the longest task shown of a layer is.
_FIND_TASK = """name => {
    const all = [...Bokeh.documents[0]._all_models.values()]
    const figure = all.find(model => model.type === "Figure")
    const tasks = all.find(model => model.data && model.data.duration).data
    const view = Bokeh.index.find_one(figure)
    let best = -1
    for (let i = 0; i < tasks.start.length; i++)
        if (tasks.name[i].startsWith(name) && tasks.start[i] > figure.x_range.start
            && (best < 0 || tasks.duration[i] > tasks.duration[best])) best = i
    const box = view.canvas_view.el.getBoundingClientRect()
    return [box.x + view.frame.x_scale.compute(tasks.start[best]),
            box.y + view.frame.y_scale.compute(tasks.y[best])]
}"""
_IN_BACKWARD = """() => {
    const all = [...Bokeh.documents[0]._all_models.values()]
    const {name, state} = all.find(model => model.data && model.data.state).data
    return [...name].some((n, i) => n.startsWith("backward:narrow") && state[i] === "processing")
}"""
# The graph beside its legend, without the installed stages, which stand apart from it.
_SHOW_GRAPH = """() => {
    const all = [...Bokeh.documents[0]._all_models.values()]
    const figure = all.find(model => model.type === "Figure")
    const data = all.find(model => model.data && model.data.state).data
    const last = Math.max(...data.x)
    const linked = [...data.y].filter((_, i) => data.name[i].startsWith("forward"))
    const [low, high] = [Math.min(...linked), Math.max(...linked)]
    for (const [range, start, end] of [
        [figure.x_range, -0.04 * last, 1.14 * last],
        [figure.y_range, low - 0.15 * (high - low), high + 0.15 * (high - low)],
    ]) {
        range.have_updated_interactively = true
        range.setv({start, end})
    }
}"""


def last_steps(page: Page, training: Training) -> None:
    """The task stream of the last steps: all of them are too many to tell apart."""
    training.wait_for(5)
    training.pause()
    page.evaluate(_SHOW_LAST, 1000 * 2.1 * sorted(training.steps[-5:])[2])
    page.wait_for_timeout(500)
    page.mouse.move(*page.evaluate(_FIND_TASK, "backward:body"))
    page.wait_for_timeout(500)


def part_of_a_step(page: Page, training: Training) -> None:
    """A moment at which part of a step has run."""
    training.wait_for(1)
    page.wait_for_timeout(500 * training.steps[-1])


def graph_of_a_step(page: Page, training: Training) -> None:
    """The graph of one step alone, part of it done."""
    training.batch = 64  # slow enough to be seen on the way
    training.one_step()
    page.wait_for_function(_IN_BACKWARD, polling=20)
    page.evaluate(_SHOW_GRAPH)
    training.batch = 16


Moment = Callable[[Page, Training], None]

# Picture: page of the dashboard, window size, and what to do before it is taken.
PICTURES: dict[str, tuple[str, tuple[int, int], Moment]] = {
    "status": ("status", (1400, 900), part_of_a_step),
    "progress": ("individual-progress", (1000, 400), part_of_a_step),
    "workers": ("workers", (1300, 300), part_of_a_step),
    "task-stream": ("individual-task-stream", (1200, 420), last_steps),
    "graph": ("individual-graph", (1200, 480), graph_of_a_step),
}


def take(page: Page, address: str, training: Training, name: str, to: Path) -> None:
    """Open one page of the dashboard, wait for its data, and save what it shows."""
    path, (width, height), moment = PICTURES[name]
    page.set_viewport_size({"width": width, "height": height})
    if name == "graph":  # else it opens with what is left of earlier steps
        gc.collect()
        training.pause()
    page.goto(f"{address}/{path}", wait_until="load")
    page.wait_for_function("window.Bokeh && Bokeh.documents.length > 0")
    page.wait_for_timeout(2000)
    gc.collect()  # what is left of earlier steps would be counted too
    moment(page, training)
    page.screenshot(path=to / f"{name}.png")
    training.go.set()
    median = sorted(training.steps)[len(training.steps) // 2]
    print(f"{name}.png after {len(training.steps)} steps of {1000 * median:.0f} ms")


def main() -> None:
    """Train, and take the pictures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("pictures", nargs="*", help=f"some of {', '.join(PICTURES)}")
    parser.add_argument("--to", type=Path, default=IMAGES, help="folder for the pictures")
    options = parser.parse_args()
    options.to.mkdir(parents=True, exist_ok=True)
    client = tg.local_cluster(n_workers=2, dashboard_address="127.0.0.1:0")
    address = client.dashboard_link.removesuffix("/status")
    training = Training()
    training.start()
    try:
        training.wait_for(5)
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(
                executable_path=shutil.which("chromium"), args=CHROMIUM_ARGS
            )
            page = browser.new_page()
            for name in options.pictures or PICTURES:
                take(page, address, training, name, options.to)
            browser.close()
    finally:
        training.stop.set()
        training.go.set()
        training.join(timeout=60)
        client.close()


if __name__ == "__main__":
    main()

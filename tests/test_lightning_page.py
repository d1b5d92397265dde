"""The page for those who come from Lightning: taskgrad's way of the job is the shortest."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[1] / "docs" / "coming-from-lightning.md"
# What the job asks for, as each way says it.
PARTS = {
    "Plain torch": ["1e-3", "1e-2", "get_ema_multi_avg_fn", "break", "csv.writer", "torch.save"],
    "Lightning": ["1e-3", "1e-2", "EMAWeightAveraging", "EarlyStopping", "CSVLogger"],
    "taskgrad": ["1e-3", "1e-2", "tg.EMA", "tg.EarlyStopping", "tg.CSVLogger"],
}
PARTS["Lightning"] += ["ModelCheckpoint", ".best_model_path"]
PARTS["taskgrad"] += ["tg.ModelCheckpoint", ".best_path"]


def way(title: str) -> str:
    """The one block of code under a heading."""
    sections = re.split(r"^### ", PAGE.read_text("utf-8"), flags=re.MULTILINE)
    [section] = [text for text in sections if text.startswith(f"{title}\n")]
    [code] = re.findall(r"^```python\n(.*?)^```$", section, flags=re.MULTILINE | re.DOTALL)
    return code


def lines(code: str) -> int:
    return sum(bool(re.sub("#.*", "", line).strip()) for line in code.splitlines())


def statements(code: str) -> int:
    return sum(isinstance(node, ast.stmt) for node in ast.walk(ast.parse(code)))


@pytest.mark.parametrize("title", PARTS)
def test_each_way_does_the_whole_job(title):
    code = way(title)
    assert [part for part in PARTS[title] if part not in code] == []
    assert max(map(len, code.splitlines())) <= 100


@pytest.mark.parametrize("count", [lines, statements, len])
def test_ours_is_the_shortest(count):
    assert count(way("taskgrad")) <= count(way("Lightning"))
    assert count(way("taskgrad")) <= count(way("Plain torch"))

"""The networks that benchmarks train: those of the examples."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

from resnet import resnet

__all__ = ["resnet"]

"""The networks that benchmarks train: those of the examples, and one of pytorchcv."""

from __future__ import annotations

import sys
from pathlib import Path

from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

from resnet import resnet

__all__ = ["resnet", "resnet18"]


def resnet18(n_classes: int) -> nn.Sequential:
    """ResNet-18 as layers in a row."""
    from pytorchcv.model_provider import get_model

    net = get_model("resnet18", num_classes=n_classes)
    return nn.Sequential(*net.features, nn.Flatten(), net.output)

"""Load what train_resnet.py saved, with plain torch, and test it again.

python examples/load_resnet.py                 # runs/resnet/model.pt
python examples/load_resnet.py other/model.pt
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch

from images import load_images
from resnet import resnet


def main() -> None:
    parser = argparse.ArgumentParser(description="Test a saved residual network.")
    parser.add_argument("model", type=Path, nargs="?", default=Path("runs/resnet/model.pt"))
    path = parser.parse_args().model

    saved = torch.load(path, weights_only=True)
    model = resnet(**saved["arguments"])
    model.load_state_dict(saved["state_dict"])
    model.eval()

    images = load_images(saved["data"], saved["size"])
    with torch.no_grad():
        scores = torch.cat([model(part) for part in images.test_x.split(64)])
    right = (scores.argmax(dim=1) == images.test_t).float().mean().item()
    print(f"test accuracy: {100 * right:.2f} %")

    expected = json.loads(path.with_name("metrics.json").read_text())["test_accuracy"]
    if abs(100 * right - expected) > 0.2:
        sys.exit(f"it was {expected:.2f} % at the end of the training")


if __name__ == "__main__":
    main()

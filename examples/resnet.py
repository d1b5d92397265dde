"""Residual networks of bottleneck blocks (He et al., 2015) as one nn.Sequential. Plain torch."""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import nn

# Blocks in layer1 to layer4; the depth counts the layers with weights: 3 a block, stem and fc.
BLOCKS = {
    14: (1, 1, 1, 1),
    26: (2, 2, 2, 2),
    50: (3, 4, 6, 3),
    101: (3, 4, 23, 3),
    152: (3, 8, 36, 3),
}


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions around a skip connection; the last one widens by 4.

    Parameters
    ----------
    channels_in
        Channels of the input.
    width
        Channels of the 3x3 convolution. The output has four times as many.
    stride
        Of the 3x3 convolution.
    """

    expansion = 4

    def __init__(self, channels_in: int, width: int, stride: int = 1) -> None:
        super().__init__()
        channels_out = width * self.expansion
        self.conv1 = nn.Conv2d(channels_in, width, kernel_size=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, kernel_size=3, stride=stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, channels_out, kernel_size=1, bias=False)
        self.bn3 = nn.BatchNorm2d(channels_out)
        self.relu = nn.ReLU(inplace=True)
        self.downsample: nn.Module | None = None
        if stride != 1 or channels_in != channels_out:
            self.downsample = nn.Sequential(
                nn.Conv2d(channels_in, channels_out, kernel_size=1, stride=stride, bias=False),
                nn.BatchNorm2d(channels_out),
            )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.relu(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(y))
        skip = x if self.downsample is None else self.downsample(x)
        return self.relu(y + skip)


def resnet(
    depth: int,
    n_classes: int,
    in_channels: int = 3,
    width: int = 64,
    small_images: bool = False,
) -> nn.Sequential:
    """A residual network: stem, layer1 to layer4, pool, flatten, fc.

    Parameters
    ----------
    depth
        14, 26, 50, 101 or 152. From 50 on, with the other arguments as they are, these are the
        networks of the paper.
    n_classes
        Outputs of the last layer.
    in_channels
        1 for grey images, 3 for colour.
    width
        Channels after the stem; each layer after layer1 doubles them.
    small_images
        A 3x3 stem that keeps the image's size, for images of about 32 pixels and less.
    """
    if depth not in BLOCKS:
        raise ValueError(f"depth is one of {', '.join(map(str, BLOCKS))}; got {depth}")
    parts: OrderedDict[str, nn.Module] = OrderedDict(stem=_stem(in_channels, width, small_images))
    channels = width
    for number, blocks in enumerate(BLOCKS[depth]):
        inner = width * 2**number
        row = []
        for block in range(blocks):
            # The first block of layer2, 3 and 4 halves the image.
            stride = 2 if number > 0 and block == 0 else 1
            row.append(Bottleneck(channels, inner, stride))
            channels = inner * Bottleneck.expansion
        parts[f"layer{number + 1}"] = nn.Sequential(*row)
    parts["pool"] = nn.AdaptiveAvgPool2d(1)
    parts["flatten"] = nn.Flatten()
    parts["fc"] = nn.Linear(channels, n_classes)
    model = nn.Sequential(parts)
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return model


def _stem(in_channels: int, width: int, small_images: bool) -> nn.Sequential:
    size, stride = (3, 1) if small_images else (7, 2)
    parts: OrderedDict[str, nn.Module] = OrderedDict(
        conv=nn.Conv2d(in_channels, width, size, stride=stride, padding=size // 2, bias=False),
        bn=nn.BatchNorm2d(width),
        relu=nn.ReLU(inplace=True),
    )
    if not small_images:
        parts["maxpool"] = nn.MaxPool2d(kernel_size=3, stride=2, padding=1)
    return nn.Sequential(parts)

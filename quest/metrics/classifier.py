"""A classifier of small photographs, trained in `quest.zoo.train_classifier`: does an image show the class asked for?

The network is a narrower one of airbench96 (Jordan, arXiv:2404.00498, section 3): a frozen layer that whitens 2x2
patches, three groups of three convolutions, and a linear head.
"""

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F

from quest.diffusion.models import ZOO
from quest.runtime.files import read_json
from quest.runtime.sums import check_sums

FOLDER = ZOO / "photos-classifier"
SIZE = 32  # side of its images in pixels


class Group(nn.Module):
    """Three 3x3 convolutions with batch norm and GELU: one that halves the resolution, then a residual block of two."""

    def __init__(self, inner, outer):
        super().__init__()
        self.convolutions = nn.ModuleList(nn.Conv2d(i, outer, 3, padding=1, bias=False) for i in (inner, outer, outer))
        self.norms = nn.ModuleList(nn.BatchNorm2d(outer, affine=False) for _ in range(3))

    def forward(self, x):
        first, second, third = self.convolutions
        x = F.gelu(self.norms[0](F.max_pool2d(first(x), 2)))
        residual = F.gelu(self.norms[1](second(x)))
        return F.gelu(x + self.norms[2](third(residual)))


class PhotoNet(nn.Module):
    """Maps images [N, 3, 32, 32] in [-1, 1] to logits [N, classes]. Raises ValueError for another shape."""

    def __init__(self, classes, widths=(64, 160, 192)):
        super().__init__()
        self.settings = {"classes": list(classes), "widths": list(widths)}
        self.whiten = nn.Conv2d(3, 24, 2)
        groups = [Group(inner, outer) for inner, outer in zip((24, *widths), widths, strict=False)]
        self.groups = nn.Sequential(nn.GELU(), *groups, nn.MaxPool2d(3), nn.Flatten())
        self.head = nn.Linear(widths[-1], len(classes), bias=False)
        self.to(memory_format=torch.channels_last)  # a third faster on a CPU

    def forward(self, x):
        if x.shape[1:] != (3, SIZE, SIZE):
            raise ValueError(f"PhotoNet takes [N, 3, {SIZE}, {SIZE}], got {list(x.shape)}")
        features = self.groups(self.whiten(x.contiguous(memory_format=torch.channels_last)))
        return self.head(features) / features.shape[1]


def load(folder=FOLDER):
    """Return the trained network in float32 and eval mode. Raises ValueError if a file differs from its known hash."""
    check_sums(folder)
    net = PhotoNet(**read_json(Path(folder) / "config.json"))
    state = load_file(Path(folder) / "model.safetensors")
    net.load_state_dict({name: v.float() if v.is_floating_point() else v for name, v in state.items()})
    return net.eval().requires_grad_(False)


@torch.no_grad()
def logits(net, images):
    """Return logits [N, K] of uint8 images [N, 3, 32, 32]: the mean of those of each image and its mirror image."""
    x = images.float() / 127.5 - 1
    return (net(x) + net(x.flip(3))) / 2


def classes_of(net, images):
    """Return the class [N] that a network sees in each image, for uint8 images [N, 32, 32, 3]."""
    parts = torch.from_numpy(images).permute(0, 3, 1, 2).split(250)
    return torch.cat([logits(net, part) for part in parts]).argmax(1).numpy()


def loss_of(net, x, labels):
    """The sum over a batch of cross entropies with labels smoothed by 0.2, as in airbench94."""
    return F.cross_entropy(net(x).float(), labels, label_smoothing=0.2, reduction="sum")

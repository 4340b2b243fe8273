"""The network that extracts features for the zoo's image metrics: a classifier of scenes, used instead of Inception."""

from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors.torch import load_file

from quest.diffusion import scenes
from quest.diffusion.models import ZOO
from quest.runtime.files import read_json
from quest.runtime.sums import check_sums

SPATIAL_CHANNELS = 7  # of a 4x4 map: 112 numbers, as sFID takes the first 7 channels of one of Inception's maps

# Softmax heads: name -> number of classes. `logits` has a class for each kind and colour of the main object.
HEADS = {
    "logits": len(scenes.CLASSES),
    "companion": len(scenes.CLASSES) + 1,  # the last class: no companion
    "place": len(scenes.POSITIONS) + len(scenes.RELATIONS),
    "size": len(scenes.SIZES),
    "texture": len(scenes.TEXTURES),
    "background": len(scenes.BACKGROUNDS),
}


def targets(s):
    """Return the class of every head for n Scenes `s`, as name -> int64 [n]."""
    values = {
        "logits": s.labels(),
        "companion": (s.kind[:, 1] * len(scenes.COLOURS) + s.colour[:, 1]) * s.pair + len(scenes.CLASSES) * ~s.pair,
        "place": s.position * ~s.pair + (len(scenes.POSITIONS) + s.relation) * s.pair,
        "size": s.size,
        "texture": s.texture,
        "background": s.background,
    }
    return {name: torch.from_numpy(v.astype("int64")) for name, v in values.items()}


class Block(nn.Module):
    """A convolution, GroupNorm and SiLU, with a shortcut around them if input and output have the same shape."""

    def __init__(self, inner, outer, stride):
        super().__init__()
        self.conv = nn.Conv2d(inner, outer, 3, stride, 1, bias=False)
        self.norm = nn.GroupNorm(8, outer)
        self.residual = inner == outer and stride == 1

    def forward(self, x):
        y = F.silu(self.norm(self.conv(x)))
        return x + y if self.residual else y


class SceneNet(nn.Module):
    """Convolutions reduce an image to a 4x4 map; the map gives 64 features, and each attribute has a linear head."""

    def __init__(self, channels=(24, 48, 96, 128), features=64):
        super().__init__()
        self.settings = {"channels": list(channels), "features": features}
        blocks, inner = [], 3
        for i, outer in enumerate(channels):
            blocks.append(Block(inner, outer, 2))
            if i > 0:
                blocks.append(Block(outer, outer, 1))
            inner = outer
        self.blocks = nn.Sequential(*blocks)
        self.pool = nn.Linear(inner * 16, features)
        self.heads = nn.ModuleDict({name: nn.Linear(features, n) for name, n in HEADS.items()})

    def forward(self, x):
        """Map x [N, 3, 64, 64] in [-1, 1] to pool [N, 64], spatial [N, 112], logits [N, 48] and the other heads.

        Raises ValueError for another shape.
        """
        if x.shape[1:] != (3, scenes.SIZE, scenes.SIZE):
            raise ValueError(f"SceneNet takes [N, 3, {scenes.SIZE}, {scenes.SIZE}], got {list(x.shape)}")
        grid = self.blocks(x)  # [N, C, 4, 4]
        pool = self.pool(grid.flatten(1))
        heads = {name: head(F.silu(pool)) for name, head in self.heads.items()}
        return {"pool": pool, "spatial": grid[:, :SPATIAL_CHANNELS].flatten(1), **heads}


def load(folder=ZOO / "scenes-extractor"):
    """Return the trained network in float32. Raises ValueError if a file differs from its known hash."""
    folder = Path(folder)
    check_sums(folder)
    net = SceneNet(**read_json(folder / "config.json"))
    net.load_state_dict({k: v.float() for k, v in load_file(folder / "model.safetensors").items()})
    return net.eval().requires_grad_(False)


@torch.no_grad()
def outputs(net, x, batch_size=250):
    """Return all outputs of the network for x [N, 3, 64, 64], computed batch by batch."""
    parts = [net(part) for part in x.split(batch_size)]
    return {name: torch.cat([p[name] for p in parts]) for name in parts[0]}

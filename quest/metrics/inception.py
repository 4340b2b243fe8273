"""Inception features of one pass: pooled, spatial and logits, as the evaluators that papers report with see images.

The network is torch-fidelity's conversion of the TensorFlow graph of 2015. Protocols differ in how an image comes to
299x299 and, for the Inception score, in how images are split:

- `adm`: TensorFlow's bilinear resize without antialiasing inside the graph; splits of 5000 consecutive images. FID,
  sFID and IS of the guided-diffusion evaluator (arXiv:2105.05233).
- `torch-fidelity`: the same pixels; 10 splits of images shuffled with seed 2020.
- `clean`: Pillow's antialiased bicubic resize in float (arXiv:2104.11222), by clean-fid's own function. No IS.

sFID (arXiv:2103.03841) is the Fréchet distance of 7x17x17 numbers, the first 7 channels of the block `mixed_6/conv` of
the graph, which is `Mixed_6d.branch1x1` here.
"""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
from torch_fidelity.interpolate_compat_tensorflow import interpolate_bilinear_2d_like_tensorflow1x

from quest.runtime.sums import check_archive

SIZE = 299
SPATIAL_CHANNELS = 7
BATCH = 50  # activations of the first layers are large: 5.5 MB per image each
# The layers up to the pooled features in the order of the graph.
LAYERS = (
    ["Conv2d_1a_3x3", "Conv2d_2a_3x3", "Conv2d_2b_3x3", "MaxPool_1", "Conv2d_3b_1x1", "Conv2d_4a_3x3", "MaxPool_2"]
    + ["Mixed_5b", "Mixed_5c", "Mixed_5d", "Mixed_6a", "Mixed_6b", "Mixed_6c", "Mixed_6d", "Mixed_6e"]
    + ["Mixed_7a", "Mixed_7b", "Mixed_7c", "AvgPool"]
)


def _tensorflow(images: Tensor) -> Tensor:
    return interpolate_bilinear_2d_like_tensorflow1x(images.float(), size=(SIZE, SIZE), align_corners=False)


def _pillow(images: Tensor) -> Tensor:
    from cleanfid.resize import build_resizer

    resize = build_resizer("clean")
    pixels = images.permute(0, 2, 3, 1).cpu().numpy()
    return torch.from_numpy(np.stack([resize(image) for image in pixels])).permute(0, 3, 1, 2).to(images.device)


RESIZE = {"adm": _tensorflow, "torch-fidelity": _tensorflow, "clean": _pillow}


class Inception(nn.Module):
    """uint8 images [B, 3, H, W] to pool [B, 2048], spatial [B, 2023] and logits [B, 1008] without the layer's bias."""

    def __init__(self, weights: str | Path, protocol: str):
        """Raises ValueError, naming the file, where `weights` holds anything but this network's tensors."""
        super().__init__()
        if protocol not in RESIZE:
            raise ValueError(f"protocol: {protocol!r} is not one of {', '.join(RESIZE)}")
        _check(weights)
        self.network = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], str(weights))
        self.network.Mixed_6d.branch1x1.register_forward_hook(self._keep)
        self.resize = RESIZE[protocol]

    def _keep(self, _module, _args, output):
        self.branch = output  # [B, 192, 17, 17]

    @torch.no_grad()
    def forward(self, images: Tensor) -> dict[str, Tensor]:
        parts = [self._batch(batch) for batch in images.split(BATCH)]
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    def _batch(self, images):
        x = (self.resize(images) - 128) / 128
        for name in LAYERS:
            x = getattr(self.network, name)(x)
        pool = x.flatten(1)
        spatial = self.branch[:, :SPATIAL_CHANNELS].flatten(1)
        return {"pool": pool, "spatial": spatial, "logits": pool @ self.network.fc.weight.T}


def _check(weights):
    """torch-fidelity would run whatever a pickle says; this reads tensors only, and fails on anything else."""
    check_archive(weights)
    try:
        state = torch.load(weights, weights_only=True)
    except FileNotFoundError:
        raise
    except Exception as error:  # a pickle of other things, a truncated archive, a text file: each its own type
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(f"{weights}: not a file of tensors ({reason})") from error
    missing = [name for name in ("Mixed_6d.branch1x1.conv.weight", "fc.weight") if name not in state]
    if missing:
        raise ValueError(f"{weights}: not the weights of torch-fidelity's Inception, lacks {', '.join(missing)}")

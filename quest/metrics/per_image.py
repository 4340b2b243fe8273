"""Metrics with a value for each image, whose mean is the metric of a set.

PSNR and latent error measure the distance to the full-precision model's output for the same seed. They vary far less
than a distance between distributions: every image has its own target, so that a few hundred show differences that FID
needs tens of thousands for.
"""

import numpy as np

NEIGHBOURS = 3
BLOCK = 2000  # rows per block of distances: 160 MB against 10,000 real images


def psnr(images: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Peak signal-to-noise ratio in dB of uint8 images [N, H, W, C], per image [N]; peak 255.

    The ratio of identical images is infinite, and one of them would make any mean infinite. They count as if a single
    value differed by a single level, the largest finite ratio there is: 10 log10(255^2 H W C), 89 dB for 64x64 RGB.
    """
    _same_shape("images", images, target)
    if images.dtype != np.uint8 or target.dtype != np.uint8:
        raise ValueError(f"psnr needs uint8 images, got {images.dtype} and {target.dtype}")
    size = images[0].size
    squared = [((a.astype(np.int32) - b) ** 2).sum() for a, b in zip(images, target, strict=True)]
    return 10 * np.log10(255.0**2 * size / np.maximum(squared, 1))


def latent_mse(latents: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Mean squared difference of final latents [N, ...], per image [N], in squared latent units."""
    _same_shape("latents", latents, target)
    # Image by image: 50,000 latents are gigabytes, and twice that in float64.
    return np.array([np.mean((a.astype(np.float64) - b) ** 2) for a, b in zip(latents, target, strict=True)])


def _same_shape(what: str, a: np.ndarray, b: np.ndarray) -> None:
    if a.shape != b.shape:
        raise ValueError(f"{what} of the same seeds must have one shape, got {a.shape} and {b.shape}")


def clip_scores(image: np.ndarray, text: np.ndarray) -> np.ndarray:
    """CLIP score: 100 times the cosine of image and caption embeddings [N, D], per image [N]; they need no normalising.

    As papers on quantization report it (arXiv:2104.08718 weighs the cosine by 2.5). It is not clamped at 0 as
    torchmetrics' is, which never matters for a mean that means anything.
    """
    image, text = np.asarray(image, np.float64), np.asarray(text, np.float64)
    if image.ndim != 2 or image.shape != text.shape:
        raise ValueError(f"image and caption embeddings must both be [N, D], got {image.shape} and {text.shape}")
    image = image / np.linalg.norm(image, axis=1, keepdims=True)
    text = text / np.linalg.norm(text, axis=1, keepdims=True)
    return 100 * (image * text).sum(axis=1)


def inside(samples: np.ndarray, real: np.ndarray, k: int = NEIGHBOURS) -> np.ndarray:
    """Which samples [N, D] lie within the manifold of real features [M, D]: bool [N]. Precision is the mean.

    Around each real image's features lies a ball out to its k-th nearest other real image; a sample within any ball
    counts (arXiv:1904.06991). Reported for ImageNet because FID with strong guidance falls when quantization adds noise
    (arXiv:2402.03666, section 4). Raises ValueError unless both have D columns and M > k.
    """
    samples, real = np.asarray(samples, np.float64), np.asarray(real, np.float64)
    if samples.ndim != 2 or real.ndim != 2 or samples.shape[1] != real.shape[1]:
        raise ValueError(f"samples and real features must be [N, D] and [M, D], got {samples.shape} and {real.shape}")
    if len(real) <= k:
        raise ValueError(f"{len(real)} real images have no {k}-th neighbour each; at least {k + 1} are needed")
    # The nearest is the image itself, at distance 0.
    radii = np.concatenate([np.partition(d, k, axis=1)[:, k] for d in _squared_distances(real, real)])  # [M]
    return np.concatenate([(d <= radii).any(axis=1) for d in _squared_distances(samples, real)])


def _squared_distances(a, b):
    """Squared distances of a [N, D] to b [M, D], in blocks of rows."""
    norms = np.einsum("nd,nd->n", b, b)
    for start in range(0, len(a), BLOCK):
        rows = a[start : start + BLOCK]
        yield (np.einsum("nd,nd->n", rows, rows)[:, None] + norms - 2 * rows @ b.T).clip(0)

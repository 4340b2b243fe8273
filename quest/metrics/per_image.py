"""Metrics that have a value for each image; the metric of a set is the mean of the values.

PSNR and latent error measure the distance to the full-precision model's output for the same seed. They vary far less
than a distance between distributions, because every image has its own target. A few hundred images therefore show
differences for which FID needs tens of thousands.
"""

import numpy as np

CANDIDATES = 100  # captions among which that of an image should rank first


def psnr(images: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Return the peak signal-to-noise ratio in dB (peak 255) of uint8 images [N, H, W, C], per image [N].

    Identical images have an infinite ratio, and one such pair would make the mean infinite. They count as if one value
    differed by one level. That is the largest finite ratio, 10 log10(255^2 H W C), 89 dB for 64x64 RGB. Raises
    ValueError for other shapes or dtypes.
    """
    _same_shape("images", images, target)
    if images.dtype != np.uint8 or target.dtype != np.uint8:
        raise ValueError(f"psnr needs uint8 images, got {images.dtype} and {target.dtype}")
    size = images[0].size
    squared = [((a.astype(np.int32) - b) ** 2).sum() for a, b in zip(images, target, strict=True)]
    return 10 * np.log10(255.0**2 * size / np.maximum(squared, 1))


def squared_distances(maps: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Return the squared Euclidean distances [N] of the rows of two arrays [N, D]. Raises ValueError for other shapes.

    Of `maps` of EfficientNet-Lite0 (see `quest.metrics.lite0.outputs`) this is an image distance of the form of LPIPS.
    """
    _same_shape("maps", maps, target)
    return np.array([((a.astype(np.float64) - b) ** 2).sum() for a, b in zip(maps, target, strict=True)])


def latent_mse(latents: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Return the mean squared difference of final latents [N, ...], per image [N], in squared latent units.

    Raises ValueError if the shapes differ.
    """
    _same_shape("latents", latents, target)
    # One image at a time, because 50,000 latents take gigabytes, and twice as many in float64.
    return np.array([np.mean((a.astype(np.float64) - b) ** 2) for a, b in zip(latents, target, strict=True)])


def _same_shape(what: str, a: np.ndarray, b: np.ndarray) -> None:
    if a.shape != b.shape:
        raise ValueError(f"{what} of the same seeds must have one shape, got {a.shape} and {b.shape}")


def clip_scores(image: np.ndarray, text: np.ndarray) -> np.ndarray:
    """Return CLIP scores [N]: 100 times the cosine of image and caption embeddings [N, D], which are normalized here.

    Papers on quantization report this scale (arXiv:2104.08718 multiplies the cosine by 2.5). Unlike torchmetrics, the
    score is not clamped at 0; that matters only if captions and images have nothing in common. Raises ValueError if the
    shapes differ.
    """
    image, text = np.asarray(image, np.float64), np.asarray(text, np.float64)
    if image.ndim != 2 or image.shape != text.shape:
        raise ValueError(f"image and caption embeddings must both be [N, D], got {image.shape} and {text.shape}")
    image = image / np.linalg.norm(image, axis=1, keepdims=True)
    text = text / np.linalg.norm(text, axis=1, keepdims=True)
    return 100 * (image * text).sum(axis=1)


def caption_first(image: np.ndarray, text: np.ndarray, among: int = CANDIDATES) -> np.ndarray:
    """Return whether each image's caption ranks first among `among` captions, as bool [N], for embeddings [N, D].

    The candidates of image i are the captions of the 100 images of its block: 0 to 99, 100 to 199, ...; the last block
    is the last 100. An equal caption of another image does not rank before it. By chance, 1 in 100 ranks first. Raises
    ValueError if the shapes differ or there are fewer than `among` images.
    """
    image, text = np.asarray(image, np.float64), np.asarray(text, np.float64)
    if image.ndim != 2 or image.shape != text.shape or len(image) < among:
        raise ValueError(
            f"embeddings must both be [N, D] with N of at least {among}, got {image.shape} and {text.shape}"
        )
    first = np.zeros(len(image), bool)
    for start in range(0, len(image), among):
        start = min(start, len(image) - among)
        block = slice(start, start + among)
        scores = image[block] @ text[block].T  # [100, 100]
        first[block] = scores.diagonal() >= scores.max(axis=1) - 1e-6 * np.abs(scores).max()
    return first

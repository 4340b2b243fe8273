"""Distances to the full-precision model's output for the same seed, image by image.

They vary far less than a distance between distributions: every image has its own target, so that a few hundred show
differences that FID needs tens of thousands for.
"""

import numpy as np


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

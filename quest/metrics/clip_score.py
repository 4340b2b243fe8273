"""CLIP score: 100 cos(image, caption), as papers on quantization report it (arXiv:2104.08718 weighs it by 2.5)."""

import numpy as np


def clip_scores(image: np.ndarray, text: np.ndarray) -> np.ndarray:
    """100 times the cosine of image and caption embeddings [N, D], per image [N]; embeddings need no normalisation.

    The score of a set is the mean. It is not clamped at 0 as torchmetrics' is, which never matters for one that means
    anything.
    """
    image, text = np.asarray(image, np.float64), np.asarray(text, np.float64)
    if image.ndim != 2 or image.shape != text.shape:
        raise ValueError(f"image and caption embeddings must both be [N, D], got {image.shape} and {text.shape}")
    image = image / np.linalg.norm(image, axis=1, keepdims=True)
    text = text / np.linalg.norm(text, axis=1, keepdims=True)
    return 100 * (image * text).sum(axis=1)

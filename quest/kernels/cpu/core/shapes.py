"""Shapes of the results of integer kernels, for computing and for tracing."""

from torch import Tensor


def convolved(x: Tensor, weight: Tensor, stride, padding, dilation) -> list[int]:
    """Return the shape of a convolution's result, for a packed weight [O, kh, kw, bytes].

    Raises ValueError for an input that has other than four dimensions or is smaller than the kernel.
    """
    if x.ndim != 4:
        raise ValueError(f"a convolution of an input of shape {list(x.shape)}; it takes [N, C, H, W]")
    sides = zip(x.shape[2:], weight.shape[1:3], stride, padding, dilation, strict=True)
    height, width = ((n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in sides)
    if height < 1 or width < 1:
        raise ValueError(f"an input of shape {list(x.shape)} is smaller than the kernel, {list(weight.shape[1:3])}")
    return [x.shape[0], weight.shape[0], height, width]


def attended(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Raise ValueError unless q [..., n, d], k and v [..., m, d] have the same batch, heads and channels."""
    if q.ndim not in (3, 4) or k.shape != v.shape or k.shape[:-2] != q.shape[:-2] or k.shape[-1:] != q.shape[-1:]:
        raise ValueError(f"attention of q {list(q.shape)} to k {list(k.shape)} and v {list(v.shape)}")

"""Custom-op registration that the integer kernels share. torch uses ops while it traces, and functions otherwise."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from quest.affine import QParams
from quest.kernels.cpu.core.shapes import attended, convolved


def register(op: str, function: Callable, fake: Callable) -> None:
    """Make an annotated function the op torch.ops.quest.<op>. fake: returns an empty result, for tracing."""
    torch.library.custom_op(f"quest::{op}", function, mutates_args=()).register_fake(fake)


def run(function, op: str, x: Tensor, *arguments) -> Tensor:
    """Call the function; while torch traces, call the op torch.ops.quest.<op> instead."""
    # torch's dispatcher takes longer than a small layer, so it is avoided when possible.
    if type(x) is Tensor and not torch.compiler.is_compiling() and not x.is_meta:
        return function(x, *arguments)
    return getattr(torch.ops.quest, op)(x, *arguments)


def flat(formats: Sequence[QParams]) -> tuple[tuple, tuple, list[int]]:
    """Flatten the parameters of several tensors for an op: scales, zero points, and (qmin, qmax) one after another."""
    scales, zero_points, specs = zip(*formats, strict=True)
    return scales, zero_points, [limit for spec in specs for limit in (spec.qmin, spec.qmax)]


def fake_conv2d(x, weight, bias, scale, zero_point, qmin, qmax, stride, padding, dilation, *_):
    """Return an empty result of the right shape and layout, with which torch traces a convolution."""
    shape = convolved(x, weight, stride, padding, dilation)
    return x.new_empty(shape).contiguous(memory_format=torch.channels_last)


def fake_attention(q, k, v, *_formats):
    """Return an empty result of the right shape and layout, with which torch traces an attention."""
    attended(q, k, v)
    if q.ndim == 3:
        return torch.empty_like(q, memory_format=torch.contiguous_format)
    batch, heads, n, d = q.shape
    return q.new_empty((batch, n, heads, d)).transpose(1, 2)

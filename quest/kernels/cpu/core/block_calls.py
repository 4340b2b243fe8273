"""Calls the functions of the compiled core that compute whole blocks, and makes the structs that describe blocks.

Errors are those of `calls`.
"""

import ctypes

import torch
from torch import Tensor

from quest.kernels.cpu.core import check, core
from quest.kernels.cpu.core.calls import CPU, FLOAT32, STRUCTS, Range, address, checked, packed, shaped

Layer, Norm, AttentionBlock, TransformerBlock, Transformer, ResnetBlock = (
    STRUCTS[name] for name in ("Layer", "Norm", "AttentionBlock", "TransformerBlock", "Transformer", "ResnetBlock")
)


def _dimensions(tensor: Tensor, number: int, name: str) -> Tensor:
    if tensor.ndim != number:
        raise ValueError(f"{name}: its shape is {list(tensor.shape)}; it takes {number} dimensions")
    return tensor


def layer(weight: Tensor, bias: Tensor | None, limits: Range) -> ctypes.Structure:
    """Return the struct of a quantized layer. It contains addresses, so the caller must keep the tensors alive."""
    if bias is not None and (checked(bias, "bias").shape != weight.shape[:1] or not bias.is_contiguous()):
        raise ValueError(f"a bias of shape {list(bias.shape)} for {weight.shape[0]} outputs")
    return Layer(*packed(weight, "layer"), address(bias), limits)


def norm(weight: Tensor | None, bias: Tensor | None, eps: float, channels: int, groups: int = 0) -> ctypes.Structure:
    """Return the struct of a group norm or layer norm. The caller must keep the tensors alive."""
    for tensor in (weight, bias):
        if tensor is not None and (checked(tensor, "norm").shape != (channels,) or not tensor.is_contiguous()):
            raise ValueError(f"norm: a weight or bias of shape {list(tensor.shape)} for {channels} channels")
    return Norm(address(weight), address(bias), eps, groups, channels)


def attention_block(
    block: ctypes.Structure, x: Tensor, context: Tensor | None = None, residual: Tensor | None = None
) -> Tensor:
    """x [B, n, C], context [B, m, C'] (default: x) -> [B, n, C], plus residual if there is one."""
    x, context = _tokens(x, context, "attention block")
    context = x if context is None else context
    residual = shaped(residual, x.shape, "attention block, residual")
    out = x.new_empty(x.shape)
    status = core().quest_attention_block(
        ctypes.byref(block), x.data_ptr(), context.data_ptr(), *x.shape, *context.shape[1:], address(residual),
        out.data_ptr(), x.shape[2], torch.get_num_threads(),
    )  # fmt: skip
    if status:
        check(status, "attention block", x=x, context=context)
    return out


def transformer_block(block: ctypes.Structure, x: Tensor, context: Tensor | None) -> Tensor:
    """x [B, n, C], context [B, m, C'] or None -> [B, n, C]."""
    x, context = _tokens(x, context, "transformer block")
    out = x.new_empty(x.shape)
    m, width = (0, 0) if context is None else context.shape[1:]
    status = core().quest_transformer_block(
        ctypes.byref(block), x.data_ptr(), address(context), *x.shape, m, width, out.data_ptr(), torch.get_num_threads()
    )
    if status:
        check(status, "transformer block", x=x, context=context)
    return out


def transformer(struct: ctypes.Structure, x: Tensor, context: Tensor | None) -> Tensor:
    """x [N, C, H, W], context [N, m, C'] or None -> [N, C, H, W], channels innermost."""
    x = _image(x, "transformer")
    context = _context(context, x, "transformer")
    out = torch.empty(x.shape, dtype=FLOAT32, device=CPU, memory_format=torch.channels_last)
    samples, channels, height, width = x.shape
    m, context_channels = (0, 0) if context is None else context.shape[1:]
    status = core().quest_transformer(
        ctypes.byref(struct), x.data_ptr(), address(context), samples, height * width, channels, m, context_channels,
        out.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    if status:
        check(status, "transformer", x=x, context=context)
    return out


def _image(x: Tensor, name: str) -> Tensor:
    """Return x [N, C, H, W] with channels innermost and without gaps."""
    if 0 in _dimensions(checked(x, name), 4, name).shape[2:]:
        raise ValueError(f"{name}: its shape is {list(x.shape)}; it takes [N, C, H, W] with pixels")
    return x.contiguous(memory_format=torch.channels_last)


def _tokens(x: Tensor, context: Tensor | None, name: str) -> tuple[Tensor, Tensor | None]:
    """Check tokens x [B, n, C] and context [B, m, C'], and return both without gaps."""
    x = _dimensions(checked(x, name), 3, name).contiguous()
    return x, _context(context, x, name)


def _context(context: Tensor | None, x: Tensor, name: str) -> Tensor | None:
    """Return a context [B, m, C'] of as many samples as x without gaps; None for None."""
    if context is None:
        return None
    if context.ndim != 3 or len(context) != len(x):
        raise ValueError(
            f"{name}: a context of shape {list(context.shape)} for an input of {list(x.shape)}; it takes [B, m, C']"
        )
    return checked(context, f"{name}, context").contiguous()


def resnet_block(
    block: ctypes.Structure, x: Tensor, embedding: Tensor | None, residual: Tensor | None, outputs: int
) -> Tensor:
    """x [N, C, H, W], embedding [N, E] after its activation, residual [N, outputs, H, W] -> [N, outputs, H, W].

    residual: None if the block computes its shortcut. Channels of the result lie innermost.
    """
    x = _image(x, "residual block")
    samples, channels, height, width = x.shape
    if residual is not None:
        if residual.shape != (samples, outputs, height, width):
            raise ValueError(f"residual block: a residual of shape {list(residual.shape)} for {list(x.shape)}")
        residual = checked(residual, "residual block, residual").contiguous(memory_format=torch.channels_last)
    length = 0
    if embedding is not None:
        length = _dimensions(embedding, 2, "residual block, embedding").shape[1]
        embedding = shaped(embedding, (samples, length), "residual block, embedding")
    shape = samples, outputs, height, width
    out = torch.empty(shape, dtype=FLOAT32, device=CPU, memory_format=torch.channels_last)
    status = core().quest_resnet_block(
        ctypes.byref(block), x.data_ptr(), samples, height, width, channels, address(embedding), length,
        address(residual), out.data_ptr(), outputs, torch.get_num_threads(),
    )  # fmt: skip
    if status:
        check(status, "residual block", x=x, embedding=embedding, residual=residual)
    return out

"""Whole blocks that the compiled core computes in one call (`csrc/blocks.cpp`): C structs of what it must know of them.

A struct holds addresses and the ranges of one time group. It is made when the group is first met and kept until
`forget`, which whoever packs layers anew calls (`blocks.fuse`, `blocks.unfuse`).
"""

import ctypes
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from quest.kernels.cpu.core import core
from quest.kernels.cpu.integer import address, check, on_integers

i64, f32, pointer = ctypes.c_int64, ctypes.c_float, ctypes.c_void_p

# Classes of attention processors that `attention` can read; quantization adds its own, kernels know no layers.
PROCESSORS: list[type] = []


class Layer(ctypes.Structure):
    _fields_ = [("weight", pointer), ("bias", pointer), ("scale", f32), ("low", f32), ("high", f32)]


class Norm(ctypes.Structure):
    _fields_ = [("weight", pointer), ("bias", pointer), ("eps", f32), ("groups", i64)]


class AttentionBlock(ctypes.Structure):
    _fields_ = [("layers", Layer * 4), ("ranges", f32 * 12), ("scale", f32), ("heads", i64)]


class TransformerBlock(ctypes.Structure):
    _fields_ = [
        ("norms", Norm * 3),
        ("attentions", AttentionBlock * 2),
        ("count", i64),
        ("only_context", i64),
        ("feed_forward", Layer * 2),
    ]


class ResnetBlock(ctypes.Structure):
    _fields_ = [("norms", Norm * 2), ("layers", Layer * 3), ("modulated", i64)]


class Block:
    """A block of which all layers run on integers.

    struct: makes its struct for the current time group. parts: every module in it; where one has hooks, which the core
    would not call, there is no struct.
    """

    def __init__(self, struct: Callable[[], ctypes.Structure], parts: Iterable[nn.Module]):
        self.make, self.parts = struct, tuple(parts)
        quantizers = [m for part in self.parts for m in part.modules() if hasattr(m, "frozen")]
        self.groups = next((q.groups for q in quantizers if q.groups is not None), None)
        # What structs point to stays, whatever becomes of the modules.
        self.tensors = [t for part in self.parts for t in (*part.parameters(), *part.buffers())]
        self.structs: dict[int, ctypes.Structure] = {}

    def __reduce__(self):
        return type(None), ()  # a copy of the module asks anew: addresses are not copied

    def struct(self) -> ctypes.Structure | None:
        if any(part._forward_hooks or part._forward_pre_hooks for part in self.parts):
            return None
        number = 0 if self.groups is None else self.groups.number
        if number not in self.structs:
            self.structs[number] = self.make()
        return self.structs[number]


def forget(denoiser: nn.Module) -> None:
    for module in denoiser.modules():
        vars(module).pop("one_call", None)


def struct_of(module: nn.Module, look: Callable[[nn.Module], Block | None]) -> ctypes.Structure | None:
    """The struct of a block for the current time group; None where the core cannot compute it, as `look` finds."""
    block = vars(module).get("one_call")
    if block is None:
        block = module.one_call = look(module) or False
    return block.struct() if block else None


def layer(module: nn.Module) -> Layer:
    """Of a quantized layer that runs on integers."""
    return Layer(module.packed.data_ptr(), address(module.bias), *_range(module.input_quantizer))


def norm(module: nn.Module) -> Norm:
    groups = module.num_groups if isinstance(module, nn.GroupNorm) else 0
    return Norm(address(module.weight), address(module.bias), module.eps, groups)


def attention(module: nn.Module) -> Block | None:
    """Of an `Attention` of diffusers whose processor is one of PROCESSORS."""
    processor, layers = module.processor, (module.to_q, module.to_k, module.to_v, module.to_out[0])
    same = module.to_out[0].out_features == module.to_q.in_features and module.rescale_output_factor == 1
    if processor.kernel_name != "integer" or not on_integers(*layers) or not same:
        return None

    def struct():
        ranges = [number for q in (processor.q, processor.k, processor.v, processor.p) for number in _range(q)]
        return AttentionBlock((Layer * 4)(*map(layer, layers)), (f32 * 12)(*ranges), module.scale, module.heads)

    return Block(struct, (*layers, processor))


def run_attention(struct: AttentionBlock, x: Tensor, context: Tensor, residual: Tensor | None) -> Tensor:
    """x [B, n, C], context [B, m, C'] -> [B, n, outputs], plus residual, if there is one; all without gaps."""
    batch, n, _ = x.shape
    out = torch.empty_like(x)
    check(
        core().quest_attention_block(
            ctypes.byref(struct), x.data_ptr(), context.data_ptr(), batch, n, context.shape[1],
            address(residual), out.data_ptr(), torch.get_num_threads(),
        ),
        "attention block",
    )  # fmt: skip
    return out


def run_transformer(struct: TransformerBlock, x: Tensor, context: Tensor | None) -> Tensor:
    """x [B, n, C], context [B, m, C'] -> [B, n, C]; all without gaps."""
    batch, n, _ = x.shape
    out = torch.empty_like(x)
    m = 0 if context is None else context.shape[1]
    check(
        core().quest_transformer_block(
            ctypes.byref(struct), x.data_ptr(), address(context), batch, n, m, out.data_ptr(), torch.get_num_threads()
        ),
        "transformer block",
    )
    return out


def run_resnet(struct: ResnetBlock, x: Tensor, embedding: Tensor | None, residual: Tensor, out: Tensor) -> Tensor:
    """x [N, C, H, W], residual and out [N, O, H, W], channels innermost and no gaps; embedding [N, E] activated."""
    samples, _, height, width = x.shape
    check(
        core().quest_resnet_block(
            ctypes.byref(struct), x.data_ptr(), samples, height, width,
            address(embedding), residual.data_ptr(), out.data_ptr(), torch.get_num_threads(),
        ),
        "residual block",
    )  # fmt: skip
    return out


def _range(quantizer: nn.Module) -> tuple[float, float, float]:
    scale, zero_point, spec = quantizer.qparams
    return float(scale), spec.qmin - float(zero_point), spec.qmax - float(zero_point)

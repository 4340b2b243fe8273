"""Whole blocks that the compiled core computes in one call (`csrc/blocks.cpp`): C structs of what it must know of them.

A struct holds addresses and the ranges of one time group. It is made when the group is first met and kept until
`forget`, which whoever packs layers anew calls (`blocks.fuse`, `blocks.unfuse`).
"""

import ctypes
from collections.abc import Callable, Iterable

from torch import Tensor, nn

from quest.kernels.cpu.core import calls
from quest.kernels.cpu.integer import computes, on_integers

# Classes of attention processors that `attention` can read; quantization adds its own, kernels know no layers.
PROCESSORS: list[type] = []


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


def layer(module: nn.Module) -> ctypes.Structure:
    """Of a quantized layer that runs on integers."""
    return calls.layer(module.packed, module.bias, _range(module.input_quantizer))


def norm(module: nn.Module) -> ctypes.Structure:
    if isinstance(module, nn.GroupNorm):
        return calls.norm(module.weight, module.bias, module.eps, module.num_channels, module.num_groups)
    return calls.norm(module.weight, module.bias, module.eps, module.normalized_shape[0])


def attention(module: nn.Module) -> Block | None:
    """Of an `Attention` of diffusers whose processor is one of PROCESSORS."""
    processor, layers = module.processor, (module.to_q, module.to_k, module.to_v, module.to_out[0])
    same = module.to_out[0].out_features == module.to_q.in_features and module.rescale_output_factor == 1
    if processor.kernel_name != "integer" or not on_integers(*layers) or not same:
        return None

    def struct():
        ranges = tuple(_range(q) for q in (processor.q, processor.k, processor.v, processor.p))
        return calls.AttentionBlock(*map(layer, layers), ranges, module.scale, module.heads)

    return Block(struct, (*layers, processor))


def attended(module: nn.Module, x: Tensor, context: Tensor, residual: Tensor | None) -> Tensor | None:
    """An `Attention` of x [B, n, C] to context [B, m, C'], plus residual, in one call of the core.

    None where the core cannot compute it: not these modules, or not this x.
    """
    block = struct_of(module, attention) if computes(x) else None
    return None if block is None else calls.attention_block(block, x, context, residual)


def _range(quantizer: nn.Module) -> tuple[float, float, float]:
    scale, zero_point, spec = quantizer.qparams
    return float(scale), spec.qmin - float(zero_point), spec.qmax - float(zero_point)

"""ctypes mirrors of the structs in `csrc/abi.h` that describe whole blocks, which the core computes in one call.

A struct contains addresses of tensors and the ranges of one time group. It is made when a call first needs that group.
It is kept until something that it was made of changes (`Block`), or until `forget`, which `blocks.fuse` and
`blocks.unfuse` call after layers were packed again.
"""

import ctypes
from collections.abc import Callable, Iterable

import torch
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import Attention
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from quest.kernels.cpu.core import block_calls, calls
from quest.kernels.cpu.integer import computes, dynamic, on_integers

# Classes of attention processors that `attention` can read. quest.quantization adds its own, because kernels do not
# import layers.
PROCESSORS: list[type] = []


# Attributes that a struct contains, or that decide whether the core can compute the block.
READ = {
    nn.GroupNorm: ("eps", "num_groups"),
    nn.LayerNorm: ("eps",),
    nn.Dropout: ("p", "training"),
    nn.Conv2d: ("kernel_size", "stride", "padding", "dilation"),
    Transformer2DModel: ("is_input_continuous", "use_linear_projection"),
    Attention: ("heads", "scale", "rescale_output_factor", "residual_connection"),
    BasicTransformerBlock: ("norm_type", "pos_embed", "_chunk_size", "only_cross_attention"),
    ResnetBlock2D: ("time_embedding_norm", "output_scale_factor", "upsample", "downsample"),
}
UNREAD = ("weight", "codes", "origin")  # tensors of a layer that its kernel does not read
# Hooks that apply to all modules.
everywhere = [torch_module._global_forward_hooks, torch_module._global_forward_pre_hooks]


class Block:
    """A block whose layers all run on integers, with everything that its structs were made of.

    make: makes the struct for the current time group. parts: the block's module, then every module in it.

    Modules can change between two calls. For example, an adapter is put around a layer, a weight gets other memory, or
    a scale gets another value. So each call compares children, tensors, addresses, attributes (READ) and values of
    ranges with what they were, before it uses a struct. The tensors are kept alive. So the addresses in a struct stay
    valid, and no other tensor can get the same address.
    """

    def __init__(self, make: Callable[[], ctypes.Structure], parts: Iterable[nn.Module]):
        self.parts = parts = tuple(dict.fromkeys(parts))
        # Kernels do not import the class of quantizers, so they know them by a buffer.
        quantizers = [q for part in parts for q in part.children() if "zero_point" in q._buffers]
        # Ranges of weights are packed with them.
        quantizers = [q for q in quantizers if q.spec.axis is None or q.spec.dynamic]
        self.make = make
        groups = list({id(q.groups): q.groups for q in quantizers if q.groups is not None}.values())
        self.groups, self.divided = groups[0] if groups else None, len(groups) > 1
        self.structs: dict[int, ctypes.Structure] = {}
        states = [vars(module) for module in (*parts, *quantizers)]
        self.inner = [vars(part) for part in parts[1:]]
        self.hooks = [state[kind] for state in states[1:] for kind in ("_forward_hooks", "_forward_pre_hooks")]
        self.hooks += everywhere
        self.children = [(state["_modules"], dict(state["_modules"])) for state in states if state["_modules"]]
        self.entries = [
            (state[kind], name, value)
            for state in states
            for kind in ("_parameters", "_buffers")
            for name, value in state[kind].items()
            if not ("kernel_name" in state and name in UNREAD)
        ]
        tensors = [value for *_, value in self.entries if value is not None]
        self.kept, self.learned = [t.detach() for t in tensors], [t for t in tensors if isinstance(t, nn.Parameter)]
        self.pointed, self.addresses = tensors, [t.data_ptr() for t in tensors]
        for part in parts:
            read = [name for kind, names in READ.items() if isinstance(part, kind) for name in names]
            self.entries += [(vars(part), n, vars(part)[n]) for n in (*read, "kernel_name") if n in vars(part)]
        self.entries += [(vars(q), name, vars(q)[name]) for q in quantizers for name in ("spec", "groups")]
        self.ranges = [memoryview(t.detach().numpy()) for q in quantizers for t in (q.scale, q.zero_point)]
        self.known = b"".join(self.ranges)

    def __reduce__(self):
        return type(None), ()  # a copy of the module makes its own Block, because addresses must not be copied

    def unchanged(self) -> bool:
        """Return whether modules, tensors, addresses, attributes and ranges are those that structs were made of."""
        try:
            for state, name, value in self.entries:
                if state[name] is not value:
                    return False
        except KeyError:
            return False
        for now, then in self.children:
            if now != then:
                return False
        return list(map(Tensor.data_ptr, self.pointed)) == self.addresses and b"".join(self.ranges) == self.known

    def struct(self) -> ctypes.Structure | None:
        """Return the struct for the current time group; None if there is a hook, another forward, or a gradient."""
        if any(self.hooks) or self.divided:
            return None
        for state in self.inner:
            if "forward" in state:
                return None
        if torch.is_grad_enabled() and any(p.requires_grad for p in self.learned):
            return None
        number = 0 if self.groups is None else self.groups.number
        if number not in self.structs:
            struct = self.structs[number] = self.make()
            struct.kept = self.kept  # keeps tensors alive even if another thread replaces this block
        return self.structs[number]


def forget(denoiser: nn.Module) -> None:
    """Delete the blocks of all modules, so that the next call makes them again."""
    for module in denoiser.modules():
        vars(module).pop("one_call", None)


def struct_of(module: nn.Module, look: Callable[[nn.Module], Block | None]) -> ctypes.Structure | None:
    """Return the struct of a module for the current time group; None if the core cannot compute it.

    look: returns a new Block for the module; None if the core cannot compute it.
    """
    block = vars(module).get("one_call")
    if block is None:
        block = module.one_call = look(module) or False
    elif block and not block.unchanged():
        block = look(module)
        if block is not None:  # otherwise the old block stays: it is still changed, so the next call looks again
            module.one_call = block
    return block.struct() if block else None


def layer(module: nn.Module) -> ctypes.Structure:
    """Return the struct of a quantized layer that runs on integers."""
    return block_calls.layer(module.operand, module.bias, _range(module.input_quantizer, module.weight_shape[1]))


def norm(module: nn.Module) -> ctypes.Structure:
    """Return the struct of a group norm or a layer norm."""
    if isinstance(module, nn.GroupNorm):
        return block_calls.norm(module.weight, module.bias, module.eps, module.num_channels, module.num_groups)
    return block_calls.norm(module.weight, module.bias, module.eps, module.normalized_shape[0])


def attention(module: nn.Module) -> Block | None:
    """Return the Block of diffusers' `Attention` with a processor in PROCESSORS; None if the core cannot compute it."""
    processor, out = module.processor, module.to_out
    layers = (module.to_q, module.to_k, module.to_v, out[0])
    if type(processor) not in PROCESSORS or processor.kernel_name != "integer" or not on_integers(*layers):
        return None
    if len(out) != 2 or not idle(out[1]) or out[0].out_features != layers[0].in_features:
        return None
    more = (getattr(module, name, None) for name in ("norm_q", "norm_k", "group_norm", "spatial_norm", "norm_cross"))
    if module.rescale_output_factor != 1 or any(part is not None for part in more):
        return None

    def struct():
        ranges = tuple(_range(q) for q in (processor.q, processor.k, processor.v, processor.p))
        return block_calls.AttentionBlock(*map(layer, layers), ranges, module.scale, module.heads)

    return Block(struct, (module, *layers, processor, out, out[1]))


def attended(module: nn.Module, x: Tensor, context: Tensor, residual: Tensor | None) -> Tensor | None:
    """Compute an `Attention` of x [B, n, C] to context [B, m, C'], plus residual, in one call of the core.

    Returns None if the core cannot compute it for these modules or this x.
    """
    block = struct_of(module, attention) if computes(x) else None
    return None if block is None else block_calls.attention_block(block, x, context, residual)


def idle(dropout: nn.Module) -> bool:
    """Return whether a dropout returns its input unchanged."""
    return type(dropout) is nn.Dropout and not (dropout.training and dropout.p)


def _range(quantizer: nn.Module, channels: int = 0) -> calls.Range:
    """Return the range of the current time group. channels: of the input, which a dynamic format can divide."""
    number, spec = 0 if quantizer.groups is None else quantizer.groups.number, quantizer.spec
    scale, zero_point = quantizer.scale[number], quantizer.zero_point[number]
    return calls.range_of(scale, zero_point, spec.qmin, spec.qmax, dynamic(spec, channels))

"""What of a denoiser is reconstructed together, and the forward pass that stops inside every such unit."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten
from tqdm import tqdm

from quest.diffusion.calibration_set import CalibrationSet
from quest.diffusion.denoisers import hooked, overridden
from quest.quantization.attention import QuantAttention
from quest.quantization.layers import QuantLayer, attentions, input_quantizers, quant_layers
from quest.quantization.quantizer import Quantizer
from quest.runtime import memory
from quest.runtime.memory import Waiting

ATEN = torch.ops.aten
WEIGHTS = {ATEN.addmm.default: (0, 2), ATEN.mm.default: (1,), ATEN.embedding.default: (0,)}  # among the arguments
ALONE = (QuantLayer, QuantAttention)  # kinds of modules, where each layer and each attention's products are a unit
KINDS = (ResnetBlock2D, BasicTransformerBlock, *ALONE)  # of modules that are reconstructed together
CHUNK = 64  # rows of one forward pass of a unit where nothing is learned, or fewer where memory is short
ALIVE = 8  # tensors as large as a layer's largest output that are in memory in such a pass


@dataclass(frozen=True)
class Unit:
    """What is reconstructed together, with its quantized layers and activation quantizers by name.

    modules: one, or several that read the same input; their outputs are concatenated. arrange: turns the output for a
    number of rows into the layout in which the papers' networks have it, dimension 1 of images being channels.
    """

    name: str
    modules: dict[str, nn.Module]
    layers: dict[str, QuantLayer]
    quantizers: dict[str, Quantizer]
    arrange: Callable[[Tensor, int], Tensor]


def _as_it_is(y: Tensor, _rows: int) -> Tensor:
    return y


def _channels_first(y: Tensor, _rows: int) -> Tensor:
    """[B, n, C] -> [B, C, n]: a linear layer here is a 1-d convolution there."""
    return y.transpose(1, 2)


def _heads_as_channels(y: Tensor, rows: int) -> Tensor:
    """[B * heads, n, d] -> [B, heads * d, n]."""
    return y.unflatten(0, (rows, -1)).transpose(2, 3).flatten(1, 2)


@torch.no_grad()
def units(denoiser: nn.Module, inputs: dict[str, Tensor], kinds: tuple[type, ...] = KINDS) -> list[Unit]:
    """The units of a quantized denoiser in the order in which a forward pass on `inputs` meets them.

    As in Q-Diffusion (arXiv:2302.04304) with quantized activations: every ResnetBlock2D with its time embedding
    projection, every BasicTransformerBlock, every other quantized layer alone. Attention outside a transformer block is
    no unit: to_q, to_k and to_v together are (CompVis has them as one layer), to_out is, and the two products are a
    unit without weights. kinds: of modules that are units; those inside of others of them are none.
    """
    found: dict[str, nn.Module] = {}
    for name, module in denoiser.named_modules():
        if isinstance(module, kinds) and not any(name.startswith(f"{outer}.") for outer in found):
            found[name] = module
    order: list[str] = []
    handles = [m.register_forward_pre_hook(lambda *_, n=n: order.append(n)) for n, m in found.items()]
    with hooked(handles):
        denoiser(**inputs)
    attention = {n: m for n, m in attentions(denoiser) if f"{n}.processor" in found}
    members: dict[str, list[str]] = {}
    for name in dict.fromkeys(order):
        parent, _, child = name.rpartition(".")
        self_attention = parent in attention and not attention[parent].is_cross_attention
        together = self_attention and child in ("to_q", "to_k", "to_v")
        members.setdefault(f"{parent}.qkv" if together else name, []).append(name)
    result = []
    for unit, names in members.items():
        modules = {n: found[n] for n in names}
        layers = {f"{n}.{sub}".rstrip("."): m for n in names for sub, m in quant_layers(found[n])}
        quantizers = {f"{n}.{sub}": q for n in names for sub, q in input_quantizers(found[n]).items()}
        arrange = _as_it_is
        if isinstance(modules[names[0]], QuantAttention):
            arrange = _heads_as_channels
        elif any(unit.startswith(f"{n}.") for n in attention):
            arrange = _channels_first
        result.append(Unit(unit, modules, layers, quantizers, arrange))
    return result


@torch.no_grad()
def walk(
    denoiser: nn.Module,
    calibration: CalibrationSet,
    rows: Tensor,
    visit: Callable,
    stage: str,
    waiting: Waiting,
    kinds: tuple[type, ...] = KINDS,
) -> None:
    """One forward pass on calibration rows, in which visit(unit, forwards, name, *args, **kwargs) stands in for every
    unit's modules.

    forwards: what the unit's modules compute, by name. name: which of them is called. All tensors of the pass lie on
    the CPU, as `waiting` allocates them; what happens between units is `Streamed`.
    `forward` and not a call of the denoiser: a pass over all timesteps is in no time group.
    """
    first, inputs = calibration.inputs(rows[:1]), tree_map(Tensor.cpu, calibration.inputs(rows))
    found = units(denoiser, first, kinds)
    waiting.chunk = chunk_rows(denoiser, first)
    between = Streamed(len(rows), denoiser.device, waiting)
    bar = tqdm(total=sum(len(unit.modules) for unit in found), desc=stage, mininterval=5)

    def visited(*args, **kwargs):
        between.__exit__(None, None, None)
        try:
            output = visit(*args, **kwargs)
        finally:
            between.__enter__()
        bar.update()
        return output

    stand_ins = {}
    for unit in found:
        forwards = {n: m.forward for n, m in unit.modules.items()}
        stand_ins |= {m: partial(visited, unit, forwards, n) for n, m in unit.modules.items()}
    with overridden("forward", stand_ins), bar, between:
        denoiser.forward(**inputs)


@torch.no_grad()
def chunk_rows(denoiser: nn.Module, inputs: dict[str, Tensor], most: int | None = None) -> int:
    """Rows of one forward pass of a unit: `most` (None: CHUNK), or as many as fit into half of the memory.

    inputs: of one row.
    """
    largest = 1

    def look(_module, _args, output):
        nonlocal largest
        largest = max(largest, output.nbytes)

    with hooked(m.register_forward_hook(look) for m in denoiser.modules() if isinstance(m, nn.Linear | nn.Conv2d)):
        denoiser(**inputs)
    room = int(memory.SHARE * memory.budget(inputs["timestep"].device.type))
    return max(1, min(CHUNK if most is None else most, room // (ALIVE * largest)))


class Streamed(TorchDispatchMode):
    """While inside, an operation on calibration rows takes a chunk of them at a time to `device`; its results wait.

    A tensor holds rows if it has two dimensions or more, and the first is the number of rows or a multiple; weights of
    layers that are called outside of their unit hold none (DiT embeds with those of its first block). Views and what
    changes its argument are computed as they are; every other operation must treat rows alike, as a denoiser does.
    """

    def __init__(self, rows: int, device: torch.device, waiting: Waiting):
        super().__init__()
        self.rows, self.device, self.waiting = rows, device, waiting

    def __torch_dispatch__(self, operation, _types, args=(), kwargs=None):
        values, tree = tree_flatten((args, kwargs or {}))
        weights = WEIGHTS.get(operation, ())
        rows = {
            i
            for i, v in enumerate(values)
            if isinstance(v, Tensor) and v.ndim > 1 and i not in weights and self._holds_rows(v)
        }
        as_it_is = operation.is_view or operation._schema.is_mutable or operation is ATEN._unsafe_view.default
        if as_it_is or not rows or self.rows <= self.waiting.chunk and self.device.type == "cpu":
            return operation(*args, **(kwargs or {}))

        def run(chunk: Tensor):
            own = [_take(v, chunk, self.rows) if i in rows else v for i, v in enumerate(values)]
            own = [v.to(self.device) if isinstance(v, Tensor) else v for v in own]
            if operation is ATEN.native_group_norm.default:
                own[3] = len(own[0])  # the number of images, which it is told beside them
            args, kwargs = tree_unflatten(own, tree)
            return operation(*args, **kwargs)

        return fill(run, torch.arange(self.rows, device="cpu"), self.rows, self.waiting)

    def _holds_rows(self, value: Tensor) -> bool:
        return len(value) > 0 and len(value) % self.rows == 0


def call_modules(forwards: list[Callable], rows: Tensor, *, args: tuple, kwargs: dict, n: int, device) -> Tensor:
    """The outputs of some modules side by side, on some of the n rows that their arguments hold, on `device`."""

    def take(value):
        value = _take(value, rows, n)
        return value.to(device) if isinstance(value, Tensor) else value

    args, kwargs = [take(a) for a in args], {k: take(v) for k, v in kwargs.items()}
    return together([forward(*args, **kwargs) for forward in forwards])


def side_by_side(outputs: list[Tensor], rows: Tensor, n: int, device) -> Tensor:
    """Some of the n rows of outputs that wait, on `device`."""
    return together([_take(output, rows, n).to(device) for output in outputs])


def together(outputs: list[Tensor]) -> Tensor:
    """Outputs side by side, along the last dimension."""
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, -1)


def _take(value, rows: Tensor, n: int):
    """Rows of a tensor whose first dimension holds n rows of one or, in attention, several heads; else the value."""
    if not isinstance(value, Tensor) or not value.ndim:
        return value
    if len(value) == n:
        return value[rows]
    return value.unflatten(0, (n, -1))[rows].flatten(0, 1)


def chunked(run: Callable[[Tensor], Tensor], rows: Tensor, size: int) -> Tensor:
    """What `run` gives for these rows, `size` of them at a time."""
    return torch.cat([run(chunk) for chunk in rows.split(size)])


def fill(run: Callable, rows: Tensor, n: int, waiting: Waiting, into=None):
    """What `run` gives for consecutive rows, a chunk of them at a time, in their place among n rows that wait.

    run(rows) -> a tensor or a tuple of them. into: what an earlier call returned, whose other rows stay as they are.
    """
    for chunk in rows.split(waiting.chunk):
        results, tree = tree_flatten(run(chunk))
        if into is None:
            into = tree_unflatten([waiting.rows(part, len(part) // len(chunk) * n) for part in results], tree)
        for whole, part in zip(tree_flatten(into)[0], results, strict=True):
            heads = len(part) // len(chunk)
            whole[chunk[0] * heads : (chunk[-1] + 1) * heads] = part
    return into

"""Size, work and training cost of a quantized denoiser. Two rows of a table can be compared if these are equal.

Papers that write "W4A8" keep different layers in float, learn different parameters and use different granularities of
activations. All of this is measured on the denoiser itself and written into its checkpoint.
"""

import math
from collections.abc import Iterable

import torch
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn

from quest.affine import FLOAT
from quest.diffusion.calibration_set import CalibrationSet
from quest.diffusion.denoisers import hooked
from quest.quantization import packing
from quest.quantization.layer_names import layer_class
from quest.quantization.layers import QuantLayer, attentions, input_quantizers, quant_layers
from quest.quantization.overhead import overhead
from quest.quantization.quantizer import Quantizer
from quest.quantization.splitting import split_layers
from quest.runtime.provenance import resident_memory


@torch.no_grad()
def macs(denoiser: nn.Module, inputs: dict[str, Tensor]) -> dict[str, int]:
    """Count the multiply-accumulates of one denoiser call on one sample, by layer.

    Both matrix products of an attention count under the name of its `processor`. inputs: keyword arguments of the
    denoiser, with batch size 1.
    """
    counted: dict[str, int] = {}

    def layer(name):
        def hook(module, _args, output):
            # An output value is a dot product with a row of the weight.
            per_value = math.prod(module.weight.shape[1:])
            counted[name] = counted.get(name, 0) + output.numel() * per_value

        return hook

    def products(name):
        def hook(module, args, kwargs):
            x = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
            context = kwargs.get("encoder_hidden_states", args[1] if len(args) > 1 else None)
            tokens = x[0, 0].numel() if x.ndim == 4 else x.shape[1]
            keys = tokens if context is None else context.shape[1]
            if context is not None and module.added_kv_proj_dim is not None:
                tokens = keys = tokens + keys  # joint attention: both streams attend to both
            counted[name] = counted.get(name, 0) + 2 * tokens * keys * module.to_q.out_features

        return hook

    handles = []
    for name, module in denoiser.named_modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            handles.append(module.register_forward_hook(layer(name)))
        elif isinstance(module, Attention):
            handles.append(module.register_forward_pre_hook(products(f"{name}.processor"), with_kwargs=True))
    with hooked(handles):
        denoiser(**inputs)
    return counted


def bops(denoiser: nn.Module, work: dict[str, int]) -> int:
    """Count the bit operations of one denoiser call on one sample: multiply-accumulates times bits of both operands.

    For example, 1000 multiply-accumulates of 4-bit weights with 8-bit inputs are 32,000 bit operations
    (arXiv:2005.07093). The sum runs over layers (weight bits times input bits) and the two products of each attention
    (q bits times k bits, probability bits times v bits). Operands that are not quantized have 32 bits. Norms,
    activations, softmax and additions are not multiply-accumulates and do not count. work: the result of `macs`.

    Papers count differently: Q-Diffusion (arXiv:2302.04304) counts a multiply-accumulate as two operations, and float32
    as 23 bits.
    """
    layers = dict(quant_layers(denoiser))
    total = 0
    for name, count in work.items():
        if name.endswith(".processor"):
            q, k, v, p = _product_bits(denoiser.get_submodule(name.removesuffix(".processor")))
            total += count // 2 * (q * k + p * v)  # `macs` adds up the two products, which have equal size
        elif name in layers:
            total += round(count * operand_bits(layers[name]) * layers[name].input_quantizer.spec.bits)
        else:
            total += count * FLOAT * FLOAT
    return total


def operand_bits(layer: QuantLayer) -> float:
    """Return the bits of the weights that a layer multiplies; a rotation of codes adds up as many as its block has.

    Where output channels have bits of their own, their mean.
    """
    bits, prologue = layer.weight_quantizer.spec.mean_bits, layer.prologue
    wider = bits < FLOAT and prologue is not None and prologue.single
    return bits + round(math.log2(prologue.block)) if wider else bits


def stored(denoiser: nn.Module) -> dict[str, dict[str, int]]:
    """Count the bytes of a denoiser's packed file without its header: {kind: {class of layers: bytes}}.

    Kinds are those of KINDS: codes of quantized weights, scales of weights and of activations (with zero points), and
    floats. Classes are those of `layer_class`. The denoiser may lie on the meta device.
    """
    layers = dict(quant_layers(denoiser))
    found: dict[str, dict[str, int]] = {kind: {} for kind in KINDS}
    for name, value in denoiser.state_dict().items():
        layer = layers.get(name.removesuffix(".weight")) if name.endswith(".weight") else None
        coded = layer is not None and layer.weight_quantizer.spec.bits < FLOAT
        spec = layer.weight_quantizer.spec if coded else None
        size = packing.nbytes(tuple(value.shape), spec) if coded else value.numel() * value.element_size()
        of_kind = found["codes" if coded else kind(name)]
        place = tensor_class(name)
        of_kind[place] = of_kind.get(place, 0) + size
    return found


KINDS = {  # kinds of a checkpoint's tensors, and their names in texts
    "codes": "codes of weights",
    "weight scales": "scales and zero points of weights",
    "activation scales": "scales and zero points of activations",
    "branches": "low-rank branches, float16",
    "float": "float32",
}


def kind(name: str) -> str:
    """The kind of a checkpoint's tensor, one of KINDS, by its name."""
    module, _, leaf = name.rpartition(".")
    if leaf == "codes":
        return "codes"
    if module.endswith(".branch"):
        return "branches"
    if leaf == "multiplier":  # of a prologue: the scales of input channels
        return "activation scales"
    if leaf not in ("scale", "zero_point"):
        return "float"
    return "weight scales" if module.endswith("weight_quantizer") else "activation scales"


def tensor_class(name: str) -> str:
    """The class of the layer to which a checkpoint's tensor belongs, by its name; "norm" for normalization layers."""
    layer = name.rpartition(".")[0]
    for part in (".weight_quantizer", ".input_quantizer", ".output_quantizer", ".prologue", ".branch"):
        layer = layer.removesuffix(part)
    if ".processor." in f"{layer}.":
        return "attention products"
    whole = layer.removesuffix(".hidden").removesuffix(".skip")  # of a split convolution
    if "norm" in whole.rpartition(".")[2]:
        return "norm"
    return layer_class(whole)


def parameters(denoiser: nn.Module) -> int:
    """Count the parameters of the denoiser itself, without the scales of quantizers."""
    frozen = sum(math.prod(layer.weight_shape) for _, layer in quant_layers(denoiser) if layer.is_frozen)
    scales = _numel(m.scale for m in denoiser.modules() if isinstance(m, Quantizer))
    return _numel(denoiser.parameters()) - scales + frozen


def footprint(denoiser: nn.Module, work: dict[str, int]) -> dict[str, float]:
    """Size and work in a row of a table: parameters, macs, bops, bytes (of the packed file), effective_bits.

    effective_bits: stored bits per parameter, with scales and all that stays float. work: the result of `macs`.
    """
    count, size = parameters(denoiser), sum(sum(of_kind.values()) for of_kind in stored(denoiser).values())
    return {
        "parameters": count,
        "macs": sum(work.values()),
        "bops": bops(denoiser, work),
        "bytes": size,
        "effective_bits": 8 * size / count,
    }


def mixed_bits(denoiser: nn.Module) -> tuple[float, dict[str, QuantLayer]]:
    """Return the mean bits of the weights in layers whose output channels have bits of their own, and these layers."""
    mixed = {n: m for n, m in quant_layers(denoiser) if m.weight_quantizer.spec.widths is not None}
    sizes = {n: math.prod(m.weight_shape) for n, m in mixed.items()}
    bits = sum(sizes[n] * m.weight_quantizer.spec.mean_bits for n, m in mixed.items())
    return (bits / sum(sizes.values()) if mixed else 0.0), mixed


def _bits(layer: QuantLayer) -> tuple[int, int]:
    """Bits of a layer's weight, and of the activation that it quantizes: its input or its output."""
    activation = layer.output_quantizer or layer.input_quantizer
    return layer.weight_quantizer.spec.bits, activation.spec.bits


def _product_bits(module: Attention) -> list[int]:
    """Bits of q, k, v and of the probabilities."""
    quantizers = [getattr(module.processor, n, None) for n in "qkvp"]
    return [q.spec.bits if isinstance(q, Quantizer) else FLOAT for q in quantizers]


def summary(denoiser: nn.Module, w: int, a: int, calibration: CalibrationSet) -> dict:
    """Describe a quantized denoiser beyond its bits, in a dictionary for JSON:

    - weights, activations: granularities.
    - footprint: size and work, see `footprint`, and work beside the products, see `overhead`.
    - quantized_at: "input" or "output", the side of a layer at which its activation is quantized.
    - split: number of layers that quantize the two parts of a concatenated input separately.
    - mixed: only where output channels have bits of their own: the number of such layers, and the mean over weights.
    - kept: layers with more than w or a bits, by their bits ("w32a32" is float): number, names, share of the denoiser's
      parameters and of its multiply-accumulates.
    - attention: bits of q, k and v and of the probabilities, and the share of the two products.
    - calibration: rows, trajectories, timesteps, and halves of a call (2 with guidance).
    - stages: what was optimized, see `record`.
    """
    inputs = calibration.inputs(torch.tensor([0], dtype=torch.long, device="cpu"))
    work = macs(denoiser, inputs)
    all_work, all_parameters = sum(work.values()), parameters(denoiser)
    kept: dict[str, dict] = {}
    mean, mixed = mixed_bits(denoiser)
    for name, layer in quant_layers(denoiser):
        bits = (w, _bits(layer)[1]) if name in mixed else _bits(layer)
        if bits[0] > w or bits[1] > a:
            row = kept.setdefault("w{}a{}".format(*bits), {"layers": 0, "parameters": 0.0, "macs": 0.0, "names": []})
            row["layers"] += 1
            weight = math.prod(layer.weight_shape) * layer.is_frozen  # codes are no parameter
            row["parameters"] += (weight + _numel(layer.parameters(recurse=False))) / all_parameters
            row["macs"] += work.get(name, 0) / all_work
            row["names"].append(name)
    products = sorted({(max(qkv), p) for *qkv, p in (_product_bits(m) for _, m in attentions(denoiser))})
    return {
        **granularity(denoiser),
        "footprint": footprint(denoiser, work) | overhead(denoiser, inputs),
        "quantized_at": "output" if any(m.output_quantizer for _, m in quant_layers(denoiser)) else "input",
        "split": len(split_layers(denoiser)),
        **({"mixed": {"layers": len(mixed), "mean_bits": mean}} if mixed else {}),
        "kept": kept,
        "attention": {
            "qkv_bits": [qkv for qkv, _ in products],
            "softmax_bits": [p for _, p in products],
            "macs": sum(v for n, v in work.items() if n.endswith(".processor")) / all_work,
        },
        "calibration": {
            "rows": len(calibration),
            "trajectories": len(calibration.trajectory.unique()),
            "timesteps": len(calibration.timesteps),
            "halves": calibration.calls().shape[1],
        },
        "stages": getattr(denoiser, "stages", []),
    }


def record(denoiser: nn.Module, stage: str, learned: Iterable[Tensor], iterations: int, batch: int) -> None:
    """Record a stage of optimization on the denoiser.

    learned: the tensors that it learned, whose values are counted. iterations: of each unit. batch: rows per iteration.
    """
    row = {"stage": stage, "parameters": _numel(learned), "iterations": iterations, "batch": batch}
    denoiser.stages = [*getattr(denoiser, "stages", []), row]


def peak_memory() -> int:
    """The peak memory of this process so far, in MB (1e6 bytes): of the GPU if it used one, else resident memory."""
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return round(torch.cuda.max_memory_allocated() / 1e6)
    return resident_memory()


def _numel(tensors: Iterable[Tensor]) -> int:
    return sum(t.numel() for t in tensors)


def granularity(denoiser: nn.Module) -> dict[str, str]:
    """The granularities of the weight scales and of the activation scales, in words."""
    return {
        "weights": _granularity(layer.weight_quantizer for _, layer in quant_layers(denoiser)),
        "activations": _granularity(input_quantizers(denoiser).values()),
    }


def _granularity(quantizers: Iterable[Quantizer]) -> str:
    """Return "per tensor", "per channel 0, 20 time groups" and the like; different ones are joined by "; "."""
    quantizers = [q for q in quantizers if q.spec.bits < FLOAT]
    found = {q.spec.granularity + (f", {len(q.scale)} time groups" if len(q.scale) > 1 else "") for q in quantizers}
    return "; ".join(sorted(found)) or "float"

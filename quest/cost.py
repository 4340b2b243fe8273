"""What a quantized denoiser is and what it took to make: what two rows of a table must share to be comparable.

Papers that write "W4A8" keep different layers in float, learn different parameters and give activations different
granularities. All of it is measured on the denoiser itself and stands in its checkpoint.
"""

import resource
from collections.abc import Iterable

import torch
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn

from quest.affine import FLOAT
from quest.calibration import CalibrationSet
from quest.layers import Keep, QuantLayer, attentions, input_quantizers, layer_bits, quant_layers, split_layers
from quest.quantizer import Quantizer


@torch.no_grad()
def macs(denoiser: nn.Module, inputs: dict[str, Tensor]) -> dict[str, int]:
    """Multiply-accumulates of one denoiser call on one sample, by layer.

    Both matrix products of an attention stand under the name of its `processor`. inputs: keyword arguments of the
    denoiser, batch size 1.
    """
    counted: dict[str, int] = {}

    def layer(name):
        def hook(module, _args, output):
            per_value = module.weight[0].numel()  # an output value is one dot product with a row of the weight
            counted[name] = counted.get(name, 0) + output.numel() * per_value

        return hook

    def products(name):
        def hook(module, args, kwargs):
            x = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
            context = kwargs.get("encoder_hidden_states", args[1] if len(args) > 1 else None)
            tokens = x[0, 0].numel() if x.ndim == 4 else x.shape[1]
            keys = tokens if context is None else context.shape[1]
            counted[name] = counted.get(name, 0) + 2 * tokens * keys * module.to_q.out_features

        return hook

    handles = []
    for name, module in denoiser.named_modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            handles.append(module.register_forward_hook(layer(name)))
        elif isinstance(module, Attention):
            handles.append(module.register_forward_pre_hook(products(f"{name}.processor"), with_kwargs=True))
    try:
        denoiser(**inputs)
    finally:
        for handle in handles:
            handle.remove()
    return counted


def undeclared(denoiser: nn.Module, w: int, a: int, keep: Keep, softmax_bits: int = 8) -> list[str]:
    """Layers and attention products with other bits than w, a and `keep` say, each as "name: bits, not bits".

    A Linear, Conv2d or attention that is not quantized at all is among them.
    """
    found = {n: _bits(m) for n, m in quant_layers(denoiser)}
    wrong = []
    for name, module in denoiser.named_modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            whole = name.removesuffix(".hidden").removesuffix(".skip")  # of a split convolution
            bits, expected = found.get(name, (FLOAT, FLOAT)), layer_bits(whole, w, a, keep)
        elif isinstance(module, Attention):
            name = f"{name}.processor"
            bits = _attention_bits(module)
            expected = layer_bits(name, a, max(softmax_bits, a), keep)
        else:
            continue
        if bits != expected:
            wrong.append(f"{name}: {bits}, not {expected}")
    return wrong


def _bits(layer: QuantLayer) -> tuple[int, int]:
    """Bits of a layer's weight and of the activation it quantizes, at its input or at its output."""
    activation = layer.output_quantizer or layer.input_quantizer
    return layer.weight_quantizer.spec.bits, activation.spec.bits


def _attention_bits(module: Attention) -> tuple[int, int]:
    """Bits of q, k and v (the most of the three), and of the probabilities."""
    quantizers = [getattr(module.processor, n, None) for n in "qkvp"]
    bits = [q.spec.bits if isinstance(q, Quantizer) else FLOAT for q in quantizers]
    return max(bits[:3]), bits[3]


def summary(denoiser: nn.Module, w: int, a: int, calibration: CalibrationSet) -> dict:
    """What a table row must say about a quantized denoiser beside its bits, fit for JSON.

    weights, activations: granularities. kept: layers with more than w and a bits, by their bits ("w32a32" is float):
    count, names, share of the denoiser's parameters and of its multiply-accumulates. attention: bits of q, k, v and of
    the probabilities, and the products' share. quantized_at: which side of a layer. split: layers that quantize the two
    parts of a concatenated input apart. calibration: rows, trajectories, timesteps, halves of a call (2 under
    guidance). stages: what was optimised, see `record`.
    """
    work = macs(denoiser, calibration.inputs(torch.tensor([0])))
    all_work, all_parameters = sum(work.values()), _numel(denoiser.parameters()) - _numel(_scales(denoiser))
    kept: dict[str, dict] = {}
    for name, layer in quant_layers(denoiser):
        bits = _bits(layer)
        if bits[0] > w or bits[1] > a:
            row = kept.setdefault("w{}a{}".format(*bits), {"layers": 0, "parameters": 0.0, "macs": 0.0, "names": []})
            row["layers"] += 1
            row["parameters"] += _numel(layer.parameters(recurse=False)) / all_parameters
            row["macs"] += work.get(name, 0) / all_work
            row["names"].append(name)
    products = sorted({_attention_bits(m) for _, m in attentions(denoiser)})
    return {
        "weights": _granularity(layer.weight_quantizer for _, layer in quant_layers(denoiser)),
        "activations": _granularity(input_quantizers(denoiser).values()),
        "quantized_at": "output" if any(m.output_quantizer for _, m in quant_layers(denoiser)) else "input",
        "split": len(split_layers(denoiser)),
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
    """Note a stage of optimisation on the denoiser: how many values it learned, iterations (of every unit), batch."""
    row = {"stage": stage, "parameters": _numel(learned), "iterations": iterations, "batch": batch}
    denoiser.stages = [*getattr(denoiser, "stages", []), row]


def peak_memory() -> int:
    """Most memory this process has held so far, in MB (1e6 bytes): on the GPU where it used one, else resident."""
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return round(torch.cuda.max_memory_allocated() / 1e6)
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6)  # Linux counts in KiB


def _numel(tensors: Iterable[Tensor]) -> int:
    return sum(t.numel() for t in tensors)


def _scales(denoiser: nn.Module) -> Iterable[Tensor]:
    return (m.scale for m in denoiser.modules() if isinstance(m, Quantizer))


def _granularity(quantizers: Iterable[Quantizer]) -> str:
    """ "per tensor", "per channel 0, 20 time groups", ...; the different ones of a denoiser joined by "; "."""
    found = set()
    for q in quantizers:
        if q.spec.bits == FLOAT:
            continue
        axis = "per tensor" if q.spec.axis is None else f"per channel {q.spec.axis}"
        found.add(axis if len(q.scale) == 1 else f"{axis}, {len(q.scale)} time groups")
    return "; ".join(sorted(found)) or "float"

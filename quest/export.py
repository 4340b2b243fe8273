"""Export a quantized denoiser for other runtimes: ONNX with QuantizeLinear and DequantizeLinear on bytes.

Each quantizer becomes a pair of these operators, each quantized weight its codes and a DequantizeLinear. A runtime may
then multiply integers. Exported are U-Nets whose activations have one scale per tensor and one time group. What the
format cannot hold is refused with its name: a scale for each time group or channel, more than 8 bits.

Codes of fewer than 8 bits are clipped before they are rounded, so that one operator on bytes serves all widths; codes
of weights take a byte each, or four in a layer with an output whose zero point no byte holds. OpenVINO's own format
(IR) is made from the ONNX. Needs the extra `export`
(`pip install 'quest-suite[export]'`).
"""

import copy
import importlib.util
import os
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from quest.affine import FLOAT, QuantSpec
from quest.diffusion.denoisers import denoiser_of
from quest.kernels import reference
from quest.quantization.attention import QuantAttention
from quest.quantization.layers import QuantConv2d, QuantLayer, attentions, input_quantizers, quant_layers, replace
from quest.quantization.quantizer import Quantizer

# Of the largest output. Float sums differ in their last digits. A value at a tie then takes the neighbouring code, and
# so do values of later layers; a change of the input by one part in a million does the same on the reference kernel.
TOLERANCE = 0.05
TOKENS = 8  # of the condition in the call that is traced; any other number works
# Keys of the configuration of U-Nets with a further input: classes, sizes and crops, images, a guidance scale (LCM).
FURTHER = ("class_embed_type", "addition_embed_type", "encoder_hid_dim_type", "num_class_embeds", "time_cond_proj_dim")
NEEDED = {  # packages by suffix
    ".onnx": ("onnx", "onnxscript", "onnxruntime"),
    ".xml": ("onnx", "onnxscript", "openvino"),
}


@torch.library.custom_op("quest::export_input", mutates_args=())
def on_bytes(x: Tensor, scale: Tensor, zero_point: Tensor, low: float, high: float) -> Tensor:
    """Clip x to [low, high], quantize it to bytes, and dequantize it. scale [], zero_point [] (uint8)."""
    codes = (x.clamp(low, high) / scale).round() + zero_point
    return (codes.clamp(0, 255) - zero_point) * scale


@torch.library.custom_op("quest::export_weight", mutates_args=())
def of_codes(codes: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    """Dequantize codes [O, ...], uint8 or int32, with a scale and a zero point for each output channel, [O]."""
    shape = (-1,) + (1,) * (codes.ndim - 1)
    return (codes.float() - zero_point.reshape(shape)) * scale.reshape(shape)


@on_bytes.register_fake
def _(x, scale, zero_point, low, high):
    return torch.empty_like(x)


@of_codes.register_fake
def _(codes, scale, zero_point):
    return torch.empty(codes.shape, dtype=scale.dtype, device=codes.device)


class _Bytes(nn.Module):
    """A quantizer of activations with bytes as codes. Raises ValueError, which names it, for what they cannot hold."""

    def __init__(self, quantizer: Quantizer, name: str):
        super().__init__()
        self.float = quantizer.spec.bits == FLOAT
        if self.float:
            return
        _whole_numbers(quantizer.spec, name)
        if len(quantizer.scale) > 1:
            raise ValueError(
                f"{name}: {len(quantizer.scale)} time groups; the format holds one scale per tensor: quantize with "
                "time_groups: 1, or by a method without them (rtn-mse, q-diffusion)"
            )
        if quantizer.scale.numel() > 1:
            raise ValueError(f"{name}: a scale for each channel; the format holds one per tensor (granularity)")
        scale, zero_point = quantizer.scale.detach().flatten()[0], int(quantizer.zero_point.flatten()[0])
        low, high = quantizer.spec.qmin - zero_point, quantizer.spec.qmax - zero_point  # in steps
        self.register_buffer("scale", scale.clone())
        self.register_buffer("zero_point", _byte(torch.tensor(-low), high - low, name))
        self.low, self.high = low * scale.item(), high * scale.item()

    def forward(self, x: Tensor) -> Tensor:
        return x if self.float else on_bytes(x, self.scale, self.zero_point, self.low, self.high)


class _Layer(nn.Module):
    """A quantized layer on these operators."""

    kernel_name = "reference"

    def __init__(self, layer: QuantLayer, name: str):
        super().__init__()
        for part in ("prologue", "branch"):
            if getattr(layer, part) is not None:
                raise ValueError(f"{name}: it has a {part}, which the format does not hold; quantize by another method")
        _whole_numbers(layer.weight_quantizer.spec, f"{name}.weight")
        self.input = _Bytes(layer.input_quantizer, f"{name}.input")
        self.output = None if layer.output_quantizer is None else _Bytes(layer.output_quantizer, f"{name}.output")
        self.bias = layer.bias
        names = ("stride", "padding", "dilation", "groups")
        self.conv = {n: getattr(layer, n) for n in names} if isinstance(layer, QuantConv2d) else None
        spec = layer.weight_quantizer.spec
        if spec.bits == FLOAT:
            self.register_buffer("weight", layer.weight.detach())
            return
        weight, levels = layer.qweight, spec.qmax - spec.qmin
        each = (len(weight.codes),)
        scale, zero_point = weight.scale.detach().flatten(), weight.zero_point.detach().flatten() - spec.qmin
        codes, zero_point = weight.codes.detach() - spec.qmin, zero_point.expand(each)
        self.weight = None
        self.register_buffer("scale", scale.expand(each).clone())
        beyond = zero_point.min() < 0 or zero_point.max() > 255
        if levels <= 255 and beyond:  # of an output whose weights have one sign: in four bytes
            codes = (codes - zero_point.view(-1, *[1] * (codes.ndim - 1))).to(torch.int32)
            zero_point = torch.zeros(each, dtype=torch.int32)
        else:
            codes, zero_point = (_byte(values, levels, f"{name}.weight") for values in (codes, zero_point))
        self.register_buffer("codes", codes)
        self.register_buffer("zero_point", zero_point)

    def forward(self, x: Tensor) -> Tensor:
        weight = of_codes(self.codes, self.scale, self.zero_point) if self.weight is None else self.weight
        x = self.input(x)
        y = F.linear(x, weight, self.bias) if self.conv is None else F.conv2d(x, weight, self.bias, **self.conv)
        return y if self.output is None else self.output(y)


class _Attention(QuantAttention):
    """Quantized attention on these operators."""

    def __init__(self, attention: QuantAttention, name: str):
        super().__init__(attention.q.spec, attention.p.spec)
        self.q, self.k, self.v, self.p = (_Bytes(getattr(attention, leaf), f"{name}.{leaf}") for leaf in "qkvp")

    def forward(self, q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None = None) -> Tensor:
        p = reference.probabilities(self.q(q), self.k(k), scale, mask)
        return torch.bmm(self.p(p), self.v(v))


def _whole_numbers(spec: QuantSpec, name: str) -> None:
    """Raise ValueError for a format that has other codes than whole numbers, or scales of groups or of tensors."""
    if spec.dynamic or spec.table is not None or spec.group is not None or spec.shifts is not None:
        raise ValueError(
            f"{name}: scales and codes {spec.granularity}; the format holds static scales and whole numbers"
        )


def _byte(values: Tensor, levels: int, name: str) -> Tensor:
    if levels > 255 or values.min() < 0 or values.max() > 255:
        raise ValueError(f"{name}: codes or zero points that a byte cannot hold; the format takes at most 8 bits")
    return values.to(torch.uint8)


def exportable(denoiser: nn.Module) -> nn.Module:
    """Copy a quantized denoiser, on the reference kernel, with its quantizers as operators on bytes.

    Raises ValueError, which names the layer, for what the format cannot hold, and for a denoiser without quantizers or
    with further inputs than an image, a timestep and a condition.
    """
    if not input_quantizers(denoiser):
        raise ValueError(
            "export: the denoiser is not quantized; give a pipeline that quest.load or quest.quantize made"
        )
    if type(denoiser).__name__ not in ("UNet2DModel", "UNet2DConditionModel", "FixedHeadsUNet2DModel"):
        raise ValueError(f"export: {type(denoiser).__name__}: only U-Nets of an image, a timestep and a condition")
    if denoiser.config.get("sample_size") is None:
        raise ValueError("export: sample_size: missing in the denoiser's configuration; valid: its height and width")
    for key in FURTHER:
        if denoiser.config.get(key):
            raise ValueError(f"export: {key}: {denoiser.config[key]}: a further input, which is not exported")
    new = copy.deepcopy(denoiser)
    new._forward_pre_hooks.clear()  # those that enter a time group; there is one
    new._forward_hooks.clear()
    for name, layer in list(quant_layers(new)):
        replace(new, name, _Layer(layer, name))
    for name, attention in attentions(new):
        if isinstance(attention.processor, QuantAttention):
            attention.processor = _Attention(attention.processor, name)  # the guard of set_processor is for users
    return new.eval()


def inputs_of(denoiser: nn.Module, batch: int = 2) -> dict[str, Tensor]:
    """Random inputs of a denoiser by name: sample [N, C, H, W], timestep [], and encoder_hidden_states [N, m, C']."""
    draw = torch.Generator().manual_seed(0)
    side = denoiser.config.sample_size
    height, width = (side, side) if isinstance(side, int) else side
    found = {"sample": torch.randn(batch, denoiser.config.in_channels, height, width, generator=draw)}
    found["timestep"] = torch.tensor(500)
    if (channels := denoiser.config.get("cross_attention_dim")) is not None:
        channels = channels if isinstance(channels, int) else channels[0]  # a list has one for each block, all equal
        found["encoder_hidden_states"] = torch.randn(batch, TOKENS, channels, generator=draw)
    return found


def export(pipe, path: str | Path) -> float:
    """Write the quantized denoiser of a pipeline to `path`: ONNX (.onnx), or OpenVINO's IR (.xml, with .bin beside it).

    The number of rows and of the condition's tokens stays free; height and width are those of the configuration.
    Returns the largest difference of the runtime's output from the reference kernel's, relative to its largest value,
    for random inputs of another batch size than the traced one. Raises ValueError for what cannot be exported (see
    `exportable`), where packages of the extra are missing, and for a difference above TOLERANCE; no file is kept then.
    """
    path = Path(path)
    if path.suffix not in NEEDED:
        raise ValueError(f"{path}: the suffix must be .onnx, or .xml for OpenVINO")
    if missing := [name for name in NEEDED[path.suffix] if importlib.util.find_spec(name) is None]:
        raise ValueError(f"{path}: needs {', '.join(missing)}: pip install 'quest-suite[export]'")
    if not path.parent.is_dir():
        raise ValueError(f"{path}: no folder {path.parent}")
    denoiser = denoiser_of(pipe)
    new, inputs = exportable(denoiser), inputs_of(denoiser, 3)
    with TemporaryDirectory(dir=path.parent, prefix=".export-") as folder:
        made = Path(folder, path.name)
        write(new, inputs_of(denoiser), made.with_suffix(".onnx"))
        if path.suffix == ".xml":
            to_ir(made.with_suffix(".onnx"), made)
        difference = compared(made, denoiser, inputs)
        if not difference <= TOLERANCE:
            raise ValueError(f"{path}: differs by {difference:.2g} of the largest output, above {TOLERANCE}")
        if path.suffix == ".xml":
            # Two files cannot be replaced at once. If this ends in between, there is no .xml, and never one beside the
            # weights of another export.
            path.unlink(missing_ok=True)
            os.replace(made.with_suffix(".bin"), path.with_suffix(".bin"))
        os.replace(made, path)
    return difference


def to_ir(onnx: Path, path: Path) -> None:
    """Write OpenVINO's IR of an ONNX file to `path`, .xml, and its weights beside it, .bin."""
    import openvino

    openvino.save_model(openvino.Core().read_model(onnx), path, compress_to_fp16=False)


def compared(path: Path, denoiser: nn.Module, inputs: dict[str, Tensor]) -> float:
    """The largest difference of an exported file's output from the denoiser's, relative to its largest value."""
    arrays = {name: value.numpy() for name, value in inputs.items()}
    found = (_by_openvino if path.suffix == ".xml" else _by_onnxruntime)(path, arrays)
    with torch.no_grad():
        wanted = denoiser(**inputs).sample.numpy()
    return float(np.abs(found - wanted).max() / np.abs(wanted).max())


def _by_onnxruntime(path: Path, inputs: dict[str, np.ndarray]) -> np.ndarray:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    return onnxruntime.InferenceSession(str(path), options).run(None, inputs)[0]


def _by_openvino(path: Path, inputs: dict[str, np.ndarray]) -> np.ndarray:
    """In the mode for accuracy. The other one computes in bfloat16 where it can, and quantizes inputs once more."""
    import openvino
    from openvino.properties import hint, inference_num_threads

    core = openvino.Core()
    mode = {hint.execution_mode(): hint.ExecutionMode.ACCURACY, inference_num_threads(): torch.get_num_threads()}
    return core.compile_model(core.read_model(path), "CPU", mode)(inputs)[0]


def write(denoiser: nn.Module, inputs: dict[str, Tensor], path: Path) -> None:
    """Write what `exportable` returned to an ONNX file. inputs: those of the call that is traced (`inputs_of`)."""
    from onnxscript import opset18 as op

    def quantized(x, scale, zero_point, low, high):
        x = op.Clip(x, op.Constant(value_float=low), op.Constant(value_float=high))
        return op.DequantizeLinear(op.QuantizeLinear(x, scale, zero_point), scale, zero_point)

    def dequantized(codes, scale, zero_point):
        return op.DequantizeLinear(codes, scale, zero_point, axis=0)

    any_number = torch.export.Dim.DYNAMIC
    free = {"sample": {0: any_number}, "timestep": None, "encoder_hidden_states": {0: any_number, 1: any_number}}
    torch.onnx.export(
        _Sample(denoiser).eval(),
        kwargs=inputs,
        f=str(path),
        input_names=list(inputs),
        output_names=["noise"],
        dynamic_shapes={"inputs": {name: free[name] for name in inputs}},
        dynamo=True,
        optimize=False,  # runtimes do that themselves
        opset_version=18,
        external_data=False,
        custom_translation_table={
            torch.ops.quest.export_input.default: quantized,
            torch.ops.quest.export_weight.default: dequantized,
        },
        verbose=False,
    )


class _Sample(nn.Module):
    """The denoiser with a tensor as its output."""

    def __init__(self, denoiser):
        super().__init__()
        self.denoiser = denoiser

    def forward(self, **inputs):
        return self.denoiser(**inputs, return_dict=False)[0]

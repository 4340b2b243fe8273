"""Save and load a quantized denoiser in one .safetensors file. Loading also needs the full-precision pipeline.

A file contains

    header                                    formats of all quantizers, time groups, cost, hashes (see `header`)
    conv_in.codes                             codes of the weight, packed (see `packing`)
    conv_in.weight_quantizer.scale            one for each output channel, and as many zero points
    conv_in.input_quantizer.scale             one for each time group, and as many zero points
    conv_in.bias                              float32, like norms and layers that stay in float

Codes are enough for sampling. A method that goes on learning from another method's weights (`init`) needs more: where
each weight lies between two codes. Its starting point is therefore saved with float weights in place of codes
(`floats=True`), and the header says so.
"""

import copy

import torch
from safetensors.torch import save_file
from torch import nn

from quest.affine import FLOAT, QuantSpec
from quest.diffusion import samplers
from quest.diffusion.denoisers import denoiser_of, name_of
from quest.quantization import branch, cost, guards, packing, prologue, same_model
from quest.quantization import header as headers
from quest.quantization.attention import QuantAttention
from quest.quantization.contents import check_tensors
from quest.quantization.header import CODES, SCHEDULER
from quest.quantization.layers import attentions, is_quantized, name_quantizers, quant_layers, quantized, replace
from quest.quantization.placement import place
from quest.quantization.splitting import split, split_layers
from quest.quantization.swapping import finish, with_denoiser
from quest.quantization.timegroups import TimeGroups
from quest.runtime.files import atomic, dumps, one_line
from quest.runtime.hashing import opened, tensor_hash
from quest.runtime.provenance import provenance


def save(pipe, path, floats: bool = False, **extra) -> None:
    """Write the quantized denoiser of a pipeline and the correction of its scheduler to one file, atomically.

    floats: write weights in float32, not as codes, so that another method can start from them (`init`).
    The header (metadata key "quest", JSON) states the bits and granularity of every quantizer, the time groups, the
    calibrated timesteps, the arguments of `quest.quantize`, the cost (`cost.summary`), provenance, `extra`, and the
    hashes of every tensor and of the header itself.
    Raises ValueError for a pipeline that is not quantized, or no longer as it was, and FloatingPointError, which names
    the tensor, for one that is not finite.
    """
    _write(path, *content(guards.unwrapped(denoiser_of(pipe)), pipe.scheduler, floats, path, **extra))


def content(denoiser, scheduler=None, floats: bool = False, path="", **extra) -> tuple[dict[str, torch.Tensor], dict]:
    """The tensors and the header that `save` writes. Without a scheduler they are of the denoiser alone."""
    if not is_quantized(denoiser):
        raise ValueError("the pipeline is not quantized: call quest.quantize first")
    guards.check_whole(denoiser)
    groups = getattr(denoiser, "time_groups", None)
    tensors = {k: v.detach().cpu().contiguous() for k, v in state(denoiser, floats).items()}
    if scheduler is not None:
        tensors |= {f"{SCHEDULER}{k}": v.cpu().contiguous() for k, v in samplers.state(scheduler).items()}
    header = {
        "weights": "float" if floats else CODES,
        "denoiser": type(denoiser).__name__,
        "config": same_model.architecture(denoiser),
        **({} if scheduler is None else {"scheduler": samplers.trained_on(scheduler)}),
        "splits": split_layers(denoiser),
        "layers": {
            n: [q.spec.fields for q in (m.weight_quantizer, m.input_quantizer, m.output_quantizer) if q is not None]
            for n, m in quant_layers(denoiser)
        },
        "shapes": {n: list(m.weight_shape) for n, m in quant_layers(denoiser)},
        "attentions": {n: [spec.fields for spec in m.processor.formats] for n, m in attentions(denoiser)},
        **_described(denoiser, "prologues", "prologue"),
        **_described(denoiser, "branches", "branch"),
        **({"coupled": denoiser.coupled} if getattr(denoiser, "coupled", None) else {}),
        "granularity": cost.granularity(denoiser),
        "time_groups": groups.starts.tolist() if groups else None,
        **getattr(denoiser, "quantization", {}),
        "provenance": provenance(),
        **extra,
        "hashes": {name: tensor_hash(value) for name, value in tensors.items()},
    }
    for name, value in tensors.items():
        if not value.isfinite().all():
            raise FloatingPointError(f"tensor {name} is not finite")
    header = headers.sealed(header)
    check_tensors(header, tensors, path)
    return tensors, header


def _described(denoiser, field: str, part: str) -> dict[str, dict]:
    """A field of the header that describes this part of layers, by name; no field where no layer has it."""
    found = {n: getattr(m, part).description for n, m in quant_layers(denoiser) if getattr(m, part) is not None}
    return {field: found} if found else {}


def save_diverged(path, reason: str, **fields) -> None:
    """Write the checkpoint of a method that diverged: a header with `reason` and `fields`, and no tensors.

    `load`, and a method that would start from it (`init`), refuse it with this reason. A cell of it has a row in every
    table, see `quest.diffusion.sampling.nothing`.
    """
    _write(path, {}, headers.sealed({"diverged": reason, **fields, "provenance": provenance()}))


def _write(path, tensors: dict[str, torch.Tensor], header: dict) -> None:
    with atomic(path) as tmp:
        save_file(tensors, tmp, {"quest": dumps(header)})


@torch.no_grad()
def state(denoiser, floats: bool = False) -> dict[str, torch.Tensor]:
    """The tensors of a quantized denoiser as a file contains them; without `floats`, weights are packed codes.

    Raises FloatingPointError naming a layer whose weight is not finite.
    """
    tensors = denoiser.state_dict()
    for name, layer in quant_layers(denoiser):
        if floats and layer.is_frozen:
            del tensors[f"{name}.{CODES}"]
            tensors[f"{name}.weight"] = layer.float_weight
        elif not floats and not layer.is_frozen and layer.weight_quantizer.spec.bits < FLOAT:
            if not tensors.pop(f"{name}.weight").isfinite().all():
                raise FloatingPointError(f"layer {name}: its weight is not finite")
            tensors[f"{name}.{CODES}"] = packing.pack(layer.qweight.codes, layer.weight_quantizer.spec)
    return tensors


def read(path) -> tuple[dict, dict[str, torch.Tensor]]:
    """Read the header and the tensors of a checkpoint.

    Raises ValueError for a file that `save` did not write, that an older version wrote, or whose bytes have changed
    since, and FloatingPointError for the file of a method that diverged.
    """
    with opened(path) as file:
        header = headers.of(file, path)
        tensors = {}
        for name in file.keys():
            tensors[name] = file.get_tensor(name)
            if tensor_hash(tensors[name]) != header["hashes"].get(name):
                raise ValueError(f"{path} is corrupted: its tensor {one_line(name)} is not what was saved")
    missing = sorted(set(header["hashes"]) - set(tensors))
    if missing:
        raise ValueError(f"{path} is corrupted: it lacks the tensor {one_line(missing[0])}")
    check_tensors(header, tensors, path)
    return header, tensors


def load(pipe, path, kernel: str = "auto"):
    """Make a quantized pipeline of a full-precision one, which does not change, and a file that `save` wrote.

    kernel: a name in `quest.kernels.KERNELS`, or "auto" for the fastest on the pipeline's device. Layers that it cannot
    compute exactly stay on the reference kernel, see `placement.place`. On the same kernel, samples equal those of the
    saved pipeline bit for bit. Codes go to their kernel unchanged. Only layers on the reference kernel expand them to
    floats.

    Raises ValueError for a file that is not a checkpoint or is corrupted, for the file of another model (the message
    lists the shapes that differ), for a scheduler whose steps leave the calibrated timesteps, and for a kernel that is
    unknown or not available.
    Raises FloatingPointError for a file of a method that diverged (`save_diverged`).
    """
    header, tensors = read(path)
    guards.check(pipe)
    correction = {k.removeprefix(SCHEDULER): tensors.pop(k) for k in list(tensors) if k.startswith(SCHEDULER)}
    denoiser = copied_without(denoiser_of(pipe), coded(header, tensors))
    restore(denoiser, header, tensors, path, kernel, denoiser_of(pipe).device, name_of(pipe))
    same_model.check_schedule(pipe, denoiser, header, path)
    new = with_denoiser(pipe, denoiser)
    try:
        new.scheduler = samplers.restore(new.scheduler, correction)
    except ValueError as error:
        raise ValueError(one_line(f"{path}: {error}")) from error
    return new


def restore(denoiser, header: dict, tensors: dict[str, torch.Tensor], path, kernel="auto", device="cpu", part="unet"):
    """Quantize a float denoiser in place by what `read` returned, without the scheduler's tensors.

    Its weights that are `coded` may lie on the meta device, but need the memory layout that they had in float. part:
    the denoiser's name in errors, which are those of `load`.
    """
    split_as(denoiser, header, path)
    same_model.check_shapes(denoiser, header, tensors, path)
    same_model.check_architecture(denoiser, header, path, part)
    same_model.check_names(denoiser, header, path)
    groups = TimeGroups(header["time_groups"]) if header["time_groups"] else None
    for name, specs in header["layers"].items():
        weight, input, *output = (QuantSpec(**spec) for spec in specs)
        replace(denoiser, name, quantized(denoiser.get_submodule(name), weight, input, groups, *output))
    for name, specs in header["attentions"].items():
        formats = [QuantSpec(**spec) for spec in specs]
        denoiser.get_submodule(name).set_processor(QuantAttention.of_formats(formats, groups))
    prologue.restore(dict(quant_layers(denoiser)), header, tensors, path)
    branch.restore(dict(quant_layers(denoiser)), header, tensors, path)
    for name, value in tensors.items():
        # Only the file knows the shape of per-channel scales.
        module, _, leaf = name.rpartition(".")
        if leaf in ("scale", "zero_point"):
            quantizer = denoiser.get_submodule(module)
            getattr(quantizer, leaf).data = torch.empty_like(value)
            if len(value) == 1:
                quantizer.groups = None  # this range is the same in every time group
    denoiser.load_state_dict(tensors)
    finish(denoiser.to(device), groups)
    place(denoiser, kernel)
    denoiser.coupled = header.get("coupled", [])
    denoiser.quantization = {k: header[k] for k in ("method", "bits", "recipe", "timesteps", "cost") if k in header}


def coded(header: dict, tensors: dict[str, torch.Tensor]) -> set[str]:
    """The names of the weights that a file has as codes."""
    return {f"{name}.weight" for name in header["layers"] if f"{name}.{CODES}" in tensors}


def copied_without(denoiser, names: set[str]):
    """Copy a denoiser without the values of these parameters, which lie on the meta device with shape and layout."""
    # p.to("meta") gives the weight of a 1x1 convolution other strides, and float sums depend on the layout.
    memo = {
        id(p): nn.Parameter(torch.empty_strided(p.shape, p.stride(), dtype=p.dtype, device="meta"), requires_grad=False)
        for name, p in denoiser.named_parameters()
        if name in names
    }
    return copy.deepcopy(denoiser, memo)


def load_weights(denoiser, path) -> dict[str, torch.Tensor]:
    """Copy weights, biases and weight quantizers of another method's checkpoint into a swapped denoiser.

    Returns the tensors of the file, which lie in it until they are read.

    Convolutions that are split in the file are split here too. A layer that stays in float here alone keeps its own
    weight. Where a method changed the weights of several layers together (the denoiser's `coupled`, such as to_q and
    to_k, whose product stays the same), either all of them are taken from the file or none.
    Raises ValueError if the file is of another model or has other weight bits, other codes or only codes, or if some
    layers of a couple would keep their own weight, and FloatingPointError if the other method diverged.
    """
    header, tensors = read(path)
    if header["weights"] != "float":
        raise ValueError(
            f"init: {path} holds codes, which do not say where in its cell each weight stands; make it again with "
            "float weights: quest.save(..., floats=True), or --floats of workflow.scripts.quantize"
        )
    split_as(denoiser, header, path)
    same_model.check_shapes(denoiser, header, tensors, path)
    specs = {name: QuantSpec(**header["layers"][name][0]) for name, _ in quant_layers(denoiser)}
    kept = {n for n, m in quant_layers(denoiser) if m.weight_quantizer.spec.bits == FLOAT and specs[n].bits < FLOAT}
    for couple in header.get("coupled", []):
        if kept & set(couple) and not kept >= set(couple):
            alone = ", ".join(sorted(kept & set(couple)))
            raise ValueError(
                one_line(
                    f"keep: {alone} would stay in float with its own weight, but in {path} the weights of "
                    f"{' and '.join(couple)} were changed together; valid: keep all of them in float, or none"
                )
            )
    denoiser.coupled = header.get("coupled", [])
    for name, layer in quant_layers(denoiser):
        spec, own = specs[name], layer.weight_quantizer.spec
        if name in kept:
            continue
        if spec.bits != own.bits:
            raise ValueError(f"{path}: layer {name} has {spec.bits}-bit weights, not {own.bits}")
        if (spec.table, spec.group, spec.qmin, spec.widths) != (own.table, own.group, own.qmin, own.widths):
            differ = f"{spec.granularity}, not {own.granularity} (codes from {spec.qmin}, not from {own.qmin})"
            raise ValueError(f"{path}: layer {name} has weights {differ}")
        prologue.restore({name: layer}, header, tensors, path)
        branch.restore({name: layer}, header, tensors, path)
        layer.weight.data.copy_(tensors[f"{name}.weight"])
        if layer.bias is not None:
            layer.bias.data.copy_(tensors[f"{name}.bias"])
        layer.weight_quantizer.scale.data = tensors[f"{name}.weight_quantizer.scale"].to(layer.weight.device)
        layer.weight_quantizer.zero_point = tensors[f"{name}.weight_quantizer.zero_point"].to(layer.weight.device)
    return tensors


def split_as(denoiser, header: dict, path) -> None:
    """Split the convolutions that are split in a checkpoint. Raises ValueError if the denoiser has no such layer."""
    own = split_layers(denoiser)
    for name, channels in header.get("splits", {}).items():
        if name in own:
            continue
        conv = dict(denoiser.named_modules()).get(name)
        if not isinstance(conv, torch.nn.Conv2d) or channels >= conv.in_channels:
            raise same_model.of_another_model(path, f"it splits {name} at {channels} channels")
        replace(denoiser, name, split(conv, channels))
    name_quantizers(denoiser)

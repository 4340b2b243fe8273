"""Checks whether a pipeline can be quantized, and refuses methods of diffusers that would break a quantized one.

A quantized denoiser is still a model of diffusers and has all its methods. Some of these would replace quantized
attention by float attention, or write into weights that are codes. diffusers raises no error then. So each of these
methods is replaced by one that raises an error and says what to do. (`save_pretrained` works, see `pretrained`.)
"""

import re
from functools import cache
from pathlib import Path

import torch
from diffusers.models.attention_processor import Attention, AttnProcessor, AttnProcessor2_0, JointAttnProcessor2_0
from torch import nn

from quest.diffusion import samplers
from quest.diffusion.denoisers import name_of
from quest.diffusion.loading import check_denoiser
from quest.quantization.layers import ONE_DEVICE, QuantLayer, attentions, is_quantized

# `QuantAttention` computes what these processors compute, for an attention with these parts and no others.
PROCESSORS = AttnProcessor, AttnProcessor2_0, JointAttnProcessor2_0
PARTS = {"to_q", "to_k", "to_v", "to_out", "group_norm", "processor"}
NORMED = {"norm_q", "norm_k"}  # parts that all processors but the first compute
# Parts that only the last processor computes.
JOINT = {"add_q_proj", "add_k_proj", "add_v_proj", "to_add_out", "norm_added_q", "norm_added_k"}
UNSET = ("fused_projections", "is_causal", "pre_only", "only_cross_attention")

REFUSED = {  # names of methods of a denoiser, its attentions or a pipeline -> what to do instead, or why it is refused
    r"save_(lora_adapter|attn_procs)": "write the whole denoiser with save_pretrained or quest.save",
    r"_?(load|add|set|enable|disable|delete|fuse|unfuse|unload)_.*(lora|adapter|attn_procs).*": (
        "load the adapter into the full-precision pipeline, fuse it there, and quantize that"
    ),
    r"(set|reset|enable|disable|fuse|unfuse)_.*(attention|attn|processor|projections).*": (
        "its attention is quantized, and this would put float attention in its place"
    ),
    r"enable_(layerwise_casting|group_offload|sequential_cpu_offload|parallelism)": ONE_DEVICE,
    r"enable_gradient_checkpointing": "parts that are called again in the backward pass are in no forward pass",
    r"half|double|bfloat16|float|type": "it computes in torch.float32",
}


class Refusal:
    """Replaces a method and raises ValueError when it is called. It is a class because pipelines must be picklable."""

    def __init__(self, name: str, instead: str):
        self.name, self.instead = name, instead

    def __call__(self, *args, **kwargs):
        raise ValueError(f"{self.name}: not of a quantized pipeline; {self.instead}")


@cache
def refusals(kind: type) -> dict[str, Refusal]:
    """The methods of a class whose names match a key of REFUSED, by name."""
    names = [name for name in dir(kind) if callable(getattr(kind, name))]
    return {n: Refusal(n, why) for n in names for pattern, why in REFUSED.items() if re.fullmatch(pattern, n)}


def guard(thing) -> None:
    """Replace methods of a module or pipeline by their `refusals`."""
    vars(thing).update(refusals(type(thing)))


def guard_denoiser(denoiser: nn.Module) -> None:
    """Refuse methods of a denoiser and its attentions that would undo quantization.

    `is_quantized` makes diffusers itself refuse `.to(dtype)`.
    """
    guard(denoiser)
    for _, attention in attentions(denoiser):
        guard(attention)
    denoiser.is_quantized = True


def wrapped(denoiser) -> str | None:
    """The attribute in which a wrapper (torch.compile, DataParallel, ...) holds the module; None for other modules."""
    names = {name for name, _ in denoiser.named_children()} if isinstance(denoiser, nn.Module) else set()
    return next((name for name in ("_orig_mod", "module", "_fsdp_wrapped_module") if names == {name}), None)


def unwrapped(denoiser):
    """The module inside all wrappers."""
    while (name := wrapped(denoiser)) is not None:
        denoiser = getattr(denoiser, name)
    return denoiser


def check_text_encoders(pipe) -> None:
    """Raise ValueError for a text encoder that is not in float32, as transformers loads one that was stored in half."""
    for name, part in getattr(pipe, "components", {}).items():
        if not name.startswith("text_encoder") or part is None:
            continue
        for parameter in part.parameters():
            if parameter.dtype != torch.float32:
                raise ValueError(
                    f"{name} is in {parameter.dtype}; load the pipeline with .to(torch.float32) to sample its prompts"
                )


def check(pipe, allow_meta: bool = False) -> None:
    """Raise ValueError, which says why, if a pipeline cannot be quantized. `quantize` and `load` both call this.

    The denoiser must be a module without a wrapper, not quantized, in float32 and on one device. Its linear layers and
    convolutions must be of torch's own classes, and its attention must be one that `QuantAttention` computes exactly.
    allow_meta: the denoiser may lie on the meta device, as when a plan counts the layers of a model without weights.
    """
    part = name_of(pipe)
    denoiser = getattr(pipe, part)
    if not isinstance(denoiser, nn.Module):
        raise ValueError(f"{part}: a {type(denoiser).__name__}, no denoiser; load the whole pipeline")
    if (name := wrapped(denoiser)) is not None:
        raise ValueError(
            f"{part}: a {type(denoiser).__name__} is around it; set pipe.{part} = pipe.{part}.{name}, and wrap what "
            "comes out"
        )
    if is_quantized(denoiser):
        raise ValueError("the pipeline is already quantized; take the full-precision one")
    if getattr(denoiser, "hf_quantizer", None) is not None or getattr(denoiser, "is_quantized", False):
        raise ValueError("the pipeline is already quantized by diffusers; take the full-precision one")
    if place := getattr(denoiser, "config", {}).get("_name_or_path"):  # where diffusers loaded it
        check_denoiser(Path(place))
        check_denoiser(Path(place, part))
    tensors = dict(denoiser.named_parameters()) | dict(denoiser.named_buffers())
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and tensor.dtype != torch.float32:
            raise ValueError(
                f"the denoiser is in {tensor.dtype} ({name}); load the pipeline in torch.float32 to quantize it"
            )
    devices = sorted({str(tensor.device) for tensor in tensors.values()})
    if len(devices) > 1 or devices == ["meta"] and not allow_meta:
        raise ValueError(f"the denoiser lies on {' and '.join(devices)}; {ONE_DEVICE}: load it there")
    for name, module in denoiser.named_modules():
        if hasattr(module, "_hf_hook"):
            raise ValueError(f"{name or part}: accelerate moves it between devices; load the pipeline without that")
        if reason := _unknown(module):
            raise ValueError(f"{name}: {reason}")
    for key, plain in (("attention_type", ("default", None)), ("encoder_hid_dim_type", (None,))):
        if getattr(denoiser, "config", {}).get(key) not in plain:
            raise ValueError(f"{part}.config.{key}: {denoiser.config[key]!r} is not quantized")


def _unknown(module: nn.Module) -> str | None:
    """Why a module cannot be quantized exactly; None if it can, or if it is not quantized at all."""
    kind = type(module).__name__
    if isinstance(module, nn.Linear | nn.Conv2d) and type(module) not in (nn.Linear, nn.Conv2d):
        return f"a {kind}, neither nn.Linear nor nn.Conv2d; fuse or remove what it adds"
    if not isinstance(module, Attention):
        return f"a {kind} is an attention of another kind" if hasattr(module, "set_processor") else None
    if type(module.processor) not in PROCESSORS:
        return (
            f"its attention processor is a {type(module.processor).__name__}, which is not quantized; valid: "
            f"{' and '.join(p.__name__ for p in PROCESSORS)} (set_default_attn_processor() of the denoiser)"
        )
    known = PARTS | (set() if type(module.processor) is AttnProcessor else NORMED)
    known |= JOINT if type(module.processor) is JointAttnProcessor2_0 else set()
    parts = [name for name, part in module.named_children() if name not in known]
    parts += [name for name in UNSET if getattr(module, name, False)]
    if module.inner_kv_dim != module.inner_dim:
        parts.append("kv_heads")
    if parts or type(module) is not Attention:
        return f"a {kind} with {', '.join(parts) or 'a forward of its own'}, which quantized attention does not compute"
    return None


def check_calibration(pipe, calibration) -> None:
    """Raise ValueError if a calibration set was sampled with another noise schedule than the pipeline's.

    Another sampler with the same noise schedule is allowed, because the model can meet its steps too.
    """
    if calibration.scheduler is None:  # the set is from an earlier version, or made by hand
        return
    if differ := samplers.differences(calibration.scheduler, samplers.trained_on(pipe.scheduler)):
        raise ValueError(f"calibration: made with another schedule than the pipeline's scheduler: {'; '.join(differ)}")


def check_whole(denoiser: nn.Module) -> None:
    """Raise ValueError if parts of a quantized denoiser are not quantized any more, which a file could not restore."""
    for name, attention in attentions(denoiser):
        if not hasattr(attention.processor, "kernel_name"):
            kind = type(attention.processor).__name__
            raise ValueError(f"{name}: its attention is no longer quantized (a {kind}); quantize the pipeline again")
    for name, module in denoiser.named_modules():
        if isinstance(module, nn.Linear | nn.Conv2d) and not isinstance(module, QuantLayer):
            raise ValueError(f"{name}: a {type(module).__name__} that is not quantized; quantize the pipeline again")
    own = *denoiser.named_parameters(), *denoiser.named_buffers()
    if lost := next((name for name, value in own if value.is_meta), None):
        raise ValueError(
            f"{lost}: on the meta device, without its values (.to('meta'), or accelerate moves it between devices); "
            "load the pipeline again"
        )

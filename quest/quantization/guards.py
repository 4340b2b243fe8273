"""What a pipeline must be to be quantized, and what of diffusers is refused on a quantized one.

A quantized denoiser is still a model of diffusers, with all its methods. Some of them would put float attention in
place of the quantized one, write into weights that are codes, or save a file that reads as a float model. None of that
gives an error of its own, so those methods say here what to do instead.
"""

import torch
from diffusers.models.attention_processor import Attention, AttnProcessor, AttnProcessor2_0, JointAttnProcessor2_0
from torch import nn

from quest.diffusion import samplers
from quest.diffusion.denoisers import name_of
from quest.quantization.layers import QuantLayer, attentions, is_quantized

# What `QuantAttention` computes: these processors, of an attention that has these parts and no others.
PROCESSORS = AttnProcessor, AttnProcessor2_0, JointAttnProcessor2_0
PARTS = {"to_q", "to_k", "to_v", "to_out", "group_norm", "processor"}
NORMED = {"norm_q", "norm_k"}  # parts that all but the first processor compute
JOINT = {
    "add_q_proj",
    "add_k_proj",
    "add_v_proj",
    "to_add_out",
    "norm_added_q",
    "norm_added_k",
}  # and the last one alone
UNSET = ("fused_projections", "is_causal", "pre_only", "only_cross_attention")

_ADAPTER = "load the adapter into the full-precision pipeline, fuse it there, and quantize that"
_ATTENTION = "its attention is quantized, and this would put float attention in its place"
_SAVE = "write it with quest.save(pipe, path) and read it with quest.load(full_precision_pipe, path)"
_MOVE = "a quantized denoiser stays whole, on one device"
REFUSED = {  # of a denoiser, its attentions, and a pipeline, as far as they have a method of this name
    **dict.fromkeys(("save_pretrained", "push_to_hub", "save_lora_adapter", "save_attn_procs"), _SAVE),
    **dict.fromkeys(
        (
            "load_lora_weights",
            "load_lora_adapter",
            "load_lora_into_unet",
            "load_lora_into_transformer",
            "load_ip_adapter",
            "_load_ip_adapter_weights",
            "load_attn_procs",
            "add_adapter",
            "set_adapter",
            "set_adapters",
            "enable_adapters",
            "disable_adapters",
            "delete_adapters",
            "enable_lora",
            "disable_lora",
            "enable_lora_hotswap",
            "fuse_lora",
            "unfuse_lora",
            "unload_lora",
            "unload_lora_weights",
        ),
        _ADAPTER,
    ),
    **dict.fromkeys(
        (
            "set_processor",
            "set_attn_processor",
            "set_default_attn_processor",
            "set_attention_slice",
            "enable_attention_slicing",
            "disable_attention_slicing",
            "set_attention_backend",
            "reset_attention_backend",
            "set_use_memory_efficient_attention_xformers",
            "enable_xformers_memory_efficient_attention",
            "disable_xformers_memory_efficient_attention",
            "set_use_npu_flash_attention",
            "enable_npu_flash_attention",
            "disable_npu_flash_attention",
            "set_use_xla_flash_attention",
            "enable_xla_flash_attention",
            "disable_xla_flash_attention",
            "fuse_projections",
            "fuse_qkv_projections",
            "unfuse_qkv_projections",
        ),
        _ATTENTION,
    ),
    **dict.fromkeys(
        (
            "enable_layerwise_casting",
            "enable_group_offload",
            "enable_sequential_cpu_offload",
            "enable_parallelism",
        ),
        _MOVE,
    ),
    "enable_gradient_checkpointing": "parts that are called again in the backward pass are in no forward pass",
    **dict.fromkeys(("half", "double", "bfloat16", "float", "type"), "it computes in torch.float32"),
}
OF_ATTENTION = [name for name, why in REFUSED.items() if why is _ATTENTION]


class Refusal:
    """Stands in for a method; raises ValueError when it is called. A class, so that a pipeline can be pickled."""

    def __init__(self, name: str, instead: str):
        self.name, self.instead = name, instead

    def __call__(self, *args, **kwargs):
        raise ValueError(f"{self.name}: not of a quantized pipeline; {self.instead}")


def guard(thing, names=REFUSED) -> None:
    """Put a `Refusal` in place of each of these methods that a module or pipeline has."""
    for name in names:
        if callable(getattr(thing, name, None)):
            vars(thing)[name] = Refusal(name, REFUSED[name])


def guard_denoiser(denoiser: nn.Module) -> None:
    """Refuse on a denoiser and each of its attentions what would undo quantization; `.to(dtype)` by diffusers' own."""
    guard(denoiser)
    for _, attention in attentions(denoiser):
        guard(attention, OF_ATTENTION)
    denoiser.is_quantized = True


def wrapped(denoiser) -> str | None:
    """The attribute of a wrapper (torch.compile, DataParallel and its kind) that holds the module; None of others."""
    names = {name for name, _ in denoiser.named_children()} if isinstance(denoiser, nn.Module) else set()
    return next((name for name in ("_orig_mod", "module", "_fsdp_wrapped_module") if names == {name}), None)


def unwrapped(denoiser):
    """The module that a wrapper is around."""
    while (name := wrapped(denoiser)) is not None:
        denoiser = getattr(denoiser, name)
    return denoiser


def check(pipe, allow_meta: bool = False) -> None:
    """Raise ValueError where a pipeline cannot be quantized, saying why: the same for `quantize` and `load`.

    Its denoiser must be a plain module, not quantized, in float32, all on one device, with linear layers and
    convolutions of torch's own classes, and with attention that `QuantAttention` computes exactly. With `allow_meta` it
    may lie on the meta device, where a plan counts what the layers of a model without weights would take.
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
    tensors = dict(denoiser.named_parameters()) | dict(denoiser.named_buffers())
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and tensor.dtype != torch.float32:
            raise ValueError(
                f"the denoiser is in {tensor.dtype} ({name}); load the pipeline in torch.float32 to quantize it"
            )
    devices = sorted({str(tensor.device) for tensor in tensors.values()})
    if len(devices) > 1 or devices == ["meta"] and not allow_meta:
        raise ValueError(f"the denoiser lies on {' and '.join(devices)}; {_MOVE}: load it there")
    for name, module in denoiser.named_modules():
        if hasattr(module, "_hf_hook"):
            raise ValueError(f"{name or part}: accelerate moves it between devices; load the pipeline without that")
        if reason := _unknown(module):
            raise ValueError(f"{name}: {reason}")
    for key, plain in (("attention_type", ("default", None)), ("encoder_hid_dim_type", (None,))):
        if getattr(denoiser, "config", {}).get(key) not in plain:
            raise ValueError(f"{part}.config.{key}: {denoiser.config[key]!r} is not quantized")


def _unknown(module: nn.Module) -> str | None:
    """Why a module cannot be quantized exactly; None of one that can, or that stays as it is."""
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
    """Raise ValueError where a calibration set was sampled with another noise schedule than the pipeline's.

    Steps of another sampler over the same schedule are met by a model as well.
    """
    if calibration.scheduler is None:  # of an earlier version, or made by hand
        return
    if differ := samplers.differences(calibration.scheduler, samplers.trained_on(pipe.scheduler)):
        raise ValueError(f"calibration: made with another schedule than the pipeline's scheduler: {'; '.join(differ)}")


def check_whole(denoiser: nn.Module) -> None:
    """Raise ValueError where a quantized denoiser is not as it was quantized: what a file could not give back."""
    for name, attention in attentions(denoiser):
        if not hasattr(attention.processor, "kernel_name"):
            kind = type(attention.processor).__name__
            raise ValueError(f"{name}: its attention is no longer quantized (a {kind}); quantize the pipeline again")
    for name, module in denoiser.named_modules():
        if isinstance(module, nn.Linear | nn.Conv2d) and not isinstance(module, QuantLayer):
            raise ValueError(f"{name}: a {type(module).__name__} that is not quantized; quantize the pipeline again")

"""Which layers and activation scales each stage of QuEST tunes, as in its released code (arXiv:2402.03666)."""

from collections.abc import Iterable
from fnmatch import fnmatch

import torch
from torch import nn

from quest.affine import FLOAT
from quest.quantization.layer_names import KEEP
from quest.quantization.layers import QuantLayer, attentions, input_quantizers, name_quantizers, quant_layers
from quest.quantization.quantizer import Quantizer

# The released code's choices, by diffusers' names. `emb_layers` of CompVis is time_emb_proj, `time_embed` the other.
TEMPORAL = ("*.time_emb_proj",)
TIME_EMBEDDING = ("time_embedding.*",)
SELECTIONS = {
    "lsun": ("*.to_q", "*.to_k", "*.to_v"),
    "imagenet": ("*.ff.net.*", "*.to_q", "*.attn1.to_k", "*.attn1.to_v"),
    "sd": ("*.ff.net.*",),
}


def default_selection(pipe) -> str:
    """The set that the released code uses for this kind of model."""
    if getattr(pipe, "text_encoder", None) is not None:
        return "sd"
    return "imagenet" if getattr(pipe, "class_embedder", None) is not None else "lsun"


def matches(name: str, globs: Iterable[str]) -> bool:
    return any(fnmatch(name, g) for g in globs)


def selected(
    denoiser: nn.Module, selection: str, time_embedding: str, control: int | None = None
) -> tuple[tuple[dict[str, QuantLayer], list[Quantizer]], tuple[dict[str, QuantLayer], list[Quantizer]]]:
    """Layers whose weights are tuned, and activation quantizers whose scales are, of the temporal and critical stage.

    time_embedding: the two layers before all projections. The released code never touches them ("frozen"), the paper
    tunes all remaining activation scales in the critical stage ("scales"), and its text can be read as tuning them with
    the projections ("tuned"). control: a seed for other layers in place of the temporal ones, see `equal_size`.
    """
    layers = dict(quant_layers(denoiser))
    temporal_globs = TEMPORAL + (TIME_EMBEDDING if time_embedding == "tuned" else ())
    temporal = {n: m for n, m in layers.items() if matches(n, temporal_globs)}
    critical = {n: m for n, m in layers.items() if matches(n, SELECTIONS[selection])}
    if not temporal or not critical:
        raise ValueError(f"selection {selection!r}: the denoiser has no such layers, or no time embedding projections")
    if control is not None:
        temporal = equal_size(layers, temporal, {*critical, *KEEP}, control)
    taken = {id(m.input_quantizer) for m in temporal.values()}
    if time_embedding == "frozen":
        taken |= {id(m.input_quantizer) for n, m in layers.items() if matches(n, TIME_EMBEDDING)}
    temporal_scales = [m.input_quantizer for m in temporal.values()]
    critical_scales = [q for q in input_quantizers(denoiser).values() if id(q) not in taken]
    return tuple(
        (tuned, [q for q in scales if q.spec.bits != FLOAT])
        for tuned, scales in ((temporal, temporal_scales), (critical, critical_scales))
    )


def equal_size(layers: dict[str, QuantLayer], like: dict[str, QuantLayer], without: set[str], seed: int):
    """Layers that are in neither `like` nor `without` and have about as many weights as those of `like`, by name.

    They are taken in random order, each that still fits, in the denoiser's order in the end. Raises ValueError where
    none fits.
    """
    left = sum(layer.weight.numel() for layer in like.values())
    others = [n for n in layers if n not in like and n not in without]
    taken = set()
    for i in torch.randperm(len(others), generator=torch.Generator().manual_seed(seed), device="cpu").tolist():
        if (size := layers[others[i]].weight.numel()) <= left:
            taken.add(others[i])
            left -= size
    if not taken:
        raise ValueError("control: the denoiser has no other layer as small as its time embedding projections together")
    return {n: layers[n] for n in others if n in taken}


def qkv(denoiser: nn.Module) -> dict[str, str]:
    """to_k and to_v of every unconditional attention -> its to_q: in CompVis the three are one convolution.

    Such an attention adds its input; one of a transformer leaves that to the block around it.
    """
    return {f"{n}.to_{x}": f"{n}.to_q" for n, m in attentions(denoiser) if m.residual_connection for x in "kv"}


def tuned_layers(denoiser: nn.Module, tuned: dict[str, QuantLayer], qkv_as_one: bool) -> int:
    """How many layers are tuned, which is the weight of L_G in the released code."""
    one = qkv(denoiser) if qkv_as_one else {}
    return len({one.get(name, name) for name in tuned})


def share_inputs(denoiser: nn.Module) -> None:
    """Give to_k and to_v of every unconditional attention the input quantizer of its to_q."""
    for name, first in qkv(denoiser).items():
        denoiser.get_submodule(name).input_quantizer = denoiser.get_submodule(first).input_quantizer


def unshare_inputs(denoiser: nn.Module) -> None:
    """Undo `share_inputs` without changing a value: a checkpoint holds every quantizer once."""
    for name, first in qkv(denoiser).items():
        shared = denoiser.get_submodule(first).input_quantizer
        own = Quantizer(shared.spec, groups=shared.groups)
        own.scale.data, own.zero_point = shared.scale.detach().clone(), shared.zero_point.clone()
        denoiser.get_submodule(name).input_quantizer = own
    name_quantizers(denoiser)

"""Which layers and activation scales each stage of QuEST tunes, as in its released code (arXiv:2402.03666)."""

import math
import re
from collections import Counter
from collections.abc import Iterable
from fnmatch import fnmatch

import torch
from torch import nn

from baselines.method import Valid
from quest.affine import FLOAT
from quest.diffusion.denoisers import name_of
from quest.diffusion.models import CONDITIONED
from quest.quantization.layer_names import KEEP
from quest.quantization.layers import QuantLayer, attentions, input_quantizers, name_quantizers, quant_layers
from quest.quantization.quantizer import Quantizer
from quest.quantization.splitting import split_layers

# The released code's choices, under diffusers' names: CompVis's `emb_layers` is time_emb_proj, and its `time_embed` is
# time_embedding. A transformer projects its embedding in the modulation of its norms (adaLN).
TEMPORAL = ("*.time_emb_proj", "*norm*.linear", "adaln_single.linear", "proj_out_1")
TIME_EMBEDDING = ("time_embedding.*", "*.timestep_embedder.*", "time_text_embed.*", "add_embedding.*")
SELECTIONS = {
    "lsun": ("*.to_q", "*.to_k", "*.to_v"),
    "imagenet": ("*.ff.net.*", "*.to_q", "*.attn1.to_k", "*.attn1.to_v"),
    "sd": ("*.ff.net.*", "*.ff_context.net.*"),
}

SELECTION = Valid(
    pattern=rf"^({'|'.join(SELECTIONS)})$|[*.]",
    description=f"{', '.join(SELECTIONS)}, or globs over names of layers with spaces between",
)


def globs_of(selection: str) -> tuple[str, ...]:
    """The globs of a key of SELECTIONS, or those that the text itself lists with spaces between them."""
    return SELECTIONS.get(selection) or tuple(selection.split())


def described(denoiser: nn.Module, selection: str) -> str:
    """Which layers QuEST tunes of a denoiser, quantized or not: a line for each stage, numbers in names as `*`."""
    names = [name for name, module in denoiser.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)]
    lines = []
    for stage, globs in (("time embedding", TEMPORAL), (f"attention-related ({selection})", globs_of(selection))):
        chosen = [name for name in names if matches(name, globs)]
        counts = Counter(re.sub(r"\b\d+\b", "*", name) for name in chosen)
        listed = ", ".join(f"{name} ({count})" for name, count in counts.items())
        lines.append(f"QuEST tunes, {stage}: {len(chosen)} of {len(names)} layers: {listed or 'none'}")
    return "\n".join(lines)


def shares(denoiser: nn.Module, selection: str) -> dict[str, float]:
    """The share of a denoiser's parameters that each stage of QuEST tunes, and of both; scales left out."""
    layers = {n: m for n, m in denoiser.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)}
    whole = sum(p.numel() for p in denoiser.parameters())
    sizes = {
        stage: sum(p.numel() for n, m in layers.items() if matches(n, globs) for p in m.parameters())
        for stage, globs in (("temporal", TEMPORAL), ("critical", globs_of(selection)))
    }
    return {stage: size / whole for stage, size in (sizes | {"both": sum(sizes.values())}).items()}


def default_selection(pipe) -> str:
    """The key of SELECTIONS that the released code uses for this kind of pipeline."""
    if getattr(pipe, "text_encoder", None) is not None:
        return CONDITIONED["text"]
    classes = getattr(pipe, "class_embedder", None) is not None or name_of(pipe) == "transformer"
    return CONDITIONED["class" if classes else "none"]


def matches(name: str, globs: Iterable[str]) -> bool:
    return any(fnmatch(name, g) for g in globs)


def selected(
    denoiser: nn.Module, selection: str, time_embedding: str, control: int | None = None
) -> tuple[tuple[dict[str, QuantLayer], list[Quantizer]], tuple[dict[str, QuantLayer], list[Quantizer]]]:
    """What each stage tunes: (layers, activation quantizers) of the temporal stage, and the same of the critical stage.

    Weights of the layers and scales of the quantizers are tuned.
    time_embedding: what happens to the two layers before all projections. The released code never tunes them
    ("frozen"). The paper tunes all remaining activation scales in the critical stage ("scales"); its text can also be
    read as tuning both layers with the projections ("tuned").
    control: a seed that draws other layers in place of the temporal ones, see `equal_size`.
    Raises ValueError where the denoiser has no layers of the selection.
    """
    layers = dict(quant_layers(denoiser))
    temporal_globs = TEMPORAL + (TIME_EMBEDDING if time_embedding == "tuned" else ())
    temporal = {n: m for n, m in layers.items() if matches(n, temporal_globs)}
    critical = {n: m for n, m in layers.items() if matches(n, globs_of(selection))}
    if not temporal or not critical:
        raise ValueError(f"selection {selection!r}: the denoiser has no such layers, or no time embedding projections")
    if control is not None:
        halves = {n for n in layers if n.rpartition(".")[0] in split_layers(denoiser)}
        temporal = equal_size(layers, temporal, {*critical, *KEEP}, halves, control)
    excluded = {id(m.input_quantizer) for m in temporal.values()}
    if time_embedding == "frozen":
        excluded |= {id(m.input_quantizer) for n, m in layers.items() if matches(n, TIME_EMBEDDING)}
    temporal_scales = [m.input_quantizer for m in temporal.values()]
    critical_scales = [q for q in input_quantizers(denoiser).values() if id(q) not in excluded]
    return tuple(
        (tuned, [q for q in scales if q.spec.bits != FLOAT])
        for tuned, scales in ((temporal, temporal_scales), (critical, critical_scales))
    )


def equal_size(
    layers: dict[str, QuantLayer], like: dict[str, QuantLayer], without: set[str], halves: set[str], seed: int
):
    """Random layers, outside `like` and `without`, with about as many weights in all as `like`: name -> layer.

    Layers are drawn in random order, and each that still fits is kept, except for `halves` of split convolutions: the
    teacher, whose outputs the layers learn, has none. The result is in the denoiser's order.

    Raises ValueError where none fits.
    """
    remaining = sum(math.prod(layer.weight_shape) for layer in like.values())
    others = [n for n in layers if n not in like and n not in without]
    chosen = set()
    for i in torch.randperm(len(others), generator=torch.Generator().manual_seed(seed), device="cpu").tolist():
        if others[i] not in halves and (size := math.prod(layers[others[i]].weight_shape)) <= remaining:
            chosen.add(others[i])
            remaining -= size
    if not chosen:
        raise ValueError("control: the denoiser has no other layer as small as its time embedding projections together")
    return {n: layers[n] for n in others if n in chosen}


def qkv(denoiser: nn.Module) -> dict[str, str]:
    """to_k or to_v of every unconditional attention -> its to_q, by name: in CompVis the three are one convolution.

    An unconditional attention adds its own input to its output (`residual_connection`). Attention in a transformer
    block does not; the block does.
    """
    return {f"{n}.to_{x}": f"{n}.to_q" for n, m in attentions(denoiser) if m.residual_connection for x in "kv"}


def tuned_layers(denoiser: nn.Module, tuned: dict[str, QuantLayer], qkv_as_one: bool) -> int:
    """Number of tuned layers, the weight of L_G in the released code. `qkv_as_one`: q, k and v count as one."""
    one = qkv(denoiser) if qkv_as_one else {}
    return len({one.get(name, name) for name in tuned})


def share_inputs(denoiser: nn.Module) -> None:
    """Give to_k and to_v of every unconditional attention the input quantizer of its to_q."""
    for name, first in qkv(denoiser).items():
        denoiser.get_submodule(name).input_quantizer = denoiser.get_submodule(first).input_quantizer


def unshare_inputs(denoiser: nn.Module) -> None:
    """Give each layer a copy of the shared quantizer again, because a checkpoint stores every quantizer once."""
    for name, first in qkv(denoiser).items():
        shared = denoiser.get_submodule(first).input_quantizer
        copy = Quantizer(shared.spec, groups=shared.groups)
        copy.scale.data, copy.zero_point = shared.scale.detach().clone(), shared.zero_point.clone()
        denoiser.get_submodule(name).input_quantizer = copy
    name_quantizers(denoiser)

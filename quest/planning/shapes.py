"""What follows from a model's architecture alone: sizes, work, arguments of a denoiser call. No weights are needed."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from inspect import signature
from types import SimpleNamespace

from quest.config import FULL_PRECISION, parse_bits
from quest.diffusion.denoisers import sample_argument
from quest.diffusion.models import Model
from quest.runtime.files import read_json

# Where the configurations of denoisers say how wide the tokens of a prompt are, the first that is there.
WIDTHS = ("joint_attention_dim", "caption_channels", "cross_attention_dim")


@dataclass(frozen=True)
class Shape:
    """Number of denoiser parameters, and number of values in a latent, an image and the context of a sample."""

    parameters: int
    latent: int
    image: int
    context: int


def once(function: Callable) -> Callable:
    """Decorator of function(model, ...): it is computed once for each model, which two configs may name alike."""
    found = {}

    @functools.wraps(function)
    def remembered(model: Model, *arguments):
        key = (model.name, model.origin and model.origin.folder, *arguments)
        if key not in found:
            found[key] = function(model, *arguments)
        return found[key]

    return remembered


@once
def denoiser(model: Model):
    """The model's denoiser on the meta device."""
    from quest.diffusion import published

    return published.denoiser(model)


def is_unet(model: Model) -> bool:
    """Whether the model's denoiser is a U-Net, the only kind whose steps are measured."""
    return sample_argument(denoiser(model)) == "sample"


@once
def shape(model: Model) -> Shape:
    """The Shape of a model. It is exact and needs no weights."""
    unet = denoiser(model)
    config, count = unet.config, tokens(model)
    if model.origin is None:
        side = 64
    elif model.origin.folder is not None:
        vae = model.origin.folder / "vae" / "config.json"
        levels = read_json(vae).get("block_out_channels", [0]) if vae.is_file() else [0]
        side = config.sample_size * 2 ** (len(levels) - 1)
    elif model.origin.compvis is None:
        side = config.sample_size  # its latents are the pixels
    else:
        side = config.sample_size * (8 if config.in_channels == 4 else 4)  # KL-f8 has four channels, VQ-f4 three
    return Shape(
        parameters=sum(p.numel() for p in unet.parameters()),
        latent=config.in_channels * config.sample_size**2,
        image=3 * side**2,
        context=count * _width(config),
    )


@once
def work(model: Model) -> dict[str, int]:
    """Multiply-accumulates of one denoiser call on one sample, by layer."""
    from quest.quantization import cost

    return cost.macs(denoiser(model), inputs(denoiser(model), model, 1, "meta"))


@once
def footprint(model: Model, bits: str) -> dict:
    """`quest.quantization.cost.footprint` of a model at some bits. It is exact and needs no weights.

    It assumes the common stack: every layer is quantized, with the model's exceptions, one scale per output channel of
    a weight and one per activation tensor. Each further scale, of time groups or split shortcuts, takes 8 bytes.
    """
    from quest.quantization import cost
    from quest.quantization.swapping import swap

    unet = denoiser(model)
    if bits != FULL_PRECISION[1]:
        pipe = SimpleNamespace(unet=unet, scheduler=None)
        unet = swap(pipe, *parse_bits(bits), keep=model.keep, softmax_bits=model.softmax_bits).unet
    return cost.footprint(unet, work(model))


def inputs(denoiser, model: Model, batch: int, device: str, pipe=None) -> dict:
    """Random arguments of one call on `batch` samples."""
    import torch

    config, taken = denoiser.config, signature(denoiser.forward).parameters
    size = config.sample_size
    arguments = {
        sample_argument(denoiser): torch.randn(batch, config.in_channels, size, size, device=device),
        "timestep": torch.full((batch,), 500, device=device),
    }
    if count := tokens(model, pipe) if _width(config) else 0:
        arguments["encoder_hidden_states"] = torch.randn(batch, count, _width(config), device=device)
    if config.get("num_embeds_ada_norm") and "class_labels" in taken:
        arguments["class_labels"] = torch.zeros(batch, dtype=torch.long, device=device)
    if config.get("time_cond_proj_dim"):
        arguments["timestep_cond"] = torch.randn(batch, config.time_cond_proj_dim, device=device)
    if config.get("pooled_projection_dim"):
        arguments["pooled_projections"] = torch.randn(batch, config.pooled_projection_dim, device=device)
    if config.get("addition_embed_type") == "text_time":  # the pooled prompt, and six numbers about the size
        pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        arguments["added_cond_kwargs"] = {
            "text_embeds": torch.randn(batch, pooled, device=device),
            "time_ids": torch.zeros(batch, 6, device=device),
        }
    elif "added_cond_kwargs" in taken and config.get("caption_channels"):
        arguments["added_cond_kwargs"] = {"resolution": None, "aspect_ratio": None}
    return arguments


def _width(config) -> int:
    return next((config[name] for name in WIDTHS if config.get(name)), 0)


def tokens(model: Model, pipe=None) -> int:
    """Number of tokens in the condition of a sample, of the pipeline or else of the model as shipped or published."""
    import diffusers

    if model.conditioning == "none":
        return 0
    if pipe is not None and (hasattr(pipe, "tokenizer") or getattr(pipe, "class_embedder", None) is not None):
        return pipe.tokenizer.model_max_length if model.conditioning == "text" else pipe.class_embedder.config.tokens
    folder = model.folder if model.origin is None else model.origin.folder
    if folder is None:
        return {"class": 1, "text": 77}[model.conditioning]
    encoder, key = {"class": ("class_embedder", "tokens"), "text": ("text_encoder", "max_position_embeddings")}[
        model.conditioning
    ]
    file = folder / encoder / "config.json"
    # T5's prompts are as long as the pipeline's call says; in SD3 they stand beside those of CLIP.
    kind = getattr(diffusers, read_json(folder / "model_index.json")["_class_name"], None)
    told = signature(kind.__call__).parameters.get("max_sequence_length") if kind else None
    return (read_json(file).get(key, 0) if file.is_file() else 0) + (told.default if told else 0)

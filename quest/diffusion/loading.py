"""Loads a pipeline from a folder in diffusers layout."""

from __future__ import annotations

from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING

from quest.diffusion.denoisers import NAMES, name_of
from quest.runtime.files import read_text
from quest.runtime.hashing import opened
from quest.runtime.sums import check_sums

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


def load_pipeline(folder: Path, device="cpu", sampler: str | None = None) -> DiffusionPipeline:
    """Load a folder in diffusers layout, in float32 and eval mode.

    sampler: a name of `samplers.kind`, in place of the scheduler in the folder.
    Raises ValueError for a class of pipeline that diffusers does not have, for one without a denoiser, for a file whose
    hash differs from SHA256SUMS, and as `check_denoiser` does.
    """
    import diffusers
    import torch

    from quest.diffusion import samplers
    from quest.diffusion.pipelines import LatentDiffusionPipeline

    check_sums(folder)
    for part in NAMES:
        check_denoiser(Path(folder, part))
    index = diffusers.DiffusionPipeline.load_config(folder)
    name = index["_class_name"]
    kind = LatentDiffusionPipeline if name == "LatentDiffusionPipeline" else getattr(diffusers, str(name), None)
    if not (isinstance(kind, type) and issubclass(kind, diffusers.DiffusionPipeline)):
        raise ValueError(f"{folder}: a {name}; valid: LatentDiffusionPipeline and the pipelines of diffusers")
    # Some pipelines want to be told of the parts that their folder leaves out.
    settings = {
        part: None for part, entry in index.items() if entry == [None, None] and part in signature(kind).parameters
    }
    # A safety checker would black out images, and more of them with one method than with another; so would watermarks
    # change them.
    settings |= {"safety_checker": None, "requires_safety_checker": False} if "safety_checker" in index else {}
    settings |= {"add_watermarker": False} if "add_watermarker" in signature(kind).parameters else {}
    pipe = kind.from_pretrained(folder, **settings)
    name_of(pipe)
    for part, module in pipe.components.items():
        if isinstance(module, torch.nn.Module):
            missing = [name for name, parameter in module.named_parameters() if parameter.is_meta]
            if missing:
                raise ValueError(f"{folder / part}: its weights lack {missing[0]}, which its config.json asks for")
            if getattr(module, "is_quantized", False):
                continue  # it loads in the types and layout that it needs
            # A text encoder loads in float16, as it is stored. On a CPU, convolutions are 1.5 times as fast with
            # channels innermost, a layout that passes from a layer's weight to its output.
            module.float().eval().to(memory_format=torch.channels_last)
    if isinstance(pipe, diffusers.DiTPipeline):
        pipe.transformer.register_forward_pre_hook(_number_of_no_class, with_kwargs=True)
    if sampler is not None and samplers.name_of(pipe.scheduler) != sampler:
        pipe.scheduler = samplers.kind(sampler).from_config(pipe.scheduler.config)
    return pipe.to(device)


def check_denoiser(folder: Path) -> None:
    """Raise ValueError for weights that are quantized, in a denoiser's folder whose config.json does not say so.

    diffusers would find none of its tensors there, draw random ones, and only warn of it.
    """
    config = folder / "config.json"
    if not config.is_file() or '"quantization_config"' in read_text(config):
        return
    for weights in folder.glob("diffusion_pytorch_model*.safetensors"):
        with opened(weights, "numpy") as file:
            if any(name.endswith("_quantizer.scale") for name in file.keys()):
                raise ValueError(
                    f"{config}: no quantization_config, but {weights.name} is quantized; valid: the config.json that "
                    "save_pretrained wrote beside it"
                )


def _number_of_no_class(transformer, args, kwargs):
    """`DiTPipeline` says "no class" by 1000, its number among ImageNet's; other transformers have fewer classes."""
    labels = kwargs.get("class_labels")
    if labels is not None:
        kwargs["class_labels"] = labels.clamp(max=transformer.config.num_embeds_ada_norm)
    return args, kwargs

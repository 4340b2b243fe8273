"""Pipelines without text: unconditional (LSUN, CIFAR-10) or conditioned on a class (ImageNet), sampled with DDIM.

They run the models of arXiv:2112.10752 that diffusers' `StableDiffusionPipeline` does not cover, and DDIM's model for
CIFAR-10, which has no autoencoder. As in diffusers, the denoiser is called `unet`, and guidance doubles its batch:
first without, then with the condition.
"""

import importlib
import math
import numbers
from collections.abc import Sequence
from inspect import signature
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiffusionPipeline, UNet2DConditionModel, UNet2DModel, VQModel
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.image_processor import VaeImageProcessor
from diffusers.models.modeling_utils import ModelMixin
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import nn

from quest.runtime.files import dumps, read_json

# Classes in saved pipelines that diffusers does not define, and their modules.
CLASSES = {
    "ClassEmbedder": __name__,
    "FixedHeadsUNet2DModel": "quest.diffusion.compvis.networks",
    "QuadraticDDIMScheduler": "quest.diffusion.samplers",
}
OUTPUT_TYPES = ("pil", "np", "pt", "latent")


class ClassEmbedder(ModelMixin, ConfigMixin):
    """Class labels as context tokens for cross-attention.

    Labels are 0 .. num_classes - 1; the label `num_classes` (the last row) stands for "no class" in classifier-free
    guidance. Two or more tokens keep the softmax over the context from being constant.
    """

    @register_to_config
    def __init__(self, num_classes: int, tokens: int, dim: int):
        super().__init__()
        self.embedding = nn.Embedding(num_classes + 1, tokens * dim)

    def forward(self, labels: torch.Tensor) -> torch.Tensor:
        """Embed labels [B] (int64) as [B, tokens, dim]."""
        return self.embedding(labels).unflatten(-1, (self.config.tokens, self.config.dim))


class LatentDiffusionPipeline(DiffusionPipeline):
    """`unet`, `vae`, a DDIM `scheduler` and, for a class-conditional model, a `class_embedder`.

    Without `vae` the denoiser works on pixels in [-1, 1] (DDIM on CIFAR-10); "latents" below then means these pixels.
    Without `class_embedder` the denoiser is called as `unet(sample, timestep)`, with it as
    `unet(sample, timestep, encoder_hidden_states=tokens)`. `save_pretrained` works as for any diffusers pipeline;
    load with `LatentDiffusionPipeline.from_pretrained(folder)`, since diffusers does not know this class by name.
    """

    model_cpu_offload_seq = "class_embedder->unet->vae"
    _optional_components = ["vae", "class_embedder"]

    def __init__(
        self,
        unet: UNet2DModel | UNet2DConditionModel,
        vae: AutoencoderKL | VQModel | None,
        scheduler: DDIMScheduler,
        class_embedder: ClassEmbedder | None = None,
    ):
        super().__init__()
        self.register_modules(unet=unet, vae=vae, scheduler=scheduler, class_embedder=class_embedder)
        self.vae_scale_factor = 2 ** (len(vae.config.block_out_channels) - 1) if vae is not None else 1
        self.image_processor = VaeImageProcessor(vae_scale_factor=self.vae_scale_factor)

    @classmethod
    def load_config(cls, *args, **kwargs) -> dict:
        """Read `model_index.json` for `from_pretrained`, and name the current module of each class in CLASSES.

        diffusers finds classes only in imported modules, and older saved pipelines name a module that no longer exists,
        `quest.pipelines`.
        """
        config = super().load_config(*args, **kwargs)
        for name, entry in config.items():
            if isinstance(entry, list) and len(entry) == 2 and entry[1] in CLASSES:
                config[name] = [importlib.import_module(CLASSES[entry[1]]).__name__, entry[1]]
        return config

    @torch.no_grad()
    def __call__(
        self,
        batch_size: int = 1,
        class_labels: Sequence[int] | torch.Tensor | None = None,
        num_inference_steps: int = 50,
        eta: float = 0.0,
        guidance_scale: float = 1.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> ImagePipelineOutput | tuple:
        """Sample images, usually with DDIM (arXiv:2010.02502, equation 12).

        Args:
            batch_size: images to make; with `class_labels`, their number is used.
            class_labels: one label per image, each from 0 to num_classes - 1; only for class-conditional models.
            num_inference_steps: denoiser calls.
            eta: share of fresh noise in every step, from 0 (deterministic) to 1 (as much as DDPM).
            guidance_scale: 1 for none; above 1, one denoiser call on the batch [without class, with class] per step.
            generator: one for the batch, or a list with one per image. It draws the initial noise and, if eta > 0, the
                noise of every step, so that an image depends on its own generator only.
            latents: initial noise [B, C, h, w]; None draws it.
            output_type: "pil", "np" (float [B, H, W, 3] in [0, 1]), "pt" (float [B, 3, H, W] in [0, 1]) or "latent"
                ([B, C, h, w], not decoded).
            return_dict: whether to return an `ImagePipelineOutput` or a tuple with the images.

        Raises:
            ValueError: an argument does not fit the model or another argument; the message names it.
        """
        if class_labels is not None and batch_size == 1:
            batch_size = len(class_labels)
        counts = {"num_inference_steps": num_inference_steps, "batch_size": batch_size}
        for name, count in counts.items():
            if isinstance(count, bool) or not isinstance(count, numbers.Integral) or count < 1:
                raise ValueError(f"{name}: {count!r} is not a whole number from 1 on")
        self._check(batch_size, class_labels, eta, guidance_scale, generator, output_type)
        device = self._execution_device
        guided = guidance_scale > 1

        context = {}
        if class_labels is not None:
            labels = torch.as_tensor(class_labels, dtype=torch.long, device=device)  # [B]
            if guided:
                labels = torch.cat([torch.full_like(labels, self.class_embedder.config.num_classes), labels])  # [2B]
            context["encoder_hidden_states"] = self.class_embedder(labels).to(self.unet.dtype)

        size = self.unet.config.sample_size
        height, width = (size, size) if isinstance(size, int) else size
        shape = (batch_size, self.unet.config.in_channels, height, width)
        if latents is None:
            latents = randn_tensor(shape, generator=generator, device=device, dtype=self.unet.dtype)
        elif tuple(latents.shape) != shape:
            raise ValueError(f"latents: expected shape {list(shape)}, got {list(latents.shape)}")
        latents = latents.to(device, self.unet.dtype) * self.scheduler.init_noise_sigma  # [B, C, h, w]

        taken = signature(self.scheduler.step).parameters
        extra = {k: v for k, v in {"eta": eta, "generator": generator}.items() if k in taken}
        self.scheduler.set_timesteps(num_inference_steps, device=device)
        for t in self.progress_bar(self.scheduler.timesteps):
            sample = torch.cat([latents, latents]) if guided else latents
            noise = self.unet(self.scheduler.scale_model_input(sample, t), t, **context, return_dict=False)[0]
            if guided:
                unconditional, conditional = noise.chunk(2)
                noise = unconditional + guidance_scale * (conditional - unconditional)
            latents = self.scheduler.step(noise, t, latents, **extra, return_dict=False)[0]

        images = latents
        if output_type != "latent":
            if self.vae is not None:
                # A VQModel quantizes to its codebook inside decode.
                images = self.vae.decode(latents / self.vae.config.scaling_factor, return_dict=False)[0]
            images = self.image_processor.postprocess(images, output_type=output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _check(self, batch_size, class_labels, eta, guidance_scale, generator, output_type) -> None:
        if class_labels is not None:
            if self.class_embedder is None:
                raise ValueError(
                    "class_labels: this pipeline is unconditional (it has no class_embedder); leave them out"
                )
            if len(class_labels) != batch_size:
                raise ValueError(
                    f"class_labels: {len(class_labels)} given for batch_size {batch_size}; give one per image"
                )
            last = self.class_embedder.config.num_classes - 1
            wrong = [int(label) for label in class_labels if not 0 <= label <= last]
            if wrong:
                raise ValueError(f"class_labels: {wrong[0]} is not a class of this model; valid are 0 to {last}")
        elif self.class_embedder is not None:
            raise ValueError("class_labels: this pipeline is class-conditional; give one label per image")
        elif guidance_scale != 1:
            raise ValueError(f"guidance_scale: {guidance_scale} needs class_labels; an unconditional model takes 1")
        if not 1 <= guidance_scale < math.inf:
            raise ValueError(f"guidance_scale: {guidance_scale} is below 1 (no guidance), or not finite")
        if not 0 <= eta <= 1:
            raise ValueError(f"eta: {eta} is outside [0, 1]")
        if isinstance(generator, list) and len(generator) != batch_size:
            raise ValueError(
                f"generator: {len(generator)} generators for {batch_size} images; give one, or one per image"
            )
        if output_type not in OUTPUT_TYPES:
            raise ValueError(f"output_type: {output_type!r} is not one of {', '.join(OUTPUT_TYPES)}")


def text_pipeline(vae, encoder, tokenizer, unet, scheduler) -> DiffusionPipeline:
    """A StableDiffusionPipeline of these parts, without a safety checker."""
    from diffusers import StableDiffusionPipeline

    parts = {"vae": vae, "text_encoder": encoder, "tokenizer": tokenizer, "unet": unet, "scheduler": scheduler}
    unused = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    return StableDiffusionPipeline(**parts, **unused)


def forget_origin(path: Path) -> None:
    """Delete a component's source folder from its config file, because it means nothing on another machine."""
    settings = read_json(path)
    settings.pop("_name_or_path", None)
    path.write_text(dumps(settings, indent=2) + "\n", encoding="utf-8")

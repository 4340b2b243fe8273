"""Noised latents of real scenes in the shape of a calibration set: what finetuning without a teacher learns from."""

import torch

from quest.diffusion import scenes
from quest.diffusion.calibration_set import CalibrationSet
from quest.diffusion.models import Model
from quest.diffusion.sampling import timesteps
from quest.zoo.latents import posterior_means


@torch.no_grad()
def noised(pipe, model: Model, split: str, n: int, seed: int = 0) -> CalibrationSet:
    """The first n scenes of a split, noised to every timestep of the sampler; the target is the noise itself.

    Every scene is a "trajectory" with fresh noise in each call; under guidance both halves see the same noisy latent.
    """
    drawn = scenes.draw(split, n)
    z = posterior_means(pipe.vae, drawn.images()) * pipe.vae.config.scaling_factor  # [n, C, h, w]
    halves = 2 if model.guidance > 1 else 1
    context = _context(pipe, model, drawn)
    generator = torch.Generator().manual_seed(seed)
    calls = []
    for call, t in enumerate(timesteps(model, pipe)):
        noise = torch.randn(z.shape, generator=generator)
        alpha = pipe.scheduler.alphas_cumprod[t]
        noisy = alpha.sqrt() * z + (1 - alpha).sqrt() * noise
        calls.append(
            CalibrationSet(
                sample=noisy.repeat(halves, 1, 1, 1),
                timestep=torch.full((halves * n,), t),
                target=noise.repeat(halves, 1, 1, 1),
                trajectory=torch.arange(n).repeat(halves),
                call=torch.full((halves * n,), call),
                conditioning=context,
            )
        )
    names = ("sample", "timestep", "target", "trajectory", "call")
    own = {name: torch.cat([getattr(c, name) for c in calls]) for name in names}
    return CalibrationSet(**own, conditioning={k: torch.cat([c.conditioning[k] for c in calls]) for k in context})


def _context(pipe, model: Model, drawn) -> dict:
    """What the denoiser is told of the scenes; under guidance first nothing, then that."""
    if model.conditioning == "none":
        return {}
    if model.conditioning == "class":
        told = torch.from_numpy(drawn.labels())
        nothing = torch.full_like(told, pipe.class_embedder.config.num_classes)
        given, without = pipe.class_embedder(told), pipe.class_embedder(nothing)
    else:
        given, without = pipe.encode_prompt(drawn.captions(), pipe.device, 1, True)
    return {"encoder_hidden_states": torch.cat([without, given]) if model.guidance > 1 else given}

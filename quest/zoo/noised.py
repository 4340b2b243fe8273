"""Noised latents of real scenes as a calibration set, for finetuning without a teacher."""

import torch

from quest.diffusion import scenes
from quest.diffusion.calibration_set import CalibrationSet
from quest.diffusion.models import Model
from quest.diffusion.sampling import timesteps
from quest.zoo.latents import posterior_means


@torch.no_grad()
def noised(pipe, model: Model, split: str, n: int, seed: int = 0, start: int = 0) -> CalibrationSet:
    """Scenes start .. start + n - 1 of a split, noised to every timestep of the sampler; the noise is the target.

    Each scene counts as a trajectory, with fresh noise in each call; under guidance both halves have the same latent.
    """
    drawn = scenes.draw(split, n, start)
    z = posterior_means(pipe.vae, drawn.images()) * pipe.vae.config.scaling_factor  # [n, C, h, w]
    halves = model.halves
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
    columns = {name: torch.cat([getattr(c, name) for c in calls]) for name in names}
    return CalibrationSet(**columns, conditioning={k: torch.cat([c.conditioning[k] for c in calls]) for k in context})


def _context(pipe, model: Model, drawn) -> dict:
    """The condition of each scene as an argument of the denoiser; under guidance the empty condition comes first."""
    if model.conditioning == "none":
        return {}
    if model.conditioning == "class":
        labels = torch.from_numpy(drawn.labels())
        no_class = torch.full_like(labels, pipe.class_embedder.config.num_classes)
        tokens, empty = pipe.class_embedder(labels), pipe.class_embedder(no_class)
    else:
        tokens, empty = pipe.encode_prompt(drawn.captions(), pipe.device, 1, True)
    return {"encoder_hidden_states": torch.cat([empty, tokens]) if model.halves == 2 else tokens}

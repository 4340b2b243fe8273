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
    context, generator = _context(pipe, model, drawn), torch.Generator().manual_seed(seed)
    steps, halves = torch.tensor(timesteps(model, pipe)), model.halves
    noise = torch.stack([torch.randn(z.shape, generator=generator) for _ in steps])  # [calls, n, C, h, w]
    alpha = pipe.scheduler.alphas_cumprod[steps].view(-1, 1, 1, 1, 1)
    noisy = alpha.sqrt() * z + (1 - alpha).sqrt() * noise

    def rows(of_calls):  # all calls below each other, [calls * halves * n, C, h, w]
        return of_calls.repeat(1, halves, 1, 1, 1).flatten(0, 1)

    return CalibrationSet(
        sample=rows(noisy),
        timestep=steps.repeat_interleave(halves * n),
        target=rows(noise),
        trajectory=torch.arange(n).repeat(len(steps) * halves),
        call=torch.arange(len(steps)).repeat_interleave(halves * n),
        conditioning={name: values.repeat(len(steps), 1, 1) for name, values in context.items()},
    )


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

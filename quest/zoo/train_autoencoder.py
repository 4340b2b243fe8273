"""Train an autoencoder of the zoo: one for the scenes, one for emoji, one for photographs.

With this budget a small AutoencoderKL would collapse to grey if it started from random weights alone. So it starts from
principal components: at first the encoder regresses the whitened components of patches and the decoder receives these.
At the end the mean and scale of the latents are folded into quant_conv and post_quant_conv, so that latents have zero
mean and unit variance per channel and scaling_factor is 1.
"""

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL

from quest.diffusion import scenes
from quest.runtime import command_line
from quest.runtime.files import atomic_folder
from quest.zoo import pictures
from quest.zoo.training import Progress, autocast, cosine, descend, generator, load_checkpoint, save_checkpoint

BATCH_SIZE = 8
LEARNING_RATE = 1e-3
SEED = 0


@dataclass(frozen=True)
class Recipe:
    """Shape of an autoencoder and how long it is trained."""

    size: int  # side length of a picture in pixels
    latent_channels: int
    widths: tuple[int, ...]  # channels per level; each level after the first halves the resolution
    groups: int  # number of groups in each group norm
    iterations: int  # batches of BATCH_SIZE
    warm_start: float  # share of the iterations, at the start, with principal components as targets
    flips: bool = False  # whether left and right are exchanged in every second batch
    half: bool = False  # whether training uses bfloat16

    @property
    def patch(self):
        """Side length in pixels of the patch that one latent describes."""
        return 2 ** (len(self.widths) - 1)


RECIPES = {
    "scenes": Recipe(scenes.SIZE, 8, (16, 32, 64, 96), groups=4, iterations=1800, warm_start=0.33),
    "emoji": Recipe(64, 4, (16, 48, 96), groups=8, iterations=14000, warm_start=0.05, half=True),
    "photos": Recipe(32, 8, (32, 64, 96), groups=8, iterations=20000, warm_start=0.05, flips=True, half=True),
}


def build(recipe):
    """A standard AutoencoderKL whose posterior has a small variance at the start."""
    vae = AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * len(recipe.widths),
        up_block_types=("UpDecoderBlock2D",) * len(recipe.widths),
        block_out_channels=recipe.widths,
        layers_per_block=1,
        latent_channels=recipe.latent_channels,
        norm_num_groups=recipe.groups,
        sample_size=recipe.size,
        scaling_factor=1.0,
        mid_block_add_attention=False,
    )
    with torch.no_grad():
        vae.quant_conv.weight[recipe.latent_channels :] *= 0.1
        vae.quant_conv.bias[recipe.latent_channels :] = -6.0
    return vae


def to_tensor(images):
    """Convert uint8 [N, H, W, 3] to float [N, 3, H, W] in [-1, 1]."""
    return torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2).float() / 127.5 - 1


def to_images(x):
    """Convert float [N, 3, H, W] in [-1, 1] to uint8 [N, H, W, 3]."""
    return ((x.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()


def principal_components(x, recipe):
    """Mean [3 P^2] and whitened basis [3 P^2, C] of P x P patches of x [N, 3, H, W], for C latent channels."""
    channels = recipe.latent_channels
    patches = F.pixel_unshuffle(x, recipe.patch).permute(0, 2, 3, 1).reshape(-1, 3 * recipe.patch**2).double()
    mean = patches.mean(0)
    variances, vectors = torch.linalg.eigh(torch.cov((patches - mean).T))
    basis = vectors[:, -channels:].flip(1) / variances[-channels:].flip(0).sqrt()
    return mean.float(), basis.float()


def project(x, components, patch):
    """Whitened components of every patch, [N, C, H / P, W / P]."""
    mean, basis = components
    return ((F.pixel_unshuffle(x, patch).permute(0, 2, 3, 1) - mean) @ basis).permute(0, 3, 1, 2).contiguous()


def scene_loss(x, y):
    """L1 + L2 loss with extra weight on objects, on a coarse scale and on colour; background dominates a plain mean."""
    d = y - x
    foreground = ((x - x.mean((2, 3), keepdim=True)).abs().mean(1, keepdim=True) > 0.25).float()
    w = 1 + 4 * F.max_pool2d(foreground, 5, 1, 2)
    fine = (w * (d.abs() + d.square())).mean()
    coarse = (F.avg_pool2d(w, 4) * F.avg_pool2d(d, 4).abs()).mean()
    chroma = (w * (d - d.mean(1, keepdim=True)).abs()).mean()
    return fine + 2 * coarse + chroma


def picture_loss(x, y, w):
    """L1 + 2 L2 loss, with terms for a coarse scale, colour and gradients; w [N, 1, H, W] weights the pixels."""
    d = y - x
    fine = (w * (d.abs() + 2 * d.square())).mean()
    coarse = (F.avg_pool2d(w, 4) * F.avg_pool2d(d, 4).abs()).mean()
    chroma = (w * (d - d.mean(1, keepdim=True)).abs()).mean()
    gradients = (d[..., 1:] - d[..., :-1]).abs().mean() + (d[..., 1:, :] - d[..., :-1, :]).abs().mean()
    return fine + coarse + 0.5 * chroma + 0.5 * gradients


def reconstruction_loss(name, x, y):
    """The loss of autoencoder `name` between pictures and reconstructions [N, 3, H, W]."""
    if name == "scenes":
        return scene_loss(x, y)
    if name == "emoji":  # nearly half of the pixels are white background, so the others have three times the weight
        return picture_loss(x, y, 1 + 2 * F.max_pool2d(((1 - x).mean(1, keepdim=True) > 0.06).float(), 5, 1, 2))
    return picture_loss(x, y, torch.ones_like(x[:, :1]))


@torch.no_grad()
def normalise(vae, x):
    """Fold the mean and scale of the latents of x [N, 3, H, W] into the convolutions before and after them."""
    channels = vae.config.latent_channels
    z = torch.cat([vae.encode(part).latent_dist.mean for part in x.split(64)])
    mean, scale = z.mean((0, 2, 3)), z.std((0, 2, 3))
    inner, outer = vae.quant_conv, vae.post_quant_conv
    outer.bias += outer.weight[:, :, 0, 0] @ mean
    outer.weight *= scale[None, :, None, None]
    inner.weight[:channels] /= scale[:, None, None, None]
    inner.bias[:channels] = (inner.bias[:channels] - mean) / scale
    inner.bias[channels:] -= 2 * scale.log()


@torch.no_grad()
def psnr(vae, x):
    """PSNR in dB, from the mean squared error, of reconstructions of x [N, 3, H, W] from posterior means."""
    y = torch.cat([vae.decode(vae.encode(part).latent_dist.mean).sample.clamp(-1, 1) for part in x.split(64)])
    return 10 * math.log10(4 / (y - x).square().mean().item())


def examples(name, images, held_out, data=None):
    """(training pictures, held-out pictures), uint8 [N, S, S, 3] each; `data` is the file of real pictures."""
    if name == "scenes":
        return scenes.draw("train", images).images(), scenes.draw("validation", held_out).images()
    loaded = pictures.load(name, data)
    return loaded.images[loaded.rows("train")[:images]], loaded.images[loaded.rows("evaluation")[:held_out]]


def train(out, iterations, images=20_000, batch_size=BATCH_SIZE, held_out=500, name="scenes", data=None):
    """Train and write a diffusers folder to `out`. A stopped run resumes from `out`.checkpoint beside it."""
    out, recipe = Path(out), RECIPES[name]
    checkpoint = out.with_name(out.name + ".checkpoint")
    torch.manual_seed(SEED)
    vae = build(recipe)
    # torch's bfloat16 convolutions are slower with channels_last.
    layout = torch.contiguous_format if recipe.half else torch.channels_last
    vae.to(memory_format=layout)
    training_images, unseen = examples(name, images, held_out, data)
    components = principal_components(to_tensor(training_images[:3000]), recipe)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.99), weight_decay=1e-4)
    start = load_checkpoint(checkpoint, [vae], optimizer)
    progress = Progress("autoencoder", start, iterations, 50)
    for i in range(start, iterations):
        g = generator(SEED, i)
        x = to_tensor(training_images[torch.randint(len(training_images), (batch_size,), generator=g).numpy()])
        x = (x.flip(3) if recipe.flips and i % 2 else x).contiguous(memory_format=layout)
        with autocast(recipe.half):
            posterior = vae.encode(x).latent_dist
            if i < recipe.warm_start * iterations:
                target = project(x, components, recipe.patch)
                z = target + 0.02 * torch.randn(target.shape, generator=g)
                extra = 3 * (posterior.mean.float() - target).square().mean()
            else:
                z, extra = posterior.sample(g), 0.0
            y = vae.decode(z).sample.float()
        kl = posterior.kl().float().mean() / z[0].numel()
        loss = reconstruction_loss(name, x, y) + extra + 1e-5 * kl
        descend(loss, optimizer, LEARNING_RATE * cosine(i, iterations, 50))
        progress(i + 1, loss=loss, mse=(y - x).square().mean())
        if (i + 1) % 200 == 0:
            save_checkpoint(checkpoint, i + 1, [vae], optimizer)
    vae.eval()
    normalise(vae, to_tensor(training_images[:2000]))
    unseen = to_tensor(unseen)
    print(f"autoencoder: {psnr(vae, unseen):.2f} dB on held-out {name}", flush=True)
    with atomic_folder(out) as folder:
        vae.half().save_pretrained(folder)
    print(f"autoencoder: {psnr(AutoencoderKL.from_pretrained(out).float(), unseen):.2f} dB after rounding to fp16")
    checkpoint.unlink(missing_ok=True)


def main():
    parser = command_line.parser(__doc__, "folder", "threads")
    parser.add_argument("name", nargs="?", choices=RECIPES, default="scenes", help="which one (default %(default)s)")
    parser.add_argument("--data", type=Path, nargs="?", help="data file (.npz) of photographs or emoji")
    parser.add_argument("--iterations", type=int, help=f"batches of {BATCH_SIZE} (default: the recipe's)")
    arguments = parser.parse_args()
    if arguments.name != "scenes" and not arguments.data:
        parser.error(f"--data: {arguments.name} needs a data file")
    torch.set_num_threads(arguments.threads)
    images = 20_000 if arguments.name == "scenes" else None
    iterations = arguments.iterations or RECIPES[arguments.name].iterations
    train(arguments.output, iterations, images, name=arguments.name, data=arguments.data)


if __name__ == "__main__":
    main()

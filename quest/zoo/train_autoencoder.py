"""Train the autoencoder the three denoisers share: 64x64 scenes to 8x8 latents with 8 channels.

Left to itself a small AutoencoderKL collapses to grey within such a budget.  So it starts from principal components:
for the first third the encoder regresses the whitened components of 8x8 patches and the decoder is fed with those.
At the end the mean and scale of the latents are folded into quant_conv and post_quant_conv, so that latents have zero
mean and unit variance per channel and scaling_factor is 1.
"""

import argparse
import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL

from quest.diffusion import scenes
from quest.runtime.files import atomic_folder
from quest.zoo.training import Progress, cosine, generator, load_checkpoint, save_checkpoint

LATENT_CHANNELS = 8
PATCH = 8


def build():
    """A standard AutoencoderKL whose posterior starts narrow."""
    vae = AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(16, 32, 64, 96),
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=4,
        sample_size=scenes.SIZE,
        scaling_factor=1.0,
        mid_block_add_attention=False,
    )
    with torch.no_grad():
        vae.quant_conv.weight[LATENT_CHANNELS:] *= 0.1
        vae.quant_conv.bias[LATENT_CHANNELS:] = -6.0
    return vae


def to_tensor(images):
    """uint8 [N, H, W, 3] to float [N, 3, H, W] in [-1, 1]."""
    return torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2).float() / 127.5 - 1


def to_images(x):
    """float [N, 3, H, W] in [-1, 1] to uint8 [N, H, W, 3]."""
    return ((x.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()


def principal_components(x):
    """Mean [192] and whitened basis [192, 8] of 8x8 patches of x [N, 3, H, W]."""
    patches = F.pixel_unshuffle(x, PATCH).permute(0, 2, 3, 1).reshape(-1, 3 * PATCH**2).double()
    mean = patches.mean(0)
    variances, vectors = torch.linalg.eigh(torch.cov((patches - mean).T))
    basis = vectors[:, -LATENT_CHANNELS:].flip(1) / variances[-LATENT_CHANNELS:].flip(0).sqrt()
    return mean.float(), basis.float()


def project(x, components):
    """Whitened components of every patch, [N, 8, H / 8, W / 8]."""
    mean, basis = components
    return ((F.pixel_unshuffle(x, PATCH).permute(0, 2, 3, 1) - mean) @ basis).permute(0, 3, 1, 2).contiguous()


def reconstruction_loss(x, y):
    """L1 + L2 with more weight around objects, on a coarse scale and on colour: the mean error alone is background."""
    d = y - x
    foreground = ((x - x.mean((2, 3), keepdim=True)).abs().mean(1, keepdim=True) > 0.25).float()
    w = 1 + 4 * F.max_pool2d(foreground, 5, 1, 2)
    fine = (w * (d.abs() + d.square())).mean()
    coarse = (F.avg_pool2d(w, 4) * F.avg_pool2d(d, 4).abs()).mean()
    chroma = (w * (d - d.mean(1, keepdim=True)).abs()).mean()
    return fine + 2 * coarse + chroma


@torch.no_grad()
def normalise(vae, x):
    """Fold mean and scale of the latents of x [N, 3, H, W] into the convolutions around them."""
    z = torch.cat([vae.encode(part).latent_dist.mean for part in x.split(64)])
    mean, scale = z.mean((0, 2, 3)), z.std((0, 2, 3))
    inner, outer = vae.quant_conv, vae.post_quant_conv
    outer.bias += outer.weight[:, :, 0, 0] @ mean
    outer.weight *= scale[None, :, None, None]
    inner.weight[:LATENT_CHANNELS] /= scale[:, None, None, None]
    inner.bias[:LATENT_CHANNELS] = (inner.bias[:LATENT_CHANNELS] - mean) / scale
    inner.bias[LATENT_CHANNELS:] -= 2 * scale.log()


@torch.no_grad()
def psnr(vae, x):
    """Mean-squared-error PSNR in dB of reconstructions of x [N, 3, H, W] from posterior means."""
    y = torch.cat([vae.decode(vae.encode(part).latent_dist.mean).sample.clamp(-1, 1) for part in x.split(64)])
    return 10 * math.log10(4 / (y - x).square().mean().item())


def train(
    out,
    iterations,
    images=20_000,
    batch_size=8,
    warm_start=0.33,
    learning_rate=1e-3,
    held_out=500,
    seed=0,
    log_every=50,
):
    """Train and write a diffusers folder to `out`; `out`.checkpoint beside it is what a stopped run resumes from."""
    out = Path(out)
    checkpoint = out.with_name(out.name + ".checkpoint")
    torch.manual_seed(seed)
    vae = build().to(memory_format=torch.channels_last)
    data = scenes.draw("train", images).images()
    components = principal_components(to_tensor(data[:3000]))
    optimizer = torch.optim.AdamW(vae.parameters(), lr=learning_rate, betas=(0.9, 0.99), weight_decay=1e-4)
    start = load_checkpoint(checkpoint, [vae], optimizer)
    progress = Progress("autoencoder", start, iterations, log_every)
    for i in range(start, iterations):
        g = generator(seed, i)
        x = to_tensor(data[torch.randint(images, (batch_size,), generator=g).numpy()])
        x = x.contiguous(memory_format=torch.channels_last)
        posterior = vae.encode(x).latent_dist
        if i < warm_start * iterations:
            target = project(x, components)
            z = target + 0.02 * torch.randn(target.shape, generator=g)
            extra = 3 * (posterior.mean - target).square().mean()
        else:
            z, extra = posterior.sample(g), 0.0
        y = vae.decode(z).sample
        loss = reconstruction_loss(x, y) + extra + 1e-5 * posterior.kl().mean() / z[0].numel()
        optimizer.param_groups[0]["lr"] = learning_rate * cosine(i, iterations, 50)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        progress(i + 1, loss=loss, mse=(y - x).square().mean())
        if (i + 1) % 200 == 0:
            save_checkpoint(checkpoint, i + 1, [vae], optimizer)
    vae.eval()
    normalise(vae, to_tensor(data[:2000]))
    unseen = to_tensor(scenes.draw("validation", held_out).images())
    print(f"autoencoder: {psnr(vae, unseen):.2f} dB on held-out scenes", flush=True)
    with atomic_folder(out) as folder:
        vae.half().save_pretrained(folder)
    print(f"autoencoder: {psnr(AutoencoderKL.from_pretrained(out).float(), unseen):.2f} dB after rounding to fp16")
    checkpoint.unlink(missing_ok=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--out", type=Path, required=True, help="diffusers folder to write")
    parser.add_argument("--iterations", type=int, default=1800, help="batches of 8 scenes (default %(default)s)")
    parser.add_argument("--images", type=int, default=20_000, help="scenes to draw (default %(default)s)")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    train(args.out, args.iterations, args.images)


if __name__ == "__main__":
    main()

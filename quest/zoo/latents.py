"""Latents of training and held-out scenes, computed once for the three denoisers."""

import argparse
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file

from quest.diffusion import scenes
from quest.runtime.files import atomic
from quest.zoo.train_autoencoder import to_tensor
from quest.zoo.training import Progress

HELD_OUT = 1000  # scenes of the validation split on which a denoiser's error is reported
STEP = 500


@torch.no_grad()
def posterior_means(vae, images):
    """uint8 scenes [N, 64, 64, 3] to latents [N, 8, 8, 8]."""
    return torch.cat([vae.encode(part).latent_dist.mean for part in to_tensor(images).split(50)]).contiguous()


def compute(autoencoder, path, count):
    """Write the latents of the first `count` training and HELD_OUT validation scenes to `path` (.safetensors)."""
    vae = AutoencoderKL.from_pretrained(autoencoder).float().eval()
    found = {}
    for split, n in (("train", count), ("validation", HELD_OUT)):
        parts, progress = [], Progress(f"latents, {split}", 0, -(-n // STEP), 4)
        for start in range(0, n, STEP):
            parts.append(posterior_means(vae, scenes.draw(split, min(STEP, n - start), start).images()))
            progress(len(parts))
        found[split] = torch.cat(parts)
    with atomic(Path(path)) as temporary:
        save_file(found, temporary)


def load(path):
    """Latents of the training and of the validation scenes, [N, 8, 8, 8] each, in the order they are drawn."""
    found = load_file(path)
    return found["train"], found["validation"]


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("autoencoder", type=Path, help="diffusers folder of the trained autoencoder")
    parser.add_argument("-o", "--out", type=Path, required=True, help="file (.safetensors) to write")
    parser.add_argument("--images", type=int, default=40_000, help="training scenes (default %(default)s)")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    compute(args.autoencoder, args.out, args.images)


if __name__ == "__main__":
    main()

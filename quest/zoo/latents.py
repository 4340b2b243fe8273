"""Compute the latents of training and held-out pictures once for all denoisers that share an autoencoder."""

from pathlib import Path

import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file

from quest.diffusion import scenes
from quest.runtime import command_line
from quest.runtime.files import atomic
from quest.zoo import pictures
from quest.zoo.train_autoencoder import RECIPES, to_tensor
from quest.zoo.training import Progress

HELD_OUT = 1000  # pictures to report a denoiser's error on: validation scenes, or evaluation pictures of other kinds
STEP = 500


@torch.no_grad()
def posterior_means(vae, images):
    """Encode uint8 pictures [N, S, S, 3] as latents [N, C, S / P, S / P], for patches of P x P pixels."""
    return torch.cat([vae.encode(part).latent_dist.mean for part in to_tensor(images).split(50)]).contiguous()


def batches(name, count, data=None):
    """Yield (split, number of pictures, function (start, stop) -> uint8 pictures [n, S, S, 3]) for both splits."""
    if name == "scenes":
        for split, n in (("train", count), ("validation", HELD_OUT)):
            yield split, n, lambda a, b, split=split: scenes.draw(split, b - a, a).images()
        return
    loaded = pictures.load(name, data)
    for split, rows in (("train", loaded.rows("train")[:count]), ("validation", loaded.rows("evaluation")[:HELD_OUT])):
        yield split, len(rows), lambda a, b, rows=rows: loaded.images[rows[a:b]]


def compute(autoencoder, path, count=None, name="scenes", data=None):
    """Write the latents of the first `count` (None: all) training and HELD_OUT other pictures to `path` (.safetensors).

    If the autoencoder was trained with flipped pictures, the latents of flipped ones follow, in the same order.
    """
    vae = AutoencoderKL.from_pretrained(autoencoder).float().eval()
    latents = {}
    for split, n, images in batches(name, count, data):
        for flipped in (False, True) if RECIPES[name].flips and split == "train" else (False,):
            parts, progress = [], Progress(f"latents, {split}", 0, -(-n // STEP), 4)
            for start in range(0, n, STEP):
                part = images(start, min(start + STEP, n))
                parts.append(posterior_means(vae, part[:, :, ::-1] if flipped else part))
                progress(len(parts))
            latents[split] = torch.cat([latents[split], *parts] if flipped else parts)
    with atomic(Path(path)) as temporary:
        save_file(latents, temporary)


def load(path):
    """Latents of the training and of the held-out pictures, [N, C, h, w] each, in their order."""
    latents = load_file(path)
    return latents["train"], latents["validation"]


def main():
    parser = command_line.parser(__doc__, "file", "threads")
    parser.add_argument("autoencoder", type=Path, help="diffusers folder of the trained autoencoder")
    parser.add_argument("--pictures", choices=RECIPES, default="scenes", help="kind of pictures (default %(default)s)")
    parser.add_argument("--data", type=Path, nargs="?", help="data file (.npz) of photographs or emoji")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    count = 40_000 if arguments.pictures == "scenes" else None
    compute(arguments.autoencoder, arguments.output, count, arguments.pictures, arguments.data)


if __name__ == "__main__":
    main()

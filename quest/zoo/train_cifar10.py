"""Train the CIFAR-10 denoiser that DDIM samples: DDPM's U-Net and settings (arXiv:2006.11239, appendix B).

The U-Net predicts noise over 1000 steps with betas linear from 1e-4 to 0.02, and trains with Adam, dropout and random
flips. The moving average of the parameters is written in diffusers layout, in the shape of google/ddpm-cifar10-32, for
`models.cifar10.checkpoint` in a config. A stopped run resumes from `OUT.checkpoint` and gives the same parameters.

Data: a folder for torchvision's CIFAR10 (`--download` fetches it there), or a data file (see `quest.zoo.pictures`).
`--images FILE` only writes the images as an .npz, from which reference statistics can be computed.
"""

from pathlib import Path

import numpy as np
import torch
from diffusers import DDIMScheduler, UNet2DModel

from quest.diffusion.published import ARCHITECTURE
from quest.runtime import command_line
from quest.runtime.files import atomic, atomic_folder
from quest.zoo.pictures import cifar10
from quest.zoo.training import Average, Progress, descend, generator, load_checkpoint, save_checkpoint

ITERATIONS = 800_000
BATCH = 128
LEARNING_RATE = 2e-4
SEED = 0
WARMUP = 5000
AVERAGED = 0.9999


def train(
    images: np.ndarray,
    out,
    iterations: int = ITERATIONS,
    batch: int = BATCH,
    device="cpu",
    save_every: int = 1000,
    architecture: dict | None = None,
) -> None:
    """Train on images, uint8 [N, 32, 32, 3], and write the averaged U-Net to the folder `out`.

    Raises FloatingPointError that names the iteration if the loss is not finite.
    """
    out = Path(out)
    checkpoint = out.with_name(out.name + ".checkpoint")
    torch.manual_seed(SEED)
    unet = UNet2DModel(**(architecture or ARCHITECTURE)).to(device).train()
    optimizer = torch.optim.Adam(unet.parameters(), lr=LEARNING_RATE)
    average = Average(unet.parameters(), AVERAGED)
    start = load_checkpoint(checkpoint, [unet], optimizer, average)
    average.values = [value.to(device) for value in average.values]
    signal = DDIMScheduler(beta_start=1e-4, beta_end=0.02, beta_schedule="linear").alphas_cumprod.to(device)
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2)  # [N, 3, 32, 32]

    progress = Progress("cifar10", start, iterations, 100)
    for i in range(start, iterations):
        g = generator(SEED, i)
        torch.manual_seed(g.initial_seed())  # for dropout
        rows = torch.randint(len(pixels), (batch,), generator=g)
        t = torch.randint(0, 1000, (batch,), generator=g).to(device)
        noise = torch.randn((batch, *pixels.shape[1:]), generator=g).to(device)
        flip = torch.rand(batch, 1, 1, 1, generator=g) < 0.5
        x = pixels[rows]
        x = torch.where(flip, x.flip(3), x).to(device).float() / 127.5 - 1
        a = signal[t].view(-1, 1, 1, 1)
        loss = (unet(a.sqrt() * x + (1 - a).sqrt() * noise, t).sample - noise).square().mean()
        if not torch.isfinite(loss):
            raise FloatingPointError(f"cifar10: the loss is {loss.item()} in iteration {i}")
        descend(loss, optimizer, LEARNING_RATE * min(1.0, (i + 1) / WARMUP))
        average.update(i)
        progress(i + 1, loss=loss)
        if (i + 1) % save_every == 0 or i + 1 == iterations:
            save_checkpoint(checkpoint, i + 1, [unet], optimizer, average)
    average.swap()
    with atomic_folder(out) as folder:
        unet.eval().save_pretrained(folder)
    print(f"cifar10: {iterations} iterations; wrote {out}", flush=True)


def main() -> None:
    parser = command_line.parser(__doc__, "threads")
    parser.add_argument("--data", type=Path, required=True, help="folder for torchvision, or .npz of JPEG bytes")
    parser.add_argument("--download", action="store_true", help="fetch CIFAR-10 into the folder")
    parser.add_argument("--images", type=Path, help="write the images to this .npz, and stop")
    parser.add_argument("-o", "--output", type=Path, help="folder to write the U-Net to")
    parser.add_argument("--iterations", type=int, default=ITERATIONS, help="batches (default %(default)s)")
    parser.add_argument("--batch", type=int, default=BATCH, help="images per batch (default %(default)s)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    if (arguments.images is None) == (arguments.output is None):
        parser.error("give one of --images and --output")
    torch.set_num_threads(arguments.threads)
    images = cifar10(arguments.data, arguments.download)[0]
    if arguments.images:
        with atomic(arguments.images) as file:
            np.savez(file, arr_0=images)
        return
    train(images, arguments.output, arguments.iterations, arguments.batch, arguments.device)


if __name__ == "__main__":
    main()

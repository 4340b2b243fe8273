"""Train the extractor of the image metrics: first on scenes, then also on the autoencoder's reconstructions.

Both phases add a light blur and noise, so that features depend on what a scene shows and not on how sharp it is.
"""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from safetensors.torch import save_file

from quest.diffusion import scenes
from quest.metrics.extractor import HEADS, SceneNet, outputs, targets
from quest.runtime import command_line
from quest.runtime.files import atomic_folder, dumps
from quest.zoo.train_autoencoder import to_images, to_tensor
from quest.zoo.training import Progress, cosine, descend, generator, load_checkpoint, save_checkpoint

BATCH_SIZE = 64
SEED = 1


def augment(x, g):
    """Apply a 3x3 blur of random strength and a little noise to x [N, 3, H, W]."""
    kernel = torch.tensor([0.25, 0.5, 0.25])
    kernel = (kernel[:, None] * kernel).expand(3, 1, 3, 3)
    blurred = F.conv2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), kernel, groups=3)
    x = torch.lerp(x, blurred, torch.rand(len(x), 1, 1, 1, generator=g))
    return x + 0.06 * torch.rand(len(x), 1, 1, 1, generator=g) * torch.randn(x.shape, generator=g)


def loss_of(heads, wanted):
    """Sum of the cross entropies of all heads, with the main object counted twice."""
    losses = {name: F.cross_entropy(heads[name], wanted[name]) for name in HEADS}
    return sum(losses.values()) + losses["logits"]


@torch.no_grad()
def reconstruct(vae, images):
    """Encode and decode uint8 scenes [N, H, W, 3]."""
    x = to_tensor(images).split(64)
    return to_images(torch.cat([vae.decode(vae.encode(part).latent_dist.mean).sample for part in x]))


def accuracy(net, images, wanted):
    """Share of correct predictions per head on uint8 images."""
    heads = outputs(net, to_tensor(images))
    return {name: (heads[name].argmax(1) == wanted[name]).float().mean().item() for name in HEADS}


def run_phase(name, net, data, wanted, iterations, checkpoint, learning_rate, seed):
    """Train on uint8 data [N, H, W, 3]; the rows of `wanted` repeat if data contains each scene more than once."""
    optimizer = torch.optim.AdamW(net.parameters(), lr=learning_rate, weight_decay=1e-3)
    start = load_checkpoint(checkpoint, [net], optimizer)
    progress = Progress(name, start, iterations, 100)
    for i in range(start, iterations):
        g = generator(seed, i)
        rows = torch.randint(len(data), (BATCH_SIZE,), generator=g)
        heads = net(augment(to_tensor(data[rows.numpy()]), g))
        loss = loss_of(heads, {k: v[rows % len(v)] for k, v in wanted.items()})
        descend(loss, optimizer, learning_rate * cosine(i, iterations), clip=False)
        progress(i + 1, loss=loss)
        if (i + 1) % 500 == 0 or i + 1 == iterations:
            save_checkpoint(checkpoint, i + 1, [net], optimizer)


def train(out, autoencoder, iterations, fine_tuning, images=20_000, held_out=2000):
    """Train and write config.json and model.safetensors to the folder `out`."""
    out = Path(out)
    checkpoints = [out.with_name(f"{out.name}.checkpoint{k}") for k in (1, 2)]
    torch.manual_seed(SEED)
    net = SceneNet()
    drawn = scenes.draw("train", images)
    data, wanted = drawn.images(), targets(drawn)
    unseen = scenes.draw("validation", held_out)
    unseen, unseen_wanted = unseen.images(), targets(unseen)
    run_phase("extractor", net, data, wanted, iterations, checkpoints[0], 2e-3, SEED)
    report(net, "real scenes", unseen, unseen_wanted)
    if fine_tuning:
        vae = AutoencoderKL.from_pretrained(autoencoder).float().eval()
        few = images // 4
        data = np.concatenate([data[:few], reconstruct(vae, data[:few])])
        wanted = {k: v[:few] for k, v in wanted.items()}
        run_phase("extractor, reconstructions", net, data, wanted, fine_tuning, checkpoints[1], 5e-4, SEED + 1)
        report(net, "real scenes", unseen, unseen_wanted)
        report(net, "reconstructions", reconstruct(vae, unseen), unseen_wanted)
    with atomic_folder(out) as folder:
        (folder / "config.json").write_text(dumps(net.settings, indent=2) + "\n", encoding="utf-8")
        save_file({k: v.half().contiguous() for k, v in net.state_dict().items()}, folder / "model.safetensors")


def report(net, what, images, wanted):
    scores = "  ".join(f"{name} {share:.4f}" for name, share in accuracy(net, images, wanted).items())
    print(f"extractor: held-out accuracy on {what}: {scores}", flush=True)


def main():
    parser = command_line.parser(__doc__, "folder", "threads")
    parser.add_argument("--autoencoder", type=Path, help="diffusers folder of the trained autoencoder")
    parser.add_argument("--iterations", type=int, default=1200, help="batches of 64 scenes (default %(default)s)")
    parser.add_argument(
        "--fine-tuning", type=int, default=400, help="further batches, half of them reconstructions (%(default)s)"
    )
    arguments = parser.parse_args()
    if arguments.fine_tuning and not arguments.autoencoder:
        parser.error("--autoencoder is needed unless --fine-tuning 0")
    torch.set_num_threads(arguments.threads)
    train(arguments.output, arguments.autoencoder, arguments.iterations, arguments.fine_tuning)


if __name__ == "__main__":
    main()

"""Train the classifier of photographs on the training split, by airbench96's recipe with Muon (arXiv:2404.00498).

Filters are updated by Muon and kept at a constant norm; biases and the head by SGD. An image is mirrored in every
second epoch, moved by up to 4 pixels, and loses a square of 12 pixels. A batch of 2,000 is computed in parts, which
batch norm sees separately.
"""

from pathlib import Path

import torch
from safetensors.torch import save_file
from torch.nn import functional as F

from quest.metrics.classifier import PhotoNet, logits, loss_of
from quest.runtime import command_line
from quest.runtime.files import atomic_folder, dumps
from quest.zoo.pictures import photographs
from quest.zoo.training import Progress, autocast, generator, load_checkpoint, save_checkpoint

BATCH, PART = 2000, 125
SHIFT, HOLE = 4, 12  # pixels
SEED = 0


class Optimizers:
    """Two optimizers behind the methods of one."""

    def __init__(self, *optimizers):
        self.optimizers = optimizers

    def step(self):
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()

    def scale(self, factor):
        """Set every learning rate to `factor` times its first value."""
        for optimizer in self.optimizers:
            for settings in optimizer.param_groups:
                settings["lr"] = settings.setdefault("initial_lr", settings["lr"]) * factor

    def state_dict(self):
        return {str(i): optimizer.state_dict() for i, optimizer in enumerate(self.optimizers)}

    def load_state_dict(self, state):
        for i, optimizer in enumerate(self.optimizers):
            optimizer.load_state_dict(state[str(i)])


class Filters(torch.optim.Muon):
    """Muon for convolutions: each filter [O, I, 3, 3] is a matrix [O, 9 I] of Frobenius norm sqrt(O)."""

    def __init__(self, filters, **settings):
        self.filters = list(filters)
        super().__init__([torch.nn.Parameter(f.detach().flatten(1)) for f in self.filters], **settings)

    @torch.no_grad()
    def step(self):
        matrices = self.param_groups[0]["params"]
        for matrix, filter in zip(matrices, self.filters, strict=True):
            matrix.copy_(filter.flatten(1) * (len(filter) ** 0.5 / filter.norm()))
            matrix.grad = filter.grad.flatten(1)
        super().step()
        for matrix, filter in zip(matrices, self.filters, strict=True):
            filter.copy_(matrix.view_as(filter))
            filter.grad = None


@torch.no_grad()
def initialize(net, x):
    """Set the whitening of 2x2 patches from images x [N, 3, 32, 32]; filters start as the identity."""
    patches = x.unfold(2, 2, 1).unfold(3, 2, 1).permute(0, 2, 3, 1, 4, 5).reshape(-1, 12)
    values, vectors = torch.linalg.eigh(torch.cov(patches.T))
    whitening = (vectors / (values + 5e-4).sqrt()).T.reshape(12, 3, 2, 2)
    net.whiten.weight.copy_(torch.cat([whitening, -whitening]))
    net.whiten.bias.zero_()
    for module in net.groups.modules():
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.dirac_(module.weight[: module.in_channels])
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = 0.05  # a batch has 16 parts
    net.head.weight.div_(net.head.weight.std())


def moved(padded, g):
    """Cut images [N, 3, 32, 32] out of padded ones [N, 3, 40, 40], each at a random place."""
    n, side = len(padded), padded.shape[2] - 2 * SHIFT
    y, x = torch.randint(0, 2 * SHIFT + 1, (2, n, 1), generator=g) + torch.arange(side)  # [n, side] each
    return padded[torch.arange(n)[:, None, None], :, y[:, :, None], x[:, None, :]].permute(0, 3, 1, 2)


def with_hole(images, g):
    """Return images [N, C, S, S] with a square of HOLE pixels set to 0, each at a random place inside."""
    n, side = len(images), images.shape[2]
    start = torch.randint(0, side - HOLE + 1, (2, n, 1), generator=g)
    y, x = (torch.arange(side) >= start) & (torch.arange(side) < start + HOLE)  # [n, side] each
    return images.masked_fill((y[:, :, None] & x[:, None, :])[:, None], 0.0)


def train(data, out, epochs, batch=BATCH, save_every=11):
    """Train on photographs (see `quest.zoo.pictures`) and write config.json and model.safetensors to the folder `out`.

    A stopped run resumes from `OUT.checkpoint`, which is written every `save_every` batches. Returns the share of
    held-out photographs (of both splits) whose class is recognised.
    """
    out = Path(out)
    checkpoint = out.with_name(f"{out.name}.checkpoint")
    photos = photographs(data)
    rows = torch.from_numpy(photos.rows("train"))
    pixels = torch.from_numpy(photos.images).permute(0, 3, 1, 2)
    labels = torch.from_numpy(photos.labels)
    torch.manual_seed(SEED)
    net = PhotoNet(photos.classes).train()
    initialize(net, pixels[rows[:5000]].float() / 127.5 - 1)
    net.whiten.weight.requires_grad_(False)
    filters = [p for p in net.groups.parameters() if p.ndim == 4]
    decay = 2e-6 * batch
    others = [
        {"params": [net.whiten.bias], "lr": 0.053, "weight_decay": decay / 0.053},
        {"params": [net.head.weight], "lr": 0.67, "weight_decay": decay / 0.67},
    ]
    optimizer = Optimizers(
        torch.optim.SGD(others, momentum=0.85, nesterov=True),
        Filters(filters, lr=0.24, momentum=0.6, nesterov=True, weight_decay=0, ns_steps=3),
    )
    steps = -(-len(rows) // batch)  # batches of an epoch
    total = epochs * steps
    start = load_checkpoint(checkpoint, [net], optimizer)
    progress = Progress("classifier", start, total, 2)
    first_mirrored = torch.rand(len(pixels), generator=generator(SEED, 0)) < 0.5
    for i in range(start, total):
        epoch, place = divmod(i, steps)
        order = rows[torch.randperm(len(rows), generator=generator(SEED + 1, epoch))]
        g, losses = generator(SEED, i), 0.0
        for part in order[place * batch : (place + 1) * batch].split(PART):
            x = pixels[part].float() / 127.5 - 1
            mirrored = first_mirrored[part] ^ bool(epoch % 2)
            x = torch.where(mirrored[:, None, None, None], x.flip(3), x)
            x = with_hole(moved(F.pad(x, (SHIFT,) * 4, mode="reflect"), g), g)
            with autocast(True):
                loss = loss_of(net, x, labels[part])
            loss.backward()
            losses += loss.item() / len(part) / -(-batch // PART)
        optimizer.scale(1 - i / total)
        optimizer.step()
        progress(i + 1, loss=losses)
        if (i + 1) % save_every == 0 or i + 1 == total:
            save_checkpoint(checkpoint, i + 1, [net], optimizer)
    with atomic_folder(out) as folder:
        (folder / "config.json").write_text(dumps(net.settings, indent=2) + "\n", encoding="utf-8")
        state = {name: v.half() if v.is_floating_point() else v for name, v in net.state_dict().items()}
        save_file({name: v.contiguous() for name, v in state.items()}, folder / "model.safetensors")
    held_out = torch.cat([torch.from_numpy(photos.rows(split)) for split in ("evaluation", "reference")])
    net.eval()
    right = torch.cat([logits(net, pixels[part]).argmax(1) == labels[part] for part in held_out.split(500)])
    return right.float().mean().item()


def main():
    parser = command_line.parser(__doc__, "folder", "threads")
    parser.add_argument("--data", type=Path, required=True, help="data file (.npz), or folder of CIFAR-10")
    parser.add_argument("--epochs", type=int, default=40, help="(default %(default)s)")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    share = train(arguments.data, arguments.output, arguments.epochs)
    print(f"classifier: right class of {share:.4f} of the held-out photographs", flush=True)


if __name__ == "__main__":
    main()

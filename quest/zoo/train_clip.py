"""Train the image-text model of the CLIP score: open_clip's own classes, small, contrastive (arXiv:2103.00020)."""

from pathlib import Path

import open_clip
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from quest.diffusion import scenes
from quest.metrics.clip import load
from quest.runtime import command_line
from quest.runtime.files import atomic_folder, dumps
from quest.zoo.train_autoencoder import to_tensor
from quest.zoo.train_extractor import augment
from quest.zoo.training import Progress, cosine, generator, load_checkpoint, save_checkpoint
from quest.zoo.vocabulary import build_tokenizer, encode


def settings(tokenizer):
    """The content of open_clip_config.json: a bottleneck ResNet with attention pooling, and a text transformer."""
    return {
        "model_cfg": {
            "embed_dim": 64,
            "vision_cfg": {"image_size": scenes.SIZE, "layers": [1, 1, 1, 1], "width": 16, "head_width": 64},
            "text_cfg": {
                "context_length": tokenizer.model_max_length,
                "vocab_size": len(tokenizer),
                "hf_tokenizer_name": "scenes-clip",
                "width": 64,
                "heads": 4,
                "layers": 2,
            },
        },
        "preprocess_cfg": {"mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic", "resize_mode": "shortest"},
    }


def contrastive_loss(image, text, scale):
    """Symmetric cross entropy over all pairs of a batch; image and text [N, D] are normalised."""
    logits = scale * image @ text.T
    matches = torch.arange(len(logits))
    return (F.cross_entropy(logits, matches) + F.cross_entropy(logits.T, matches)) / 2


def train(out, iterations, images=20_000, batch_size=128, learning_rate=2e-3, held_out=1000, seed=2, log_every=25):
    """Train and write a folder that quest.metrics.clip.load reads."""
    out = Path(out)
    checkpoint = out.with_name(out.name + ".checkpoint")
    torch.manual_seed(seed)
    tokenizer = build_tokenizer()
    config = settings(tokenizer)
    model = open_clip.CLIP(**config["model_cfg"]).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.02)
    drawn = scenes.draw("train", images)
    data, ids = drawn.images(), encode(tokenizer, drawn.captions())
    start = load_checkpoint(checkpoint, [model], optimizer)
    progress = Progress("clip", start, iterations, log_every)
    for i in range(start, iterations):
        g = generator(seed, i)
        rows = torch.randint(images, (batch_size,), generator=g)
        image = model.encode_image(augment(to_tensor(data[rows.numpy()]), g), normalize=True)
        text = model.encode_text(ids[rows], normalize=True)
        loss = contrastive_loss(image, text, model.logit_scale.exp())
        optimizer.param_groups[0]["lr"] = learning_rate * cosine(i, iterations)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            model.logit_scale.clamp_(max=4.6052)  # a factor of 100, as in CLIP
        progress(i + 1, loss=loss)
        if (i + 1) % 100 == 0 or i + 1 == iterations:
            save_checkpoint(checkpoint, i + 1, [model], optimizer)
    with atomic_folder(out) as folder:
        (folder / "open_clip_config.json").write_text(dumps(config, indent=2) + "\n", encoding="utf-8")
        tokenizer.save_pretrained(folder)
        state = {k: v.half() if v.is_floating_point() else v for k, v in model.state_dict().items()}
        save_file({k: v.contiguous() for k, v in state.items()}, folder / "open_clip_model.safetensors")
    report(out, held_out)


@torch.no_grad()
def report(folder, n):
    """Print scores and retrieval rates on held-out scenes, with the weights as shipped."""
    model, _, tokenizer = load(folder)
    drawn = scenes.draw("validation", n)
    image = torch.cat([model.encode_image(x, normalize=True) for x in to_tensor(drawn.images()).split(250)])
    text = model.encode_text(tokenizer(drawn.captions()), normalize=True)
    score = 100 * image @ text.T
    print(f"clip: held-out score {score.diag().mean():.1f} with the image's caption,", end=" ")
    print(f"{score[~torch.eye(n, dtype=bool)].mean():.1f} with other captions;", end=" ")
    for k in (1, 5):
        hit = (score.topk(k, 1).indices == torch.arange(n)[:, None]).any(1).float().mean()
        print(f"image's caption among the best {k} of {n}: {hit:.3f}", end="; " if k == 1 else "\n", flush=True)


def main():
    parser = command_line.parser(__doc__, "folder", "threads")
    parser.add_argument("--iterations", type=int, default=400, help="batches of 128 scenes (default %(default)s)")
    parser.add_argument("--images", type=int, default=20_000, help="scenes to draw (default %(default)s)")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    train(arguments.output, arguments.iterations, arguments.images)


if __name__ == "__main__":
    main()

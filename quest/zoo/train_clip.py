"""Train an image-text model of scenes or of emoji: open_clip's own classes, small, contrastive (arXiv:2103.00020).

That of scenes is behind the CLIP score of the zoo. That of emoji, trained on the training split with concepts drawn
evenly, tells whether an image shows its caption (`quest.zoo.acceptance --judge`).
"""

from pathlib import Path

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from quest.diffusion import scenes
from quest.metrics.clip import load
from quest.metrics.per_image import caption_first
from quest.runtime import command_line
from quest.runtime.files import atomic_folder, dumps
from quest.zoo import pictures
from quest.zoo.train_autoencoder import to_tensor
from quest.zoo.train_extractor import augment
from quest.zoo.training import Progress, cosine, descend, generator, load_checkpoint, save_checkpoint
from quest.zoo.vocabulary import MAX_LENGTH, build_tokenizer, caption_words, encode

LEARNING_RATE = 2e-3
SEED = 2


def settings(tokenizer, name="scenes-clip"):
    """The content of open_clip_config.json: a bottleneck ResNet with attention pooling, and a text transformer."""
    return {
        "model_cfg": {
            "embed_dim": 64,
            "vision_cfg": {"image_size": scenes.SIZE, "layers": [1, 1, 1, 1], "width": 16, "head_width": 64},
            "text_cfg": {
                "context_length": tokenizer.model_max_length,
                "vocab_size": len(tokenizer),
                "hf_tokenizer_name": name,
                "width": 64,
                "heads": 4,
                "layers": 2,
            },
        },
        "preprocess_cfg": {"mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic", "resize_mode": "shortest"},
    }


def material(kind, images, data=None):
    """Training images uint8 [N, 64, 64, 3], their captions, sampling weights float64 [N] or None, and a tokenizer."""
    if kind == "scenes":
        drawn = scenes.draw("train", images)
        return drawn.images(), drawn.captions(), None, build_tokenizer()
    shown = pictures.load(kind, data)
    rows = shown.rows("train")
    captions, concepts = ([column[i] for i in rows] for column in (shown.captions, shown.concepts))
    tokenizer = build_tokenizer(caption_words(captions), MAX_LENGTH[kind])
    return shown.images[rows], captions, torch.from_numpy(pictures.concept_weights(concepts)), tokenizer


def unseen(kind, n, data=None):
    """Yield (what, images uint8, captions) of up to n pictures that the model was not trained on."""
    if kind == "scenes":
        drawn = scenes.draw("validation", n)
        yield "held-out scenes", drawn.images(), drawn.captions()
        return
    shown = pictures.load(kind, data)
    for held_out in ("style", "concept"):
        rows = np.random.default_rng(0).permutation(np.flatnonzero(shown.held_out == held_out))[:n]
        yield f"held-out {held_out}s", shown.images[rows], [shown.captions[i] for i in rows]


def train(out, iterations, images=20_000, batch_size=128, held_out=1000, kind="scenes", data=None):
    """Train and write a folder that quest.metrics.clip.load reads.

    kind: "scenes", of which `images` are drawn, or "emoji", whose data file is `data`.
    """
    out = Path(out)
    checkpoint = out.with_name(out.name + ".checkpoint")
    torch.manual_seed(SEED)
    shown, captions, weights, tokenizer = material(kind, images, data)
    config = settings(tokenizer, f"{kind}-clip")
    model = open_clip.CLIP(**config["model_cfg"]).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.02)
    ids = encode(tokenizer, captions)
    start = load_checkpoint(checkpoint, [model], optimizer)
    progress = Progress("clip", start, iterations, 25)
    for i in range(start, iterations):
        g = generator(SEED, i)
        if weights is None:
            rows = torch.randint(len(shown), (batch_size,), generator=g)
        else:
            rows = torch.multinomial(weights, batch_size, generator=g)
        image = model.encode_image(augment(to_tensor(shown[rows.numpy()]), g), normalize=True)
        text = model.encode_text(ids[rows], normalize=True)
        logits, matches = model.logit_scale.exp() * image @ text.T, torch.arange(batch_size)  # all pairs of the batch
        loss = (F.cross_entropy(logits, matches) + F.cross_entropy(logits.T, matches)) / 2
        descend(loss, optimizer, LEARNING_RATE * cosine(i, iterations), clip=False)
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
    for what, pictures_of, texts in unseen(kind, held_out, data):
        report(out, what, pictures_of, texts)


@torch.no_grad()
def report(folder, what, images, captions):
    """Print scores and retrieval rates on pictures uint8 [N, 64, 64, 3], with the weights as shipped."""
    model, _, tokenizer = load(folder)
    n = len(images)
    image = torch.cat([model.encode_image(x, normalize=True) for x in to_tensor(images).split(250)])
    text = torch.cat([model.encode_text(tokenizer(captions[i : i + 250]), normalize=True) for i in range(0, n, 250)])
    score = 100 * image @ text.T
    print(f"clip, {what}: score {score.diag().mean():.1f} with the image's caption,", end=" ")
    print(f"{score[~torch.eye(n, dtype=bool)].mean():.1f} with other captions;", end=" ")
    for k in (1, 5):
        hit = (score.topk(k, 1).indices == torch.arange(n)[:, None]).any(1).float().mean()
        print(f"image's caption among the best {k} of {n}: {hit:.3f}", end="; ")
    if n >= 100:
        print(f"first of 100: {caption_first(image.numpy(), text.numpy()).mean():.3f}", end="")
    print(flush=True)


def main():
    parser = command_line.parser(__doc__, "folder", "threads")
    parser.add_argument("--iterations", type=int, default=400, help="batches of 128 pictures (default %(default)s)")
    parser.add_argument("--pictures", choices=("scenes", "emoji"), default="scenes", help="(default %(default)s)")
    parser.add_argument("--data", type=Path, help="data file (.npz) of emoji")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.pictures == "emoji" and not arguments.data:
        parser.error("--data: emoji need a data file")
    train(arguments.output, arguments.iterations, kind=arguments.pictures, data=arguments.data)


if __name__ == "__main__":
    main()

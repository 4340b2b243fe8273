"""Train one of the latent diffusion models of the zoo.

scenes-text    a StableDiffusionPipeline; its small CLIP text encoder is trained together with the denoiser
scenes-class   conditioned on kind x colour of the main object
scenes-uncond  unconditional
emoji-uncond   emoji, unconditional
emoji-text     a StableDiffusionPipeline of emoji, with captions such as "noto emoji: red apple"
photos-class   CIFAR-10's photographs, conditioned on the class
photos-dit     the same by a transformer, a DiTPipeline (arXiv:2212.09748)

scenes-class starts from the denoiser of scenes-text, which has the same shape, and emoji-uncond from the convolutions
of emoji-text. All models predict the noise of the
scaled-linear schedule of latent diffusion (arXiv:2112.10752) over 1000 steps, with min-SNR-5 weights (arXiv:2303.09556;
here with a floor) and a moving average of the parameters. A tenth of the conditions is dropped for classifier-free
guidance (arXiv:2207.12598). A stopped run resumes from `OUT.checkpoint`; as long as the learning rate is constant (the
first three quarters) it may resume with another number of iterations.
"""

import time
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file

from quest.diffusion import scenes
from quest.diffusion.pipelines import ClassEmbedder, forget_origin
from quest.runtime import command_line
from quest.runtime.files import atomic_folder
from quest.zoo import latents, pictures, training
from quest.zoo.architectures import MODELS, alphas, build_denoiser, build_pipeline, build_text_encoder, recipe_of
from quest.zoo.vocabulary import MAX_LENGTH, build_tokenizer, caption_words, encode

LEARNING_RATE = 1e-3
SEED = 0
DROPPED = 0.1
SAVE_SECONDS = 600  # a stopped training loses at most this many seconds of work


class Trainee:
    """Denoiser and condition encoder of one model. `shown`: the training Pictures; None for scenes."""

    def __init__(self, name, shown=None):
        self.name, self.recipe, self.shown = name, recipe_of(name), shown
        classes = len(scenes.CLASSES if shown is None else shown.classes)
        self.denoiser = build_denoiser(name, classes)
        self.tokenizer = self.encoder = None
        if self.recipe.conditioning == "text":
            words = shown and caption_words([shown.captions[i] for i in shown.rows("train")])
            length = MAX_LENGTH[self.recipe.pictures]
            self.tokenizer = build_tokenizer(words, length)
            self.encoder = build_text_encoder(self.tokenizer, self.recipe.context, length)
            self.nothing = encode(self.tokenizer, [""])[0]  # [L]
        elif self.recipe.conditioning == "class":
            if not self.recipe.blocks:  # a DiT embeds classes itself
                self.encoder = ClassEmbedder(num_classes=classes, tokens=4, dim=self.recipe.context)
                torch.nn.init.normal_(self.encoder.embedding.weight, std=0.5)
            self.nothing = torch.tensor(classes)
        self.modules = [m for m in (self.denoiser, self.encoder) if m is not None]

    def parameters(self):
        return [p for m in self.modules for p in m.parameters()]

    def conditions(self, split, count):
        """Conditions of the first `count` pictures of "train" or "validation": token ids [N, L], labels [N] or None."""
        if self.recipe.conditioning == "none":
            return None
        if self.shown is None:
            drawn = scenes.draw(split, count)
            captions, labels = drawn.captions(), drawn.labels()
        else:
            rows = self.shown.rows("train" if split == "train" else "evaluation")
            rows = np.resize(rows, count)  # repeats the rows, because flipped pictures follow the others
            captions = [self.shown.captions[i] for i in rows] if self.shown.captions else None
            labels = None if self.shown.labels is None else self.shown.labels[rows]
        return encode(self.tokenizer, captions) if self.tokenizer else torch.from_numpy(labels)

    def drawing_weights(self, count):
        """Sampling weight of each of `count` training pictures, float64 [N]; None for equal weights."""
        if self.shown is None or not self.shown.concepts:
            return None
        rows = self.shown.rows("train")[:count]
        return torch.from_numpy(pictures.concept_weights([self.shown.concepts[i] for i in rows]))

    def dropped(self, conditions, which):
        """Replace the conditions of the rows `which` (bool [N]) by the empty condition."""
        if conditions is None:
            return None
        which = which.view(-1, *[1] * (conditions.dim() - 1))
        return torch.where(which, self.nothing, conditions)

    def __call__(self, noisy, t, conditions):
        """The predicted noise, float32 like noisy [N, C, h, w]."""
        with training.autocast(self.recipe.half):
            if self.recipe.blocks:
                return self.denoiser(noisy, t, class_labels=conditions).sample.float()
            if self.encoder is None:
                return self.denoiser(noisy, t).sample.float()
            context = self.encoder(conditions)
            context = context[0] if self.tokenizer else context
            return self.denoiser(noisy, t, encoder_hidden_states=context).sample.float()


def copy_weights(unet, folder):
    """Copy the tensors of another pipeline's denoiser that have the same name and shape; return their share.

    Two models of equal shape share all tensors, a conditional and an unconditional one their convolutions. Raises
    ValueError where no tensor fits.
    """
    theirs = load_file(Path(folder) / "unet" / "diffusion_pytorch_model.safetensors")
    ours = unet.state_dict()
    fitting = {name: tensor for name, tensor in theirs.items() if name in ours and tensor.shape == ours[name].shape}
    if not fitting:
        raise ValueError(f"{folder}: no tensor of its denoiser has the name and shape of one in this model")
    unet.load_state_dict(ours | fitting)
    return sum(t.numel() for t in fitting.values()) / sum(t.numel() for t in ours.values())


@torch.no_grad()
def held_out_error(trainee, z, conditions):
    """Unweighted mean squared error of the predicted noise on latents z, with one fixed timestep and noise for each."""
    g = torch.Generator().manual_seed(0)
    t = torch.randint(0, 1000, (len(z),), generator=g)
    noise = torch.randn(z.shape, generator=g)
    a = alphas()[t].view(-1, 1, 1, 1)
    noisy = a.sqrt() * z + (1 - a).sqrt() * noise
    total = 0.0
    for rows in torch.arange(len(z)).split(100):
        prediction = trainee(noisy[rows], t[rows], None if conditions is None else conditions[rows])
        total += (prediction - noise[rows]).square().sum().item()
    return total / z.numel()


def train(
    name, autoencoder, out, latents_path, iterations, batch_size=None, start_from=None, save_every=100, data=None
):
    """Train model `name` and write its pipeline to the folder `out`; return the held-out error of the result.

    `start_from` is the pipeline folder of another model, see `copy_weights`.
    `data` is the file of photographs or emoji. State is saved after every `save_every` iterations (None: never for that
    reason), whenever SAVE_SECONDS have passed, and at the end.
    """
    out = Path(out)
    checkpoint = out.with_name(out.name + ".checkpoint")
    vae = AutoencoderKL.from_pretrained(autoencoder).float().eval().requires_grad_(False)
    z, held_out = latents.load(latents_path)
    torch.manual_seed(SEED)
    recipe = recipe_of(name)
    batch_size = batch_size or recipe.batch_size
    trainee = Trainee(name, None if recipe.pictures == "scenes" else pictures.load(recipe.pictures, data))
    if start_from:
        copied = copy_weights(trainee.denoiser, start_from)
        print(f"{name}: starts from {copied:.0%} of its parameters in {start_from}", flush=True)
    # torch's bfloat16 convolutions are slower with channels_last.
    layout = torch.contiguous_format if recipe.half else torch.channels_last
    trainee.denoiser.to(memory_format=layout)
    conditions = trainee.conditions("train", len(z))
    held_out_conditions = trainee.conditions("validation", len(held_out))
    weights = trainee.drawing_weights(len(z))
    optimizer = torch.optim.AdamW(trainee.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.99), weight_decay=1e-3)
    average = training.Average(trainee.parameters(), recipe.average)
    start = training.load_checkpoint(checkpoint, trainee.modules, optimizer, average)

    a = alphas()
    snr = a / (1 - a)
    # For the error of the sample this means SNR clamped to [0.2, 5]. Without the lower bound the noisiest steps, which
    # decide where objects are, hardly count, and the model paints the right objects in wrong places.
    weight = snr.clamp(0.2, 5) / snr
    progress = training.Progress(name, start, iterations, 50)
    saved = time.monotonic()
    for i in range(start, iterations):
        g = training.generator(SEED, i)
        if weights is None:
            rows = torch.randint(len(z), (batch_size,), generator=g)
        else:
            rows = torch.multinomial(weights, batch_size, replacement=True, generator=g)
        t = torch.randint(0, 1000, (batch_size,), generator=g)
        noise = torch.randn(z[rows].shape, generator=g)
        drop = torch.rand(batch_size, generator=g) < DROPPED
        condition = None if conditions is None else trainee.dropped(conditions[rows], drop)
        signal = a[t].view(-1, 1, 1, 1)
        noisy = (signal.sqrt() * z[rows] + (1 - signal).sqrt() * noise).contiguous(memory_format=layout)
        error = (trainee(noisy, t, condition) - noise).square().mean((1, 2, 3))
        loss = (weight[t] * error).mean()
        training.descend(loss, optimizer, LEARNING_RATE * training.constant_then_decay(i, iterations))
        average.update(i)
        progress(i + 1, loss=loss, error=error.mean())
        due = time.monotonic() > saved + SAVE_SECONDS
        if i + 1 == iterations or due or (save_every and (i + 1) % save_every == 0):
            training.save_checkpoint(checkpoint, i + 1, trainee.modules, optimizer, average)
            saved = time.monotonic()
    average.swap()
    error = held_out_error(trainee, held_out, held_out_conditions)
    trainee.denoiser.to(memory_format=torch.contiguous_format)  # the only layout that safetensors stores
    with atomic_folder(out) as folder:
        pipeline = build_pipeline(trainee.denoiser, vae, trainee.encoder, trainee.tokenizer)
        pipeline.to(dtype=torch.float16).save_pretrained(folder)
        forget_origin(folder / "vae" / "config.json")
    print(f"{name}: held-out error {error:.4f} after {iterations} iterations; wrote {out}", flush=True)
    return error


def main():
    parser = command_line.parser(__doc__, "folder", "threads")
    parser.add_argument("model", choices=MODELS)
    parser.add_argument("--autoencoder", type=Path, required=True, help="diffusers folder of the trained autoencoder")
    parser.add_argument("--latents", type=Path, required=True, help="file that quest.zoo.latents wrote")
    parser.add_argument("--data", type=Path, nargs="?", help="data file (.npz) of photographs or emoji")
    parser.add_argument("--iterations", type=int, help="batches (default: the recipe's)")
    parser.add_argument("--start-from", type=Path, help="pipeline folder whose denoiser training starts from")
    arguments = parser.parse_args()
    if MODELS[arguments.model].pictures != "scenes" and not arguments.data:
        parser.error(f"--data: {arguments.model} needs a data file of {MODELS[arguments.model].pictures}")
    torch.set_num_threads(arguments.threads)
    train(
        arguments.model,
        arguments.autoencoder,
        arguments.output,
        arguments.latents,
        arguments.iterations or MODELS[arguments.model].iterations,
        start_from=arguments.start_from,
        save_every=None,
        data=arguments.data,
    )


if __name__ == "__main__":
    main()

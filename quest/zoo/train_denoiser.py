"""Train one of the three latent diffusion models of the zoo.

scenes-text   a StableDiffusionPipeline; the small CLIP text encoder is trained along
scenes-class  conditioned on kind x colour of the main object
scenes-uncond unconditional

scenes-class starts from the denoiser of scenes-text, whose shape it shares.  All predict the noise of the scaled-linear
schedule of latent diffusion (arXiv:2112.10752) over 1000 steps, with min-SNR-5 weights (arXiv:2303.09556; here with a
floor) and a moving average of the parameters, and drop a tenth of the conditions for classifier-free guidance
(arXiv:2207.12598).  A stopped run resumes from `OUT.checkpoint`; while the learning rate is level (the first three
quarters) it may resume with another number of iterations.
"""

import argparse
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
    UNet2DModel,
)
from diffusers.models.attention_processor import AttnProcessor
from transformers import CLIPTextConfig, CLIPTextModel

from quest.diffusion import scenes
from quest.diffusion.pipelines import ClassEmbedder, LatentDiffusionPipeline, forget_origin
from quest.runtime.files import atomic_folder
from quest.zoo import latents
from quest.zoo.train_autoencoder import LATENT_CHANNELS
from quest.zoo.training import (
    Average,
    Progress,
    constant_then_decay,
    generator,
    load_checkpoint,
    save_checkpoint,
)
from quest.zoo.vocabulary import MAX_LENGTH, build_tokenizer, encode

# Model -> batches its recipe takes.
MODELS = {"scenes-text": 10500, "scenes-class": 6500, "scenes-uncond": 23500}
WIDTH = 64  # of a context token
DROPPED = 0.1
SCHEDULE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000}


def build_unet(name):
    """The denoiser of a model.  Raises ValueError for a name that is not in MODELS."""
    if name not in MODELS:
        raise ValueError(f"no model {name!r}; there are {', '.join(MODELS)}")
    common = {
        "sample_size": 8,
        "in_channels": LATENT_CHANNELS,
        "out_channels": LATENT_CHANNELS,
        "block_out_channels": (48, 96),
        "layers_per_block": 1,
        "norm_num_groups": 8,
    }
    if name == "scenes-uncond":
        return UNet2DModel(
            **common,
            down_block_types=("AttnDownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "AttnUpBlock2D"),
            attention_head_dim=24,
            resnet_time_scale_shift="scale_shift",
            downsample_type="resnet",
            upsample_type="resnet",
        )
    return UNet2DConditionModel(
        **common,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=WIDTH,
        attention_head_dim=4,  # in this class, the number of heads
    )


def build_text_encoder(tokenizer):
    """A CLIP text model with two layers."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=WIDTH,
            intermediate_size=4 * WIDTH,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=MAX_LENGTH,
            projection_dim=WIDTH,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


class Trainee:
    """Denoiser and condition encoder of one model, and how its conditions are read from scenes."""

    def __init__(self, name):
        self.name, self.unet = name, build_unet(name)
        for module in self.unet.modules():
            if hasattr(module, "set_processor"):
                module.set_processor(AttnProcessor())  # at these sizes the plain one trains faster
        if name == "scenes-text":
            self.tokenizer = build_tokenizer()
            self.encoder = build_text_encoder(self.tokenizer)
            self.nothing = encode(self.tokenizer, [""])[0]  # [20]
        elif name == "scenes-class":
            self.encoder = ClassEmbedder(num_classes=len(scenes.CLASSES), tokens=4, dim=WIDTH)
            torch.nn.init.normal_(self.encoder.embedding.weight, std=0.5)
            self.nothing = torch.tensor(len(scenes.CLASSES))
        else:
            self.encoder = None
        self.modules = [m for m in (self.unet, self.encoder) if m is not None]

    def parameters(self):
        return [p for m in self.modules for p in m.parameters()]

    def conditions(self, drawn):
        """What each scene is told: token ids [N, 20], labels [N], or None."""
        if self.name == "scenes-text":
            return encode(self.tokenizer, drawn.captions())
        return torch.from_numpy(drawn.labels()) if self.name == "scenes-class" else None

    def dropped(self, conditions, which):
        """`conditions` with those of the rows `which` (bool [N]) taken away."""
        if conditions is None:
            return None
        which = which.view(-1, *[1] * (conditions.dim() - 1))
        return torch.where(which, self.nothing, conditions)

    def __call__(self, noisy, t, conditions):
        """The predicted noise, like noisy [N, 8, 8, 8]."""
        if self.encoder is None:
            return self.unet(noisy, t).sample
        context = self.encoder(conditions)
        context = context if self.name == "scenes-class" else context[0]
        return self.unet(noisy, t, encoder_hidden_states=context).sample

    def pipeline(self, vae):
        """The model as a diffusers pipeline that shares its modules."""
        if self.name == "scenes-text":
            scheduler = PNDMScheduler(**SCHEDULE, skip_prk_steps=True, steps_offset=1, set_alpha_to_one=False)
            return StableDiffusionPipeline(
                vae=vae,
                text_encoder=self.encoder,
                tokenizer=self.tokenizer,
                unet=self.unet,
                scheduler=scheduler,
                safety_checker=None,
                feature_extractor=None,
                requires_safety_checker=False,
            )
        scheduler = DDIMScheduler(
            **SCHEDULE, timestep_spacing="leading", steps_offset=1, clip_sample=False, set_alpha_to_one=False
        )
        return LatentDiffusionPipeline(unet=self.unet, vae=vae, scheduler=scheduler, class_embedder=self.encoder)


def alphas():
    """Cumulated signal share of every training step, float32 [1000]."""
    return DDIMScheduler(**SCHEDULE).alphas_cumprod


@torch.no_grad()
def held_out_error(trainee, z, conditions):
    """Unweighted mean squared error of the noise on latents z, one fixed timestep and noise each."""
    g = torch.Generator().manual_seed(0)
    t = torch.randint(0, 1000, (len(z),), generator=g)
    noise = torch.randn(z.shape, generator=g)
    a = alphas()[t].view(-1, 1, 1, 1)
    noisy = a.sqrt() * z + (1 - a).sqrt() * noise
    total = 0.0
    for rows in torch.arange(len(z)).split(100):
        said = trainee(noisy[rows], t[rows], None if conditions is None else conditions[rows])
        total += (said - noise[rows]).square().sum().item()
    return total / z.numel()


def export(trainee, vae, out):
    """Write the pipeline in half precision, all at once or not at all."""
    # A copy, since .half() and the processor reach into the modules that are being trained.
    copy = Trainee(trainee.name)
    for mine, theirs in zip(copy.modules, trainee.modules, strict=True):
        mine.load_state_dict(theirs.state_dict())
    with atomic_folder(out) as folder:
        copy.pipeline(vae).to(dtype=torch.float16).save_pretrained(folder)
        forget_origin(folder / "vae" / "config.json")
    vae.float()


def train(
    name,
    autoencoder,
    out,
    latents_path,
    iterations,
    batch_size=32,
    learning_rate=1e-3,
    start_from=None,
    seed=0,
    snapshot_every=0,
    save_every=100,
    log_every=50,
):
    """Train model `name` and write its pipeline to the folder `out`; return the held-out error of the result.

    `start_from` is the pipeline folder of another model, from whose denoiser (of the same kind) training starts.
    """
    out = Path(out)
    checkpoint = out.with_name(out.name + ".checkpoint")
    vae = AutoencoderKL.from_pretrained(autoencoder).float().eval().requires_grad_(False)
    z, held_out = latents.load(latents_path)
    torch.manual_seed(seed)
    trainee = Trainee(name)
    if start_from:
        other = type(trainee.unet).from_pretrained(start_from, subfolder="unet")
        trainee.unet.load_state_dict(other.float().state_dict())
    trainee.unet.to(memory_format=torch.channels_last)
    conditions = trainee.conditions(scenes.draw("train", len(z)))
    held_out_conditions = trainee.conditions(scenes.draw("validation", len(held_out)))
    optimizer = torch.optim.AdamW(trainee.parameters(), lr=learning_rate, betas=(0.9, 0.99), weight_decay=1e-3)
    average = Average(trainee.parameters(), 0.998)
    start = load_checkpoint(checkpoint, trainee.modules, optimizer, average)

    a = alphas()
    snr = a / (1 - a)
    # In terms of the error of the sample this is SNR clamped to [0.2, 5].  Without the lower end the noisiest steps,
    # which settle where things are, hardly count, and the model paints the right things in any place.
    weight = snr.clamp(0.2, 5) / snr
    progress = Progress(name, start, iterations, log_every)
    for i in range(start, iterations):
        g = generator(seed, i)
        rows = torch.randint(len(z), (batch_size,), generator=g)
        t = torch.randint(0, 1000, (batch_size,), generator=g)
        noise = torch.randn(z[rows].shape, generator=g)
        drop = torch.rand(batch_size, generator=g) < DROPPED
        told = None if conditions is None else trainee.dropped(conditions[rows], drop)
        signal = a[t].view(-1, 1, 1, 1)
        noisy = (signal.sqrt() * z[rows] + (1 - signal).sqrt() * noise).contiguous(memory_format=torch.channels_last)
        error = (trainee(noisy, t, told) - noise).square().mean((1, 2, 3))
        loss = (weight[t] * error).mean()
        optimizer.param_groups[0]["lr"] = learning_rate * constant_then_decay(i, iterations)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trainee.parameters(), 1.0)
        optimizer.step()
        average.update(i)
        progress(i + 1, loss=loss, error=error.mean())
        if (i + 1) % save_every == 0 or i + 1 == iterations:
            save_checkpoint(checkpoint, i + 1, trainee.modules, optimizer, average)
        if snapshot_every and (i + 1) % snapshot_every == 0 and i + 1 < iterations:
            finish(trainee, average, vae, held_out, held_out_conditions, i + 1, out.with_name(out.name + ".snapshot"))
    return finish(trainee, average, vae, held_out, held_out_conditions, iterations, out)


def finish(trainee, average, vae, z, conditions, iteration, out):
    """Export the averaged parameters; return their error on held-out latents."""
    average.swap()
    error = held_out_error(trainee, z, conditions)
    export(trainee, vae, out)
    average.swap()
    print(f"{trainee.name}: held-out error {error:.4f} after {iteration} iterations; wrote {out}", flush=True)
    return error


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=MODELS)
    parser.add_argument("--autoencoder", type=Path, required=True, help="diffusers folder of the trained autoencoder")
    parser.add_argument("-o", "--out", type=Path, required=True, help="pipeline folder to write")
    parser.add_argument("--latents", type=Path, required=True, help="what quest.zoo.latents wrote")
    parser.add_argument("--iterations", type=int, help=f"batches (default {MODELS})")
    parser.add_argument("--batch-size", type=int, default=32, help="scenes per batch (default %(default)s)")
    parser.add_argument("--start-from", type=Path, help="pipeline folder whose denoiser training starts from")
    parser.add_argument("--snapshot-every", type=int, default=0, help="also write OUT.snapshot every N iterations")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    train(
        args.model,
        args.autoencoder,
        args.out,
        args.latents,
        args.iterations or MODELS[args.model],
        args.batch_size,
        start_from=args.start_from,
        snapshot_every=args.snapshot_every,
    )


if __name__ == "__main__":
    main()

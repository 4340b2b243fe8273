"""Convert the paper's published models into the folders that `diffusion.models` loads: pipeline, captions, provenance.

This happens once per model, so a checkpoint is read, checked and hashed once and every job starts from safetensors.
"""

import hashlib
import importlib
from functools import partial
from pathlib import Path

from quest.diffusion import captions as caption_files
from quest.diffusion import compvis, samplers
from quest.diffusion.compvis import load, networks
from quest.diffusion.compvis.configuration import parameters
from quest.diffusion.denoisers import NAMES
from quest.diffusion.loading import check_denoiser, load_pipeline
from quest.diffusion.models import CAPTION_LINES, Model
from quest.diffusion.pipelines import CLASSES, LatentDiffusionPipeline, forget_origin
from quest.diffusion.random_checkpoints import COMPVIS
from quest.diffusion.samplers import QuadraticDDIMScheduler
from quest.runtime.download import sha256_of
from quest.runtime.files import atomic_folder, dumps, read_json, write_lines
from quest.runtime.provenance import provenance
from quest.runtime.sums import write_sums

WEIGHTS = "diffusion_pytorch_model.safetensors"
# DDPM's schedule and its U-Net for CIFAR-10, the only model in diffusers layout.
SCHEDULER = partial(QuadraticDDIMScheduler, beta_start=1e-4, beta_end=0.02, beta_schedule="linear", clip_sample=False)
ARCHITECTURE = {
    "sample_size": 32,
    "in_channels": 3,
    "out_channels": 3,
    "block_out_channels": (128, 256, 256, 256),
    "layers_per_block": 2,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    "attention_head_dim": None,  # one head
    "dropout": 0.1,
    "norm_eps": 1e-6,
    "downsample_padding": 0,  # padded at the right and the bottom, as in DDPM's TensorFlow
    "flip_sin_to_cos": False,
    "freq_shift": 1,
}


def prepare(model: Model, checkpoint, out, *, tokenizer=None, captions=None) -> None:
    """Write the pipeline of a model's published weights to the folder `out`, all at once or not at all.

    Args:
        model: a model with an `origin`.
        checkpoint: a CompVis checkpoint (`.ckpt`, `.safetensors`), or a folder in diffusers layout.
        tokenizer: folder of the CLIP tokenizer, for a checkpoint with a text encoder.
        captions: file of captions (`quest.diffusion.captions`), for a model whose origin needs them.

    Raises:
        FileNotFoundError: the checkpoint or caption file is missing; the message says what to put where.
        ValueError: the checkpoint does not fit the model, or there are too few captions.
    """
    checkpoint = Path(checkpoint)
    if not checkpoint.exists():
        raise FileNotFoundError(f"models.{model.name}.checkpoint: no {checkpoint}; valid: {model.origin.what}")
    lines = _lines(model, captions) if model.origin.captions else None
    pipe = convert(model, checkpoint, tokenizer)
    with atomic_folder(out) as folder:
        pipe.save_pretrained(folder)
        for config in folder.glob("*/config.json"):
            forget_origin(config)
        record(folder, model.name, checkpoint, captions, lines)


def record(folder: Path, name: str, checkpoint: Path, captions, lines: list[str] | None, **more) -> None:
    """Write into a model's folder where it comes from (origin.json, with `more`), its captions, and SHA256SUMS.

    captions: the file that `lines` were read from; without lines it is not looked at.
    """
    origin = {"model": name, "checkpoint": checkpoint.name, "sha256": weights_hash(checkpoint), "captions": None}
    if lines is not None:
        write_lines(folder / "captions.txt", lines)
        origin["captions"] = {"file": Path(captions).name, "sha256": caption_files.sha256(lines)}
    origin |= {**more, "provenance": provenance()}
    (folder / "origin.json").write_text(dumps(origin, indent=2) + "\n", encoding="utf-8")
    write_sums(folder)


def denoiser(model: Model, device="meta"):
    """A model's untrained denoiser, built from its configuration; on "meta" it has its shapes but takes no memory."""
    import diffusers
    import torch

    folder = model.folder if model.origin is None else model.origin.folder
    if folder is not None:
        file = next(folder / name / "config.json" for name in NAMES if (folder / name / "config.json").is_file())
        config = read_json(file)
        kind = config["_class_name"]
        kind = getattr(importlib.import_module(CLASSES[kind]) if kind in CLASSES else diffusers, kind)
        with torch.device(device):
            return kind.from_config(config).eval()
    if model.origin.compvis is not None:
        return networks.denoiser(COMPVIS / f"{model.origin.compvis}.yaml", device)
    with torch.device(device):
        return diffusers.UNet2DModel(**ARCHITECTURE).eval()


def rehearsed(model: Model, device="cpu") -> LatentDiffusionPipeline:
    """A pipeline of a published model's architecture with random weights, without what turns prompts into conditions.

    Its denoiser takes `encoder_hidden_states` of any values. It costs what the trained model costs.
    """
    import torch

    torch.manual_seed(0)
    unet, vae = denoiser(model, device), None
    if model.origin.compvis is None:
        scheduler = SCHEDULER()
    else:
        file = COMPVIS / f"{model.origin.compvis}.yaml"
        vae = networks.autoencoder(file, device, parameters(file).get("scale_factor", 1))
        scheduler = compvis.scheduler(file)
    for module in (unet, vae):
        if module is not None:
            module.requires_grad_(False).eval().to(memory_format=torch.channels_last)
    return LatentDiffusionPipeline(unet, vae, scheduler)


def convert(model: Model, checkpoint: Path, tokenizer=None):
    """Load a published checkpoint as a pipeline; see `prepare`."""
    if model.name == "cifar10":
        return _pixels(checkpoint)
    if checkpoint.is_dir():
        if not (checkpoint / "model_index.json").is_file():
            raise ValueError(f"{checkpoint}: a folder without model_index.json; valid: {model.origin.what}")
        pipe = load_pipeline(checkpoint)
        _same_denoiser(pipe, model, checkpoint)
        _same_protocol(pipe, model, checkpoint)
        return pipe
    return load(checkpoint, COMPVIS / f"{model.origin.compvis}.yaml", tokenizer)


def weights_hash(checkpoint) -> str:
    """SHA-256 of a checkpoint file or, for a folder in diffusers layout, of its denoiser's weights.

    For weights in several files it is the SHA-256 of their hashes, in the order of their names. Raises ValueError if a
    folder has no weights.
    """
    checkpoint = Path(checkpoint)
    if checkpoint.is_file():
        return sha256_of(checkpoint)
    files = _weights(checkpoint)
    if not files:
        raise ValueError(f"{checkpoint}: no weights of a denoiser in it or in its unet/; valid: {WEIGHTS}")
    if len(files) == 1:
        return sha256_of(files[0])
    return hashlib.sha256("".join(map(sha256_of, files)).encode()).hexdigest()


def _weights(folder: Path) -> list[Path]:
    """The files from which diffusers loads a denoiser's weights: one file, or the parts into which it was split."""
    for place in (*(folder / name for name in NAMES), folder):
        for kind in ("safetensors", "bin"):
            for name in (f"diffusion_pytorch_model.{kind}", f"diffusion_pytorch_model-?????-of-?????.{kind}"):
                if files := sorted(place.glob(name)):
                    return files
    return []


def _pixels(folder: Path) -> LatentDiffusionPipeline:
    """Load DDPM's U-Net from a pipeline's or a model's folder in diffusers layout; add DDIM's schedule for CIFAR-10."""
    import diffusers
    from diffusers import DDPMScheduler, UNet2DModel

    place = folder / "unet" if (folder / "unet").is_dir() else folder
    if not (place / "config.json").is_file() or not _weights(folder):
        raise ValueError(
            f"{folder}: no config.json with {WEIGHTS} in it or in its unet/; valid: a U-Net "
            "in diffusers layout, such as google/ddpm-cifar10-32"
        )
    check_denoiser(place)
    unet = UNet2DModel.from_pretrained(place).float().eval()
    if (unet.config.in_channels, unet.config.sample_size) != (3, 32):
        raise ValueError(f"{folder}: a U-Net for {unet.config.sample_size} pixels, not for CIFAR-10's 32")
    if unet.config.out_channels != 3 or unet.config.num_class_embeds:
        raise ValueError(f"{folder}: a U-Net with {unet.config.out_channels} outputs or with classes, not CIFAR-10's")
    scheduler = SCHEDULER()
    file = folder / "scheduler" / "scheduler_config.json"
    if file.is_file():  # its own sampler is DDPM's; what the model was trained on must be the same
        kind = getattr(diffusers, read_json(file)["_class_name"], DDPMScheduler)
        own = samplers.trained_on(kind.from_pretrained(file.parent))
        if differ := samplers.differences(own, samplers.trained_on(scheduler)):
            raise ValueError(f"{file}: {'; '.join(differ)}, as DDPM's for CIFAR-10")
    return LatentDiffusionPipeline(unet, None, scheduler)


def _same_denoiser(pipe, model: Model, checkpoint) -> None:
    """Raise ValueError if the parameters of a pipeline's denoiser differ from the model's configuration."""
    actual, expected = (
        {name: tuple(value.shape) for name, value in unet.state_dict().items()} for unet in (pipe.unet, denoiser(model))
    )
    differ = sorted(name for name in actual.keys() | expected.keys() if actual.get(name) != expected.get(name))
    if differ:
        raise ValueError(
            f"{checkpoint}: its denoiser is not that of {model.name}: {len(differ)} parameters differ, the first "
            f"{differ[0]} ({actual.get(differ[0], 'missing')}, expected {expected.get(differ[0], 'none')})"
        )


def _same_protocol(pipe, model: Model, checkpoint) -> None:
    """Raise ValueError where a pipeline's sampler, denoiser or autoencoder is not set up as the protocol says.

    Weights do not show a prediction type, a noise schedule, the number of heads or the scale of latents; rows would say
    one thing and hold another.
    """
    file = COMPVIS / f"{model.origin.compvis}.yaml"
    wanted, params = compvis.scheduler(file), parameters(file)
    own = type(pipe.scheduler)
    if own is not type(wanted):
        raise ValueError(f"{checkpoint}: its scheduler is a {own.__name__}, the protocol's a {type(wanted).__name__}")
    scaled = params.get("scale_by_std", False)  # then only the weights' own file says by how much
    factor = pipe.vae.config.scaling_factor if scaled else params.get("scale_factor", 1)
    first = networks.autoencoder(file, "meta", factor)
    parts = {"scheduler": (pipe.scheduler, wanted), "unet": (pipe.unet, denoiser(model)), "vae": (pipe.vae, first)}
    differ = [
        f"{part}.{key} {_plain(mine.config.get(key))!r}, not {_plain(value)!r}"
        for part, (mine, right) in parts.items()
        for key, value in right.config.items()
        if not key.startswith("_") and key != "dropout" and (part, key) != ("vae", "sample_size")
        if _plain(mine.config.get(key)) != _plain(value)
    ]
    if differ:
        raise ValueError(f"{checkpoint} is set up otherwise than the protocol of {model.name}: {'; '.join(differ[:5])}")


def _plain(value):
    """As JSON has it: no tuples."""
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


def _lines(model: Model, path) -> list[str]:
    """The captions a model needs (see CAPTION_LINES). Raises ValueError if there are too few or one is empty."""
    if path is None:
        raise ValueError(f"models.{model.name}.captions: missing; name a text file, one caption per line, or COCO's")
    first, end = CAPTION_LINES["calibration"]
    captions = caption_files.load(path)
    # The last batch is filled up with trajectories that are dropped later; these need captions, too.
    caption_files.enough(path, captions, first + -(-model.trajectories // model.batch_size) * model.batch_size)
    return captions[:end]

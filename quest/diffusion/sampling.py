"""Sample images from seeds, one generator per image, so that neither n nor the number of shards changes an image.

Image i of a split has seed SEEDS[split] + i and is always at place i % B of batch i // B, where B is the model's batch
size. A shard is a set of whole batches; the last batch is filled with the next images, which are then dropped. With
B = 4, n = 6 and two shards, shard 0 samples images 0 1 2 3, and shard 1 samples 4 5 6 7 and drops 6 7.
"""

import copy
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from functools import wraps
from inspect import signature
from pathlib import Path

import numpy as np
import torch
from diffusers import DiffusionPipeline
from PIL import Image, ImageOps
from tqdm import tqdm

from quest.diffusion import samplers
from quest.diffusion.denoisers import denoiser_of, overridden
from quest.diffusion.models import Model
from quest.runtime import memory

DECODING = 8  # tensors as large as the largest one that are in memory while an image is decoded


def timesteps(model: Model, pipe: DiffusionPipeline) -> list[int]:
    """The timestep of every denoiser call, noisiest first. PLMS visits its second timestep twice."""
    scheduler = copy.deepcopy(pipe.scheduler)
    scheduler.set_timesteps(model.steps)
    return scheduler.timesteps.tolist()


def arguments(pipe: DiffusionPipeline, model: Model, split: str, indices: list[int]) -> dict:
    """Keyword arguments with which `pipe(...)` samples these images, without `output_type`.

    Generators are on the CPU, so that the noise is the same on every device. Raises ValueError where the model's
    protocol has what the pipeline does not take, or the pipeline needs what no protocol has.
    """
    taken = signature(type(pipe).__call__).parameters
    keywords = {
        "num_inference_steps": model.steps,
        "generator": [torch.Generator().manual_seed(seed) for seed in model.seeds(split, indices)],
        **model.conditions(split, indices),
    }
    if "guidance_scale" in taken or model.guidance != 1:
        keywords["guidance_scale"] = model.guidance
    if model.has_eta and ("eta" in taken or model.eta):
        keywords["eta"] = model.eta
    if model.conditioning == "none":
        keywords["batch_size"] = len(indices)
    if "use_resolution_binning" in taken:  # images have the size that the denoiser was trained for
        keywords["use_resolution_binning"] = False
    if model.pictures is not None:
        keywords |= to_fill(pipe, model.pictures, indices) | {"strength": 1.0}  # from pure noise
    kind = type(pipe).__name__
    if unknown := [name for name in keywords if name not in taken]:
        raise ValueError(f"{model.name}: a {kind} takes no {unknown[0]}; leave it out of the protocol")
    needed = [name for name, of in taken.items() if of.default is of.empty and of.kind == of.POSITIONAL_OR_KEYWORD]
    if missing := [name for name in (*needed[1:], *(n for n in taken if n == "image")) if name not in keywords]:
        raise ValueError(
            f"{model.name}: a {kind} needs {missing[0]}; valid: pipelines from noise, and inpainting of pictures"
        )
    return keywords


def to_fill(pipe: DiffusionPipeline, folder: Path, indices: list[int]) -> dict:
    """`image` and `mask_image` of an inpainting pipeline: image i has picture i of the folder, by the order of names.

    After the last one they begin anew. The mask is a square in the middle, half as wide as the picture. Raises
    ValueError for a folder without pictures.
    """
    files = sorted(file for file in folder.iterdir() if file.suffix.lower() in (".png", ".jpg", ".jpeg", ".webp"))
    if not files:
        raise ValueError(f"{folder}: no picture in it; valid: files .png, .jpg, .jpeg, .webp")
    side = denoiser_of(pipe).config.sample_size * pipe.vae_scale_factor
    pictures = [ImageOps.fit(Image.open(files[i % len(files)]).convert("RGB"), (side, side)) for i in indices]
    mask = Image.new("L", (side, side))
    mask.paste(255, (side // 4, side // 4, side - side // 4, side - side // 4))
    return {"image": pictures, "mask_image": [mask] * len(indices)}


@contextmanager
def _last_sample(scheduler) -> Iterator[list[torch.Tensor]]:
    """A list that holds what the scheduler's last step inside this context gave: the latents, of every pipeline."""
    step, last = scheduler.step, []

    @wraps(step)  # pipelines look at its signature
    def recording(*args, **kwargs):
        output = step(*args, **kwargs)
        last[:] = [output[0] if isinstance(output, tuple) else output.prev_sample]
        return output

    with overridden("step", {scheduler: recording}):
        yield last


def decode(pipe: DiffusionPipeline, latents: torch.Tensor) -> np.ndarray:
    """Decode latents [B, C, h, w] to images, uint8 [B, H, W, 3], as `pipe(...)` does for PIL images.

    A pipeline without `vae` samples pixels, which are only rounded. NaN becomes 0.
    """
    pixels = latents  # [B, 3, H, W] in [-1, 1]
    if pipe.vae is not None:
        with torch.no_grad(), decoding_in_chunks(pipe.vae):
            pixels = pipe.vae.decode(latents / pipe.vae.config.scaling_factor, return_dict=False)[0]
    pixels = pipe.image_processor.postprocess(pixels, output_type="np")  # [B, H, W, 3] in [0, 1]
    return _rounded(pixels)


@contextmanager
def decoding_in_chunks(vae) -> Iterator[None]:
    """While inside, an autoencoder decodes only as many latents at once as fit into half of the memory.

    None, a pipeline's that samples pixels, decodes nothing.
    """
    if vae is None:
        yield
        return
    whole = vae.decode

    @wraps(whole)
    def decode(latents, *args, **kwargs):
        parts = [whole(part, *args, **kwargs) for part in latents.split(images_at_once(vae, latents))]
        if len(parts) == 1:
            return parts[0]
        if isinstance(parts[0], tuple):
            return (torch.cat([part[0] for part in parts]),)
        parts[0].sample = torch.cat([part.sample for part in parts])
        return parts[0]

    vae.decode = decode
    try:
        yield
    finally:
        vars(vae).pop("decode", None)  # two pipelines may share it


def images_at_once(vae, latents: torch.Tensor) -> int:
    """How many of these latents [B, C, h, w] fit into half of the memory while they are decoded; at least one.

    By the decoder's widest tensor of full resolution, the input of its last block, which has the width of the block
    before. An autoencoder whose configuration does not say its widths decodes all at once.
    """
    widths = vae.config.get("block_out_channels")
    if not widths:
        return max(1, len(latents))
    values = max(widths[:2]) * latents[0, 0].numel() * 4 ** (len(widths) - 1)
    room = int(memory.SHARE * memory.budget(latents.device.type))
    return max(1, room // (DECODING * values * latents.element_size()))


def _rounded(pixels: np.ndarray) -> np.ndarray:
    return (np.nan_to_num(pixels) * 255).round().astype(np.uint8)


def generate(
    pipe: DiffusionPipeline,
    model: Model,
    split: str,
    n: int,
    shard: tuple[int, int] = (0, 1),
    first: int = 0,
    skip: Collection[int] = (),
) -> Iterator[tuple[np.ndarray, torch.Tensor, np.ndarray]]:
    """Make the images first .. first + n - 1 of a split, or one shard of them, batch by batch, with a progress bar.

    Args:
        pipe: a full-precision or quantized pipeline of `model`.
        split: "evaluation", "calibration" or "validation".
        n: images in all shards together.
        shard: (k, count), the batches k, k + count, k + 2 count, ...; none if k is not below the number of batches.
        first: index of the first image, a multiple of the batch size.
        skip: first images of batches to leave out.

    Yields:
        Per batch: indices [B], final latents [B, C, h, w] (float32, on the CPU), images uint8 [B, H, W, 3].
        The denoiser itself always sees the model's full batch size, doubled under guidance.

    Raises:
        ValueError: unknown split, n below 1, a shard that does not exist, a first image within a batch, fewer
            captions than images, another scheduler than the model's, or timesteps outside the range that a quantized
            denoiser was calibrated for. The call raises it before any sampling.
    """
    k, count = shard
    if not 0 <= k < count:
        raise ValueError(f"shard: ({k}, {count}) does not exist; valid are (0, {count}) to ({count - 1}, {count})")
    if n < 1:
        raise ValueError(f"n: {n} images asked for; at least 1")
    size = model.batch_size
    if first % size:
        raise ValueError(f"first: {first} is not a multiple of the batch size {size}")
    starts = batches(model, n, shard, first)
    samplers.check(pipe.scheduler, model.sampler)
    # What is wrong with the protocol, the split or its captions raises now.
    arguments(pipe, model, split, list(range(first, first + size)))
    model.conditions(split, range(first, first + -(-n // size) * size))
    groups = getattr(denoiser_of(pipe), "time_groups", None)
    if groups is not None:
        groups.check(timesteps(model, pipe))
    return _batches(pipe, model, split, first + n, [start for start in starts if start not in skip])


def nothing(
    pipe: DiffusionPipeline,
    model: Model,
    n: int,
    shard: tuple[int, int] = (0, 1),
    first: int = 0,
    skip: Collection[int] = (),
) -> Iterator[tuple[np.ndarray, torch.Tensor, np.ndarray]]:
    """What `generate` yields where every noise prediction is NaN, as of a method that diverged: latents of NaN, and
    black images. Shapes are those of one batch of `pipe`, which is in full precision."""
    ((_, latents, images),) = generate(pipe, model, "evaluation", model.batch_size)
    for start in (start for start in batches(model, n, shard, first) if start not in skip):
        index = np.arange(start, min(start + model.batch_size, first + n))
        yield index, torch.full_like(latents[: len(index)], torch.nan), np.zeros_like(images[: len(index)])


def batches(model: Model, n: int, shard: tuple[int, int] = (0, 1), first: int = 0) -> list[int]:
    """Index of the first image of every batch of a shard."""
    return list(range(first, first + n, model.batch_size))[shard[0] :: shard[1]]


def _batches(pipe, model, split, end, starts):
    size = model.batch_size
    total = sum(min(size, end - start) for start in starts)
    with (
        _quiet(pipe),
        decoding_in_chunks(getattr(pipe, "vae", None)),
        tqdm(total=total, desc=f"{model.name} {split}", unit="image") as bar,
    ):
        for start in starts:
            indices = list(range(start, start + size))
            with _last_sample(pipe.scheduler) as last:
                pixels = pipe(**arguments(pipe, model, split, indices), output_type="np").images  # in [0, 1]
            latents = last[0][:size]  # a pipeline may step both halves of a guided batch
            images = _rounded(pixels)
            kept = min(size, end - start)
            bar.update(kept)
            yield np.array(indices[:kept]), latents[:kept].float().cpu(), images[:kept]


@contextmanager
def timed(denoiser: torch.nn.Module) -> Iterator[list[float]]:
    """Measure the seconds of every denoiser call inside this context. Results do not change."""
    seconds, starts = [], []

    def now():
        if denoiser.device.type == "cuda":
            torch.cuda.synchronize(denoiser.device)
        return time.perf_counter()

    before = denoiser.register_forward_pre_hook(lambda *_: starts.append(now()))
    with before, denoiser.register_forward_hook(lambda *_: seconds.append(now() - starts.pop())):
        yield seconds


@contextmanager
def _quiet(pipe):
    """Hide the pipeline's progress bar (one per batch), because `generate` shows one for all batches."""
    before = getattr(pipe, "_progress_bar_config", {})
    pipe.set_progress_bar_config(**{**before, "disable": True})
    try:
        yield
    finally:
        pipe.set_progress_bar_config(**before)

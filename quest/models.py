"""The models of the suite: how each is loaded, sampled and conditioned. No torch until one is loaded."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from quest.zoo import ZOO

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

# Image i of a split has seed SEEDS[split] + i, so no two splits ever share noise.
SEEDS = {"evaluation": 0, "calibration": 1_000_000, "validation": 2_000_000}


@dataclass(frozen=True)
class Model:
    """One pretrained pipeline and the protocol under which it is quantized and judged."""

    name: str
    load: Callable[..., DiffusionPipeline]  # load(device="cpu"): float32, eval mode
    sampler: str  # "ddim" or "plms"
    steps: int  # num_inference_steps; PLMS calls the denoiser once more
    conditioning: str  # "none", "class" or "text"
    selection: str  # which layers QuEST tunes: "lsun", "imagenet" or "sd"
    batch_size: int  # images per sampling batch, the same in every run
    time_groups: int
    eta: float = 0.0
    guidance: float = 1.0  # 1 is none
    source: Callable[[str, int, int], Sequence] | None = (
        None  # source(split, start, stop): labels or captions; may be shorter
    )
    keep: dict[str, int] = field(
        default_factory=lambda: {"conv_in": 8, "conv_out": 8}, hash=False
    )  # layer glob -> bits
    softmax_bits: int = 8
    split: bool = False  # Q-Diffusion quantizes the two parts of a decoder shortcut's input apart
    activation_ranges: str = "mse"  # of its static ranges: "mse", "ema" or "ema-symmetric"
    trajectories: int = 50  # full-precision trajectories in the calibration set; whole batches waste nothing
    extractor: str = "scenes"  # network behind FID, sFID and IS
    clip: str | None = None  # image-text model behind the CLIP score
    reference: Path | None = None  # statistics of real images

    @property
    def protocol(self) -> str:
        """How images are made, in one line."""
        eta = f", eta {self.eta:g}" if self.sampler == "ddim" else ""
        return f"{self.sampler} {self.steps}{eta}, guidance {self.guidance:g}"

    def seeds(self, split: str, indices: Sequence[int]) -> list[int]:
        """The seed of each image. Raises ValueError for an unknown split."""
        if split not in SEEDS:
            raise ValueError(f"split: {split!r} is not one of {', '.join(SEEDS)}")
        return [SEEDS[split] + index for index in indices]

    def conditions(self, split: str, indices: Sequence[int]) -> dict[str, list]:
        """What the pipeline is told about each image: {}, {"class_labels": [int]} or {"prompt": [str]}.

        Raises ValueError where the model's source has fewer labels or captions than asked for.
        """
        if self.source is None or not len(indices):
            return {}
        start, stop = min(indices), max(indices) + 1
        found = self.source(split, start, stop)
        if len(found) < stop - start:
            what = {"class": "labels", "text": "captions"}[self.conditioning]
            raise ValueError(f"{self.name}: split {split!r} has fewer than {stop} {what}; ask for fewer images")
        key, kind = {"class": ("class_labels", int), "text": ("prompt", str)}[self.conditioning]
        return {key: [kind(found[index - start]) for index in indices]}


def _load_zoo(name: str, device="cpu") -> DiffusionPipeline:
    """A shipped model from resources/zoo. Its weights are stored in float16 and computed with in float32."""
    folder = ZOO / name
    if not (folder / "model_index.json").is_file():
        raise FileNotFoundError(f"{name}: no trained model in {folder}; `snakemake zoo` trains it")

    import torch
    from diffusers import DiffusionPipeline, StableDiffusionPipeline

    from quest.pipelines import LatentDiffusionPipeline

    kinds = {kind.__name__: kind for kind in (LatentDiffusionPipeline, StableDiffusionPipeline)}
    kind = kinds[DiffusionPipeline.load_config(folder)["_class_name"]]
    pipe = kind.from_pretrained(folder)
    for module in pipe.components.values():
        if isinstance(module, torch.nn.Module):
            # A text encoder loads in the float16 it is stored in. On a CPU, convolutions are half again as fast when
            # channels are innermost, and what follows a layer keeps the layout its weight has.
            module.float().eval().to(memory_format=torch.channels_last)
    return pipe.to(device)


def _scene_labels(split: str, start: int, stop: int) -> Sequence[int]:
    from quest.zoo.scenes import draw

    return draw(split, stop - start, start=start).labels()


def _scene_captions(split: str, start: int, stop: int) -> Sequence[str]:
    from quest.zoo.scenes import draw

    return draw(split, stop - start, start=start).captions()


SCENES = ZOO.parent / "reference" / "scenes.npz"

MODELS = {
    model.name: model
    for model in (
        # The LSUN models of the paper: unconditional, fresh noise in every step.
        Model(
            name="scenes-uncond",
            load=partial(_load_zoo, "scenes-uncond"),
            sampler="ddim",
            steps=40,
            eta=1.0,
            conditioning="none",
            selection="lsun",
            activation_ranges="ema-symmetric",
            batch_size=50,
            time_groups=20,
            reference=SCENES,
        ),
        # ImageNet LDM-4: by class, guided, deterministic.
        Model(
            name="scenes-class",
            load=partial(_load_zoo, "scenes-class"),
            sampler="ddim",
            steps=20,
            guidance=3.0,
            conditioning="class",
            source=_scene_labels,
            selection="imagenet",
            batch_size=50,
            time_groups=20,
            reference=SCENES,
        ),
        # Stable Diffusion: by text, guided, PLMS.
        Model(
            name="scenes-text",
            load=partial(_load_zoo, "scenes-text"),
            sampler="plms",
            steps=20,
            guidance=3.0,
            conditioning="text",
            source=_scene_captions,
            selection="sd",
            split=True,
            activation_ranges="ema",
            batch_size=50,
            time_groups=10,
            clip="scenes-clip",
            reference=SCENES,
        ),
    )
}


def get(name: str) -> Model:
    """The model of that name. Raises ValueError with the known names otherwise."""
    if name not in MODELS:
        raise ValueError(f"model: {name!r} is not one of {', '.join(MODELS)}")
    return MODELS[name]

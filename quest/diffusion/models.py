"""The models of the suite: how each is loaded, sampled and conditioned. Imports torch only when it loads one.

The models in `resources/zoo` ship with the suite. The paper's are made from published checkpoints; see `Origin`.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING

from quest.diffusion.conditions import file_captions, photo_labels, scene_captions, scene_labels, spread_labels
from quest.diffusion.loading import load_pipeline
from quest.runtime.files import read_json

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

ZOO = Path(__file__).resolve().parents[2] / "resources" / "zoo"  # the models that ship
# Image i of a split has seed SEEDS[split] + i, so no two splits ever share noise.
SEEDS = {"evaluation": 0, "calibration": 1_000_000, "validation": 2_000_000}
CONDITIONED = {"none": "lsun", "class": "imagenet", "text": "sd"}  # conditioning -> selection in the released QuEST


@dataclass(frozen=True)
class Origin:
    """Where to get the weights of a model that does not ship with the suite.

    weights (a config's `models.<name>.checkpoint`, or `url`) --rule `model`, once--> results/models/<name> --> `load`
    """

    what: str  # which file to get and who publishes it; error messages show this
    compvis: str | None = None  # name of the configuration in resources/compvis, if the format is CompVis's
    url: str | None = None  # download address if a config names no checkpoint; always with its sha256
    sha256: str | None = None
    captions: bool = False  # whether sampling needs a file of captions, which the config names
    folder: Path | None = None  # of the pipeline in diffusers layout, of a model that a config declares


@dataclass(frozen=True)
class Model:
    """One pretrained pipeline and the protocol under which it is quantized and judged."""

    name: str
    load: Callable[..., DiffusionPipeline]  # load(device="cpu") gives float32 weights in eval mode
    sampler: str  # a name of `samplers.kind`
    steps: int  # num_inference_steps; PLMS calls the denoiser once more
    conditioning: str  # "none", "class" or "text"
    selection: str  # which layers QuEST tunes: "lsun", "imagenet", "sd", or globs over their names
    batch_size: int  # images per sampling batch, the same in every run
    time_groups: int | None  # None: one for every timestep
    eta: float = 0.0
    guidance: float = 1.0  # scale of classifier-free guidance; 1 means none
    guidance_is_input: bool = False  # whether the denoiser is distilled: it takes the scale, and a call has one half
    # source(split, start, stop) gives labels or captions, fewer if there are no more.
    source: Callable[[str, int, int], Sequence] | None = None
    caption_lines: dict | None = field(default=None, hash=False)  # of a file of captions: split -> first line, end
    # Layer glob -> bits; None: the first and the last layer at 8.
    keep: dict[str, int] | None = field(default_factory=lambda: {"conv_in": 8, "conv_out": 8}, hash=False)
    softmax_bits: int = 8
    split: bool = True  # whether Q-Diffusion quantizes the two parts of a decoder shortcut's input separately
    activation_ranges: str = "mse"  # of Q-Diffusion as released, for 8 bits or more: "mse", "ema" or "ema-symmetric"
    reconstruction: dict = field(default_factory=dict)  # published keywords of methods that reconstruct units
    trajectories: int = 50  # full-precision trajectories in the calibration set; multiples of batch_size waste none
    extractor: str = "scenes"  # network behind FID, sFID and IS
    clip: str | None = None  # image-text model behind the CLIP score
    classifier: str | None = None  # network that tells whether an image shows the class that was asked for
    reference: Path | None = None  # statistics of real images
    pictures: Path | None = None  # of an inpainting model: the folder of pictures that it fills
    origin: Origin | None = None  # where to get the weights; None if they ship
    base: str = ""  # of a model with outliers: the name of the shipped one that it is made of

    @property
    def folder(self) -> Path:
        """Where the files of a model lie that ships, or that rule `model` prepares."""
        return (PREPARED if self.origin else ZOO) / (self.base or self.name)

    @property
    def calls(self) -> int:
        """Number of denoiser calls in a trajectory."""
        return 2 * self.steps - 1 if self.sampler == "heun" else self.steps + (self.sampler == "plms")

    @property
    def has_eta(self) -> bool:  # the parameter of DDIM
        return self.sampler.startswith("ddim")

    @property
    def halves(self) -> int:
        """Samples per image in a denoiser call: 2 under guidance (without and with the condition), otherwise 1."""
        return 2 if self.guidance > 1 and not self.guidance_is_input else 1

    def __post_init__(self):
        """Raises ValueError for a protocol that no sampler follows."""
        for name in ("steps", "batch_size", "time_groups", "trajectories"):
            count = getattr(self, name)
            if (name, count) == ("time_groups", None):
                continue
            if isinstance(count, bool) or not isinstance(count, int) or count < 1:
                raise ValueError(f"{self.name}: {name}: {count!r} is not a whole number from 1 on")
        if not 0 <= self.eta <= 1:
            raise ValueError(f"{self.name}: eta: {self.eta} is outside [0, 1]")
        if not 1 <= self.guidance < math.inf:
            raise ValueError(f"{self.name}: guidance: {self.guidance} is below 1 (none), or not finite")

    @property
    def ships(self) -> bool:
        """Whether its weights are part of the project; others are published, or a user's own."""
        return self.origin is None

    @property
    def protocol(self) -> str:
        """How images are sampled, in one line, e.g. "ddim 20, eta 0, guidance 3"."""
        eta = f", eta {self.eta:g}" if self.has_eta else ""
        return f"{self.sampler} {self.steps}{eta}, guidance {self.guidance:g}"

    def recipe(self, method: Callable, activation_bits: int) -> dict:
        """Keyword arguments that the model sets for a method: those the method has and does not fix itself.

        A config's recipe overrides them.
        """
        return self.settings(set(signature(method).parameters) - set(getattr(method, "keywords", ())), activation_bits)

    def settings(self, accepted: Collection[str], activation_bits: int) -> dict:
        """The keyword arguments among `accepted` that the model sets.

        The released activation ranges exist for 8 bits only; below 8 bits the method's default, the MSE search, gives
        smaller errors.
        """
        names = ("keep", "softmax_bits", "time_groups", "selection", "guidance", "split")
        names += ("activation_ranges",) if activation_bits >= 8 else ()
        values = {name: getattr(self, name) for name in names if name in accepted}
        if self.guidance_is_input and "guidance" in values:
            values["guidance"] = 1.0  # nothing is left to combine
        published = self.reconstruction if "weight_iterations" in accepted else {}
        return {name: value for name, value in values.items() if value is not None} | published

    def seeds(self, split: str, indices: Sequence[int]) -> list[int]:
        """The seed of each image. Raises ValueError for an unknown split."""
        if split not in SEEDS:
            raise ValueError(f"split: {split!r} is not one of {', '.join(SEEDS)}")
        return [SEEDS[split] + index for index in indices]

    def conditions(self, split: str, indices: Sequence[int]) -> dict[str, list]:
        """The condition of each image as arguments of the pipeline: {}, {"class_labels": [int]} or {"prompt": [str]}.

        Raises ValueError if the model's source has too few labels or captions.
        """
        if self.source is None or not len(indices):
            return {}
        start, stop = min(indices), max(indices) + 1
        values = self.source(split, start, stop)
        if len(values) < stop - start:
            what = {"class": "labels", "text": "captions"}[self.conditioning]
            raise ValueError(f"{self.name}: split {split!r} has fewer than {stop} {what}; ask for fewer images")
        empty = [start + i for i, value in enumerate(values) if self.conditioning == "text" and not str(value).strip()]
        if empty:
            raise ValueError(f"{self.name}: split {split!r} has an empty caption, of image {empty[0]}")
        key, kind = {"class": ("class_labels", int), "text": ("prompt", str)}[self.conditioning]
        return {key: [kind(values[index - start]) for index in indices]}


def _load_zoo(name: str, device="cpu", outliers: int = 1) -> DiffusionPipeline:
    """Load a shipped model, stored in float16 and used in float32. outliers: see `quest.diffusion.outliers`."""
    folder = ZOO / name
    if not (folder / "model_index.json").is_file():
        raise FileNotFoundError(f"{name}: no trained model in {folder}; clones have it, and `snakemake zoo` trains it")
    pipe = load_pipeline(folder, device)
    if outliers != 1:
        from quest.diffusion.denoisers import denoiser_of
        from quest.diffusion.outliers import rescale

        rescale(denoiser_of(pipe), outliers)
    return pipe


def _load_prepared(name: str, device="cpu") -> DiffusionPipeline:
    """Load a model of the paper, from the folder that rule `model` wrote (`quest.diffusion.published`)."""
    folder = PREPARED / name
    if not (folder / "model_index.json").is_file():
        raise FileNotFoundError(
            f"{name}: no pipeline in {folder}; name the weights in a config, models.{name}.checkpoint "
            f"({MODELS[name].origin.what}), and run `snakemake results/models/{name} --configfile CONFIG`"
        )
    return load_pipeline(folder, device)


def _captions(name: str, split: str, start: int, stop: int) -> Sequence[str]:
    """Captions of images start .. stop - 1 of a split, from the file that `published.prepare` wrote."""
    return file_captions(PREPARED / name / "captions.txt", CAPTION_LINES, split, start, stop)


# Line numbers of a caption file: evaluation uses the first lines, in their order, and calibration uses later ones.
CAPTION_LINES = {"evaluation": (0, 10_000), "calibration": (10_000, 11_000)}
EMOJI_LINES = {"evaluation": (0, 2000), "calibration": (2000, 3000), "validation": (3000, 3500)}

SHIPPED = ZOO.parent / "reference"  # statistics of real images, and captions, that ship
SCENES, PHOTOS, EMOJI = (SHIPPED / f"{kind}.npz" for kind in ("scenes", "photos", "emoji"))
EMOJI_CAPTIONS = SHIPPED / "emoji-captions.txt"
# Another workflow that takes this one as a module has its results elsewhere (see Snakefile).
RESULTS = Path(os.environ.get("QUEST_RESULTS") or ZOO.parents[1] / "results")
PREPARED = RESULTS / "models"  # the folder that rule `model` writes into
REFERENCES = RESULTS / "references"  # statistics of real images that do not ship


# How models in the role of a model of the paper are sampled and quantized, where their row in MODELS does not say
# otherwise. The name of a role is also that of its selection in QuEST.
ROLES = {
    # LSUN: unconditional, with fresh noise in every step.
    "lsun": dict(
        sampler="ddim", steps=40, eta=1.0, conditioning="none", activation_ranges="ema-symmetric", time_groups=20
    ),
    # ImageNet LDM-4: conditioned on a class, guided, deterministic.
    "imagenet": dict(sampler="ddim", steps=20, guidance=3.0, conditioning="class", time_groups=20),
    # Stable Diffusion: conditioned on text, guided, sampled with PLMS.
    "sd": dict(sampler="plms", steps=20, guidance=3.0, conditioning="text", activation_ranges="ema", time_groups=10),
}

# Photographs of CIFAR-10, by class.
PHOTOGRAPHS = dict(source=photo_labels, extractor="lite0-photos", classifier="photos-classifier", reference=PHOTOS)


def _zoo(name: str, role: str, **protocol) -> Model:
    """A model that ships."""
    return Model(name=name, load=partial(_load_zoo, name), selection=role, batch_size=50, **ROLES[role] | protocol)


def _published(name: str, role: str, **protocol) -> Model:
    """A model of the paper, whose weights are published."""
    shared = dict(batch_size=64, trajectories=256, extractor="adm", reference=REFERENCES / f"{name}.npz")
    return Model(name=name, load=partial(_load_prepared, name), selection=role, **ROLES[role] | shared | protocol)


def _rehearsed(architecture: str, role: str, **protocol) -> Model:
    """A model of the rehearsal: one of the paper's architectures with few channels, random weights and few steps."""
    name = f"tiny-{architecture}"
    shared = dict(steps=5, batch_size=4, time_groups=5, activation_ranges="mse", trajectories=8, reference=SCENES)
    origin = Origin(f"what `python -m quest.diffusion.random_checkpoints {name}` writes", name)
    settings = ROLES[role] | shared | protocol
    return Model(name=name, load=partial(_load_prepared, name), selection=role, origin=origin, **settings)


MODELS = {
    model.name: model
    for model in (
        _zoo("scenes-uncond", "lsun", reference=SCENES),
        _zoo("scenes-class", "imagenet", source=scene_labels, reference=SCENES),
        _zoo("scenes-text", "sd", source=scene_captions, clip="scenes-clip", reference=SCENES),
        _zoo("photos-class", "imagenet", **PHOTOGRAPHS),
        # The same by a transformer, whose first and last layers have other names.
        _zoo("photos-dit", "imagenet", **PHOTOGRAPHS, keep=None),
        # Emoji, without a condition and from captions such as "noto emoji: red apple". The captions are of the training
        # split: what held-out ones give is in the model's README.
        _zoo("emoji-uncond", "lsun", extractor="lite0-emoji", reference=EMOJI),
        _zoo(
            "emoji-text",
            "sd",
            source=partial(file_captions, EMOJI_CAPTIONS, EMOJI_LINES),
            caption_lines=EMOJI_LINES,
            extractor="lite0-emoji",
            clip="emoji-clip",
            reference=EMOJI,
        ),
        # The models of arXiv:2402.03666, with the settings of its experiments and released code: 8 bits for the first
        # and the last layer and for attention probabilities, which have 16 bits in Stable Diffusion.
        _published(
            "lsun-bedrooms",
            "lsun",
            steps=200,
            eta=1.0,
            split=False,  # as Q-Diffusion's released command
            reconstruction={"rows": 5120},
            origin=Origin("model.ckpt of lsun_beds256, as CompVis/latent-diffusion releases it", "lsun-bedrooms"),
        ),
        _published(
            "lsun-churches",
            "lsun",
            # The released commands say 400 or 500: CompVis's sampler takes every second of 1000 timesteps for both.
            steps=500,
            eta=0.0,
            split=False,  # as Q-Diffusion's released command
            activation_ranges="mse",
            reconstruction={"rows": 5120},
            origin=Origin("model.ckpt of lsun_churches256, as CompVis/latent-diffusion releases it", "lsun-churches"),
        ),
        _published(
            "imagenet",
            "imagenet",
            steps=20,
            guidance=3.0,
            source=partial(spread_labels, 1000),
            # No command of Q-Diffusion was released for it; QuEST's draws 20 steps of 256, both halves.
            reconstruction={"rows": 10240},
            origin=Origin("model.ckpt of cin256-v2, as CompVis/latent-diffusion releases it", "imagenet"),
        ),
        _published(
            "sd14",
            "sd",
            steps=50,
            guidance=7.5,
            source=partial(_captions, "sd14"),
            caption_lines=CAPTION_LINES,
            batch_size=16,
            time_groups=25,
            softmax_bits=16,
            reconstruction={"rows": 6400, "batch": 8},
            trajectories=128,
            clip="ViT-B-16",
            origin=Origin(
                "sd-v1-4.ckpt, or the folder of CompVis/stable-diffusion-v1-4 in diffusers layout, from Hugging Face",
                "sd14",
                "https://huggingface.co/CompVis/stable-diffusion-v-1-4-original/resolve/main/sd-v1-4.ckpt",
                "fe4efff1e174c627256e44ec2991ba279b3816e364b49f9be2abc0b3ff3f8556",
                captions=True,
            ),
        ),
        _published(
            "cifar10",
            "lsun",
            sampler="ddim-quadratic",
            steps=100,
            eta=0.0,
            batch_size=256,
            # 96 of the 100 quadratic timesteps are distinct. 20, one group for every fifth step, does not divide 96.
            time_groups=24,
            reconstruction={"rows": 5120},
            extractor="torch-fidelity",
            origin=Origin(
                "folder of google/ddpm-cifar10-32 in diffusers layout from Hugging Face, or what "
                "`python -m quest.zoo.train_cifar10` writes"
            ),
        ),
        # The rehearsal of the paper's first four models.
        _rehearsed("bedrooms", "lsun"),
        _rehearsed("churches", "lsun", eta=0.0),
        _rehearsed("imagenet", "imagenet", source=partial(spread_labels, 1000)),
        _rehearsed("sd", "sd", guidance=7.5, source=scene_captions, softmax_bits=16, clip="scenes-clip"),
    )
}


def find(name: str) -> Model | None:
    """The model of the suite with this name, of MODELS or one that ships with outliers, such as "photos-class-x4"."""
    base, _, factor = name.rpartition("-x")
    if name not in MODELS and base in MODELS and MODELS[base].ships and factor in ("4", "16"):
        return replace(MODELS[base], name=name, base=base, load=partial(_load_zoo, base, outliers=int(factor)))
    return MODELS.get(name)


def get(name: str) -> Model:
    """The model with this name: of MODELS, or of a config, prepared by rule `model`. Raises ValueError for another."""
    if (model := find(name)) is not None:
        return model
    if (record := PREPARED / name / "origin.json").is_file() and (settings := read_json(record).get("settings")):
        from quest.diffusion.declared import declared

        return declared(name, settings)
    raise ValueError(f"model: {name!r} is not one of {', '.join(MODELS)}")

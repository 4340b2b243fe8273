"""Models that only a config declares: any pipeline of diffusers with a U-Net or transformer. No torch.

    models:
      mine: {pipeline: a/folder, sampler: dpmsolver++, steps: 25, guidance: 7.5, prompts: prompts.txt, images: 500}

What the settings leave open follows from the files of the folder: its sampler, how it is conditioned, the layers that
QuEST tunes. Rule `model` records the settings in results/models/<name>, where `models.get` finds them.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import partial
from inspect import signature
from pathlib import Path

from quest.diffusion import captions as caption_files
from quest.diffusion.conditions import scene_captions, spread_labels
from quest.diffusion.denoisers import NAMES, denoiser_of
from quest.diffusion.loading import load_pipeline
from quest.diffusion.models import CONDITIONED, PREPARED, REFERENCES, Model, Origin, find
from quest.runtime.files import atomic_folder, read_lines, read_text

# Names of samplers and the classes they stand for, of diffusers or of `quest.diffusion.samplers`.
SAMPLERS = {
    "ddim": "DDIMScheduler",
    "ddim-quadratic": "QuadraticDDIMScheduler",
    "plms": "PNDMScheduler",
    "ddpm": "DDPMScheduler",
    "dpmsolver++": "DPMSolverMultistepScheduler",
    "euler": "EulerDiscreteScheduler",
    "euler-ancestral": "EulerAncestralDiscreteScheduler",
    "flow-euler": "FlowMatchEulerDiscreteScheduler",
    "heun": "HeunDiscreteScheduler",
    "lcm": "LCMScheduler",
    "unipc": "UniPCMultistepScheduler",
}
# What a config may say beside the folder.
PROTOCOL = ("sampler", "steps", "guidance", "prompts", "pictures", "selection")
PATHS = ("pipeline", "pictures")  # where the record says from where
SHARED = {"batch_size": 8, "time_groups": None, "keep": None, "trajectories": 16}


def of_config(config: dict) -> dict[str, Model]:
    """The models of a config by name: those of the suite, and those that it declares itself.

    Raises ValueError that names the key, for a folder that holds no pipeline, and for settings that do not fit it.
    """
    return {name: _of_settings(name, settings) for name, settings in config["models"].items()}


def _of_settings(name: str, settings: dict) -> Model:
    if "pipeline" in settings:
        return declared(name, settings)
    if own := [key for key in PROTOCOL if key in settings]:
        raise ValueError(f"models.{name}.{own[0]}: a model of the suite has its own protocol; leave it out")
    return find(name)


def declared(name: str, settings: dict) -> Model:
    """The model that a config declares under models.<name>; see `of_config`."""
    if find(name) is not None:
        raise ValueError(f"models.{name}: a model of the suite has this name; give yours another one, or no pipeline")
    if "steps" not in settings:
        raise ValueError(f"models.{name}.steps: missing; a model with a pipeline needs the number of denoiser steps")
    if not (sampler := settings.get("sampler", "ddim")).endswith("Scheduler") and sampler not in SAMPLERS:
        raise ValueError(
            f"models.{name}.sampler: {sampler!r} is not one of {', '.join(SAMPLERS)}, or a scheduler of diffusers"
        )
    folder = Path(settings["pipeline"]).absolute()
    if not (folder / "model_index.json").is_file():
        raise ValueError(f"models.{name}.pipeline: no {folder / 'model_index.json'}; name a folder in diffusers layout")
    index = _settings_of(folder / "model_index.json")
    parts = {  # those of model_index.json that are not left out
        part for part, entry in index.items() if isinstance(entry, list) and len(entry) == 2 and entry[1] is not None
    }
    denoiser = next((part for part in NAMES if part in parts), None)
    if denoiser is None or "scheduler" not in parts:
        raise ValueError(f"models.{name}.pipeline: {folder} holds no unet or transformer with a scheduler")
    config = _settings_of(folder / denoiser / "config.json")
    own = _settings_of(folder / "scheduler" / "scheduler_config.json").get("_class_name", "")
    embedder = folder / "class_embedder" / "config.json"
    classes = _settings_of(embedder)["num_classes"] if "class_embedder" in parts else config.get("num_embeds_ada_norm")
    if any(part.startswith("text_encoder") for part in parts):
        conditioning, source = "text", partial(_prompts, PREPARED / name / "captions.txt")
    elif denoiser == "transformer" and classes or "class_embedder" in parts:
        conditioning, source = "class", partial(spread_labels, classes)
    else:
        conditioning, source = "none", None
    if ("prompts" in settings) != (conditioning == "text"):
        wrong = "missing; name a text file, one prompt per line" if conditioning == "text" else "it takes no text"
        raise ValueError(f"models.{name}.prompts: {wrong}")
    pictures = Path(settings["pictures"]).absolute() if "pictures" in settings else None
    inpaints = "Inpaint" in index.get("_class_name", "")
    if (pictures is not None) != inpaints or inpaints and not pictures.is_dir():
        wrong = "name a folder of pictures whose middle is filled" if inpaints else "it fills no pictures; leave it out"
        raise ValueError(f"models.{name}.pictures: {wrong}")
    if conditioning == "none" and settings.get("guidance", 1) != 1:
        raise ValueError(f"models.{name}.guidance: the model has no condition to be guided by; leave it out")
    known = settings.get("reference", "none") != "none"
    return Model(
        name=name,
        load=partial(load_pipeline, folder, sampler=settings.get("sampler")),
        sampler=settings.get("sampler", _short(own)),
        steps=settings["steps"],
        guidance=settings.get("guidance", 1.0),
        guidance_is_input=bool(config.get("time_cond_proj_dim")),
        conditioning=conditioning,
        source=source,
        selection=settings.get("selection", CONDITIONED[conditioning]),
        pictures=pictures,
        extractor="adm" if known else "scenes",
        reference=REFERENCES / f"{name}.npz" if known else None,
        origin=Origin("the folder of a pipeline in diffusers layout, models.<name>.pipeline", folder=folder),
        **SHARED,
    )


def prepare(name: str, settings: dict, out: str | Path) -> None:
    """Record a declared model in the folder `out`, all at once: its settings, prompts and the hash of its weights.

    Raises FileNotFoundError or ValueError for prompts that are missing or empty.
    """
    from quest.diffusion.published import record

    folder = Path(settings["pipeline"]).absolute()
    lines = caption_files.load(settings["prompts"]) if "prompts" in settings else None
    if lines == []:
        raise ValueError(f"models.{name}.prompts: {settings['prompts']} is empty; write one prompt per line")
    settings = settings | {key: str(Path(settings[key]).absolute()) for key in PATHS if key in settings}
    with atomic_folder(out) as temporary:
        record(temporary, name, folder, settings.get("prompts"), lines, settings=settings)


def of_pipeline(pipe, prompts: Sequence[str] | None = None) -> Model:
    """A model of a pipeline in memory, with its own scheduler and the steps and guidance that its call defaults to.

    prompts: captions of a pipeline with text; default: captions of the suite's scenes.
    """
    from quest.diffusion import samplers

    defaults = {name: parameter.default for name, parameter in signature(type(pipe).__call__).parameters.items()}
    config, embedder = denoiser_of(pipe).config, getattr(pipe, "class_embedder", None)
    if "prompt" in defaults:
        conditioning, source = "text", partial(_cycled, list(prompts)) if prompts else scene_captions
    elif "class_labels" in defaults and (embedder is not None or config.get("num_embeds_ada_norm")):
        classes = config["num_embeds_ada_norm"] if embedder is None else embedder.config.num_classes
        conditioning, source = "class", partial(spread_labels, classes)
    else:
        conditioning, source = "none", None
    return Model(
        name=type(pipe).__name__,
        load=lambda device="cpu": pipe.to(device),
        sampler=samplers.name_of(pipe.scheduler),
        steps=defaults["num_inference_steps"],
        guidance=max(1.0, defaults.get("guidance_scale", 1.0)) if conditioning != "none" else 1.0,
        guidance_is_input=bool(config.get("time_cond_proj_dim")),
        conditioning=conditioning,
        source=source,
        selection=CONDITIONED[conditioning],
        **SHARED,
    )


def _settings_of(file: Path) -> dict:
    """A JSON file of diffusers, which may contain infinite numbers: those of some schedulers."""
    return json.loads(read_text(file))


def _short(class_name: str) -> str:
    return next((name for name, known in SAMPLERS.items() if known == class_name), class_name)


def _prompts(path: Path, split: str, start: int, stop: int) -> Sequence[str]:
    return _cycled(read_lines(path), split, start, stop)


def _cycled(lines: list[str], split: str, start: int, stop: int) -> Sequence[str]:
    """Lines of images start .. stop - 1: evaluation goes through them in order, other splits from the last one back.

    After all of them they begin anew. With as many lines as images and trajectories together no two splits share one.
    """
    return [lines[i % len(lines) if split == "evaluation" else -1 - i % len(lines)] for i in range(start, stop)]

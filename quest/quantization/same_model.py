"""Compares a checkpoint with the model that it is loaded into, and names what differs."""

import copy

import torch

from quest.diffusion import samplers
from quest.quantization import branch, prologue
from quest.quantization.header import CODES, SCHEDULER
from quest.quantization.layers import attentions
from quest.runtime.files import dumps, one_line


def of_another_model(path, what: str) -> ValueError:
    """The error for a checkpoint that does not fit a model."""
    return ValueError(one_line(f"{path} is a checkpoint of another model: {what}"))


def check_shapes(denoiser, header: dict, tensors: dict[str, torch.Tensor], path) -> None:
    """Raise ValueError if tensors of a checkpoint have other shapes than the denoiser's; the message lists them."""
    quantizers = ("scale", "zero_point")
    kept = denoiser.state_dict()
    own = {k: v.shape for k, v in kept.items() if k.rpartition(".")[2] not in quantizers}
    stored = {k: v.shape for k, v in tensors.items() if k.rpartition(".")[2] not in quantizers}
    coded = [k for k in stored if k.endswith(f".{CODES}")]
    stored |= {f"{n}.weight": tuple(header["shapes"][n]) for n in (k.removesuffix(f".{CODES}") for k in coded)}
    other = {*coded, *(f"{name}.{prologue.MULTIPLIER}" for name in header.get("prologues", {})), *branch.names(header)}
    stored = {k: v for k, v in stored.items() if not k.startswith(SCHEDULER) and k not in other}
    differ = [
        f"{k}: {tuple(stored[k]) if k in stored else 'missing'} in the file, "
        f"{tuple(own[k]) if k in own else 'missing'} in the model"
        for k in sorted(own.keys() | stored.keys())
        if own.get(k) != stored.get(k)
    ]
    for k in sorted(own.keys() & tensors.keys()):
        if tensors[k].dtype != kept[k].dtype:
            differ.append(f"{k}: {tensors[k].dtype} in the file, {kept[k].dtype} in the model")
    valid = torch.float32, denoiser.dtype  # which diffusers looks for in all modules
    for k, v in tensors.items():
        if k.rpartition(".")[2] in quantizers and v.dtype not in valid:
            differ.append(f"{k}: {v.dtype} in the file, torch.float32 in the model")
    if differ:
        more = f" and {len(differ) - 5} more" if len(differ) > 5 else ""
        raise of_another_model(path, f"{'; '.join(differ[:5])}{more}")


def check_names(denoiser, header: dict, path) -> None:
    """Raise ValueError if the header names a layer or an attention that the denoiser does not have."""
    modules, known = dict(denoiser.named_modules()), dict(attentions(denoiser))
    layers = {name for name, module in modules.items() if isinstance(module, torch.nn.Linear | torch.nn.Conv2d)}
    unknown = sorted(header["layers"].keys() - layers) + sorted(header["attentions"].keys() - known.keys())
    if unknown:
        raise of_another_model(path, f"it quantizes {unknown[0]}")


def architecture(denoiser) -> dict:
    """The part of a denoiser's configuration that shapes of weights do not show."""
    other = ("sample_size", "dropout", "quantization_config")
    return {k: v for k, v in denoiser.config.items() if not k.startswith("_") and k not in other}


def check_architecture(denoiser, header: dict, path, part: str) -> None:
    """Raise ValueError if a checkpoint belongs to another architecture than the denoiser's.

    It compares what shapes of weights do not show, such as the number of heads and activations.
    """
    if header["denoiser"] != (kind := type(denoiser).__name__):
        raise of_another_model(path, f"of a {header['denoiser']}, not a {kind}")
    own, stored = architecture(denoiser), header.get("config", {})  # earlier files do not state it
    own, stored = ({k: dumps(v) for k, v in config.items()} for config in (own, stored))
    differ = [f"{k}: {stored[k]} in the file, {own[k]}" for k in sorted(own.keys() & stored) if own[k] != stored[k]]
    if differ:
        raise of_another_model(path, f"{part}.config.{'; '.join(differ[:5])} in the model")


def check_schedule(pipe, denoiser, header: dict, path) -> None:
    """Raise ValueError if a pipeline's scheduler has another noise schedule than a file, or leaves its time groups.

    It is asked for the calibrated number of steps.
    """
    if differ := samplers.differences(header.get("scheduler"), samplers.trained_on(pipe.scheduler)):
        raise ValueError(
            f"{path} is of a model with another schedule than the pipeline's scheduler: {'; '.join(differ)}"
        )
    if not header["time_groups"]:
        return
    if not header.get("timesteps"):
        raise ValueError(f"{path}: its header has time groups and no timesteps that they were calibrated on")
    scheduler = copy.deepcopy(pipe.scheduler)
    try:
        scheduler.set_timesteps(len(header["timesteps"]))
        denoiser.time_groups.check(scheduler.timesteps.tolist())
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error

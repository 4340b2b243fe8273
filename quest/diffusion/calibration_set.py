"""Calibration sets: inputs and predictions of the full-precision denoiser, recorded while it samples images.

A trajectory is the path of one image from noise to its latent. Every denoiser call on it gives a row; under guidance a
call gives two rows, one for each half of the doubled batch (without and with the condition).

    noise --[call 0, t = 951]--> x --[call 1, t = 901]--> x ... --[call 19, t = 1]--> latent
             row: sample, t, target   row: sample, t, target

Trajectories start from Gaussian noise, so no image is needed (QuEST, arXiv:2402.03666, section 4).
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from inspect import signature
from typing import TYPE_CHECKING

import torch
from safetensors.torch import save_file
from torch import Tensor

from quest.runtime.files import atomic, dumps, loads, one_line
from quest.runtime.hashing import opened, tensor_hash

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

    from quest.diffusion.models import Model


TENSORS = ("sample", "timestep", "target", "trajectory", "call")
AT_ONCE = 2**18  # numbers that are looked at together, where a whole tensor is
CONDITION_FIRST = ("DiTPipeline",)  # pipelines whose guided batch is [with, without the condition]


@dataclass
class CalibrationSet:
    """N rows in the order in which the denoiser computed them, trajectory by trajectory within a call.

    sample [N, C, h, w], timestep [N] (int64, or float where a sampler visits fractions), conditioning {argument:
    [N, ...]}, target [N, C', h, w] (the prediction of full precision), trajectory [N] (image index), call [N] (0 for
    the noisiest; a sampler may visit a timestep twice). C' differs from C where a denoiser also predicts variances, or
    takes a mask.
    scheduler: the noise schedule it was sampled with (`samplers.trained_on`), None where that is not known.
    argument: the name under which the denoiser takes `sample`. "a.b" in `conditioning` is the entry b of a mapping a.
    """

    sample: Tensor
    timestep: Tensor
    target: Tensor
    trajectory: Tensor
    call: Tensor
    conditioning: dict[str, Tensor] = field(default_factory=dict)
    scheduler: dict | None = None
    argument: str = "sample"

    def __len__(self) -> int:
        return len(self.sample)

    @property
    def timesteps(self) -> list[int | float]:
        """Distinct timesteps, noisiest first."""
        return sorted(set(self.timestep.tolist()), reverse=True)

    def inputs(self, rows: Tensor) -> dict[str, Tensor]:
        """Keyword arguments of the denoiser for these rows."""
        inputs = {self.argument: self.sample[rows], "timestep": self.timestep[rows]}
        for name, value in self.conditioning.items():
            outer, _, inner = name.rpartition(".")
            (inputs.setdefault(outer, {}) if outer else inputs)[inner] = value[rows]
        return inputs

    def replaced(self, change: Callable[[Tensor], Tensor]) -> CalibrationSet:
        """The set with each of its tensors changed."""
        tensors = {name: change(getattr(self, name)) for name in TENSORS}
        return replace(self, **tensors, conditioning={k: change(v) for k, v in self.conditioning.items()})

    def subset(self, rows: Tensor) -> CalibrationSet:
        """These rows, in this order; a row may occur more than once."""
        return self.replaced(lambda tensor: tensor[rows])

    def rows_of_call(self, number: int | Tensor) -> Tensor:
        """Row indices of one sampler call, all of which have one timestep."""
        return (self.call == number).nonzero().flatten()

    def calls(self) -> Tensor:
        """Row indices of each sampler call, [calls * trajectories, halves], call by call.

        Under guidance a call has two halves, first without and then with the condition; otherwise it has one.
        Raises ValueError if some trajectory lacks a call or a half.
        """
        key = self.call * (int(self.trajectory.max()) + 1) + self.trajectory
        counts = key.unique(return_counts=True)[1]
        if (counts != counts[0]).any():
            raise ValueError("the calibration set holds some sampler calls in full and others in part")
        return key.argsort(stable=True).reshape(-1, int(counts[0]))

    def to(self, device) -> CalibrationSet:
        """The same rows on another device, since inputs must be on the device of the denoiser."""
        return self.replaced(lambda tensor: tensor.to(device))

    def save(self, path, metadata: dict | None = None) -> None:
        """Write a safetensors file whose header has `metadata` and the hash of every tensor, atomically."""
        tensors = {name: getattr(self, name) for name in TENSORS}
        tensors |= {f"conditioning.{k}": v for k, v in self.conditioning.items()}
        tensors = {k: v.cpu().contiguous() for k, v in tensors.items()}
        hashes = {k: tensor_hash(v) for k, v in tensors.items()}
        header = (metadata or {}) | {"scheduler": self.scheduler, "argument": self.argument, "hashes": hashes}
        with atomic(path) as tmp:
            save_file(tensors, tmp, {"quest": dumps(header)})

    @classmethod
    def load(cls, path) -> CalibrationSet:
        """Read a saved set. Raises ValueError if the file is no calibration set, or has changed since it was saved.

        On the CPU its tensors lie in the file, which the system maps into memory: what is not read takes no memory, and
        what was read can be dropped. The file must not be written while the set is in use; `save` replaces it.
        Sets of an earlier version have no hashes and are not checked for changes.
        """
        with opened(path) as f:
            header = loads((f.metadata() or {}).get("quest", "{}"), path)
            hashes = header.get("hashes", {}) if isinstance(header, dict) else None
            if not isinstance(hashes, dict):
                raise ValueError(f"{path} is corrupted: its header has no hashes by tensor; make it again")
            scheduler = header.get("scheduler")
            if not isinstance(scheduler, dict | None):
                raise ValueError(f"{path} is corrupted: its header names no scheduler by its settings; make it again")
            argument = header.get("argument", "sample")
            if not isinstance(argument, str):
                raise ValueError(f"{path} is corrupted: its header names no argument of a denoiser; make it again")
            tensors = {k: f.get_tensor(k) for k in f.keys()}
        changed = [k for k in hashes if k not in tensors or tensor_hash(tensors[k]) != hashes[k]]
        if changed:
            raise ValueError(
                f"{path} is corrupted: its tensor {one_line(changed[0])} is not what was saved; make it again"
            )
        missing = set(TENSORS) - set(tensors)
        if missing:
            raise ValueError(f"{path} is not a calibration set: it lacks {', '.join(sorted(missing))}")
        prefix = "conditioning."
        for name in tensors.keys() - set(TENSORS):
            if not name.startswith(prefix) or name.removeprefix(prefix) in ("", "sample", "timestep"):
                raise ValueError(f"{path} is not a calibration set: its tensor {one_line(name)} is unknown")
        n, kinds = tensors["sample"].shape[:1], dict.fromkeys(("trajectory", "call"), (torch.int64,))
        kinds["timestep"] = (torch.int64, torch.float32, torch.float64)
        for name, value in tensors.items():
            number = name not in kinds or value.dtype in kinds[name] and value.ndim == 1 and (value >= 0).all()
            if value.shape[:1] != n or not number:
                raise ValueError(
                    f"{path}: its tensor {name} is {value.dtype} {tuple(value.shape)}, not one of {n[0]} rows"
                )
            if not all(part.isfinite().all() for part in value.flatten().split(AT_ONCE)):
                raise ValueError(f"{path}: its tensor {name} is not finite: full precision diverged")
        target, sample = tensors["target"].shape, tensors["sample"].shape
        if target[2:] != sample[2:] or len(target) != len(sample) or not n[0]:
            raise ValueError(f"{path}: predictions {tuple(target)} are not of the size of the inputs {tuple(sample)}")
        conditioning = {k.removeprefix(prefix): tensors.pop(k) for k in list(tensors) if k.startswith(prefix)}
        return cls(**tensors, conditioning=conditioning, scheduler=scheduler, argument=argument)


def guide(predictions: Tensor, guidance: float | None) -> Tensor:
    """Combine predictions [B, halves, C, h, w] into the sampler's, [B, C, h, w] (classifier-free guidance).

    Raises ValueError for two halves without a guidance scale, and for one half with a scale other than 1.
    """
    if predictions.shape[1] == 1:
        if guidance not in (None, 1):
            raise ValueError(f"guidance: {guidance} needs calibration trajectories that were sampled with guidance")
        return predictions[:, 0]
    if guidance is None:
        raise ValueError("guidance: the calibration trajectories were guided; give the sampler's scale")
    unconditional, conditional = predictions.unbind(1)
    return unconditional + guidance * (conditional - unconditional)


@torch.no_grad()
def collect(pipe: DiffusionPipeline, model: Model, split: str, n: int, draw: int = 0) -> CalibrationSet:
    """Sample n images of a split and record every denoiser call of their trajectories.

    draw: 0 for images 0 to n - 1; each further draw uses the next images, beginning at a whole batch.
    """
    from quest.diffusion.denoisers import denoiser_of, sample_argument
    from quest.diffusion.samplers import trained_on
    from quest.diffusion.sampling import generate  # imported here, so that the class alone imports no pipelines

    first = draw * math.ceil(n / model.batch_size) * model.batch_size
    calls: list[dict] = []

    mine, denoiser = threading.get_ident(), denoiser_of(pipe)
    positions, argument = list(signature(denoiser.forward).parameters), sample_argument(denoiser)

    def record(_denoiser, args, kwargs, output):
        if threading.get_ident() != mine:  # of others, who share the denoiser
            return
        named = dict(zip(positions, args, strict=False)) | kwargs
        sample, t = named.pop(argument), torch.as_tensor(named.pop("timestep")).reshape(-1)[0]
        for name in [name for name, value in named.items() if isinstance(value, dict)]:
            named |= {f"{name}.{k}": v for k, v in named.pop(name).items()}
        conditioning = {k: v for k, v in named.items() if isinstance(v, Tensor)}
        prediction = output.sample if hasattr(output, "sample") else output[0]
        calls.append(dict(sample=sample, timestep=t.expand(len(prediction)), target=prediction, **conditioning))

    kept: dict[str, list[Tensor]] = {}
    with denoiser.register_forward_hook(record, with_kwargs=True):
        for indices, _, _ in generate(pipe, model, split, n, first=first):
            for number, call in enumerate(calls):
                halves = list(range(len(call["sample"]) // model.batch_size))  # 2 under guidance
                if type(pipe).__name__ in CONDITION_FIRST:
                    halves.reverse()
                rows = torch.cat([torch.arange(len(indices)) + h * model.batch_size for h in halves])
                for name, value in call.items():
                    kept.setdefault(name, []).append(value.cpu()[rows].clone())
                kept.setdefault("trajectory", []).append(torch.as_tensor(indices).repeat(len(halves)))
                kept.setdefault("call", []).append(torch.full((len(rows),), number))
            calls.clear()
    tensors = {k: torch.cat(kept.pop(k)) for k in list(kept)}  # one at a time, so that little is in memory twice
    columns = {k: tensors.pop(k) for k in TENSORS}
    if (columns["timestep"] == columns["timestep"].long()).all():
        columns["timestep"] = columns["timestep"].long()
    return CalibrationSet(**columns, conditioning=tensors, scheduler=trained_on(pipe.scheduler), argument=argument)


def draw(pipe: DiffusionPipeline, prompts: Sequence[str] | None = None) -> tuple[CalibrationSet, Model]:
    """A calibration set of a pipeline in memory, and the protocol it was sampled with: `declared.of_pipeline`."""
    from quest.diffusion.declared import of_pipeline

    model = of_pipeline(pipe, prompts)
    return collect(pipe, model, "calibration", model.trajectories), model

"""Calibration sets: what the full-precision denoiser met, and answered, along its own sampling trajectories.

Data-free (QuEST, arXiv:2402.03666, section 4): trajectories start from Gaussian noise, so no image is needed. A guided
sampler calls the denoiser on a doubled batch; both halves are kept, so every latent appears once with its condition and
once without.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields

import torch
from diffusers import DiffusionPipeline
from safetensors.torch import save_file
from torch import Tensor, nn

from quest import ranges
from quest.files import atomic
from quest.hashes import opened, tensor_hash
from quest.layers import input_quantizers, layer_class
from quest.models import Model
from quest.sampling import generate


@dataclass
class CalibrationSet:
    """N denoiser calls: rows in the order they were made, trajectory by trajectory within a call.

    sample [N, C, h, w], timestep [N] (int64), conditioning {argument: [N, ...]}, target [N, C, h, w] (the prediction of
    full precision), trajectory [N] (image index), call [N] (0 for the noisiest; a sampler may visit a timestep twice).
    """

    sample: Tensor
    timestep: Tensor
    target: Tensor
    trajectory: Tensor
    call: Tensor
    conditioning: dict[str, Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.sample)

    @property
    def timesteps(self) -> list[int]:
        """Distinct timesteps, noisiest first."""
        return sorted(set(self.timestep.tolist()), reverse=True)

    def inputs(self, rows: Tensor) -> dict[str, Tensor]:
        """Keyword arguments of the denoiser for these rows."""
        return dict(
            sample=self.sample[rows], timestep=self.timestep[rows], **{k: v[rows] for k, v in self.conditioning.items()}
        )

    def subset(self, rows: Tensor) -> CalibrationSet:
        """These rows, in this order; a row may occur more than once."""
        own = {f.name: getattr(self, f.name)[rows] for f in fields(self) if f.name != "conditioning"}
        return CalibrationSet(**own, conditioning={k: v[rows] for k, v in self.conditioning.items()})

    def calls(self) -> Tensor:
        """Rows of each sampler call, [calls * trajectories, halves], call by call.

        Under guidance a call has two halves, without and then with the condition; else one.
        Raises ValueError for a set that lacks a call or a half of some trajectory.
        """
        key = self.call * (int(self.trajectory.max()) + 1) + self.trajectory
        counts = key.unique(return_counts=True)[1]
        if (counts != counts[0]).any():
            raise ValueError("the calibration set holds some sampler calls in full and others in part")
        return key.argsort(stable=True).reshape(-1, int(counts[0]))

    def to(self, device) -> CalibrationSet:
        """The same rows on another device: where a denoiser is, its inputs must be."""
        own = {f.name: getattr(self, f.name).to(device) for f in fields(self) if f.name != "conditioning"}
        return CalibrationSet(**own, conditioning={k: v.to(device) for k, v in self.conditioning.items()})

    def save(self, path, metadata: dict | None = None) -> None:
        """Write a safetensors file whose header has `metadata` and the hash of every tensor, atomically."""
        tensors = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "conditioning"}
        tensors |= {f"conditioning.{k}": v for k, v in self.conditioning.items()}
        tensors = {k: v.cpu().contiguous() for k, v in tensors.items()}
        header = (metadata or {}) | {"hashes": {k: tensor_hash(v) for k, v in tensors.items()}}
        with atomic(path) as tmp:
            save_file(tensors, tmp, {"quest": json.dumps(header)})

    @classmethod
    def load(cls, path) -> CalibrationSet:
        """Raises ValueError for a file that is not a calibration set, or whose bytes have changed since it was saved.

        Sets of an earlier version have no hashes; they are taken as they are.
        """
        with opened(path) as f:
            hashes = json.loads((f.metadata() or {}).get("quest", "{}")).get("hashes", {})
            tensors = {k: f.get_tensor(k) for k in f.keys()}
        changed = [k for k in hashes if k not in tensors or tensor_hash(tensors[k]) != hashes[k]]
        if changed:
            raise ValueError(f"{path} is corrupted: its tensor {changed[0]} is not what was saved; make it again")
        missing = {f.name for f in fields(cls)} - {"conditioning"} - set(tensors)
        if missing:
            raise ValueError(f"{path} is not a calibration set: it lacks {', '.join(sorted(missing))}")
        prefix = "conditioning."
        conditioning = {k.removeprefix(prefix): tensors.pop(k) for k in list(tensors) if k.startswith(prefix)}
        return cls(**tensors, conditioning=conditioning)


def guide(predictions: Tensor, guidance: float | None) -> Tensor:
    """What the sampler works with, [B, C, h, w], of predictions [B, halves, C, h, w] (classifier-free guidance).

    Raises ValueError for two halves without a guidance scale, and for one half with another scale than 1.
    """
    if predictions.shape[1] == 1:
        if guidance not in (None, 1):
            raise ValueError(f"guidance: {guidance} needs calibration trajectories that were sampled with guidance")
        return predictions[:, 0]
    if guidance is None:
        raise ValueError("guidance: the calibration trajectories were guided; give the sampler's scale")
    without, given = predictions.unbind(1)
    return without + guidance * (given - without)


@torch.no_grad()
def collect(pipe: DiffusionPipeline, model: Model, split: str, n: int, draw: int = 0) -> CalibrationSet:
    """Sample n images of a split and keep every denoiser call of their trajectories.

    draw: 0 for images 0 to n - 1; every further draw has other ones, from the next whole batch on.
    """
    first = draw * math.ceil(n / model.batch_size) * model.batch_size
    calls: list[dict] = []

    def record(_denoiser, args, kwargs, output):
        named = dict(zip(("sample", "timestep"), args, strict=False)) | kwargs
        conditioning = {k: v for k, v in named.items() if isinstance(v, Tensor) and k not in ("sample", "timestep")}
        prediction = output.sample if hasattr(output, "sample") else output[0]
        t = torch.as_tensor(named["timestep"]).reshape(-1)[0].expand(len(prediction))
        calls.append(dict(sample=named["sample"], timestep=t, target=prediction, **conditioning))

    kept: dict[str, list[Tensor]] = {}
    handle = pipe.unet.register_forward_hook(record, with_kwargs=True)
    try:
        for indices, _, _ in generate(pipe, model, split, n, first=first):
            for number, call in enumerate(calls):
                halves = len(call["sample"]) // model.batch_size  # 2 under guidance
                rows = torch.cat([torch.arange(len(indices)) + h * model.batch_size for h in range(halves)])
                for name, value in call.items():
                    kept.setdefault(name, []).append(value.cpu()[rows].clone())
                kept.setdefault("trajectory", []).append(torch.as_tensor(indices).repeat(halves))
                kept.setdefault("call", []).append(torch.full((len(rows),), number))
            calls.clear()
    finally:
        handle.remove()
    tensors = {k: torch.cat(v) for k, v in kept.items()}
    names = [f.name for f in fields(CalibrationSet) if f.name != "conditioning"]
    own = {k: tensors.pop(k) for k in names}
    own["timestep"] = own["timestep"].long()
    return CalibrationSet(**own, conditioning=tensors)


def static_rows(a: int) -> int:
    """How many calibration rows set an activation range that holds at all timesteps, by activation bits.

    Chosen on held-out trajectories (results/LOG.md): the search for the range of least error shrinks from the extremes,
    which grow with the number of rows, and 4 bits are too few for a range that holds them.
    """
    return 64 if a >= 8 else 8


@contextmanager
def calibrating(denoiser: nn.Module, choose: Callable) -> Iterator[None]:
    """While inside, a forward pass sets the range of each activation quantizer from its own (quantized) input.

    Softmax probabilities take [0, max] whatever is chosen for the others.
    """
    quantizers = input_quantizers(denoiser)
    for name, q in quantizers.items():
        q.choose = ranges.always_zero if name.endswith("processor.p") else choose
    try:
        yield
    finally:
        for q in quantizers.values():
            q.choose = None


def running(quantizer: str, momentum: float) -> ranges.Running:
    """Running averages as the range of the activation quantizer of this name; softmax probabilities keep [0, max]."""
    return ranges.Running(momentum, ranges.positive if quantizer.endswith("processor.p") else ranges.extremes)


@torch.no_grad()
def calibrate(
    denoiser: nn.Module,
    calibration: CalibrationSet,
    choose: Callable,
    *,
    samples: int,
    seed: int,
    momentum: float | None = None,
) -> None:
    """Set every activation range from one forward pass on `samples` random rows: of each time group, or of all rows.

    momentum: instead of `choose`, running averages of the whole ranges over all rows in batches of `samples`; they
    start at the first batch, which is met again (the released QuEST's running statistics, momentum 0.95).
    """
    groups = getattr(denoiser, "time_groups", None)
    groups_rows = groups.rows(calibration.timestep) if groups else [torch.arange(len(calibration))]
    generator = torch.Generator().manual_seed(seed)
    with calibrating(denoiser, choose):
        for rows in groups_rows:
            rows = rows[torch.randperm(len(rows), generator=generator)]
            if momentum is None:
                denoiser(**calibration.inputs(rows[:samples]))
                continue
            for name, q in input_quantizers(denoiser).items():
                q.choose = running(name, momentum)
            for batch in (rows[:samples], *rows.split(samples)):
                denoiser(**calibration.inputs(batch))


@torch.no_grad()
def eps_error(pipe: DiffusionPipeline, calibration: CalibrationSet) -> tuple[Tensor, list[int]]:
    """Relative squared error of the noise prediction, |e~ - e|^2 / |e|^2, on full-precision trajectories.

    Returns the errors, [trajectories, calls] (the two halves of a guided call are averaged), and each call's timestep.
    """
    trajectories = calibration.trajectory.cpu().unique()
    calls = int(calibration.call.max()) + 1
    errors, steps = torch.zeros(len(trajectories), calls), []
    for number in range(calls):
        rows = (calibration.call == number).nonzero().flatten()
        steps.append(int(calibration.timestep[rows[0]]))
        prediction = pipe.unet(**calibration.inputs(rows)).sample.cpu()
        target = calibration.target[rows].cpu()
        error = (prediction - target).square().flatten(1).sum(1) / target.square().flatten(1).sum(1)
        place = torch.searchsorted(trajectories, calibration.trajectory[rows].cpu())
        halves = len(rows) // len(trajectories)
        errors[:, number].index_add_(0, place, error / halves)
    return errors, steps


@torch.no_grad()
def activation_ranges(pipe: DiffusionPipeline, calibration: CalibrationSet, samples: int = 32) -> list[dict]:
    """Input range of the full-precision layers at every timestep, averaged over the layers of a class.

    Returns rows {layer_class, timestep, low, high, layers}.
    """
    seen: dict[str, list[tuple[float, float]]] = {}
    layers = {n: m for n, m in pipe.unet.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)}

    def record(name):
        return lambda _module, args: seen.setdefault(layer_class(name), []).append(
            (args[0].min().item(), args[0].max().item())
        )

    handles = [m.register_forward_pre_hook(record(n)) for n, m in layers.items()]
    rows = []
    try:
        for t in calibration.timesteps:
            seen.clear()
            at_t = (calibration.timestep == t).nonzero().flatten()
            pipe.unet(**calibration.inputs(at_t[:: max(1, len(at_t) // samples)]))
            for name, ranges in seen.items():
                low, high = torch.tensor(ranges, dtype=torch.float64).mean(0).tolist()
                rows.append(dict(layer_class=name, timestep=t, low=low, high=high, layers=len(ranges)))
    finally:
        for h in handles:
            h.remove()
    return rows

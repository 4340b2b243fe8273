"""Alignment of a quantized denoiser with full precision, one stage at a time: QuEST's training loop (arXiv:2402.03666).

A stage tunes some weights and activation scales so that chosen layers and the noise prediction agree with the
full-precision model (equations 4 to 6). Which stages there are, and of what, is said in baselines/quest.py.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from quest.diffusion.calibration_set import CalibrationSet
from quest.diffusion.denoisers import hooked
from quest.learning.adam import BETAS, half_cosine
from quest.learning.recomputing import recomputing
from quest.quantization.layers import QuantLayer
from quest.quantization.quantizer import Quantizer
from quest.quantization.ranges import EPS
from quest.quantization.timegroups import TimeGroups
from quest.runtime import memory

KEPT = 2**31  # bytes of the teacher's outputs that are kept rather than computed again


class Visit(NamedTuple):
    """A stretch of iterations on one time group: how many (None: all the group gets) of how many rows (None: all)."""

    iterations: int | None = None
    rows: int | None = None


@dataclass(frozen=True)
class Stage:
    """What is tuned together: layers, and scales of activation quantizers.

    The loss is the sum over the layers in `local` of the mean squared error of their output, plus global_weight times
    that of the noise prediction. A `visit` of None interleaves the time groups, see baselines.quest.SCHEDULES. Then
    `groups_per_step` time groups share the rows of an iteration, each in a pass of its own.
    """

    name: str
    layers: dict[str, QuantLayer]
    scales: list[Quantizer]
    local: tuple[str, ...]
    global_weight: float
    iterations: int
    batch: int
    visit: Visit | None
    lr_weight: float
    lr_scale: float
    groups_per_step: int = 1


def joint(tla: Stage, cma: Stage) -> Stage:
    """Both at once: L_TLA + L_CMA + 2 L_G (equation 7). Batch, visits and learning rates are those of the second."""
    return replace(
        cma,
        name="joint alignment",
        layers=tla.layers | cma.layers,
        scales=tla.scales + cma.scales,
        local=tla.local + cma.local,
        global_weight=tla.global_weight + cma.global_weight,
        iterations=tla.iterations + cma.iterations,
    )


def align(
    denoiser: nn.Module,
    stage: Stage,
    learned: dict[str, list[nn.Parameter]],
    targets: Callable[[Tensor], dict[str, Tensor]],
    calibration: CalibrationSet,
    *,
    groups: TimeGroups,
    log_scales: bool,
    cosine: bool,
    generator: torch.Generator,
) -> None:
    """Tune a stage, so that its layers and the noise prediction agree with the full-precision model.

    learned: the parameters to tune beside the scales, by layer, usually the weights and biases of the stage's layers.
    targets: what `teacher_outputs` gives for the layers with a local loss. groups: of timesteps, which iterations go
    through; static scales have a set for each, dynamic ones have one clip ratio for all. Where memory is short, blocks
    are computed again for their gradients, and gradients are summed over parts of the rows (`recomputing`). Raises
    FloatingPointError naming stage, iteration and layer if the loss is not finite.
    """
    weights = [p.requires_grad_() for parameters in learned.values() for p in parameters]
    adam = torch.optim.Adam(weights, lr=stage.lr_weight, fused=True)
    adam_scales = ScaleAdam([q.scale for q in stage.scales], log=log_scales)
    for scale in adam_scales.scales:
        scale.requires_grad_()
    sets = len(adam_scales.steps)
    turns = scheduled(groups, calibration, stage, generator)
    try:
        with (
            recomputing(denoiser, calibration.inputs(torch.arange(1, device="cpu")), stage.batch) as at_once,
            tqdm(range(stage.iterations), desc=stage.name, mininterval=5) as bar,
        ):
            for i in bar:
                adam.zero_grad()
                adam_scales.zero_grad()
                visited = []
                for rows, new_visit in islice(turns, stage.groups_per_step):
                    for part in rows.split(at_once):
                        local, whole = _losses(denoiser, stage, targets, calibration, part, i)
                        ((local + stage.global_weight * whole) * (len(part) / len(rows))).backward()
                    visited.append(groups.index(calibration.timestep[rows[:1]]).item() if sets > 1 else 0)
                    if new_visit:
                        adam_scales.restart(visited[-1])
                decay = half_cosine(i, stage.iterations) if cosine else 1.0
                adam.param_groups[0]["lr"] = stage.lr_weight * decay
                adam.step()
                for group in dict.fromkeys(visited):
                    adam_scales.step(group, stage.lr_scale * decay)
                bar.set_postfix(local=f"{local.item():.2e}", whole=f"{whole.item():.2e}", refresh=False)
    finally:
        denoiser.requires_grad_(False)


def _losses(denoiser, stage, targets, calibration, rows, iteration) -> tuple[Tensor, Tensor]:
    """The sum of the local losses on some rows, and the loss of the noise prediction."""
    wanted = targets(rows) if stage.local else {}
    # Looked at once: what a block gives when it is computed again would keep its whole graph in memory.
    with outputs_of(denoiser, stage.layers) as outputs:
        prediction = denoiser(**calibration.inputs(rows)).sample
    losses = [F.mse_loss(outputs[n], wanted[n].to(prediction.dtype)) for n in stage.local]
    local = sum(losses, start=prediction.new_zeros(()))
    whole = F.mse_loss(prediction, calibration.target[rows])
    loss = local + stage.global_weight * whole
    if not loss.isfinite():
        first = next((n for n in stage.layers if not outputs[n].isfinite().all()), "the prediction")
        raise FloatingPointError(
            f"{stage.name}, iteration {iteration}: the loss is {loss.item()}, not finite first in {first}; "
            "lower lr_weight or lr_scale"
        )
    return local, whole


def teacher_outputs(
    teacher: nn.Module, names: list[str], calibration: CalibrationSet, budget: int | None = None, batch: int = 64
) -> Callable[[Tensor], dict[str, Tensor]]:
    """A function that gives the outputs of the teacher's layers for some calibration rows, by name, in half precision.

    Values beyond its range keep single precision (`halved`). It looks outputs up where those of all rows take at most
    `budget` bytes (default: KEPT, or half of the memory of the job where that is less). Otherwise the teacher runs anew
    on these rows, and memory does not depend on the number of rows in the set. Both differ by the rounding of sums over
    a batch.
    """

    @torch.no_grad()
    def computed(rows: Tensor) -> dict[str, Tensor]:
        with outputs_of(teacher, names) as outputs:
            teacher(**calibration.inputs(rows))
        return {name: halved(output) for name, output in outputs.items()}

    if budget is None:
        budget = min(KEPT, int(memory.SHARE * memory.budget(calibration.sample.device.type)))
    first = computed(torch.arange(1, device="cpu")) if names else {}
    if len(calibration) * sum(output.nbytes for output in first.values()) > budget:
        return computed
    kept = {name: output.new_empty(len(calibration), *output.shape[1:]) for name, output in first.items()}
    if names:
        for rows in torch.arange(len(calibration), device="cpu").split(batch):
            for name, output in computed(rows).items():
                kept[name] = kept[name].to(torch.promote_types(kept[name].dtype, output.dtype))
                kept[name][rows] = output
            if sum(output.nbytes for output in kept.values()) > budget:
                return computed
    return lambda rows: {name: outputs[rows] for name, outputs in kept.items()}


def halved(x: Tensor) -> Tensor:
    """Round x to half precision, but leave values beyond its 65504 as they are; then the result is in x's precision."""
    half = x.half()
    beyond = half.isinf()
    return torch.where(beyond, x, half) if beyond.any() else half


@contextmanager
def outputs_of(denoiser: nn.Module, names: Iterable[str]) -> Iterator[dict[str, Tensor]]:
    """While inside, what these layers gave in the latest forward pass, by name."""
    outputs: dict[str, Tensor] = {}

    def keep(name: str, _layer: nn.Module, _arguments: tuple, output: Tensor) -> None:
        outputs[name] = output

    with hooked(denoiser.get_submodule(name).register_forward_hook(partial(keep, name)) for name in names):
        yield outputs


def scheduled(
    groups: TimeGroups, calibration: CalibrationSet, stage: Stage, generator: torch.Generator
) -> Iterator[tuple[Tensor, bool]]:
    """The calibration rows of every turn of a stage, all of one time group, and whether a visit begins with it.

    An iteration has `groups_per_step` turns. Interleaved, the groups come in random order, all of them before any
    again. With visits they come from the noisiest to the cleanest, as often as visits of that length fill the
    iterations, which are shared out evenly.
    """
    rows = groups.rows(calibration.timestep)

    def draw(rows: Tensor, n: int | None) -> Tensor:
        return rows[torch.randperm(len(rows), generator=generator, device="cpu")[:n]]

    if stage.visit is None:
        order: list[int] = []
        for _ in range(stage.iterations * stage.groups_per_step):
            order = order or torch.randperm(len(groups), generator=generator, device="cpu").tolist()
            yield draw(rows[order.pop(0)], stage.batch // stage.groups_per_step), False
        return
    each = stage.visit.iterations
    rounds = max(1, round(stage.iterations / len(groups) / each)) if each else 1
    visits = rounds * len(groups)
    for visit in range(visits):
        pool = draw(rows[visit % len(groups)], stage.visit.rows)
        batches: list[Tensor] = []
        for i in range(stage.iterations * visit // visits, stage.iterations * (visit + 1) // visits):
            batches = batches or list(draw(pool, None).split(stage.batch))
            yield batches.pop(0), i == stage.iterations * visit // visits


class ScaleAdam:
    """Adam on activation scales [T, ...], with moments and step count of its own for every time group.

    One Adam over scale [T] would go on moving idle groups by their stale momentum. log: on the logarithm of the scales,
    which keeps them positive; else on the scales themselves, which are then held above `least` (the released code lets
    them pass through zero). Without scales it does nothing.
    """

    def __init__(self, scales: list[Tensor], *, log: bool = True, least: float = EPS):
        self.scales, self.least = scales, least
        # The scales of a group side by side: one vector to move, whatever the number and the shapes of the quantizers.
        self.sizes = [s[0].numel() for s in self.scales]
        groups, device = (len(scales[0]), scales[0].device) if scales else (1, "cpu")
        self.steps = [0] * groups
        self.mean, self.square = torch.zeros(2, groups, sum(self.sizes), dtype=torch.float32, device=device)
        self.log = log
        self.eps = 1e-12 if log else 1e-8  # a relative gradient is small; 1e-8 is Adam's own

    def zero_grad(self) -> None:
        for s in self.scales:
            s.grad = None

    def restart(self, group: int) -> None:
        """Forget the moments of a group."""
        self.steps[group] = 0
        self.mean[group] = self.square[group] = 0

    @torch.no_grad()
    def step(self, group: int, lr: float) -> None:
        """Move the scales of one group by about lr: relative to each with `log`, else as it is."""
        if not self.scales:  # all layers of a stage have inputs in float
            return
        b1, b2 = BETAS
        self.steps[group] += 1
        n = self.steps[group]
        scale = torch.cat([s[group].flatten() for s in self.scales])
        # A scale without a gradient belongs to a quantizer that was not called; zeros leave it where it is.
        grad = torch.cat([(torch.zeros_like(s) if s.grad is None else s.grad)[group].flatten() for s in self.scales])
        if self.log:
            grad *= scale  # d loss / d log(scale)
        mean = self.mean[group].lerp_(grad, 1 - b1)
        square = self.square[group].lerp_(grad.square(), 1 - b2)
        move = lr * (mean / (1 - b1**n)) / ((square / (1 - b2**n)).sqrt_() + self.eps)
        scale = scale * torch.exp(-move) if self.log else (scale - move).clamp_(min=self.least)
        for s, moved in zip(self.scales, scale.split(self.sizes), strict=True):
            s[group] = moved.reshape(s.shape[1:])

"""QuEST: efficient selective finetuning of a quantized denoiser (Wang et al., arXiv:2402.03666).

Three steps, data-free, supervised by the full-precision model:
1. TAQuant: every activation quantizer gets one scale and zero point per time group.
2. Temporal layer alignment (L_TLA + L_G, equations 4 and 6): the projections of the time embedding, their weights and
   their activation scales.
3. Critical module alignment (L_CMA + L_G, equations 5 and 6): the attention-related weights and all remaining
   activation scales.
All other parameters stay frozen. Weight scales and every zero point stay fixed.
"""

import math
from collections.abc import Callable, Iterator
from fnmatch import fnmatch

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from quest import cost, ranges
from quest.calibration import CalibrationSet, calibrate
from quest.checkpoint import freeze, load_weights
from quest.layers import QuantLayer, input_quantizers, quant_layers, swap
from quest.quantizer import Quantizer
from quest.timegroups import TimeGroups, grouped

# The released code's choices, by diffusers' names. `emb_layers` of CompVis is time_emb_proj; time_embed is not tuned.
TEMPORAL = ("*.time_emb_proj",)
SELECTIONS = {
    "lsun": ("*.to_q", "*.to_k", "*.to_v"),
    "imagenet": ("*.ff.net.*", "*.to_q", "*.attn1.to_k", "*.attn1.to_v"),
    "sd": ("*.ff.net.*",),
}


def quantize(
    pipe,
    calibration: CalibrationSet,
    w: int,
    a: int,
    *,
    init: str | None = None,  # checkpoint whose weights to start from; default: nearest codes of the mse range
    time_groups: int | None = None,  # TAQuant's number of groups; default: one for each timestep of the calibration set
    selection: str | None = None,  # layers tuned in step 3, of SELECTIONS; default: by the kind of pipeline
    keep: dict[str, int] | None = None,  # layer glob -> bits kept at least; default: the first and last layer at 8
    softmax_bits: int = 8,
    samples: int = 32,  # random calibration rows per time group that set the activation ranges
    tla_iterations: int = 100,
    cma_iterations: int = 200,
    batch: int = 16,  # rows per iteration, all of one time group
    lr_weight: float = 1e-3,  # the paper's 1e-5 belongs to the released code's 22,000 iterations
    lr_scale: float = 1e-2,  # of the logarithm of the scale, so a step is relative to it
    global_weight: float | None = None,  # of L_G; default: the number of tuned layers, as in the released code
    seed: int = 0,
):
    """Quantize by QuEST. Returns a new pipeline.

    Departures from the paper, which names no iterations, batch or schedule: both learning rates fall to zero as a
    cosine; scales are tuned through their logarithm, by an Adam with a state of its own for every time group, so that
    they stay positive and idle groups do not move; timesteps are interleaved, one group per iteration. The paper's
    global_weight is 1; the released code adds L_G once for every tuned layer. The defaults were chosen on held-out
    trajectories (results/LOG.md).
    """
    selection = selection or default_selection(pipe)
    if selection not in SELECTIONS:
        raise ValueError(f"selection: {selection!r} is not one of {', '.join(SELECTIONS)}")
    timesteps = calibration.timesteps
    groups = TimeGroups(grouped(timesteps, time_groups or len(timesteps)))
    student = swap(pipe, w, a, keep=keep, softmax_bits=softmax_bits, groups=groups)
    denoiser = student.unet
    if init is None:
        for _, layer in quant_layers(denoiser):
            layer.choose_weight_range(ranges.mse)
    else:
        load_weights(denoiser, init)
    freeze(denoiser)
    calibrate(denoiser, calibration, ranges.mse, samples=samples, seed=seed)

    finetune(
        denoiser,
        pipe.unet,
        calibration,
        selection,
        tla_iterations=tla_iterations,
        cma_iterations=cma_iterations,
        batch=batch,
        lr_weight=lr_weight,
        lr_scale=lr_scale,
        global_weight=global_weight,
        seed=seed,
    )
    return student


def weights_and_biases(denoiser: nn.Module, tuned: dict[str, QuantLayer]) -> dict[str, list[nn.Parameter]]:
    """What a stage learns beside scales: the parameters of its tuned layers, by layer."""
    return {n: [p for p in (layer.weight, layer.bias) if p is not None] for n, layer in tuned.items()}


def finetune(
    denoiser: nn.Module,
    teacher: nn.Module,
    calibration: CalibrationSet,
    selection: str,
    *,
    tla_iterations: int,
    cma_iterations: int,
    batch: int,
    lr_weight: float,
    lr_scale: float,
    global_weight: float | None,
    seed: int,
    learn: Callable = weights_and_biases,
) -> None:
    """Both stages on a calibrated denoiser. learn(denoiser, tuned): the parameters that a stage learns, by layer."""
    layers = dict(quant_layers(denoiser))
    temporal = {n: m for n, m in layers.items() if matches(n, TEMPORAL)}
    critical = {n: m for n, m in layers.items() if matches(n, SELECTIONS[selection])}
    if not temporal or not critical:
        raise ValueError(f"selection {selection!r}: the denoiser has no such layers, or no time embedding projections")
    scales = list(input_quantizers(denoiser).values())
    temporal_scales = [m.input_quantizer for m in temporal.values()]
    critical_scales = [q for q in scales if not any(q is s for s in temporal_scales)]

    stages = (
        ("temporal layer alignment", temporal, temporal_scales, tla_iterations),
        ("critical module alignment", critical, critical_scales, cma_iterations),
    )
    aligned = [n for _, tuned, _, iterations in stages if iterations for n in tuned]
    targets = layer_outputs(teacher, aligned, calibration) if aligned else {}
    for name, tuned, tuned_scales, iterations in stages:
        align(
            name,
            denoiser,
            targets,
            calibration,
            tuned,
            tuned_scales,
            learn(denoiser, tuned),
            iterations=iterations,
            batch=batch,
            lr_weight=lr_weight,
            lr_scale=lr_scale,
            global_weight=len(tuned) if global_weight is None else global_weight,
            generator=torch.Generator().manual_seed(seed),
        )


def default_selection(pipe) -> str:
    """The set that the released code uses for this kind of model."""
    if getattr(pipe, "text_encoder", None) is not None:
        return "sd"
    return "imagenet" if getattr(pipe, "class_embedder", None) is not None else "lsun"


def matches(name: str, globs: tuple[str, ...]) -> bool:
    return any(fnmatch(name, g) for g in globs)


def align(
    stage: str,
    denoiser: nn.Module,
    targets: dict[str, Tensor],
    calibration: CalibrationSet,
    tuned: dict[str, QuantLayer],
    scales: list[Quantizer],
    learned: dict[str, list[nn.Parameter]],
    *,
    iterations: int,
    batch: int,
    lr_weight: float,
    lr_scale: float,
    global_weight: float,
    generator: torch.Generator,
) -> None:
    """One stage: tune the `learned` parameters and the `scales` so that the outputs of the `tuned` layers and the noise
    prediction agree with the full-precision model: sum over layers of the mean squared error of the output, plus
    global_weight times that of the prediction. targets: what `layer_outputs` found for the tuned layers.

    Raises FloatingPointError naming stage and iteration if the loss is not finite.
    """
    if not iterations:
        return
    # Frozen layers give no gradient to their weights and are not quantized again in every iteration.
    for name in learned:
        denoiser.get_submodule(name).thaw()
    weights = [p.requires_grad_() for parameters in learned.values() for p in parameters]
    for q in scales:
        q.scale.requires_grad_()
    adam = torch.optim.Adam(weights, lr=lr_weight, fused=True)
    adam_scales = ScaleAdam(scales)
    cost.record(denoiser, stage, [*weights, *adam_scales.scales], iterations, batch)

    outputs: dict[str, Tensor] = {}
    handles = [
        layer.register_forward_hook(lambda _m, _args, out, name=name: outputs.__setitem__(name, out))
        for name, layer in tuned.items()
    ]
    try:
        rows_of = interleaved(denoiser.time_groups, calibration, batch, generator)
        with tqdm(range(iterations), desc=stage, mininterval=5) as bar:
            for i in bar:
                rows = next(rows_of)
                prediction = denoiser(**calibration.inputs(rows)).sample
                local = sum(F.mse_loss(outputs[n], targets[n][rows].to(prediction.dtype)) for n in tuned)
                whole = F.mse_loss(prediction, calibration.target[rows])
                loss = local + global_weight * whole
                if not loss.isfinite():
                    raise FloatingPointError(
                        f"{stage}, iteration {i}: the loss is {loss.item()}; lower lr_weight or lr_scale"
                    )
                adam.zero_grad()
                adam_scales.zero_grad()
                loss.backward()
                decay = 0.5 * (1 + math.cos(math.pi * i / iterations))
                adam.param_groups[0]["lr"] = lr_weight * decay
                adam.step()
                adam_scales.step(denoiser.time_groups.current.item(), lr_scale * decay)
                bar.set_postfix(local=f"{local.item():.2e}", whole=f"{whole.item():.2e}", refresh=False)
    finally:
        for h in handles:
            h.remove()
        denoiser.requires_grad_(False)
        for name in learned:
            denoiser.get_submodule(name).freeze()


@torch.no_grad()
def layer_outputs(
    teacher: nn.Module, names: list[str], calibration: CalibrationSet, batch: int = 64
) -> dict[str, Tensor]:
    """Outputs of the teacher's layers for every calibration row, [N, ...], in half precision to save memory."""
    outputs: dict[str, Tensor] = {}
    rows: Tensor

    def keep(name: str, output: Tensor) -> None:
        if name not in outputs:
            outputs[name] = torch.empty(len(calibration), *output.shape[1:], dtype=torch.half, device=output.device)
        outputs[name][rows[0] : rows[-1] + 1] = output

    handles = [teacher.get_submodule(n).register_forward_hook(lambda _m, _args, out, n=n: keep(n, out)) for n in names]
    try:
        for rows in torch.arange(len(calibration)).split(batch):
            teacher(**calibration.inputs(rows))
    finally:
        for h in handles:
            h.remove()
    return outputs


def interleaved(
    groups: TimeGroups, calibration: CalibrationSet, batch: int, generator: torch.Generator
) -> Iterator[Tensor]:
    """Rows of one time group after another, without end: the groups in random order, all of them before any again."""
    group = groups.index(calibration.timestep)
    rows = [(group == g).nonzero().flatten() for g in range(len(groups))]
    while True:
        for g in torch.randperm(len(groups), generator=generator).tolist():
            yield rows[g][torch.randperm(len(rows[g]), generator=generator)[:batch]]


class ScaleAdam:
    """Adam on the logarithm of activation scales, with moments and step count of its own for every time group.

    One Adam over scale [T] would go on moving idle groups by their stale momentum.
    """

    def __init__(self, quantizers: list[Quantizer], betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-12):
        self.scales = [q.scale for q in quantizers]
        # The scales of a group side by side: one vector to move, whatever the number and the shapes of the quantizers.
        self.sizes = [s[0].numel() for s in self.scales]
        self.steps = [0] * len(self.scales[0])
        self.mean, self.square = torch.zeros(2, len(self.steps), sum(self.sizes), device=self.scales[0].device)
        self.betas, self.eps = betas, eps

    def zero_grad(self) -> None:
        for s in self.scales:
            s.grad = None

    @torch.no_grad()
    def step(self, group: int, lr: float) -> None:
        """Move the scales of one group by about lr, relative to each."""
        b1, b2 = self.betas
        self.steps[group] += 1
        n = self.steps[group]
        scale = torch.cat([s[group].flatten() for s in self.scales])
        # A scale without a gradient belongs to a quantizer that was not called; zeros leave it where it is.
        grad = torch.cat([(torch.zeros_like(s) if s.grad is None else s.grad)[group].flatten() for s in self.scales])
        grad *= scale  # d loss / d log(scale)
        mean = self.mean[group].lerp_(grad, 1 - b1)
        square = self.square[group].lerp_(grad.square(), 1 - b2)
        scale *= torch.exp(-lr * (mean / (1 - b1**n)) / ((square / (1 - b2**n)).sqrt_() + self.eps))
        for s, moved in zip(self.scales, scale.split(self.sizes), strict=True):
            s[group] = moved.reshape(s.shape[1:])

"""How uneven the inputs of layers are: most values are small, a few are large (QuEST, arXiv:2402.03666, section 3).

Statistics describe the input of a layer before quantization, separately for every sample: at 4 bits a quantizer has 16
codes for exactly these values.
"""

from collections.abc import Callable

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from quest.diffusion.calibration_set import CalibrationSet
from quest.diffusion.denoisers import denoiser_of, hooked
from quest.quantization.layer_names import layer_class
from quest.quantization.splitting import SplitConv2d, split_layers

STATISTICS = ("max / p99", "kurtosis", "standard deviation")
EDGES = torch.linspace(-20, 20, 161)  # of histograms, in standard deviations of full precision


def statistics(x: Tensor) -> Tensor:
    """The STATISTICS of every row of x [N, ...], as [N, 3].

    max / p99: the largest absolute value over the 99th percentile of absolute values. kurtosis: the fourth central
    moment over the square of the second, 3 for a normal distribution. Neither is finite for a constant row.
    """
    x = x.flatten(1).float()
    size = x.abs()
    percentile = size.kthvalue(max(1, round(0.99 * size.shape[1])), dim=1).values
    square = (x - x.mean(1, keepdim=True)).square()
    variance = square.mean(1)
    return torch.stack([size.amax(1) / percentile, square.square().mean(1) / variance.square(), variance.sqrt()], 1)


@torch.no_grad()
def visit_inputs(denoiser: nn.Module, evaluation: CalibrationSet, see: Callable[[str, Tensor, Tensor], None]) -> None:
    """Call see(layer, input, rows) for every input of a Linear or Conv2d, sampler call by sampler call.

    A convolution that is split in two is one layer with one input, as it is in full precision.
    """

    def hook(name):
        return lambda _module, args: see(name, args[0], rows)

    parts = tuple(f"{name}." for name in split_layers(denoiser))
    handles = [
        m.register_forward_pre_hook(hook(n))
        for n, m in denoiser.named_modules()
        if isinstance(m, nn.Linear | nn.Conv2d | SplitConv2d) and not n.startswith(parts)
    ]
    with hooked(handles):
        for call in evaluation.call.unique().tolist():
            rows = evaluation.rows_of_call(call)
            denoiser(**evaluation.inputs(rows))


def spreads(denoiser: nn.Module, evaluation: CalibrationSet) -> dict[str, float]:
    """Standard deviation of the input of each layer over all calls."""
    moments: dict[str, list[Tensor]] = {}

    def see(name, x, _rows):
        moments.setdefault(name, []).append(torch.stack([x.double().mean(), x.double().square().mean()]))

    visit_inputs(denoiser, evaluation, see)
    means = {name: torch.stack(of_calls).mean(0) for name, of_calls in moments.items()}
    return {name: (m[1] - m[0] ** 2).sqrt().item() for name, m in means.items()}


def distributions(denoiser: nn.Module, evaluation: CalibrationSet, scale: dict[str, float]) -> dict[str, dict]:
    """Statistics and histograms of the inputs of a denoiser's layers along held-out trajectories, by class of layers.

    scale: divisor of each layer's input in its histogram; the values of full precision, from `spreads`, make all
    denoisers of a model comparable. Returns for each class: "layers", their number; for each of STATISTICS the mean of
    its logarithm over layers, calls and halves, per trajectory; and "histogram", the share of values in each bin of
    EDGES (the outer bins include everything beyond them), with equal weight for each layer.
    """
    trajectories, place = evaluation.trajectory.unique(return_inverse=True)
    logs: dict[str, Tensor] = {}
    bins: dict[str, Tensor] = {}
    low, high = EDGES[0].item(), EDGES[-1].item()

    def see(name, x, rows):
        of_layer = logs.setdefault(name, torch.zeros(len(trajectories), len(STATISTICS) + 1, dtype=torch.float64))
        values = statistics(x).log().double()
        of_layer.index_add_(0, place[rows], torch.cat([values, torch.ones(len(values), 1)], 1))
        inside = (x.float() / scale[name]).clamp(low, high)
        bins[name] = bins.get(name, 0) + torch.histc(inside, len(EDGES) - 1, low, high).double() / x.numel()

    visit_inputs(denoiser, evaluation, see)
    by_class: dict[str, list[str]] = {}
    for name in logs:
        by_class.setdefault(layer_class(name), []).append(name)
    result = {}
    for name, names in by_class.items():
        mean = torch.stack([logs[n][:, :-1] / logs[n][:, -1:] for n in names]).mean(0)
        histogram = torch.stack([bins[n] / bins[n].sum() for n in names]).mean(0)
        of_class = {statistic: mean[:, i].tolist() for i, statistic in enumerate(STATISTICS)}
        result[name] = {"layers": len(names)} | of_class | {"histogram": histogram.tolist()}
    return result


def unknown(like: dict[str, dict]) -> dict[str, dict]:
    """What `distributions` returns for a denoiser that does not exist, because its method diverged: NaN everywhere."""
    return {
        name: {key: value if key == "layers" else [torch.nan] * len(value) for key, value in of_class.items()}
        for name, of_class in like.items()
    }


@torch.no_grad()
def activation_ranges(pipe: DiffusionPipeline, calibration: CalibrationSet, samples: int = 32) -> list[dict]:
    """Input range of the full-precision layers at every timestep, averaged over the layers of a class.

    Returns rows {layer_class, timestep, low, high, layers}.
    """
    seen: dict[str, list[tuple[float, float]]] = {}
    layers = {n: m for n, m in denoiser_of(pipe).named_modules() if isinstance(m, nn.Linear | nn.Conv2d)}

    def record(name):
        return lambda _module, args: seen.setdefault(layer_class(name), []).append(
            (args[0].min().item(), args[0].max().item())
        )

    rows = []
    with hooked(m.register_forward_pre_hook(record(n)) for n, m in layers.items()):
        for t in calibration.timesteps:
            seen.clear()
            at_t = (calibration.timestep == t).nonzero().flatten()
            denoiser_of(pipe)(**calibration.inputs(at_t[:: max(1, len(at_t) // samples)]))
            for name, ranges in seen.items():
                low, high = torch.tensor(ranges, dtype=torch.float64).mean(0).tolist()
                rows.append(dict(layer_class=name, timestep=t, low=low, high=high, layers=len(ranges)))
    return rows

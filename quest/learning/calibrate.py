"""Ranges of activations from calibration rows: one forward pass, or running averages over several."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from quest.diffusion.calibration_set import CalibrationSet
from quest.diffusion.denoisers import overridden
from quest.learning.units import Streamed, call_modules, chunk_rows, fill
from quest.quantization import ranges
from quest.quantization.attention import QuantAttention
from quest.quantization.layers import QuantLayer, input_quantizers
from quest.quantization.quantizer import Quantizer
from quest.runtime import memory


def static_rows(a: int) -> int:
    """How many calibration rows set an activation range that holds at all timesteps, by activation bits.

    Chosen on held-out trajectories (results/LOG.md): the search for the range of least error shrinks from the extremes,
    which grow with the number of rows, and 4 bits are too few for a range that holds them.
    """
    return 64 if a >= 8 else 8


@contextmanager
def choosing(choosers: dict[Quantizer, Callable]) -> Iterator[None]:
    """While inside, a forward pass sets the range of each of these quantizers from its own (quantized) input."""
    for q, choose in choosers.items():
        q.choose = choose
    try:
        yield
    finally:
        for q in choosers:
            q.choose = None


def calibrating(denoiser: nn.Module, choose: Callable) -> AbstractContextManager[None]:
    """`choosing` for all activation quantizers; softmax probabilities take [0, max], whatever the others choose."""
    quantizers = input_quantizers(denoiser)
    return choosing({q: ranges.always_zero if n.endswith("processor.p") else choose for n, q in quantizers.items()})


def running(quantizer: str, momentum: float) -> ranges.Running:
    """Running averages as the range of the activation quantizer of this name; softmax probabilities keep [0, max]."""
    return ranges.Running(momentum, ranges.positive if quantizer.endswith("processor.p") else ranges.extremes)


@torch.no_grad()
def observe(denoiser: nn.Module, inputs: dict[str, Tensor], chunk: int) -> None:
    """One forward pass on `inputs`, in which every quantizer that has a chooser sets its range from all rows.

    Beyond `chunk` rows, so many at a time run through each layer, on the denoiser's device. What waits lies on the CPU,
    in memory or in files (`quest.learning.units.Streamed`), and a layer's range is still that of all its rows. Sums
    over other chunks are rounded differently in their last bits.
    """
    n = len(inputs["timestep"])
    if n <= chunk:
        denoiser(**inputs)
        return
    waiting = memory.waiting(denoiser.device.type)
    waiting.chunk = chunk
    between = Streamed(n, denoiser.device, waiting)
    modules = [m for m in denoiser.modules() if isinstance(m, QuantLayer | QuantAttention)]
    in_chunks = overridden("forward", {m: partial(_in_chunks, m, m.forward, between) for m in modules})
    groups = getattr(denoiser, "time_groups", None)
    # `forward` and not a call of the denoiser, whose hooks are no operations on rows.
    with in_chunks, nullcontext() if groups is None else groups.inside(inputs["timestep"]), between:
        denoiser.forward(**tree_map(Tensor.cpu, inputs))


def _in_chunks(module: nn.Module, forward: Callable, between: Streamed, *args, **kwargs) -> Tensor:
    """The output of a quantized layer or of an attention's products, after its ranges are set from all rows."""
    n, rows = between.rows, torch.arange(between.rows, device="cpu")
    between.__exit__(None, None, None)
    quantizers = [q for q in module.children() if isinstance(q, Quantizer)]
    choosers = [q.choose for q in quantizers]
    try:
        if len(args[0]) % n or getattr(module, "output_quantizer", None) is not None:
            return forward(*args, **kwargs)  # it holds no rows, or its range is that of its output
        call = partial(call_modules, args=args, kwargs=kwargs, n=n, device=between.device)
        if isinstance(module, QuantAttention):
            observed = dict(zip((module.q, module.k, module.v), args, strict=False))
        elif module.prologue is None:
            observed = {module.input_quantizer: args[0]}
        else:
            prologue = partial(module.prologue, axis=module.channels)
            observed = {module.input_quantizer: fill(partial(call, [prologue]), rows, n, between.waiting)}
        for q, x in observed.items():
            if q.choose is not None:
                q.calibrate(x, q.choose)
                q.choose = None
        if isinstance(module, QuantAttention) and module.p.choose is not None:
            choose, module.p.choose, extremes = module.p.choose, None, []
            for part in rows.split(between.waiting.chunk):
                p = call([module.observed], part)
                extremes.append(torch.stack([p.amin(0), p.amax(0)]))
            # A range from zero to the maximum depends on nothing else, as for `observed_probabilities`.
            module.p.calibrate(torch.cat(extremes), choose)
        return fill(partial(call, [forward]), rows, n, between.waiting)
    finally:
        for q, choose in zip(quantizers, choosers, strict=True):
            q.choose = choose
        between.__enter__()


@torch.no_grad()
def calibrate(
    denoiser: nn.Module,
    calibration: CalibrationSet,
    choose: Callable,
    *,
    samples: int,
    seed: int,
    momentum: float | None = None,
    choosers: dict[str, Callable] | None = None,
) -> None:
    """Set every activation range from one forward pass on `samples` random rows: of each time group, or of all rows.

    Where so many rows do not fit into half of the memory, they go through each layer in chunks, see `observe`.

    choosers: what some quantizers, by name, use instead of `choose`.
    momentum: instead of both, running averages of the whole ranges over all rows in batches of `samples`; they
    start at the first batch, which is met again (the released QuEST's running statistics, momentum 0.95).
    """
    groups = getattr(denoiser, "time_groups", None)
    groups_rows = groups.rows(calibration.timestep) if groups else [torch.arange(len(calibration), device="cpu")]
    chunk = chunk_rows(denoiser, calibration.inputs(torch.arange(1, device="cpu")), samples)
    generator = torch.Generator().manual_seed(seed)
    with calibrating(denoiser, choose):
        for name, own in (choosers or {}).items():
            input_quantizers(denoiser)[name].choose = own
        for rows in groups_rows:
            rows = rows[torch.randperm(len(rows), generator=generator, device="cpu")]
            if momentum is None:
                observe(denoiser, calibration.inputs(rows[:samples]), chunk)
                continue
            for name, q in input_quantizers(denoiser).items():
                q.choose = running(name, momentum)
            for batch in (rows[:samples], *rows.split(samples)):
                observe(denoiser, calibration.inputs(batch), chunk)

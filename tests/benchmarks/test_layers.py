"""Layers of the shipped models (1 and 64 images) and six of Stable Diffusion v1.4 (1 image): every kernel, and fp32.

`pytest tests/benchmarks --benchmark-group-by=group --benchmark-columns=median,iqr,rounds`: compare within one run, on a
machine that does nothing else. One thread. `snakemake kernels` measures all layers and whole steps, in rounds.
"""

import pytest
import torch

from quest.benchmark import shapes
from quest.benchmark.single_layers import ATTENTION_KERNELS, SUITE_KERNELS, contenders
from quest.diffusion.models import MODELS


def layers():
    """(layer, batch) of each distinct layer."""
    seen = {}
    for name in shapes.ZOO:
        for layer in shapes.layers(MODELS[name]):
            seen.setdefault(layer._replace(count=0), (1, 64))
    for layer in shapes.layers(MODELS["sd14"]):
        if layer.name in shapes.FIRST:
            seen.setdefault(layer._replace(count=0), (1,))
    return [(layer, batch) for layer, batches in seen.items() for batch in batches]


@pytest.mark.parametrize("layer, batch", layers(), ids=lambda v: getattr(v, "name", v))
@pytest.mark.parametrize("how", ["fp32", *SUITE_KERNELS])
@pytest.mark.benchmark(max_time=0.3, min_rounds=3)  # seconds of each, or all take more than five minutes
def test_layer(benchmark, layer, batch, how):
    if layer.kind == "attention" and how not in ATTENTION_KERNELS:
        pytest.skip("attention has 8 bits")
    torch.set_num_threads(1)
    benchmark.group = f"{layer.name}, batch {batch}"
    (call,) = contenders(layer, batch, (how,)).values()
    if isinstance(call, str):
        pytest.skip(call)
    with torch.no_grad():
        benchmark(call)

import math

import pytest
import torch

from quest.properties.distributions import EDGES, STATISTICS, activation_ranges, distributions, spreads, statistics
from quest.quantization.splitting import concatenation_splits
from quest.quantization.swapping import swap


def test_statistics_of_known_distributions():
    x = torch.randn(2, 100_000, generator=torch.Generator().manual_seed(0))
    x[1] *= 5
    ratio, kurtosis, deviation = statistics(x).T
    assert kurtosis.tolist() == pytest.approx([3, 3], abs=0.1)
    assert deviation.tolist() == pytest.approx([1, 5], rel=0.01)
    assert ((ratio > 1.4) & (ratio < 2.2)).all()  # 4.3 standard deviations over 2.58
    x[0, 0] = 1000.0
    assert statistics(x)[0, 0] > 300 and statistics(x)[0, 1] > 1000


def test_distributions_are_those_of_the_inputs(uncond_pipe, uncond_calibration):
    scale = spreads(uncond_pipe.unet, uncond_calibration)
    assert scale["conv_in"] == pytest.approx(uncond_calibration.sample.std().item(), rel=0.02)
    found = distributions(uncond_pipe.unet, uncond_calibration, scale)
    for of_class in found.values():
        assert (
            math.isclose(sum(of_class["histogram"]), 1, rel_tol=1e-6) and len(of_class["histogram"]) == len(EDGES) - 1
        )
        assert {len(of_class[s]) for s in STATISTICS} == {4}
    # An input that is twice as wide: twice the standard deviation, the same shape.
    again = distributions(uncond_pipe.unet, uncond_calibration, {n: s / 2 for n, s in scale.items()})["boundary"]
    assert again["kurtosis"] == found["boundary"]["kurtosis"]
    middle = len(EDGES) // 2 - 4, len(EDGES) // 2 + 4
    assert sum(again["histogram"][slice(*middle)]) < sum(found["boundary"]["histogram"][slice(*middle)])


def test_a_split_shortcut_is_one_layer_with_one_input(uncond_pipe, uncond_calibration):
    splits = concatenation_splits(uncond_pipe.unet, uncond_calibration.inputs(torch.arange(1)))
    split = swap(uncond_pipe, 32, 32, splits=splits).unet
    scale = spreads(uncond_pipe.unet, uncond_calibration)
    assert splits and spreads(split, uncond_calibration) == pytest.approx(scale, rel=1e-4)


def test_activation_ranges(uncond_pipe, uncond_calibration):
    rows = activation_ranges(uncond_pipe, uncond_calibration)
    by_class = {r["layer_class"]: r for r in rows}
    assert {"time embedding", "boundary", "attention q, k, v"} <= by_class.keys()
    assert len(rows) == len(by_class) * len(uncond_calibration.timesteps)
    assert all(r["low"] < r["high"] and r["layers"] > 0 for r in rows)

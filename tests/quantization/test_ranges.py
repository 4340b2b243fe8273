"""Range choosers against what the released Q-Diffusion and QuEST quantizers compute (tests/golden/quantizers.npz)."""

from pathlib import Path

import numpy as np
import pytest
import torch

from quest.affine import QParams, QuantSpec, fake_quantize
from quest.quantization import ranges

GOLDEN = {k: torch.from_numpy(v) for k, v in np.load(Path(__file__).parents[1] / "golden" / "quantizers.npz").items()}
CHOOSERS = {
    "qdiffusion.weight.mse": (ranges.mse, dict(axis=0)),
    "qdiffusion.weight.max": (ranges.minmax, dict(axis=0)),
    "qdiffusion.act.max_sym": (ranges.minmax, dict(symmetric=True)),
    "qdiffusion.act.mse": (ranges.mse, dict()),
    "qdiffusion.softmax.always_zero": (ranges.always_zero, dict()),
    "quest.act.percentile": (ranges.percentile, dict()),
    "quest.act.max_sym": (ranges.minmax, dict(symmetric=True)),
    "quest.act.percentile_channel": (ranges.percentile, dict(axis=1)),
    "quest.act.max_sym_channel": (ranges.minmax, dict(symmetric=True, axis=1)),
}
CASES = sorted(k.removesuffix(".scale") for k in GOLDEN if k.endswith(".scale") and not k.startswith("quest.gradient"))


def test_every_golden_case_is_used():
    assert len(CASES) == 46 and all(c.rsplit(".", 2)[0] in CHOOSERS for c in CASES)


@pytest.mark.parametrize("case", CASES)
def test_released_quantizers(case):
    quantizer, bits, name = case.rsplit(".", 2)
    choose, spec = CHOOSERS[quantizer]
    if name == "a_tokens" and spec.get("axis") == 1:
        spec = dict(spec, axis=2)  # the released code's "channel" of a token tensor is its last dimension
    spec = QuantSpec(int(bits[1:]), **spec)
    x = GOLDEN[f"input.{name}"]
    scale, zero_point = choose(x, spec)
    torch.testing.assert_close(scale, GOLDEN[f"{case}.scale"], rtol=1e-5, atol=0)
    assert torch.equal(zero_point, GOLDEN[f"{case}.zero_point"])
    torch.testing.assert_close(
        fake_quantize(x, QParams(scale, zero_point, spec)), GOLDEN[f"{case}.dequantized"], rtol=1e-5, atol=1e-6
    )


def error(x, choose, spec, power=2.4):
    return (fake_quantize(x, QParams(*choose(x, spec), spec)) - x).abs().pow(power).flatten(1).mean(1)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("shape", [(7, 63), (5, 3, 3, 3)])
def test_mse_search_is_never_worse_than_the_whole_range(bits, shape):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(bits)) ** 3
    spec = QuantSpec(bits, axis=0)
    # The unshrunk range is among the candidates.
    assert (error(x, ranges.mse, spec) <= error(x, lambda x, s: ranges.mse(x, s, steps=1), spec) * (1 + 1e-6)).all()


def test_mse_search_per_channel_is_the_loop_over_channels():
    x = torch.randn(6, 40, generator=torch.Generator().manual_seed(0)) ** 3
    scale, zero_point = ranges.mse(x, QuantSpec(4, axis=0))
    for i, row in enumerate(x):
        s, z = ranges.mse(row, QuantSpec(4))
        assert torch.equal(s, scale[i, 0]) and torch.equal(z, zero_point[i, 0])


def test_the_published_zero_point_of_a_silu_hangs_on_its_largest_value():
    """Below 8.07 its zero point is 1, above it 0, and every negative output is lost; searched, it stays 1."""
    x = torch.nn.functional.silu(torch.cat([torch.linspace(-3, 0, 5000), torch.tensor([1.0, 2.0, 4.0, 7.5])]))
    larger = torch.cat([x, torch.tensor([8.5])])
    spec = QuantSpec(4)
    assert ranges.mse(x, spec)[1] == 1 and ranges.mse(larger, spec)[1] == 0
    assert ranges.mse_zero_point(x, spec)[1] == 1 and ranges.mse_zero_point(larger, spec)[1] == 1


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("kind", [{}, dict(symmetric=True)])
def test_searching_the_zero_point_is_never_worse(bits, kind):
    x = torch.randn(50, 63, generator=torch.Generator().manual_seed(bits)) ** 3
    spec = QuantSpec(bits, axis=0, **kind)
    searched, published = error(x, ranges.mse_zero_point, spec), error(x, ranges.mse, spec)
    assert (searched <= published * (1 + 1e-6)).all()
    assert torch.equal(searched, published) or (bits < 8 and not kind)
    assert (searched < 0.99 * published).any() or bits == 8 or kind


def test_mse_range_of_a_one_signed_tensor_is_not_widened_but_minmax_is():
    x = torch.linspace(5, 6, 101)
    scale, zero_point = ranges.mse(x, QuantSpec(4), steps=1)
    assert zero_point == -75 and torch.isclose(scale, torch.tensor(1 / 15))
    scale, zero_point = ranges.minmax(x, QuantSpec(4))
    assert zero_point == 0 and torch.isclose(scale, torch.tensor(6 / 15))


@pytest.mark.parametrize("bits", [4, 8])
def test_large_tensors_are_searched_by_histogram_as_well_as_value_by_value(bits, monkeypatch):
    x = torch.randn(2, 5 * ranges.BINS, generator=torch.Generator().manual_seed(0)) ** 3
    spec = QuantSpec(bits, axis=0)
    by_histogram = error(x, ranges.mse, spec)
    monkeypatch.setattr(ranges, "BINS", 2**30)
    by_value = error(x, ranges.mse, spec)
    assert (by_histogram <= by_value * 1.01).all()
    assert torch.equal(ranges.mse(x[0], QuantSpec(bits))[1], ranges.mse(x[:1], spec)[1].squeeze())


def test_zeros_give_a_finite_scale():
    for choose in (ranges.minmax, ranges.mse, ranges.mse_zero_point, ranges.percentile, ranges.always_zero):
        scale, zero_point = choose(torch.zeros(4, 8), QuantSpec(4, axis=0))
        assert (scale > 0).all() and zero_point.isfinite().all()

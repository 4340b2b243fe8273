"""AdaRound's arithmetic: golden alphas and weights, gradients, and the codes it ends at."""

from pathlib import Path

import numpy as np
import pytest
import torch

from quest.affine import quantize
from quest.learning.rounding import Rounding, beta

GOLDEN = {k: torch.from_numpy(v) for k, v in np.load(Path(__file__).parents[1] / "golden" / "quantizers.npz").items()}
ROUNDED = sorted(k.removesuffix(".alpha") for k in GOLDEN if k.endswith(".alpha"))


def generator():
    return torch.Generator().manual_seed(0)


@pytest.mark.parametrize("case", ROUNDED)
def test_adaround_starts_as_the_released_quantizer(layer_of, case):
    _, bits, name = case.split(".")
    q = layer_of(GOLDEN[f"input.{name}"], int(bits[1:]))
    rounding = Rounding([q])
    torch.testing.assert_close(unflatten(rounding.alpha, [q.weight])[0], GOLDEN[f"{case}.alpha"], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(rounding.soft[0].detach(), GOLDEN[f"{case}.soft"], rtol=1e-5, atol=1e-6)
    q.weight.data = rounding.folded()[0]
    torch.testing.assert_close(q.qweight.dequantize(), GOLDEN[f"{case}.hard"], rtol=1e-5, atol=1e-6)


def unflatten(flat, like):
    """The parts of a flat tensor whose values lie channels innermost, in the shapes of `like`."""
    parts = flat.split([w.numel() for w in like])
    return [part.view(w.movedim(1, -1).shape).movedim(-1, 1) for part, w in zip(parts, like, strict=True)]


def test_there_is_golden_data_for_each_layer_and_width():
    assert ROUNDED == [f"adaround.{bits}.{name}" for bits in ("w4", "w8") for name in ("w_conv", "w_linear")]


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_soft_weights_start_as_the_float_ones_and_hard_ones_as_the_nearest(layer_of, bits):
    q = layer_of(torch.randn(9, 40, generator=generator()), bits)
    scale, zero_point, spec = q.weight_quantizer.qparams
    low, high = (spec.qmin - zero_point) * scale, (spec.qmax - zero_point) * scale
    rounding = Rounding([q])
    inside = (q.weight >= low) & (q.weight <= high)
    assert (rounding.soft[0] - q.weight)[inside].abs().max() < 1e-5 and inside.float().mean() > 0.7
    nearest = q.qweight.codes
    folded = rounding.folded()[0]
    assert torch.equal(quantize(folded, q.weight_quantizer.qparams).codes, nearest)
    # The fold moves a weight by half a step at most, and keeps its place between two codes.
    assert ((folded - q.weight).abs() <= 0.5001 * scale).all()


@pytest.mark.parametrize("bits", [2, 4])
def test_folded_weights_round_to_the_learned_codes(layer_of, bits):
    """For any rounding, clipped weights and ties included."""
    g = generator()
    q = layer_of(torch.randn(9, 40, generator=g), bits)
    scale, zero_point, spec = q.weight_quantizer.qparams
    q.weight.data[:, ::5] = (torch.randint(-9, 9, (9, 8), generator=g) * scale).expand(9, 8)  # on a code: a tie
    rounding = Rounding([q])
    rounding.alpha.normal_(generator=g)
    up = (rounding.alpha >= 0).float().view_as(q.weight)
    learned = ((q.weight / scale).floor() + up + zero_point).clamp(spec.qmin, spec.qmax)
    assert torch.equal(quantize(rounding.folded()[0], q.weight_quantizer.qparams).codes, learned)
    assert not torch.equal(learned, q.qweight.codes)


@pytest.mark.parametrize("exponent", [None, 20.0, 2.0])
def test_gradient_of_the_soft_weights_is_that_of_automatic_differentiation(layer_of, exponent):
    """With the regulariser's along, which is a sum over all weights; it is off before the exponent is there."""
    g = generator()
    layers = [layer_of(torch.randn(6, 10, generator=g), 4), layer_of(torch.randn(3, 2, 3, 3, generator=g), 3)]
    rounding = Rounding(layers)
    rounding.alpha.normal_(generator=g).mul_(3)
    rounding.alpha[:4] = 0  # h = 1/2: the regulariser's slope is 0
    rounding.soften()
    upstream = torch.randn(rounding.alpha.shape, generator=g)
    automatic = rounding.alpha.clone().requires_grad_()
    soft = torch.cat([w.detach().movedim(1, -1).flatten() for w in rounding.soft])
    by_hand = rounding.gradient(unflatten(upstream, rounding.soft), exponent).clone()
    h = (torch.sigmoid(automatic) * 1.2 - 0.1).clamp(0, 1)
    weights = []
    for q, part in zip(layers, unflatten(h, [q.weight for q in layers]), strict=True):
        scale, zero_point, spec = q.weight_quantizer.qparams
        codes = ((q.weight / scale).floor() + part + zero_point).clamp(spec.qmin, spec.qmax)
        weights.append(((codes - zero_point) * scale).movedim(1, -1).flatten())
    weights = torch.cat(weights)
    regulariser = (1 - (2 * h - 1).abs().pow(exponent)).sum() if exponent else torch.zeros(())
    ((weights * upstream).sum() + 0.01 * regulariser).backward()
    torch.testing.assert_close(soft, weights, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(by_hand, automatic.grad, rtol=1e-4, atol=1e-6)


def test_the_exponent_falls_from_20_to_2_after_a_fifth():
    assert [beta(i, 1000) for i in (0, 199)] == [None, None]
    assert beta(200, 1000) == 20 and beta(600, 1000) == 11 and beta(1000, 1000) == 2
    assert beta(999, 1000) == pytest.approx(2, abs=0.03)

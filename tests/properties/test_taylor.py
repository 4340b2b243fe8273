import pytest
import torch

from quest.properties.taylor import expand, perturbed, remainders, taylor

A, B, C = torch.randn(3, 4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def test_the_second_order_step_of_a_quadratic_is_exact():
    start, slope, curvature = expand(lambda a: A + a * B + a * a * C)
    torch.testing.assert_close((start, slope, curvature), (A, B, 2 * C), rtol=1e-5, atol=1e-7)
    found = remainders(lambda a: A + a * B + a * a * C)
    assert found["second"].max() < 1e-6
    torch.testing.assert_close(found["first"], C.norm(dim=1) / (B + C).norm(dim=1), rtol=1e-6, atol=0)


def test_the_loss_of_a_linear_function_is_exact_in_one_step_and_that_of_a_cubic_gains_from_more():
    assert remainders(lambda a: A + a * B)["loss, 1 step"].max() < 1e-6
    cubic = remainders(lambda a: A + a * B + a**3 * C, steps=(1, 4, 64))
    assert cubic["loss, 4 steps"].mean() < cubic["loss, 1 step"].mean()
    assert cubic["loss, 64 steps"].max() < 0.01


def test_the_perturbation_begins_at_full_precision_and_shrinks_with_the_bits(uncond_pipe, uncond_calibration):
    rows = (uncond_calibration.call == 3).nonzero().flatten()
    inputs, target = uncond_calibration.inputs(rows), uncond_calibration.target[rows].double()
    moved = []
    for bits in (4, 8):
        with perturbed(uncond_pipe.unet, inputs, bits) as f:
            torch.testing.assert_close(f(0.0), target, rtol=1e-3, atol=1e-4)
            moved.append((f(1.0) - f(0.0)).norm())
    assert moved[0] > 8 * moved[1] > 0
    assert uncond_pipe.unet.dtype == torch.float32


def test_the_first_order_remainder_shrinks_with_the_bits(uncond_pipe, uncond_calibration):
    rows = taylor(uncond_pipe.unet, uncond_calibration, [3, 8], calls=1)
    found = {(row["bits"], row["what"]): sum(row["values"]) / len(row["values"]) for row in rows}
    assert len(rows[0]["values"]) == 4
    assert found[8, "first"] < 0.3 * found[3, "first"] and found[8, "loss"] < 0.1 * found[3, "loss"]
    assert found[8, "second"] < found[8, "first"] == pytest.approx(found[8, "first"])

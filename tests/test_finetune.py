"""QuEST's two stages on a tiny model: what moves, what does not, and that it helps."""

import pytest
import torch

import quest
from quest.affine import QuantSpec
from quest.calibration import eps_error
from quest.finetune import SELECTIONS, TEMPORAL, ScaleAdam, matches
from quest.layers import quant_layers
from quest.quantizer import Quantizer
from quest.timegroups import TimeGroups

FAST = dict(time_groups=3, batch=4, samples=8)


def run(pipe, calibration, tla, cma, **recipe):
    iterations = dict(tla_iterations=tla, cma_iterations=cma)
    return quest.quantize(pipe, "quest", "w4a4", calibration=calibration, **iterations, **(FAST | recipe))


def moved(a, b):
    """Names of tensors that differ between two pipelines' denoisers."""
    b = b.unet.state_dict()
    return {k for k, v in a.unet.state_dict().items() if not torch.equal(v, b[k])}


@pytest.mark.parametrize("kind, selection", [("uncond", "lsun"), ("class", "imagenet"), ("text", "sd")])
def test_each_stage_moves_its_own_parameters_and_nothing_else(kind, selection, request):
    pipe, calibration = request.getfixturevalue(f"{kind}_pipe"), request.getfixturevalue(f"{kind}_calibration")
    start, first, both = (run(pipe, calibration, tla, cma) for tla, cma in ((0, 0), (3, 0), (3, 3)))
    layers = [n for n, _ in quant_layers(start.unet)]
    temporal = {n for n in layers if matches(n, TEMPORAL)}
    critical = {n for n in layers if matches(n, SELECTIONS[selection])}
    assert temporal and critical and not temporal & critical

    changed = moved(start, first)
    allowed = {f"{n}.{p}" for n in temporal for p in ("weight", "bias", "input_quantizer.scale")}
    assert changed <= allowed and {f"{n}.weight" for n in temporal} <= changed
    assert {f"{n}.input_quantizer.scale" for n in temporal} <= changed

    changed = moved(first, both)
    scales = {k for k in start.unet.state_dict() if k.endswith("scale") and "weight_quantizer" not in k}
    scales -= {f"{n}.input_quantizer.scale" for n in temporal}
    allowed = {f"{n}.{p}" for n in critical for p in ("weight", "bias")} | scales
    assert changed <= allowed and {f"{n}.weight" for n in critical} <= changed
    # A group out of three is visited in each of the three iterations: every remaining scale has moved.
    assert scales <= changed


def test_finetuning_lowers_the_error_of_the_noise_prediction(class_pipe, class_model, class_calibration):
    from quest.calibration import collect

    held_out = collect(class_pipe, class_model, "validation", 4)
    recipe = dict(FAST, batch=8)
    before = quest.quantize(
        class_pipe, "quest", "w4a4", calibration=class_calibration, tla_iterations=0, cma_iterations=0, **recipe
    )
    after = quest.quantize(
        class_pipe, "quest", "w4a4", calibration=class_calibration, tla_iterations=15, cma_iterations=45, **recipe
    )
    a, b = (eps_error(q, held_out)[0].mean() for q in (before, after))
    assert b < 0.9 * a, (a, b)


def test_weight_scales_and_zero_points_stay(uncond_pipe, uncond_calibration):
    a = quest.quantize(
        uncond_pipe, "quest", "w4a4", calibration=uncond_calibration, tla_iterations=0, cma_iterations=0, **FAST
    )
    b = quest.quantize(
        uncond_pipe, "quest", "w4a4", calibration=uncond_calibration, tla_iterations=3, cma_iterations=3, **FAST
    )
    assert not {k for k in moved(a, b) if "zero_point" in k or "weight_quantizer" in k}


def test_idle_groups_do_not_move():
    groups = TimeGroups([800, 400, 0])
    quantizer = Quantizer(QuantSpec(4), groups=groups)
    quantizer.scale.data[:] = torch.tensor([1.0, 2.0, 3.0])
    quantizer.scale.requires_grad_()
    adam = ScaleAdam([quantizer])

    def step(group, gradient):
        quantizer.scale.grad = torch.zeros(3)
        quantizer.scale.grad[group] = gradient
        adam.step(group, 0.1)

    step(0, 1.0)
    moved = quantizer.scale.detach().clone()
    assert torch.allclose(moved, torch.tensor([2.718281828**-0.1, 2.0, 3.0]))  # the first Adam step is lr, relative
    for _ in range(5):
        step(1, -1.0)
    assert torch.equal(quantizer.scale[[0, 2]].detach(), moved[[0, 2]]) and quantizer.scale[1] > 2.0


def test_scales_move_as_by_one_adam_for_each_group_and_quantizer():
    groups = TimeGroups([800, 400])
    quantizers = [Quantizer(QuantSpec(4), groups=groups), Quantizer(QuantSpec(4, axis=1), (1, 3, 1), groups=groups)]
    g = torch.Generator().manual_seed(0)
    for q in quantizers:
        q.scale.data = torch.rand(q.scale.shape, generator=g) + 0.1
    logarithms = [[q.scale[i].log().requires_grad_() for q in quantizers] for i in range(2)]
    expected = [torch.optim.Adam(logs, lr=0.1, eps=1e-12) for logs in logarithms]
    adam = ScaleAdam(quantizers)
    for group in (0, 1, 1, 0, 1):
        for q, log in zip(quantizers, logarithms[group], strict=True):
            q.scale.grad = torch.zeros_like(q.scale)
            q.scale.grad[group] = torch.randn(q.scale.shape[1:], generator=g)
            log.grad = q.scale.grad[group] * q.scale.detach()[group]
        adam.step(group, 0.1)
        expected[group].step()
    for i in range(2):
        for q, log in zip(quantizers, logarithms[i], strict=True):
            torch.testing.assert_close(q.scale[i].detach(), log.detach().exp(), rtol=1e-5, atol=0)


def test_scales_stay_positive_under_large_steps():
    quantizer = Quantizer(QuantSpec(4))
    quantizer.scale.data.fill_(0.01)
    adam = ScaleAdam([quantizer])
    for _ in range(100):
        quantizer.scale.grad = torch.ones(1)
        adam.step(0, 0.5)
    assert (quantizer.scale > 0).all()


def test_divergence_names_stage_and_iteration(uncond_pipe, uncond_calibration):
    with pytest.raises(FloatingPointError, match="temporal layer alignment, iteration 1: the loss is nan"):
        quest.quantize(
            uncond_pipe,
            "quest",
            "w4a4",
            calibration=uncond_calibration,
            tla_iterations=3,
            lr_weight=float("inf"),
            **FAST,
        )


@pytest.mark.parametrize(
    "key, value, said", [("selection", "ldm", "lsun, imagenet, sd"), ("time_groups", 4, "valid: ")]
)
def test_bad_recipes(key, value, said, uncond_pipe, uncond_calibration):
    with pytest.raises(ValueError, match=f"{key}.*{said}"):
        quest.quantize(uncond_pipe, "quest", "w4a4", calibration=uncond_calibration, **{key: value})

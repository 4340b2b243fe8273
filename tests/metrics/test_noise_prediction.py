import copy

import pytest
import torch

import quest
from quest.diffusion.sampling import timesteps
from quest.metrics.noise_prediction import eps_error, eps_errors


@pytest.mark.parametrize("kind", ["uncond", "text"])
def test_eps_error(kind, request):
    pipe, model = request.getfixturevalue(f"{kind}_pipe"), request.getfixturevalue(f"{kind}_model")
    calibration = request.getfixturevalue(f"{kind}_calibration")
    errors, steps = eps_error(pipe, calibration)
    assert steps == timesteps(model, pipe) and errors.shape == (4, len(steps))
    assert errors.max() < 1e-6  # of itself

    class Half(torch.nn.Module):
        """Answers half of the full-precision prediction: a relative squared error of a quarter."""

        def forward(self, **inputs):
            out = pipe.unet(**inputs)
            out.sample = out.sample / 2
            return out

    wrong = copy.copy(pipe)
    wrong.__dict__["unet"] = Half()
    errors, _ = eps_error(wrong, calibration)
    torch.testing.assert_close(errors, torch.full_like(errors, 0.25), rtol=1e-4, atol=1e-5)


def test_the_guided_error_is_that_of_the_prediction_by_which_the_sampler_steps(
    class_pipe, class_model, class_calibration
):
    """For each trajectory and call |g~ - g|^2 / |g|^2 with g = e_u + s (e_c - e_u); the plain error stays as it was."""
    student = quest.quantize(class_pipe, "rtn", "w4a4", calibration=class_calibration)
    errors, guided, steps = eps_errors(student, class_calibration, class_model.guidance)
    plain, plain_steps = eps_error(student, class_calibration)
    assert torch.equal(errors, plain) and steps == plain_steps and guided.shape == errors.shape
    scale = class_model.guidance
    for place, trajectory in enumerate(class_calibration.trajectory.unique().tolist()):
        for call in range(len(steps)):
            rows = ((class_calibration.trajectory == trajectory) & (class_calibration.call == call)).nonzero().flatten()
            with torch.no_grad():
                found = student.unet(**class_calibration.inputs(rows)).sample
            combined = [e[0] + scale * (e[1] - e[0]) for e in (found, class_calibration.target[rows])]
            expected = (combined[0] - combined[1]).square().sum() / combined[1].square().sum()
            assert guided[place, call].item() == pytest.approx(expected.item(), rel=1e-3)
    assert (guided > 1.02 * errors).float().mean() > 0.5  # guidance makes more of the difference of the two halves


def test_a_model_without_guidance_has_no_guided_error(uncond_pipe, uncond_calibration, class_pipe, class_calibration):
    assert eps_errors(uncond_pipe, uncond_calibration, 1.0)[1] is None
    assert eps_errors(class_pipe, class_calibration, None)[1] is None

import pytest
import torch

from quest.diffusion.sampling import timesteps
from quest.metrics.noise_prediction import eps_error


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

    import copy

    wrong = copy.copy(pipe)
    wrong.__dict__["unet"] = Half()
    errors, _ = eps_error(wrong, calibration)
    torch.testing.assert_close(errors, torch.full_like(errors, 0.25), rtol=1e-4, atol=1e-5)

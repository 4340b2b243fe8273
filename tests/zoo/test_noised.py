import pytest
import torch

from quest.diffusion.sampling import timesteps
from quest.zoo.noised import noised


@pytest.mark.parametrize("kind", ["uncond", "text"])
def test_the_target_is_the_noise_that_was_added_to_one_latent(kind, request):
    pipe, model = request.getfixturevalue(f"{kind}_pipe"), request.getfixturevalue(f"{kind}_model")
    found = noised(pipe, model, "train", 2)
    steps, halves = timesteps(model, pipe), found.calls().shape[1]
    assert halves == (1 if kind == "uncond" else 2) and len(found) == len(steps) * halves * 2
    assert [int(found.timestep[found.call == c][0]) for c in range(len(steps))] == steps
    alpha = pipe.scheduler.alphas_cumprod[found.timestep].view(-1, 1, 1, 1)
    latent = (found.sample - (1 - alpha).sqrt() * found.target) / alpha.sqrt()
    for scene in range(2):
        own = latent[found.trajectory == scene]
        torch.testing.assert_close(own, own[:1].expand_as(own), rtol=1e-3, atol=1e-3)
    assert (latent[found.trajectory == 0][0] - latent[found.trajectory == 1][0]).abs().max() > 0.01
    assert found.target.std() == pytest.approx(1, abs=0.1)
    # The same noise for the same seed, and fresh noise in every call.
    assert torch.equal(noised(pipe, model, "train", 2).target, found.target)
    assert not torch.equal(found.target[found.call == 0], found.target[found.call == 1])
    second = noised(pipe, model, "train", 1, start=1)
    of_second = (second.sample - (1 - alpha[found.trajectory == 1]).sqrt() * second.target)[0]
    torch.testing.assert_close(
        of_second / alpha[found.trajectory == 1][0].sqrt(), latent[found.trajectory == 1][0], rtol=1e-3, atol=1e-3
    )
    if halves == 2:
        context = found.conditioning["encoder_hidden_states"][found.call == 0]
        assert torch.equal(context[0], context[1]) and not torch.equal(context[2], context[3])

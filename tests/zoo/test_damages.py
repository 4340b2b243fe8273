"""Damages are as strong as they say, and the sizes of steps are those of known values."""

import numpy as np
import pytest

from quest.zoo import damages


def test_noise_and_grain_have_their_standard_deviation_and_blur_keeps_the_mean():
    images = np.full((20, 32, 32, 3), 128, np.uint8)
    noise = damages.damaged(images, "noise", 8).astype(float) - 128
    grain = damages.damaged(images, "grain", 8).astype(float) - 128
    assert noise.std() == pytest.approx(8, rel=0.03) and grain.std() == pytest.approx(8, rel=0.05)
    blocks = grain.reshape(20, 16, 2, 16, 2, 3)
    assert (blocks == blocks[:, :, :1, :, :1, :1]).all() and (noise[..., 0] != noise[..., 1]).any()
    images[:, 16, 16] = 255
    blurred = damages.damaged(images, "blur", 1.5)
    assert blurred.max() < 255 and blurred.mean() == pytest.approx(images.mean(), abs=0.1)
    with pytest.raises(ValueError, match="damage: 'jpeg' is not one of noise, grain, blur"):
        damages.damaged(images, "jpeg", 50)


def test_a_step_is_its_mean_over_its_standard_deviation():
    rng = np.random.default_rng(0)
    first = rng.normal(size=1000)
    step = rng.normal(3, 0.5, size=1000)
    assert damages.steps([first, first + step])[0] == pytest.approx(3 / 0.5 / 2**0.5, rel=0.1)

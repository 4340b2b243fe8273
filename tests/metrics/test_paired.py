import numpy as np
import pytest

from quest.metrics.paired import latent_mse, psnr


@pytest.fixture
def images():
    return np.random.default_rng(0).integers(0, 256, size=(5, 16, 16, 3), dtype=np.uint8)


def test_psnr_of_a_known_difference(images):
    target = images.clip(0, 245)
    # Off by 10 everywhere: 20 log10(255 / 10).
    assert psnr(target + np.uint8(10), target) == pytest.approx(np.full(5, 20 * np.log10(25.5)))
    assert psnr(target, target + np.uint8(10)) == pytest.approx(np.full(5, 20 * np.log10(25.5)))


def test_psnr_equals_torchmetrics(images):
    torch = pytest.importorskip("torch")
    from torchmetrics.functional.image import peak_signal_noise_ratio

    other = np.random.default_rng(1).integers(0, 256, size=images.shape, dtype=np.uint8)
    for i, ours in enumerate(psnr(images, other)):
        a, b = (torch.from_numpy(x[i].astype(np.float64)) for x in (images, other))
        assert ours == pytest.approx(peak_signal_noise_ratio(a, b, data_range=255.0).item(), rel=1e-6)


def test_identical_images_have_the_largest_finite_ratio(images):
    one_level = images.copy()
    one_level[:, 0, 0, 0] ^= 1
    assert psnr(images, images) == pytest.approx(psnr(one_level, images))
    assert psnr(images, images)[0] == pytest.approx(10 * np.log10(255**2 * 16 * 16 * 3))
    one_level[:, 1, 1, 1] ^= 1
    assert (psnr(one_level, images) < psnr(images, images)).all()


def test_latent_mse_is_per_image():
    target = np.random.default_rng(0).normal(size=(3, 4, 8, 8)).astype(np.float32)
    offset = np.array([0.0, 0.5, 2.0], np.float32)[:, None, None, None]
    assert latent_mse(target + offset, target) == pytest.approx([0, 0.25, 4], rel=1e-5)


def test_bad_input(images):
    with pytest.raises(ValueError, match="uint8 images, got float64"):
        psnr(images.astype(float), images)
    with pytest.raises(ValueError, match=r"one shape, got \(5, 16, 16, 3\) and \(4, 16, 16, 3\)"):
        psnr(images, images[:4])
    with pytest.raises(ValueError, match="latents of the same seeds"):
        latent_mse(np.zeros((2, 3)), np.zeros((2, 4)))

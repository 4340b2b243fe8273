import numpy as np
import pytest

from quest.metrics.per_image import caption_first, clip_scores, latent_mse, psnr


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


def test_bad_images_and_latents(images):
    with pytest.raises(ValueError, match="uint8 images, got float64"):
        psnr(images.astype(float), images)
    with pytest.raises(ValueError, match=r"one shape, got \(5, 16, 16, 3\) and \(4, 16, 16, 3\)"):
        psnr(images, images[:4])
    with pytest.raises(ValueError, match="latents of the same seeds"):
        latent_mse(np.zeros((2, 3)), np.zeros((2, 4)))


def test_a_clip_score_is_a_hundred_cosines():
    image = np.array([[3.0, 4.0], [1.0, 0.0], [2.0, 0.0]])
    text = np.array([[4.0, 3.0], [0.0, 5.0], [-1.0, 0.0]])
    assert clip_scores(image, text) == pytest.approx([96, 0, -100])


def test_clip_scores_equal_torchmetrics():
    torch = pytest.importorskip("torch")
    from torchmetrics.functional.multimodal.clip_score import _clip_score_update

    image, text = np.random.default_rng(0).normal(size=(2, 20, 16))

    class Given(torch.nn.Module):
        """Stands for a CLIP model and its processor: the embeddings are given."""

        config = None

        def forward(self, text=None, **_):
            return {
                "pixel_values": torch.from_numpy(image),
                "input_ids": torch.tensor(0),
                "attention_mask": torch.tensor(0),
            }

        def get_image_features(self, pixels):
            return pixels

        def get_text_features(self, ids, mask):
            return torch.from_numpy(text)

    theirs, _ = _clip_score_update([torch.zeros(3, 2, 2)] * 20, ["caption"] * 20, Given(), Given())
    assert clip_scores(image, text) == pytest.approx(theirs.numpy(), rel=1e-9)


BLOCKS = [0] * 10 + [10] * 5 + [15] * 10  # first caption of the block that judges each of 25 images, last block first


def test_the_right_caption_is_ranked_among_those_of_its_block():
    text = np.random.default_rng(0).normal(size=(25, 64))
    text /= np.linalg.norm(text, axis=1, keepdims=True)
    image = text.copy()
    image[[3, 24]] = text[[4, 16]]  # images that show another caption of their block, which for the last is 15 to 24
    image[5] = text[12]  # another caption of another block
    text[7] = text[8] = (text[7] + text[8]) / 2  # equal captions
    right = caption_first(image, text, among=10)
    expected = [
        text[i] @ image[i] >= (text[s : s + 10] @ image[i]).max() - 1e-9 for i, s in zip(range(25), BLOCKS, strict=True)
    ]
    assert right.tolist() == expected
    assert not right[[3, 24]].any() and right[[7, 8, 0, 20]].all()
    with pytest.raises(ValueError, match="N of at least 100"):
        caption_first(image, text)


def test_bad_embeddings():
    with pytest.raises(ValueError, match=r"\(3, 4\) and \(2, 4\)"):
        clip_scores(np.zeros((3, 4)), np.zeros((2, 4)))

import numpy as np
import pytest

from quest.metrics.clip_score import clip_scores


def test_is_a_hundred_cosines():
    image = np.array([[3.0, 4.0], [1.0, 0.0], [2.0, 0.0]])
    text = np.array([[4.0, 3.0], [0.0, 5.0], [-1.0, 0.0]])
    assert clip_scores(image, text) == pytest.approx([96, 0, -100])


def test_equals_torchmetrics():
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


def test_bad_input():
    with pytest.raises(ValueError, match=r"\(3, 4\) and \(2, 4\)"):
        clip_scores(np.zeros((3, 4)), np.zeros((2, 4)))

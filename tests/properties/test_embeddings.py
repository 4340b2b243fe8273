import pytest
import torch

from quest.properties.embeddings import PATH, embeddings, moved
from quest.properties.sensitivity import lowered, parts


def test_equal_embeddings_have_not_moved():
    exact = torch.tensor([[0.0, 0.0], [3.0, 4.0], [3.0, 5.0]])
    found = moved(exact, exact.clone())
    assert found["error"].tolist() == [0, 0, 0] and found["nearest"].tolist() == [0, 1, 2]
    assert found["apart"].tolist() == found["apart_quantized"].tolist() == [5, 1, 1]


def test_an_embedding_that_moves_past_its_neighbour_is_taken_for_it():
    exact = torch.tensor([[0.0], [1.0], [2.0]])
    found = moved(exact, torch.tensor([[0.0], [1.9], [2.0]]))
    assert found["nearest"].tolist() == [0, 2, 2]
    assert found["error"].tolist() == pytest.approx([0, 0.9, 0])


def test_embeddings_depend_on_the_timestep_alone_and_move_when_quantized(class_pipe, class_calibration):
    exact = embeddings(class_pipe.unet, class_calibration)
    blocks = [m for n, m in class_pipe.unet.named_modules() if n.endswith("time_emb_proj")]
    assert exact.shape == (len(class_calibration.timesteps), sum(m.out_features for m in blocks))
    torch.testing.assert_close(exact, embeddings(class_pipe.unet, class_calibration.subset(torch.arange(47, -1, -1))))
    path = parts(class_pipe.unet)[PATH]
    coarse, fine = (
        moved(exact, embeddings(lowered(class_pipe, class_calibration, path, b, b).unet, class_calibration))["error"]
        for b in (4, 8)
    )
    assert (coarse > 3 * fine).all() and (fine > 0).all()

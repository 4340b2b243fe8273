"""EfficientNet-Lite0: the published weights, the right preprocessing, and whitened components."""

import numpy as np
import pytest
import torch

from quest.metrics import lite0
from quest.metrics.per_image import squared_distances


def test_every_weight_is_there_and_the_numbers_are_those_of_the_original_network():
    # What the package efficientnet-lite-pytorch 0.1.0 computes of this picture with the same weights.
    ramp = torch.arange(3 * 64 * 64).reshape(1, 3, 64, 64).remainder(251).to(torch.uint8)
    said = lite0.outputs(ramp)
    assert said["features"].shape == (1, 1280) and said["spatial"].shape == (1, 112)
    assert said["logits"].argmax().item() == 905
    assert said["features"][0, [113, 109, 79, 576, 897, 510]].tolist() == pytest.approx(
        [5.84145, 5.07015, 4.57162, 4.51074, 4.46325, 4.46257], abs=1e-4
    )


@torch.no_grad()
def test_maps_have_the_distance_of_unit_vectors_at_each_depth():
    pictures = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    seen = {}
    hooks = [
        block.register_forward_hook(lambda _, __, x, i=i: seen.update({i: x}))
        for i, block in enumerate(lite0.network().blocks)
    ]
    maps = lite0.outputs(pictures)["maps"].numpy()
    for hook in hooks:
        hook.remove()
    expected = 0
    for i, grid in lite0.GRIDS.items():
        unit = seen[i] / seen[i].norm(dim=1, keepdim=True)  # [2, C, S, S]
        side = unit.shape[2] // grid
        blocks = unit.unflatten(3, (grid, side)).unflatten(2, (grid, side)).mean((3, 5))  # [2, C, grid, grid]
        expected += (blocks[0] - blocks[1]).square().sum(0).mean().item()
    assert squared_distances(maps[:1], maps[1:])[0] == pytest.approx(expected, rel=1e-2)
    assert squared_distances(maps, maps).tolist() == [0, 0]


def test_other_weights_are_refused(monkeypatch):
    monkeypatch.setattr(lite0, "SHA256", "0" * 64)
    with pytest.raises(ValueError, match="not the weights of EfficientNet-Lite0"):
        lite0.network.__wrapped__()


def test_whitened_components_have_unit_variance_where_they_were_fitted(tmp_path):
    rng = np.random.default_rng(0)
    features = rng.normal(size=(500, 20)) @ rng.normal(size=(20, 20)) + 3
    whitening = lite0.Whitening.fit(features, 5)
    z = whitening(features)
    assert np.allclose(np.cov(z.T), np.eye(5), atol=1e-3) and np.abs(z.mean(0)).max() < 1e-3
    whitening.save(tmp_path / "whitening.safetensors")
    assert np.allclose(lite0.Whitening.load(tmp_path / "whitening.safetensors")(features), z, atol=0.05)
    with pytest.raises(ValueError, match="need more pictures"):
        lite0.Whitening.fit(features[:5], 5)

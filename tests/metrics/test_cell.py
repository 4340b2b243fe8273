"""The files of a cell's shards, joined."""

import json

import numpy as np
import pytest

from quest.metrics import Cell
from quest.runtime import files


def draw_cell(n=30):
    rng = np.random.default_rng(0)
    return Cell(
        index=np.arange(n),
        features={name: rng.normal(size=(n, 12)).astype(np.float32) for name in ("pool", "spatial", "logits")},
        images=rng.integers(0, 256, (n, 8, 8, 3), np.uint8),
        latents=rng.normal(size=(n, 3, 4, 4)).astype(np.float32),
        eps_error=rng.random((16, 5)),
        guided_eps_error=rng.random((16, 5)),
        timesteps=np.array([901, 601, 601, 301, 1]),
    )


def write_shards(folder, cell, parts, **told):
    """Shards of a cell as sampling writes them, in the order of `parts` (lists of image places).

    told: further metadata of the samples.
    """
    features, samples = [], []
    for shard, part in enumerate(parts):
        names = ("eps_error", "guided_eps_error", "timesteps")
        errors = {name: getattr(cell, name) for name in names} if shard == 0 else {}
        metadata = json.dumps({"provenance": {"commit": f"c{shard}"}} | told)
        features.append(folder / f"features-{shard}.npz")
        np.savez(features[-1], index=cell.index[part], **{k: v[part] for k, v in cell.features.items()}, **errors)
        samples.append(folder / f"samples-{shard}.npz")
        np.savez(
            samples[-1], index=cell.index[part], images=cell.images[part], latents=cell.latents[part], metadata=metadata
        )
    return features, samples


@pytest.mark.parametrize("large", [files.LARGE, 0])  # 0: arrays lie in files
def test_shards_join_in_any_order(large, tmp_path, monkeypatch):
    monkeypatch.setattr(files, "LARGE", large)
    cell = draw_cell()
    features, samples = write_shards(tmp_path, cell, [np.arange(20, 30), np.arange(20)])
    for loaded in (Cell.load(features, samples), Cell.load(features[::-1], samples)):
        assert np.array_equal(loaded.index, cell.index) and np.array_equal(loaded.images, cell.images)
        assert np.array_equal(loaded.latents, cell.latents) and np.array_equal(loaded.eps_error, cell.eps_error)
        assert np.array_equal(loaded.guided_eps_error, cell.guided_eps_error)
        assert sorted(shard["commit"] for shard in loaded.sampled) == ["c0", "c1"]
        assert all(np.array_equal(loaded.features[name], cell.features[name]) for name in cell.features)


def test_some_images_of_a_cell():
    cell = draw_cell()
    part = cell.only(np.array([3, 7]))
    assert part.index.tolist() == [3, 7] and np.array_equal(part.latents, cell.latents[[3, 7]])
    assert all(np.array_equal(part.features[name], cell.features[name][[3, 7]]) for name in cell.features)
    assert np.array_equal(part.eps_error, cell.eps_error)
    with pytest.raises(ValueError, match="image 30 is not there; there are 0 to 29"):
        cell.only(np.array([29, 30]))


def test_bad_shards_name_the_file(tmp_path):
    cell = draw_cell()
    features, samples = write_shards(tmp_path, cell, [np.arange(20), np.arange(10, 30)])
    with pytest.raises(ValueError, match="features-0.npz.*image 10 occurs more than once"):
        Cell.load(features, samples)
    with pytest.raises(ValueError, match="samples-1.npz and .*features-0.npz: .*different images"):
        Cell.load(features[:1], samples[1:])
    with pytest.raises(ValueError, match="samples-0.npz: lacks pool, spatial, logits"):
        Cell.load(samples, samples)
    whole = features[0].read_bytes()
    place = whole.index(cell.features["pool"][:20].tobytes())
    features[0].write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
    with pytest.raises(ValueError, match="features-0.npz: not an .npz file of arrays, or corrupted: Bad CRC-32"):
        Cell.load(features, samples)
    (tmp_path / "features-0.npz").write_bytes(b"")
    with pytest.raises(ValueError, match="features-0.npz: not an .npz file"):
        Cell.load(features, samples)
    np.savez(features[0], index=np.arange(3), pool=np.zeros((2, 4)), spatial=np.zeros((3, 4)), logits=np.zeros((3, 4)))
    with pytest.raises(ValueError, match="features-0.npz: pool has 2 rows for 3 images"):
        Cell.load(features, samples)


def test_features_alone_and_a_method_that_diverged(tmp_path):
    cell = draw_cell()
    features, samples = write_shards(tmp_path, cell, [np.arange(15), np.arange(15, 30)], diverged="the loss is nan")
    loaded = Cell.load(features, samples)
    assert loaded.diverged == "the loss is nan" and loaded.footprint == {}
    for path, part in zip(samples, (np.arange(15), np.arange(15, 30)), strict=True):
        np.savez(path, index=cell.index[part])
    loaded = Cell.load(features, samples)
    assert loaded.images is None and loaded.latents is None and not loaded.diverged

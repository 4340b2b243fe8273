"""Scenes: the same for everyone, disjoint between splits, and drawn as their captions say."""

import hashlib

import numpy as np
import pytest

from quest.diffusion import scenes

CAPTIONS = "76f5b12204637cb558552a4388406d5580700000bbe0268fee8ae503913e038e"
MEAN = 136.3842


def test_scene_does_not_depend_on_how_many_are_drawn():
    many = scenes.draw("train", 600)
    few = scenes.draw("train", 10, start=250)  # across the edge of a chunk
    assert few.captions() == many.captions()[250:260]
    assert np.array_equal(few.images(), many[250:260].images())
    assert not np.array_equal(scenes.draw("evaluation", 10).images(), many[:10].images())


def test_scenes_stay_what_the_models_were_trained_on():
    captions = "\n".join(scenes.draw("train", 1000).captions())
    assert hashlib.sha256(captions.encode()).hexdigest() == CAPTIONS
    # Rendered values may round differently on another machine, by one step.
    assert scenes.draw("train", 50).images().mean() == pytest.approx(MEAN, abs=0.01)


def test_splits_share_no_caption():
    captions = {split: set(scenes.draw(split, 3000).captions()) for split in scenes.SPLITS}
    for split, own in captions.items():
        others = set().union(*(c for name, c in captions.items() if name != split))
        assert not own & others


def test_caption_names_the_label():
    drawn = scenes.draw("calibration", 300)
    for caption, label in zip(drawn.captions(), drawn.labels(), strict=True):
        main = caption.split(" at the ")[0]
        for relation in scenes.RELATIONS:
            main = main.split(f" {relation} a ")[0]
        assert main.endswith(scenes.CLASSES[label])
    assert set(scenes.draw("evaluation", 1000).labels()) == set(range(48))


def test_colours_and_places_are_drawn_as_told():
    drawn = scenes.draw("validation", 2000)
    red_left = [
        i
        for i in np.flatnonzero(~drawn.pair & (drawn.colour[:, 0] == scenes.COLOURS.index("red")))
        if scenes.POSITIONS[drawn.position[i]] == "left" and scenes.BACKGROUNDS[drawn.background[i]] != "sand"
    ]
    assert red_left
    for image in drawn[red_left].images().astype(float):
        redness = image[..., 0] - image[..., 2]
        assert redness[:, :32].max() > 80 > redness[:, 48:].max()


def test_background_is_smooth_and_images_are_not_clipped_flat():
    images = scenes.draw("train", 64).images()
    assert images.shape == (64, 64, 64, 3) and images.dtype == np.uint8
    assert all(len(np.unique(image.reshape(-1, 3), axis=0)) > 100 for image in images)


def test_bad_requests():
    with pytest.raises(ValueError, match="no split 'test'; there are train"):
        scenes.draw("test", 1)
    with pytest.raises(ValueError, match="negative"):
        scenes.draw("train", 3, start=-1)
    assert len(scenes.draw("train", 0)) == 0

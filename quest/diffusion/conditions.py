"""Labels and captions of the models that are shipped or published, image by image. No torch."""

from collections.abc import Sequence


def scene_labels(split: str, start: int, stop: int) -> Sequence[int]:
    from quest.diffusion.scenes import draw

    return draw(split, stop - start, start=start).labels()


def scene_captions(split: str, start: int, stop: int) -> Sequence[str]:
    from quest.diffusion.scenes import draw

    return draw(split, stop - start, start=start).captions()


def photo_labels(split: str, start: int, stop: int) -> Sequence[int]:
    """Image i has class i mod 10 of CIFAR-10."""
    return [index % 10 for index in range(start, stop)]


def imagenet_labels(split: str, start: int, stop: int) -> Sequence[int]:
    """Image i has class (309 i) mod 1000: 50,000 images contain each class 50 times, and a few images spread widely.

    The released code of QuEST calibrates on classes 0 to 25 only: it takes the first 256 images, sorted by class.
    """
    return [309 * index % 1000 for index in range(start, stop)]

"""Labels and captions of the models that are shipped or published, image by image. No torch."""

import math
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


def spread_labels(classes: int, _split: str, start: int, stop: int) -> Sequence[int]:
    """Image i has class (309 i) mod `classes`: every class occurs as often, and a few images spread widely.

    Of ImageNet's 1,000 classes 50,000 images contain each 50 times. The released code of QuEST calibrates on classes 0
    to 25 only: it takes the first 256 images, sorted by class.
    """
    step = 309 if math.gcd(309, classes) == 1 else 1
    return [step * index % classes for index in range(start, stop)]

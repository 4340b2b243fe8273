"""Labels and captions of the models that are shipped or published, image by image. No torch."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from quest.runtime.files import read_lines


def scene_labels(split: str, start: int, stop: int) -> Sequence[int]:
    from quest.diffusion.scenes import draw

    return draw(split, stop - start, start=start).labels()


def scene_captions(split: str, start: int, stop: int) -> Sequence[str]:
    from quest.diffusion.scenes import draw

    return draw(split, stop - start, start=start).captions()


def photo_labels(split: str, start: int, stop: int) -> Sequence[int]:
    """Image i has class i mod 10 of CIFAR-10."""
    return [index % 10 for index in range(start, stop)]


def file_captions(file: Path, lines: Mapping[str, tuple[int, int]], split: str, start: int, stop: int) -> Sequence[str]:
    """Captions of images start .. stop - 1 of a split, fewer if there are no more.

    `lines` has the first line of a split in the file, and the line after its last; other splits have none.
    """
    first, end = lines.get(split, (0, 0))
    return read_lines(file)[min(first + start, end) : min(first + stop, end)]


def spread_labels(classes: int, _split: str, start: int, stop: int) -> Sequence[int]:
    """Image i has class (309 i) mod `classes`: every class occurs as often, and a few images spread widely.

    Of ImageNet's 1,000 classes 50,000 images contain each 50 times. The released code of QuEST calibrates on classes 0
    to 25 only: it takes the first 256 images, sorted by class.
    """
    step = 309 if math.gcd(309, classes) == 1 else 1
    return [step * index % classes for index in range(start, stop)]

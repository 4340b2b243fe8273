"""Photographs and emoji: pictures with labels or captions, and their splits. No picture ships with the suite.

A data file is an .npz with the encoded pictures one after another (`data`, uint8; `offsets`, int64 [N + 1]) and their
descriptions: `labels` and `classes` of photographs, `name` and `style` of emoji.

Emoji are split by concept: all drawings whose name is the same apart from words for skin tone, hair or sex. 5 % of the
concepts are held out in all styles; of the other concepts with three styles or more, 10 % of the (concept, style) pairs
are held out. Photographs have no duplicates and are split at random.
"""

import io
import re
import zlib
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image

from quest.runtime.files import read_arrays

SPLITS = ("train", "reference", "evaluation")
REFERENCE, EVALUATION = 5000, 1000  # held-out photographs for reference statistics, and for the floors of metrics
TONES = ("medium light", "medium dark", "light", "medium", "dark")
NOT_A_CONCEPT = {
    *("light", "medium", "dark", "skin", "tone", "default", "hair"),
    *("man", "woman", "men", "women", "person", "people", "male", "female"),
}


@dataclass
class Pictures:
    """Pictures of one kind. `split[i]` is one of SPLITS; for emoji, `held_out[i]` is "", "style" or "concept"."""

    images: np.ndarray  # uint8 [N, S, S, 3]
    split: np.ndarray  # str [N]
    labels: np.ndarray | None = None  # int64 [N]
    classes: tuple[str, ...] = ()
    captions: list[str] = field(default_factory=list)
    concepts: list[str] = field(default_factory=list)
    held_out: np.ndarray | None = None  # str [N]

    def rows(self, split):
        """Indices of the pictures of a split, ascending. Raises ValueError for an unknown split."""
        if split not in SPLITS:
            raise ValueError(f"split: {split!r} is not one of {', '.join(SPLITS)}")
        return np.flatnonzero(self.split == split)


def decode(path, *columns):
    """All pictures of a data file, uint8 [N, S, S, 3], followed by the named columns.

    Raises ValueError if the file lacks a column or its pictures differ in size.
    """
    arrays = read_arrays(path)
    missing = [name for name in ("data", "offsets", *columns) if name not in arrays]
    if missing:
        raise ValueError(f"{path}: has {', '.join(arrays)}; a data file of pictures also has {', '.join(missing)}")
    data, offsets, more = arrays["data"].tobytes(), arrays["offsets"], [arrays[name] for name in columns]
    cuts = zip(offsets[:-1], offsets[1:], strict=True)
    images = [np.asarray(Image.open(io.BytesIO(data[a:b])).convert("RGB")) for a, b in cuts]
    if len({image.shape for image in images}) != 1:
        raise ValueError(f"{path}: its pictures are not all of one size")
    return np.stack(images), *more


def cifar10(source, download=False):
    """CIFAR-10's 50,000 training photographs: images uint8 [N, 32, 32, 3], labels int64 [N], names of the classes.

    `source` is a folder for torchvision's CIFAR10, which checks hashes of downloads, or a data file. Raises
    FileNotFoundError if `source` is missing, ValueError for another kind of file or images of another size.
    """
    source = Path(source)
    if source.is_file():
        images, labels, classes = decode(source, "labels", "classes")
        if images.shape[1:] != (32, 32, 3):
            raise ValueError(f"{source}: its images are not all 32x32")
        return images, labels.astype(np.int64), tuple(map(str, classes))
    if not source.is_dir() and not download:
        raise FileNotFoundError(f"{source}: no such file or folder; --download fetches CIFAR-10 there")
    from torchvision.datasets import CIFAR10

    try:
        dataset = CIFAR10(source, train=True, download=download)
    except RuntimeError as error:
        raise FileNotFoundError(f"{source}: {error}; --download fetches CIFAR-10 there") from None
    return dataset.data, np.array(dataset.targets), tuple(dataset.classes)


def photographs(source):
    """CIFAR-10's training photographs; EVALUATION and REFERENCE of them are held out at random.

    If `source` is a folder without them, torchvision downloads them into it.
    """
    images, labels, classes = cifar10(source, download=not Path(source).is_file())
    split = np.full(len(images), "train", dtype="<U10")
    order = np.random.default_rng(0).permutation(len(images))
    split[order[:EVALUATION]] = "evaluation"
    split[order[EVALUATION : EVALUATION + REFERENCE]] = "reference"
    return Pictures(images, split, labels=labels, classes=classes)


def emoji(path):
    """Emoji in four styles with captions "STYLE emoji: NAME"; held-out ones are for reference or evaluation."""
    images, *columns = decode(path, "style", "name")
    styles, raw = ([str(x) for x in column] for column in columns)
    names = clean_names(raw)
    concepts = [concept(name) for name in names]
    styles_of = {}
    for c, style in zip(concepts, styles, strict=True):
        styles_of.setdefault(c, set()).add(style)
    held_out = np.array(
        [
            "concept" if drawn_share("concept", c) < 0.05
            else "style" if len(styles_of[c]) >= 3 and drawn_share("style", c, style) < 0.1
            else ""
            for c, style in zip(concepts, styles, strict=True)
        ],
        dtype="<U10",
    )  # fmt: skip
    # Held-out pictures of one concept stay together: half of the concepts are for reference, half for evaluation.
    half = np.array([drawn_share("reference", c) < 0.5 for c in concepts])
    split = np.where(held_out == "", "train", np.where(half, "reference", "evaluation"))
    captions = [f"{style} emoji: {name}" for style, name in zip(styles, names, strict=True)]
    return Pictures(images, split, captions=captions, concepts=concepts, held_out=held_out)


def clean_names(names):
    """Names in one spelling: lower case, and Fluent's "student medium dark" as "student, medium-dark skin tone".

    A tone at the end of a Fluent name counts only if the same name with "default" exists, unlike in "traffic light".
    """
    lower = [name.lower().strip() for name in names]
    toned = {name.removesuffix(" default") for name in lower if name.endswith(" default")}

    def clean(name):
        if name.removesuffix(" default") in toned:
            return name.removesuffix(" default")
        for tone in TONES:
            if name.removesuffix(f" {tone}") in toned:
                return f"{name.removesuffix(f' {tone}')}, {tone.replace(' ', '-')} skin tone"
        return name

    return [clean(name) for name in lower]


def words(name):
    """The words and punctuation marks of a name, in order."""
    return re.findall(r"[^\W_]+|[^\w\s]", name.lower())


def concept(name):
    """The words of a name, sorted, without those in NOT_A_CONCEPT unless no other words remain."""
    plain = [word for word in words(name) if word.isalnum()]
    kept = sorted({word for word in plain if word not in NOT_A_CONCEPT})
    return " ".join(kept or plain)


def drawn_share(*parts):
    """A pseudorandom number in [0, 1) that depends only on the parts and is the same on every machine."""
    return zlib.crc32("|".join(parts).encode()) / 2**32


def concept_weights(concepts):
    """Sampling weights of pictures, float64 [N], with sum 1: a concept with k pictures counts as sqrt(k), not as k.

    220 concepts (couples, families and others with all skin tones) have 54 % of the pictures. With equal weights a
    model would learn persons and little else.
    """
    _, inverse, counts = np.unique(concepts, return_inverse=True, return_counts=True)
    weights = 1 / np.sqrt(counts[inverse])
    return weights / weights.sum()


LOADERS = {"photos": photographs, "emoji": emoji}


def load(kind, path):
    """The pictures of a kind from its data file. Raises ValueError for an unknown kind."""
    if kind not in LOADERS:
        raise ValueError(f"no pictures {kind!r}; there are {', '.join(LOADERS)}")
    return LOADERS[kind](Path(path))

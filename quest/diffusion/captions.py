"""Captions that images are drawn for, from a file: one per line, or COCO's own annotations. No torch."""

import hashlib
from collections.abc import Sequence
from pathlib import Path

from quest.runtime.files import read_json, read_lines


def load(path: str | Path) -> list[str]:
    """Captions of `path`: the lines of a .txt, or of a COCO .json the first caption of every image, by image id.

    COCO has five or so per image; the first is that of the lowest annotation id. Which 10,000 the papers drew is not
    published. Raises FileNotFoundError without the file, and ValueError, naming file and line, for an empty caption or
    another kind of file: a line more or less would move every caption behind it to another seed.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; put captions there, one per line, or COCO's captions_*.json")
    if path.suffix == ".json":
        return _coco(path)
    captions = read_lines(path)
    for number, caption in enumerate(captions, start=1):
        if not caption.strip():
            raise ValueError(f"{path}: line {number} is empty; every line is one caption")
    return [caption.strip() for caption in captions]


def _coco(path):
    first: dict[int, tuple[int, str]] = {}
    try:
        for row in read_json(path)["annotations"]:
            if not type(row["image_id"]) is type(row["id"]) is int:
                raise TypeError("ids are whole numbers")
            known = first.get(row["image_id"])
            if known is None or row["id"] < known[0]:
                row["caption"].encode()  # half of a character cannot be written
                first[row["image_id"]] = (row["id"], " ".join(row["caption"].split()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: not COCO's caption annotations (image_id, id and caption of each)") from error
    empty = next((image for image in sorted(first) if not first[image][1]), None)
    if empty is not None:
        raise ValueError(f"{path}: the caption of image {empty} is empty")
    return [first[image][1] for image in sorted(first)]


def enough(path: str | Path, captions: Sequence[str], needed: int) -> None:
    """Raise ValueError, naming the file and both numbers, where there are fewer captions than needed."""
    found = len(captions)
    if found < needed:
        raise ValueError(f"{path}: {found} captions, {needed} needed ({needed - found} too few); give one per image")


def sha256(captions: Sequence[str]) -> str:
    """Hash of a prompt list in its order: part of a row's protocol, since the paper's list was not published."""
    return hashlib.sha256("\n".join(captions).encode()).hexdigest()

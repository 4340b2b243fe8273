"""Read the captions that images are sampled for: a text file with one per line, or COCO's annotations. No torch."""

import hashlib
from collections.abc import Sequence
from pathlib import Path

from quest.runtime.files import read_json, read_lines


def load(path: str | Path) -> list[str]:
    """The lines of a text file, or the first caption of every image in a COCO .json file, ordered by image id.

    COCO has about five captions per image; the first has the lowest annotation id. The papers do not say which 10,000
    they used. Raises FileNotFoundError if the file is missing, and ValueError that names file and line for an empty
    caption or another format: skipping a line would shift every later caption to another seed.
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
            previous = first.get(row["image_id"])
            if previous is None or row["id"] < previous[0]:
                row["caption"].encode()  # half of a character cannot be written
                first[row["image_id"]] = (row["id"], " ".join(row["caption"].split()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: not COCO's caption annotations (image_id, id and caption of each)") from error
    empty = next((image for image in sorted(first) if not first[image][1]), None)
    if empty is not None:
        raise ValueError(f"{path}: the caption of image {empty} is empty")
    return [first[image][1] for image in sorted(first)]


def enough(path: str | Path, captions: Sequence[str], needed: int) -> None:
    """Raise ValueError that names the file and both numbers if there are fewer captions than needed."""
    count = len(captions)
    if count < needed:
        raise ValueError(f"{path}: {count} captions, {needed} needed ({needed - count} too few); give one per image")


def sha256(captions: Sequence[str]) -> str:
    """Hash of captions in their order. A row's protocol contains it, since the paper's captions are not published."""
    return hashlib.sha256("\n".join(captions).encode()).hexdigest()

"""COCO's caption annotations as a list with one caption per image, in an order that anyone gets again. No torch."""

import json
from pathlib import Path


def coco(path: str | Path) -> list[str]:
    """The first caption of every image in COCO's captions_*.json, by image id; white space is single spaces.

    Every image has five or so; the first is that of the lowest annotation id. Which 10,000 captions the papers drew is
    not published. Raises ValueError, naming the file, for anything else.
    """
    first: dict[int, tuple[int, str]] = {}
    try:
        for row in json.loads(Path(path).read_text(encoding="utf-8"))["annotations"]:
            known = first.get(row["image_id"])
            if known is None or row["id"] < known[0]:
                first[row["image_id"]] = (row["id"], " ".join(row["caption"].split()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: not COCO's caption annotations (image_id, id and caption of each)") from error
    empty = next((image for image in sorted(first) if not first[image][1]), None)
    if empty is not None:
        raise ValueError(f"{path}: the caption of image {empty} is empty")
    return [first[image][1] for image in sorted(first)]

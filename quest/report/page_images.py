"""Images of the page, inside it: first samples of every cell, pairs that are farthest apart, figures of the run."""

import base64
import io
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image

from quest.metrics import Cell
from quest.report.page_tables import shards
from quest.runtime.files import array_names

SIDE = 128  # pixels, above which images are shown smaller
COLUMNS, PAIRS = 8, 6  # images in a row of a sample grid, and of the pairs that are farthest apart


def illustrated(run: Path, of_model: pd.DataFrame, bits: list[str]) -> dict[tuple[str, str], Cell]:
    """The cells of a model that kept images: full precision, and every method by bits."""
    methods = [method for method in dict.fromkeys(of_model["method"]) if method != "fp"]
    model = of_model["model"].iloc[0]
    found = {}
    for method, width in [("fp", "w32a32"), *((method, width) for width in bits for method in methods)]:
        folder = run / model / method / width
        samples, features = shards(folder, "samples"), shards(folder, "features")
        if samples and len(samples) == len(features) and _has_images(samples[0]):
            found[method, width] = Cell.load(features, samples)
    return found


def _has_images(file):
    return "images" in array_names(file)


def grids(model: str, cells: dict[tuple[str, str], Cell], bits: list[str]) -> Iterator[dict]:
    """Per bits the first seeds of full precision and of every method, a strip each; fewest bits first."""
    for width in reversed(bits):
        shown = {method: cell for (method, at), cell in cells.items() if at == width}
        if not shown or ("fp", "w32a32") not in cells:
            continue
        rows = [("full precision", cells["fp", "w32a32"]), *shown.items()]
        seeds = cells["fp", "w32a32"].index[:COLUMNS]
        yield {
            "model": model,
            "bits": width,
            "seeds": ", ".join(map(str, seeds)),
            "rows": [(label, strip(cell.images[:COLUMNS])) for label, cell in rows],
        }


def farthest(model: str, cells: dict[tuple[str, str], Cell], bits: list[str]) -> list[dict]:
    """Per method at the fewest bits the images whose extractor features lie farthest from full precision's.

    Euclidean distance of the pooled features at the same seed; worst first.
    """
    full = cells.get(("fp", "w32a32"))
    if full is None or not bits:
        return []
    found = []
    for (method, width), cell in cells.items():
        if width != bits[-1] or not np.array_equal(cell.index, full.index):
            continue
        distance = np.linalg.norm(cell.features["pool"] - full.features["pool"], axis=1)  # [N]
        worst = np.argsort(-distance, kind="stable")[:PAIRS]
        found.append(
            {
                "model": model,
                "method": method,
                "bits": width,
                "seeds": [int(seed) for seed in full.index[worst]],
                "distances": [float(value) for value in distance[worst]],
                "median": float(np.median(distance)),
                "n": len(distance),
                "full": strip(full.images[worst]),
                "quantized": strip(cell.images[worst]),
            }
        )
    return found


def strip(images: np.ndarray) -> dict:
    """Images uint8 [N, H, W, 3] side by side, as {"uri", "width", "height"}; lossless below SIDE pixels."""
    n, height, width, _ = images.shape
    scale = max(1, math.ceil(max(height, width) / SIDE))
    height, width, gap = height // scale, width // scale, 2
    sheet = Image.new("RGBA", (n * (width + gap) - gap, height))
    for place, pixels in enumerate(images):
        picture = Image.fromarray(pixels)
        picture = picture.resize((width, height), Image.Resampling.BOX) if scale > 1 else picture
        sheet.paste(picture, (place * (width + gap), 0))
    return {"uri": _webp(sheet), "width": sheet.width, "height": sheet.height}


def drawings(run: Path, *patterns: str) -> list[dict]:
    """Figures of a run whose names fit the patterns, as {"uri", "label", "width", "height"}."""
    folders = (run / "figures", run / "questions" / "figures")
    files = [file for pattern in patterns for folder in folders for file in sorted(folder.glob(f"{pattern}.png"))]
    found = []
    for file in files:
        with Image.open(file) as image:
            found.append({"label": file.stem.replace("_", " "), "width": image.width, "height": image.height})
        found[-1]["uri"] = picture(file)
    return found


def picture(file: Path) -> str:
    """An image file as a data URI, without loss; drawings take half of their PNG."""
    with Image.open(file) as image:
        return _webp(image.convert("RGBA"))


def _webp(image):
    data = io.BytesIO()
    image.save(data, "WEBP", lossless=True, quality=100, method=4)
    return f"data:image/webp;base64,{base64.b64encode(data.getvalue()).decode()}"

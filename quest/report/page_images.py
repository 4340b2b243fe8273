"""Images that the page contains: the first samples of every cell, the worst pairs, and figures of the run."""

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

SIDE = 128  # larger images are reduced to at most this many pixels per side
COLUMNS, PAIRS = 8, 6  # the number of images in a row of a sample grid, and in a row of worst pairs


def illustrated(run: Path, of_model: pd.DataFrame, bits: list[str]) -> dict[tuple[str, str], Cell]:
    """Load the cells of a model that kept images, by (method, bits): full precision first, then every method."""
    methods = [method for method in dict.fromkeys(of_model["method"]) if method != "fp"]
    model = of_model["model"].iloc[0]
    cells = {}
    for method, width in [("fp", "w32a32"), *((method, width) for width in bits for method in methods)]:
        folder = run / model / method / width
        samples, features = shards(folder, "samples"), shards(folder, "features")
        if samples and len(samples) == len(features) and "images" in array_names(samples[0]):
            cells[method, width] = Cell.load(features, samples)
    return cells


def grids(model: str, cells: dict[tuple[str, str], Cell], bits: list[str]) -> Iterator[dict]:
    """Yield a grid for each bits, fewest bits first: the first seeds of full precision and of every method."""
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
            "columns": len(seeds),
        }


def farthest(model: str, cells: dict[tuple[str, str], Cell], bits: list[str]) -> list[dict]:
    """Return, for each method at the fewest bits, the images that differ most from full precision, worst first.

    The measure is the Euclidean distance of the extractor's pooled features at the same seed.
    """
    full = cells.get(("fp", "w32a32"))
    if full is None or not bits:
        return []
    pairs = []
    for (method, width), cell in cells.items():
        if width != bits[-1] or not np.array_equal(cell.index, full.index):
            continue
        distance = np.linalg.norm(cell.features["pool"] - full.features["pool"], axis=1)  # [N]
        worst = np.argsort(-distance, kind="stable")[:PAIRS]
        pairs.append(
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
    return pairs


def strip(images: np.ndarray) -> dict:
    """Put images uint8 [N, H, W, 3] side by side: {"uri", "width", "height"}. Up to SIDE pixels it is lossless."""
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
    """Return the figures of a run whose names match the patterns, as {"uri", "label", "width", "height"}."""
    folders = (run / "figures", run / "questions" / "figures")
    files = [file for pattern in patterns for folder in folders for file in sorted(folder.glob(f"{pattern}.png"))]
    figures = []
    for file in files:
        with Image.open(file) as image:
            size = {"width": image.width, "height": image.height}
        figures.append({"label": file.stem.replace("_", " "), "uri": picture(file)} | size)
    return figures


def picture(file: Path) -> str:
    """Return an image file as a lossless data URI; a drawing takes half the bytes of its PNG file."""
    with Image.open(file) as image:
        return _webp(image.convert("RGBA"))


def _webp(image):
    data = io.BytesIO()
    image.save(data, "WEBP", lossless=True, quality=100, method=4)
    return f"data:image/webp;base64,{base64.b64encode(data.getvalue()).decode()}"

"""What the page shows of a single cell when a reader opens it: its recipe, its provenance and the ends of its logs."""

from pathlib import Path

import pandas as pd

from quest.quantization.header import read as read_header
from quest.runtime.files import dumps, read_json

LINES, LETTERS = 30, 200  # of a log that the page shows
OF_HEADER = ("method", "bits", "recipe", "init", "seconds", "peak_memory", "diverged")


def details(run: Path, main: pd.DataFrame, methods: dict[str, str]) -> list[dict]:
    """Return {"model", "method", "bits", "about", "parts"} of each cell in main.csv, in its order.

    parts: {title: text}. The recipe is that in the header of the checkpoint, the provenance that of metrics.json, and
    each log stands under its name. What a cell does not have is left out.
    """
    cells = dict.fromkeys(zip(main["model"], main["method"], main["bits"], strict=True))
    found = []
    for model, method, bits in cells:
        folder, parts = run / model / method / bits, {}
        if (checkpoint := folder / "model.safetensors").is_file():
            header = read_header(checkpoint, diverged=True)
            parts["Recipe"] = dumps({k: header[k] for k in OF_HEADER if k in header}, indent=1)
        if (metrics := folder / "metrics.json").is_file():
            parts["Provenance"] = dumps(read_json(metrics)["provenance"], indent=1)
        parts |= {f"End of {log.name}": end(log) for log in sorted(folder.glob("*.log"))}
        about = methods.get(method.partition("@")[0], "")
        found.append({"model": model, "method": method, "bits": bits, "about": about, "parts": parts})
    return found


def end(log: Path) -> str:
    """Return the last lines of a log; of a line that a progress bar wrote again and again, what it said at last."""
    text = log.read_bytes().decode("utf-8", "replace")  # as text, a carriage return would end a line
    lines = [line.rstrip("\r").rpartition("\r")[2][:LETTERS] for line in text.split("\n")]
    return "\n".join([line for line in lines if line.strip()][-LINES:])

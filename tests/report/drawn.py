"""Cells for the tests of the report: one with drawn arrays, and the metrics of one from numbers at hand."""

from pathlib import Path

import numpy as np

from quest.metrics import METRICS, Cell, intervals, measure
from quest.metrics.frechet import Reference, Statistics
from quest.runtime.files import dumps

N, CALLS = 24, 3
NOISE = {"fp": 0.0, "rtn": 0.5, "quest": 0.1}
METHODS = {"fp": "No quantization.", "rtn": "Nearest codes <here>.", "quest": "QuEST (arXiv:2402.03666)."}
NETWORKS = {"extractor": "scenes", "clip": "scenes-clip", None: ""}
MADE = {"commit": "abc", "dirty": False, "versions": {"python": "3.12"}, "machine": {"cpu": "Some CPU"}}


def draw(folder: Path, model: str, method: str, bits: str, write_checkpoint) -> dict:
    """Write the arrays of a cell in two shards, and return its metrics."""
    common, own = np.random.default_rng(0), np.random.default_rng(len(method) + len(bits))
    noise = NOISE[method] * (1 if bits == "w4a4" else 0.1)
    shapes = {"latents": (N, 2, 4, 4), "pool": (N, 6), "spatial": (N, 7), "logits": (N, 5)}
    arrays = {k: (common.normal(size=s) + noise * own.normal(size=s)).astype(np.float32) for k, s in shapes.items()}
    arrays["images"] = (64 * common.random((N, 16, 16, 3)) + 64 * noise * own.random((N, 16, 16, 3))).astype(np.uint8)
    footprint = {"bytes": 1_500_000, "bops": 2e9 if bits == "w4a4" else 8e9, "effective_bits": 4.2, "realizable": 1.0}
    seconds = {"fp": 2.0, "rtn": 1.0, "quest": 4.0}[method]
    placed = {"kernel": "integer", "refused": {}, "deviation": 1e-7} if noise else {}
    cell = folder / model / method / bits
    cell.mkdir(parents=True)
    for shard, index in enumerate((np.arange(N // 2, N), np.arange(N // 2))):
        kept = {"seeds": {"n": N}, "seconds": seconds, "drawn": len(index), "footprint": footprint, "kernel": placed}
        metadata = dumps(kept | {"provenance": MADE})
        features = {name: arrays[name][index] for name in ("pool", "spatial", "logits")}
        if noise and shard == 0:
            features |= {"eps_error": noise * own.random((4, CALLS)), "timesteps": np.array([801, 401, 1])}
        np.savez(cell / f"features-{shard}.npz", index=index, **features, metadata=metadata)
        samples = {name: arrays[name][index] for name in ("images", "latents")}
        np.savez(cell / f"samples-{shard}.npz", index=index, **samples, metadata=metadata)
    if method != "fp":
        (cell / "quantize.log").write_text("unit 1\nunit 2:  0%\runit 2: 100%\n</script><b>done\n", encoding="utf-8")
        benchmark = "s\th:m:s\tmax_rss\tcpu_time\n12.6\t0:00:12\t1456.25\t11.5\n"
        (cell / "quantize.tsv").write_text(benchmark, encoding="utf-8")
        header = {"seconds": 12.3, "peak_memory": 456, "init": {"method": "adaround", "bits": "w4a32", "seconds": 65.4}}
        write_checkpoint(cell / "model.safetensors", **header)
    files = [sorted(cell.glob(f"{kind}-*.npz")) for kind in ("features", "samples")]
    full = folder / model / "fp/w32a32"
    fp = None if method == "fp" else Cell.load(sorted(full.glob("features-*")), sorted(full.glob("samples-*")))
    real = np.random.default_rng(9)
    reference = Reference(*(Statistics.from_features(real.normal(size=(200, d))) for d in (6, 7)), {})
    found = measure(Cell.load(*files), reference, fp, extractor="scenes", protocol="ddim 20, eta 0, guidance 3")
    return found | {"model": model, "method": method, "bits": bits, "provenance": MADE}


def measured(model, method, bits, resampled, values, half=None, images="0-499", **more) -> dict:
    """A metrics.json as measure() returns it, of these values by metric and their resampled values.

    Intervals come from the resampled values, or are the value and `half` to either side.
    """
    rows = []
    for name, value in values.items():
        low, high = (value - half, value + half) if half is not None else intervals.interval(value, resampled[name])
        n = 16 if name == "eps_error" else int(images.split("-")[1]) + 1
        row = {"metric": name, "value": value, "low": low, "high": high, "n": n, "protocol": "plms 20, guidance 3"}
        rows.append(row | {"extractor": NETWORKS[METRICS[name].network], "reference": "", "note": ""})
    return {
        "model": model,
        "method": method,
        "bits": bits,
        "rows": rows,
        "eps_error": [],
        "resampled": {name: draws.tolist() for name, draws in resampled.items()},
        "drawn": {"images": images, "trajectories": 16, "timesteps": []},
        "footprint": {},
        "provenance": {"versions": {"torch": "2.9"}, "machine": {"cpu": "Some CPU"}, "commit": "abc"},
    } | more


def stored(cells: list[dict], folder: Path) -> list[Path]:
    """Write the metrics of these cells as a run does, and return the files."""
    files = [folder / one["model"] / one["method"] / one["bits"] / "metrics.json" for one in cells]
    for file, one in zip(files, cells, strict=True):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(dumps(one), encoding="utf-8")
    return files

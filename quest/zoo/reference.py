"""Compute reference statistics for FID and sFID: the extractor's features of scenes of the reference split."""

import hashlib
from pathlib import Path

import torch

from quest.diffusion import scenes
from quest.diffusion.models import ZOO
from quest.metrics.extractor import load, outputs
from quest.metrics.frechet import Statistics, save_reference
from quest.runtime import command_line
from quest.runtime.files import atomic
from quest.runtime.provenance import provenance
from quest.zoo.train_autoencoder import to_tensor


def build(path, extractor=ZOO / "scenes-extractor", n=20_000):
    """Write reference statistics of n scenes to `path` (.npz)."""
    net, parts = load(extractor), []
    for start in range(0, n, 1000):
        features = outputs(net, to_tensor(scenes.draw("reference", min(1000, n - start), start).images()))
        parts.append({name: features[name] for name in ("pool", "spatial")})
        print(f"reference: {min(start + 1000, n)}/{n} scenes", flush=True)
    pool, spatial = (Statistics.from_features(torch.cat([p[k] for p in parts]).numpy()) for k in ("pool", "spatial"))
    weights = (Path(extractor) / "model.safetensors").read_bytes()
    metadata = {
        "data": f"scenes 0 to {n - 1} of the reference split of quest.diffusion.scenes",
        "extractor": "scenes",
        "extractor_sha256": hashlib.sha256(weights).hexdigest(),
        "provenance": provenance(),
    }
    with atomic(Path(path)) as temporary:
        save_reference(temporary, pool, spatial, metadata)


def main():
    parser = command_line.parser(__doc__, "file", "threads")
    parser.add_argument("--extractor", type=Path, default=ZOO / "scenes-extractor", help="its folder (%(default)s)")
    parser.add_argument("-n", type=int, default=20_000, help="scenes (default %(default)s)")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    build(arguments.output, arguments.extractor, arguments.n)


if __name__ == "__main__":
    main()

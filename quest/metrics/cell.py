"""What one denoiser produced on the evaluation seeds, read from the files of its shards. Imports no torch."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from quest.runtime.files import loads, merged, read_arrays

FEATURES = ("pool", "spatial", "logits", "maps", "clip_image", "clip_text", "class_logits", "labels")


@dataclass(frozen=True, eq=False)
class Cell:
    """The outputs of one denoiser, sorted by image index."""

    index: np.ndarray  # [N]; image i has the i-th evaluation seed
    features: dict[str, np.ndarray]  # each [N, D]
    images: np.ndarray | None  # uint8 [N, H, W, 3]; None if the run keeps features only
    latents: np.ndarray | None  # [N, ...]
    eps_error: np.ndarray | None = None  # [trajectories, calls], relative squared error of each noise prediction
    guided_eps_error: np.ndarray | None = None  # the same of the guided prediction; None without guidance
    timesteps: np.ndarray | None = None  # [calls], timestep of each denoiser call; a multistep sampler may repeat one
    sampled: tuple[dict, ...] = ()  # provenance of each shard: machine, commit and package versions
    footprint: dict = field(default_factory=dict)  # size and work of the denoiser, see quest.quantization.cost
    diverged: str = ""  # why there is no denoiser: the method diverged, and images and features stand for nothing

    @classmethod
    def load(cls, features: Sequence[str | Path], samples: Sequence[str | Path]) -> "Cell":
        """Join the shards of a cell; their order does not matter.

        Raises ValueError, which names the file, if an array is missing, an image occurs twice, or features and samples
        belong to different images.
        """
        feature_shards = [_read(path, ("index", "pool", "spatial", "logits")) for path in features]
        sample_shards = [_read(path, ("index",)) for path in samples]
        names = [name for name in FEATURES if all(name in shard for shard in feature_shards)]
        joined = _join(features, feature_shards, names)
        outputs = [name for name in ("images", "latents") if all(name in shard for shard in sample_shards)]
        joined_samples = _join(samples, sample_shards, outputs)
        if not np.array_equal(joined["index"], joined_samples["index"]):
            raise ValueError(f"{samples[0]} and {features[0]}: samples and features are of different images")
        files = zip(sample_shards, samples, strict=True)
        metadata = [loads(str(shard.get("metadata", "{}")), file) for shard, file in files]
        errors = next((shard for shard in feature_shards if "eps_error" in shard and "timesteps" in shard), {})
        eps_error, timesteps = errors.get("eps_error"), errors.get("timesteps")
        if eps_error is not None and (eps_error.ndim != 2 or timesteps.shape != eps_error.shape[1:]):
            raise ValueError(
                f"{features[0]}: eps_error must be [trajectories, calls] and timesteps [calls], "
                f"got {eps_error.shape} and {timesteps.shape}"
            )
        guided = errors.get("guided_eps_error")
        if guided is not None and guided.shape != eps_error.shape:
            raise ValueError(
                f"{features[0]}: guided_eps_error must have the shape of eps_error, got {guided.shape} and "
                f"{eps_error.shape}"
            )
        return cls(
            index=joined["index"],
            features={name: joined[name] for name in names},
            images=joined_samples.get("images"),
            latents=joined_samples.get("latents"),
            eps_error=eps_error,
            guided_eps_error=guided,
            timesteps=timesteps,
            sampled=tuple(shard.get("provenance", {}) for shard in metadata if shard),
            footprint=metadata[0].get("footprint", {}),
            diverged=metadata[0].get("diverged", ""),
        )

    def only(self, index: np.ndarray) -> "Cell":
        """The same cell with these images alone. Raises ValueError if it lacks one."""
        if missing := sorted(set(index.tolist()) - set(self.index.tolist())):
            raise ValueError(f"image {missing[0]} is not there; there are {self.index[0]} to {self.index[-1]}")
        rows = np.searchsorted(self.index, index)
        images, latents = (None if one is None else one[rows] for one in (self.images, self.latents))
        features = {name: one[rows] for name, one in self.features.items()}
        return replace(self, index=index, features=features, images=images, latents=latents)


def _read(path: str | Path, needed: Sequence[str]) -> dict[str, np.ndarray]:
    arrays = read_arrays(path)
    missing = [name for name in needed if name not in arrays]
    if missing:
        raise ValueError(f"{path}: lacks {', '.join(missing)}")
    index = arrays["index"]
    if index.ndim != 1 or index.dtype.kind not in "iu" or not len(index):
        raise ValueError(f"{path}: index is {index.dtype} {index.shape}, not whole numbers [N]")
    for name in set(arrays) - {"eps_error", "guided_eps_error", "timesteps", "metadata"}:
        if len(arrays[name]) != len(arrays["index"]):
            raise ValueError(f"{path}: {name} has {len(arrays[name])} rows for {len(arrays['index'])} images")
    return arrays


def _join(paths: Sequence, shards: list[dict], names: list[str]) -> dict[str, np.ndarray]:
    index = np.concatenate([shard["index"] for shard in shards])
    order = np.argsort(index, kind="stable")
    repeated = index[order][1:][np.diff(index[order]) == 0]
    if repeated.size:
        raise ValueError(f"{paths[0]} and its other shards: image {repeated[0]} occurs more than once")
    if len(shards) == 1 and np.array_equal(index, index[order]):
        return {"index": index} | {name: shards[0][name] for name in names}
    return {"index": index[order]} | {name: merged([shard[name] for shard in shards], order) for name in names}

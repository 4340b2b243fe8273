"""Reference statistics of real images, from a folder of images or from the .npz of the guided-diffusion evaluator.

A folder is needed where no official statistics exist, as for LSUN Churches. Its images are prepared as for the training
of latent diffusion (arXiv:2112.10752): the centre square of the shorter side is cropped and resized with Pillow's
bicubic filter to 8 bits; random flips are left out. An image with no unique 8-bit RGB form (transparent, animated, or
with 16 bits per colour) is refused; the error names it.
"""

import hashlib
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from tqdm import tqdm

from quest.metrics import weights
from quest.metrics.features import extract
from quest.metrics.frechet import Reference, Statistics, load_reference, save_reference, statistics_of
from quest.metrics.manifold import NEIGHBOURS
from quest.runtime.download import sha256_of
from quest.runtime.files import array_names, atomic, one_line, read_arrays
from quest.runtime.provenance import provenance

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}
HIDDEN = (".", "__MACOSX")  # folders such as .ipynb_checkpoints and .thumbnails hold copies of images, or parts of them
CHUNK = 1000  # number of images in memory at once


def build(
    source: str | Path,
    output: str | Path,
    extractor: str = "adm",
    *,
    size: int = 256,
    n: int | None = None,
    keep: int = 10_000,
    device: str = "cpu",
) -> Reference:
    """Write statistics of the images in `source`, or of its first n images, to `output` (.npz), and return them.

    size: side in pixels to which images of a folder are resized. keep: the features of the first `keep` images are
    stored for precision. Raises ValueError, which names the file or folder, if the source has no images or fewer than n
    or 4, an image cannot be read, or an .npz holds something else; FileNotFoundError if the source does not exist.
    """
    source = Path(source)
    origin = {"extractor": extractor, "extractor_sha256": weights.sha256(extractor), "provenance": provenance()}
    if source.is_file():
        arrays = _arrays(source)
        if not arrays:  # this project wrote the statistics
            return _copied(source, output, extractor)
        if "mu_s" in arrays:
            return _published(source, arrays, output, origin)
        images, digest, what = _array_chunks(source, arrays, n), sha256_of(source), f"images of {source.name}"
    elif source.is_dir():
        files, left_out = image_files(source, n)
        digest, copies = _listing(source, files)
        images = _file_chunks(files, size)
        details = [f"{copies} of them copies of another"] if copies else []
        details += [f"left out: {', '.join(left_out)}"] if left_out else []
        what = "; ".join([f"images of folder {source.name}, centre crop, bicubic to {size}", *details])
    else:
        raise FileNotFoundError(f"{source}: no such file or folder; give a folder of images or an .npz")

    moments, features, count = {"pool": _Moments(), "spatial": _Moments()}, [], 0
    for chunk in images:
        extracted = extract(chunk, extractor, device=device)
        for name, moment in moments.items():
            moment.add(extracted[name])
        features.append(extracted["pool"][: max(0, keep - count)])
        count += len(chunk)
    if count <= NEIGHBOURS:
        raise ValueError(f"{source}: {count} images; at least {NEIGHBOURS + 1} are needed, and far more say something")
    pool, spatial = (moments[name].statistics() for name in ("pool", "spatial"))
    metadata = {"data": f"{count} {what}", "source_sha256": digest} | origin
    with atomic(output) as temporary:
        save_reference(temporary, pool, spatial, metadata, np.concatenate(features) if keep else None)
    return load_reference(output)


class _Moments:
    """Sums of features and of their products in float64.

    The mean of the first chunk is subtracted from all features; otherwise large sums would cancel in the covariance.
    """

    def __init__(self):
        self.n, self.origin = 0, None

    def add(self, features: np.ndarray) -> None:
        features = features.astype(np.float64)
        if self.origin is None:
            self.origin = features.mean(axis=0)
            self.sum, self.products = np.zeros_like(self.origin), np.zeros((features.shape[1],) * 2)
        centred = features - self.origin
        self.n += len(features)
        self.sum += centred.sum(axis=0)
        self.products += centred.T @ centred

    def statistics(self) -> Statistics:
        if self.n < 2:
            raise ValueError(f"statistics need at least 2 images, got {self.n}")
        mean = self.sum / self.n
        return Statistics(self.origin + mean, (self.products - self.n * np.outer(mean, mean)) / (self.n - 1), self.n)


def _arrays(path):
    statistics, names = ("mu", "sigma", "mu_s", "sigma_s"), array_names(path)
    # Images can take gigabytes, so only the arrays that are needed are read.
    if set(statistics) <= set(names):
        return read_arrays(path, statistics)
    if "arr_0" in names:
        return read_arrays(path, ["arr_0"])
    if "pool_mean" in names:
        return {}
    listed = one_line(", ".join(names) or "nothing")
    raise ValueError(f"{path}: holds {listed}; needed: images arr_0, or statistics mu, sigma, mu_s, sigma_s")


def _copied(source, output, extractor):
    loaded = load_reference(source)
    loaded.check(extractor, str(source))
    with atomic(output) as temporary:
        shutil.copyfile(source, temporary)
    return loaded


def _published(source, arrays, output, origin):
    extractor = origin["extractor"]
    if extractor != "adm":
        raise ValueError(f"{source}: statistics of the guided-diffusion evaluator are for adm, not {extractor}")
    pool, spatial = (statistics_of(source, arrays[f"mu{s}"], arrays[f"sigma{s}"], 0) for s in ("", "_s"))
    metadata = {"data": f"statistics in {source.name}, number of images not said", "source_sha256": sha256_of(source)}
    with atomic(output) as temporary:
        save_reference(temporary, pool, spatial, metadata | origin)
    return load_reference(output)


def _array_chunks(path, arrays, n) -> Iterator[np.ndarray]:
    images = arrays["arr_0"]
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3:
        raise ValueError(f"{path}: arr_0 must be uint8 [N, H, W, 3], got {images.dtype} {images.shape}")
    _at_least(path, len(images), n)
    images = images[:n]
    return (images[i : i + CHUNK] for i in range(0, len(images), CHUNK))


def image_files(folder, n):
    """Return the sorted image files and a description of the files that are left out, hidden ones among them."""
    files, hidden, others = [], 0, Counter()
    for file in sorted(file for file in folder.rglob("*") if file.is_file()):
        if any(part.startswith(HIDDEN) for part in file.relative_to(folder).parts):
            hidden += 1
        elif file.suffix.lower() in SUFFIXES:
            files.append(file)
        else:
            others[file.suffix.lower() or "without suffix"] += 1
    left_out = [f"{hidden} hidden files"] if hidden else []
    left_out += [f"{count} files {suffix}" for suffix, count in sorted(others.items())]
    if not files:
        others = f"; left out: {', '.join(left_out)}" if left_out else ""
        raise ValueError(f"{folder}: no images in it; looked for {', '.join(sorted(SUFFIXES))}{others}")
    _at_least(folder, len(files), n)
    if n is not None and n < len(files):
        left_out.append(f"{len(files) - n} images behind the first {n}")
    return files[:n], left_out


def _at_least(source, count, n):
    if n is not None and count < n:
        raise ValueError(f"{source}: {count} images, {n} asked for")


def _listing(folder, files):
    """Return one hash of the names and contents of all files, and how many files repeat the content of another."""
    digest, hashes = hashlib.sha256(), set()
    for file in tqdm(files, desc="hashing", unit="image"):
        hashes.add(content := sha256_of(file))
        digest.update(f"{file.relative_to(folder).as_posix()} {content}\n".encode())
    return digest.hexdigest(), len(files) - len(hashes)


def _file_chunks(files, size) -> Iterator[np.ndarray]:
    with tqdm(total=len(files), desc="reference", unit="image") as bar:
        for start in range(0, len(files), CHUNK):
            chunk = np.stack([prepared(file, size) for file in files[start : start + CHUNK]])
            bar.update(len(chunk))
            yield chunk


def _rgb(image):
    """Convert an opened image to 8-bit RGB and rotate it as its EXIF data says; 16-bit grey is rounded to 8 bits.

    Raises ValueError if the result is not unique or exact: for several frames, transparent pixels, or a mode that
    Pillow converts by clipping values.
    """
    from PIL import Image, ImageOps

    if getattr(image, "n_frames", 1) > 1:
        raise ValueError(f"{image.n_frames} frames; needed: a single image")
    if any(f"{mode};16" in str(part[3]) for part in image.tile for mode in ("RGB", "RGBA", "LA")):
        raise ValueError("16 bits per channel; needed: 8, or 16 of grey alone")
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I;16") or image.mode == "I" and image.format in ("PNG", None):
        values = np.asarray(image).astype(np.float64)
        if "transparency" in image.info:
            raise ValueError("transparent pixels; needed: an opaque image")
        return Image.fromarray((values / 257).round().astype(np.uint8)).convert("RGB")
    if image.has_transparency_data and image.convert("RGBA").getextrema()[3][0] < 255:
        raise ValueError("transparent pixels; needed: an opaque image")
    if image.mode not in ("1", "L", "P", "RGB", "LA", "PA", "RGBA", "CMYK", "YCbCr"):
        raise ValueError(f"mode {image.mode}; needed: grey, RGB or CMYK, of 8 bits")
    return image.convert("RGB")


def read_images(source: Path, most: int | None = None, size: int | None = None) -> tuple[np.ndarray, list[str] | None]:
    """Images uint8 [N, H, W, 3] of a folder, with the names of its files, or of `arr_0` or `images` in an .npz file.

    most: how many of them are read. size: the side of each image, and one of another size is refused. Without it the
    images of a folder are cropped at the centre and resized to the smaller side of the first one.

    Raises FileNotFoundError or ValueError that names the file or folder.
    """
    if source.is_file():
        arrays = read_arrays(source)
        x = arrays.get("arr_0", arrays.get("images"))
        if x is None or x.dtype != np.uint8 or x.ndim != 4 or x.shape[3] != 3:
            raise ValueError(
                f"{source}: needs arr_0 or images, uint8 [N, H, W, 3]; it has {', '.join(arrays) or 'nothing'}"
            )
        if size is not None and x.shape[1:3] != (size, size):
            raise ValueError(f"{source}: images of {x.shape[2]} x {x.shape[1]} pixels; needed: {size} x {size}")
        return x[:most], None
    if not source.is_dir():
        raise FileNotFoundError(f"{source}: no such file or folder")
    files = image_files(source, None)[0][:most]
    exact = size is not None
    if not exact:
        from PIL import Image

        with Image.open(files[0]) as opened:
            size = min(opened.size)
    images = np.stack([prepared(file, size, exact) for file in files])
    return images, [file.relative_to(source).as_posix() for file in files]


def prepared(file: Path, size: int, exact: bool = False) -> np.ndarray:
    """Read an image, crop its centre square and resize it to uint8 [size, size, 3].

    exact: refuse an image of another size. Raises ValueError, see also `_rgb`.
    """
    from PIL import Image

    try:
        with Image.open(file) as opened:
            image = _rgb(opened)
    except Exception as error:  # each kind of damaged file raises another type
        raise ValueError(f"{file}: not an image that can be read ({error})") from error
    if exact and image.size != (size, size):
        raise ValueError(f"{file}: {image.width} x {image.height} pixels; needed: {size} x {size}")
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    image = image.crop((left, top, left + side, top + side))
    if side != size:
        image = image.resize((size, size), Image.Resampling.BICUBIC)
    return np.asarray(image)

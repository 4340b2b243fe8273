"""Make the data file of emoji from three npm packages: Noto's, Twemoji's and Fluent's drawings at 64x64 on white.

The npm client downloads the packages, whose hashes are checked; librsvg (`rsvg-convert`) rasterises Fluent's drawings.
Nearly empty drawings and duplicates are left out. Licences: Noto Apache-2.0, Twemoji's graphics CC-BY 4.0, Fluent MIT.
The file is for training only: the models ship, the file does not.
"""

import io
import shutil
import subprocess
import tarfile
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from PIL import Image

from quest.runtime import command_line
from quest.runtime.download import sha256_of
from quest.runtime.files import atomic, read_json

SIZE = 64
QUALITY = 92  # of the WebP encoding
# Package -> SHA-256 of its archive.
PACKAGES = {
    "emoji-datasource-google@16.0.0": "fb5fd131b362aab7a55542d2a147a79708cce0a8b1c1bbacd470172708b5c438",
    "emoji-datasource-twitter@16.0.0": "f64a530c63bca463bd8317fdc4615ce63a53a0c65018e4ce2d848aaba7a28877",
    "fluentui-emoji@1.3.0": "ec892e607e854859b812c7d827801756adc19955b0ef56d4ae8afcddd19492c5",
}
TONES = {
    "1F3FB": "light skin tone",
    "1F3FC": "medium-light skin tone",
    "1F3FD": "medium skin tone",
    "1F3FE": "medium-dark skin tone",
    "1F3FF": "dark skin tone",
}


def fetch(package, folder):
    """Download and unpack one of PACKAGES; returns the folder of its files.

    Raises FileNotFoundError without npm, RuntimeError with npm's message if npm fails, ValueError for another archive.
    """
    if shutil.which("npm") is None:
        raise FileNotFoundError("npm: not installed; emoji come from packages of the npm registry")
    result = subprocess.run(
        ["npm", "pack", package, "--silent"], cwd=folder, capture_output=True, text=True, encoding="utf-8"
    )
    if result.returncode:
        raise RuntimeError(f"npm pack {package}: {result.stderr.strip()}")
    archive = Path(folder) / result.stdout.split()[-1]
    if sha256_of(archive) != PACKAGES[package]:
        raise ValueError(f"{package}: its archive is not the one that is known (SHA-256 {PACKAGES[package]})")
    target = Path(folder) / package.partition("@")[0]
    with tarfile.open(archive) as files:
        files.extractall(target, filter="data")
    return target / "package"


def on_white(image):
    """A PIL image of any mode as uint8 [64, 64, 3], with transparent parts in white."""
    image = image.convert("RGBA")
    paper = Image.new("RGBA", image.size, "white")
    paper.alpha_composite(image)
    return np.asarray(paper.convert("RGB").resize((SIZE, SIZE), Image.Resampling.BICUBIC))


def drawn_by_vendor(folder, vendor, style):
    """Yield (name, style, image) of each drawing of an emoji-datasource package, in the order of the package."""
    for entry in read_json(folder / "emoji.json"):
        name = entry["name"].lower()
        drawings = [(name, entry["image"])]
        for tones, variation in entry.get("skin_variations", {}).items():
            words = " and ".join(dict.fromkeys(TONES[tone] for tone in tones.split("-")))
            drawings.append((f"{name}, {words}", variation["image"]))
        for name, file in drawings:
            path = folder / "img" / vendor / "64" / file
            if path.exists():
                yield name, style, on_white(Image.open(path))


def drawn_by_fluent(folder, kind):
    """Yield (name, style, image) of Fluent's drawings by file name. Raises FileNotFoundError without librsvg."""
    if shutil.which("rsvg-convert") is None:
        raise FileNotFoundError("rsvg-convert: not installed (package librsvg, or librsvg2-bin on Debian)")
    for path in sorted((folder / "icons" / kind).glob("*.svg")):
        command = ["rsvg-convert", "-w", str(SIZE), "-h", str(SIZE), str(path)]
        png = subprocess.run(command, capture_output=True, check=True).stdout
        yield path.stem.replace("-", " "), f"fluent {kind}", on_white(Image.open(io.BytesIO(png)))


def build(folder):
    """The columns of the data file, from the packages that `fetch` unpacked in `folder`."""
    google, twitter, fluent = (Path(folder) / package.partition("@")[0] / "package" for package in PACKAGES)
    drawings = [
        *drawn_by_vendor(google, "google", "noto"),
        *drawn_by_vendor(twitter, "twitter", "twemoji"),
        *drawn_by_fluent(fluent, "flat"),
        *drawn_by_fluent(fluent, "modern"),
    ]
    seen, kept, encoded = set(), [], []
    for name, style, image in drawings:
        if image.tobytes() in seen or (image < 250).any(2).mean() < 0.01:
            continue
        seen.add(image.tobytes())
        kept.append((name, style))
        buffer = io.BytesIO()
        Image.fromarray(image).save(buffer, "WEBP", quality=QUALITY, method=6)
        encoded.append(np.frombuffer(buffer.getvalue(), np.uint8))
    names, styles = (np.array(column) for column in zip(*kept, strict=True))
    offsets = np.cumsum([0, *map(len, encoded)])
    return {"data": np.concatenate(encoded), "offsets": offsets, "name": names, "style": styles}


def main():
    output = command_line.parser(__doc__, "file").parse_args().output
    with TemporaryDirectory() as folder:
        for package in PACKAGES:
            fetch(package, folder)
        columns = build(folder)
    with atomic(output) as temporary:
        np.savez_compressed(temporary, **columns)
    print(f"{output}: {len(columns['name'])} emoji")


if __name__ == "__main__":
    main()

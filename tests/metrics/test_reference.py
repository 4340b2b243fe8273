import shutil
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from quest.metrics import features, reference
from quest.metrics.frechet import Statistics
from quest.metrics.reference import build, prepared


class Colours:
    """Features that tell images apart: the pixels of a corner."""

    def __call__(self, images):
        x = images.float()
        return {"pool": x[:, :, :2, :2].flatten(1), "spatial": x[:, 0, :2, :2].flatten(1), "logits": x.mean((2, 3))}


@pytest.fixture(autouse=True)
def colours(monkeypatch):
    monkeypatch.setitem(features.EXTRACTORS, "colours", Colours)


@pytest.fixture
def images():
    return np.random.default_rng(0).integers(0, 256, size=(30, 8, 8, 3), dtype=np.uint8)


def folder_of(images, folder):
    for i, image in enumerate(images):
        path = folder / f"{i % 3}" / f"{i:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
    return folder


def test_npz_and_folder_give_the_statistics_of_their_images(images, tmp_path, monkeypatch):
    np.savez(tmp_path / "images.npz", arr_0=images)
    expected = Statistics.from_features(images[:, :2, :2].transpose(0, 3, 1, 2).reshape(30, -1))
    whole = build(tmp_path / "images.npz", tmp_path / "whole.npz", "colours", keep=7)
    monkeypatch.setattr(reference, "CHUNK", 4)
    chunks = build(tmp_path / "images.npz", tmp_path / "chunks.npz", "colours", keep=7)
    folder = build(folder_of(images, tmp_path / "folder"), tmp_path / "folder.npz", "colours", size=8, keep=0)
    for made in (whole, chunks, folder):
        assert made.pool.n == 30
        np.testing.assert_allclose(made.pool.mean, expected.mean, rtol=1e-12)
        np.testing.assert_allclose(made.pool.cov, expected.cov, rtol=1e-9)
    assert np.array_equal(whole.features, chunks.features) and len(whole.features) == 7
    assert folder.features is None
    assert whole.metadata["data"] == "30 images of images.npz" and whole.metadata["extractor"] == "colours"
    assert len(whole.metadata["source_sha256"]) == 64 and "commit" in whole.metadata["provenance"]
    some = build(tmp_path / "images.npz", tmp_path / "some.npz", "colours", n=10)
    assert some.pool.n == 10


def test_a_folders_hash_is_of_names_and_contents(images, tmp_path):
    def digest(name):
        return build(tmp_path / name, tmp_path / f"{name}.npz", "colours", size=8).metadata["source_sha256"]

    one, same = (folder_of(images, tmp_path / name) for name in ("one", "same"))
    assert digest("one") == digest("same")
    Image.fromarray(255 - images[4]).save(same / "1" / "004.png")
    assert digest("one") != digest("same")
    assert one.exists()


def test_images_are_cropped_at_the_centre(tmp_path):
    wide = np.zeros((6, 10, 3), np.uint8)
    wide[:, 2:8] = 200
    Image.fromarray(wide).save(tmp_path / "wide.png")
    assert (prepared(tmp_path / "wide.png", 6) == 200).all()
    resized = prepared(tmp_path / "wide.png", 3)
    assert resized.shape == (3, 3, 3) and (resized == 200).all()
    Image.fromarray(wide[:, :, 0]).save(tmp_path / "grey.png")
    assert prepared(tmp_path / "grey.png", 6).shape == (6, 6, 3)


def saved(tmp_path, name, image, **settings):
    image.save(tmp_path / name, **settings)
    return tmp_path / name


def test_unusual_images_are_read_at_their_own_depth(tmp_path):
    ramp = np.linspace(0, 65535, 64).reshape(8, 8)
    deep = prepared(saved(tmp_path, "deep.png", Image.fromarray(ramp.astype(np.uint16))), 8)
    assert (deep == (ramp.astype(np.uint16) / 257).round()[..., None]).all()
    flat = Image.new("CMYK", (8, 8), (255, 0, 0, 51))
    assert (prepared(saved(tmp_path, "ink.jpg", flat, quality=100), 8)[0, 0] == (0, 204, 204)).all()
    colours = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    opaque = np.concatenate([colours, np.full((8, 8, 1), 255, np.uint8)], 2)
    assert (prepared(saved(tmp_path, "opaque.png", Image.fromarray(opaque)), 8) == colours).all()
    palette = Image.fromarray(colours).quantize(16)
    assert (prepared(saved(tmp_path, "palette.png", palette), 8) == np.asarray(palette.convert("RGB"))).all()
    assert (prepared(saved(tmp_path, "one-bit.png", Image.fromarray(colours[..., 0] > 127)), 8) % 255 == 0).all()
    turned = Image.fromarray(colours)
    exif = turned.getexif()
    exif[0x0112] = 6  # to be turned by a quarter, clockwise
    assert (prepared(saved(tmp_path, "turned.png", turned, exif=exif), 8) == np.rot90(colours, -1)).all()


def transparent_palette():
    image = Image.new("P", (8, 8))
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.info["transparency"] = 0
    return image


REFUSED = {
    "glass.png": (lambda: Image.new("RGBA", (8, 8), (255, 0, 0, 128)), {}, "transparent pixels"),
    "grey-glass.png": (lambda: Image.new("LA", (8, 8), (255, 0)), {}, "transparent pixels"),
    "palette.png": (transparent_palette, {"transparency": 0}, "transparent pixels"),
    "key.png": (lambda: Image.new("RGB", (8, 8), (9, 9, 9)), {"transparency": (9, 9, 9)}, "transparent pixels"),
    "moving.webp": (
        lambda: Image.new("RGB", (8, 8)),
        {"save_all": True, "append_images": [Image.new("RGB", (8, 8), "red")]},
        "2 frames",
    ),
    "moving.png": (
        lambda: Image.new("RGB", (8, 8)),
        {"save_all": True, "append_images": [Image.new("RGB", (8, 8), "red")]},
        "2 frames",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_an_image_without_one_reading_is_refused_by_name(tmp_path, name):
    make, settings, why = REFUSED[name]
    with pytest.raises(ValueError, match=rf"{name}: not an image that can be read \({why}"):
        prepared(saved(tmp_path, name, make(), **settings), 8)


def test_sixteen_bits_of_colour_are_refused_and_no_longer_cut_off(tmp_path):
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 2, 2, 16, 2, 0, 0, 0))
    rows = chunk(b"IDAT", zlib.compress((b"\0" + b"\x12\xff" * 6) * 2))
    (tmp_path / "rich.png").write_bytes(b"\x89PNG\r\n\x1a\n" + header + rows + chunk(b"IEND", b""))
    with pytest.raises(ValueError, match=r"rich.png: .*16 bits per channel"):
        prepared(tmp_path / "rich.png", 2)


def test_what_is_counted_and_left_out_is_said(images, tmp_path):
    folder = folder_of(images, tmp_path / "folder")
    plain = build(folder, tmp_path / "plain.npz", "colours", size=8)
    assert plain.metadata["data"] == "30 images of folder folder, centre crop, bicubic to 8"
    for place in (".ipynb_checkpoints", "1/.thumbnails", "__MACOSX"):
        (folder / place).mkdir()
        shutil.copy(folder / "1/004.png", folder / place / "004-checkpoint.png")
    (folder / ".hidden.png").write_bytes(b"")
    for name in ("notes.txt", "more.txt", "README", "image.tiff"):
        (folder / name).write_text("", encoding="utf-8")
    again = build(folder, tmp_path / "again.npz", "colours", size=8)
    left_out = "left out: 4 hidden files, 1 files .tiff, 2 files .txt, 1 files without suffix"
    assert again.metadata["data"] == f"{plain.metadata['data']}; {left_out}"
    assert np.array_equal(again.pool.cov, plain.pool.cov)
    shutil.copy(folder / "1/004.png", folder / "1/004 (copy).png")
    copied = build(folder, tmp_path / "copied.npz", "colours", size=8).metadata["data"]
    assert copied.startswith("31 images") and "; 1 of them copies of another; left out" in copied
    some = build(folder, tmp_path / "some.npz", "colours", size=8, n=10)
    assert some.metadata["data"].startswith("10 images") and "21 images behind the first 10" in some.metadata["data"]


def test_published_statistics_are_taken_as_they_are(tmp_path):
    rng = np.random.default_rng(0)
    given = {"mu": rng.normal(size=5), "sigma": np.eye(5), "mu_s": rng.normal(size=4), "sigma_s": 2 * np.eye(4)}
    np.savez(tmp_path / "VIRTUAL_lsun_bedroom256.npz", arr_0=np.zeros((2, 4, 4, 3), np.uint8), **given)
    made = build(tmp_path / "VIRTUAL_lsun_bedroom256.npz", tmp_path / "bedrooms.npz", "adm")
    assert np.array_equal(made.pool.mean, given["mu"]) and np.array_equal(made.spatial.cov, given["sigma_s"])
    assert made.pool.n == 0 and made.features is None
    made.check("adm")
    with pytest.raises(ValueError, match="are for adm, not clean"):
        build(tmp_path / "VIRTUAL_lsun_bedroom256.npz", tmp_path / "clean.npz", "clean")


def test_statistics_of_this_project_are_checked_and_copied(images, tmp_path):
    np.savez(tmp_path / "images.npz", arr_0=images)
    build(tmp_path / "images.npz", tmp_path / "statistics.npz", "colours")
    copied = build(tmp_path / "statistics.npz", tmp_path / "copy.npz", "colours")
    assert copied.metadata["data"] == "30 images of images.npz"
    assert (tmp_path / "copy.npz").read_bytes() == (tmp_path / "statistics.npz").read_bytes()
    with pytest.raises(ValueError, match="statistics.npz: statistics of colours, the cell has features of adm"):
        build(tmp_path / "statistics.npz", tmp_path / "other.npz", "adm")


def test_bad_sources(images, tmp_path):
    with pytest.raises(FileNotFoundError, match="nothing: no such file or folder; give a folder of images or an .npz"):
        build(tmp_path / "nothing", tmp_path / "out.npz", "colours")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty: no images in it; looked for .bmp"):
        build(tmp_path / "empty", tmp_path / "out.npz", "colours")
    np.savez(tmp_path / "labels.npz", labels=np.arange(3))
    with pytest.raises(ValueError, match="labels.npz: holds labels; needed: images arr_0, or statistics mu"):
        build(tmp_path / "labels.npz", tmp_path / "out.npz", "colours")
    np.savez(tmp_path / "floats.npz", arr_0=images / 255.0)
    with pytest.raises(ValueError, match=r"floats.npz: arr_0 must be uint8 .*got float64 \(30, 8, 8, 3\)"):
        build(tmp_path / "floats.npz", tmp_path / "out.npz", "colours")
    np.savez(tmp_path / "few.npz", arr_0=images)
    with pytest.raises(ValueError, match="few.npz: 30 images, 50000 asked for"):
        build(tmp_path / "few.npz", tmp_path / "out.npz", "colours", n=50_000)
    (tmp_path / "text.npz").write_text("hello", encoding="utf-8")
    with pytest.raises(ValueError, match="text.npz: not an .npz"):
        build(tmp_path / "text.npz", tmp_path / "out.npz", "colours")
    (folder_of(images, tmp_path / "broken") / "0" / "000.png").write_bytes(b"\x89PNG")
    with pytest.raises(ValueError, match="000.png: not an image that can be read"):
        build(tmp_path / "broken", tmp_path / "out.npz", "colours", size=8)
    assert not (tmp_path / "out.npz").exists()

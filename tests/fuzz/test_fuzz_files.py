"""Files that people or earlier jobs made and that the suite reads: images, captions, tables, results, parts of jobs."""

import contextlib
import io
import json
import struct
import sys
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from cases import contents, damaged, forged, mutated, refusals
from PIL import Image
from safetensors.torch import save

from quest.diffusion import captions
from quest.diffusion.calibration_set import CalibrationSet
from quest.metrics import reference
from quest.metrics.frechet import Statistics, load_reference, save_reference
from quest.planning import costs
from quest.report import ledger, seeds, tables
from quest.runtime import resume

sys.path.insert(0, str(Path(__file__).parents[1] / "report"))
from test_tables import cell  # noqa: E402

pytestmark = pytest.mark.fuzz


MODES = ("1", "L", "LA", "P", "RGB", "RGB", "RGBA", "CMYK", "YCbCr", "LAB", "HSV", "I", "I;16", "F")
SIZES = ((2**31 - 1, 2**31 - 1), (60_000, 60_000), (0, 5), (1, 200_000_000), (9_000, 9_000))


def empty_png(draw) -> bytes:
    """A PNG whose header promises what its data does not hold."""
    header = struct.pack(
        ">2I5B", *draw.choice(SIZES), draw.choice((1, 8, 16, 3)), draw.choice((0, 1, 2, 3, 4, 6)), 0, 0, 0
    )
    chunks = (b"IHDR", header), (b"IDAT", zlib.compress(bytes(draw.choice((0, 10, 10**6))))), (b"IEND", b"")
    parts = [struct.pack(">I", len(d)) + kind + d + struct.pack(">I", zlib.crc32(kind + d)) for kind, d in chunks]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def test_images(draw, tmp_path):
    """A whole file without a lossy step shows what it was made of."""
    path, file = tmp_path / draw.choice(("a.png", "b.jpg", "c d.webp", "d.bmp")), io.BytesIO()
    shown = np.frombuffer(draw.randbytes(18 * 20 * 3), np.uint8).reshape(18, 20, 3)
    mode, kind = draw.choice(MODES), draw.choice(("PNG", "PNG", "WEBP", "BMP", "JPEG", "GIF", "TIFF"))
    image = Image.fromarray(shown).convert("L" if mode[0] in "LIF" and mode != "LAB" else "RGB").convert(mode)
    with contextlib.suppress(OSError, KeyError, ValueError):  # kinds of files lack modes
        image.save(file, kind, lossless=True)
    whole = draw.random() < 0.5
    path.write_bytes(file.getvalue() if whole else draw.choice((empty_png(draw), damaged(draw, file.getvalue()))))
    image = None
    with refusals(path):
        image = reference.prepared(path, 8)
        assert image.shape == (8, 8, 3) and image.dtype == np.uint8
    if whole and mode in ("RGB", "RGBA") and kind in ("PNG", "BMP", "WEBP"):
        assert abs(float(image.mean()) - float(shown.mean())) < 8


@pytest.mark.filterwarnings("ignore:invalid value encountered in reduce")
def test_archives(draw, tmp_path):
    """An .npz that is damaged, holds other arrays, or has headers that promise what is not there."""
    path, ours = tmp_path / "reference.npz", Statistics(np.zeros(4), np.eye(4), 9)
    save_reference(path, ours, ours, {"data": "9 images"}, np.zeros((2, 4)))
    published = {"mu": np.zeros(4), "sigma": np.eye(4), "mu_s": np.zeros(4), "sigma_s": np.eye(4)}
    arrays = draw.choice(({"arr_0": np.zeros((3, 8, 8, 3), np.uint8)}, published, dict(np.load(path))))
    name = draw.choice(sorted(arrays))
    hostile = arrays[name][None], arrays[name].reshape(-1)[:2], np.nan, np.full((4, 4), np.inf), "text", -1
    arrays[name] = draw.choice((arrays[name], *hostile))
    np.savez(path, **arrays)
    if (kind := draw.randrange(3)) == 0:
        path.write_bytes(damaged(draw, path.read_bytes()))
    elif kind == 1:
        shape, dtype = (
            draw.choice(((2**40, 8, 8, 3), (-1, 3), (2**63, 2), ())),
            draw.choice(("|u1", "<f8", "|O", "<U9")),
        )
        header = f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': {shape}, }}".ljust(117) + "\n"
        array = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header.encode() + bytes(draw.choice((0, 100)))
        with zipfile.ZipFile(path, "w") as packed:
            for name in arrays:
                packed.writestr(f"{name}.npy", array)
    with refusals(path):
        load_reference(path)
    with refusals(path), contextlib.suppress(KeyError) if "arr_0" not in arrays else contextlib.nullcontext():
        list(reference._array_chunks(path, reference._arrays(path), 2))


SIGNS = (
    "a",
    "é",
    "\u2028",
    "\x85",
    "\x0b",
    "\x0c",
    "\x1c",
    "\r",
    "\n",
    "\r\n",
    "\0",
    "\t",
    "\ufeff",
    "\U0001f600",
    " ",
)


def test_captions(draw, tmp_path):
    path = tmp_path / draw.choice(("captions.txt", "captions.json"))
    text = "".join(draw.choice(SIGNS) for _ in range(draw.randrange(40)))
    if path.suffix == ".json":
        rows = [{"id": i * 7 % 5, "image_id": i // 2, "caption": f"caption {i}"} for i in range(6)]
        text = json.dumps(mutated(draw, {"annotations": rows, "info": {}}))
    content = text.encode() if draw.random() < 0.7 else damaged(draw, text.encode())
    path.write_bytes(content)
    with refusals(path):
        found = captions.load(path)
        assert all(isinstance(caption, str) and caption.strip() == caption != "" for caption in found)
        if path.suffix == ".txt":
            assert len(found) == content.count(b"\n") + (content != b"" and not content.endswith(b"\n"))


TABLES = {"costs": (costs.COSTS, costs.read), "published": (ledger.PUBLISHED, ledger.published)}


@pytest.mark.parametrize("name", TABLES)
def test_tables(name, draw, tmp_path):
    source, read = TABLES[name]
    path = tmp_path / f"{name}.csv"
    content = source.read_bytes()
    if draw.random() < 0.7:
        rows = mutated(draw, [line.split(",") for line in content.decode().splitlines()])
        content = "\n".join(",".join(map(str, row)) if isinstance(row, list) else str(row) for row in rows).encode()
    path.write_bytes(content if draw.random() < 0.7 else damaged(draw, content))
    with refusals(path):
        rows = read(path)
        if name == "published":
            ledger.ledger([], rows)
        else:
            assert all(0 <= row["value"] < np.inf for row in rows), "a cost that is no number"


@pytest.mark.parametrize("write", [tables.write, seeds.write])
def test_results(write, draw, tmp_path):
    """No table is made of a result that holds something else than numbers where numbers belong."""
    cells = [cell("scenes-text", method, "w4a4") for method in ("rtn", "quest")]
    if write is seeds.write:
        cells += [one | {"method": f"{one['method']}@1"} for one in cells]
    else:
        cells.append(cell("scenes-text", "fp", "w32a32"))
    paths = [tmp_path / f"{number}.json" for number in range(len(cells))]
    for path, content in zip(paths, cells, strict=True):
        path.write_text(json.dumps(content), encoding="utf-8")
    number = draw.randrange(len(cells))
    content = json.dumps(mutated(draw, cells[number])).encode()
    paths[number].write_bytes(damaged(draw, content) if draw.random() < 0.1 else content)
    with refusals(paths[number], "w4a4: "):
        write(paths, tmp_path / "tables")


def rewritten(draw, path: Path) -> bytes:
    """A file of ours with tensors, or a JSON file, of which the content or the bytes are changed."""
    if draw.random() < 0.5:
        return damaged(draw, path.read_bytes())
    if path.suffix == ".json":
        return json.dumps(mutated(draw, json.loads(path.read_bytes()))).encode()
    header, tensors = forged(draw, *contents(path))
    return save(tensors, {"quest": json.dumps(header)} if header else None)


def test_calibration_sets(draw, class_calibration, tmp_path):
    path = tmp_path / "set.safetensors"
    class_calibration.save(path)
    path.write_bytes(rewritten(draw, path))
    with refusals(path):
        found = CalibrationSet.load(path)
        inputs = found.inputs(torch.arange(2))
        assert all(t.isfinite().all() for t in (*inputs.values(), found.target)) and len(found) == len(found.timestep)


def test_parts_of_a_job(draw, tmp_path):
    """A part that was changed is refused, or computed again; never taken over."""
    folder = tmp_path / "parts"

    def run(killed=False):
        weight, generator = torch.zeros(3), torch.Generator().manual_seed(0)

        def compute():
            weight.copy_(torch.rand(3, generator=generator))
            return [1.5, 2.5]

        with resume.resuming(folder, {"job": 1, "of": ["a", 2]}):
            numbers = resume.part("unit", lambda: {"weight": weight}, compute, generator)
            if killed:
                raise KeyboardInterrupt
        return weight.tolist(), numbers, torch.rand(1, generator=generator).item()

    expected = run()
    with pytest.raises(KeyboardInterrupt):
        run(killed=True)
    path = draw.choice(sorted(folder.iterdir()))
    path.write_bytes(rewritten(draw, path))
    with refusals(path):
        assert run() == expected, "a part that was changed was taken over"

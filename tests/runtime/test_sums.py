"""Known hashes and checksums are compared wherever they exist."""

import zipfile

import pytest
import torch

from quest.diffusion import models
from quest.diffusion.compvis import checkpoint
from quest.metrics import extractor, features, inception
from quest.runtime.sums import NAME, check_archive, check_sums, write_sums
from quest.zoo import training


def flipped(path, target, place=None):
    """A copy with one bit of another value: in the middle of what it holds, or at `place`."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2 if place is None else place] ^= 1
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(content)
    return target


def copied(folder, target):
    for file in (file for file in folder.rglob("*") if file.is_file()):
        (target / file.relative_to(folder)).parent.mkdir(parents=True, exist_ok=True)
        (target / file.relative_to(folder)).write_bytes(file.read_bytes())
    return target


def test_what_was_written_is_what_is_checked(tmp_path):
    (tmp_path / "a/b").mkdir(parents=True)
    for name in ("a/b/weights", "a/config.json", "a/README.md"):
        (tmp_path / name).write_text(name, encoding="utf-8")
    check_sums(tmp_path / "a")  # nothing is known of it
    write_sums(tmp_path / "a")
    lines = (tmp_path / "a" / NAME).read_text(encoding="utf-8").split("\n")
    assert [line.partition("  ")[2] for line in lines] == ["b/weights", "config.json", ""]
    check_sums(tmp_path / "a")
    (tmp_path / "a/README.md").write_text("another one", encoding="utf-8")
    check_sums(tmp_path / "a")
    (tmp_path / "a/b/weights").write_text("x", encoding="utf-8")
    with pytest.raises(ValueError, match="weights: SHA-256 is .*the file has changed"):
        check_sums(tmp_path / "a")
    (tmp_path / "a/b/weights").unlink()
    with pytest.raises(ValueError, match="weights: missing, but .*SHA256SUMS names it"):
        check_sums(tmp_path / "a")


SHIPPED = sorted(path.parent for path in models.ZOO.glob(f"*/{NAME}"))


def test_every_shipped_model_has_its_sums():
    """After a training was accepted: `python -m quest.runtime.sums resources/zoo/NAME`."""
    with_weights = {file.relative_to(models.ZOO).parts[0] for file in models.ZOO.rglob("*.safetensors")}
    assert {folder.name for folder in SHIPPED} == with_weights
    for folder in SHIPPED:
        check_sums(folder)
        known = (folder / NAME).read_text(encoding="utf-8")
        assert all(file.relative_to(folder).as_posix() in known for file in folder.rglob("*.safetensors"))


@pytest.mark.parametrize("name", ["scenes-class", "scenes-extractor", "scenes-clip"])
def test_a_flipped_bit_of_a_shipped_model_is_noticed(tmp_path, name):
    folder = copied(models.ZOO / name, tmp_path / name)
    file = max(folder.rglob("*.safetensors"), key=lambda path: path.stat().st_size)
    flipped(file, file, place=-1000)

    def load():
        if name == "scenes-clip":
            from quest.metrics import clip

            return clip.load(folder)
        return extractor.load(folder) if name == "scenes-extractor" else models.load_pipeline(folder)

    with pytest.raises(ValueError, match=f"{file.name}: SHA-256 is"):
        load()


def saved(path, content):
    torch.save(content, path)
    with zipfile.ZipFile(path) as archive:  # where the bytes of a tensor begin
        data = next(entry for entry in archive.infolist() if entry.filename.endswith("data/0"))
    return path, data.header_offset + 200


def test_a_flipped_bit_of_a_torch_file_is_noticed_by_every_reader(tmp_path):
    state = {"state_dict": {"weight": torch.rand(64, 64)}}
    path, place = saved(tmp_path / "x.ckpt", state)
    check_archive(path)
    assert torch.equal(checkpoint.read(path)["weight"], state["state_dict"]["weight"])
    damaged = flipped(path, tmp_path / "damaged.ckpt", place)
    torch.load(damaged, weights_only=True)  # torch itself does not notice
    readers = (checkpoint.read, inception._check, features._tensors)
    for read in (*readers, lambda file: training.load_checkpoint(file, [], None)):
        with pytest.raises(ValueError, match=r"damaged\.ckpt: damaged: the checksum of .*data/0"):
            read(damaged)

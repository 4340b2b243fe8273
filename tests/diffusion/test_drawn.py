"""What was drawn before is kept where it is of the same job, and only there."""

import json
import re
import subprocess
import sys
from dataclasses import replace
from itertools import count
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from quest.diffusion.drawn import Collected, earlier, joined
from quest.runtime.files import loads, read_arrays
from workflow.scripts import sample as sample_script

ROOT = Path(__file__).parents[2]
SIZE = 4


def write(folder, index, job="same", **changed):
    """Two files of a shard, whose rows tell their image."""
    index = np.array(index)
    files = [folder / "samples.npz", folder / "features.npz"]
    for number, file in enumerate(files):
        arrays = {"index": index, "rows": index * 10.0 + number} | changed
        np.savez(file, **arrays, metadata=json.dumps({"job": job, "seconds": 5.0}))
    return files


def test_whole_batches_are_kept_and_broken_ones_are_not(tmp_path):
    files = write(tmp_path, [*range(8), 8, 9])  # the third batch was cut off at 10 images
    whole, (samples, features), seconds = earlier(files, "same", [0, 4, 8], SIZE, 12)
    assert whole == {0, 4} and samples["index"].tolist() == list(range(8))
    assert features["rows"].tolist() == [10.0 * i + 1 for i in range(8)] and seconds == 4.0  # of 5 for 10 images
    assert earlier(files, "same", [0, 4, 8], SIZE, 10)[0] == {0, 4, 8}
    fewer, (samples, _), _ = earlier(files, "same", [0, 4], SIZE, 6)
    assert fewer == {0, 4} and samples["index"].tolist() == list(range(6))
    assert earlier(files, "same", [4], SIZE, 12)[0] == {4}, "of another shard"


def test_what_is_of_another_job_or_damaged_is_drawn_again(tmp_path):
    files = write(tmp_path, range(8))
    nothing = (set(), [{}, {}], 0.0)
    assert earlier(files, "other", [0, 4], SIZE, 8) == nothing
    assert earlier([tmp_path / "none.npz", files[1]], "same", [0, 4], SIZE, 8) == nothing
    files[1].write_bytes(files[1].read_bytes()[:-40])
    assert earlier(files, "same", [0, 4], SIZE, 8) == nothing
    write(tmp_path, range(8))
    np.savez(files[1], index=np.arange(1, 9), rows=np.zeros(8), metadata=json.dumps({"job": "same"}))
    assert earlier(files, "same", [0, 4], SIZE, 8) == nothing
    np.savez(files[1], index=np.arange(8), rows=np.zeros(8))
    assert earlier(files, "same", [0, 4], SIZE, 8) == nothing, "a file of an earlier version names no job"


def test_rows_are_joined_in_the_order_of_images():
    old = {"index": np.array([0, 1, 8, 9]), "rows": np.array([0.0, 1, 8, 9])}
    new = {"index": np.array([4, 5]), "rows": np.array([4.0, 5])}
    assert joined(old, new)["rows"].tolist() == [0, 1, 4, 5, 8, 9]
    assert joined({}, new) is new and joined(old, {}) is old


def test_batches_are_collected_in_files():
    kept, draw = Collected(), np.random.default_rng(0)
    batches = [{"x": draw.random((n, 2, 3)), "y": draw.integers(0, 9, n).astype(np.uint8)} for n in (4, 4, 1)]
    for batch in batches:
        kept.add(batch)
    found = kept.arrays()
    for name in ("x", "y"):
        whole = np.concatenate([batch[name] for batch in batches])
        assert np.array_equal(found[name], whole) and found[name].dtype == whole.dtype
    assert Collected().arrays() == {}


@pytest.fixture
def sampled(tmp_path, monkeypatch, capsys, class_model, class_calibration, first_calls):
    """sampled(n): how many images the script draws for a shard of n, and the metadata of the file it leaves."""
    monkeypatch.setattr("quest.diffusion.models.get", lambda name: replace(class_model, steps=2))
    files = [tmp_path / "samples.npz", tmp_path / "features.npz"]
    first_calls(class_calibration).save(tmp_path / "set.safetensors", {})
    words = ["--evaluation", tmp_path / "set.safetensors", "--samples", files[0], "--features", files[1]]

    def run(n):
        monkeypatch.setattr("sys.argv", ["sample", "tiny-class", "-n", str(n), *map(str, words)])
        sample_script.main()
        drawn = re.search(r"^(\d+) images in", capsys.readouterr().out, re.MULTILINE)
        return int(drawn[1]), loads(str(read_arrays(files[0])["metadata"]), files[0])

    return run


def test_other_networks_packages_or_captions_draw_a_file_anew(sampled, tmp_path, monkeypatch):
    """Features of an old network would otherwise stand beside those of a new one."""
    assert [sampled(8)[0], sampled(8)[0]] == [8, 0]
    (tmp_path / "captions.txt").write_text("another emoji", encoding="utf-8")
    changes = {
        "quest.metrics.weights.sha256": lambda name: f"of another {name}",
        "workflow.scripts.sample.version": lambda name: f"another {name}",
        "quest.diffusion.models.EMOJI_CAPTIONS": tmp_path / "captions.txt",
    }
    for name, changed in changes.items():
        monkeypatch.setattr(name, changed)
        assert [sampled(8)[0], sampled(8)[0]] == [8, 0], name


def test_seconds_are_those_of_all_images_of_a_file(sampled, monkeypatch):
    """Also of those that an earlier run drew."""
    clock = count(0, 10)  # each run takes 10 s
    monkeypatch.setattr(sample_script, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    for n, seconds in ((8, 10.0), (16, 20.0)):
        drawn, metadata = sampled(n)
        assert (drawn, metadata["drawn"], metadata["seconds"]) == (8, n, seconds)


@pytest.mark.slow
def test_more_images_are_those_that_would_have_been_drawn_at_once(tmp_path):
    def sampled(folder, n):
        folder.mkdir(exist_ok=True)
        files = [folder / "samples.npz", folder / "features.npz"]
        words = ["scenes-uncond", "-n", n, "--evaluation", tmp_path / "evaluation.safetensors"]
        words += ["--samples", files[0], "--features", files[1]]
        said = script("sample", *words)
        arrays = [dict(np.load(file)) for file in files]
        return said, {f"{i} {k}": v for i, of in enumerate(arrays) for k, v in of.items() if k != "metadata"}

    script("trajectories", "scenes-uncond", "--evaluation", tmp_path / "evaluation.safetensors", "-e", 2)
    assert "60 images in" in sampled(tmp_path / "one", 60)[0]
    said, grown = sampled(tmp_path / "one", 110)
    assert "60 images in" in said and "50 were there" in said  # the first batch of 50; the second had been cut
    _, whole = sampled(tmp_path / "two", 110)
    assert grown.keys() == whole.keys() and all(np.array_equal(grown[name], whole[name]) for name in whole)
    said, fewer = sampled(tmp_path / "one", 30)
    assert "0 images in" in said and np.array_equal(fewer["0 images"], whole["0 images"][:30])


def script(name, *arguments):
    command = [sys.executable, "-m", f"workflow.scripts.{name}", *map(str, arguments)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, encoding="utf-8")
    assert run.returncode == 0, run.stderr
    return run.stdout

import errno
import json
import os
import resource
import stat
import subprocess
import sys
import time
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest

from quest.runtime.files import atomic, atomic_folder
from quest.runtime.provenance import CONFIG, config_hash, provenance

ROOT = Path(__file__).parents[2]


def test_provenance_names_commit_versions_and_machine():
    found = json.loads(json.dumps(provenance()))
    git = subprocess.run(["git", "-C", ROOT, "rev-parse", "HEAD"], capture_output=True, text=True, encoding="utf-8")
    assert found["commit"] == (git.stdout.strip() if git.returncode == 0 else None)
    assert found["versions"]["torch"] == metadata.version("torch")
    assert found["machine"]["cpu"] and found["machine"]["cores"] == os.cpu_count()


def test_provenance_tells_time_memory_and_config(monkeypatch):
    monkeypatch.delenv(CONFIG, raising=False)
    before = provenance()
    assert before["config"] is None
    held = np.ones(50_000_000)
    time.sleep(0.2)
    monkeypatch.setenv(CONFIG, "abc")
    after = provenance()
    assert after["config"] == "abc" and held[0] == 1
    assert after["peak_memory_mb"] >= max(400, before["peak_memory_mb"])
    assert 0.2 <= after["wall_seconds"] - before["wall_seconds"] < 30


def test_wall_seconds_are_those_of_the_process():
    code = "import time; time.sleep(1); import quest.runtime.provenance as p; print(p.provenance()['wall_seconds'])"
    start = time.perf_counter()
    said = float(
        subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True, encoding="utf-8"
        ).stdout
    )
    # Rounded to tenths, and the system counts a process's start in hundredths.
    assert 0.9 <= said <= time.perf_counter() - start + 0.1


def test_the_hash_of_a_config_is_that_of_what_it_says():
    config = {"name": "smoke", "models": {"scenes-class": {"images": 120, "shards": 2}}}
    reordered = {"models": {"scenes-class": {"shards": 2, "images": 120}}, "name": "smoke"}
    assert config_hash(config) == config_hash(reordered)
    assert config_hash(config) != config_hash(config | {"name": "other"})


def test_provenance_outside_a_checkout(tmp_path, monkeypatch):
    """A copy of the package in another project's checkout must not claim that project's commit."""
    import quest.runtime.provenance as module

    subprocess.run(["git", "init", "-q", tmp_path], check=True)
    identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run(["git", "-C", tmp_path, *identity, "commit", "-q", "--allow-empty", "-m", "x"], check=True)
    copy = tmp_path / "site-packages" / "quest" / "runtime" / "provenance.py"
    copy.parent.mkdir(parents=True)
    monkeypatch.setattr(module, "__file__", str(copy))
    assert (provenance()["commit"], provenance()["dirty"]) == (None, None)


def test_a_write_that_fails_leaves_what_was_there(tmp_path):
    path = tmp_path / "new folder" / "metrics.json"
    with atomic(path) as file:
        assert (file.parent, file.suffix) == (path.parent, ".json")
        file.write_text("whole", encoding="utf-8")
    with pytest.raises(RuntimeError), atomic(path) as file:
        file.write_text("ha", encoding="utf-8")
        raise RuntimeError
    assert path.read_text(encoding="utf-8") == "whole"
    assert list(path.parent.iterdir()) == [path]


@contextmanager
def full_disk():
    """No file can grow beyond 4 kB: writes fail as they do on a full disk, with another number.

    Not a fixture, which would hold while pytest writes to the file that its output may go to.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def _text(path):
    path.write_text("x" * 100_000, encoding="utf-8")


def _npz(path):
    np.savez(path, images=np.zeros(100_000))


def _safetensors(path):
    from safetensors.numpy import save_file

    save_file({"weight": np.zeros(100_000)}, path)


@pytest.mark.parametrize("write", [_text, _npz, _safetensors])
def test_a_full_disk_is_one_line_that_names_the_file_and_leaves_nothing(tmp_path, write):
    path = tmp_path / "features-0.npz"
    path.write_text("whole", encoding="utf-8")
    with full_disk(), pytest.raises(OSError) as error, atomic(path) as file:
        write(file)
    assert f"{path} was not written: {os.strerror(errno.EFBIG)}" in str(error.value) and "\n" not in str(error.value)
    assert path.read_text(encoding="utf-8") == "whole" and list(tmp_path.iterdir()) == [path]
    said = pytest.raises(OSError, match="pipeline was not written: ")
    with full_disk(), said, atomic_folder(tmp_path / "pipeline") as folder:
        write(folder / "weights.npz")
    assert list(tmp_path.iterdir()) == [path]


def test_a_written_file_has_ordinary_permissions(tmp_path, monkeypatch):
    from safetensors.numpy import save_file

    before = os.umask(0o027)
    try:
        # The umask is of the whole process: a file that another thread makes while it is 0 could be written by all.
        monkeypatch.setattr(os, "umask", lambda mask: pytest.fail("the umask was changed"))
        for write in (lambda file: file.write_text("", encoding="utf-8"), lambda file: save_file({}, file)):
            with atomic(tmp_path / "atomic") as file:
                write(file)
            assert stat.S_IMODE((tmp_path / "atomic").stat().st_mode) == 0o640
    finally:
        monkeypatch.undo()
        os.umask(before)

import json
import os
import stat
import subprocess
from importlib import metadata
from pathlib import Path

import pytest

from quest.files import atomic
from quest.provenance import provenance

ROOT = Path(__file__).parents[1]


def test_provenance_names_commit_versions_and_machine():
    found = json.loads(json.dumps(provenance()))
    git = subprocess.run(["git", "-C", ROOT, "rev-parse", "HEAD"], capture_output=True, text=True)
    assert found["commit"] == (git.stdout.strip() if git.returncode == 0 else None)
    assert found["versions"]["torch"] == metadata.version("torch")
    assert found["machine"]["cpu"] and found["machine"]["cores"] == os.cpu_count()


def test_provenance_outside_a_checkout(tmp_path, monkeypatch):
    """A copy of the package in another project's checkout must not claim that project's commit."""
    import quest.provenance as module

    subprocess.run(["git", "init", "-q", tmp_path], check=True)
    identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run(["git", "-C", tmp_path, *identity, "commit", "-q", "--allow-empty", "-m", "x"], check=True)
    copy = tmp_path / "site-packages" / "quest" / "provenance.py"
    copy.parent.mkdir(parents=True)
    monkeypatch.setattr(module, "__file__", str(copy))
    assert (provenance()["commit"], provenance()["dirty"]) == (None, None)


def test_a_write_that_fails_leaves_what_was_there(tmp_path):
    path = tmp_path / "new folder" / "metrics.json"
    with atomic(path) as file:
        assert (file.parent, file.suffix) == (path.parent, ".json")
        file.write_text("whole")
    with pytest.raises(RuntimeError), atomic(path) as file:
        file.write_text("ha")
        raise RuntimeError
    assert path.read_text() == "whole"
    assert list(path.parent.iterdir()) == [path]


def test_a_written_file_has_ordinary_permissions(tmp_path):
    plain, path = tmp_path / "plain", tmp_path / "atomic"
    plain.write_text("")
    with atomic(path) as file:
        file.write_text("")
    assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE(plain.stat().st_mode)

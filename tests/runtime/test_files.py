"""A folder is replaced whole, wherever the process is killed on the way."""

import subprocess
import sys
from pathlib import Path

import pytest

from quest.runtime.files import atomic_folder, recovered

ROOT = Path(__file__).parents[2]
# Ends at once, as a killed process does, before or after the Nth change to the folders beside the target.
KILLED = """
import os, shutil, sys
from pathlib import Path
from quest.runtime import files
target, stop = sys.argv[1], int(sys.argv[2])
steps = 0
def stopping(function):
    def step(*arguments, **keywords):
        global steps
        steps += 1
        if steps == stop:
            os._exit(9)
        function(*arguments, **keywords)
        steps += 1
        if steps == stop:
            os._exit(9)
    return step
def write():
    with files.atomic_folder(target) as folder:
        for name in "ab":
            (folder / name).write_text("new", encoding="utf-8")
Path.rename, shutil.rmtree = stopping(Path.rename), stopping(shutil.rmtree)
write()
print(steps)
"""


def killed(target: Path, stop: int) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", KILLED, str(target), str(stop)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, encoding="utf-8")


def content(folder: Path) -> list[str]:
    return [file.read_text(encoding="utf-8") for file in sorted(folder.iterdir())]


@pytest.fixture
def target(tmp_path):
    with atomic_folder(tmp_path / "model") as folder:
        for name in "ab":
            (folder / name).write_text("old", encoding="utf-8")
    return tmp_path / "model"


def test_a_kill_at_any_step_leaves_the_old_folder_or_the_new_one(target):
    whole = killed(target, 0)
    assert whole.returncode == 0 and content(target) == ["new", "new"]
    steps = int(whole.stdout)
    assert steps >= 6  # aside, in, and the old one away, each before and after
    found = []
    for stop in range(1, steps + 1):
        with atomic_folder(target) as folder:
            for name in "ab":
                (folder / name).write_text("old", encoding="utf-8")
        assert killed(target, stop).returncode == 9
        found.append(content(recovered(target)))
        with atomic_folder(target) as folder:
            (folder / "a").write_text("again", encoding="utf-8")
        assert content(target) == ["again"]
        assert not list(target.parent.glob("*.old")) + list(target.parent.glob(".*.old"))
    assert found[0] == ["old", "old"] and found[-1] == ["new", "new"]
    assert all(one in (["old", "old"], ["new", "new"]) for one in found)


def test_an_error_leaves_the_old_folder(target):
    with pytest.raises(RuntimeError), atomic_folder(target) as folder:
        (folder / "a").write_text("half", encoding="utf-8")
        raise RuntimeError
    assert content(target) == ["old", "old"] and [file.name for file in target.parent.iterdir()] == ["model"]

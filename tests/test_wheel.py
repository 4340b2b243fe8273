"""A wheel holds the library and `python -m quest judge`, and needs no file of the repository."""

import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

from quest.kernels.cpu import core

ROOT = Path(__file__).parents[1]
CORE = ROOT / f"quest/kernels/cpu/_core{sysconfig.get_config_var('EXT_SUFFIX')}"
COPIED = ["pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE", "quest", "baselines"]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """The wheel with the core that was compiled already: setuptools compiles only what is older than its sources."""
    project = tmp_path_factory.mktemp("wheel") / "project"
    built = project / f"build/lib.{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
    project.mkdir()
    for name in COPIED:
        source = ROOT / name
        (shutil.copytree if source.is_dir() else shutil.copyfile)(source, project / name)
    target = built / CORE.relative_to(ROOT)
    target.parent.mkdir(parents=True)
    shutil.copyfile(CORE, target)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "."]
    subprocess.run(command, cwd=project, check=True)
    (file,) = project.glob("*.whl")
    return file


@pytest.mark.skipif(not core.available(), reason="the core is not compiled here")
def test_it_holds_the_packages_the_core_and_nothing_else(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    of_code = {str(f.relative_to(ROOT)) for room in ("quest", "baselines") for f in (ROOT / room).rglob("*.py")}
    others = {name for name in names - of_code if ".dist-info/" not in name}
    assert of_code <= names
    assert {str(CORE.relative_to(ROOT)), "quest/kernels/cpu/csrc/abi.h"} <= others
    assert all(name.startswith("quest/kernels/cpu/") and name.endswith((".h", CORE.name)) for name in others)


@pytest.mark.skipif(not core.available(), reason="the core is not compiled here")
def test_its_commands_run_without_the_repository(wheel, tmp_path):
    """From the unpacked wheel alone. The second command loads the core, whose functions its header describes."""
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "site"), "PYTHONSAFEPATH": "1"}

    def python(*words):
        run = subprocess.run(
            [sys.executable, *words], cwd=tmp_path, env=environment, capture_output=True, text=True, encoding="utf-8"
        )
        return run.returncode, run.stdout + run.stderr

    code, said = python("-m", "quest", "judge", "new", "old")
    assert code == 3 and said.startswith("judge: new")
    where = "from quest.kernels.cpu import core; core.core(); print(core.__file__)"
    assert python("-c", where) == (0, f"{tmp_path / 'site/quest/kernels/cpu/core/__init__.py'}\n")

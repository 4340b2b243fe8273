"""A copy of the workflow whose scripts do nothing but write their arguments: what Snakemake decides, in seconds."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]

# Stands in for every script of the workflow: each path after an output option gets the whole command line.
STUB = '''
import sys
from pathlib import Path
outputs = {outputs!r}
option = None
for argument in sys.argv[1:]:
    option = argument if argument.startswith("-") else option
    if option in outputs:
        Path(argument).write_text(" ".join(sys.argv[1:]))
'''
OUTPUTS = {
    "trajectories": ["--calibration", "--evaluation", "--ranges"],
    "quantize": ["-o"],
    "sample": ["--samples", "--features"],
    "metrics": ["-o"],
    "tables": ["-o"],
    "figures": ["-o"],
    "readme": ["-o"],
}


class Project:
    """A folder with the workflow in it."""

    def __init__(self, folder: Path):
        self.folder = folder
        shutil.copy(ROOT / "Snakefile", folder)
        shutil.copy(ROOT / "environment.yml", folder)
        shutil.copytree(ROOT / "workflow", folder / "workflow", ignore=shutil.ignore_patterns("__pycache__"))
        for name in ("quest", "baselines", "resources"):
            (folder / name).symlink_to(ROOT / name)

    def stub(self) -> None:
        for name, outputs in OUTPUTS.items():
            (self.folder / f"workflow/scripts/{name}.py").write_text(STUB.format(outputs=outputs))

    def config(self, name: str = "default") -> dict:
        return yaml.safe_load((self.folder / f"workflow/config/{name}.yaml").read_text())

    def write(self, config: dict, name: str = "default") -> None:
        (self.folder / f"workflow/config/{name}.yaml").write_text(yaml.safe_dump(config))

    def snakemake(self, *arguments: str, **options) -> subprocess.CompletedProcess:
        command = [sys.executable, "-m", "snakemake", "--cores", "2", *arguments]
        environment = os.environ | {"PYTHONPATH": str(self.folder)}
        options = {"capture_output": True, "text": True, "timeout": 300} | options
        return subprocess.run(command, cwd=self.folder, env=environment, **options)

    def planned(self, *arguments: str) -> list[str]:
        """The shell commands Snakemake would run, and "rule: reason" lines mixed in, as `snakemake -n -p` tells them."""
        run = self.snakemake("--dry-run", "--printshellcmds", *arguments)
        assert run.returncode == 0, run.stdout + run.stderr
        return re.findall(r"python -m workflow\.scripts\.\S+ .*", run.stdout + run.stderr)


@pytest.fixture
def project(tmp_path) -> Project:
    return Project(tmp_path)


@pytest.fixture
def stubbed(tmp_path) -> Project:
    """One model, five cells, stub scripts."""
    project = Project(tmp_path)
    project.stub()
    config = project.config()
    config["models"] = {"scenes-class": {"images": 500, "shards": 2}}
    config["grid"] = [
        {"model": ["scenes-class"], "method": ["fp"], "bits": ["w32a32"]},
        {"model": ["scenes-class"], "method": ["rtn", "rtn-mse", "quest"], "bits": ["w4a4"]},
    ]
    config["methods"] = {"fp": {}, "rtn": {}, "rtn-mse": {}, "quest": {"init": "rtn-mse"}}
    project.write(config)
    return project

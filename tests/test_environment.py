import ast
import json
import re
import sys
import tomllib
from importlib.metadata import version
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
FIXED = "torch torchvision diffusers transformers clean-fid torchmetrics open-clip-torch pandas snakemake".split()


def test_environment_has_the_ranges_of_pyproject():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text(encoding="utf-8"))
    (pip,) = [entry["pip"] for entry in environment["dependencies"] if isinstance(entry, dict)]
    assert pip == PROJECT["dependencies"]
    conda = [entry for entry in environment["dependencies"] if isinstance(entry, str)]
    for needed in ("python>=3.11", "cxx-compiler"):
        assert any(entry.startswith(needed) for entry in conda), needed


def test_fixed_packages_are_declared():
    assert {*FIXED, "pytest-benchmark"} <= {Requirement(line).name for line in PROJECT["dependencies"]}


@pytest.mark.parametrize("line", PROJECT["dependencies"])
def test_installed_version_lies_in_the_range(line):
    requirement = Requirement(line)
    assert requirement.specifier.contains(Version(version(requirement.name)).public, prereleases=True)


def test_what_code_imports_is_declared():
    """Every third-party package imported anywhere in the code is among the dependencies, by the name pip knows.

    Or in the extras for exports and for what kernels are timed against. But triton: torch's builds for GPUs bring the
    version they need, and the kernel says where it is missing.
    """
    pip_names = {"yaml": "pyyaml", "PIL": "pillow", "open_clip": "open-clip-torch", "cleanfid": "clean-fid"}
    pip_names |= {"markdown_it": "markdown-it-py"}
    extras = PROJECT["optional-dependencies"]
    lines = PROJECT["dependencies"] + extras["kernels"] + extras["export"]
    declared = {Requirement(line).name for line in lines}
    undeclared = set()
    for file in (file for folder in ("quest", "baselines", "workflow") for file in (ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) and not node.level else []
            for name in {name.split(".")[0] for name in names}:
                if name not in {*sys.stdlib_module_names, "quest", "baselines", "workflow", "triton"}:
                    known = pip_names.get(name, name.replace("_", "-")) in declared
                    undeclared |= set() if known else {f"{file.name}: {name}"}
    assert undeclared == set()


def test_locks_pin_every_dependency_within_its_range():
    """By versions alone: a lock file with addresses would not install from another index."""
    lines = (ROOT / "locks/pip.txt").read_text(encoding="utf-8").splitlines()[1:]
    pinned = dict(re.fullmatch(r"([a-z0-9-]+)==([0-9][\w.]*)", line).groups() for line in lines)
    assert list(pinned) == sorted(pinned) and pinned["torch"] != "2.13.0"
    needed = PROJECT["dependencies"] + PROJECT["optional-dependencies"]["test"][1:]
    for requirement in map(Requirement, needed + PROJECT["optional-dependencies"]["cluster"]):
        version = Version(pinned[requirement.name.lower().replace("_", "-")])
        assert requirement.specifier.contains(version), requirement
    conda = yaml.safe_load((ROOT / "locks/conda.yml").read_text(encoding="utf-8"))["dependencies"]
    assert {"pip": ["--requirement pip.txt"]} in conda


def test_every_description_has_the_version_of_the_package():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    codemeta = json.loads((ROOT / "codemeta.json").read_text(encoding="utf-8"))
    changes = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    (released, day), *_ = re.findall(r"^## (\d[\d.]*) \((\d{4}-\d\d-\d\d)\)$", changes, re.MULTILINE)
    assert PROJECT["version"] == citation["version"] == codemeta["version"] == released
    assert str(citation["date-released"]) == codemeta["dateModified"] == day
    assert codemeta["description"] == PROJECT["description"]


def test_hosts_of_the_code_run_its_own_checks():
    def steps(file):
        (job,) = yaml.safe_load((ROOT / ".github/workflows" / file).read_text(encoding="utf-8"))["jobs"].values()
        return [step.get("run", "") + step.get("uses", "") for step in job["steps"]]

    assert ".ci/run" in steps("ci.yml") and any("cibuildwheel" in step for step in steps("wheels.yml"))
    for form in (ROOT / ".github/ISSUE_TEMPLATE").glob("[!c]*.yml"):
        fields = yaml.safe_load(form.read_text(encoding="utf-8"))["body"]
        names = [field["id"] for field in fields]
        assert len(set(names)) == len(names) and all(field["attributes"]["label"] for field in fields)

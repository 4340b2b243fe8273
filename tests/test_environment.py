import ast
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

    Or in the extra that kernels are timed against. But triton: torch's builds for GPUs bring the version they need, and
    the kernel says where it is missing.
    """
    pip_names = {"yaml": "pyyaml", "PIL": "pillow", "open_clip": "open-clip-torch", "cleanfid": "clean-fid"}
    pip_names |= {"markdown_it": "markdown-it-py"}
    lines = PROJECT["dependencies"] + PROJECT["optional-dependencies"]["kernels"]
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

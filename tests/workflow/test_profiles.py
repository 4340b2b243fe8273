"""The profile for Kubernetes has settings of Snakemake, and where its plugins are installed, a plan is made by it."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from snakemake.cli import get_argument_parser

ROOT = Path(__file__).parents[2]
PROFILE = ROOT / "workflow" / "profiles" / "kubernetes"
OF_PLUGIN = "kubernetes-"


def test_every_setting_is_one_of_snakemake():
    told = yaml.safe_load((PROFILE / "config.yaml").read_text(encoding="utf-8"))
    known = {flag.removeprefix("--") for action in get_argument_parser()._actions for flag in action.option_strings}
    assert {key for key in told if not key.startswith(OF_PLUGIN)} <= known
    assert told["executor"] == "kubernetes" and told["default-storage-provider"] == "fs"
    volumes = [volume.partition(":")[2] for volume in told[f"{OF_PLUGIN}persistent-volumes"]]
    assert told["default-storage-prefix"] in volumes


def test_a_plan_is_made_by_the_plugin():
    pytest.importorskip("snakemake_executor_plugin_kubernetes")
    pytest.importorskip("snakemake_storage_plugin_fs")
    words = ["--workflow-profile", PROFILE, "--default-storage-prefix", ROOT, "--container-image", "example.org/quest"]
    words += ["--configfile", "workflow/config/smoke.yaml", "--dry-run", "--quiet", "rules"]
    run = subprocess.run(
        [sys.executable, "-m", "snakemake", *words], cwd=ROOT, capture_output=True, text=True, encoding="utf-8"
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert "This was a dry-run" in run.stdout + run.stderr

"""What Snakemake decides to run, decided by Snakemake itself."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
CONFIGS = sorted(file.stem for file in ROOT.glob("workflow/config/*.yaml"))


def cells(commands: list[str], script: str) -> set[str]:
    """The "method" or "method/bits" words of the commands of one script."""
    words = [shlex.split(command) for command in commands if f"workflow.scripts.{script} " in command]
    if script == "sample":
        return {re.search(r"([\w-]+)/w\d+a\d+/samples-\d+", " ".join(line))[1] for line in words}
    return {line[4] for line in words}


@pytest.mark.parametrize("name", CONFIGS)
def test_every_config_runs_its_own_recipes(project, name):
    """A default loaded beside another config would leak its recipes and cells into it."""
    options = [] if name == "default" else ["--configfile", f"workflow/config/{name}.yaml"]
    commands = project.planned(*options)
    config = project.config(name)
    quantized = [shlex.split(command) for command in commands if "workflow.scripts.quantize " in command]
    recipes = {line[4]: json.loads(line[line.index("--recipe") + 1]) for line in quantized}
    assert recipes == {method: recipe for method, recipe in config["methods"].items() if method != "fp"}
    assert {line[3] for line in quantized} == set(config["models"])
    grid = {method for block in config["grid"] for method in block["method"]}
    assert cells(commands, "metrics") == cells(commands, "sample") == grid
    assert all(f"results/{name}/" in command for command in commands)


def test_editing_a_recipe_reruns_that_method_and_a_comment_reruns_nothing(stubbed):
    done = stubbed.snakemake()
    assert done.returncode == 0, done.stdout + done.stderr
    assert stubbed.planned() == []

    file = stubbed.folder / "workflow/config/default.yaml"
    file.write_text("# A comment, and the same settings in another order.\n" + yaml.safe_dump(stubbed.config()))
    assert stubbed.planned() == []

    config = stubbed.config()
    config["methods"]["rtn"] = {"samples": 8}
    stubbed.write(config)
    commands = stubbed.planned()
    assert cells(commands, "quantize") == cells(commands, "sample") == cells(commands, "metrics") == {"rtn"}
    assert any("workflow.scripts.tables" in command for command in commands)
    assert not any("workflow.scripts.trajectories" in command for command in commands)

    config["methods"]["rtn"] = {}
    config["methods"]["rtn-mse"] = {"samples": 8}
    stubbed.write(config)
    assert cells(stubbed.planned(), "quantize") == {"rtn-mse", "quest"}  # quest starts from rtn-mse

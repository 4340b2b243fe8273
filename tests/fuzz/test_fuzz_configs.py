"""Configs that are changed at random: one line before anything starts, or accepted, planned and read by Snakemake."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from cases import damaged, mutated, refusals

from quest import config as configs
from quest.planning import costs, plan

pytestmark = pytest.mark.fuzz
ROOT = Path(__file__).parents[2]
CONFIGS = sorted((ROOT / "workflow/config").glob("*.yaml"))
NAMES = {configs.read(file)["name"] for file in CONFIGS}
BOMB = "a0: &a0 [x, x]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]\n" for i in range(1, 40)) + "name: *a39"
LINES = (
    "? [a, b]\n: 1|a: &a [*a]|<<: {name: x}|name: !!python/object/apply:os.system [true]|x: 2026-99-99|name: default|"
    "models: {}|\tname: x|- a|...|---|1: 2|~: 1|x: !!binary '='|x: !!set {a}|x: !!timestamp a|x: 1:99:99|%YAML 9.9|"
    f"\0|é: ü\u2028|x: *nowhere|grid: {'[' * 3000}{']' * 3000}|{BOMB}"
).split("|")


def config_file(draw, path: Path) -> dict | None:
    """Write a config that is changed at random, and return it; None where it is refused in one line."""
    text = draw.choice(CONFIGS).read_text(encoding="utf-8")
    kind = draw.randrange(10)
    if kind < 6:
        content = yaml.safe_dump(mutated(draw, yaml.safe_load(text)), sort_keys=False, allow_unicode=kind < 3).encode()
    elif kind == 6:
        content = damaged(draw, text.encode())
    elif kind == 7:
        content = text.encode(draw.choice(("utf-16", "utf-8-sig", "utf-32", "cp1252", "latin-1")), "replace")
    else:
        lines = text.split("\n")
        lines.insert(draw.randrange(len(lines)), draw.choice((draw.choice(lines), draw.choice(LINES))))
        content = "\n".join(lines).encode()
    path.write_bytes(content)
    with refusals(path, ""):
        configs.check_names([path])
        config = configs.read(path)
        configs.validate(config)
        return config


@pytest.mark.fuzz(share=5)
def test_configs(draw, tmp_path):
    config, known = config_file(draw, tmp_path / "config.yaml"), costs.read()
    if config is not None:
        cells = [*configs.runs(config), *configs.seed_runs(config), *configs.ablation_runs(config)]
        for run in cells + configs.starting_points(config, cells):
            assert re.fullmatch(r"[a-z0-9][a-z0-9-]*/[a-z0-9][a-z0-9@-]*/w\d+a\d+", run.path), run
            configs.start_of(config, run)
        plan.report(config, known, known[0]["machine"])


@pytest.mark.fuzz(share=0.02)  # Snakemake takes seconds to start
def test_snakemake_reads_what_is_accepted(draw, tmp_path):
    """All but a config with the name of another one in the repository."""
    path, config = tmp_path / "config.yaml", None
    while config is None or config["name"] in NAMES:
        config = config_file(draw, path)
    command = [sys.executable, "-m", "snakemake", "-n", "--quiet", "--nolock", "--configfile", path]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, encoding="utf-8")
    assert done.returncode == 0, done.stdout[-500:] + done.stderr[-500:]

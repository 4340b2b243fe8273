"""Every command in README.md, CONTRIBUTING.md and docs/ is one that the project understands.

A block ```sh holds one command to a line, for the root of a clone. Command lines are parsed by the program they call;
`pytest -m slow` also dry-runs those of Snakemake, and runs for real what stands in blocks ```sh run.
"""

import argparse
import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from quest.config import validate

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
# What installs or checks; .ci/run runs them.
TOOLS = {"pip", "pytest", "ruff", "snakefmt", "mkdocs"}


def blocks(kind: str) -> list[tuple[str, str]]:
    """(page and line, text) of every fenced block of a kind, such as "sh" or "sh run"."""
    found = []
    for page in PAGES:
        for match in re.finditer(
            rf"^```{kind}\n(.*?)^```$", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE
        ):
            line = page.read_text(encoding="utf-8")[: match.start()].count("\n") + 2
            found.append((f"{page.relative_to(ROOT)}:{line}", match[1]))
    return found


def commands(*kinds: str) -> list[tuple[str, list[str]]]:
    """(page and line, words) of each command, without comments."""
    found = []
    for kind in kinds:
        for place, text in blocks(kind):
            page, first = place.split(":")
            for number, line in enumerate(text.splitlines(), int(first)):
                words = shlex.split(line, comments=True)
                found += [(f"{page}:{number}", words)] if words else []
    return found


COMMANDS = commands("sh", "sh run")
MODULES = [(place, words[2:]) for place, words in COMMANDS if words[:2] == ["python", "-m"]]
SNAKEMAKE = {tuple(words[1:]): place for place, words in COMMANDS if words[0] == "snakemake"}


def test_every_block_is_understood():
    assert len(SNAKEMAKE) >= 8 and len(MODULES) >= 5
    strange = [(place, words[0]) for place, words in COMMANDS if words[0] not in {*TOOLS, "snakemake", "python"}]
    assert strange == []
    for page in PAGES:  # a block of another kind would hide its commands
        kinds = set(re.findall(r"^```(\S+.*)$", page.read_text(encoding="utf-8"), re.MULTILINE))
        assert kinds <= {"sh", "sh run", "python", "yaml", "mermaid"}, page


def test_every_picture_has_alternative_text():
    found = [
        (page.name, alt) for page in PAGES for alt in re.findall(r"!\[(.*?)\]\(", page.read_text(encoding="utf-8"))
    ]
    assert len(found) > 10
    assert [page for page, alt in found if len(alt) < 10] == []


class Parsed(Exception):
    """The command line was accepted."""


@pytest.mark.parametrize("place, words", MODULES, ids=[place for place, _ in MODULES])
def test_modules_accept_their_command_lines(place, words, monkeypatch):
    accept = argparse.ArgumentParser.parse_args

    def parse(parser, *arguments):
        accept(parser, *arguments)  # exits where it refuses
        raise Parsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse)
    monkeypatch.setattr(sys, "argv", words)
    name = f"{words[0]}.__main__" if words[0] == "quest" else words[0]
    monkeypatch.delitem(sys.modules, name, raising=False)  # runpy warns of a module that was imported before
    with pytest.raises(Parsed):
        runpy.run_module(name, run_name="__main__")


# What acts on a lock or on a finished run has nothing to plan; a profile needs its plugin, see tests/cluster.
ACTING = {"--unlock", "--report", "--workflow-profile"}


def test_snakemake_accepts_its_command_lines():
    """Options are Snakemake's, targets are rules or results, configs are valid. `-m slow` dry-runs them."""
    from snakemake.cli import parse_args

    files = [ROOT / "Snakefile", *ROOT.glob("workflow/rules/*.smk")]
    rules = {
        name
        for file in files
        for name in re.findall(r"^(?:use rule \w+ as|rule) (\w+)", file.read_text(encoding="utf-8"), re.MULTILINE)
    }
    for line, place in SNAKEMAKE.items():
        _, given = parse_args(list(line))
        for target in given.targets:
            assert target in rules or target.startswith("results/"), f"{place}: {target}"
        for config in given.configfile or []:
            validate(yaml.safe_load((ROOT / config).read_text(encoding="utf-8")))


# One process for all: each alone would import Snakemake anew.
DRY_RUNS = """
import json, sys
from snakemake.cli import main
failed = []
for line in json.load(sys.stdin):
    print("##", *line, flush=True)
    try:
        main(line)
    except SystemExit as end:
        failed += [" ".join(line)] if end.code else []
print("FAILED", failed)
"""


@pytest.mark.slow
def test_snakemake_plans_its_command_lines(tmp_path):
    project = tmp_path / "project"
    project.mkdir()
    for name in ("Snakefile", "environment.yml", "README.md"):
        shutil.copy(ROOT / name, project)
    for name in ("workflow", "quest", "baselines"):
        shutil.copytree(ROOT / name, project / name, ignore=shutil.ignore_patterns("__pycache__"))
    (project / "resources").symlink_to(ROOT / "resources")
    lines = [["--dry-run", *line] for line in SNAKEMAKE if not ACTING & set(line)]
    run = subprocess.run(
        [sys.executable, "-c", DRY_RUNS],
        cwd=project,
        input=json.dumps(lines),
        env=os.environ | {"PYTHONPATH": str(project)},
        capture_output=True,
        text=True,
        encoding="utf-8",
    )
    assert "FAILED []" in run.stdout, run.stdout[-5000:] + run.stderr


def test_the_matrix_of_the_readme_is_what_the_records_decide():
    from quest.config import read
    from quest.config.settled import families
    from quest.report.settle import cells, verdicts

    pairs = families(read(ROOT / "workflow/config/settle.yaml"))
    settled = verdicts.frame(cells.read(ROOT / "results/settled"), pairs)
    rows = settled[settled["method"] == "quest-token"]
    found = rows.set_index(["model", "versus", "endpoint"])[["verdict", "seeds"]]
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    lines = re.findall(r"^\| (\S+), (\d) seeds \| ([\w -]+) \| (.*) \| (.*) \| (.*) \| (.*) \|$", text, re.MULTILINE)
    assert {model for model, *_ in lines} == set(rows["model"]) - {verdicts.ALL}
    signs = {"better": "▲", "worse": "▼", "equivalent": "=", "open": "○"}
    asked = {"photos-class": "agreement", "emoji-text": "retrieval", "emoji-uncond": "none"}
    for model, seeds, label, *marks in lines:
        for endpoint, mark in zip(("kid_64w", "log_latent_mse", "psnr", asked[model]), marks, strict=True):
            key = (model, label, endpoint)
            assert mark == (signs[found["verdict"][key]] if key in found.index else ""), key
        assert int(seeds) == rows[(rows["model"] == model)]["seeds"].max()


def test_python_blocks_are_python():
    texts = [(place, text) for place, text in blocks("python") if text.startswith("import")]
    assert texts
    for place, text in texts:
        compile(text, place, "exec")


def test_what_pages_link_to_is_there():
    for page in PAGES:
        text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
        for address in re.findall(r"\]\(([^)\s]+)\)", text):
            if not address.startswith("https://"):
                file, _, anchor = address.partition("#")
                target = page.parent / file if file else page
                assert target.exists(), f"{page.name}: {address}"
                heads = re.findall(r"^#+ (.*)$", target.read_text(encoding="utf-8"), re.MULTILINE) if anchor else []
                slugs = {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}
                assert not anchor or anchor in slugs, f"{page.name}: {address}"


def test_files_that_pages_name_in_commands_are_there():
    """Configs, scripts and tests; what a run or a person puts there is not."""
    for place, words in COMMANDS:
        for word in words:
            if word.startswith(("workflow/", "tests/", "quest/", "resources/")):
                assert (ROOT / word).exists(), f"{place}: {word}"


@pytest.mark.slow
@pytest.mark.parametrize("place, words", commands("sh run"), ids=[place for place, _ in commands("sh run")])
def test_commands_that_run_anywhere_run(place, words):
    words = [sys.executable, *words[1:]] if words[0] == "python" else [sys.executable, "-m", *words]
    run = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, encoding="utf-8")
    assert run.returncode == 0, run.stdout + run.stderr


@pytest.mark.slow
def test_python_blocks_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for place, text in blocks("python"):
        if text.startswith("import"):
            exec(compile(text, place, "exec"), {})

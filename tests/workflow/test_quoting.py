"""Whatever a config names reaches its script as one word: nothing in it is split, expanded or run by the shell."""

import re
import shlex
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
RULES = sorted([ROOT / "Snakefile", *ROOT.glob("workflow/rules/*.smk")])
HOSTILE = "inputs/it's my $(touch RAN); touch RAN #"


@pytest.mark.parametrize("file", RULES, ids=lambda file: file.name)
def test_every_field_of_every_shell_command_is_quoted(file):
    """Redirections to logs among them. Double braces are the shell's own."""
    text = file.read_text(encoding="utf-8")
    blocks = re.findall(r"^    shell:\n((?:        .*\n?)+)", text, re.MULTILINE)
    assert len(blocks) == len(re.findall(r"^\s*shell:", text, re.MULTILINE))
    fields = [field for block in blocks for field in re.findall(r"(?<!\{)\{([^{}]+)\}", block)]
    assert fields or not blocks
    assert [field for field in fields if not field.endswith(":q")] == []


def config_of(folder: Path) -> dict:
    return {
        "name": "quoted",
        "models": {
            "tiny-sd": {
                "images": 2,
                "trajectories": 4,
                "evaluation": 2,
                "checkpoint": f"{folder}/x.ckpt",
                "tokenizer": f"{folder}/tokenizer",
            },
        },
        "grid": [
            {"model": ["tiny-sd"], "method": ["fp"], "bits": ["w32a32"]},
            {"model": ["tiny-sd"], "method": ["rtn"], "bits": ["w8a8"]},
        ],
        "methods": {"fp": {}, "rtn": {"samples": 2}},
    }


def test_paths_are_single_words_of_the_commands(stubbed):
    config = config_of(Path(HOSTILE))
    config["models"]["sd14"] = config["models"].pop("tiny-sd") | {
        "captions": f"{HOSTILE}/c.txt",
        "reference": f"{HOSTILE}/real images",
    }
    for block in config["grid"]:
        block["model"] = ["sd14"]
    stubbed.write("mine.yaml", yaml.safe_dump(config))
    commands = stubbed.planned("--configfile", "mine.yaml")
    assert not (stubbed.folder / "RAN").exists()
    (model,) = [shlex.split(command) for command in commands if "scripts.model " in command]
    for option, name in (("--checkpoint", "x.ckpt"), ("--tokenizer", "tokenizer"), ("--captions", "c.txt")):
        assert model[model.index(option) + 1] == f"{HOSTILE}/{name}"
    (reference,) = [shlex.split(command) for command in commands if "scripts.reference " in command]
    assert reference[3] == f"{HOSTILE}/real images"


@pytest.mark.slow
def test_a_cell_is_made_of_files_in_such_a_folder(project):
    import torch

    from quest.diffusion import random_checkpoints

    folder = project.folder / HOSTILE
    folder.mkdir(parents=True)
    (folder / "tokenizer").symlink_to(ROOT / "resources/zoo/scenes-text/tokenizer")
    torch.save({"state_dict": random_checkpoints.state_dict("tiny-sd")}, folder / "x.ckpt")
    project.write("mine.yaml", yaml.safe_dump(config_of(Path(HOSTILE))))
    run = project.snakemake("results/quoted/tiny-sd/rtn/w8a8/metrics.json", "--configfile", "mine.yaml", timeout=600)
    assert run.returncode == 0, run.stdout
    assert not (project.folder / "RAN").exists()


def test_the_leaderboard_samples_the_fresh_images_that_were_drawn(stubbed):
    """Their number is known when the job runs, not when it is planned; the judged images are those of the protocol."""
    files = {part: f"results/scored/full/samples-{part}.npz" for part in ("fresh", "judged")}
    run = stubbed.snakemake(*files.values())
    assert run.returncode == 0, run.stdout
    words = {part: shlex.split((stubbed.folder / file).read_text(encoding="utf-8")) for part, file in files.items()}
    firsts = {part: found[found.index("--first") + 1] for part, found in words.items()}
    drawn = (stubbed.folder / "results/scored/draw.txt").read_text(encoding="utf-8").strip()
    assert firsts == {"fresh": drawn, "judged": "500"}


def test_the_leaderboard_reads_images_that_were_sent_and_samples_none(stubbed):
    stubbed.write("results/leaderboard/sent/entry.yaml", yaml.safe_dump({"images": "images", "bits": "w4a4"}))
    (stubbed.folder / "results/leaderboard/sent/images").mkdir()
    commands = stubbed.planned("results/scored/sent/metrics.json")
    assert any("leaderboard results/leaderboard/sent --images results/scored/sent" in c for c in commands)
    sampled = [c for c in commands if "scripts.sample " in c]
    assert len(sampled) == 1 and "results/scored/full/samples-judged.npz" in sampled[0]
    (measured,) = [c for c in commands if "scripts.metrics " in c]
    assert "results/scored/sent/samples-images.npz" in measured

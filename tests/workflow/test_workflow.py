"""What Snakemake decides to run, decided by Snakemake itself."""

import json
import os
import re
import resource
import shlex
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from quest.config import runs, starting_points
from quest.diffusion.models import find
from quest.metrics import LITE0, METRICS
from quest.planning import plan

ROOT = Path(__file__).parents[2]
CONFIGS = sorted(file.stem for file in ROOT.glob("workflow/config/*.yaml"))
ALL_METHODS = {"fp", "rtn", "rtn-mse", "quest-suite"}


def of(commands: list[str], script: str) -> list[list[str]]:
    """The commands of one script, in words."""
    return [shlex.split(command) for command in commands if f"workflow.scripts.{script} " in command]


def methods(commands: list[str], script: str) -> set[str]:
    """The methods whose cells one script would make."""
    if script == "sample":
        return {re.search(r"([\w-]+)/w\d+a\d+/samples-\d+", " ".join(words))[1] for words in of(commands, script)}
    return {words[4] for words in of(commands, script)}


@pytest.mark.parametrize("name", CONFIGS)
def test_every_config_runs_its_own_recipes(stubbed, name):
    """A default loaded beside another config would leak its recipes and cells into it."""
    commands = stubbed.planned(*([] if name == "default" else ["--configfile", f"workflow/config/{name}.yaml"]))
    config = stubbed.config(name)
    recipes = {(words[4], words[words.index("--recipe") + 1]) for words in of(commands, "quantize")}
    used = {run.method for run in runs(config) + starting_points(config, runs(config))}
    rows = {name: dict(recipe) for name, recipe in config["methods"].items() if name in used - {"fp"}}
    assert recipes == {(row.pop("method", name), json.dumps(row, sort_keys=True)) for name, row in rows.items()}
    # What another method starts from keeps float weights.
    starts = [f"results/{name}/{run.path}/model.safetensors" for run in starting_points(config, runs(config))]
    made = {words[words.index("-o") + 1] for words in of(commands, "quantize") if "--floats" in words}
    assert made == set(starts)
    made = {tuple(words[3:6]) for words in of(commands, "metrics")}
    assert made == {(run.model, run.method, run.bits) for run in runs(config)}
    images = {words[3]: int(words[words.index("-n") + 1]) for words in of(commands, "sample")}
    assert images == {model: settings["images"] for model, settings in config["models"].items()}
    # What configs share lies beside their folders: prepared models, fetched networks, statistics of real images.
    shared = tuple(f"workflow.scripts.{script} " for script in ("model", "network", "reference"))
    assert all(f"results/{name}/" in command for command in commands if not any(script in command for script in shared))
    assert {words[3] for words in of(commands, "model")} == {m for m in config["models"] if find(m).origin}
    # The plan's numbers of jobs are Snakemake's.
    planned = plan.jobs(config)
    of_cells = ("model", "network", "reference", "trajectories", "quantize", "sample", "metrics")
    scripts = {*of_cells, "tables", "curves", "grid"}
    planned["trajectories"] += planned["evaluation"]  # of one script
    assert {script: len(of(commands, script)) for script in scripts} == {script: planned[script] for script in scripts}
    (curves,) = of(commands, "curves")
    drawn = {Path(word).stem.removesuffix("_vs_bits") for word in curves if word.endswith("_vs_bits.png")}
    undrawn = {
        "precision",
        "recall",
        "fid_infinity",
        "fd_64w",
        "lite0_distance",
        "log_latent_mse",
        "agreement",
        "retrieval",
    }
    undrawn |= {"guided_eps_error"}
    whether_lite0 = {find(model).extractor in LITE0 for model in config["models"]}
    undrawn |= set() if True in whether_lite0 else {"kid_64w", "fd_64w_to_fp"}
    undrawn |= set() if False in whether_lite0 else {"fid", "sfid", "fid_to_fp"}
    if not any(find(model).clip for model in config["models"]):
        undrawn.add("clip")
    if not any(settings.get("keep_images", True) for settings in config["models"].values()):
        undrawn.add("psnr")
    # settle.yaml has no cells of its own but full precision.
    assert drawn == (set(METRICS) - undrawn if any(run.method != "fp" for run in runs(config)) else set())


def test_nothing_runs_twice_and_a_comment_reruns_nothing(finished):
    assert finished.planned() == []
    file = finished.folder / "workflow/config/default.yaml"
    reordered = yaml.safe_dump(finished.config(), sort_keys=True)
    assert reordered != file.read_text(encoding="utf-8")
    file.write_text("# A comment, and the same settings in another order.\n" + reordered, encoding="utf-8")
    assert finished.planned() == []


@pytest.mark.parametrize(
    "edited, rerun", [("rtn", {"rtn"}), ("rtn-mse", {"rtn-mse", "quest-suite"}), ("quest-suite", {"quest-suite"})]
)
def test_editing_a_recipe_reruns_that_method_and_what_starts_from_it(finished, edited, rerun):
    config = finished.config()
    config["methods"][edited]["samples"] = 8
    finished.configure(config)
    commands = finished.planned()
    assert {script: methods(commands, script) for script in ("quantize", "sample", "metrics")} == {
        "quantize": rerun,
        "sample": rerun,
        "metrics": rerun,
    }
    assert (len(of(commands, "tables")), len(of(commands, "trajectories"))) == (1, 0)


def test_adding_a_method_runs_that_method(finished):
    config = finished.config()
    config["grid"].append({"model": ["scenes-class"], "method": ["rtn"], "bits": ["w8a8"]})
    finished.configure(config)
    commands = finished.planned()
    assert [words[3:6] for words in of(commands, "quantize")] == [["scenes-class", "rtn", "w8a8"]]
    assert len(of(commands, "tables")) == 1


def test_a_retrained_model_reruns_its_cells(finished):
    finished.write("resources/zoo/scenes-class/unet/weights.safetensors", "trained for longer")
    assert methods(finished.planned(), "sample") == ALL_METHODS


def test_editing_a_script_reruns_its_rule(finished):
    finished.write(
        "workflow/scripts/metrics.py",
        (finished.folder / "workflow/scripts/metrics.py").read_text(encoding="utf-8") + "#\n",
    )
    commands = finished.planned()
    assert methods(commands, "metrics") == ALL_METHODS
    assert of(commands, "sample") == []


STUB_MODEL = """
import sys
from pathlib import Path
folder = Path(sys.argv[sys.argv.index("-o") + 1])
folder.mkdir(parents=True)
(folder / "model_index.json").write_text("{}")
"""


def test_more_images_of_a_model_that_does_not_ship_are_sampled_and_nothing_else(stubbed):
    stubbed.write("workflow/scripts/model.py", STUB_MODEL)
    stubbed.write("results/networks/inception.json", "{}")
    stubbed.write("results/networks/ViT-B-16.json", "{}")
    for name in ("x.ckpt", "tokenizer/vocab.json", "c.txt"):
        stubbed.write(f"inputs/{name}", "")
    settings = {"checkpoint": "inputs/x.ckpt", "tokenizer": "inputs/tokenizer", "captions": "inputs/c.txt"}
    config = {
        "name": "default",
        "models": {"sd14": {"images": 8, "reference": "none"} | settings},
        "grid": [
            {"model": ["sd14"], "method": ["fp"], "bits": ["w32a32"]},
            {"model": ["sd14"], "method": ["rtn"], "bits": ["w4a4"]},
        ],
        "methods": {"fp": {}, "rtn": {}},
    }
    stubbed.configure(config)
    run = stubbed.snakemake()
    assert run.returncode == 0, run.stdout
    assert stubbed.planned() == []
    config["models"]["sd14"]["images"] = 16
    stubbed.configure(config)
    assert scripts_of(stubbed.planned()) == {"sample", "metrics", "tables", "curves", "grid"}


GROWING = """
import sys
from pathlib import Path
for option in ("--samples", "--features"):
    file = Path(sys.argv[sys.argv.index(option) + 1])
    had = file.read_text(encoding="utf-8") if file.exists() else ""
    file.write_text(had + sys.argv[sys.argv.index("-n") + 1] + " ", encoding="utf-8")
"""


def test_what_was_drawn_lies_there_when_more_is_drawn(finished):
    finished.write("workflow/scripts/sample.py", GROWING)
    target = "results/default/scenes-class/rtn/w4a4/samples-0.npz"
    for images, found in ((500, "500 "), (1000, "500 1000 ")):
        config = finished.config()
        config["models"]["scenes-class"]["images"] = images
        finished.configure(config)
        if images == 500:
            for kind in ("samples", "features"):
                (finished.folder / f"results/default/scenes-class/rtn/w4a4/{kind}-0.npz").unlink()
        run = finished.snakemake(target)
        assert run.returncode == 0, run.stdout
        assert (finished.folder / target).read_text(encoding="utf-8") == found


def scripts_of(commands):
    return {re.search(r"scripts\.(\w+)", command)[1] for command in commands}


# What a key of a model says is sampled, measured or drawn with, and what is made again where it has another value.
@pytest.mark.parametrize(
    "changed, again",
    [
        ({"images": 1000}, {"sample"}),
        ({"shards": 2}, {"sample"}),
        ({"keep_images": False}, {"sample"}),
        ({"evaluation": 4}, {"trajectories", "sample"}),
        ({"trajectories": 4}, {"trajectories", "quantize", "sample"}),
    ],
)
def test_a_setting_of_a_model_reruns_what_depends_on_it(finished, changed, again):
    config = finished.config()
    config["models"]["scenes-class"] |= changed
    finished.configure(config)
    commands = finished.planned()
    assert scripts_of(commands) - {"metrics", "tables", "curves", "grid"} == again
    assert {"metrics", "tables"} <= scripts_of(commands)
    if "evaluation" in changed:
        (held_out,) = of(commands, "trajectories")
        assert "--calibration" not in held_out and held_out[held_out.index("-e") + 1] == "4"


def test_a_file_that_is_not_there_stops_a_run_before_its_first_job(stubbed):
    """A plan needs none of them; tests above make one of this config."""
    run = stubbed.snakemake("--configfile", "workflow/config/paper.yaml")
    assert run.returncode != 0 and "Traceback" not in run.stdout and "rule " not in run.stdout
    (line,) = [line for line in run.stdout.splitlines() if "inputs/" in line]
    for key in ("imagenet.checkpoint", "imagenet.reference", "sd14.tokenizer", "sd14.captions"):
        assert f"models.{key}: no inputs/" in line


def test_a_key_that_stands_twice_stops_a_run(stubbed):
    stubbed.write("mine.yaml", yaml.safe_dump(stubbed.config() | {"name": "mine"}) + "device: cpu\ndevice: cuda\n")
    run = stubbed.snakemake("--configfile", "mine.yaml", "--dry-run")
    assert run.returncode != 0 and "Traceback" not in run.stdout
    assert re.search(r"mine.yaml, line \d+: key 'device' stands twice, first in line \d+", run.stdout)


def test_another_quantization_seed_has_its_own_calibration_and_start(stubbed):
    config = stubbed.config("scenes") | {"name": "default", "models": {"scenes-class": {"images": 500}}}
    cells = {"fp": "w32a32", "quest-suite": "w4a4"}
    config["grid"] = [{"model": ["scenes-class"], "method": [m], "bits": [bits]} for m, bits in cells.items()]
    config["seeds"] = {"method": ["quest-suite"], "bits": ["w4a4"], "seed": [0, 1]}
    stubbed.configure(config)
    assert not any("@1" in command for command in stubbed.planned())
    commands = stubbed.planned("seeds")
    assert {words[words.index("--draw") + 1] for words in of(commands, "trajectories") if "--draw" in words} == {"1"}
    cell = "results/default/scenes-class"
    made = {words[words.index("-o") + 1].removeprefix(f"{cell}/"): words for words in of(commands, "quantize")}
    assert set(made) == {
        f"{method}/{bits}/model.safetensors"
        for method, bits in [
            ("adaround", "w4a32"),
            ("adaround@1", "w4a32"),
            ("quest-suite", "w4a4"),
            ("quest-suite@1", "w4a4"),
        ]
    }
    again = made["quest-suite@1/w4a4/model.safetensors"]
    assert json.loads(again[again.index("--recipe") + 1]) == {"init": "adaround", "seed": 1}
    assert again[again.index("--calibration") + 1] == f"{cell}/calibration-1.safetensors"
    assert again[again.index("--init") + 1] == f"{cell}/adaround@1/w4a32/model.safetensors"
    first = made["quest-suite/w4a4/model.safetensors"]
    assert json.loads(first[first.index("--recipe") + 1]) == {"init": "adaround"}
    (table,) = (words for words in of(commands, "tables") if "seeds" in words)
    # Full precision stands beside them: no method that is beyond it is called better than another that is.
    rows = ["quest-suite/w4a4", "quest-suite@1/w4a4", "fp/w32a32"]
    assert table[3:6] == [f"{cell}/{row}/metrics.json" for row in rows]


def test_the_report_takes_what_is_there_and_starts_nothing_else(finished):
    run = finished.snakemake("report")
    assert run.returncode == 0, run.stdout
    assert "results/default --kernels -o" in (finished.folder / "results/default/report.html").read_text(
        encoding="utf-8"
    )
    # A table that `snakemake seeds` made, and measured kernels: the report is made again, the seeds are not.
    finished.write("results/default/tables/seeds.csv", "")
    finished.write("results/kernels/cpu.csv", "")
    (command,) = finished.planned("report")
    assert "--kernels results/kernels/cpu.csv -o results/default/report.html" in command


def test_ablations_reuse_the_default_cells_and_change_one_thing_each(stubbed):
    rows = stubbed.config()["ablations"]["rows"]
    stubbed.write("results/default/photos-class/quest-joint/w4a4/metrics.json", "")
    commands = stubbed.planned("ablations", "paper_tables")
    cell = "results/default/photos-class"
    made_at = {words[words.index("-o") + 1]: words for words in of(commands, "quantize")}
    quantized = {path.removeprefix(f"{cell}/"): words for path, words in made_at.items()}
    bases = {"adaround/w4a32", "adaround-ndtc/w4a32", "quest-suite/w4a4", "q-diffusion/w4a4", "ptq4dm/w4a4"}
    expected = {f"{path}/model.safetensors" for path in bases | {f"{row}/w4a4" for row in rows}}
    assert expected <= set(quantized)

    def made(row):
        words = quantized[f"{row}/w4a4/model.safetensors"]
        init = words[words.index("--init") + 1].removeprefix(f"{cell}/")
        return words[4], json.loads(words[words.index("--recipe") + 1]), init

    start = "adaround/w4a32/model.safetensors"
    assert made("quest-groups-1") == ("quest-suite", {"init": "adaround", "time_groups": 1}, start)
    assert made("q-diffusion-released") == ("q-diffusion", {"init": "adaround", "granularity": "released"}, start)
    assert made("qalora") == ("qalora", {"init": "adaround"}, start)
    (table,) = of(commands, "ablations")
    assert json.loads(table[table.index("--ablations") + 1])["rows"] == rows
    assert table[3:5] == [f"{cell}/quest-suite/w4a4/metrics.json", f"{cell}/q-diffusion/w4a4/metrics.json"]
    # The paper's tables take the rows that were there, and wait for no others.
    (paper,) = of(commands, "tables")
    grid = {f"results/default/{run.path}/metrics.json" for run in runs(stubbed.config())}
    assert set(paper[3 : paper.index("--kind")]) == grid | {f"{cell}/quest-joint/w4a4/metrics.json"}


def test_questions_take_the_rows_that_have_been_run(stubbed):
    row = "results/default/photos-class/quest-wide/w4a4/metrics.json"
    stubbed.write(row, "{}")
    commands = stubbed.planned("questions")
    (answers,) = of(commands, "questions")
    cells = answers[answers.index("--cells") + 1 : answers.index("--taylor")]
    assert row in cells and "results/default/photos-class/q-diffusion/w4a4/metrics.json" in cells
    assert not any("quest-joint" in cell for cell in cells)
    # Photographs do not ship, so that finetuning has no other data than trajectories; scenes are drawn.
    assert not any("--data" in words for words in of(commands, "tuning"))
    drawn = of(stubbed.planned("questions", "--configfile", "workflow/config/scenes.yaml"), "tuning")
    assert {words[words.index("--data") + 1] for words in drawn if "--data" in words} == {"scenes", "noise"}
    for script in ("activations", "temporal", "sensitivity"):
        assert {words[3] for words in of(commands, script)} == set(stubbed.config()["models"])
    del (config := stubbed.config())["questions"]
    stubbed.configure(config)
    run = stubbed.snakemake("--dry-run", "questions")
    assert run.returncode != 0 and "questions: the config has no such key" in run.stdout


def test_a_second_run_of_the_default_grid_takes_seconds(stubbed):
    """In seconds of CPU, so that a busy machine does not fail it. Files stand in for what a first run leaves."""
    listed = stubbed.snakemake("--summary").stdout
    outputs = re.findall(r"^results/default/\S+", listed, flags=re.MULTILINE)
    assert len(outputs) > 100
    for output in outputs:
        stubbed.write(output, "")
    now = time.time()
    for output in outputs:
        os.utime(stubbed.folder / output, (now, now))
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    again = stubbed.snakemake(alone=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert "Nothing to be done" in again.stdout
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 10


def test_a_login_node_never_imports_torch(stubbed):
    stubbed.write("torch.py", "raise RuntimeError('torch was imported')")
    assert subprocess.run([sys.executable, "-c", "import torch"], **environment(stubbed)).returncode == 1
    profile = ["--workflow-profile", "workflow/profiles/slurm"]
    assert stubbed.planned(*profile, "--configfile", "workflow/config/paper.yaml", alone=True)
    # What local rules import; those of tables and figures run in test_scripts.py.
    code = "import quest.report.seeds, quest.metrics.weights"
    assert subprocess.run([sys.executable, "-c", code], **environment(stubbed)).returncode == 0


def environment(project):
    """Where and with what the project's own scripts run."""
    return {key: project.command()[key] for key in ("cwd", "env")}


def test_null_controls_sample_full_precision_in_other_ways(stubbed):
    """100 images each, and nothing is quantized for them. Tables take floors that exist, and make none."""
    commands = stubbed.planned("nulls")
    sampled = re.findall(r"scripts\.sample .* --null (\S+) -n 100", "\n".join(commands))
    assert sorted(sampled) == sorted(3 * ["batches", "threads", "isa", "bf16"])
    assert not any("scripts.quantize" in command for command in commands)
    assert sum("scripts.metrics" in command and " --null " in command for command in commands) == len(sampled)


def test_rankings_start_from_tables_and_checkpoints_of_the_grid(finished):
    commands = finished.planned("rankings")
    assert [re.search(r"scripts\.(\w+)", command)[1] for command in commands] == ["layer_errors", "rankings"]
    assert len(re.findall(r"w4a4/model\.safetensors", commands[0])) == 3


def test_lint(stubbed):
    run = stubbed.snakemake("--lint")
    assert run.returncode == 0, run.stdout


@pytest.mark.slow
def test_the_smoke_config_runs_from_beginning_to_end(project):
    run = project.snakemake("--configfile", "workflow/config/smoke.yaml", timeout=900)
    assert run.returncode == 0, run.stdout
    main = (project.folder / "results/smoke/tables/main.csv").read_text(encoding="utf-8")
    assert all(f"scenes-class,{cell}," in main for cell in ("fp,w32a32", "rtn,w4a4", "quest-suite,w4a4"))

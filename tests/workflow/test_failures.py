"""What a user sees of jobs and configs that fail, and what a run that was killed does next."""

import os
import re
import signal
import subprocess
import time
from types import SimpleNamespace

import pandas as pd
import pytest
import yaml

from quest.runtime.files import read_arrays


def test_memory_and_time_grow_with_every_attempt(stubbed):
    stubbed.write("workflow/scripts/trajectories.py", "raise SystemExit('no')")
    said = stubbed.snakemake("--retries", "2", "results/default/photos-class/calibration.safetensors").stdout
    assert re.findall(r"runtime=(\d+)", said) == ["30", "60", "90"]
    assert re.findall(r"mem_mb=(\d+)", said) == ["2000", "4000", "6000"]


def test_an_empty_output_is_no_output(stubbed):
    stubbed.write("workflow/scripts/trajectories.py", STUB_EMPTY)
    run = stubbed.snakemake("results/default/photos-class/calibration.safetensors")
    assert run.returncode != 0 and "empty" in run.stdout
    assert not (stubbed.folder / "results/default/photos-class/calibration.safetensors").exists()


STUB_EMPTY = """
import sys
from pathlib import Path
for option in ("--calibration", "--evaluation", "--ranges"):
    Path(sys.argv[sys.argv.index(option) + 1]).touch()
"""


def test_a_fault_in_a_config_is_one_line_before_any_job(stubbed):
    config = stubbed.config()
    config["methods"]["quest-suite"]["lr_wieght"] = 1
    stubbed.configure(config)
    run = stubbed.snakemake()
    assert run.returncode != 0 and "Traceback" not in run.stdout and "rule " not in run.stdout
    (line,) = [line for line in run.stdout.splitlines() if "lr_wieght" in line]
    assert "methods.quest" in line and "did you mean 'lr_weight'" in line and "cma_iterations" in line


def test_two_configs_with_one_name(stubbed):
    stubbed.write("mine.yaml", yaml.safe_dump(stubbed.config()))
    run = stubbed.snakemake("--dry-run", "--configfile", "mine.yaml")
    assert run.returncode != 0 and "Traceback" not in run.stdout
    (line,) = [line for line in run.stdout.splitlines() if "'default'" in line]
    assert "mine.yaml" in line and "workflow/config/default.yaml" in line


def test_a_layer_that_no_model_has_stops_the_run_before_its_first_job(project):
    config = project.config("smoke")
    config["methods"]["quest-suite"]["keep"] = {"conv_inn": 8}
    project.write("mine.yaml", yaml.safe_dump(config | {"name": "mine"}))
    run = project.snakemake("--configfile", "mine.yaml")
    said = "quest-suite on scenes-class: keep: no layer is named like 'conv_inn'; names are such as "
    assert run.returncode != 0 and said in run.stdout and "Traceback" not in run.stdout
    assert not (project.folder / "results").exists()


def test_a_job_asks_for_what_the_plan_has_and_stops_the_run_where_memory_is_too_little(project):
    rows = "rule,model,method,bits,least_mb,mem_mb,runtime\nquantize,scenes-class,rtn,w4a4,5000,6000,77\n"
    project.write("results/smoke/jobs.csv", rows)
    smoke = ("--configfile", "workflow/config/smoke.yaml")
    asked = project.snakemake("--dry-run", *smoke, "--forcerun", "quantize").stdout
    no_gpu = "gpu=0, gpu_parts=0, gres="
    assert f"runtime=77, {no_gpu}, mem_mb=6000," in asked and f"runtime=60, {no_gpu}, mem_mb=3000," in asked
    run = project.snakemake(*smoke, "--config", "memory=4GB")
    said = "quantize smoke scenes-class rtn w4a4: needs 5.0 GB; memory: 4.0 GB is too little"
    assert run.returncode != 0 and said in run.stdout
    assert [file.name for file in (project.folder / "results/smoke").iterdir()] == ["jobs.csv"]


def test_jobs_share_a_gpu_where_the_plan_says_that_they_fit(project):
    """A job that fills most of a GPU has it for itself, and so does one without a plan."""
    rows = "rule,model,method,bits,least_mb,mem_mb,runtime\n"
    for method, size in (("rtn", 21000), ("quest-suite", 70000)):
        rows += f"quantize,scenes-class,{method},w4a4,9000,{size},77\n"
    project.write("results/mine/jobs.csv", rows)
    config = project.config("smoke") | {"name": "mine", "device": "cuda", "share_gpu": {"memory": "80GB", "parts": 4}}
    project.write("mine.yaml", yaml.safe_dump(config))
    said = project.snakemake("--dry-run", "--printshellcmds", "--configfile", "mine.yaml").stdout
    resources = r"gpu=(\d), gpu_parts=(\d), gres=([a-z:\d]*), .*"
    command = r"Shell command: QUEST_GPU_PARTS=(\d)/\$PARTS_OF_GPU python -m workflow\.scripts\.(\w+ \S+ \S+)"
    found = {job: tuple(asked) for *asked, job in re.findall(f"{resources}\n{command}", said)}
    assert found["quantize scenes-class rtn"] == ("0", "2", "shard:2", "2"), said
    whole = "1", "4", "", "4"
    assert found["quantize scenes-class quest-suite"] == found["trajectories scenes-class -n"] == whole
    # What the executor for Slurm makes of it.
    slurm = pytest.importorskip("snakemake_executor_plugin_slurm.utils")
    attributes = type("Resources", (dict,), {"__getattr__": dict.get})
    for asked, said in ((found["quantize scenes-class rtn"], " --gres=shard:2"), (whole, " --gpus=1")):
        job = SimpleNamespace(resources=attributes(gpu=int(asked[0]), gpu_parts=int(asked[1]), gres=asked[2]))
        assert slurm.set_gres_string(job) == said


def test_a_failed_job_tells_where_its_log_is(stubbed):
    stubbed.write("workflow/scripts/trajectories.py", "raise SystemExit('layer conv_in: the input is constant')")
    run = stubbed.snakemake("results/default/photos-class/calibration.safetensors")
    log = "results/default/photos-class/trajectories.log"
    assert run.returncode != 0 and f"log: {log}" in run.stdout
    assert (stubbed.folder / log).read_text(encoding="utf-8") == "layer conv_in: the input is constant\n"


SLOW_WRITER = """
import sys, time
from pathlib import Path
from quest.runtime.files import atomic
with atomic(sys.argv[sys.argv.index("-o") + 1]) as file:
    file.write_text("first half, ")
    if not Path("killed").exists():
        Path("writing").touch()
        time.sleep(300)
    file.write_text("first half, second half")
"""


def test_a_run_killed_in_mid_write_resumes(stubbed):
    stubbed.write("workflow/scripts/quantize.py", SLOW_WRITER)
    cell = stubbed.folder / "results/default/photos-class/rtn/w4a4"
    target = str((cell / "model.safetensors").relative_to(stubbed.folder))
    with (stubbed.folder / "killed.log").open("w", encoding="utf-8") as log:
        run = subprocess.Popen(**stubbed.command(target), stdout=log, stderr=log, start_new_session=True)
    try:
        deadline = time.monotonic() + 120
        while not (stubbed.folder / "writing").exists():
            assert time.monotonic() < deadline and run.poll() is None, (stubbed.folder / "killed.log").read_text(
                encoding="utf-8"
            )
            time.sleep(0.1)
    finally:
        if run.poll() is None:
            os.killpg(run.pid, signal.SIGKILL)  # Snakemake and the job at once, as when a machine goes down
        run.wait()
    assert not (stubbed.folder / target).exists()

    stubbed.write("killed", "")
    calibration = cell.parents[1] / "calibration.safetensors"
    made = calibration.stat().st_mtime_ns
    stubbed.snakemake("--unlock")
    again = stubbed.snakemake("--rerun-incomplete", target)
    assert again.returncode == 0, again.stdout
    assert (stubbed.folder / target).read_text(encoding="utf-8") == "first half, second half"
    assert calibration.stat().st_mtime_ns == made  # what was whole is not made again


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_method_that_diverges_ends_in_a_row_and_so_does_what_starts_from_it(project, uncond_pipe):
    """A learning rate that no scale survives: the jobs succeed, and every table says "diverged" and why."""
    uncond_pipe.save_pretrained(project.folder / "tiny")
    told = {"pipeline": "tiny", "sampler": "ddim", "steps": 4, "images": 12, "trajectories": 2, "evaluation": 2}
    project.configure(
        {
            "name": "default",
            "models": {"tiny": told | {"shards": 2}},
            "grid": [
                {"model": ["tiny"], "method": ["fp"], "bits": ["w32a32"]},
                {"model": ["tiny"], "method": ["rtn", "quest-suite", "efficient-dm"], "bits": ["w4a4"]},
            ],
            "methods": {
                "fp": {},
                "rtn": {},
                "quest-suite": {
                    "init": "rtn",
                    "lr_scale": 1e6,
                    "tla_iterations": 3,
                    "cma_iterations": 1,
                    "time_groups": 2,
                },
                "efficient-dm": {"init": "quest-suite", "iterations": 1},
            },
        }
    )
    run = project.snakemake("all", "report", timeout=1700)
    assert run.returncode == 0, run.stdout
    cell = project.folder / "results/default/tiny/quest-suite/w4a4"
    log = (cell / "quantize.log").read_text(encoding="utf-8")
    (said,) = re.findall(
        r"^diverged: (temporal layer alignment, iteration [12]: the loss is .*)$", log, flags=re.MULTILINE
    )
    assert not cell.joinpath("model.parts").exists()
    main = pd.read_csv(project.folder / "results/default/tables/main.csv")
    broken = main[main["method"].isin(["quest-suite", "efficient-dm"])]
    assert broken["value"].isna().all() and set(broken["metric"]) == set(main[main["method"] == "rtn"]["metric"])
    assert set(broken.loc[broken["method"] == "quest-suite", "note"]) == {f"diverged; {said}"}
    started = f"model.safetensors: quest-suite w4a4 diverged, so there is no denoiser: {said}"
    (note,) = set(broken.loc[broken["method"] == "efficient-dm", "note"])
    assert note == f"diverged; results/default/tiny/quest-suite/w4a4/{started}"
    assert main.loc[main["method"].isin(["fp", "rtn"]), "value"].notna().all()
    paired = pd.read_csv(project.folder / "results/default/tables/paired.csv").groupby(["method", "versus"])
    verdicts = {pair: set(rows["better"]) for pair, rows in paired}
    assert verdicts["quest-suite", "rtn"] == verdicts["quest-suite", "fp"] == {"quest-suite diverged"}
    assert verdicts["efficient-dm", "quest-suite"] == {"neither (both diverged)"}
    assert not read_arrays(cell / "samples-1.npz", ["images"])["images"].any()
    page = (project.folder / "results/default/report.html").read_text(encoding="utf-8")
    assert said.split(";")[0] in page

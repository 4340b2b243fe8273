"""The smoke config on a real Slurm cluster, which is this machine alone: `pytest -m cluster`, as root."""

import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pandas as pd
import pytest

from quest.planning import budget

ROOT = Path(__file__).parents[2]
SLURM = ROOT / "tests/cluster/slurm"
SMOKE = ["--configfile", "workflow/config/smoke.yaml"]
PROFILE = ["--workflow-profile", "workflow/profiles/slurm"]
# Jobs of a minute are looked after more often than those of hours.
HERE = ["--slurm-init-seconds-before-status-checks", "5", "--latency-wait", "5"]

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(3600)]


@pytest.fixture
def cluster(tmp_path):
    """A running cluster."""
    missing = [name for name in ("munged", "slurmctld", "slurmd", "sbatch") if shutil.which(name) is None]
    assert not missing, f"no {', '.join(missing)} here: `{SLURM.relative_to(ROOT)} install`, as root"
    folder = tmp_path / "slurm"
    folder.mkdir()
    try:
        subprocess.run([SLURM, "start", folder], check=True)
        yield
    finally:
        subprocess.run([SLURM, "stop", folder], check=True)


def jobs() -> pd.DataFrame:
    """Every job that Slurm was given so far: id, state, memory, log of its rule and wildcards."""
    form = "%i|%T|%m|%k"  # the comment is where Snakemake's plugin says what a job is
    command = ["squeue", "--states=all", "--noheader", "--sort=i", f"--format={form}"]
    listed = subprocess.run(command, capture_output=True, text=True, check=True, encoding="utf-8").stdout
    return pd.DataFrame([line.split("|") for line in listed.splitlines()], columns=["id", "state", "memory", "job"])


def running(log: Path, job: str) -> str:
    """The id of a running job, once its rule has written to `log`: "" before."""
    found = jobs().query("state == 'RUNNING' and job.str.contains(@job)")
    return found["id"].iloc[0] if len(found) and log.exists() and log.stat().st_size else ""


def test_the_smoke_config_on_slurm_survives_killed_jobs(cluster, project, unbroken):
    """One job is cancelled on the way; another one asks for less memory than it takes, is killed and gets more."""
    too_little = ["quantize", "scenes-class", "rtn", "w4a4", 600, 700, 60]  # it takes more than 900
    budget.write([dict(zip(budget.JOBS, too_little, strict=True))], project.folder / "results/smoke/jobs.csv")
    command = project.command(*PROFILE, *SMOKE, *HERE)
    log = project.folder / "snakemake.log"
    with log.open("w", encoding="utf-8") as file:
        run = subprocess.Popen(**command, stdout=file, stderr=file, start_new_session=True)
    try:
        sampled = project.folder / "results/smoke/scenes-class/fp/w32a32/sample-0.log"
        while not (killed := running(sampled, "fp_w32a32_0")):
            assert run.poll() is None, log.read_text(encoding="utf-8")
            time.sleep(1)
        time.sleep(3)
        subprocess.run(["scancel", killed], check=True)
        run.wait()
    finally:
        if run.poll() is None:
            os.killpg(run.pid, signal.SIGTERM)
            run.wait()
    said = log.read_text(encoding="utf-8")
    assert run.returncode == 0, said
    submitted = jobs()
    print(submitted.to_string())
    print(said)

    again = submitted[submitted["job"] == submitted.set_index("id").loc[killed, "job"]]
    assert again["state"].tolist() == ["CANCELLED", "COMPLETED"]
    assert again["memory"].tolist() == ["3000M", "6000M"]
    short = submitted[submitted["job"].str.contains("quantize.*_rtn_")]
    assert short["memory"].tolist() == ["700M", "1400M"]
    assert short["state"].tolist() == ["FAILED", "COMPLETED"]
    others = submitted.drop([*again.index, *short.index])
    assert set(others["state"]) == {"COMPLETED"}
    # Two sets of trajectories, the other quantize and the other five samples; the three metrics are one group. What is
    # light enough for the login node does not get there.
    assert len(others) == 9
    assert not others["job"].str.contains("tables|curves|grid").any()

    # Whatever executes the jobs, the tables are the same.
    assert project.smoke_tables() == unbroken

"""The smoke config, killed outright at random moments and started again: nothing is lost and nothing done twice."""

import os
import random
import re
import shutil
import signal
import subprocess
from collections import Counter

import numpy as np
import pytest

SMOKE = ["--configfile", "workflow/config/smoke.yaml"]
SECONDS = (5, 60)  # when a run is killed, from its start; two minutes would be the whole of it on two idle cores


def jobs(log: str) -> tuple[list[str], list[str]]:
    """The jobs that Snakemake says it started, and those it says are finished, by the first file they write."""
    started, numbers = [], {}
    for block in re.findall(r"^(?:local)?rule \w+:\n((?:    .*\n)+)", log, flags=re.MULTILINE):
        number = re.search(r"^    jobid: (\d+)", block, flags=re.MULTILINE)[1]
        output = re.search(r"^    output: ([^,\n]+)", block, flags=re.MULTILINE)
        if output:
            started.append(output[1])
            numbers[number] = output[1]
    return started, [numbers[n] for n in re.findall(r"^Finished jobid: (\d+)", log, flags=re.MULTILINE) if n in numbers]


class Killed:
    """A project whose run is killed and started again, with what it asked for and what it did."""

    def __init__(self, project):
        self.project, self.runs, self.finished = project, 0, Counter()

    def run(self, seconds: float | None) -> dict:
        """Start it, kill it after `seconds`; what it took to start it, what it finished and what was cut off."""
        asked = []
        if any((self.project.folder / ".snakemake/locks").glob("*")):
            assert self.project.snakemake(*SMOKE, "--unlock").returncode == 0
            asked.append("--unlock")
        plan = self.project.snakemake(*SMOKE, "--dry-run")
        if "IncompleteFilesException" in plan.stdout:
            assert "--rerun-incomplete" in plan.stdout  # Snakemake itself says what to do
            asked.append("--rerun-incomplete")
        self.runs += 1
        log = self.project.folder / f"run-{self.runs}.log"
        options = [option for option in asked if option != "--unlock"]
        with log.open("w", encoding="utf-8") as file:
            command = self.project.command(*SMOKE, *options)
            run = subprocess.Popen(**command, stdout=file, stderr=file, start_new_session=True)
        try:
            run.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            os.killpg(run.pid, signal.SIGKILL)  # Snakemake and its jobs at once, as when a machine goes down
            run.wait()
        started, finished = jobs(log.read_text(encoding="utf-8"))
        self.finished.update(finished)
        assert run.returncode in (0, -signal.SIGKILL), log.read_text(encoding="utf-8")
        cut = [output.removeprefix("results/smoke/") for output in started if output not in finished]
        return {"asked": asked, "finished": len(finished), "cut off": cut, "complete": run.returncode == 0}


def sampled_again(project):
    """A kill may hit between a file's writing and Snakemake's note of it: the job runs again and draws nothing."""
    cell = "results/smoke/scenes-class/quest-suite/w4a4"  # with time groups, of which a denoiser's call has one
    drawn = [project.folder / cell / f"{kind}-1.npz" for kind in ("samples", "features")]
    before = [dict(np.load(file)) for file in drawn]
    again = project.snakemake(*SMOKE, "--forcerun", str(drawn[0].relative_to(project.folder)), "--until", "sample")
    assert again.returncode == 0, again.stdout
    assert "\n0 images in" in "\n" + (project.folder / cell / "sample-1.log").read_text(encoding="utf-8")
    for file, arrays in zip(drawn, before, strict=True):
        after = dict(np.load(file))
        assert after.keys() == arrays.keys()
        assert all(np.array_equal(after[name], arrays[name]) for name in arrays if name != "metadata")


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("kills", [pytest.param(3, id="thrice"), pytest.param(20, id="twenty times")])
def test_a_run_killed_at_random_moments_ends_with_the_same_tables(project, unbroken, kills):
    moments = random.Random(kills)
    killed, left = Killed(project), kills
    while True:
        seconds = moments.uniform(*SECONDS) if left else None
        said = killed.run(seconds)
        print(f"kill after {seconds:.1f} s:" if seconds else "to the end:", said, flush=True)
        left -= bool(left and not said["complete"])
        if not said["complete"]:
            continue
        assert project.smoke_tables() == unbroken
        assert set(killed.finished.values()) == {1}, killed.finished  # what was finished is not done again
        assert "Nothing to be done" in project.snakemake(*SMOKE).stdout
        sampled_again(project)
        if not left:
            return
        shutil.rmtree(project.folder / "results")
        killed = Killed(project)

"""Snakemake in a copy of a process that has imported it: without its imports, a plan takes a third of the time."""

import multiprocessing
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
# What Snakemake imports for a plan. The project's own modules are not among them: each test has a copy of its own.
MODULES = ["snakemake.cli", "snakemake.report.html_reporter", "snakemake.storage", "jsonschema", "requests", "yte"]
MODULES += ["scipy.optimize", "smart_open", "platformdirs", "pydoc", "safetensors", "tqdm", "unittest", "pytest"]
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(MODULES)


def snakemake(arguments: list[str], folder: Path, environment: dict[str, str], log: Path, timeout: float) -> int:
    """Run Snakemake in a folder, as `python -m snakemake` does, and return its exit code. What it says is in `log`."""
    process = FORKS.Process(target=_run, args=(arguments, folder, environment, log))
    process.start()
    try:
        process.join(timeout)
        if process.exitcode is None:
            raise subprocess.TimeoutExpired(["snakemake", *arguments], timeout, log.read_bytes())
        return process.exitcode
    finally:
        process.kill()
        process.join()


def _run(arguments: list[str], folder: Path, environment: dict[str, str], log: Path) -> None:
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    with log.open("wb") as file:
        for stream in (sys.stdout, sys.stderr):
            os.dup2(file.fileno(), stream.fileno())
    # As if it had started here: the project's modules are those of the folder, not of the checkout.
    sys.path[:] = [str(folder), *(path for path in sys.path if path != str(ROOT))]
    sys.argv[:] = ["snakemake", *arguments]
    from snakemake.cli import main

    main(arguments)

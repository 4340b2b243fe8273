"""What made a file: commit, package versions, machine and time. Imports nothing heavy."""

import json
import os
import platform
import subprocess
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

from quest.files import atomic

PACKAGES = ("quest-suite", "torch", "torchvision", "diffusers", "transformers", "numpy", "scipy", "safetensors")


def provenance() -> dict:
    """Return {commit, dirty, versions, machine, date}, all of it fit for JSON.

    `commit` and `dirty` are None outside a checkout of this project. `dirty` tells of changes to tracked files only.
    """
    # An installed copy may lie inside another project's checkout, whose commit says nothing of this code.
    ours = _git("rev-parse", "--show-prefix") == "quest/"
    status = _git("status", "--porcelain", "--untracked-files=no") if ours else None
    return {
        "commit": _git("rev-parse", "HEAD") if ours else None,
        "dirty": None if status is None else bool(status),
        "versions": {"python": platform.python_version()} | {name: _version(name) for name in PACKAGES},
        "machine": {"cpu": _cpu(), "cores": os.cpu_count(), "system": f"{platform.system()} {platform.machine()}"},
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _git(*arguments: str) -> str | None:
    """The answer of git about the checkout this package lies in, or None where there is no checkout or no git."""
    command = ["git", "-C", str(Path(__file__).parent), *arguments]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _cpu() -> str:
    """Model name of the processor as the system tells it, e.g. "AMD EPYC 9B45"."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def write_json(path: str | Path, content: dict) -> None:
    """Write a result with the provenance of this process, all at once or not at all."""
    with atomic(path) as file:
        file.write_text(json.dumps(content | {"provenance": provenance()}))

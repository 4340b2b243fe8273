"""Record how a file was made: commit, package versions, machine, config, time, memory. Imports nothing heavy."""

import hashlib
import json
import os
import platform
import resource
import subprocess
import sys
import time
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

from quest.runtime.files import dumps, write_text

PACKAGES = ("quest-suite", "torch", "torchvision", "diffusers", "transformers", "numpy", "scipy", "safetensors")


CONFIG = "QUEST_CONFIG_SHA256"  # environment variable in which the workflow passes `config_hash` to its jobs


def provenance() -> dict:
    """Return {commit, dirty, versions, machine, core, date, config, wall_seconds, peak_memory_mb}, ready for JSON.

    `commit` and `dirty` are None outside a checkout of this project. `dirty` is about changes to tracked files only.
    `core` has the hash and instruction set of the compiled core; it is None if this process has not loaded the core.
    `config` is None outside the workflow. `wall_seconds` and `peak_memory_mb` (1e6 bytes, resident) describe this
    process so far; a script that calls this at its end therefore records nearly its whole job.
    """
    # An installed copy may lie inside another project's checkout, whose commit says nothing about this code.
    ours = _git("rev-parse", "--show-prefix") == "quest/runtime/"
    status = _git("status", "--porcelain", "--untracked-files=no") if ours else None
    core = sys.modules.get("quest.kernels.cpu.core")  # not imported here: it needs torch
    return {
        "commit": _git("rev-parse", "HEAD") if ours else None,
        "dirty": None if status is None else bool(status),
        "versions": {"python": platform.python_version()} | {name: _version(name) for name in PACKAGES},
        "machine": {"cpu": _cpu(), "cores": os.cpu_count(), "system": f"{platform.system()} {platform.machine()}"},
        "core": core and core.identity(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "config": os.environ.get(CONFIG),
        "wall_seconds": _age(),
        "peak_memory_mb": resident_memory(),
    }


def config_hash(config: dict) -> str:
    """SHA-256 of the content of a config; comments and the order of keys do not change it."""
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()


def _git(*arguments: str) -> str | None:
    """Run git in the checkout that contains this package. Returns its output, or None without a checkout or git."""
    command = ["git", "-C", str(Path(__file__).parent), *arguments]
    try:
        return subprocess.run(
            command, capture_output=True, text=True, check=True, timeout=30, encoding="utf-8"
        ).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _cpu() -> str:
    """Model name of the processor as the system reports it, e.g. "AMD EPYC 9B45"."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _age() -> float | None:
    """Seconds since this process started; None where the system does not report it (only Linux does)."""
    try:
        # Field 22, in clock ticks since the machine started; field 2 is a name in parentheses that may hold spaces.
        ticks = int(Path("/proc/self/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[19])
        return round(time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK"), 1)
    except (OSError, AttributeError):
        return None


def resident_memory() -> int:
    """Peak memory of this process so far, in MB (1e6 bytes). Linux counts in KiB, macOS in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(peak * (1 if sys.platform == "darwin" else 1024) / 1e6)


def write_json(path: str | Path, content: dict) -> None:
    """Write a result and the provenance of this process as JSON (`files.dumps`), all at once or not at all."""
    write_text(path, dumps(content | {"provenance": provenance()}))

"""One GPU for each job of a machine with several: a lock file per device, held until the process ends.

Snakemake knows how many GPUs there are (`--resources gpu=4`), not which. Slurm, which shows each job its own, needs
nothing of this and is not disturbed by it: a device is known by its UUID, not by its number.
"""

import fcntl
import os
import stat
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

# Open files of the leased devices: the system drops a lock when its process ends, however it ends, so none goes stale.
_held = []


def take(device: str) -> None:
    """Make "cuda" a device that no other process of this user has taken; waits while there is none.

    Returns at once for any other device: "cpu", or "cuda:1", which names one.
    """
    if device != "cuda":
        return
    import torch

    devices = [str(torch.cuda.get_device_properties(i).uuid) for i in range(torch.cuda.device_count())]
    torch.cuda.set_device(hold(devices))


def hold(devices: Sequence[str], folder: Path | None = None, pause: float = 1.0) -> int:
    """Lock the first of `devices` that is free, until this process ends, and return its place; waits for one.

    folder: where the lock files lie, the same for all that share the devices.
    Raises ValueError where there is no device at all.
    """
    if not devices:
        raise ValueError("device: cuda was asked for, and there is no GPU here; valid: cpu")
    folder = folder or Path(tempfile.gettempdir(), f"quest-gpus-{os.getuid()}")
    _own(folder)
    told = False
    while True:
        for place, name in enumerate(devices):
            # Opened without following a link: others may write where temporary files lie.
            flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
            file = os.fdopen(os.open(folder / f"{name}.lock", flags, 0o600), "a", encoding="utf-8")
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.close()
                continue
            _held.append(file)
            return place
        if not told:
            print(f"all {len(devices)} GPUs are taken (locks in {folder}); waiting", file=sys.stderr, flush=True)
            told = True
        time.sleep(pause)


def _own(folder: Path) -> None:
    """Make the folder, for this user alone. Raises ValueError for a link, or one that others own or may write to."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o022:
        raise ValueError(
            f"{folder}: locks of GPUs lie here, and it is no folder that only this user can write to; remove it, or "
            "set TMPDIR to a folder of yours"
        )

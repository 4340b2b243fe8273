"""Give each job on a machine with several GPUs its own device, by a lock file per device until the process ends.

Snakemake knows how many GPUs there are (`--resources gpu=4`), but not which one is free. Slurm shows each job only its
own GPU and does not need these locks; they do not disturb it, because they name a device by UUID, not by number.
"""

import fcntl
import os
import stat
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

# The open lock files. The system releases a lock when its process ends, even by a kill, so no lock goes stale.
_held = []


def take(device: str) -> None:
    """For "cuda", select a GPU that no other process of this user has locked, and wait while there is none.

    Does nothing for other devices: "cpu", or "cuda:1", which already names a GPU.
    """
    if device != "cuda":
        return
    import torch

    devices = [str(torch.cuda.get_device_properties(i).uuid) for i in range(torch.cuda.device_count())]
    torch.cuda.set_device(hold(devices))


def hold(devices: Sequence[str], folder: Path | None = None, pause: float = 1.0) -> int:
    """Lock the first free device until this process ends and return its index in `devices`; wait while none is free.

    folder: where the lock files lie; all processes that share the devices must use the same folder.
    Raises ValueError if `devices` is empty.
    """
    if not devices:
        raise ValueError("device: cuda was asked for, and there is no GPU here; valid: cpu")
    folder = folder or Path(tempfile.gettempdir(), f"quest-gpus-{os.getuid()}")
    _create_private(folder)
    announced = False
    while True:
        for place, name in enumerate(devices):
            # Links are not followed, because other users may also write into a folder of temporary files.
            flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
            file = os.fdopen(os.open(folder / f"{name}.lock", flags, 0o600), "a", encoding="utf-8")
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.close()
                continue
            _held.append(file)
            return place
        if not announced:
            print(f"all {len(devices)} GPUs are taken (locks in {folder}); waiting", file=sys.stderr, flush=True)
            announced = True
        time.sleep(pause)


def _create_private(folder: Path) -> None:
    """Create a folder for this user alone. Raises ValueError for a link, or if others own it or can write to it."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    status = folder.lstat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid() or status.st_mode & 0o022:
        raise ValueError(
            f"{folder}: GPU locks need a folder that only this user can write to, and this is none; remove it, or "
            "set TMPDIR to a folder of your own"
        )

"""Give each job its own GPU, or its own parts of one that jobs share, by lock files that it holds until it ends.

Snakemake knows how many GPUs there are (`--resources gpu=4`), but not which one is free. Slurm shows each job only its
own GPU and does not need these locks; they do not disturb it, because they name a device by UUID, not by number.

A job with a whole GPU holds the lock of the device alone. Jobs that share a GPU hold that lock together, and each holds
the locks of its parts alone.
"""

import fcntl
import os
import stat
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from itertools import islice
from pathlib import Path

VARIABLE = "QUEST_GPU_PARTS"  # in the environment: "2/8", the parts of a GPU that a job takes, and those that it has
# The open lock files. The system releases a lock when its process ends, even by a kill, so no lock goes stale.
_held = []


def parts() -> tuple[int, int]:
    """How many parts of a GPU this job takes, and how many a GPU has; by default the whole of one part."""
    taken, _, all_parts = os.environ.get(VARIABLE, "1/1").partition("/")
    return int(taken), int(all_parts)


def take(device: str) -> None:
    """For "cuda", select a GPU of which no other process of this user has locked the parts; wait while there is none.

    Does nothing for other devices: "cpu", or "cuda:1", which already names a GPU.
    """
    if device != "cuda":
        return
    import torch

    devices = [str(torch.cuda.get_device_properties(i).uuid) for i in range(torch.cuda.device_count())]
    torch.cuda.set_device(hold(devices, part=parts()))


def hold(devices: Sequence[str], folder: Path | None = None, pause: float = 1.0, part: tuple[int, int] = (1, 1)) -> int:
    """Lock the first free device until this process ends and return its index in `devices`; wait while none is free.

    folder: where the lock files lie; all processes that share the devices must use the same folder.
    part: what `parts` gives. Raises ValueError if `devices` is empty.
    """
    if not devices:
        raise ValueError("device: cuda was asked for, and there is no GPU here; valid: cpu")
    folder = folder or Path(tempfile.gettempdir(), f"quest-gpus-{os.getuid()}")
    _create_private(folder)
    announced = False
    while True:
        for place, name in enumerate(devices):
            if _lock(folder, name, *part):
                return place
        if not announced:
            print(f"all {len(devices)} GPUs are taken (locks in {folder}); waiting", file=sys.stderr, flush=True)
            announced = True
        time.sleep(pause)


def _lock(folder: Path, name: str, taken: int, parts: int) -> bool:
    """Hold a device, or so many of its parts, if they are free."""
    with ExitStack() as files:

        def held(lock, kind):
            # Links are not followed, because other users may also write into a folder of temporary files.
            flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
            file = os.fdopen(os.open(folder / f"{lock}.lock", flags, 0o600), "a", encoding="utf-8")
            files.enter_context(file)
            try:
                fcntl.flock(file, kind | fcntl.LOCK_NB)
            except BlockingIOError:
                return False
            return True

        whole = taken == parts
        free = held(name, fcntl.LOCK_EX if whole else fcntl.LOCK_SH)
        if free and not whole:
            mine = (i for i in range(parts) if held(f"{name}.{i}", fcntl.LOCK_EX))
            free = len(list(islice(mine, taken))) == taken
        if free:
            _held.append(files.pop_all())
        return free


def _create_private(folder: Path) -> None:
    """Create a folder for this user alone. Raises ValueError for a link, or if others own it or can write to it."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    status = folder.lstat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid() or status.st_mode & 0o022:
        raise ValueError(
            f"{folder}: GPU locks need a folder that only this user can write to, and this is none; remove it, or "
            "set TMPDIR to a folder of your own"
        )

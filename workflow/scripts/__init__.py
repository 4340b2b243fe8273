"""The scripts of the rules. Characters that the encoding of a terminal lacks are printed as escapes."""

import sys

from quest.runtime import command_line

for stream in (sys.stdout, sys.stderr):
    stream.reconfigure(errors="backslashreplace")


def opened(arguments) -> tuple:
    """Return the model and pipeline that the arguments name, and their sets of trajectories, the calibration set first.

    torch takes as many threads as they say; a GPU stays taken until the process ends.
    """
    with command_line.imports():
        import torch

        from quest.diffusion.calibration_set import CalibrationSet
        from quest.diffusion.models import get
        from quest.runtime import gpu_lock

    torch.set_num_threads(arguments.threads)
    device = getattr(arguments, "device", "cpu")
    gpu_lock.take(device)
    model = get(arguments.model)
    files = [getattr(arguments, name) for name in ("calibration", "evaluation") if name in arguments]
    return model, model.load(device=device), *(CalibrationSet.load(file).to(device) for file in files)

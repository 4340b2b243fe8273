"""Every method the suite can run. To add one: write a file with `quantize`, add a line here.

A method is `quantize(pipe, calibration, w, a, *, init=None, <hyperparameters>) -> pipe`: it maps a full-precision
pipeline to a quantized one and leaves the one it was given as it was.
"""

from functools import partial

import quest.finetune
from baselines import full_precision, rtn

METHODS = {
    "fp": full_precision.quantize,
    "rtn": rtn.quantize,
    "rtn-mse": partial(rtn.quantize, ranges="mse"),
    "quest": quest.finetune.quantize,
}

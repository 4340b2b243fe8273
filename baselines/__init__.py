"""Every method the suite can run. To add one: write a file with `quantize`, add a line here.

A method is `quantize(pipe, calibration, w, a, *, init=None, <hyperparameters>) -> pipe`: it maps a full-precision
pipeline to a quantized one and leaves the one it was given as it was.
"""

from functools import partial

import quest.finetune
from baselines import efficient_dm, full_precision, rtn

# What the released code of a paper keeps in float or at more bits than it says, of the rows named "...-as-released".
# Every other row quantizes all layers and attention products, the first and the last layer at 8 bits: the common stack.
KEPT = {
    "efficient-dm-as-released": efficient_dm.RELEASED,
}

METHODS = {
    "fp": full_precision.quantize,
    "rtn": rtn.quantize,
    "rtn-mse": partial(rtn.quantize, ranges="mse"),
    "efficient-dm": efficient_dm.quantize,
    "efficient-dm-as-released": partial(efficient_dm.quantize, keep=KEPT["efficient-dm-as-released"]),
    "quest": quest.finetune.quantize,
}

"""Every method the suite can run. To add one: write a file with `quantize`, add a line here.

A method is `quantize(pipe, calibration, w, a, *, init=None, <hyperparameters>) -> pipe`: it maps a full-precision
pipeline to a quantized one and leaves the one it was given as it was.
"""

from functools import partial

from baselines import (
    adaround,
    efficient_dm,
    full_finetune,
    full_precision,
    ptq4dm,
    ptqd,
    q_diffusion,
    qalora,
    quest,
    rtn,
    tfmq_dm,
)

# What the released code of a paper keeps in float or at other bits than the common stack, of the rows named
# "...-as-released" and of QuEST's "-official" one, whose first and last layer have 8-bit inputs but ordinary weights.
# Every other row quantizes all layers and attention products, the first and the last layer at 8 bits: the common stack.
KEPT = {
    "efficient-dm-as-released": efficient_dm.RELEASED,
    "ptq4dm-as-released": ptq4dm.RELEASED,
    "ptqd-as-released": ptqd.RELEASED,
    "tfmq-dm-as-released": tfmq_dm.RELEASED,
    "quest-official": quest.OFFICIAL["keep"],
}

METHODS = {
    "fp": full_precision.quantize,
    "rtn": rtn.quantize,
    "rtn-mse": partial(rtn.quantize, ranges="mse-zero-point"),
    "efficient-dm": efficient_dm.quantize,
    "efficient-dm-as-released": partial(efficient_dm.quantize, keep=KEPT["efficient-dm-as-released"]),
    "adaround": adaround.quantize,
    "adaround-ndtc": ptq4dm.round_weights,
    # Their own number of time groups, whatever a model's protocol says: ranges hold at all timesteps.
    "q-diffusion": partial(q_diffusion.quantize, time_groups=1),
    "ptq4dm": partial(ptq4dm.quantize, time_groups=1),
    "ptq4dm-as-released": partial(ptq4dm.released, keep=KEPT["ptq4dm-as-released"]),
    "ptqd": ptqd.quantize,
    "ptqd-as-released": partial(
        ptqd.quantize,
        keep=KEPT["ptqd-as-released"],
        weight_axis=None,
        bias_of="error",
        split=False,
        activation_ranges="mse",
    ),
    "tfmq-dm": tfmq_dm.quantize,
    "tfmq-dm-as-released": partial(tfmq_dm.quantize, keep=KEPT["tfmq-dm-as-released"], fsc_scope="all"),
    "full-finetune": full_finetune.quantize,
    "qalora": qalora.quantize,
    "quest": quest.quantize,
    "quest-paper": partial(quest.quantize, **quest.PAPER),
    "quest-official": partial(quest.quantize, **quest.OFFICIAL),
}

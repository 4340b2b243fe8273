"""Full precision in ways that are all full precision: null controls for every distance to it (`snakemake nulls`).

Torch is imported by the functions, since `environment` must act before it is.
"""

from collections.abc import Mapping
from dataclasses import replace
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING

from quest.diffusion.models import Model

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

# Kind -> what is different. Threads and instruction sets are those of a CPU.
KINDS = {
    "batches": "batches of at most half the size",
    "threads": "another number of threads",
    "isa": "lesser instruction sets",
    "bf16": "layers of the denoiser in bfloat16",
}
# The variables of ATen, oneDNN and MKL that choose instruction sets, for AVX2 and for less.
VARIABLES = ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS")
AVX2, LESS = ("avx2", "AVX2", "AVX2"), ("default", "SSE41", "SSE4_2")


def environment(cpuinfo: Path = Path("/proc/cpuinfo")) -> Mapping[str, str]:
    """The variables that give torch the next lesser instruction sets than those of this machine; set them before.

    AVX-512 becomes AVX2, and AVX2 becomes SSE4. A machine with neither has no lesser ones, and gets no variables.
    """
    flags = cpuinfo.read_text(encoding="utf-8").split() if cpuinfo.is_file() else []
    if "avx2" not in flags:
        return {}
    return dict(zip(VARIABLES, AVX2 if "avx512f" in flags else LESS, strict=True))


def threads(count: int) -> int:
    """Another number of threads."""
    return 2 if count == 1 else 1


def altered(pipe: "DiffusionPipeline", model: Model, kind: str) -> Model:
    """Prepare full precision for a null control. `pipe` is changed for bf16; returns the model to sample by.

    Noise comes from the seed of each image, so other batches have equal images but for the order of sums. Raises
    ValueError for batches of one image, which have no smaller ones.
    """
    from quest.diffusion.denoisers import denoiser_of

    if kind == "bf16":
        _in_bfloat16(denoiser_of(pipe))
    if kind != "batches":
        return model
    if model.batch_size == 1:
        raise ValueError(f"{model.name}: a batch is one image; the control by smaller batches needs 2 or more")
    # A divisor, so that the first image of a batch stays one.
    return replace(model, batch_size=max(n for n in range(1, model.batch_size) if model.batch_size % n == 0))


def _in_bfloat16(denoiser) -> None:
    """Compute products in bfloat16, as torch's autocast does. Latents stay in float32, and so does their noise."""
    import torch

    forward = denoiser.forward

    @wraps(forward)  # pipelines look at its signature
    def cast(*args, **kwargs):
        with torch.autocast(denoiser.device.type, torch.bfloat16):
            output = forward(*args, **kwargs)
        if isinstance(output, tuple):
            return (output[0].float(), *output[1:])
        output.sample = output.sample.float()
        return output

    denoiser.forward = cast

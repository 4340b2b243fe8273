"""The time embedding of a denoiser, before and after quantization.

Every residual block receives the embedding of the timestep through its own projection. The embedding depends on the
timestep only, so quantization changes it equally for every image (QuEST, arXiv:2402.03666, property "temporal
information"). It stays informative as long as its error is smaller than the distance between timesteps.
"""

import torch
from torch import Tensor, nn

from quest.diffusion.calibration_set import CalibrationSet
from quest.learning.alignment import outputs_of

PATH = "time embedding"  # the class of layers that timesteps pass through, see layer_names.LAYER_CLASSES


@torch.no_grad()
def embeddings(denoiser: nn.Module, calibration: CalibrationSet) -> Tensor:
    """The outputs of all time embedding projections at every timestep, noisiest first, [T, D].

    Raises ValueError for a denoiser without time embedding projections.
    """
    layers = [n for n, _ in denoiser.named_modules() if n.endswith(".time_emb_proj")]
    if not layers:
        raise ValueError("the denoiser has no time embedding projections (*.time_emb_proj)")
    rows = []
    with outputs_of(denoiser, layers) as seen:
        for t in calibration.timesteps:
            denoiser(**calibration.inputs((calibration.timestep == t).nonzero().flatten()[:1]))
            rows.append(torch.cat([seen[n][0] for n in layers]))
    return torch.stack(rows)


def moved(exact: Tensor, quantized: Tensor) -> dict[str, Tensor]:
    """Compare the error of quantized embeddings [T, D] with the distance between timesteps.

    Returns, each [T]: "error" |e~_t - e_t|; "apart" |e_t - e_s| and "apart_quantized" |e~_t - e~_s|, where s is the
    next cleaner timestep (the noisier one for the last); "nearest", the index of the exact embedding closest to e~_t.
    """
    neighbour = torch.arange(1, len(exact) + 1)
    neighbour[-1] = len(exact) - 2
    return {
        "error": (quantized - exact).norm(dim=1),
        "apart": (exact - exact[neighbour]).norm(dim=1),
        "apart_quantized": (quantized - quantized[neighbour]).norm(dim=1),
        "nearest": torch.cdist(quantized.double(), exact.double()).argmin(1),
    }
